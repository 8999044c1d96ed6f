//! The status page: one document with its script and style, from the binary. It holds no data: its script asks the
//! API, with the token that the operator gives it.
//!
//! Owns: the files, and what a browser is told about them: nothing but them and the API is ever loaded, no page frames
//! them. Does not own: who may ask the API.

use std::sync::Arc;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Api, Problem};
use super::status::Complaint;

/// A file of the page: its name, its type, what is in it.
type File = (&'static str, &'static str, &'static str);

const SCRIPT: &str = "text/javascript; charset=utf-8";
const FRAME: File = ("index.html", "text/html; charset=utf-8", include_str!("index.html"));
const FILES: [File; 9] = [
    ("page.css", "text/css; charset=utf-8", include_str!("page.css")),
    ("icon.svg", "image/svg+xml", include_str!("icon.svg")),
    ("page.js", SCRIPT, include_str!("page.js")),
    ("chart.js", SCRIPT, include_str!("chart.js")),
    ("dom.js", SCRIPT, include_str!("dom.js")),
    ("format.js", SCRIPT, include_str!("format.js")),
    ("picture.js", SCRIPT, include_str!("picture.js")),
    ("tables.js", SCRIPT, include_str!("tables.js")),
    ("tiers.js", SCRIPT, include_str!("tiers.js")),
];

/// Nothing from elsewhere, no script and no style within a document, nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// `GET /`, and what the page needs beside it. Served without a token.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(frame)).routes(routes!(file))
}

fn find(name: &str) -> Option<&'static File> {
    FILES.iter().find(|(known, ..)| *known == name)
}

/// The status page.
#[utoipa::path(get, path = "/", tag = "page", responses((status = 200, body = String, content_type = "text/html")))]
async fn frame() -> Response {
    answer(&FRAME)
}

/// A file of the status page: its script, its style.
#[utoipa::path(
    get,
    path = "/page/{file}",
    tag = "page",
    params(("file" = String, Path, description = "Its name")),
    responses(
        (status = 200, content((String = "text/javascript"), (String = "text/css"), (String = "image/svg+xml"))),
        (status = 404, description = "The page has no such file.", body = Complaint),
    )
)]
async fn file(name: Result<Path<String>, PathRejection>) -> Result<Response, Problem> {
    let Path(name) = name?;
    let nowhere = || Problem::new(StatusCode::NOT_FOUND, "the page has no such file");
    find(&name).map(answer).ok_or_else(nowhere)
}

fn answer((_, kind, content): &File) -> Response {
    let headers = [
        (header::CONTENT_TYPE, *kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        // Another version of the program has another page.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, *content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_for_files_that_there_are_and_for_no_others() {
        let mut used = 0;
        for (name, _, content) in FILES.iter().chain([&FRAME]) {
            for (before, after) in [("\"/page/", "\""), ("from \"./", "\"")] {
                for rest in content.split(before).skip(1) {
                    let file = rest.split(after).next().unwrap();
                    assert!(find(file).is_some(), "{name} asks for {file}");
                    used += 1;
                }
            }
            let outside = content.replace("http://www.w3.org/2000/svg", "");
            assert!(!outside.contains("http://") && !outside.contains("https://"), "{name} names another server");
            for word in [
                "innerHTML",
                "outerHTML",
                "insertAdjacent",
                "document.write",
                "eval(",
                "style=\"",
                "onclick",
                "localStorage",
            ] {
                assert!(!content.contains(word), "{name} has {word}");
            }
        }
        assert!(used >= FILES.len());
    }
}
