#!/usr/bin/env bash
# Installs with apt what is missing of what the given purposes need. Purposes: run, test, demo, bench.
set -euo pipefail

declare -A packages=(
  [run]="nftables iproute2"
  [build]="build-essential cmake pkg-config"
  [test]="nftables iproute2 iptables iputils-ping traceroute tcpdump bind9-dnsutils busybox-static docker.io util-linux procps jq arping strongswan-swanctl charon-systemd libstrongswan-standard-plugins libcharon-extra-plugins"
  [demo]="nftables iproute2 iptables iputils-ping traceroute tcpdump bind9-dnsutils busybox-static docker.io util-linux procps jq"
  [bench]="nftables iproute2 iptables iputils-ping iperf3 busybox-static util-linux procps jq"
)

wanted=()
for purpose in "$@"; do
  read -r -a some <<<"${packages[$purpose]:?no such purpose: $purpose}"
  wanted+=("${some[@]}")
done

missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "error: ${missing[*]} are needed and apt-get is not here; install them by hand" >&2
  exit 1
fi
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "error: install ${missing[*]} as root first" >&2; exit 1; }
  sudo=(sudo)
fi
echo "installing with apt: ${missing[*]}" >&2
# A service that a package brings (docker.io its engine) has no business starting on a machine that only builds.
policy=/usr/sbin/policy-rc.d
made=no
if [ ! -e $policy ] && [ ! -d /run/systemd/system ]; then
  printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee $policy >/dev/null
  "${sudo[@]}" chmod +x $policy
  made=yes
fi
cleanup() { [ "$made" = no ] || "${sudo[@]}" rm -f $policy; }
trap cleanup EXIT
"${sudo[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
