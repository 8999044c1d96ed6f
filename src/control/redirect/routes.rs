//! Requests to move clients, and to take a server out of service.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `POST /v1/exports/NAME/redirect` | [`RedirectOrder`] | [`RedirectTaken`] |
//! | `GET /v1/redirects` | | [`RedirectList`] |
//! | `GET /v1/redirects/ID`, `DELETE /v1/redirects/ID` | | [`RedirectStatus`] |
//! | `POST /v1/drain`, `POST /v1/exports/NAME/drain` | [`DrainOrder`] | [`DrainStatus`] |
//! | `DELETE` of both | | the same |
//! | `GET /v1/drain` | | the same |

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::order::{DrainOrder, DrainStatus, RedirectList, RedirectOrder, RedirectStatus, RedirectTaken};
use crate::control::api::{Answered, Api, Name, Problem, Shared, image_name, read_order};

/// The routes.
pub(in crate::control) fn router() -> Router<Arc<Api>> {
    let drain_export = || post(drain_export).delete(undrain_export);
    Router::new()
        .route("/v1/exports/{name}/redirect", post(redirect))
        .route("/v1/exports//redirect", post(redirect))
        .route("/v1/redirects", get(list))
        .route("/v1/redirects/{id}", get(one).delete(cancel))
        .route("/v1/drain", get(drain_status).post(drain).delete(undrain))
        .route("/v1/exports/{name}/drain", drain_export())
        .route("/v1/exports//drain", drain_export())
}

type Id = Result<Path<u64>, PathRejection>;

async fn redirect(State(api): Shared, name: Name, body: Body) -> Answered<RedirectTaken> {
    let order: RedirectOrder = read_order(body).await?;
    Ok(Json(api.redirects().redirect(image_name(name)?, order).await?))
}

async fn list(State(api): Shared) -> Answered<RedirectList> {
    Ok(Json(RedirectList { redirects: api.redirects().list() }))
}

async fn one(State(api): Shared, id: Id) -> Answered<RedirectStatus> {
    api.redirects().get(id?.0).map(Json).ok_or_else(no_such_order)
}

async fn cancel(State(api): Shared, id: Id) -> Answered<RedirectStatus> {
    api.redirects().cancel(id?.0).await.map(Json).ok_or_else(no_such_order)
}

fn no_such_order() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such order to redirect, or it ended long ago")
}

async fn drain_status(State(api): Shared) -> Answered<DrainStatus> {
    Ok(Json(api.redirects().drain_status()))
}

async fn drain(State(api): Shared, body: Body) -> Answered<DrainStatus> {
    let order: DrainOrder = read_order(body).await?;
    Ok(Json(api.redirects().drain(None, order).await?))
}

async fn undrain(State(api): Shared) -> Answered<DrainStatus> {
    Ok(Json(api.redirects().undrain(None).await?))
}

async fn drain_export(State(api): Shared, name: Name, body: Body) -> Answered<DrainStatus> {
    let order: DrainOrder = read_order(body).await?;
    Ok(Json(api.redirects().drain(Some(image_name(name)?), order).await?))
}

async fn undrain_export(State(api): Shared, name: Name) -> Answered<DrainStatus> {
    Ok(Json(api.redirects().undrain(Some(&image_name(name)?)).await?))
}
