//! What is known of the request that is being answered: its id, who asks, and what it came to.
//!
//! The layer [`around`] every handler gives each request an id, counts and times it, and has it written to the audit log
//! where it was refused or changed nothing. What it changes comes there by way of the store ([`crate::outbox`]), with the
//! [`entry`] of the request, also where it is refused in the end. Handlers and extractors tell what they find by [`about`], [`by`] and [`made`], without being
//! handed anything.
//!
//! Invariant: no answer leaves without an id, and none to a person before its line is on disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, HeaderValue, RETRY_AFTER};
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use model::Revision;
use model::api::{ApiError, ErrorCode, REQUEST_ID};
use tokio::time::Instant;
use tracing::Instrument;

use crate::app::{App, now};
use crate::audit::Line;
use crate::outbox::Entry;
use crate::secret;
use crate::serve::Peer;

/// The longest id that is taken over from who asks.
const ID_MAX: usize = 64;
/// What requests are counted under that no route takes.
const UNMATCHED: &str = "unmatched";

tokio::task_local! {
    static CALL: Arc<Call>;
}

/// One request.
#[derive(Debug)]
struct Call {
    id: String,
    /// The method and the path.
    what: String,
    from: String,
    who: OnceLock<Who>,
    about: Mutex<Option<String>>,
    /// The last revision that it made; 0 if none.
    revision: AtomicU64,
}

impl Call {
    /// What the audit log says of it; `None` while nobody is known to ask.
    fn entry(&self) -> Option<Entry> {
        let about = self.about.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (request, from, what) = (self.id.clone(), self.from.clone(), self.what.clone());
        Some(Entry { at: now(), request, who: self.who.get()?.to_string(), from, what, about })
    }
}

/// Who asks, once it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Who {
    /// A person, by the name of the key.
    Key(String),
    /// An agent, by its host's name and id.
    Host(String, String),
    /// Whoever has the secret of that token.
    Token(String),
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Key(name) => write!(f, "key {name}"),
            Self::Host(name, id) => write!(f, "host {name} ({id})"),
            Self::Token(id) => write!(f, "token {id}"),
        }
    }
}

/// Tells who asks: credentials were checked.
pub(crate) fn by(who: Who) {
    // A request outside the layer has nobody to tell; the first to say is right.
    let _ = CALL.try_with(|call| call.who.set(who));
}

/// Tells what a change is about, where the path does not say it, before it is made. Never a secret.
pub(crate) fn about(what: impl FnOnce() -> String) {
    let _ = CALL.try_with(|call| *call.about.lock().unwrap_or_else(PoisonError::into_inner) = Some(what()));
}

/// Tells that the request made a revision.
pub(crate) fn made(revision: Revision) {
    let _ = CALL.try_with(|call| call.revision.store(revision.0, Ordering::Relaxed));
}

/// What the audit log is to say of the request that is being answered; `None` where nobody who is known asks.
pub(crate) fn entry() -> Option<Entry> {
    CALL.try_with(|call| call.entry()).ok().flatten()
}

/// The id of the request that is being answered.
pub(crate) fn id() -> Option<String> {
    CALL.try_with(|call| call.id.clone()).ok()
}

/// Why a request was refused, for the layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Refused(pub(crate) ErrorCode);

/// The layer.
pub(crate) async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = given(request.headers()).unwrap_or_else(fresh);
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().map_or(UNMATCHED, MatchedPath::as_str).to_owned();
    let peer = request.extensions().get::<Peer>().cloned();
    let call = Arc::new(Call {
        id,
        what: format!("{method} {path}"),
        from: peer.as_ref().map(|peer| peer.address.to_string()).unwrap_or_default(),
        who: OnceLock::new(),
        about: Mutex::default(),
        revision: AtomicU64::new(0),
    });
    // People and hosts are counted when it is known who they are, all others by where they come from.
    let stranger =
        peer.as_ref().filter(|peer| !peer.is_known() && !request.headers().contains_key(AUTHORIZATION));
    let refused = stranger.and_then(|peer| app.upkeep.rates.stranger(peer.address.ip()).err());
    let span = tracing::info_span!("request", id = call.id);
    let answer = CALL.scope(call.clone(), async {
        match refused {
            Some(error) => response(error),
            None => next.run(request).await,
        }
    });
    let mut answer = answer.instrument(span.clone()).await;
    if let Ok(id) = HeaderValue::from_str(&call.id) {
        answer.headers_mut().insert(REQUEST_ID, id);
    }
    let status = answer.status();
    app.upkeep.metrics.answered(&method, &route, status, begun.elapsed());
    let who = call.who.get();
    let refusal = answer.extensions().get::<Refused>().map(|refused| refused.0);
    span.in_scope(|| {
        tracing::debug!(%method, path, status = status.as_u16(), who = who.map(tracing::field::display),
            took_ms = begun.elapsed().as_secs_f64() * 1e3, "answered");
    });
    let made = Revision(call.revision.load(Ordering::Relaxed));
    // What agents tell is what containers do: it is written in order, and nobody waits for the disk.
    let waits = who.is_some_and(|who| !matches!(who, Who::Host(..)));
    let changed = made > Revision::default();
    // What the server has not heard of, since it does not follow its store, it cannot write yet.
    if changed && waits && app.shared.read().revision >= made {
        app.outbox.has(made).await;
    }
    let tells_more = refusal.is_some() || !changed;
    if tells_more
        && who.is_some_and(|who| is_kept(&method, who, refusal))
        && let Some(entry) = call.entry()
    {
        let line = app.upkeep.audit.write(Line::without_change(entry, refusal)).await;
        if waits {
            line.written().await;
        }
    }
    answer
}

/// Whether a request that changed nothing belongs into the audit log: each that asks for a change. What an agent tells again
/// and again is left out.
fn is_kept(method: &Method, who: &Who, refusal: Option<ErrorCode>) -> bool {
    let asks = !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    let idle = matches!(who, Who::Host(..)) && refusal.is_none();
    // Who asks too often would fill the log with it.
    asks && !idle && refusal != Some(ErrorCode::TooMany)
}

/// The id that who asks gave the request.
fn given(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    ((1..=ID_MAX).contains(&id.len()) && id.bytes().all(plain)).then(|| id.to_owned())
}

fn fresh() -> String {
    let random = secret::random::<8>().unwrap_or_default();
    format!("{:016x}", u64::from_be_bytes(random))
}

/// An error as a response.
pub(crate) fn response(mut error: ApiError) -> Response {
    tracing::debug!(code = ?error.code, message = error.message, "refused");
    error.request = id();
    let status = axum::http::StatusCode::from_u16(error.code.status())
        .unwrap_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR);
    let (code, retry_after) = (error.code, error.retry_after);
    let mut response = (status, axum::Json(error)).into_response();
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(RETRY_AFTER, seconds.into());
    }
    response.extensions_mut().insert(Refused(code));
    response
}

/// Does it as if a person had asked for it.
#[cfg(test)]
pub(crate) fn asked_in_a_test<T>(act: impl FnOnce() -> T) -> T {
    let who = OnceLock::from(Who::Key("tester".into()));
    let (id, what, from) = ("test".to_owned(), "PUT /test".to_owned(), "here".to_owned());
    let call = Call { id, what, from, who, about: Mutex::default(), revision: AtomicU64::new(0) };
    CALL.sync_scope(Arc::new(call), act)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::Router;
    use axum::body::Body;
    use axum::routing::post;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use model::EnvironmentId;
    use model::api::{AuditEntry, Outcome};
    use tokio::sync::oneshot;

    use super::*;
    use crate::api::nat_tests::Api;
    use crate::app::Plan;
    use crate::keys::Keys;
    use crate::store::{Op, Txn};

    /// Changes something, and then finds that it cannot do what it was asked.
    async fn half(State(app): State<Arc<App>>) -> Response {
        by(Who::Key("alice".into()));
        let environment = EnvironmentId::default();
        let change =
            Txn::new(vec![], vec![Op::Put(Keys(&environment).server("x"), b"{\"urls\":[]}".to_vec())]);
        app.change(&environment, |_, _| Ok(Plan::Commit(change.clone(), ()))).await.unwrap();
        response(ApiError::new(ErrorCode::Conflict, "not all of it"))
    }

    #[tokio::test]
    async fn a_refused_request_that_changed_something_is_answered_when_the_log_has_that_too() {
        let api = Api::open().await;
        let app = api.app.clone();
        let layer = axum::middleware::from_fn_with_state(app.clone(), around);
        let router = Router::new().route("/half", post(half)).with_state(app.clone()).layer(layer);
        let request = Request::post("/half").body(Body::empty()).unwrap();
        let mut answer = std::pin::pin!(TowerToHyperService::new(router).call(request));
        let early = tokio::time::timeout(Duration::from_millis(500), answer.as_mut()).await;
        assert!(early.is_err(), "it is answered, and its change is not in the log");
        let (ended, end) = oneshot::channel::<()>();
        let write = app.outbox.run(&app.shared, &app.upkeep.audit, end);
        let (status, ()) = tokio::join!(
            async {
                let status = answer.await.unwrap().status();
                drop(ended);
                status
            },
            write
        );
        assert_eq!(status.as_u16(), ErrorCode::Conflict.status());
        let lines = app.upkeep.audit.reader(0).read().unwrap();
        let lines: Vec<AuditEntry> =
            lines.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let told: Vec<_> = lines.iter().map(|line| (line.outcome, line.revision.is_some())).collect();
        assert_eq!(told, [(Outcome::Done, true), (Outcome::Refused, false)]);
    }

    #[test]
    fn an_id_is_taken_over_if_it_is_plain_and_short() {
        let of = |text: &'static str| {
            given(&HeaderMap::from_iter([(
                axum::http::HeaderName::from_static(REQUEST_ID),
                HeaderValue::from_static(text),
            )]))
        };
        assert_eq!(of("deploy-7.a_B"), Some("deploy-7.a_B".to_owned()));
        for bad in ["", "a b", "a\"b", "x{}"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(given(&HeaderMap::new()), None);
        assert!(fresh().len() == 16 && fresh() != fresh());
    }

    #[test]
    fn changes_are_kept_and_looks_and_idle_reports_are_not() {
        let (person, host) = (Who::Key("admin".into()), Who::Host("h1".into(), "h-1".into()));
        assert!(is_kept(&Method::DELETE, &person, Some(ErrorCode::NotFound)));
        assert!(is_kept(&Method::PATCH, &person, None));
        assert!(is_kept(&Method::PUT, &host, Some(ErrorCode::Conflict)));
        assert!(!is_kept(&Method::PUT, &host, None));
        assert!(!is_kept(&Method::GET, &person, None));
        assert!(!is_kept(&Method::POST, &person, Some(ErrorCode::TooMany)));
    }
}
