#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ike::fuzzing::insider(data, std::time::Instant::now()));
