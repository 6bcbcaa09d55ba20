#![no_main]

#[path = "../../crates/packet/tests/fuzz_targets/mod.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::tcp_split_merge(data));
