//! A server whose clock is wrong when it starts, as on a machine without a battery, and is set later.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use droveway::client::{Client, Settings};
use model::EnvironmentId;

use crate::support::{LIMIT, skipped};
use crate::table::FAKETIME;

/// A server by a clock of its own; it ends with it.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The clock, in a file: an offset, or a time at which it stands.
fn set(clock: &Path, to: &str) {
    let new = clock.with_extension("new");
    fs::write(&new, format!("{to}\n")).unwrap();
    fs::rename(&new, clock).unwrap();
}

fn command(dir: &Path, port: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_droveway"));
    command
        .args(["server", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"])
        .arg(dir.join("data"))
        .env("LD_PRELOAD", FAKETIME)
        .env("FAKETIME_TIMESTAMP_FILE", dir.join("clock"))
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

fn start(dir: &Path, port: u16) -> Server {
    Server(command(dir, port).stderr(Stdio::null()).spawn().unwrap())
}

/// Whether somebody whose clock is right believes the server: by a connection of its own.
async fn believes(dir: &Path, port: u16) -> bool {
    let data = dir.join("data");
    let settings = Settings {
        server: format!("https://127.0.0.1:{port}").parse().unwrap(),
        key_file: data.join("admin.key"),
        ca_file: data.join("ca.pem"),
        environment: EnvironmentId::default(),
    };
    match Client::open(settings) {
        Ok(client) => client.info().await.is_ok(),
        Err(_) => false,
    }
}

async fn believed(dir: &Path, port: u16) {
    let begun = Instant::now();
    while !believes(dir, port).await {
        assert!(begun.elapsed() < LIMIT, "not believed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// It listens, whether it is believed or not.
async fn listens(port: u16) {
    let begun = Instant::now();
    while tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err() {
        assert!(begun.elapsed() < LIMIT, "it does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_clock_that_was_never_set_makes_no_ca_and_one_that_is_set_under_way_keeps_nobody_out() {
    if !Path::new(FAKETIME).exists() {
        return skipped("libfaketime is not installed");
    }
    let scratch = tempfile::tempdir().unwrap();
    let (dir, clock) = (scratch.path(), scratch.path().join("clock"));
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    set(&clock, "@2001-01-01 00:00:00");
    let output = command(dir, port).stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("the clock is wrong"), "{error}");
    for name in ["ca.key", "ca.pem", "admin.key"] {
        assert!(!dir.join("data").join(name).exists(), "{name} was made");
    }

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        set(&clock, "+0");
        let server = start(dir, port);
        believed(dir, port).await;
        drop(server);
        for wrong in ["@2001-01-01 00:00:00", "+3650d"] {
            set(&clock, wrong);
            let _server = start(dir, port);
            listens(port).await;
            assert!(!believes(dir, port).await, "{wrong} changes nothing: this test shows nothing");
            set(&clock, "+0");
            believed(dir, port).await;
        }
    });
}
