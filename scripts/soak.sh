#!/usr/bin/env bash
# The long form: the whole test set again and again with many random cases, and a lab under a storm of attaches,
# detaches, killed agents, a killed server and lost packets. Half of the time each.
#   SOAK_MINUTES=30      how long, building not counted; what has begun is finished
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

echo "building"
cargo test --workspace --locked --no-run --quiet

echo "storm: $half s, SOAK_SEED=$seed"
SOAK_SECONDS=$half SOAK_SEED=$seed cargo test -p droveway --locked --test storm -- --nocapture

echo "streams of ${DROVEWAY_SOAK_BYTES:=10000000000} bytes, with every offload refused in turn"
DROVEWAY_SOAK_BYTES=$DROVEWAY_SOAK_BYTES cargo test -p agent --locked --test dataplane -- offloads --nocapture

round=0
started=$SECONDS
while [ "$round" -eq 0 ] || [ $((SECONDS - started)) -lt "$half" ]; do
  round=$((round + 1))
  echo "round $round of all tests, PROPTEST_CASES=$PROPTEST_CASES"
  scripts/test.sh --quiet
done
echo "soak: $round rounds of all tests and a storm of $half s: all good"
