#!/usr/bin/env bash
# The walk: an app of three containers on two hosts, one network, by name. Everything printed is live output.
#   scripts/demo.sh up      the walk; what is there of an earlier one goes first
#   scripts/demo.sh down    takes it away
#   scripts/demo.sh check   whether it can be made here, before much is built
set -euo pipefail
cd "$(dirname "$0")/.."

lab=demo
droveway=${DROVEWAY:-target/release/droveway}
stack=rocket-chat

bold=$'\e[1m' dim=$'\e[2m' off=$'\e[0m'
[ -t 1 ] || bold='' dim='' off=''
title() { printf '\n%s== %s%s\n' "$bold" "$1" "$off"; }
look() { printf '%s   look: %s%s\n' "$dim" "$1" "$off"; }
show() { printf '%s$ %s%s\n' "$dim" "$*" "$off"; "$@" 2>&1 | sed 's/^/  /'; }
on() { "$droveway" lab --lab "$lab" exec "$@"; }

if [ "${1:-up}" = down ]; then
  exec "$droveway" lab --lab "$lab" down
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "error: the demo starts Docker Engines, which needs root: run make demo as root (with cargo in its PATH)" >&2
  exit 1
fi
[ "${1:-up}" != check ] || exit 0
# Interrupted, or by an error that stands above.
trap '[ $? -eq 0 ] || echo "The demo did not come to its end; make demo-down takes away what there is of it." >&2' EXIT

title "A lab of two hosts, each with its own agent and Docker Engine"
"$droveway" lab --lab "$lab" down >/dev/null
"$droveway" lab --lab "$lab" up --hosts 2 --docker >/dev/null
look "below, 'on HOST -- COMMAND' is short for: $droveway lab --lab $lab exec HOST -- COMMAND"

# An image from what Debian has: busybox, statically linked.
image() {
  local root
  root=$(mktemp -d)
  mkdir -p "$root"/{bin,www,etc,tmp,proc,sys}
  cp "$(command -v busybox)" "$root/bin/busybox"
  for applet in sh sleep ping traceroute wget httpd nc ip arp nslookup cat cp ls echo date hostname; do
    ln -s busybox "$root/bin/$applet"
  done
  tar -C "$root" -c .
  rm -rf "$root"
}

title "Images made on the spot, and the stack $stack: mongo and hubot on h2, rocketchat on h1"
for host in h1 h2; do
  image | on $host -- docker import - app:demo >/dev/null
done

# Stand-ins that talk to each other: a store that answers over HTTP, a chat server that reads from it and serves what it
# read, a bot that asks the chat server. `--name` is the container, the labels are its place in the stack.
start() { # host name command
  on "$1" -- docker run -d --network managed --name "$2" --label droveway.stack=$stack --label "droveway.service=$2" \
    app:demo sh -c "$3" >/dev/null
  echo "  $2 on $1"
}
start h2 mongo 'echo "{\"rooms\": [\"general\"], \"served_by\": \"mongo\"}" >/www/rooms; exec httpd -f -p 27017 -h /www'
start h1 rocketchat 'httpd -p 3000 -h /www; while :; do
    wget -q -O /www/new http://mongo:27017/rooms && cp /www/new /www/rooms; sleep 1; done'
start h2 hubot 'while :; do wget -q -O - http://rocketchat:3000/rooms && echo " <- rocketchat"; sleep 1; done'

for _ in $(seq 100); do
  on h2 -- docker logs hubot 2>/dev/null | grep -q mongo && break
  sleep 0.2
done
show on h2 -- docker logs --tail 2 hubot
look "hubot (h2) asked rocketchat (h1), which had asked mongo (h2): each by name, over the overlay"

address() { on "$1" -- docker inspect -f '{{.NetworkSettings.Networks.managed.IPAddress}}' "$2"; }
mongo=$(address h2 mongo) hubot=$(address h2 hubot) rocketchat=$(address h1 rocketchat)

title "Who is where"
printf '  %-6s %-12s %-18s %s\n' HOST CONTAINER MAC ADDRESSES
for pair in h1/rocketchat h2/mongo h2/hubot; do
  host=${pair%/*} name=${pair#*/}
  mac=$(on "$host" -- docker inspect -f '{{.NetworkSettings.Networks.managed.MacAddress}}' "$name")
  addresses=$(on "$host" -- docker exec "$name" ip -o -4 addr show dev eth0 | sed 's/.*inet \([^ ]*\).*/\1/' | tr '\n' ' ')
  printf '  %-6s %-12s %-18s %s\n' "$host" "$name" "$mac" "$addresses"
done
look "one interface and one address each, unique in 10.42.0.0/16; locally administered MACs"
for host in h1 h2; do
  echo "  router on $host:"
  on $host -- ip netns exec droveway-managed ip -o -4 addr show dev br0 | sed 's/ *\\.*//; s/^/    /'
done
look "the router has its own address, the gateway 10.42.0.1 (the same on each host) and 169.254.169.250"

title "Same host: mongo to hubot"
show on h2 -- docker exec mongo ping -c 2 hubot
look "answered by name, ttl=64: nobody is in between"
show on h2 -- docker exec mongo traceroute -n "$hubot"
look "1 hop"

title "Other host: mongo to rocketchat"
show on h2 -- docker exec mongo ping -c 2 rocketchat.$stack.droveway.internal
look "ttl=62: two routers in between"
show on h2 -- docker exec mongo traceroute -n "$rocketchat"
look "3 hops, each answering: own router, far router, container"

title "Router to router"
router() { on "$1" -- ip netns exec droveway-managed ip -o -4 addr show dev br0 | sed -n 's/.*inet \(10\.42\.[0-9.]*\)\/16.*/\1/p'; }
show on h1 -- ip netns exec droveway-managed ping -c 2 "$(router h2)"
look "ttl=64: routers are neighbours on the overlay"

title "What mongo knows of its neighbours"
on h2 -- docker exec mongo nslookup rocketchat.$stack.droveway.internal 169.254.169.250 >/dev/null
show on h2 -- docker exec mongo ip neigh
look "rocketchat (other host, $rocketchat) and 169.254.169.250 are at the own router's MAC; hubot ($hubot) at its own"

title "Names"
show on h2 -- docker exec mongo cat /etc/resolv.conf
look "Docker's resolver stays; what it does not know reaches the router, which knows the asker's stack"
show on h2 -- docker exec mongo nslookup rocketchat.$stack.droveway.internal 169.254.169.250
show on h1 -- docker exec rocketchat wget -qO - http://169.254.169.250/latest/self/container/service_name
look "metadata of the asker, from 169.254.169.250 as well"

title "docker inspect"
show on h1 -- docker inspect -f '{{json .NetworkSettings.Networks.managed}}' rocketchat
look "the managed address is Docker's own"
show on h1 -- docker network ls
look "the managed network is there without anybody having made it"

title "What the underlay sees"
secret="canary-$RANDOM$RANDOM"
on h2 -- docker exec mongo sh -c "echo $secret >/www/secret"
show "$droveway" lab --lab $lab capture --find "$secret" -- \
  "$droveway" lab --lab $lab exec h1 -- docker exec rocketchat wget -qO - http://mongo:27017/secret
look "rocketchat (h1) got $secret from mongo (h2); a capture of the whole underlay saw ESP, and not that text"

title "The tunnel, as h1 sees it"
show on h1 -- droveway tunnel ls
show on h1 -- droveway tunnel inspect h2

title "What the cluster says of itself"
show "$droveway" lab --lab $lab exec server -- droveway endpoint ls
show "$droveway" lab --lab $lab exec server -- droveway host ls

cat <<EOF

${bold}Go on by hand${off} (as root, in this directory):
  $droveway lab --lab $lab exec h1 -- docker run --rm --network managed app:demo ping -c 3 mongo
  $droveway lab --lab $lab exec h1 -- droveway status
  $droveway lab --lab $lab exec h1 -- droveway tunnel rekey h2
  $droveway lab --lab $lab exec server -- droveway network create red --subnet 10.43.0.0/16
  $droveway lab --lab $lab cut h1 h2        # and: heal
  make demo-down                             # take it all away
EOF
