#!/usr/bin/env bash
# Installs with cargo, into target/tools, the implementations that `make bench` measures beside ours and that no Debian package has.
# One that cannot be had is told of and left out of the table. Built as their authors release them, at versions that are known.
set -euo pipefail
cd "$(dirname "$0")/.."

# Crate, version, program.
peers=(
  "gotatun-cli 0.10.2 gotatun"
  "boringtun-cli 0.7.1 boringtun-cli"
)
tools=${CARGO_TARGET_DIR:-target}/tools
for peer in "${peers[@]}"; do
  read -r crate version program <<<"$peer"
  if [ -x "$tools/bin/$program" ] && grep -qF "\"$crate $version " "$tools/.crates.toml"; then continue; fi
  echo "installing with cargo: $crate $version" >&2
  cargo install "$crate" --version "$version" --locked --root "$tools" --quiet ||
    echo "warning: $crate $version cannot be installed, and is not measured" >&2
done
