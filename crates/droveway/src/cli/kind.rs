//! What verbs have in common that name things: look at some, do something to some, and say of one that is not there which
//! there are.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::exit::{Exit, Failure};
use super::output::{Output, warn};
use super::table::Details;
use super::text;
use crate::client::{Client, Error};

/// A kind of things that the server keeps, as its API shows one.
pub(super) trait Kind: Serialize + DeserializeOwned {
    /// What one is called, as in "there is no host".
    const WHAT: &'static str;
    /// Where the API has all of them.
    const PATH: &'static str;

    /// By what people know it.
    fn name(&self) -> &str;
}

/// Shows those of the server's that have these names, by what `details` makes once one is there.
pub(super) async fn inspect<K: Kind, D: Fn(&K) -> Details>(
    client: &Client,
    output: Output,
    names: &[String],
    details: impl AsyncFnOnce() -> Result<D, Failure>,
) -> Result<(), Failure> {
    let one = async |name: &str| explained::<K, K>(client, name, client.get(K::PATH, &[name]).await).await;
    show_each(output, names, one, details).await
}

/// Takes those of the server's away.
pub(super) async fn remove<K: Kind>(
    client: &Client,
    output: Output,
    names: &[String],
) -> Result<(), Failure> {
    let one = async |name: &str| explained::<K, _>(client, name, client.delete(K::PATH, name).await).await;
    do_each(output, names, one).await
}

/// What came of a request to the server about `name`: where it has none of that name, with those that it has.
pub(super) async fn explained<K: Kind, T>(
    client: &Client,
    name: &str,
    outcome: Result<T, Error>,
) -> Result<T, Failure> {
    or_meant(outcome, K::WHAT, name, async || {
        Ok(client.list::<K>(K::PATH).await?.iter().map(|one| one.name().to_owned()).collect())
    })
    .await
}

/// Looks each up by `one` and shows those found, by what `details` makes once one is there; then fails with the first that
/// is not.
pub(super) async fn show_each<T: Serialize, D: Fn(&T) -> Details>(
    output: Output,
    names: &[String],
    one: impl AsyncFnMut(&str) -> Result<T, Failure>,
    details: impl AsyncFnOnce() -> Result<D, Failure>,
) -> Result<(), Failure> {
    let (found, result) = each(names, one).await;
    if !found.is_empty() {
        output.inspect(&found, details().await?)?;
    }
    result
}

/// Does `one` to each, and tells which are done; then fails with the first that is not.
pub(super) async fn do_each(
    output: Output,
    names: &[String],
    mut one: impl AsyncFnMut(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let done = async |name: &str| {
        one(name).await?;
        output.done(name)
    };
    each(names, done).await.1
}

/// Does `act` for each name, goes on after a failure, and ends with the first one; the others are printed.
pub(super) async fn each<T>(
    names: &[String],
    mut act: impl AsyncFnMut(&str) -> Result<T, Failure>,
) -> (Vec<T>, Result<(), Failure>) {
    let mut done = Vec::new();
    let mut first: Option<Failure> = None;
    for name in names {
        match (act(name).await, &first) {
            (Ok(answer), _) => done.push(answer),
            (Err(failure), None) => first = Some(failure),
            (Err(failure), Some(_)) => warn(&failure.render()),
        }
    }
    (done, first.map_or(Ok(()), Err))
}

/// What came of a request about `wanted`. To a "not found" it adds what may have been meant: `known` is asked only then;
/// where it fails, the words of who was asked have to do.
pub(super) async fn or_meant<T>(
    outcome: Result<T, Error>,
    what: &str,
    wanted: &str,
    known: impl AsyncFnOnce() -> Result<Vec<String>, Error>,
) -> Result<T, Failure> {
    let failure = match outcome {
        Ok(value) => return Ok(value),
        Err(error) => Failure::from(error),
    };
    if failure.exit != Exit::NotFound {
        return Err(failure);
    }
    Err(known().await.map_or(failure, |names| unknown(what, wanted, names.iter().map(String::as_str))))
}

/// That there is no `what` called `wanted`, and which one may have been meant.
pub(super) fn unknown<'a>(what: &str, wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Failure {
    let remedy = match text::closest(wanted, known) {
        Some(meant) => format!("did you mean {meant:?}?"),
        None => format!("`droveway {what} ls` shows what is there"),
    };
    Failure::new(Exit::NotFound, format!("there is no {what} {wanted:?}")).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_gets_a_suggestion_or_the_way_to_look() {
        let failure = unknown("network", "mangaed", ["managed", "red"]);
        assert_eq!(failure.exit, Exit::NotFound);
        assert_eq!(
            failure.render(),
            "error: there is no network \"mangaed\"\n  try: did you mean \"managed\"?\n"
        );
        assert!(unknown("network", "blue", ["managed"]).render().contains("droveway network ls"));
    }

    #[tokio::test]
    async fn one_bad_name_does_not_stop_the_others() {
        let names = ["a", "bad", "c"].map(str::to_owned);
        let (done, result) =
            each(
                &names,
                async |name| {
                    if name == "bad" { Err(unknown("network", name, [])) } else { Ok(name.to_owned()) }
                },
            )
            .await;
        assert_eq!(done, ["a", "c"]);
        assert_eq!(result.unwrap_err().exit, Exit::NotFound);
    }
}
