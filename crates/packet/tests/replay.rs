//! The committed fuzz corpus, run on each test.

#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod fuzz_targets;

fn replay(name: &str, target: fn(&[u8])) {
    let directory = format!("{}/../../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for file in std::fs::read_dir(&directory).unwrap() {
        target(&std::fs::read(file.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "{directory} is empty");
}

#[test]
fn the_corpus_of_packet_parse_does_no_harm() {
    replay("packet_parse", fuzz_targets::packet_parse);
}

#[test]
fn the_corpus_of_tcp_split_merge_does_no_harm() {
    replay("tcp_split_merge", fuzz_targets::tcp_split_merge);
}
