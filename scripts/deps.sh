#!/usr/bin/env bash
# Installs with apt what is missing of what the given purposes need. Purposes: run, test, demo, soak, bench.
# Nothing that is installed is ever removed for it.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A packages=(
  [run]="nftables iproute2"
  [build]="build-essential cmake pkg-config ca-certificates"
  [test]="nftables iproute2 iptables iputils-ping traceroute tcpdump bind9-dnsutils busybox-static docker.io util-linux procps jq curl
    arping libfaketime strongswan-swanctl charon-systemd libstrongswan-standard-plugins libstrongswan-extra-plugins libcharon-extra-plugins etcd-server"
  [demo]="nftables iproute2 iptables iputils-ping traceroute tcpdump bind9-dnsutils busybox-static docker.io util-linux procps jq"
  [soak]="debootstrap systemd-container"
  [bench]="nftables iproute2 iptables iputils-ping iperf3 busybox-static util-linux procps jq wireguard-go wireguard-tools
    strongswan-swanctl charon-systemd libstrongswan-standard-plugins libstrongswan-extra-plugins libcharon-extra-plugins"
)

wanted=()
for purpose in "$@"; do
  # Split at newlines too.
  read -r -d '' -a some <<<"${packages[$purpose]:?no such purpose: $purpose}" || true
  wanted+=("${some[@]}")
done

missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
# Tests of interoperation boot a Debian kernel in qemu. Where either cannot be had they say so and are counted as skipped.
kernel=${CARGO_TARGET_DIR:-target}/guest-kernel
have_qemu() { command -v qemu-system-x86_64 >/dev/null || [ -x "$kernel/qemu-system-x86_64" ]; }
guest=no
case " $* " in *" test "*)
  if ! have_qemu || [ ! -e "$kernel/vmlinuz" ]; then guest=yes; fi ;;
esac
[ "${#missing[@]}" -gt 0 ] || [ $guest = yes ] || exit 0

if ! command -v apt-get >/dev/null; then
  [ "${#missing[@]}" -gt 0 ] || { echo "no apt-get: tests that need a guest's kernel will be skipped" >&2; exit 0; }
  echo "error: ${missing[*]} are needed and apt-get is not here; install them by hand" >&2
  exit 1
fi
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "error: install ${missing[*]:-qemu-system-x86} as root first" >&2; exit 1; }
  sudo=(sudo)
fi
# A service that a package brings (docker.io its engine) has no business starting on a machine that only builds.
policy=/usr/sbin/policy-rc.d
made=no
if [ ! -e $policy ] && [ ! -d /run/systemd/system ]; then
  printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee $policy >/dev/null
  "${sudo[@]}" chmod +x $policy
  made=yes
fi
scratch=$(mktemp -d)
cleanup() {
  rm -rf "$scratch"
  [ "$made" = no ] || "${sudo[@]}" rm -f $policy
}
trap cleanup EXIT
install() {
  echo "installing with apt: $*" >&2
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends --no-remove "$@" >/dev/null
}
# The kernel of the package, and of its modules those that a guest may load: unpacked, not installed.
unpack_kernel() {
  local package
  package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
  [ -n "$package" ] || return 1
  echo "unpacking $package for guests" >&2
  (cd "$scratch" && apt-get download -qq "$package" 2>/dev/null && dpkg-deb -x ./*.deb .) || return 1
  local modules
  modules=$(echo "$scratch"/lib/modules/*/kernel)
  mkdir -p "$kernel/modules"
  cp -a "$modules"/{crypto,arch,net,lib} "$kernel/modules/"
  cp -a "$modules"/drivers/{net,virtio} "$kernel/modules/"
  cp "$scratch"/boot/vmlinuz-* "$kernel/vmlinuz"
}
# qemu and what it is linked with, where it cannot be installed beside another package: unpacked too.
unpack_qemu() {
  local packages root=$kernel/qemu
  packages=$(apt-get install -s -qq --no-install-recommends qemu-system-x86 | awk '$1 == "Inst" { print $2 }')
  [ -n "$packages" ] || return 1
  echo "unpacking qemu-system-x86 for guests" >&2
  mkdir "$scratch/qemu" && rm -rf "$root" && mkdir -p "$root"
  # shellcheck disable=SC2086 # a list of words
  (cd "$scratch/qemu" && apt-get download -qq $packages 2>/dev/null) || return 1
  local package
  for package in "$scratch"/qemu/*.deb; do dpkg-deb -x "$package" "$root" || return 1; done
  cat >"$kernel/qemu-system-x86_64" <<'EOF'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/qemu
libraries=$root/usr/lib/$(uname -m)-linux-gnu
LD_LIBRARY_PATH=$libraries:$root/lib/$(uname -m)-linux-gnu QEMU_MODULE_DIR=$libraries/qemu exec "$root/usr/bin/qemu-system-x86_64" \
  -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
EOF
  chmod +x "$kernel/qemu-system-x86_64"
  "$kernel/qemu-system-x86_64" --version >/dev/null || { rm "$kernel/qemu-system-x86_64"; return 1; }
}

"${sudo[@]}" apt-get update -qq
[ "${#missing[@]}" -eq 0 ] || install "${missing[@]}"
if [ $guest = yes ]; then
  have_qemu || install qemu-system-x86 2>/dev/null || unpack_qemu ||
    echo "qemu-system-x86 cannot be installed here: tests that need a guest will be skipped" >&2
  [ -e "$kernel/vmlinuz" ] || unpack_kernel ||
    echo "linux-image-cloud-amd64 cannot be had here: tests that need a guest will be skipped" >&2
fi
