//! etcd as the store, for several servers at once. Spoken to by its JSON gateway ([`Gateway`]).
//!
//! Our keys are under a prefix, and the etcd may have other users. Their changes move etcd's revision too, so each of our
//! transactions that changes something puts [`HEAD`]: the revision that last changed it is the store's. [`LIFE`] holds the
//! epoch, and what is added to etcd's revisions: a restored store goes on above all revisions of its life before, also in
//! a new etcd, whose own begin at one.
//!
//! Invariant: an etcd that went back to an earlier revision than was seen before, or that holds another life, is not
//! believed any more: whatever is asked of the store, and each watch, ends with [`StoreError::Closed`], and the server with
//! it. Transactions and ranges are answered by all members together, so an older revision says so for certain. A watch is
//! served by one member alone, which may be behind the others: what it knows is no sign of anything.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use model::{Epoch, Revision};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::answers::{Done, EtcdEvent, Header, Kv, Range, Response, Watched, by_revision};
use super::gateway::{Gateway, Number, Stream, decode, encode};
use super::{
    Answer, Batch, Compare, Ended, Event, KeyValue, Op, Outcome, Store, StoreError, Txn, Watcher, prefix_end,
};
use crate::EtcdConfig;

/// Put by every transaction that changes something.
const HEAD: &str = "/droveway/.head";
/// The life of this store.
const LIFE: &str = "/droveway/.life";
/// The epoch of a life that is being restored.
const BEGINNING: &str = "/droveway/.beginning";
/// Before keys that are etcd's business and nobody else's.
const OWN: &str = "/droveway/.";
/// The newest way to lay out keys that this version knows.
const FORMAT: u32 = 1;
/// How many operations a transaction may need: a host may be removed with all that it has.
const OPERATIONS: usize = 1024;
/// How many keys are read at a time.
const PAGE: usize = 2000;
/// How many batches a watch may have waiting; etcd keeps the rest.
const WATCH_QUEUE: usize = 256;
/// A watch that is silent for so long is compared with what all members agree on: its own may hang.
const SILENT: Duration = Duration::from_secs(5);

/// The store in etcd.
pub(crate) struct EtcdStore {
    inner: Arc<Inner>,
}

struct Inner {
    gateway: Gateway,
    prefix: String,
    life: Life,
    /// The highest of etcd's own revisions that an answer had.
    seen: AtomicU64,
    /// The highest at which [`HEAD`] was.
    head: AtomicU64,
    /// Why this store is used no more, once that is known.
    ended: watch::Sender<Option<Ended>>,
}

/// What [`LIFE`] holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Life {
    format: u32,
    epoch: Epoch,
    /// Added to etcd's revisions.
    offset: u64,
}

/// Why an etcd cannot be the store. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenEtcdError {
    /// A user without a password, or the reverse.
    #[error("--store-user and --store-password-file go together")]
    HalfLogin,
    /// A certificate that nobody would see.
    #[error("--store-cert needs --store-ca: without it, TLS is not used")]
    NoCa,
    /// A certificate without its key.
    #[error("--store-cert and --store-key go together")]
    HalfIdentity,
    /// A file cannot be used.
    #[error("cannot use {0} for etcd: {1}")]
    File(PathBuf, String),
    /// TLS could not be set up.
    #[error("cannot set up TLS for etcd: {0}")]
    Tls(String),
    /// It was written by a newer version.
    #[error(
        "the store in etcd was written by a newer version (format {0}, known: {FORMAT}); run that version"
    )]
    Newer(u32),
    /// What is there is not ours, or half of a restore.
    #[error(
        "etcd holds keys under {0:?} that are not a whole store of Droveway: a restore was cut short, or they are another \
         program's; restore again with --force, or choose another prefix in --store"
    )]
    Foreign(String),
    /// Two restores at once.
    #[error(
        "another restore to the same place began meanwhile, with --force; look which of the two is wanted, and restore it again"
    )]
    TakenOver,
    /// Anything else.
    #[error("{0}")]
    Store(String),
}

impl From<StoreError> for OpenEtcdError {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

impl EtcdStore {
    /// Opens the store, or makes it with `epoch` where there is none.
    pub(crate) async fn open(config: &EtcdConfig, epoch: Epoch) -> Result<Self, OpenEtcdError> {
        let life = Life { format: FORMAT, epoch, offset: 0 };
        let inner = Inner::new(Gateway::new(config)?, &config.url.prefix, life);
        inner.probe().await?;
        if inner.life().await?.is_none() {
            if inner.holds_keys().await? {
                return Err(OpenEtcdError::Foreign(format!("{}/droveway/", inner.prefix)));
            }
            inner.make_life(&[]).await?;
        }
        let made = Self::existing(config).await?;
        made.ok_or_else(|| OpenEtcdError::Store("etcd does not show what was put there".into()))
    }

    /// Opens the store if there is one.
    pub(crate) async fn existing(config: &EtcdConfig) -> Result<Option<Self>, OpenEtcdError> {
        let nobody = Life { format: FORMAT, epoch: Epoch::from_random([0; 8]), offset: 0 };
        let mut inner = Inner::new(Gateway::new(config)?, &config.url.prefix, nobody);
        let Some(life) = inner.life().await? else { return Ok(None) };
        if life.format > FORMAT {
            return Err(OpenEtcdError::Newer(life.format));
        }
        inner.life = life;
        Ok(Some(Self { inner: Arc::new(inner) }))
    }

    /// Begins to make the store anew, with revisions above `above`; no server opens it before [`EtcdStore::finish`]. `None`
    /// if there is one; with `force` that is removed, and servers that run on it end.
    pub(crate) async fn begin(
        config: &EtcdConfig,
        epoch: Epoch,
        above: Revision,
        force: bool,
    ) -> Result<Option<Self>, OpenEtcdError> {
        let life = Life { format: FORMAT, epoch, offset: above.0 };
        let inner = Inner::new(Gateway::new(config)?, &config.url.prefix, life);
        inner.probe().await?;
        if inner.holds_keys().await? {
            if !force {
                return Ok(None);
            }
            inner.clear().await?;
        }
        let begun = Self { inner: Arc::new(inner) };
        let mark = Op::Put(BEGINNING.to_owned(), begun.epoch().to_string().into());
        let txn = Txn::new(vec![Compare::Absent(BEGINNING.to_owned())], vec![mark]);
        Ok(begun.txn(txn).await?.succeeded.then_some(begun))
    }

    /// That it is still this one who restores.
    pub(crate) fn beginning(&self) -> Compare {
        Compare::Value(BEGINNING.to_owned(), self.epoch().to_string().into())
    }

    /// Lets servers open what was made since [`EtcdStore::begin`].
    pub(crate) async fn finish(&self) -> Result<(), OpenEtcdError> {
        let compares = self.inner.compare(&self.beginning());
        if self.inner.make_life(&compares).await? { Ok(()) } else { Err(OpenEtcdError::TakenOver) }
    }
}

impl Store for EtcdStore {
    fn epoch(&self) -> Epoch {
        self.inner.life.epoch.clone()
    }

    fn range(&self, prefix: &str) -> Answer<'_, (Revision, Vec<KeyValue>)> {
        let prefix = prefix.to_owned();
        Box::pin(async move { self.inner.range(&prefix).await })
    }

    fn txn(&self, txn: Txn) -> Answer<'_, Outcome> {
        Box::pin(async move {
            txn.check()?;
            self.inner.txn(&txn).await
        })
    }

    fn watch(&self, prefix: &str, after: Revision) -> Answer<'_, Watcher> {
        let prefix = prefix.to_owned();
        Box::pin(async move {
            let life = &self.inner.life;
            let Some(after_own) = after.0.checked_sub(life.offset) else {
                return Err(StoreError::Compacted { asked: after, oldest: Revision(life.offset) });
            };
            let stream = self.inner.open_watch(&prefix, after_own + 1).await?;
            let (sender, batches) = mpsc::channel(WATCH_QUEUE);
            let inner = self.inner.clone();
            tokio::spawn(async move {
                let error = tokio::select! {
                    error = inner.follow(stream, &prefix, after, &sender) => error,
                    error = inner.ended() => error,
                    // Nobody listens any more.
                    () = sender.closed() => return,
                };
                drop(sender.send(Err(error)).await);
            });
            Ok(Watcher { batches })
        })
    }
}

impl Inner {
    fn new(gateway: Gateway, prefix: &str, life: Life) -> Self {
        let (seen, head, ended) = (AtomicU64::new(0), AtomicU64::new(0), watch::Sender::default());
        Self { gateway, prefix: prefix.to_owned(), life, seen, head, ended }
    }

    fn key(&self, key: &str) -> String {
        encode(format!("{}{key}", self.prefix))
    }

    fn end(&self, prefix: &str) -> String {
        encode(prefix_end(&format!("{}{prefix}", self.prefix)))
    }

    fn revision(&self, own: Number) -> Revision {
        Revision(own.0 + self.life.offset)
    }

    /// Notes the revision of an answer of all members to something that was asked when `before` was known.
    fn notice(&self, header: &Header, before: u64) -> Result<(), StoreError> {
        let now = header.revision;
        if now.0 == 0 {
            return Err(StoreError::Refused("etcd answers without its revision".into()));
        }
        self.seen.fetch_max(now.0, Ordering::Relaxed);
        if now.0 >= before {
            return Ok(());
        }
        Err(self.end_for(Ended::SetBack { before: self.revision(Number(before)), now: self.revision(now) }))
    }

    /// Ends the store, with its watches.
    fn end_for(&self, why: Ended) -> StoreError {
        self.ended.send_if_modified(|ended| {
            let news = ended.is_none();
            if news {
                tracing::error!("the store in etcd is used no more: {why}");
                *ended = Some(why);
            }
            news
        });
        StoreError::Closed(why)
    }

    /// Fails when the store has ended.
    fn goes_on(&self) -> Result<(), StoreError> {
        self.ended.borrow().map_or(Ok(()), |why| Err(StoreError::Closed(why)))
    }

    /// Ready when the store has ended.
    async fn ended(&self) -> StoreError {
        let mut ended = self.ended.subscribe();
        let why = ended.wait_for(Option::is_some).await.ok().and_then(|why| *why);
        StoreError::Closed(why.unwrap_or(Ended::Gone))
    }

    fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// Fails where etcd takes no transaction of the size that may be needed.
    async fn probe(&self) -> Result<(), StoreError> {
        let look = json!({ "request_range": { "key": self.key(LIFE), "keys_only": true } });
        let body = json!({ "success": vec![look; OPERATIONS] });
        self.gateway.read::<Value>("/v3/kv/txn", &body).await.map(drop)
    }

    async fn life(&self) -> Result<Option<Life>, OpenEtcdError> {
        let answer: Range = self.gateway.read("/v3/kv/range", &json!({ "key": self.key(LIFE) })).await?;
        let Some(kv) = answer.kvs.first() else { return Ok(None) };
        let foreign = |_| OpenEtcdError::Foreign(format!("{}{LIFE}", self.prefix));
        Ok(Some(serde_json::from_slice(&decode(&kv.value)?).map_err(foreign)?))
    }

    /// Whether there is anything where our keys are.
    async fn holds_keys(&self) -> Result<bool, StoreError> {
        let body = json!({ "key": self.key("/droveway/"), "range_end": self.end("/droveway/"), "limit": "1", "keys_only": true });
        let answer: Range = self.gateway.read("/v3/kv/range", &body).await?;
        Ok(!answer.kvs.is_empty())
    }

    /// Begins a life, unless another server was faster, or more than that does not hold; whether it began.
    async fn make_life(&self, compares: &[Value]) -> Result<bool, OpenEtcdError> {
        let life = serde_json::to_vec(&self.life).map_err(|error| OpenEtcdError::Store(error.to_string()))?;
        let absent =
            json!({ "key": self.key(LIFE), "target": "CREATE", "result": "EQUAL", "create_revision": "0" });
        let compares = [&[absent], compares].concat();
        let body = json!({
            "compare": compares,
            "success": [
                { "request_put": { "key": self.key(LIFE), "value": encode(life) } },
                { "request_put": { "key": self.key(HEAD) } },
                { "request_delete_range": { "key": self.key(BEGINNING) } },
            ],
        });
        Ok(self.gateway.write::<Done>("/v3/kv/txn", &body).await?.succeeded)
    }

    async fn clear(&self) -> Result<(), StoreError> {
        // The life first, alone: who sees the rest go must not take it for changes.
        let life = json!({ "key": self.key(LIFE) });
        self.gateway.write::<Value>("/v3/kv/deleterange", &life).await?;
        let all = json!({ "key": self.key("/droveway/"), "range_end": self.end("/droveway/") });
        self.gateway.write::<Value>("/v3/kv/deleterange", &all).await.map(drop)
    }

    async fn range(&self, prefix: &str) -> Result<(Revision, Vec<KeyValue>), StoreError> {
        loop {
            self.goes_on()?;
            match self.try_range(prefix).await {
                // So many changes while it was read page by page.
                Err(StoreError::Refused(why)) if why.contains("has been compacted") => {}
                outcome => return outcome,
            }
        }
    }

    async fn try_range(&self, prefix: &str) -> Result<(Revision, Vec<KeyValue>), StoreError> {
        let before = self.seen();
        let (from, end) = (self.key(prefix), self.end(prefix));
        let page = |key: &str| json!({ "key": key, "range_end": end, "limit": PAGE.to_string() });
        let first = json!({ "success": [
            { "request_range": { "key": self.key(HEAD) } },
            { "request_range": page(&from) },
        ] });
        let answer: Done = self.gateway.read("/v3/kv/txn", &first).await?;
        self.notice(&answer.header, before)?;
        let [Response { range: Some(head) }, Response { range: Some(first) }] = &answer.responses[..] else {
            return Err(StoreError::Refused("etcd answers less than was asked".into()));
        };
        let head = head.kvs.first().map_or(Number(0), |kv| kv.modified);
        let (mut all, mut more) = (Vec::new(), first.more);
        self.collect(&first.kvs, &mut all)?;
        let mut last = first.kvs.last().map(|kv| kv.key.clone());
        while let Some(key) = last.take().filter(|_| more) {
            let mut after = decode(&key)?;
            after.push(0);
            let mut body = page(&encode(after));
            body["revision"] = json!(answer.header.revision);
            let before = self.seen();
            let next: Range = self.gateway.read("/v3/kv/range", &body).await?;
            self.notice(&next.header, before)?;
            self.collect(&next.kvs, &mut all)?;
            more = next.more;
            last = next.kvs.last().map(|kv| kv.key.clone());
        }
        Ok((self.saw_head(head), all))
    }

    fn collect(&self, kvs: &[Kv], into: &mut Vec<KeyValue>) -> Result<(), StoreError> {
        for kv in kvs {
            into.extend(self.key_value(kv)?);
        }
        Ok(())
    }

    /// A key as the rest of the server knows it; `None` for those that are etcd's business.
    fn key_value(&self, kv: &Kv) -> Result<Option<KeyValue>, StoreError> {
        let Some(key) = self.own_key(kv)? else { return Ok(None) };
        Ok(Some(KeyValue {
            key,
            value: decode(&kv.value)?,
            created: self.revision(kv.created),
            modified: self.revision(kv.modified),
            version: kv.version.0,
        }))
    }

    fn own_key(&self, kv: &Kv) -> Result<Option<String>, StoreError> {
        let key = String::from_utf8(decode(&kv.key)?).ok();
        let key = key.and_then(|key| key.strip_prefix(&self.prefix).map(str::to_owned));
        Ok(key.filter(|key| !key.starts_with(OWN)))
    }

    async fn txn(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        self.goes_on()?;
        let before = self.seen();
        let body = json!({
            "compare": txn.compares.iter().flat_map(|compare| self.compare(compare)).collect::<Vec<_>>(),
            "success": self.ops(&txn.success),
            "failure": self.ops(&txn.failure),
        });
        let changes = |ops: &[Op]| !ops.is_empty();
        let answer: Done = if changes(&txn.success) || changes(&txn.failure) {
            self.gateway.write("/v3/kv/txn", &body).await?
        } else {
            self.gateway.read("/v3/kv/txn", &body).await?
        };
        self.notice(&answer.header, before)?;
        let changed = changes(if answer.succeeded { &txn.success } else { &txn.failure });
        let revision = match &answer.responses[..] {
            _ if changed => answer.header.revision,
            [Response { range: Some(head) }] => head.kvs.first().map_or(Number(0), |kv| kv.modified),
            _ => return Err(StoreError::Refused("etcd answers less than was asked".into())),
        };
        Ok(Outcome { succeeded: answer.succeeded, revision: self.saw_head(revision) })
    }

    /// What changes something puts the head too; what changes nothing looks at it.
    fn ops(&self, ops: &[Op]) -> Vec<Value> {
        if ops.is_empty() {
            return vec![json!({ "request_range": { "key": self.key(HEAD) } })];
        }
        let ops = ops.iter().map(|op| match op {
            Op::Put(key, value) => json!({ "request_put": { "key": self.key(key), "value": encode(value) } }),
            Op::Delete(key) => json!({ "request_delete_range": { "key": self.key(key) } }),
            Op::DeletePrefix(prefix) => {
                json!({ "request_delete_range": { "key": self.key(prefix), "range_end": self.end(prefix) } })
            }
        });
        ops.chain([json!({ "request_put": { "key": self.key(HEAD) } })]).collect()
    }

    fn compare(&self, compare: &Compare) -> Vec<Value> {
        let own = |revision: &Revision| Number(revision.0.saturating_sub(self.life.offset));
        let is = |key: &str, target: &str, result: &str, field: &str, value: Value| json!({ "key": self.key(key), "target": target, "result": result, field: value });
        let present = |key: &str| is(key, "CREATE", "GREATER", "create_revision", json!("0"));
        match compare {
            Compare::Absent(key) => vec![is(key, "CREATE", "EQUAL", "create_revision", json!("0"))],
            Compare::Present(key) => vec![present(key)],
            Compare::Value(key, value) => {
                vec![present(key), is(key, "VALUE", "EQUAL", "value", json!(encode(value)))]
            }
            Compare::Created(key, at) => {
                vec![present(key), is(key, "CREATE", "EQUAL", "create_revision", json!(own(at)))]
            }
            Compare::Modified(key, at) => {
                vec![present(key), is(key, "MOD", "EQUAL", "mod_revision", json!(own(at)))]
            }
            Compare::NonePutSince(prefix, since) => {
                let mut compare = is(prefix, "MOD", "LESS", "mod_revision", json!(Number(own(since).0 + 1)));
                compare["range_end"] = json!(self.end(prefix));
                vec![compare]
            }
        }
    }

    async fn open_watch(&self, prefix: &str, from: u64) -> Result<Stream, StoreError> {
        self.goes_on()?;
        let before = self.seen();
        let body = json!({ "create_request": {
            "key": self.key(prefix), "range_end": self.end(prefix), "start_revision": Number(from), "fragment": true,
        } });
        let mut stream = self.gateway.stream("/v3/watch", &body).await?;
        let first = timeout(SILENT, stream.next::<Watched>()).await;
        let first = first.unwrap_or_else(|_| Err(StoreError::Unreachable("etcd opens no watch".into())))?;
        if first.canceled && first.compact_revision.0 == 0 {
            let why = format!("etcd opens no watch on {prefix}: {}", first.cancel_reason);
            return Err(self.gateway.refused(&why));
        }
        if !first.created {
            return Err(StoreError::Unreachable("etcd opens no watch".into()));
        }
        // For a revision that is yet to come it waits in silence, also where that was and is no more.
        self.head(before).await?;
        Ok(stream)
    }

    /// The store's revision, as all members agree on it; fails if this is not the life that it was, or was set back since
    /// `before`. Others' keys may have brought etcd's own revision on since then, and the store's not.
    async fn head(&self, before: u64) -> Result<Revision, StoreError> {
        let last = self.head.load(Ordering::Relaxed);
        let body = json!({ "key": self.key(OWN), "range_end": self.end(OWN) });
        let own: Range = self.gateway.read("/v3/kv/range", &body).await?;
        self.notice(&own.header, before)?;
        let find = |key: &str| own.kvs.iter().find(|kv| kv.key == self.key(key));
        let life = find(LIFE).map(|kv| decode(&kv.value)).transpose()?.unwrap_or_default();
        if serde_json::from_slice::<Life>(&life).ok().as_ref() != Some(&self.life) {
            return Err(self.end_for(Ended::Replaced));
        }
        let head = find(HEAD).map_or(Number(0), |kv| kv.modified);
        if head.0 < last {
            let before = self.revision(Number(last));
            return Err(self.end_for(Ended::SetBack { before, now: self.revision(head) }));
        }
        Ok(self.saw_head(head))
    }

    /// Notes where the head was.
    fn saw_head(&self, head: Number) -> Revision {
        self.head.fetch_max(head.0, Ordering::Relaxed);
        self.revision(head)
    }

    /// Passes changes on until there is an end to it.
    async fn follow(
        &self,
        mut stream: Stream,
        prefix: &str,
        after: Revision,
        batches: &mpsc::Sender<Result<Batch, StoreError>>,
    ) -> StoreError {
        // The events of one answer, which may come in pieces.
        let mut pending = Vec::new();
        // What was told, and what the store had come to when nothing had been told for a while.
        let (mut told, mut missed) = (after, None);
        loop {
            let answer = tokio::select! {
                answer = stream.next::<Watched>() => answer,
                head = self.head_after_silence(prefix) => {
                    if missed.is_some_and(|missed| missed > told) {
                        tracing::warn!(prefix, "a member of etcd says nothing of what changed; watching another");
                        self.gateway.leave(&stream);
                        return StoreError::Lagged;
                    }
                    missed = head;
                    continue;
                }
            };
            let mut answer = match answer {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::warn!(%error, prefix, "watching another member of etcd");
                    self.gateway.leave(&stream);
                    return StoreError::Lagged;
                }
            };
            if answer.compact_revision.0 > 0 {
                let oldest = self.revision(Number(answer.compact_revision.0.saturating_sub(1)));
                return StoreError::Compacted { asked: after, oldest };
            }
            if answer.canceled {
                tracing::warn!(why = answer.cancel_reason, prefix, "etcd ended a watch");
                self.gateway.leave(&stream);
                return StoreError::Lagged;
            }
            pending.append(&mut answer.events);
            if answer.fragment {
                continue;
            }
            self.seen.fetch_max(answer.header.revision.0, Ordering::Relaxed);
            for (revision, events) in by_revision(std::mem::take(&mut pending)) {
                let batch = match self.batch(revision, &events) {
                    Ok(batch) => batch,
                    Err(error) => return error,
                };
                told = batch.revision;
                if batches.send(Ok(batch)).await.is_err() {
                    return StoreError::Lagged;
                }
            }
        }
    }

    /// The store's revision, when a watch has been silent for a while; never for one that is not told of all changes.
    async fn head_after_silence(&self, prefix: &str) -> Option<Revision> {
        sleep(SILENT).await;
        if !HEAD.starts_with(prefix) {
            return std::future::pending().await;
        }
        self.head(self.seen()).await.ok()
    }

    fn batch(&self, revision: Number, events: &[EtcdEvent]) -> Result<Batch, StoreError> {
        let mut batch = Batch { revision: self.revision(revision), events: Vec::new() };
        let (life, head) = (self.key(LIFE), self.key(HEAD));
        for event in events {
            if event.kv.key == life {
                return Err(self.end_for(Ended::Replaced));
            }
            if event.kv.key == head {
                self.saw_head(revision);
            }
            if event.kind == "DELETE" {
                batch.events.extend(self.own_key(&event.kv)?.map(Event::Delete));
            } else {
                batch.events.extend(self.key_value(&event.kv)?.map(Event::Put));
            }
        }
        Ok(batch)
    }
}

#[cfg(test)]
#[path = "etcd_tests.rs"]
mod tests;
