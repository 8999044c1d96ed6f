//! Requests for what a server does just now.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/load?seconds=N` | [`Load`] |
//! | `GET /v1/history` | [`History`] |

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{History, Load};
use crate::control::api::{Answered, Api, Problem, Shared};
use crate::control::status::Complaint;

/// Rates are about so many seconds unless told.
const SECONDS: u32 = 5;
/// At most: as many samples are kept whole.
const LONGEST: u32 = 60;

/// `GET /v1/load` and `GET /v1/history`.
pub(in crate::control) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(load)).routes(routes!(history))
}

/// Over which time.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Span {
    #[serde(default = "usual")]
    seconds: u32,
}

const fn usual() -> u32 {
    SECONDS
}

/// What the server did in the last seconds: rates and latencies of exports, clients and upstreams.
#[utoipa::path(
    get,
    path = "/v1/load",
    params(("seconds" = Option<u32>, Query, minimum = 1, maximum = 60, description = "How many of the last seconds; 5 unless told")),
    responses((status = 200, body = Load), (status = 400, body = Complaint, description = "no such number of seconds"))
)]
async fn load(State(api): Shared, asked: Result<Query<Span>, QueryRejection>) -> Answered<Load> {
    let Query(Span { seconds }) = asked?;
    if !(1..=LONGEST).contains(&seconds) {
        let why = format!("seconds is from 1 to {LONGEST}, not {seconds}");
        return Err(Problem::new(StatusCode::BAD_REQUEST, why));
    }
    Ok(Json(api.loads().load(seconds)))
}

/// The last five minutes of each export, a value each second.
#[utoipa::path(get, path = "/v1/history", responses((status = 200, body = History)))]
async fn history(State(api): Shared) -> Answered<History> {
    Ok(Json(api.loads().history()))
}
