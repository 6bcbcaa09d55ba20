#!/usr/bin/env bash
# Ratios against kernel VXLAN by hand and other implementations, latencies, memory, many peers: crates/droveway/benches/system.
# Words are passed on: scripts/bench.sh --quick stream peers
set -euo pipefail
cd "$(dirname "$0")/.."

runner=()
[ "$(id -u)" -eq 0 ] || runner=(--config "target.'cfg(all())'.runner=['sudo','-E']")
exec cargo bench --profile "${PROFILE:-release}" --locked -p droveway --bench system "${runner[@]}" -- "$@"
