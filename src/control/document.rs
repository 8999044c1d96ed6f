//! The API described for programs: OpenAPI, made of what stands at the handlers and at the types.
//!
//! Owns: what all requests have in common, and the words around it. Does not own: what one request does.
//!
//! `docs/openapi.json` is this document; a test holds one against the other.

use std::sync::{Arc, LazyLock};

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Components, Content, InfoBuilder, License, OpenApi, Ref, RefOr, Required, ResponseBuilder, Tag};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{self, Api};
use super::status::Complaint;

const DESCRIPTION: &str = "\
Everything that the command line does with a running server, it does by this API.

Reach it by the server's unix socket (`--admin PATH`, else `PID.sock` in the runtime directory), whose permissions decide \
who may, or by TCP (`--admin ADDR:PORT --admin-token FILE`) with the token. Each request has a connection of its own. \
Pages of other sites are refused.

Names in paths are percent-encoded, their slashes too. An image may be called by the empty name: then there are two \
slashes, as in `/v1/images//pin`. Orders are JSON; an empty body stands for `{}`; a field that is unknown is an error. \
Answers may grow new fields: skip what you do not know. Sizes are in bytes, rates in bytes per second; a field says its \
unit where it is another one. Counts are since the server started.

What is not done is answered with a status code and a `Complaint`, whose text is for a human.";

const TAGS: [(&str, &str); 11] = [
    ("server", "The server as a whole."),
    ("exports", "What clients can connect to."),
    ("clients", "Who is connected."),
    ("images", "What is served: real images, mirrors and their cache."),
    ("orders", "What is fetched ahead of demand because somebody ordered it."),
    ("jobs", "Work that takes long and is done by the server itself."),
    ("casts", "Sending an image to many mirrors at once."),
    ("redirects", "Moving clients to other servers, and taking servers out of service."),
    ("settings", "What may be changed while a server runs."),
    ("figures", "What the server does just now, and what it has done."),
    ("page", "For browsers."),
];

/// Answers that all requests of a form have in common: code, name, why.
const NONSENSE: (&str, &str, &str) = ("400", "Nonsense", "The request makes no sense");
const NO_TOKEN: (&str, &str, &str) = ("401", "NoToken", "By TCP: the token is missing, or wrong");
const STRANGER: (&str, &str, &str) =
    ("403", "Stranger", "The page of another site sent it, or its Host is not this server");
const NOTHING: (&str, &str, &str) = ("404", "Nothing", "There is no such thing");
const SLOW: (&str, &str, &str) = ("408", "Slow", "The body took too long");
const LONG: (&str, &str, &str) = ("413", "Long", "The body is too long");
const FAILED: (&str, &str, &str) = ("500", "Failed", "It was tried, and failed");
const COMMON: [(&str, &str, &str); 7] = [NONSENSE, NO_TOKEN, STRANGER, NOTHING, SLOW, LONG, FAILED];

static TEXT: LazyLock<String> = LazyLock::new(|| {
    // It cannot fail: all of it is text, and all keys are.
    document().to_pretty_json().unwrap_or_default() + "\n"
});

/// `GET /openapi.json`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(openapi))
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "server",
    responses((status = 200, description = "OpenAPI", body = serde_json::Value)))]
async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str())
}

fn document() -> OpenApi {
    let (mut document, mut open) = (api::routes().into_openapi(), api::open_routes().into_openapi());
    for operation in document.paths.paths.values_mut().flat_map(operations) {
        say_what_is_common(operation);
    }
    for operation in open.paths.paths.values_mut().flat_map(operations) {
        operation.security = Some(Vec::new());
        add(operation, STRANGER);
    }
    document.merge(open);
    document.info = InfoBuilder::new()
        .title("Headwater")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(DESCRIPTION))
        .license(Some(License::builder().name("MIT OR Apache-2.0").identifier(Some("MIT OR Apache-2.0")).build()))
        .build();
    document.tags =
        Some(TAGS.iter().map(|(name, text)| Tag::builder().name(*name).description(Some(*text)).build()).collect());
    let components = document.components.get_or_insert_default();
    describe_common(components);
    document
}

fn describe_common(components: &mut Components) {
    components.schemas.insert(Complaint::name().into_owned(), Complaint::schema());
    let content = || Content::new(Some(Ref::from_schema_name(Complaint::name())));
    for (_, name, why) in COMMON {
        let response = ResponseBuilder::new().description(why).content("application/json", content()).build();
        components.responses.insert(name.to_owned(), response.into());
    }
    let token = Http::builder()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("The content of `--admin-token FILE`. A unix socket wants none."))
        .build();
    components.add_security_scheme("token", SecurityScheme::Http(token));
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, patch, .. } = item;
    [get, put, post, delete, patch].into_iter().flatten()
}

/// Adds what follows from the form of a request.
fn say_what_is_common(operation: &mut Operation) {
    operation.security = Some(vec![SecurityRequirement::new("token", [""; 0]), SecurityRequirement::default()]);
    [NO_TOKEN, STRANGER, FAILED].into_iter().for_each(|answer| add(operation, answer));
    let parameters = operation.parameters.as_deref().unwrap_or_default();
    let in_path = parameters.iter().any(|parameter| {
        matches!(parameter, RefOr::T(parameter) if parameter.parameter_in == utoipa::openapi::path::ParameterIn::Path)
    });
    if !parameters.is_empty() {
        add(operation, NONSENSE);
    }
    if in_path {
        add(operation, NOTHING);
    }
    if let Some(RefOr::T(body)) = &mut operation.request_body {
        if body.content.contains_key("application/json") {
            body.required = Some(Required::False);
        }
        [NONSENSE, SLOW, LONG].into_iter().for_each(|answer| add(operation, answer));
    }
}

/// Adds an answer, unless the handler says more of it.
fn add(operation: &mut Operation, (code, name, _): (&str, &str, &str)) {
    let answer = || Ref::from_response_name(name).into();
    operation.responses.responses.entry(code.to_owned()).or_insert_with(answer);
}
