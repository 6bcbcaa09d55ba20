#!/usr/bin/env bash
# Runs README's commands as a newcomer would: from a clean clone of HEAD. A block is run if it is fenced as ```sh and
# the line before it is `<!-- ci -->`.
# It is built with the dev profile into this tree's own target directory, so that dependencies are not built again.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -z "$(git status --porcelain)" ] || echo "note: what is not committed is not in the clone" >&2

clone=$(mktemp -d)
lab=readme$$
cleanup() {
  cd /
  [ ! -x "$clone/target/debug/droveway" ] || "$clone/target/debug/droveway" lab --lab "$lab" down >/dev/null 2>&1 || true
  rm -rf "$clone"
}
trap cleanup EXIT

git clone --quiet --no-hardlinks . "$clone"
mkdir -p target
ln -s "$PWD/target" "$clone/target"

commands=$(awk '
  /^<!-- ci -->$/ { marked = 1; next }
  marked && /^```sh$/ { inside = 1; marked = 0; next }
  inside && /^```$/ { inside = 0; next }
  inside { print; next }
  { marked = 0 }
' README.md)
[ -n "$commands" ] || { echo "error: README.md has no block after <!-- ci -->" >&2; exit 1; }

echo "from a clean clone:"
sed 's/^/  $ /' <<<"$commands"
cd "$clone"
export PROFILE=dev DROVEWAY_LAB=$lab CARGO_INCREMENTAL=0
sed 's#target/release#target/debug#g' <<<"$commands" | bash -euxo pipefail
