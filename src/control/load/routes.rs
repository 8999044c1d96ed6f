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

/// Rates are about so many seconds unless told.
const SECONDS: u32 = 5;
/// At most: as many samples are kept whole.
const LONGEST: u32 = 60;

/// `GET /v1/load` and `GET /v1/history`.
pub(in crate::control) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(load)).routes(routes!(history))
}

/// Over which time.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct Window {
    /// How many of the last seconds the rates are about.
    #[serde(default = "usual")]
    #[param(minimum = 1, maximum = 60, default = 5, required = false)]
    seconds: u32,
}

const fn usual() -> u32 {
    SECONDS
}

/// What the server does just now.
///
/// Rates and latencies of the last seconds: of the server, of each export, client and upstream. `headwater top`.
#[utoipa::path(get, path = "/v1/load", tag = "figures", params(Window), responses((status = 200, body = Load)))]
async fn load(State(api): Shared, asked: Result<Query<Window>, QueryRejection>) -> Answered<Load> {
    let Query(Window { seconds }) = asked?;
    if !(1..=LONGEST).contains(&seconds) {
        let why = format!("seconds is from 1 to {LONGEST}, not {seconds}");
        return Err(Problem::new(StatusCode::BAD_REQUEST, why));
    }
    Ok(Json(api.loads().load(seconds)))
}

/// The last five minutes.
///
/// A value each second, of each export.
#[utoipa::path(get, path = "/v1/history", tag = "figures", responses((status = 200, body = History)))]
async fn history(State(api): Shared) -> Answered<History> {
    Ok(Json(api.loads().history()))
}
