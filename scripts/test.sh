#!/usr/bin/env bash
# All tests, as CI runs them. Arguments go to cargo: scripts/test.sh -p plan; scripts/test.sh -- names
# Tests that need namespaces make their own, as root or, where the kernel allows it, in a user namespace.
set -euo pipefail
cd "$(dirname "$0")/.."

# A lab is a handful of processes that talk to each other: more than a few at once measure the machine, not the program.
cores=$(nproc)
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((cores < 4 ? cores : 4))}
export RUST_BACKTRACE=${RUST_BACKTRACE:-1}
# Tests that cannot be made here say so and why; a run that passed over some does not look like one that did not.
DROVEWAY_SKIPPED=$(mktemp)
export DROVEWAY_SKIPPED
status=0
cargo test --workspace --locked "$@" || status=$?
skipped=$(sort -u "$DROVEWAY_SKIPPED")
rm -f "$DROVEWAY_SKIPPED"
[ -z "$skipped" ] || printf '%s\n%s tests skipped\n' "$skipped" "$(wc -l <<<"$skipped")" >&2
exit "$status"
