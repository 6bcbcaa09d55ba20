//! What a server is called in the store. By that name it says how it is reached and whom it sees, and under it are the
//! changes that its audit log is to get.
//!
//! A name is random, made at a first start, and kept in the data directory; no backup has it. A directory may be copied all
//! the same, with its machine or without. So where servers share a store each start has a number of its own there, which the
//! directory knows, too: who comes from a start that is not the last is a copy. Who comes from the last one goes on with the
//! name, unless that start lives: it is asked, and who lives says so. A copy takes another name.
//!
//! Invariant: of all that run, no two go by one name for longer than it takes to say so. What was left under a name is
//! written by who goes on with it.

use std::time::Duration;

use model::{EnvironmentId, Revision};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::app::App;
use crate::files::{self, DataDir};
use crate::keys::{self, Keys, Server};
use crate::store::{Compare, Op, Store, StoreError, Txn};
use crate::{Error, secret};

/// For how long a start that has a name may be silent before another goes on with it.
const ANSWER: Duration = Duration::from_secs(3);
/// How long to wait before an answer that could not be written is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a server that stops tries to say so.
const LEAVE: Duration = Duration::from_secs(3);

/// A server's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) text: String,
    /// Which start goes by it; none where nobody else can.
    start: Option<String>,
}

/// What a data directory knows of its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Id {
    name: String,
    /// The last start, as the store has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last: Option<String>,
    /// A start that the store may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// Whether a directory goes on with its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    GoOn,
    /// If the start that has it is silent.
    Ask,
    Copy,
}

fn judge(found: Option<&Server>, id: &Id) -> Verdict {
    let Some(server) = found else { return Verdict::GoOn };
    let start = Some(&server.start);
    if start != id.last.as_ref() && start != id.next.as_ref() {
        return Verdict::Copy;
    }
    // Versions that counted no starts left it empty, and answer nobody.
    if server.ended || server.start.is_empty() { Verdict::GoOn } else { Verdict::Ask }
}

/// The name of the server of that directory, by which it is found in the store from now on. `shared` is whether there may be
/// other servers, `before` what versions called it that kept no name.
pub(crate) async fn take(
    data: &DataDir,
    store: &dyn Store,
    environment: &EnvironmentId,
    urls: &[String],
    shared: bool,
    before: &str,
) -> Result<Name, Error> {
    let keys = Keys(environment);
    let urls: Vec<String> = urls.iter().map(|url| url.trim_end_matches('/').to_owned()).collect();
    let found = data.read(files::SERVER_ID)?;
    let mut id = match &found {
        Some(text) => serde_json::from_str(text).map_err(|_| Error::BadId(data.path(files::SERVER_ID)))?,
        None => first(store, keys, before).await?,
    };
    if !shared {
        if found.is_none() {
            keep(data, &id)?;
        }
        say(store, keys.server(&id.name), urls).await?;
        return Ok(Name { text: id.name, start: None });
    }
    // A name that the disk does not take is that of this start alone.
    let mut kept = true;
    loop {
        let place = keys.server(&id.name);
        let mut found = look(store, &place).await?;
        match (judge(found.as_ref().map(|(server, _)| server), &id), &found) {
            (Verdict::GoOn, _) | (Verdict::Ask, None) => {}
            (Verdict::Ask, Some((server, at))) => match ask(store, &place, server, *at).await? {
                Answer::Silence(now) => found = Some((server.clone(), now)),
                Answer::Lives => {
                    id = another(data)?;
                    continue;
                }
                Answer::Changed => continue,
            },
            (Verdict::Copy, _) => {
                id = another(data)?;
                continue;
            }
        }
        let start = random()?;
        id.next = Some(start.clone());
        if kept && let Err(error) = keep(data, &id) {
            tracing::warn!(
                "{error}; the server starts all the same, and has another name until it is started again"
            );
            id = Id { name: random()?, last: None, next: None };
            kept = false;
            continue;
        }
        let server = Server { urls: urls.clone(), start: start.clone(), ended: false, asked: None };
        let compare = match found {
            Some((_, at)) => Compare::Modified(place.clone(), at),
            None => Compare::Absent(place.clone()),
        };
        if store.txn(Txn::new(vec![compare], vec![put(place, &server)?])).await.map_err(fault)?.succeeded {
            let id = Id { name: id.name, last: Some(start.clone()), next: None };
            if kept && let Err(error) = keep(data, &id) {
                // What it may have taken is written down.
                tracing::warn!("{error}; it is settled when the server starts again");
            }
            return Ok(Name { text: id.name, start: Some(start) });
        }
    }
}

/// What a directory without a name is called: as it was, where something was left under that.
async fn first(store: &dyn Store, keys: Keys<'_>, before: &str) -> Result<Id, Error> {
    let known = look(store, &keys.server(before)).await?.map(|(server, _)| server);
    let (_, left) = store.range(&keys.audit(before, "")).await.map_err(fault)?;
    let goes_on = match &known {
        Some(server) => server.start.is_empty(),
        None => !left.is_empty(),
    };
    if goes_on {
        return Ok(Id { name: before.to_owned(), last: Some(String::new()), next: None });
    }
    Ok(Id { name: random()?, last: None, next: None })
}

/// Another name, for a directory that is a copy of one that goes on with its own.
fn another(data: &DataDir) -> Result<Id, Error> {
    tracing::warn!(
        directory = %data.path("").display(),
        "this data directory is a copy of that of another server: it gets a name of its own, and what was left for the audit \
         log of the other is in that one's"
    );
    Ok(Id { name: random()?, last: None, next: None })
}

fn keep(data: &DataDir, id: &Id) -> Result<(), Error> {
    let text = serde_json::to_string(id).map_err(unwritable)?;
    data.write(files::SERVER_ID, &format!("{text}\n"))
}

async fn look(store: &dyn Store, place: &str) -> Result<Option<(Server, Revision)>, Error> {
    let (_, all) = store.range(place).await.map_err(fault)?;
    let Some(kv) = all.into_iter().find(|kv| kv.key == place) else { return Ok(None) };
    Ok(Some((serde_json::from_slice(&kv.value).map_err(unwritable)?, kv.modified)))
}

/// How a start that has a name took the question whether it lives.
enum Answer {
    /// It said nothing; the question is of this revision.
    Silence(Revision),
    Lives,
    /// Something else happened: look again.
    Changed,
}

async fn ask(store: &dyn Store, place: &str, server: &Server, at: Revision) -> Result<Answer, Error> {
    let deadline = Instant::now() + ANSWER;
    let (question, at) = match &server.asked {
        // Somebody else asks already.
        Some(question) => (question.clone(), at),
        None => {
            let question = random()?;
            let asked = Server { asked: Some(question.clone()), ..server.clone() };
            let compare = Compare::Modified(place.to_owned(), at);
            let txn = Txn::new(vec![compare], vec![put(place.to_owned(), &asked)?]);
            let outcome = store.txn(txn).await.map_err(fault)?;
            if !outcome.succeeded {
                return Ok(Answer::Changed);
            }
            (question, outcome.revision)
        }
    };
    let changes = async {
        match store.watch(place, at).await {
            Ok(mut watch) => while watch.next().await.is_ok_and(|batch| batch.events.is_empty()) {},
            Err(_) => sleep_until(deadline).await,
        }
    };
    // What breaks off early is no answer: what counts is what is there then.
    drop(timeout_at(deadline, changes).await);
    Ok(match look(store, place).await? {
        Some((now, _)) if now.start == server.start && now.asked.is_none() && !now.ended => Answer::Lives,
        Some((now, at)) if now.asked.as_ref() == Some(&question) && Instant::now() >= deadline => {
            Answer::Silence(at)
        }
        Some(_) | None => Answer::Changed,
    })
}

/// Makes the store's list of servers have this one as it is now, where it is the only one.
async fn say(store: &dyn Store, place: String, urls: Vec<String>) -> Result<(), Error> {
    let server = Server { urls, ..Server::default() };
    if look(store, &place).await?.map(|(known, _)| known).unwrap_or_default() == server {
        return Ok(());
    }
    let op = if server.urls.is_empty() { Op::Delete(place) } else { put(place, &server)? };
    store.txn(Txn::new(vec![], vec![op])).await.map_err(fault)?;
    Ok(())
}

/// Says that this start lives to each that asks; ready when another has gone on with its name.
pub(crate) async fn hold(app: &App, environment: &EnvironmentId, name: &Name) {
    let Some(start) = &name.start else { return std::future::pending().await };
    let place = Keys(environment).server(&name.text);
    let mut revisions = app.shared.subscribe();
    loop {
        revisions.borrow_and_update();
        match known(app, environment, name) {
            Some((server, _)) if server.start != *start => return,
            Some((server, at)) if server.asked.is_some() => {
                let answer = put(place.clone(), &Server { asked: None, ..server });
                let compare = Compare::Modified(place.clone(), at);
                let Ok(answer) = answer else { return std::future::pending().await };
                if let Err(error) = app.store.txn(Txn::new(vec![compare], vec![answer])).await {
                    tracing::warn!(%error, "another asks whether this server lives, and cannot be told");
                    sleep(AGAIN).await;
                    continue;
                }
                tracing::warn!("another server was started with a copy of this one's data directory");
            }
            Some(_) | None => {}
        }
        if revisions.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Says that this start has ended, and takes away what its log has: what a copy of its directory cannot know.
pub(crate) async fn leave(app: &App, environment: &EnvironmentId, name: &Name) {
    let Some((server, at)) = known(app, environment, name).filter(|_| name.start.is_some()) else { return };
    let keys = Keys(environment);
    let place = keys.server(&name.text);
    let Ok(ended) = put(place.clone(), &Server { ended: true, ..server }) else { return };
    let mut ops = vec![ended];
    ops.extend(app.outbox.written(environment).into_iter().map(|id| Op::Delete(keys.audit(&name.text, &id))));
    let txn = app.store.txn(Txn::new(vec![Compare::Modified(place, at)], ops));
    // If that fails, the next start asks.
    if let Ok(Err(error)) = tokio::time::timeout(LEAVE, txn).await {
        tracing::debug!(%error, "that this server ends was not written down");
    }
}

/// What the state has of this server.
fn known(app: &App, environment: &EnvironmentId, name: &Name) -> Option<(Server, Revision)> {
    let state = app.shared.read();
    let env = state.environments.get(environment)?;
    let at = env.modified(&Keys(environment).server(&name.text))?;
    Some((env.server(&name.text)?.clone(), at))
}

fn put(place: String, server: &Server) -> Result<Op, Error> {
    keys::put(place, server).map_err(unwritable)
}

fn random() -> Result<String, Error> {
    Ok(format!("{:016x}", u64::from_be_bytes(secret::random()?)))
}

fn fault(error: StoreError) -> Error {
    Error::Store(error.to_string())
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::Store(error.to_string())
}

#[cfg(test)]
mod tests {
    use model::Epoch;
    use tempfile::TempDir;

    use super::*;
    use crate::store::SqliteStore;

    const BEFORE: &str = "0123456789abcdef";

    fn store(dir: &TempDir) -> SqliteStore {
        SqliteStore::open(&dir.path().join("store"), Epoch::from_random([1; 8])).unwrap()
    }

    /// Another start on a directory.
    async fn start(store: &SqliteStore, dir: &TempDir, shared: bool) -> Name {
        let data = DataDir::open(dir.path()).unwrap();
        take(&data, store, &EnvironmentId::default(), &[], shared, BEFORE).await.unwrap()
    }

    /// Nothing can be written there, as if the disk were full.
    fn fill(dir: &TempDir) -> std::path::PathBuf {
        let stone = dir.path().join(format!(".{}.new", files::SERVER_ID));
        std::fs::create_dir(&stone).unwrap();
        stone
    }

    fn copy(of: &TempDir) -> TempDir {
        let copy = tempfile::tempdir().unwrap();
        drop(DataDir::open(copy.path()).unwrap());
        std::fs::copy(of.path().join(files::SERVER_ID), copy.path().join(files::SERVER_ID)).unwrap();
        copy
    }

    async fn change(store: &SqliteStore, name: &Name, change: impl FnOnce(&mut Server)) {
        let environment = EnvironmentId::default();
        let place = Keys(&environment).server(&name.text);
        let (mut server, at) = look(store, &place).await.unwrap().unwrap();
        change(&mut server);
        let txn =
            Txn::new(vec![Compare::Modified(place.clone(), at)], vec![super::put(place, &server).unwrap()]);
        assert!(store.txn(txn).await.unwrap().succeeded);
    }

    #[tokio::test]
    async fn on_a_full_disk_a_server_starts_all_the_same() {
        let (dir, original) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(&dir);
        let alone = start(&store, &original, false).await;
        let stone = fill(&original);
        assert_eq!(start(&store, &original, false).await, alone);
        // Among several by a name that nobody else can have, until there is room.
        let other = start(&store, &original, true).await;
        assert!(other.text != alone.text && other.start.is_some(), "{other:?}");
        std::fs::remove_dir(stone).unwrap();
        assert_eq!(start(&store, &original, true).await.text, alone.text);
    }

    #[tokio::test]
    async fn a_directory_goes_on_with_its_name_and_of_its_copies_one_where_its_server_is_silent() {
        let (dir, original) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(&dir);
        let first = start(&store, &original, true).await;
        let begun = Instant::now();
        change(&store, &first, |server| server.ended = true).await;
        let second = start(&store, &original, true).await;
        assert!(second.text == first.text && second.start != first.start, "{second:?}");
        assert!(begun.elapsed() < ANSWER, "it had ended, and said so");

        // Killed. Its copies come, all at once, and then it.
        let copies = [copy(&original), copy(&original), copy(&original)];
        let begun = Instant::now();
        let names = tokio::join!(
            start(&store, &copies[0], true),
            start(&store, &copies[1], true),
            start(&store, &copies[2], true)
        );
        assert!(begun.elapsed() >= ANSWER, "it might have lived");
        let mut names = vec![names.0.text, names.1.text, names.2.text];
        names.push(start(&store, &original, true).await.text);
        assert_eq!(names.iter().filter(|name| **name == first.text).count(), 1, "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 4, "{names:?}");
    }

    #[tokio::test]
    async fn a_copy_of_one_that_lives_takes_another_name_and_keeps_that() {
        let (dir, original) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(&dir);
        let first = start(&store, &original, true).await;
        let copied = copy(&original);
        let place = Keys(&EnvironmentId::default()).server(&first.text);
        let mut watch = store.watch(&place, store.range("/").await.unwrap().0).await.unwrap();
        let begun = Instant::now();
        let (name, ()) = tokio::join!(start(&store, &copied, true), async {
            watch.next().await.unwrap();
            change(&store, &first, |server| assert!(server.asked.take().is_some())).await;
        });
        assert!(name.text != first.text && begun.elapsed() < ANSWER);
        change(&store, &name, |server| server.ended = true).await;
        assert_eq!(start(&store, &copied, true).await.text, name.text);
    }

    #[tokio::test]
    async fn a_start_that_was_cut_short_is_taken_up_and_what_was_left_by_older_versions_too() {
        let (dir, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(&dir);
        let environment = EnvironmentId::default();
        let keys = Keys(&environment);
        let left = Op::Put(keys.audit(BEFORE, "1"), b"{}".to_vec());
        store.txn(Txn::new(vec![], vec![left])).await.unwrap();
        let name = start(&store, &data, true).await;
        assert_eq!(name.text, BEFORE, "what it left is written by it");
        let other = tempfile::tempdir().unwrap();
        assert_ne!(start(&store, &other, true).await.text, BEFORE, "and by nobody else");
        // The store took it, and the directory does not know.
        change(&store, &name, |server| server.ended = true).await;
        let id = Id { name: name.text.clone(), last: None, next: name.start };
        std::fs::write(data.path().join(files::SERVER_ID), serde_json::to_string(&id).unwrap()).unwrap();
        assert_eq!(start(&store, &data, true).await.text, name.text);
    }

    #[tokio::test]
    async fn who_has_a_store_alone_keeps_its_name_and_changes_nothing_by_starting() {
        let (dir, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(&dir);
        let name = start(&store, &data, false).await;
        assert_eq!(start(&store, &data, false).await, name);
        assert_eq!(store.range("/").await.unwrap().0, Revision(0));
    }
}
