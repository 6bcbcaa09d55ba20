#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ike::fuzzing::stranger(data, std::time::Instant::now()));
