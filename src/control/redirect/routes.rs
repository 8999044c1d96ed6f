//! Requests to move clients, and to take a server out of service.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::order::{DrainOrder, DrainStatus, RedirectList, RedirectOrder, RedirectStatus, RedirectTaken};
use crate::control::api::{Answered, Api, Id, Name, OfId, OfName, Problem, Shared, image_name, named, read_order};
use crate::control::status::Complaint;

pub(in crate::control) fn routes() -> OpenApiRouter<Arc<Api>> {
    let router = OpenApiRouter::new()
        .routes(routes!(redirects))
        .routes(routes!(redirect_status, cancel_redirect))
        .routes(routes!(drain_status, drain, undrain));
    [routes!(redirect), routes!(drain_export, undrain_export)].into_iter().fold(router, named)
}

/// Move clients of an export to another server.
///
/// The other server is asked first whether it holds the same. The answer has the number of an order, which goes on by
/// itself. `headwater redirect`.
#[utoipa::path(post, path = "/v1/exports/{name}/redirect", tag = "redirects", params(OfName), request_body = RedirectOrder,
    responses((status = 200, body = RedirectTaken), (status = 409, description = "Not as things are", body = Complaint)))]
async fn redirect(State(api): Shared, name: Name, body: Body) -> Answered<RedirectTaken> {
    let order: RedirectOrder = read_order(body).await?;
    Ok(Json(api.redirects().redirect(image_name(name)?, order).await?))
}

/// The orders to move clients: the active ones and the last that ended, oldest first.
#[utoipa::path(get, path = "/v1/redirects", tag = "redirects", responses((status = 200, body = RedirectList)))]
async fn redirects(State(api): Shared) -> Json<RedirectList> {
    Json(RedirectList { redirects: api.redirects().list() })
}

/// How far an order to move clients has come.
#[utoipa::path(get, path = "/v1/redirects/{id}", tag = "redirects", params(OfId),
    responses((status = 200, body = RedirectStatus)))]
async fn redirect_status(State(api): Shared, id: Id) -> Answered<RedirectStatus> {
    api.redirects().get(id?.0).map(Json).ok_or_else(no_such_order)
}

/// Call an order to move clients off.
///
/// Clients that were moved stay where they are, the others are left alone.
#[utoipa::path(delete, path = "/v1/redirects/{id}", tag = "redirects", params(OfId),
    responses((status = 200, body = RedirectStatus)))]
async fn cancel_redirect(State(api): Shared, id: Id) -> Answered<RedirectStatus> {
    api.redirects().cancel(id?.0).await.map(Json).ok_or_else(no_such_order)
}

fn no_such_order() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such order to redirect, or it ended long ago")
}

/// What is out of service, and who is still there.
#[utoipa::path(get, path = "/v1/drain", tag = "redirects", responses((status = 200, body = DrainStatus)))]
async fn drain_status(State(api): Shared) -> Json<DrainStatus> {
    Json(api.redirects().drain_status())
}

/// Take the whole server out of service.
///
/// Newcomers are sent away, and whoever can be moved is. A server that is started again takes clients again.
/// `headwater drain`.
#[utoipa::path(post, path = "/v1/drain", tag = "redirects", request_body = DrainOrder,
    responses((status = 200, body = DrainStatus), (status = 409, description = "Not as things are", body = Complaint)))]
async fn drain(State(api): Shared, body: Body) -> Answered<DrainStatus> {
    let order: DrainOrder = read_order(body).await?;
    Ok(Json(api.redirects().drain(None, order).await?))
}

/// Let newcomers in again.
#[utoipa::path(delete, path = "/v1/drain", tag = "redirects",
    responses((status = 200, body = DrainStatus), (status = 409, description = "Not as things are", body = Complaint)))]
async fn undrain(State(api): Shared) -> Answered<DrainStatus> {
    Ok(Json(api.redirects().undrain(None).await?))
}

/// Take one export out of service.
#[utoipa::path(post, path = "/v1/exports/{name}/drain", tag = "redirects", params(OfName), request_body = DrainOrder,
    responses((status = 200, body = DrainStatus), (status = 409, description = "Not as things are", body = Complaint)))]
async fn drain_export(State(api): Shared, name: Name, body: Body) -> Answered<DrainStatus> {
    let order: DrainOrder = read_order(body).await?;
    Ok(Json(api.redirects().drain(Some(image_name(name)?), order).await?))
}

/// Let newcomers to one export in again.
#[utoipa::path(delete, path = "/v1/exports/{name}/drain", tag = "redirects", params(OfName),
    responses((status = 200, body = DrainStatus), (status = 409, description = "Not as things are", body = Complaint)))]
async fn undrain_export(State(api): Shared, name: Name) -> Answered<DrainStatus> {
    Ok(Json(api.redirects().undrain(Some(&image_name(name)?)).await?))
}
