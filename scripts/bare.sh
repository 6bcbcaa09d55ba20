#!/usr/bin/env bash
# `make demo`, twice, and `make demo-down`, twice, from a clean clone of HEAD on a bare Debian: made by debootstrap with git and make,
# with this machine's Rust. As root. `scripts/bare.sh test`: `make test` instead, which installs what tests need there.
# BARE is where the Debian tree is kept (made if missing). What was built for this tree with the dev profile is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
# Mounts are ours alone, and end with us.
[ "${BARE_OWN_MOUNTS:-}" = yes ] || BARE_OWN_MOUNTS=yes exec unshare -m --propagation private "$0" "$@"

home=$(realpath -m "${BARE:-${CARGO_TARGET_DIR:-target}/bare}")
if [ ! -e "$home/tree/done" ]; then
  echo "making a Debian tree in $home"
  rm -rf "$home/tree"
  mkdir -p "$home"
  debootstrap --variant=minbase --include=git,make bookworm "$home/tree" >"$home/log" 2>&1 ||
    { echo "error: debootstrap: see $home/log" >&2; exit 1; }
  touch "$home/tree/done"
fi

run=$(mktemp -d /var/tmp/droveway-bare.XXXXXX)
root=$run/root
inside() { # script: as root, in the clone. Not by chroot alone: whoever is in one can make no user namespace.
  # shellcheck disable=SC2016 # Expanded inside.
  unshare -m --propagation private sh -c 'cd "$1" && pivot_root . mnt/old && umount -l mnt/old && shift && exec chroot . "$@"' - "$root" \
    env -i HOME=/root PATH=/root/.cargo/bin:/usr/sbin:/usr/bin:/sbin:/bin PROFILE=dev CARGO_INCREMENTAL=0 \
    bash -ec "[ ! -d /root/droveway ] || cd /root/droveway; $1"
}
cleanup() {
  [ ! -x "$root/root/droveway/target/debug/droveway" ] || inside 'make -s demo-down' >/dev/null || true
  umount -Rl "$root" 2>/dev/null || true
  rm -rf "$run"
}
trap cleanup EXIT

mkdir -p "$run"/{root,upper,work}
mount -t overlay overlay -o "lowerdir=$home/tree,upperdir=$run/upper,workdir=$run/work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mkdir -p "$root"/{root/.cargo,root/.rustup,mnt/source,mnt/target,mnt/old} target
mount --bind "${CARGO_HOME:-$HOME/.cargo}" "$root/root/.cargo"
mount --bind "${RUSTUP_HOME:-$HOME/.rustup}" "$root/root/.rustup"
mount --bind "$(git rev-parse --path-format=absolute --git-common-dir)" "$root/mnt/source"
mount --bind target "$root/mnt/target"
cp /etc/resolv.conf "$root/etc/resolv.conf"

inside "git clone -q /mnt/source /root/droveway; cd /root/droveway; git checkout -q $(git rev-parse HEAD); ln -s /mnt/target target"
case ${1:-demo} in
  demo)
    inside 'make demo'
    inside 'make demo' >"$run/again" 2>&1 || { cat "$run/again" >&2; exit 1; }
    for _ in 1 2; do inside 'make demo-down'; done ;;
  test) inside 'make test' ;;
  *) echo "error: $1: there are demo and test" >&2; exit 2 ;;
esac
echo "bare: all good"
