//! The committed fuzz corpus, run on each test.

#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod fuzz_targets;

#[test]
fn the_corpus_of_esp_open_does_no_harm() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/esp_open");
    let mut count = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        fuzz_targets::esp_open(&std::fs::read(file.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "{directory} is empty");
}
