//! A server whose etcd is put back from an older copy while it runs: the process ends, and says what to do.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

#[path = "../../../server/tests/server/etcd.rs"]
mod etcd;

use etcd::Etcd;

use crate::support::{LIMIT, until};

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Process {
    fn start(data: &Path, store: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_droveway"))
            .args(["server", "--listen", "127.0.0.1:0", "--store", store, "--data-dir"])
            .arg(data)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Waits until it has said where it listens.
    fn serves(&mut self) {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "it does not start");
    }

    /// Its exit code, and what it said at its end.
    fn end(&mut self) -> (Option<i32>, String) {
        until(LIMIT, "it ends", || self.0.try_wait().unwrap().is_some());
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        let error = text.rfind("\nerror: ").map_or(0, |at| at + 1);
        (self.0.wait().unwrap().code(), text[error..].to_owned())
    }
}

#[test]
fn a_server_whose_etcd_was_put_back_ends_and_every_further_start_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut etcd = Etcd::start(1);
    // Another store is in it before this one.
    Process::start(&dir.path().join("other"), &etcd.config("/other").url.to_string()).serves();
    let saved = etcd.save(0);
    let store = etcd.config("").url.to_string();
    let mut server = Process::start(&data, &store);
    server.serves();
    etcd.put_back(0, &saved);
    for (code, text) in [server.end(), Process::start(&data, &store).end()] {
        assert_eq!(code, Some(1), "{text}");
        assert!(text.starts_with("error: ") && text.contains("droveway server restore FILE"), "{text}");
    }
}
