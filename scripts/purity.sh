#!/usr/bin/env bash
# The pure crates stay pure, and `unsafe` stays in one room. Three checks:
#  1. what the pure crates depend on is on a list, dependencies of dependencies included;
#  2. their sources name no file, socket, process, thread, clock or random generator;
#  3. `unsafe` is written, and allowed, in crates/linux only.
# Their own clippy.toml forbids the same to whatever `cargo clippy` can see through.
set -euo pipefail
cd "$(dirname "$0")/.."

pure=(model plan packet esp ike)
# Serialisation, arithmetic and derives. A new line here is a decision: does it do input or output, or look at a clock?
allowed="equivalent hashbrown indexmap ipnet itoa memchr model plan proc-macro2 quote serde serde_core serde_derive
  serde_json syn thiserror thiserror-impl unicode-ident utoipa utoipa-gen zmij"
# For keys and certificates: the crypto library, and parsers.
allowed+=" asn1-rs asn1-rs-derive asn1-rs-impl aws-lc-rs aws-lc-sys data-encoding der-parser deranged displaydoc esp ike
  lazy_static minimal-lexical nom num-bigint num-conv num-integer num-traits oid-registry packet powerfmt
  rusticata-macros rustls-pki-types rustls-webpki synstructure time time-core time-macros untrusted x509-parser zeroize
  zeroize_derive"
forbidden='\b(tokio|futures|async_std|rand|getrandom|nix|libc|reqwest|rusqlite)::|\bstd::(fs|process|thread|env|io)\b'
forbidden+='|\bstd::os\b|\b(Tcp|Udp|Unix)(Stream|Listener|Socket|Datagram)\b|\bInstant::now\b|\bSystemTime\b|\bUNIX_EPOCH\b'
forbidden+='|\brandom\(\)|\bRandomState\b|\bstatic mut\b|\bthread_local!'

failed=no
complain() { echo "error: $*" >&2; failed=yes; }

for crate in "${pure[@]}"; do
  while read -r name; do
    grep -qw -- "$name" <<<"$allowed" || complain "$crate depends on $name, which is not on the list in $0"
  done < <(cargo tree --locked -p "$crate" -e normal --prefix none -f '{p}' | awk '{print $1}' | sort -u)
  # Tests may look at a clock to have something to begin with. The crypto library asks for its own generator where ECDSA
  # signs: the nonce is its business.
  if found=$(find "crates/$crate/src" -name '*.rs' ! -name '*tests.rs' \
    -exec awk '/^#\[cfg\(test\)\]/ { nextfile } { print FILENAME ":" FNR ":" $0 }' {} + \
    | grep -E "$forbidden" | grep -v 'aws_lc_rs::rand::SystemRandom;$'); then
    complain "crates/$crate is pure, but names what is not:"$'\n'"$found"
  fi
done

code_unsafe() { grep -rnE --include='*.rs' '(^|[^[:alnum:]_"])unsafe( *\{| +(fn|impl|trait|extern)\b)|(allow|expect)\([^)]*unsafe_code' "$@"; }
if found=$(code_unsafe crates | grep -v '^crates/linux/'); then
  complain "\`unsafe\` belongs into crates/linux:"$'\n'"$found"
fi
# A check that finds nothing where something is would be of no use.
code_unsafe crates/linux >/dev/null || complain "no \`unsafe\` found in crates/linux: this check is broken"

[ "$failed" = no ] || exit 1
echo "pure: ${pure[*]}; unsafe: crates/linux only"
