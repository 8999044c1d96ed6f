//! Requests about casts.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `POST /v1/images/NAME/cast` | [`CastOrder`] | [`CastTaken`] |
//! | `GET /v1/casts` | | [`CastList`] |
//! | `GET /v1/casts/ID`, `DELETE /v1/casts/ID` | | [`CastStatus`] |

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::order::{CastList, CastOrder, CastStatus, CastTaken};
use crate::control::api::{Answered, Api, Name, Problem, Shared, image_name, read_order};

/// The routes.
pub(in crate::control) fn router() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/images/{name}/cast", post(cast))
        .route("/v1/images//cast", post(cast))
        .route("/v1/casts", get(list))
        .route("/v1/casts/{id}", get(one).delete(cancel))
}

type Id = Result<Path<u64>, PathRejection>;

async fn cast(State(api): Shared, name: Name, body: Body) -> Answered<CastTaken> {
    let order: CastOrder = read_order(body).await?;
    Ok(Json(api.casts().cast(image_name(name)?, order).await?))
}

async fn list(State(api): Shared) -> Answered<CastList> {
    Ok(Json(CastList { casts: api.casts().list() }))
}

async fn one(State(api): Shared, id: Id) -> Answered<CastStatus> {
    api.casts().get(id?.0).map(Json).ok_or_else(no_such_cast)
}

async fn cancel(State(api): Shared, id: Id) -> Answered<CastStatus> {
    api.casts().cancel(id?.0).await.map(Json).ok_or_else(no_such_cast)
}

fn no_such_cast() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such cast, or it ended long ago")
}
