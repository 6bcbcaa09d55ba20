//! What watches over the server asks: does it live, is it ready, what does it count.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use model::api::{ApiError, Readiness};
use model::exposition::CONTENT_TYPE;

use super::extract::AnyPerson;
use super::{Reply, Shared};
use crate::{metrics as counts, upkeep};

/// Answers while the process does.
#[utoipa::path(get, path = "/healthz", tag = "server", security(()), responses((status = 200, body = String)))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether the server can do its work: the store answers and can be written, the CA is good.
#[utoipa::path(get, path = "/readyz", tag = "server", security(()),
    responses((status = 200, body = Readiness), (status = 503, body = Readiness)))]
pub(super) async fn readyz(State(app): Shared) -> (StatusCode, Json<Readiness>) {
    let readiness = upkeep::readiness(&app).await;
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness))
}

/// Metrics in Prometheus' text format. A key of role `read` is enough.
#[utoipa::path(get, path = "/metrics", tag = "server",
    responses((status = 200, body = String), (status = "default", body = ApiError)))]
pub(super) async fn metrics(State(app): Shared, _: AnyPerson) -> Reply<Response> {
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], counts::text(&app)).into_response())
}
