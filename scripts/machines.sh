#!/usr/bin/env bash
# The README's install on two machines, word by word: Debian with systemd and Docker, each in systemd-nspawn; then both are
# stopped and started again. As root. DROVEWAY is the binary, MACHINES where the Debian tree is kept (made if missing).
set -euo pipefail
cd "$(dirname "$0")/.."

droveway=${DROVEWAY:-target/debug/droveway}
home=$(realpath -m "${MACHINES:-${CARGO_TARGET_DIR:-target}/machines}")
bridge=dwm$((BASHPID % 100000))
declare -A address=([m1]=10.0.0.5 [m2]=10.0.0.6) machine=()
fail() { echo "error: $*" >&2; exit 1; }

run=$(mktemp -d /var/tmp/droveway-machines.XXXXXX)
leader() { pgrep -P "${machine[$1]}" | head -n 1; }
inside() { # machine script: as root, in the machine's /root
  nsenter -t "$(leader "$1")" -m -u -i -n -p -C -r -w \
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root bash -ec "cd /root; $2"
}
off() { # machine
  [ -n "${machine[$1]:-}" ] || return 0
  local pid=${machine[$1]}
  kill -RTMIN+4 "$(leader "$1")" 2>/dev/null || true   # systemd: power off
  timeout 60 tail --pid="$pid" -f /dev/null || kill -KILL "$(leader "$1")" "$pid" 2>/dev/null || true
  machine[$1]=
}
cleanup() {
  for m in m1 m2; do
    off $m
    umount -l "$run/$m" 2>/dev/null || true
  done
  ip link del "$bridge" 2>/dev/null || true
  rm -rf "$run"
}
trap cleanup EXIT
until_so() { # what machine script
  local end=$((SECONDS + 90))
  until inside "$2" "$3" >"$run/said" 2>&1; do
    [ $SECONDS -lt $end ] || { cat "$run/said" >&2; inside "$2" 'journalctl -b -u droveway-\* -u docker --no-pager | tail -n 40' >&2; fail "not so: $1"; }
    sleep 0.5
  done
  echo "  $1"
}

if [ ! -e "$home/tree/done" ]; then
  echo "making a Debian tree in $home"
  rm -rf "$home/tree"
  mkdir -p "$home"
  debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,nftables,iproute2,iptables,docker.io,busybox-static,procps \
    bookworm "$home/tree" >"$home/log" 2>&1 || fail "debootstrap: see $home/log"
  # Nothing is enabled for being there at the first start.
  mkdir -p "$home/tree/etc/systemd/system-preset"
  echo 'disable droveway-*' >"$home/tree/etc/systemd/system-preset/00-droveway.preset"
  touch "$home/tree/done"
fi

on() { # machine
  (cd "$run" && exec setsid systemd-nspawn -q --boot -D "$run/$1" -M "$bridge$1" --register=no --keep-unit \
    --network-bridge="$bridge" --capability=all --system-call-filter='@system-service bpf @mount' </dev/null >>"$run/$1.log" 2>&1) &
  machine[$1]=$!
  local end=$((SECONDS + 60))
  until [ -n "$(leader "$1")" ] && inside "$1" 'systemctl is-system-running | grep -qE "running|degraded"' 2>/dev/null; do
    [ $SECONDS -lt $end ] || { tail "$run/$1.log" >&2; fail "machine $1 does not start"; }
    sleep 0.5
  done
}

echo "two machines"
ip link add "$bridge" type bridge
ip link set "$bridge" up
for m in m1 m2; do
  mkdir -p "$run/up-$m" "$run/work-$m" "$run/$m"
  mount -t overlay overlay -o "lowerdir=$home/tree,upperdir=$run/up-$m,workdir=$run/work-$m" "$run/$m"
  echo $m >"$run/$m/etc/hostname"
  rm -f "$run/$m/etc/machine-id"
  mkdir -p "$run/$m/etc/systemd/network" "$run/$m/etc/systemd/system/multi-user.target.wants"
  printf '[Match]\nName=host0\n[Network]\nAddress=%s/24\nGateway=10.0.0.1\n' "${address[$m]}" \
    >"$run/$m/etc/systemd/network/05-host0.network"
  ln -sf /lib/systemd/system/systemd-networkd.service "$run/$m/etc/systemd/system/multi-user.target.wants/"
  # What nspawn shows read-only, and an engine has to write to. A machine that is none of nspawn's needs none of this.
  cat >"$run/$m/etc/systemd/system/cgroups.service" <<'END'
[Unit]
Before=docker.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'for c in /sys/fs/cgroup /sys/fs/cgroup/*; do mount -o remount,bind,rw $c 2>/dev/null || true; done'
END
  ln -sf ../cgroups.service "$run/$m/etc/systemd/system/multi-user.target.wants/"
  make -s -o build install "DESTDIR=$run/$m" "DROVEWAY=$droveway" >/dev/null
  on $m
  inside $m 'mkdir -p image/bin; cp "$(command -v busybox)" image/bin/; for a in sh sleep ping; do ln -sf busybox image/bin/$a; done
    tar -C image -c . | docker import - app:test >/dev/null'
done

# The n-th block of commands in the README's section on two machines.
block() {
  awk -v n="$1" '/^## /{on = /^## Install it on two machines/} on && /^```sh/{i++; show = i == n; next} /^```/{show = 0} show' README.md
}
echo "the README, word by word"
inside m1 "systemctl daemon-reload; $(block 2)" 2>/dev/null
cp "$run/m1/root/token" "$run/m2/root/token"
for m in m1 m2; do
  inside $m "systemctl daemon-reload; $(block 3)" >"$run/said" 2>&1 || { cat "$run/said" >&2; fail "the README's commands on $m"; }
  grep -q '^Server: ' "$run/said" || fail "droveway status says nothing on $m"
  until_so "$m is connected" $m "droveway status | grep -q ', connected'"
done
for m in m1 m2; do until_so "managed is on $m's engine" $m 'docker network inspect managed'; done
inside m1 'docker run -d --restart always --network managed --name db app:test sleep 100000
  docker run -d --restart always --label droveway.network=managed --name plain app:test sleep 100000' >/dev/null
inside m2 'docker run -d --restart always --network managed --name web app:test sleep 100000' >/dev/null
all_meet() {
  for name in db plain; do until_so "$1: web reaches $name" m2 "docker exec web ping -c 1 -W 2 $name"; done
  until_so "$1: db reaches web" m1 'docker exec db ping -c 1 -W 2 web'
}
all_meet "at first"
inside m1 'systemctl restart droveway-agent'
all_meet "after a restart of an agent"
inside m1 'systemctl restart docker'
all_meet "after a restart of an engine"
for m in m1 m2; do off $m; done
for m in m1 m2; do on $m; done
all_meet "after both machines were started again"
until_so "three endpoints are left" m1 '[ "$(droveway endpoint ls -o json | grep -c "\"kind\"")" -eq 3 ]'
for m in m1 m2; do until_so "$m is as it should be" $m 'droveway status | grep -q "Troubles: *none"'; done
echo "machines: all good"
