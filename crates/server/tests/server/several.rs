//! Two servers on one etcd.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use model::api::{AuditEntry, ErrorCode, ServerInfo, TokenRequest};
use model::{Catalog, Change, Object, Revision, Watch};
use serde_json::json;
use server::{Config, Error, StoreChoice};
use tempfile::TempDir;

use crate::etcd::Etcd;
use crate::harness::{Client, DEFAULT, Server};
use crate::incarnations::{Ledger, ledger, view_as};

async fn server_on(etcd: &Etcd, dir: TempDir, url: &str) -> Result<Server, Error> {
    let store = StoreChoice::Etcd(etcd.config("/several"));
    Server::start_with(dir, |config| Config { store, urls: vec![url.to_owned()], ..config }).await
}

/// The second of two: it was given the CA's key by its operator, and nothing else.
async fn second(etcd: &Etcd, first: &Server) -> Server {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("data")).unwrap();
    std::fs::write(dir.path().join("data/ca.key"), first.file("ca.key")).unwrap();
    server_on(etcd, dir, "https://two:7443").await.unwrap()
}

async fn info(server: &Server) -> ServerInfo {
    server.nobody().get("/v1/info").await.unwrap()
}

/// Until the server has heard of what the other one did.
async fn heard(of: &Server, at: &Server) {
    let wanted = info(of).await.revision;
    while info(at).await.revision < wanted {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_second_server_needs_the_cas_key_and_then_serves_the_same_environment() {
    let etcd = Etcd::start_secure("/several/").await;
    let one = server_on(&etcd, tempfile::tempdir().unwrap(), "https://one:7443").await.unwrap();
    let Err(error) = server_on(&etcd, tempfile::tempdir().unwrap(), "https://two:7443").await else {
        panic!("started without the CA's key")
    };
    assert!(matches!(&error, Error::NoCaKey(_)) && error.to_string().contains("copy ca.key"), "{error}");
    let two = second(&etcd, &one).await;
    let (first, other) = (info(&one).await, info(&two).await);
    assert_eq!((first.ca, first.epoch), (other.ca, other.epoch));
    assert!(
        !two.dir.path().join("data/admin.key").exists(),
        "the admin key is one, and stays where it was made"
    );

    // A person and a host of the one are known to the other.
    let token = one.token(&TokenRequest { uses: Some(1), ttl_seconds: None }).await.token;
    heard(&one, &two).await;
    let host = two.join("h1", &token, &[]).await.unwrap();
    heard(&two, &one).await;
    let error = one.join("h2", &token, &[]).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::Unauthenticated, "used up at the other: {error}");
    one.agent(&host).lease("managed", 0).await.unwrap();
    let admin = crate::harness::Client { key: one.admin().key, ..two.nobody() };
    heard(&one, &two).await;
    let blocks: Vec<model::Block> = admin.get(&format!("{DEFAULT}/blocks")).await.unwrap();
    assert_eq!(blocks.len(), 1);

    // Agents learn of both.
    let mut watch = one.agent(&host).watch().await;
    let Some(Watch::Servers { urls }) = watch.next().await else { panic!("not told of the servers") };
    assert_eq!(urls.iter().collect::<BTreeSet<_>>().len(), 2, "{urls:?}");

    // One that lost its CA's key may not make another.
    let dir = two.stop().await;
    std::fs::remove_file(dir.path().join("data/ca.key")).unwrap();
    let Err(error) = server_on(&etcd, dir, "https://two:7443").await else { panic!("started") };
    assert!(matches!(error, Error::Missing(_)), "{error}");
}

#[tokio::test]
async fn a_watch_goes_on_at_the_other_server_where_it_was_with_the_changes_alone() {
    let etcd = Etcd::start(1);
    let one = server_on(&etcd, tempfile::tempdir().unwrap(), "https://one:7443").await.unwrap();
    let two = second(&etcd, &one).await;
    let (host, other) = (one.host("h1").await, one.host("h2").await);
    host.lease("managed", 0).await.unwrap();
    heard(&one, &two).await;
    let mut watch = one.agent(&host).watch().await;
    watch.next().await;
    let Some(Watch::Snapshot { epoch, revision, objects, .. }) = watch.next().await else {
        panic!("no snapshot")
    };
    let mut catalog = Catalog::from_objects(objects);
    // The first dies; what happens now it never tells.
    let block = two.agent(&other).lease("managed", 0).await.unwrap();
    let endpoint = other.endpoint(&block, "db", 5);
    two.agent(&other).put(&endpoint).await.unwrap();
    one.crash().await;
    let mut watch = two.agent(&host).watch_from(Some((&epoch, revision))).await;
    watch.next().await;
    let changes = watch.delta().await;
    assert_eq!(changes.len(), 3, "the other host, its block and its endpoint: {changes:?}");
    for change in changes {
        catalog.apply(change);
    }
    let mut fresh = two.agent(&host).watch().await;
    fresh.next().await;
    assert_eq!(catalog, Catalog::from_objects(fresh.snapshot().await));
    // And life goes on.
    let renamed = model::Endpoint { healthy: false, ..endpoint };
    two.agent(&other).put(&renamed).await.unwrap();
    assert_eq!(watch.delta().await, [Change::Put(Object::Endpoint(renamed))]);
}

/// What lies between a server and its etcd, and can be cut: connections stay, and nothing passes.
struct Cable {
    address: std::net::SocketAddr,
    cut: tokio::sync::watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Cable {
    async fn to(far: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, cut) = (listener.local_addr().unwrap(), tokio::sync::watch::Sender::new(false));
        let state = cut.clone();
        let task = tokio::spawn(async move {
            let mut joined = tokio::task::JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = tokio::net::TcpStream::connect(&far).await.unwrap().into_split();
                joined.spawn(pass(near_read, far_write, state.subscribe()));
                joined.spawn(pass(far_read, near_write, state.subscribe()));
            }
        });
        Self { address, cut, task }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut cut: tokio::sync::watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = [0; 4096];
    while let Ok(length) = from.read(&mut buffer).await {
        let open = cut.wait_for(|cut| !cut).await.is_ok();
        if length == 0 || !open || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_server_that_is_cut_off_from_etcd_sends_its_agents_to_the_other_and_takes_them_again_later() {
    let etcd = Etcd::start(1);
    let cable = Cable::to(format!("{}:2379", etcd.members[0].address)).await;
    let mut config = etcd.config("/several");
    config.url.members = vec![cable.address.to_string()];
    let one = Server::start_with(tempfile::tempdir().unwrap(), |before| Config {
        store: StoreChoice::Etcd(config),
        urls: vec!["https://one:7443".to_owned()],
        ..before
    });
    let one = one.await.unwrap();
    let host = one.host("h1").await;
    let mut alone = one.agent(&host).watch().await;
    while !matches!(alone.next().await, Some(Watch::Snapshot { .. })) {}
    let two = second(&etcd, &one).await;
    heard(&two, &one).await;
    assert!(matches!(alone.next().await, Some(Watch::Servers { urls }) if urls.len() == 2));

    cable.cut.send_replace(true);
    while alone.next().await.is_some() {}
    let path = format!("{DEFAULT}/watch");
    let refused =
        async || one.agent(&host).client.request(reqwest::Method::GET, &path).send().await.unwrap().status();
    assert_eq!(refused().await, 503, "nor does it take a watch now");
    let mut watch = two.agent(&host).watch().await;
    while !matches!(watch.next().await, Some(Watch::Snapshot { .. })) {}

    cable.cut.send_replace(false);
    while refused().await != 200 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    one.agent(&host).lease("managed", 0).await.unwrap();
}

#[tokio::test]
async fn leases_and_claims_at_both_servers_at_once_give_nothing_twice_while_one_is_killed() {
    let etcd = Etcd::start(1);
    let one = server_on(&etcd, tempfile::tempdir().unwrap(), "https://one:7443").await.unwrap();
    let two = second(&etcd, &one).await;
    // A pool that is used up: the last blocks are fought for.
    one.admin().make_network(json!({ "name": "tight", "cidrs": ["10.60.0.0/22"] })).await.unwrap();
    let mut hosts = Vec::new();
    for n in 0..6 {
        hosts.push(one.host(&format!("h{n}")).await);
    }
    heard(&one, &two).await;
    let mut tasks = Vec::new();
    for host in &hosts {
        for server in [&one, &two] {
            let agent = server.agent(host);
            tasks.push(tokio::spawn(async move {
                let mut got = Vec::new();
                for held in 0..4 {
                    match agent.lease("tight", held).await {
                        Ok(block) => got.push((held, block.cidr, block.host)),
                        Err(error) if error.code == ErrorCode::Exhausted => {}
                        Err(error) if error.code == ErrorCode::Unavailable => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                got
            }));
        }
    }
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let admin = one.admin();
    let dir = one.crash().await;
    let mut given: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for task in tasks {
        for (held, cidr, host) in task.await.unwrap() {
            given.entry(cidr).or_default().insert((host, held));
        }
    }
    assert!(given.len() > 8, "{given:?}");
    assert!(given.values().all(|holders| holders.len() == 1), "a block was given twice: {given:?}");
    // All that was answered is there, at the one that is left.
    let admin = crate::harness::Client { key: admin.key, ..two.nobody() };
    let blocks: Vec<model::Block> = admin.get(&format!("{DEFAULT}/blocks")).await.unwrap();
    for (cidr, holders) in &given {
        let (host, _) = holders.first().unwrap();
        assert!(blocks.iter().any(|block| block.cidr == *cidr && block.host == *host), "{cidr} is lost");
    }
    // Each change stands in one of the two audit logs, once; what the dead one could not write it writes when it is back.
    let one = server_on(&etcd, dir, "https://one:7443").await.unwrap();
    let mut lines: BTreeMap<Revision, usize> = BTreeMap::new();
    for dir in [one.stop().await, two.stop().await] {
        let text = std::fs::read_to_string(dir.path().join("data/audit.jsonl")).unwrap();
        for line in text.lines() {
            let entry: AuditEntry = serde_json::from_str(line).unwrap();
            *lines.entry(entry.revision.unwrap_or_default()).or_default() += 1;
        }
    }
    lines.remove(&Revision::default());
    assert!(lines.values().all(|&count| count == 1), "{lines:?}");
    for block in &blocks {
        assert!(lines.contains_key(&block.leased), "nobody wrote down {block:?}");
    }
}

#[tokio::test]
async fn a_copy_that_comes_to_the_other_server_is_found_out_and_both_know_who_is_connected() {
    let etcd = Etcd::start(1);
    let one = server_on(&etcd, tempfile::tempdir().unwrap(), "https://one:7443").await.unwrap();
    let host = one.host("h1").await;
    let two = second(&etcd, &one).await;
    let mut original = ledger(&host);
    let agent = original.start().await.unwrap();
    let mut watch = agent.watch().await;
    while !matches!(watch.next().await, Some(Watch::Snapshot { .. })) {}
    heard(&one, &two).await;
    let elsewhere = two.agent(&host);
    let mut copy = Ledger { agent: &elsewhere, ..original.copy(2) };
    let coming = copy.next();
    let (refused, agent) = tokio::join!(copy.tell(&coming), async {
        while !matches!(watch.next().await.expect("it is asked"), Watch::Prove) {}
        original.go_on().await.unwrap()
    });
    assert_eq!(refused.unwrap_err().code, ErrorCode::Copied);

    let mut watch = agent.watch().await;
    while !matches!(watch.next().await, Some(Watch::Snapshot { .. })) {}
    let both_say = async |connected: bool| {
        let begun = std::time::Instant::now();
        let people = [one.admin(), Client { key: one.admin().key, ..two.nobody() }];
        while view_as(&people[0]).await.connected != connected
            || view_as(&people[1]).await.connected != connected
        {
            assert!(begun.elapsed().as_secs() < 15, "both say that it is connected: {connected}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    both_say(true).await;
    drop(watch);
    both_say(false).await;
}

/// How agents reach the servers, as they are told.
async fn told_urls(server: &Server) -> BTreeSet<String> {
    let host = server.host("asker").await;
    let mut watch = host.watch().await;
    let Some(Watch::Servers { urls }) = watch.next().await else { panic!("not told of the servers") };
    server.admin().delete(&format!("{DEFAULT}/hosts/asker")).await.unwrap();
    urls.into_iter().collect()
}

/// What the server of a directory is called.
fn name(dir: &TempDir) -> String {
    let text = std::fs::read_to_string(dir.path().join("data/server.id")).unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["name"].as_str().unwrap().to_owned()
}

fn copied(from: &TempDir) -> TempDir {
    let to = TempDir::new().unwrap();
    std::fs::create_dir(to.path().join("data")).unwrap();
    for file in std::fs::read_dir(from.path().join("data")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), to.path().join("data").join(file.file_name())).unwrap();
    }
    to
}

/// Changes at both at once; the lines of those in their logs, which end with the servers.
async fn lines_of(servers: [Server; 2], names: &str) -> [TempDir; 2] {
    let [one, two] = &servers;
    heard(one, two).await;
    heard(two, one).await;
    let since = info(one).await.revision;
    let mut asked = [BTreeSet::new(), BTreeSet::new()];
    for n in 0..8 {
        for (server, asked) in servers.iter().zip(&mut asked) {
            let name = format!("{names}{n}{}", asked.len() + server.ready.address.port() as usize);
            let spec = json!({ "name": name, "cidrs": ["10.60.0.0/16"] });
            server.admin().make_network(spec).await.unwrap();
            asked.insert(format!("network {name:?}"));
        }
    }
    let [one, two] = servers;
    let dirs = [one.stop().await, two.stop().await];
    for (dir, asked) in dirs.iter().zip(&asked) {
        let text = std::fs::read_to_string(dir.path().join("data/audit.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<AuditEntry>(line).unwrap());
        let lines: Vec<AuditEntry> = lines.filter(|line| line.revision > Some(since)).collect();
        let about: BTreeSet<String> = lines.iter().filter_map(|line| line.about.clone()).collect();
        assert_eq!((lines.len(), &about), (asked.len(), asked), "each its own, once: {lines:?}");
    }
    dirs
}

#[tokio::test]
async fn servers_from_copied_directories_and_from_one_backup_have_names_of_their_own() {
    let etcd = Etcd::start(1);
    let one = server_on(&etcd, tempfile::tempdir().unwrap(), "https://one:7443").await.unwrap();
    let urls = BTreeSet::from(["https://one:7443".to_owned(), "https://two:7443".to_owned()]);
    let two = server_on(&etcd, copied(&one.dir), "https://two:7443").await.unwrap();
    assert_eq!(told_urls(&one).await, urls);
    let [one, two] = lines_of([one, two], "copied").await;

    // Both start again as they were.
    let names = [name(&one), name(&two)];
    assert_ne!(names[0], names[1]);
    let one = server_on(&etcd, one, "https://one:7443").await.unwrap();
    let two = server_on(&etcd, two, "https://two:7443").await.unwrap();
    assert_eq!([name(&one.dir), name(&two.dir)], names);

    let (data, files) = (one.dir.path().join("data"), tempfile::tempdir().unwrap());
    let (file, store) = (files.path().join("monday"), StoreChoice::Etcd(etcd.config("/several")));
    server::backup(&data, &store, &file).await.unwrap();
    drop((one.stop().await, two.stop().await));
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for dir in &dirs {
        server::restore(&file, &dir.path().join("data"), &store, true).await.unwrap();
    }
    let [one, two] = dirs;
    let one = server_on(&etcd, one, "https://one:7443").await.unwrap();
    let two = server_on(&etcd, two, "https://two:7443").await.unwrap();
    assert_eq!(one.file("server.key"), two.file("server.key"));
    assert_eq!(told_urls(&two).await, urls);
    lines_of([one, two], "restored").await;
}

#[tokio::test]
async fn a_server_whose_name_another_goes_by_ends_and_is_called_otherwise_when_it_starts_again() {
    let etcd = Etcd::start(1);
    let one = server_on(&etcd, tempfile::tempdir().unwrap(), "https://one:7443").await.unwrap();
    let before = name(&one.dir);
    // So does a copy that asked, and was not answered.
    let base64 = |text: &str| base64::prelude::BASE64_STANDARD.encode(text);
    let key = base64(&format!("/several/droveway/default/servers/{before}"));
    let value = base64(&json!({ "urls": [], "start": "another" }).to_string());
    etcd.ask(0, "/v3/kv/put", json!({ "key": key, "value": value })).await;
    let (dir, error) = one.ends().await;
    assert!(
        matches!(&error, Error::Superseded(_)) && error.to_string().contains("start this one again"),
        "{error}"
    );
    let one = server_on(&etcd, dir, "https://one:7443").await.unwrap();
    assert_ne!(name(&one.dir), before);
}
