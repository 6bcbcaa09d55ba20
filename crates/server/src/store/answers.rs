//! What etcd's gateway answers, as far as it is of use here. What is zero, false or empty it leaves out.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::gateway::Number;

#[derive(Default, Deserialize)]
pub(super) struct Header {
    /// That of the whole etcd; it begins at one.
    #[serde(default)]
    pub(super) revision: Number,
}

#[derive(Deserialize)]
pub(super) struct Done {
    pub(super) header: Header,
    #[serde(default)]
    pub(super) succeeded: bool,
    #[serde(default)]
    pub(super) responses: Vec<Response>,
}

#[derive(Deserialize)]
pub(super) struct Response {
    #[serde(rename = "response_range")]
    pub(super) range: Option<Range>,
}

#[derive(Deserialize)]
pub(super) struct Range {
    #[serde(default)]
    pub(super) header: Header,
    #[serde(default)]
    pub(super) kvs: Vec<Kv>,
    #[serde(default)]
    pub(super) more: bool,
}

#[derive(Deserialize)]
pub(super) struct Kv {
    pub(super) key: String,
    #[serde(default)]
    pub(super) value: String,
    #[serde(default, rename = "create_revision")]
    pub(super) created: Number,
    #[serde(default, rename = "mod_revision")]
    pub(super) modified: Number,
    #[serde(default)]
    pub(super) version: Number,
}

#[derive(Deserialize)]
pub(super) struct Watched {
    pub(super) header: Header,
    #[serde(default)]
    pub(super) created: bool,
    #[serde(default)]
    pub(super) canceled: bool,
    #[serde(default)]
    pub(super) cancel_reason: String,
    #[serde(default)]
    pub(super) compact_revision: Number,
    #[serde(default)]
    pub(super) fragment: bool,
    #[serde(default)]
    pub(super) events: Vec<EtcdEvent>,
}

#[derive(Deserialize)]
pub(super) struct EtcdEvent {
    /// Left out for a put.
    #[serde(default, rename = "type")]
    pub(super) kind: String,
    pub(super) kv: Kv,
}

/// Events by the revision that made them.
pub(super) fn by_revision(events: Vec<EtcdEvent>) -> BTreeMap<Number, Vec<EtcdEvent>> {
    let mut revisions: BTreeMap<Number, Vec<EtcdEvent>> = BTreeMap::new();
    for event in events {
        revisions.entry(event.kv.modified).or_default().push(event);
    }
    revisions
}
