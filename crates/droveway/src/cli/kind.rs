//! What verbs have in common that name things the server keeps: look at some, take some away, and say of one that is not
//! there which there are.

use serde::Serialize;

use super::connection::{each, suggest};
use super::exit::Failure;
use super::output::Output;
use super::table::Details;
use crate::client::{Client, Error};

/// A kind of things that the server keeps.
pub(super) trait Kind {
    /// What one is called, as in "there is no host".
    const WHAT: &'static str;
    /// One of them, as the API shows it.
    type View: Serialize;

    /// All of them.
    async fn all(client: &Client) -> Result<Vec<Self::View>, Error>;
    /// Takes one away.
    async fn remove(client: &Client, name: &str) -> Result<(), Error>;
    /// By what people know it.
    fn name(view: &Self::View) -> String;
}

/// A kind that can be looked at one by one.
pub(super) trait Inspect: Kind {
    /// One, by name or id.
    async fn one(client: &Client, name: &str) -> Result<Self::View, Error>;
}

/// Those of that name, shown by what `details` makes once one is there; then what there was to say of the others.
pub(super) async fn inspect<K: Inspect, D: Fn(&K::View) -> Details>(
    client: &Client,
    output: Output,
    names: &[String],
    details: impl AsyncFnOnce() -> Result<D, Failure>,
) -> Result<(), Failure> {
    let (found, result) = each(names, async |name| {
        let one = K::one(client, name).await;
        explained::<K, _>(client, name, one).await
    })
    .await;
    if !found.is_empty() {
        output.inspect(&found, details().await?)?;
    }
    result
}

/// Takes those away.
pub(super) async fn remove<K: Kind>(
    client: &Client,
    output: Output,
    names: &[String],
) -> Result<(), Failure> {
    let (_, result) = each(names, async |name| {
        let removed = K::remove(client, name).await;
        explained::<K, _>(client, name, removed).await?;
        output.done(name)
    })
    .await;
    result
}

/// What came of a request about `name`: where there is none of that name, with those there are.
pub(super) async fn explained<K: Kind, T>(
    client: &Client,
    name: &str,
    outcome: Result<T, Error>,
) -> Result<T, Failure> {
    match outcome {
        Ok(value) => Ok(value),
        Err(error) => Err(suggest(error, K::WHAT, name, async || {
            Ok(K::all(client).await?.iter().map(K::name).collect())
        })
        .await),
    }
}
