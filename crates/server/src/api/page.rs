//! Lists, whole or page by page.
//!
//! `?limit=N` asks for a page; where there is more, the answer has a `Link` header with `rel="next"` (RFC 8288), a URL that
//! continues. It names the revision of the first page and the last key that was told. Every object that is there all the
//! while is told exactly once; one that is made or removed meanwhile may be told or not. Without `limit` the list is whole,
//! and of one revision.

use axum::Json;
use axum::http::header::{HeaderValue, LINK};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use model::api::{ApiError, ErrorCode, path};
use model::{EnvironmentId, Epoch, Revision};
use serde::{Deserialize, Serialize};

use super::refuse;
use crate::app::App;

/// The most on one page.
const MOST: usize = 1000;

/// Which page.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
pub(super) struct Page {
    /// How many at most, 1 to 1000; all if left out.
    limit: Option<usize>,
    /// Where to go on: as the `Link` header of the page before has it.
    #[serde(rename = "continue")]
    #[param(rename = "continue")]
    next: Option<String>,
}

/// Where a list goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    /// The life of the store.
    epoch: Epoch,
    /// That of the first page.
    revision: Revision,
    /// The last key told.
    after: String,
}

impl Place {
    fn text(&self) -> Option<String> {
        Some(BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).ok()?))
    }

    fn parse(text: &str) -> Option<Self> {
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(text).ok()?).ok()
    }
}

/// A list that is being cut to a page.
pub(super) struct Cut<'a> {
    page: &'a Page,
    /// The state's revision when the list began.
    place: Place,
    begun: bool,
}

/// What is on a page, and the last key on it if there is more.
pub(super) type Chosen<T> = (Vec<T>, Option<String>);

impl<'a> Cut<'a> {
    /// Checks what was asked for.
    pub(super) fn new(app: &App, page: &'a Page) -> Result<Self, ApiError> {
        if let Some(limit) = page.limit.filter(|limit| !(1..=MOST).contains(limit)) {
            return Err(refuse(
                ErrorCode::Invalid,
                format!("limit is {limit}; use 1 to {MOST}, or leave it out"),
            ));
        }
        let (epoch, revision) = (app.store.epoch(), app.shared.read().revision);
        let Some(text) = &page.next else {
            return Ok(Self { page, place: Place { epoch, revision, after: String::new() }, begun: false });
        };
        let bad =
            |code, what: &str| refuse(code, format!("continue {what}; begin the list again without it"));
        let place = Place::parse(text)
            .ok_or_else(|| bad(ErrorCode::Invalid, "is not what a page's Link header had"))?;
        if place.epoch != epoch {
            return Err(bad(
                ErrorCode::Compacted,
                "is of an older life of the store, which was restored since",
            ));
        }
        if place.revision > revision {
            let what = format!("is of revision {}, the state is at {revision}", place.revision);
            return Err(bad(ErrorCode::Invalid, &what));
        }
        Ok(Self { page, place, begun: true })
    }

    /// What of all is on the page, in the order of the keys, which are unique.
    pub(super) fn choose<T>(&self, all: impl Iterator<Item = (String, T)>) -> Chosen<T> {
        let mut rest: Vec<(String, T)> =
            all.filter(|(key, _)| !self.begun || *key > self.place.after).collect();
        rest.sort_by(|a, b| a.0.cmp(&b.0));
        let limit = self.page.limit.unwrap_or(if self.begun { MOST } else { usize::MAX });
        let more = rest.len() > limit;
        rest.truncate(limit);
        let last = rest.last().filter(|_| more).map(|(key, _)| key.clone());
        (rest.into_iter().map(|(_, item)| item).collect(), last)
    }

    /// The page as an answer.
    pub(super) fn answer<T: Serialize>(
        self,
        environment: &EnvironmentId,
        collection: &str,
        (items, last): Chosen<T>,
    ) -> Response {
        let mut response = Json(items).into_response();
        let limit = self.page.limit.unwrap_or(MOST);
        let place = last.and_then(|after| Place { after, ..self.place }.text());
        let link = place.map(|next| {
            format!(
                "<{}/{environment}{collection}?limit={limit}&continue={next}>; rel=\"next\"",
                path::PREFIX
            )
        });
        if let Some(link) = link.and_then(|link| HeaderValue::try_from(link).ok()) {
            response.headers_mut().insert(LINK, link);
        }
        response
    }
}
