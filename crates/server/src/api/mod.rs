//! The API: what each path does, who may, and its description in OpenAPI.
//!
//! Invariant: every answer that is not a success is an [`ApiError`] in JSON, from the first byte that is HTTP.

mod adopt;
mod audit;
mod endpoints;
mod extract;
mod health;
mod hosts;
mod incarnation;
mod join;
mod keys;
mod leases;
mod networks;
mod page;
mod peers;
mod tokens;
mod watch;

#[cfg(test)]
pub(crate) mod nat_tests;

use std::any::Any;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use model::api::{ApiError, ErrorCode, ServerInfo};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::OpenApi as Description;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::request;

/// What handlers share.
type Shared = State<Arc<App>>;
/// What handlers answer.
type Reply<T> = Result<T, Refusal>;

/// A refusal as an HTTP response.
#[derive(Debug)]
struct Refusal(ApiError);

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        request::response(self.0)
    }
}

/// A refusal of that kind, for handlers.
fn refuse(code: ErrorCode, message: impl Into<String>) -> ApiError {
    ApiError::new(code, message)
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Droveway", description = "One private network for containers on many hosts."),
    components(schemas(ApiError, model::Watch)),
    modifiers(&Credentials)
)]
struct Document;

struct Credentials;

impl Modify for Credentials {
    fn modify(&self, document: &mut Description) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        components.add_security_scheme(
            "certificate",
            SecurityScheme::MutualTls {
                description: Some("The certificate a host got when it joined.".into()),
                extensions: None,
                deprecated: None,
            },
        );
        document.security = Some(vec![
            SecurityRequirement::new("key", Vec::<String>::new()),
            SecurityRequirement::new("certificate", Vec::<String>::new()),
        ]);
    }
}

fn documented() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(info))
        .routes(routes!(description))
        .routes(routes!(join::join))
        .routes(routes!(watch::watch))
        .routes(routes!(networks::list, networks::create))
        .routes(routes!(networks::get, networks::remove))
        .routes(routes!(hosts::list))
        .routes(routes!(hosts::report))
        .routes(routes!(incarnation::step))
        .routes(routes!(hosts::renew))
        .routes(routes!(adopt::held))
        .routes(routes!(adopt::list))
        .routes(routes!(adopt::remove))
        .routes(routes!(hosts::get, hosts::patch, hosts::remove))
        .routes(routes!(endpoints::list))
        .routes(routes!(endpoints::get, endpoints::put, endpoints::remove))
        .routes(routes!(leases::list, leases::lease, leases::give_back))
        .routes(routes!(leases::claim, leases::consent, leases::release))
        .routes(routes!(leases::retain_no_more))
        .routes(routes!(leases::heard))
        .routes(routes!(leases::show))
        .routes(routes!(peers::list, peers::create))
        .routes(routes!(peers::get, peers::remove))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::remove))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::remove))
        .routes(routes!(audit::list))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(health::metrics))
}

/// All paths, ready to serve.
pub(crate) fn router(app: Arc<App>) -> Router {
    documented()
        .split_for_parts()
        .0
        .fallback(unknown)
        .method_not_allowed_fallback(not_here)
        .with_state(app.clone())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(app, request::around))
}

/// What anyone may know.
#[utoipa::path(get, path = "/v1/info", tag = "server", security(()), responses((status = 200, body = ServerInfo)))]
async fn info(State(app): Shared) -> Json<ServerInfo> {
    let revision = app.shared.read().revision;
    Json(ServerInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ca: app.ca.fingerprint(),
        epoch: app.store.epoch(),
        revision,
        ca_expires: app.ca.expires(),
        certificate_expires: app.upkeep.certificate.expires(),
    })
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "server", security(()), responses((status = 200, body = serde_json::Value)))]
async fn description(State(app): Shared) -> Reply<Response> {
    let text = if let Some(text) = app.description.get() {
        text
    } else {
        let text = documented().into_openapi().to_json();
        let text = text.map_err(|error| refuse(ErrorCode::Internal, error.to_string()))?;
        app.description.get_or_init(|| text)
    };
    Ok(([(header::CONTENT_TYPE, "application/json")], text.clone()).into_response())
}

async fn unknown(uri: Uri) -> Refusal {
    let path: String = uri.path().chars().take(200).collect();
    Refusal(refuse(
        ErrorCode::NotFound,
        format!("there is nothing at {path:?}; see /openapi.json for what there is"),
    ))
}

async fn not_here(method: Method, uri: Uri) -> Response {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("{method} is not what {path:?} takes; see /openapi.json");
    // HTTP wants its own status for this (RFC 9110 §15.5.6).
    let mut response = Refusal(refuse(ErrorCode::Invalid, message)).into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!("a request made the server panic");
    let error = refuse(ErrorCode::Internal, "a fault of the server; look at its log");
    let mut response = Refusal(error).into_response();
    response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_described_with_its_methods_and_every_schema_it_names_is_there() {
        let document = serde_json::to_value(documented().into_openapi()).unwrap();
        let base = "/v1/environments/{environment}";
        for (path, methods) in [
            ("/v1/info", &["get"][..]),
            ("/openapi.json", &["get"]),
            (&format!("{base}/join"), &["post"]),
            (&format!("{base}/watch"), &["get"]),
            (&format!("{base}/networks"), &["get", "post"]),
            (&format!("{base}/networks/{{id}}"), &["get", "delete"]),
            (&format!("{base}/hosts"), &["get"]),
            (&format!("{base}/hosts/self"), &["put"]),
            (&format!("{base}/hosts/self/held"), &["put"]),
            (&format!("{base}/hosts/self/incarnation"), &["put"]),
            (&format!("{base}/unreported"), &["get"]),
            (&format!("{base}/unreported/{{id}}"), &["delete"]),
            (&format!("{base}/hosts/{{id}}"), &["get", "patch", "delete"]),
            (&format!("{base}/endpoints"), &["get"]),
            (&format!("{base}/endpoints/{{id}}"), &["get", "put", "delete"]),
            (&format!("{base}/blocks"), &["get", "post", "delete"]),
            (&format!("{base}/claims"), &["post", "delete"]),
            (&format!("{base}/retained"), &["delete"]),
            (&format!("{base}/peers"), &["get", "post"]),
            (&format!("{base}/peers/{{id}}"), &["get", "delete"]),
            (&format!("{base}/tokens"), &["get", "post"]),
            (&format!("{base}/tokens/{{id}}"), &["delete"]),
            (&format!("{base}/keys"), &["get", "post"]),
            (&format!("{base}/keys/{{id}}"), &["delete"]),
            (&format!("{base}/audit"), &["get"]),
            (&format!("{base}/hosts/self/certificate"), &["post"]),
            ("/healthz", &["get"]),
            ("/readyz", &["get"]),
            ("/metrics", &["get"]),
        ] {
            for method in methods {
                let operation = &document["paths"][path][method];
                assert!(operation["summary"].is_string(), "{method} {path} is not described");
                assert!(operation["responses"].is_object(), "{method} {path}");
            }
        }
        let mut names = Vec::new();
        references(&document, &mut names);
        assert!(names.len() > 20);
        for name in names {
            assert!(document["components"]["schemas"][&name].is_object(), "schema {name} is missing");
        }
        for schema in
            ["Network", "NetworkSpec", "HostView", "Endpoint", "Block", "Claim", "ApiError", "Watch"]
        {
            assert!(document["components"]["schemas"][schema].is_object(), "schema {schema} is missing");
        }
    }

    fn references(value: &serde_json::Value, names: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                for (key, value) in map {
                    if let (true, Some(name)) =
                        (key == "$ref", value.as_str().and_then(|r| r.strip_prefix("#/components/schemas/")))
                    {
                        names.push(name.to_owned());
                    }
                    references(value, names);
                }
            }
            serde_json::Value::Array(values) => values.iter().for_each(|value| references(value, names)),
            _ => {}
        }
    }
}
