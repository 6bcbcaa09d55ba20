use std::os::unix::fs::PermissionsExt;

use model::Network;
use model::api::{ErrorCode, ServerInfo};

use crate::harness::{DEFAULT, Server, config, fingerprint_of};

#[tokio::test]
async fn a_first_start_makes_everything_private_and_a_second_start_keeps_it() {
    let server = Server::start().await;
    assert!(server.ready.first_start);
    assert_eq!(server.ready.ca, fingerprint_of(&server.file("ca.pem")));
    let networks: Vec<Network> = server.admin().get(&format!("{DEFAULT}/networks")).await.unwrap();
    assert_eq!(networks.len(), 1);
    assert_eq!(
        (networks[0].name.as_str(), networks[0].pool().to_string().as_str()),
        ("managed", "10.42.0.0/16")
    );
    let before: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    assert_eq!(before.ca, server.ready.ca);
    let key = server.file("admin.key");
    let host = server.host("h1").await;

    let data = server.dir.path().join("data");
    for entry in std::fs::read_dir(&data).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    for name in ["store.sqlite", "store.sqlite-wal"] {
        let bytes = std::fs::read(data.join(name)).unwrap();
        let stored = bytes.windows(key.trim().len()).any(|window| window == key.trim().as_bytes());
        assert!(!stored, "{name} has the admin key in clear");
    }

    let ca = server.file("ca.pem");
    let server = Server::start_in(server.stop().await).await;
    assert!(!server.ready.first_start);
    assert_eq!((server.file("ca.pem"), server.file("admin.key")), (ca, key));
    let after: ServerInfo = server.admin().get("/v1/info").await.unwrap();
    assert_eq!(after.epoch, before.epoch);
    assert!(after.revision > before.revision);
    let again = server.client(&host.answer.ca, Some((&host.answer.certificate, &host.key)));
    let networks: Vec<Network> = again.get(&format!("{DEFAULT}/networks")).await.unwrap();
    assert_eq!(networks.len(), 1);
}

#[tokio::test]
async fn a_first_start_cut_short_anywhere_is_taken_up_again() {
    // What is there after each step of a first start, by removing what comes later.
    let steps = ["store.sqlite", "ca.key", "ca.pem", "server.key", "server.pem", "admin.key"];
    for kept in 0..=steps.len() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start_in(dir).await;
        let dir = server.stop().await;
        let data = dir.path().join("data");
        for name in &steps[kept..] {
            std::fs::remove_file(data.join(name)).unwrap();
        }
        // The last step is the transaction: before it, the store is made, and has no keys.
        if kept > 0 {
            let store = rusqlite::Connection::open(data.join("store.sqlite")).unwrap();
            let none = "DELETE FROM kv; DELETE FROM log; UPDATE meta SET value = '0' WHERE name IN ('revision', 'compacted')";
            store.execute_batch(none).unwrap();
        }
        let server = Server::start_in(dir).await;
        assert!(server.ready.first_start, "after {kept} steps");
        let networks: Vec<Network> = server.admin().get(&format!("{DEFAULT}/networks")).await.unwrap();
        assert_eq!(networks.len(), 1);
        server.stop().await;
    }
}

async fn refused(dir: &std::path::Path) -> String {
    server::run(config(dir.to_owned()), |_| panic!("it started"), std::future::pending())
        .await
        .unwrap_err()
        .to_string()
}

#[tokio::test]
async fn the_admin_key_is_that_of_its_file_and_removing_the_file_makes_another() {
    let server = Server::start().await;
    let old = server.admin().key;
    let dir = server.stop().await;
    let file = dir.path().join("data/admin.key");
    std::fs::remove_file(&file).unwrap();
    let server = Server::start_in(dir).await;
    assert!(!server.ready.first_start);
    assert_ne!(server.admin().key, old);
    let networks = format!("{DEFAULT}/networks");
    server.admin().get::<Vec<Network>>(&networks).await.unwrap();
    let before = crate::harness::Client { key: old, ..server.nobody() };
    let error = before.get::<Vec<Network>>(&networks).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
    let dir = server.stop().await;
    for weak in ["1234", "dwk1.short", "dwk1.two words that are long enough to be a key of ours"] {
        std::fs::write(&file, weak).unwrap();
        let error = refused(&dir.path().join("data")).await;
        assert!(error.contains("admin.key does not hold a key") && !error.contains(weak), "{error}");
    }
}

#[tokio::test]
async fn a_second_server_on_the_same_directory_is_refused() {
    let server = Server::start().await;
    let error = refused(&server.dir.path().join("data")).await;
    assert!(error.contains("another server runs on") && error.contains("--data-dir"), "{error}");
    server.admin().get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_said_with_the_remedy() {
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    let config = server::Config { listen: server.ready.address, ..config(dir.path().join("data")) };
    let error =
        server::run(config, |_| panic!("it started"), std::future::pending()).await.unwrap_err().to_string();
    assert!(error.contains("choose another --listen"), "{error}");
}

#[tokio::test]
async fn garbage_in_place_of_a_file_is_said_and_left_alone() {
    for (name, expected) in [
        ("store.sqlite", "not a store of Droveway"),
        ("ca.key", "restore it from a backup"),
        ("ca.pem", "restore it from a backup"),
        ("server.key", "restore it from a backup"),
    ] {
        let dir = Server::start().await.stop().await;
        let data = dir.path().join("data");
        let garbage = "these are not the bytes you are looking for\n".repeat(100);
        std::fs::write(data.join(name), &garbage).unwrap();
        let error = refused(&data).await;
        assert!(error.contains(expected) && error.contains(name), "{error}");
        assert_eq!(std::fs::read_to_string(data.join(name)).unwrap(), garbage);
    }
}

#[tokio::test]
async fn a_lost_ca_or_store_is_said_and_not_replaced() {
    for name in ["ca.key", "store.sqlite"] {
        let dir = Server::start().await.stop().await;
        let data = dir.path().join("data");
        std::fs::remove_file(data.join(name)).unwrap();
        let error = refused(&data).await;
        assert!(error.contains("is missing") && error.contains(name), "{error}");
        assert!(!data.join(name).exists());
    }
}

#[tokio::test]
async fn a_store_that_lost_its_content_is_said_and_no_other_environment_is_made() {
    // All of it, or all but what SQLite had written before the first checkpoint.
    for length in [0, 4096] {
        let dir = Server::start().await.stop().await;
        let data = dir.path().join("data");
        let store = data.join("store.sqlite");
        if length == 0 {
            std::fs::write(&store, "").unwrap();
        } else {
            std::fs::remove_file(&store).unwrap();
            rusqlite::Connection::open(&store)
                .unwrap()
                .execute_batch("PRAGMA journal_mode = WAL; VACUUM")
                .unwrap();
        }
        assert_eq!(std::fs::metadata(&store).unwrap().len(), length);
        let error = refused(&data).await;
        assert!(error.contains("store.sqlite is empty") && error.contains("server restore"), "{error}");
        assert_eq!(std::fs::metadata(&store).unwrap().len(), length);
    }
}

#[tokio::test]
async fn a_domain_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for domain in ["", "a..b", "Über.example", "-a.example", &"a".repeat(70)] {
        let config = server::Config { domain: domain.to_owned(), ..config(dir.path().join("data")) };
        let error = server::run(config, |_| panic!("it started"), std::future::pending()).await.unwrap_err();
        assert!(error.to_string().contains("as in droveway.internal"), "{error}");
    }
}

#[tokio::test]
async fn a_name_that_no_certificate_can_have_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["two words", "", "a/b"] {
        let config = server::Config { names: vec![name.to_owned()], ..config(dir.path().join("data")) };
        let error = server::run(config, |_| panic!("it started"), std::future::pending()).await.unwrap_err();
        assert!(error.to_string().contains("correct --name"), "{error}");
    }
}

#[tokio::test]
async fn a_client_that_pins_another_ca_talks_to_nobody() {
    let (server, other) = (Server::start().await, Server::start().await);
    let error = server.client(&other.file("ca.pem"), None).get::<ServerInfo>("/v1/info").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("UnknownIssuer") || error.message.contains("BadSignature"), "{error}");
}

#[tokio::test]
async fn a_lost_certificate_of_the_ca_is_written_again_from_the_store() {
    let dir = Server::start().await.stop().await;
    let file = dir.path().join("data/ca.pem");
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let server = Server::start_in(dir).await;
    assert_eq!(server.file("ca.pem"), before);
}
