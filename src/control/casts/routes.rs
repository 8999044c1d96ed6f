//! Requests about casts.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::order::{CastList, CastOrder, CastStatus, CastTaken};
use crate::control::api::{Answered, Api, Id, Name, OfId, OfName, Problem, Shared, image_name, named, read_order};
use crate::control::status::Complaint;

pub(in crate::control) fn routes() -> OpenApiRouter<Arc<Api>> {
    named(OpenApiRouter::new().routes(routes!(casts)).routes(routes!(cast_status, cancel_cast)), routes!(cast))
}

/// Send an image, or parts of it, to a group.
///
/// Mirrors that the server knows are told to hear it. `headwater cast`.
#[utoipa::path(post, path = "/v1/images/{name}/cast", tag = "casts", params(OfName), request_body = CastOrder,
    responses((status = 200, body = CastTaken), (status = 409, description = "Not as things are", body = Complaint)))]
async fn cast(State(api): Shared, name: Name, body: Body) -> Answered<CastTaken> {
    let order: CastOrder = read_order(body).await?;
    Ok(Json(api.casts().cast(image_name(name)?, order).await?))
}

/// The casts at work and the last that ended, oldest first.
#[utoipa::path(get, path = "/v1/casts", tag = "casts", responses((status = 200, body = CastList)))]
async fn casts(State(api): Shared) -> Json<CastList> {
    Json(CastList { casts: api.casts().list() })
}

/// How far a cast is.
#[utoipa::path(get, path = "/v1/casts/{id}", tag = "casts", params(OfId), responses((status = 200, body = CastStatus)))]
async fn cast_status(State(api): Shared, id: Id) -> Answered<CastStatus> {
    api.casts().get(id?.0).map(Json).ok_or_else(no_such_cast)
}

/// Call a cast off.
#[utoipa::path(delete, path = "/v1/casts/{id}", tag = "casts", params(OfId), responses((status = 200, body = CastStatus)))]
async fn cancel_cast(State(api): Shared, id: Id) -> Answered<CastStatus> {
    api.casts().cancel(id?.0).await.map(Json).ok_or_else(no_such_cast)
}

fn no_such_cast() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such cast, or it ended long ago")
}
