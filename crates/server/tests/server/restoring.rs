//! Backup and restore: what a new life of the store does with what hosts hold.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use model::api::{
    ClaimRequest, ErrorCode, GiveBack, Heard, Held, HeldAnswer, IpamView, ServerInfo, UnreportedHost,
};
use model::{Block, Claim, Object, Watch};
use serde_json::json;
use server::{Config, StoreChoice, backup, restore};
use tempfile::TempDir;

use crate::etcd::Etcd;
use crate::harness::{Agent, DEFAULT, Server};

async fn server_in(dir: TempDir, store: &StoreChoice) -> Server {
    let store = store.clone();
    Server::start_with(dir, |config| Config { store, ..config }).await.unwrap()
}

/// Another start in that directory.
async fn server_on(dir: &TempDir, store: &StoreChoice) -> Result<Server, server::Error> {
    let (data_dir, store) = (dir.path().join("data"), store.clone());
    Server::start_with(TempDir::new().unwrap(), |config| Config { data_dir, store, ..config }).await
}

async fn held(agent: &Agent, held: &Held) -> HeldAnswer {
    agent.client.put(&format!("{DEFAULT}/hosts/self/held"), held).await.unwrap()
}

async fn unreported(server: &Server) -> Vec<String> {
    let hosts: Vec<UnreportedHost> = server.admin().get(&format!("{DEFAULT}/unreported")).await.unwrap();
    let mut names: Vec<String> = hosts.into_iter().map(|host| host.name.to_string()).collect();
    names.sort();
    names
}

async fn give_back(agent: &Agent, block: &Block) {
    let body = GiveBack { network: block.network.to_string(), cidr: block.cidr, leased: None };
    agent.client.delete_with(&format!("{DEFAULT}/blocks"), &body).await.unwrap();
}

/// All of them have taken in what happened until now: what was given back is free.
async fn all_hear(server: &Server, agents: [&Agent; 2]) {
    let now: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    for agent in agents {
        let said = Heard { epoch: now.epoch.clone(), revision: now.revision };
        agent.client.put::<()>(&format!("{DEFAULT}/hosts/self/heard"), &said).await.unwrap();
    }
}

/// An old backup, restored: what hosts hold is adopted, and nothing is leased before all have said it.
/// Put back to another store where one is given.
async fn an_old_backup_is_adopted(other: Option<StoreChoice>) {
    let store = StoreChoice::Embedded;
    let server = server_in(tempfile::tempdir().unwrap(), &store).await;
    let data = server.dir.path().join("data");
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("monday");
    server.admin().make_network(json!({ "name": "tight", "cidrs": ["10.60.0.0/23"] })).await.unwrap();
    let (one, two, three) = (server.host("h1").await, server.host("h2").await, server.host("h3").await);
    let early = [one.lease("tight", 0).await.unwrap(), one.lease("tight", 1).await.unwrap()];
    let moved = two.lease("tight", 0).await.unwrap();
    let before: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    let made = backup(&data, &store, &file).await.unwrap();
    assert_eq!((made.hosts, made.revision, &made.epoch), (3, before.revision, &before.epoch));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(backup(&data, &store, &file).await.is_err(), "a backup is not overwritten");

    // What the backup does not know: two gives its block back and one gets it; two has another; one claims an address.
    give_back(&two, &moved).await;
    all_hear(&server, [&one, &two]).await;
    let mut late = Vec::new();
    loop {
        let block = one.lease("tight", early.len() + late.len()).await.unwrap();
        late.push(block.clone());
        if block.cidr == moved.cidr {
            break;
        }
    }
    for other in late.drain(..late.len() - 1).collect::<Vec<_>>() {
        give_back(&one, &other).await;
    }
    all_hear(&server, [&one, &two]).await;
    let late = late.remove(0);
    let fresh = two.lease("tight", 0).await.unwrap();
    let claim = Claim {
        network: late.network.clone(),
        address: "10.60.0.9".parse().unwrap(),
        host: one.id.clone(),
        endpoint: one.endpoint(&late, "c", 3).id,
        asked: false,
        router: false,
        retained: None,
        wanted: None,
    };
    let request = ClaimRequest {
        network: "tight".into(),
        address: Some(claim.address),
        endpoint: claim.endpoint.clone(),
        router: false,
        retain: None,
    };
    one.client.post::<serde_json::Value>(&format!("{DEFAULT}/claims"), &request).await.unwrap();

    // A running server keeps its directory.
    let error = restore(&file, &data, &store, true).await.unwrap_err();
    assert!(matches!(error, server::Error::Locked(_)), "{error}");
    let dir = server.crash().await;
    let error = restore(&file, &data, &store, false).await.unwrap_err();
    assert!(error.to_string().contains("--force"), "{error}");
    let store = other.unwrap_or(store);
    restore(&file, &data, &store, true).await.unwrap();
    let server = server_in(dir, &store).await;
    let now: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    assert_ne!(now.epoch, before.epoch);
    assert_eq!(now.ca, before.ca);
    assert!(now.revision > late.leased, "above all revisions of the life before");
    assert_eq!(unreported(&server).await, ["h1", "h2", "h3"]);

    // Nobody is told anything, nor leased, before it says what it holds.
    let (one, two, three) = (server.agent(&one), server.agent(&two), server.agent(&three));
    let resume = format!("{DEFAULT}/watch?epoch={}&revision={}", before.epoch, before.revision);
    let error = two.client.get::<serde_json::Value>(&resume).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unreported);
    let answer = held(&two, &Held { blocks: vec![fresh.clone()], claims: vec![] }).await;
    assert!(answer.conflicts.is_empty(), "{answer:?}");
    let error = two.lease("tight", 1).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("h1, h3") && error.message.contains("--without"), "{error}");
    assert_eq!(two.lease("tight", 0).await.unwrap().cidr, fresh.cidr, "what it holds it has");

    let rests = async || -> Vec<_> {
        let all: IpamView = server.admin().get(&format!("{DEFAULT}/ipam")).await.unwrap();
        all.withdrawn.into_iter().map(|one| (one.cidr, one.waits_for.len())).collect()
    };
    assert_eq!(rests().await, [(moved.cidr, 3)], "given back since; who may take part is waited for");
    let mine =
        Held { blocks: vec![early[0].clone(), early[1].clone(), late.clone()], claims: vec![claim.clone()] };
    assert!(held(&one, &mine).await.conflicts.is_empty());
    assert!(held(&one, &mine).await.conflicts.is_empty(), "said twice");
    assert!(rests().await.is_empty(), "it was leased when all had heard");
    // One that never comes back is waited for until its operator says otherwise.
    let error = one.lease("tight", 3).await.unwrap_err();
    assert!(error.message.contains("h3") && !error.message.contains("h1"), "{error}");
    drop(three);
    let watch = one.watch();
    let without = async {
        // Others are told nothing meanwhile: they would stop sending to what it holds.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        server.admin().delete(&format!("{DEFAULT}/unreported/h3")).await.unwrap();
    };
    let begun = std::time::Instant::now();
    let (mut watch, ()) = tokio::join!(watch, without);
    assert!(begun.elapsed() >= std::time::Duration::from_millis(300), "it did not wait");
    assert!(unreported(&server).await.is_empty());
    let Some(Watch::Snapshot { epoch, objects, .. }) = watch.next().await else { panic!("no snapshot") };
    assert_eq!(epoch, now.epoch);
    assert!(objects.contains(&Object::Claim(claim)));
    let mut own: Vec<Block> = objects
        .into_iter()
        .filter_map(|object| match object {
            Object::Block(block) if block.host == one.id => Some(block),
            _ => None,
        })
        .collect();
    own.sort_by_key(|block| block.leased);
    assert_eq!(
        own,
        [early[0].clone(), early[1].clone(), late.clone()],
        "in the order in which they were leased"
    );

    // What was adopted is used and given back as any other.
    for block in [&late, &early[1]] {
        one.put(&one.endpoint(block, "c", 5)).await.unwrap();
    }
    one.client.delete(&format!("{DEFAULT}/endpoints/{}", one.endpoint(&late, "c", 5).id)).await.unwrap();
    give_back(&one, &late).await;

    let next = two.lease("tight", 1).await.unwrap();
    assert!(![&early[0], &early[1], &fresh, &late].iter().any(|held| held.cidr == next.cidr), "{next:?}");
    assert!(next.leased > late.leased);
}

#[tokio::test]
async fn an_old_backup_of_the_embedded_store_is_adopted_before_anything_is_leased() {
    an_old_backup_is_adopted(None).await;
}

#[tokio::test]
async fn an_old_backup_of_the_embedded_store_is_put_into_etcd_and_adopted_before_anything_is_leased() {
    let etcd = Etcd::start(1);
    an_old_backup_is_adopted(Some(StoreChoice::Etcd(etcd.config("/restored")))).await;
}

#[tokio::test]
async fn of_two_hosts_that_hold_a_block_the_later_lease_counts_and_the_other_host_is_told() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let block = one.lease("managed", 0).await.unwrap();
    let file = server.dir.path().join("backup");
    let data = server.dir.path().join("data");
    backup(&data, &StoreChoice::Embedded, &file).await.unwrap();
    let dir = server.stop().await;
    restore(&file, &data, &StoreChoice::Embedded, true).await.unwrap();
    let server = Server::start_in(dir).await;
    let (one, two) = (server.agent(&one), server.agent(&two));
    // The second was leased it after the first had given it back; the first has an old ledger.
    let later = Block { host: two.id.clone(), leased: model::Revision(block.leased.0 + 5), ..block.clone() };
    assert!(held(&two, &Held { blocks: vec![later], claims: vec![] }).await.conflicts.is_empty());
    let answer = held(&one, &Held { blocks: vec![block.clone()], claims: vec![] }).await;
    assert!(answer.conflicts[0].contains("leased to host h2 later"), "{answer:?}");
    let blocks: Vec<Block> = server.admin().get(&format!("{DEFAULT}/blocks")).await.unwrap();
    assert_eq!(
        blocks.iter().map(|block| (&block.cidr, &block.host)).collect::<Vec<_>>(),
        [(&block.cidr, &two.id)]
    );
    // What is no block of a pool is nobody's.
    let dir = server.stop().await;
    std::fs::remove_file(&file).unwrap();
    backup(&data, &StoreChoice::Embedded, &file).await.unwrap();
    restore(&file, &data, &StoreChoice::Embedded, true).await.unwrap();
    let server = Server::start_in(dir).await;
    let wide = Block { cidr: "10.42.0.0/17".parse().unwrap(), ..block };
    let body = Held { blocks: vec![wide], claims: vec![] };
    let refused =
        server.agent(&one).client.put::<HeldAnswer>(&format!("{DEFAULT}/hosts/self/held"), &body).await;
    assert_eq!(refused.unwrap_err().code, ErrorCode::Invalid);
}

#[tokio::test]
async fn a_backup_that_is_cut_short_or_changed_restores_nothing() {
    let server = Server::start().await;
    server.host("h1").await;
    let file = server.dir.path().join("backup");
    backup(&server.dir.path().join("data"), &StoreChoice::Embedded, &file).await.unwrap();
    let whole = std::fs::read_to_string(&file).unwrap();
    let half = whole.len() / 2;
    let changed = whole.replacen("\"h1\"", "\"h9\"", 1).replacen("created\":3", "created\":4", 1);
    assert_ne!(changed, whole);
    for (name, text) in
        [("half", &whole[..half]), ("line", whole.rsplit_once("{\"end").unwrap().0), ("changed", &changed)]
    {
        let bad: PathBuf = server.dir.path().join(name);
        std::fs::write(&bad, text).unwrap();
        let target = server.dir.path().join("target");
        let error = restore(&bad, &target, &StoreChoice::Embedded, false).await.unwrap_err();
        assert!(error.to_string().contains("nothing was changed"), "{name}: {error}");
        assert!(!target.exists(), "{name}");
    }
}

#[tokio::test]
async fn two_backups_to_one_file_do_not_mix_and_what_one_left_that_was_killed_is_in_nobodys_way() {
    let server = Server::start().await;
    let (data, file) = (server.dir.path().join("data"), server.dir.path().join("backup"));
    let part = server.dir.path().join("backup.part");
    std::fs::write(&part, "half of a backup, and longer than a whole one\n".repeat(1000)).unwrap();
    let other = std::fs::OpenOptions::new().write(true).open(&part).unwrap();
    other.lock().unwrap();
    let error = backup(&data, &StoreChoice::Embedded, &file).await.unwrap_err().to_string();
    assert!(error.contains("another backup is being written") && !file.exists(), "{error}");
    drop(other);
    backup(&data, &StoreChoice::Embedded, &file).await.unwrap();
    assert!(!part.exists());
    restore(&file, &server.dir.path().join("target"), &StoreChoice::Embedded, false).await.unwrap();
}

#[tokio::test]
async fn a_restore_that_was_cut_short_is_repeated_and_the_journal_of_the_old_store_is_not_taken_for_the_new_ones()
 {
    let server = Server::start().await;
    let (data, file) = (server.dir.path().join("data"), server.dir.path().join("backup"));
    backup(&data, &StoreChoice::Embedded, &file).await.unwrap();
    server.admin().make_network(json!({ "name": "later", "cidrs": ["10.60.0.0/16"] })).await.unwrap();
    let journal = std::fs::read(data.join("store.sqlite-wal")).unwrap();
    assert!(!journal.is_empty());
    let dir = server.crash().await;
    // The store's file was moved away, its journal was not.
    std::fs::remove_file(data.join("store.sqlite")).unwrap();
    std::fs::write(data.join("store.sqlite-wal"), &journal).unwrap();
    let Err(error) = Server::start_with(TempDir::new_in(dir.path()).unwrap(), |config| Config {
        data_dir: data.clone(),
        ..config
    })
    .await
    else {
        panic!("started")
    };
    assert!(matches!(error, server::Error::Missing(_)), "{error}");
    restore(&file, &data, &StoreChoice::Embedded, true).await.unwrap();
    let server = Server::start_in(dir).await;
    let networks: Vec<model::Network> = server.admin().get(&format!("{DEFAULT}/networks")).await.unwrap();
    assert_eq!(networks.len(), 1, "{networks:?}");
}

#[tokio::test]
async fn a_server_whose_etcd_was_put_back_under_it_ends_with_the_remedy_and_serves_that_life_no_more() {
    let mut etcd = Etcd::start(1);
    let store = StoreChoice::Etcd(etcd.config("/droves"));
    let server = server_in(tempfile::tempdir().unwrap(), &store).await;
    let data = server.dir.path().join("data");
    let network = async |name: &str, n: u8| {
        let spec = json!({ "name": name, "cidrs": [format!("10.{n}.0.0/16")] });
        // etcd may just have been started again, and what it was asked have been done.
        while let Err(error) = server.admin().make_network(spec.clone()).await {
            match error.code {
                ErrorCode::Unavailable => {}
                ErrorCode::Conflict => break,
                _ => panic!("{error}"),
            }
        }
    };
    network("before", 60).await;
    let saved = etcd.save(0);
    network("after", 61).await;
    // Without loss it may start again.
    etcd.restart(0);
    network("later", 62).await;
    let epoch = server.nobody().get::<ServerInfo>("/v1/info").await.unwrap().epoch;
    etcd.put_back(0, &saved);
    let (dir, error) = server.ends().await;
    for error in [error, server_on(&dir, &store).await.err().unwrap()] {
        assert!(matches!(error, server::Error::SetBack(_)), "{error}");
        let error = error.to_string();
        assert!(error.contains("droveway server restore") && error.contains("/droves"), "{error}");
    }
    // As it says.
    let file = dir.path().join("what is there");
    backup(&data, &store, &file).await.unwrap();
    restore(&file, &data, &store, true).await.unwrap();
    let server = server_in(dir, &store).await;
    let networks: Vec<model::Network> = server.admin().get(&format!("{DEFAULT}/networks")).await.unwrap();
    let names: Vec<&str> = networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!(names, ["before", "managed"]);
    assert_ne!(server.nobody().get::<ServerInfo>("/v1/info").await.unwrap().epoch, epoch);
}
