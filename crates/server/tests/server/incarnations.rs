//! Of all that have the same ledger one goes on: what the server says to who comes with it.

use model::api::{ApiError, AuditEntry, ErrorCode, GiveBack, Held, HeldAnswer, HostView, Outcome};
use model::{Incarnation, Lineage, StartSecret, Step, Watch};
use server::{StoreChoice, backup, restore};

use crate::harness::{Agent, Client, DEFAULT, Server};

/// The agent of a host, with its ledger.
pub struct Ledger<'a> {
    pub agent: &'a Agent,
    pub lineage: Lineage,
    pub seed: u8,
    /// What only this start knows.
    pub secret: StartSecret,
}

impl Ledger<'_> {
    pub fn copy(&self, seed: u8) -> Self {
        Self { agent: self.agent, lineage: self.lineage.clone(), seed, secret: secret(seed) }
    }

    pub fn next(&mut self) -> Step {
        Step { secret: Some(self.secret.clone()), ..self.lineage.begin([self.seed; 8]) }
    }

    pub async fn tell(&self, step: &Step) -> Result<(), ApiError> {
        self.agent.client.put(&format!("{DEFAULT}/hosts/self/incarnation"), step).await
    }

    /// A start: what follows from it is asked by what comes back.
    pub async fn start(&mut self) -> Result<Agent, ApiError> {
        self.seed += 10;
        self.secret = secret(self.seed);
        self.go_on().await
    }

    /// The same start steps on.
    pub async fn go_on(&mut self) -> Result<Agent, ApiError> {
        let step = self.next();
        self.tell(&step).await?;
        self.lineage.taken(&step.to);
        Ok(self.by(Some(step.to)))
    }

    pub fn by(&self, incarnation: Option<Incarnation>) -> Agent {
        let client = Client { incarnation, ..self.agent.client.clone() };
        let key = rcgen::KeyPair::from_pem(&self.agent.key.serialize_pem()).unwrap();
        Agent { id: self.agent.id.clone(), client, key, answer: self.agent.answer.clone() }
    }
}

pub fn ledger(agent: &Agent) -> Ledger<'_> {
    Ledger { agent, lineage: Lineage::default(), seed: 1, secret: secret(1) }
}

fn secret(seed: u8) -> StartSecret {
    StartSecret::from_random([seed; 32])
}

async fn view(server: &Server) -> HostView {
    view_as(&server.admin()).await
}

pub async fn view_as(person: &Client) -> HostView {
    person.get(&format!("{DEFAULT}/hosts/h1")).await.unwrap()
}

#[tokio::test]
async fn all_that_an_agent_asks_is_of_the_life_that_counts() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    host.lease("managed", 0).await.unwrap();
    let mut ledger = ledger(&host);
    let first = ledger.start().await.unwrap();
    assert_eq!(host.lease("managed", 1).await.unwrap_err().code, ErrorCode::Copied, "it says none");
    first.lease("managed", 1).await.unwrap();
    let mut watch = first.watch().await;
    watch.snapshot().await;
    drop(watch);
    // The watch is seen to end.
    let second = ledger.start().await.unwrap();
    assert_eq!(first.lease("managed", 2).await.unwrap_err().code, ErrorCode::Copied, "it is over");
    second.lease("managed", 2).await.unwrap();
    assert_eq!((view(&server).await.incarnation, view(&server).await.copy), (Some(2), None));
    let to: Incarnation = "9-0000000000000001".parse().unwrap();
    let leap = Step { from: ledger.lineage.last.clone(), to, secret: None };
    assert_eq!(ledger.tell(&leap).await.unwrap_err().code, ErrorCode::Invalid);
}

#[tokio::test]
async fn a_copy_is_refused_while_the_original_watches_and_for_good() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut original = ledger(&host);
    let agent = original.start().await.unwrap();
    let mut watch = agent.watch().await;
    watch.snapshot().await;
    let mut copy = original.copy(2);
    let coming = copy.next();
    let (refused, agent) = tokio::join!(copy.tell(&coming), async {
        assert_eq!(watch.next().await, Some(Watch::Prove), "it is asked");
        original.go_on().await.unwrap()
    });
    let error = refused.unwrap_err();
    assert_eq!(error.code, ErrorCode::Copied);
    assert!(
        error.message.contains("host rm h1") && error.message.contains("delete the state directory"),
        "{error}"
    );
    assert_eq!(watch.next().await, None, "the watch of the life before ends");
    agent.lease("managed", 0).await.unwrap();
    let mut watch = agent.watch().await;
    watch.snapshot().await;
    drop(watch);
    // Also when the original is away, and as it was when it was copied.
    assert_eq!(copy.tell(&coming).await.unwrap_err().code, ErrorCode::Copied);
    let seen = view(&server).await.copy.unwrap();
    assert_eq!((seen.times, seen.from.to_string().as_str()), (2, "127.0.0.1"));
    original.start().await.unwrap();
    let (_, log) = server.admin().raw(reqwest::Method::GET, &format!("{DEFAULT}/audit"), "").await;
    let entries: Vec<AuditEntry> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let about = |entry: &&AuditEntry| {
        entry.about.as_deref() == Some("a copy of the state directory of host \"h1\"")
            && (entry.outcome, entry.code) == (Outcome::Refused, Some(ErrorCode::Copied))
    };
    assert_eq!(entries.iter().filter(about).count(), 2, "{log}");
}

#[tokio::test]
async fn an_original_that_is_silent_is_followed_by_who_comes_and_a_copy_once_it_starts_anew() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut original = ledger(&host);
    let agent = original.start().await.unwrap();
    let mut copy = original.copy(2);
    let mut watch = agent.watch().await;
    watch.snapshot().await;
    // It does not answer.
    let other = copy.start().await.unwrap();
    other.lease("managed", 0).await.unwrap();
    assert_eq!(watch.next().await, Some(Watch::Prove));
    assert_eq!(watch.next().await, None);
    assert_eq!(agent.lease("managed", 1).await.unwrap_err().code, ErrorCode::Copied);
    assert_eq!(original.start().await.err().unwrap().code, ErrorCode::Copied);
}

#[tokio::test]
async fn an_original_that_was_cut_off_goes_on_when_it_is_back_and_says_what_it_holds() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut original = ledger(&host);
    let agent = original.start().await.unwrap();
    let mut watch = agent.watch().await;
    watch.snapshot().await;
    let block = agent.lease("managed", 0).await.unwrap();
    // The server ends, and the copy is back before the original. Nobody is there to show that it lives.
    drop(watch);
    let server = Server::start_in(server.stop().await).await;
    let (host, neighbour) = (server.agent(&host), server.host("h2").await);
    let mut original = Ledger { agent: &host, ..original };
    let mut copy = original.copy(2);
    let other = copy.start().await.unwrap();
    let give = GiveBack { network: "managed".into(), cidr: block.cidr, leased: None };
    other.client.delete_with(&format!("{DEFAULT}/blocks"), &give).await.unwrap();
    let taken = other.lease("managed", 0).await.unwrap();
    let agent = original.by(original.lineage.last.clone());
    assert_eq!(agent.lease("managed", 1).await.unwrap_err().code, ErrorCode::Copied);

    let agent = original.go_on().await.unwrap();
    assert_eq!(other.lease("managed", 1).await.unwrap_err().code, ErrorCode::Copied);
    assert_eq!(agent.client.raw(reqwest::Method::GET, &format!("{DEFAULT}/watch"), "").await.0.as_u16(), 409);
    // Nobody waits for what it has to say.
    neighbour.lease("managed", 0).await.unwrap();
    let held = Held { blocks: vec![block.clone()], claims: Vec::new() };
    let answer: HeldAnswer = agent.client.put(&format!("{DEFAULT}/hosts/self/held"), &held).await.unwrap();
    assert_eq!(answer.conflicts, Vec::<String>::new());
    let blocks: Vec<model::Block> = server.admin().get(&format!("{DEFAULT}/blocks")).await.unwrap();
    let own: Vec<_> = blocks.iter().filter(|it| it.host == host.id).map(|it| it.cidr).collect();
    assert_eq!(own, [block.cidr], "not {}, which the copy leased", taken.cidr);
    agent.watch().await.snapshot().await;
    assert_eq!(copy.start().await.err().unwrap().code, ErrorCode::Copied);
}

#[tokio::test]
async fn of_two_that_come_at_once_one_goes_on_where_the_original_is_silent() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut original = ledger(&host);
    let agent = original.start().await.unwrap();
    let mut watch = agent.watch().await;
    watch.snapshot().await;
    let (mut one, mut two) = (original.copy(2), original.copy(3));
    let (one, two) = tokio::join!(one.start(), two.start());
    let outcomes = [one.map(drop), two.map(drop)];
    let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert!(refused.len() == 1 && refused[0].code == ErrorCode::Copied, "{outcomes:?}");
}

#[tokio::test]
async fn a_restored_server_takes_what_it_does_not_know_yet_and_one_put_back_by_hand_says_so() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut original = ledger(&host);
    original.start().await.unwrap();
    let old = original.copy(2);
    let data = server.dir.path().join("data");
    let files = tempfile::tempdir().unwrap();
    let (file, store) = (files.path().join("monday"), StoreChoice::Embedded);
    backup(&data, &store, &file).await.unwrap();
    for _ in 0..2 {
        original.start().await.unwrap();
    }
    let dir = server.stop().await;
    std::fs::copy(data.join("store.sqlite"), files.path().join("newer")).unwrap();

    restore(&file, &data, &store, true).await.unwrap();
    let server = Server::start_in(dir).await;
    let host = server.agent(&host);
    let mut original = Ledger { agent: &host, ..original };
    let agent = original.start().await.unwrap();
    let _: HeldAnswer =
        agent.client.put(&format!("{DEFAULT}/hosts/self/held"), &Held::default()).await.unwrap();
    agent.watch().await.snapshot().await;
    let mut old = Ledger { agent: &host, ..old };
    assert_eq!(old.start().await.err().unwrap().code, ErrorCode::Copied, "older than the backup and all");

    // Whoever puts a file back by hand is told what to do, and no host is lost by it.
    for _ in 0..2 {
        original.start().await.unwrap();
    }
    let dir = server.stop().await;
    std::fs::copy(files.path().join("newer"), data.join("store.sqlite")).unwrap();
    let server = Server::start_in(dir).await;
    let host = server.agent(&host);
    let mut original = Ledger { agent: &host, ..original };
    let error = original.start().await.err().unwrap();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.message.contains("droveway server restore"), "{error}");

    // A host that nobody waits for any more is taken as it comes.
    let dir = server.stop().await;
    restore(&file, &data, &store, true).await.unwrap();
    let server = Server::start_in(dir).await;
    let name = view(&server).await.host.name;
    server.admin().delete(&format!("{DEFAULT}/unreported/{name}")).await.unwrap();
    let host = server.agent(&host);
    let mut original = Ledger { agent: &host, ..original };
    original.start().await.unwrap();
}

#[tokio::test]
async fn a_server_that_starts_again_knows_since_when_a_host_is_silent() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    assert_eq!(view(&server).await.seen, None, "never heard of");
    let mut watch = host.watch().await;
    watch.snapshot().await;
    let up = view(&server).await;
    assert!(up.connected && up.seen.is_some());
    let server = Server::start_in(server.stop().await).await;
    let away = view(&server).await;
    assert!(!away.connected && away.seen >= up.seen, "{away:?}");
    let host = server.agent(&host);
    let mut watch = host.watch().await;
    watch.snapshot().await;
    drop(watch);
    drop(host);
    // It goes, and the server is killed: what it saw is written down within a second or so.
    let mut gone = view(&server).await;
    let begun = std::time::Instant::now();
    while gone.connected {
        assert!(begun.elapsed().as_secs() < 15, "it is seen to go");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        gone = view(&server).await;
    }
    let revision = async || server.nobody().get::<model::api::ServerInfo>("/v1/info").await.unwrap().revision;
    let before = revision().await;
    let begun = std::time::Instant::now();
    while revision().await == before {
        assert!(begun.elapsed().as_secs() < 15, "it is written down");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let dir = server.crash().await;
    let server = Server::start_in(dir).await;
    assert_eq!(view(&server).await.seen, gone.seen);
}
