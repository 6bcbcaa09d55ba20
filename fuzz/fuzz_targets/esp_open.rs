#![no_main]

#[path = "../../crates/esp/tests/fuzz_targets/mod.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::esp_open(data));
