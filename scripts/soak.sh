#!/usr/bin/env bash
# The long form: the README's install on two machines under real systemd (scripts/machines.sh; as root), and the demo on a bare
# Debian (scripts/bare.sh; as root); tunnels whose keys change
# each second under load, and that are cut off for minutes; then the whole test set again and again with many random cases,
# and a lab under a storm of attaches, detaches, killed agents, a killed server and lost packets, half of the time each; between
# them the fault table once, a few minutes.
#   SOAK_MINUTES=30      how long storm and tests, building and what comes before not counted; what has begun is finished
#   SOAK_REKEY_SECONDS=60, SOAK_MBITS=500    how long keys change under load, and TCP's rate; a tenth of it is UDP
#   SOAK_CUT_SECONDS=300                     how long hosts are cut off from each other
#   SOAK_SEED=N          the storm's seed; it is printed, so that a storm can be had again
#   PROPTEST_CASES=N     random cases for each property
#   DROVEWAY_SOAK_BYTES=N  bytes of one TCP stream between encrypted hosts; those with offloads refused get a tenth
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=${SOAK_MINUTES:-30}
case $minutes in '' | *[!0-9]* | 0) echo "error: SOAK_MINUTES=$minutes is not a number of minutes" >&2; exit 2 ;; esac
export PROPTEST_CASES=${PROPTEST_CASES:-20000}
seed=${SOAK_SEED:-$(date +%s)}
half=$((minutes * 30))
# For the tunnels alone: the rounds of all tests have their short forms.
export -n SOAK_REKEY_SECONDS SOAK_MBITS SOAK_CUT_SECONDS

echo "building"
cargo test --workspace --locked --no-run --quiet

if [ "$(id -u)" -eq 0 ]; then
  cargo build --locked --quiet -p droveway
  scripts/machines.sh
  scripts/bare.sh
else
  echo "passed over: an install under systemd, and on a bare Debian, needs root"
fi

echo "tunnels: the program as it is released, nothing beside it"
cargo build --release --locked --quiet
SOAK_PROGRAM=$PWD/target/release/droveway SOAK_CUT_SECONDS=${SOAK_CUT_SECONDS:-300} \
  SOAK_REKEY_SECONDS=${SOAK_REKEY_SECONDS:-60} SOAK_MBITS=${SOAK_MBITS:-500} \
  cargo test -p droveway --locked --test main -- rekeys:: mended:: --test-threads 1 --nocapture

echo "storm: $half s, SOAK_SEED=$seed"
SOAK_SECONDS=$half SOAK_SEED=$seed cargo test -p droveway --locked --test storm -- --nocapture

echo "fault table, SOAK_SEED=$seed"
SOAK_FAULTS=1 SOAK_SEED=$seed cargo test -p droveway --locked --test main table:: -- --nocapture

echo "streams of ${DROVEWAY_SOAK_BYTES:=10000000000} bytes, with every offload refused in turn"
DROVEWAY_SOAK_BYTES=$DROVEWAY_SOAK_BYTES cargo test -p agent --locked --test dataplane -- offloads --nocapture

round=0
started=$SECONDS
while [ "$round" -eq 0 ] || [ $((SECONDS - started)) -lt "$half" ]; do
  round=$((round + 1))
  echo "round $round of all tests, PROPTEST_CASES=$PROPTEST_CASES"
  scripts/test.sh --quiet
done
echo "soak: tunnels, $round rounds of all tests and a storm of $half s: all good"
