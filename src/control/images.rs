//! Orders for images, and those that take long.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Answered, Api, Id, Name, OfId, OfName, Problem, Shared, gather, image_name, named, read_order};
use super::prefetch::{OrderList, OrderStatus, PrefetchOrder, PrefetchReport};
use super::status::{Complaint, JobList, JobStarted, JobStatus, PinOrder, PinReport, VerifyOrder};
use crate::ranges::ByteRange;

pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    let router = OpenApiRouter::new()
        .routes(routes!(jobs))
        .routes(routes!(job, cancel_job))
        .routes(routes!(orders))
        .routes(routes!(order, cancel_order));
    [routes!(pin), routes!(unpin), routes!(verify), routes!(prefetch)].into_iter().fold(router, named)
}

/// Keep an image, or parts of it, in the cache.
///
/// What is here of it stays, and so does the rest once it was read. Durable once answered. `headwater pin`.
#[utoipa::path(post, path = "/v1/images/{name}/pin", tag = "images", params(OfName), request_body = PinOrder,
    responses((status = 200, body = PinReport), (status = 409, description = "It does not fit", body = Complaint)))]
async fn pin(State(api): Shared, name: Name, body: Body) -> Answered<PinReport> {
    let (name, ranges) = pin_order(name, body).await?;
    let report = api.operated().pin(name.clone(), ranges).await?;
    tracing::info!(name, pinned_bytes = report.pinned_bytes, "pinned");
    Ok(Json(report))
}

/// Let an image, or parts of it, leave the cache again.
///
/// `headwater unpin`.
#[utoipa::path(post, path = "/v1/images/{name}/unpin", tag = "images", params(OfName), request_body = PinOrder,
    responses((status = 200, body = PinReport), (status = 409, description = "Not as things are", body = Complaint)))]
async fn unpin(State(api): Shared, name: Name, body: Body) -> Answered<PinReport> {
    let (name, ranges) = pin_order(name, body).await?;
    let report = api.operated().unpin(name.clone(), ranges).await?;
    tracing::info!(name, pinned_bytes = report.pinned_bytes, "unpinned");
    Ok(Json(report))
}

/// Begin to check what is here of an image.
///
/// The answer has the number of a job, which goes on by itself. `headwater verify`.
#[utoipa::path(post, path = "/v1/images/{name}/verify", tag = "images", params(OfName), request_body = VerifyOrder,
    responses((status = 200, body = JobStarted),
        (status = 409, description = "A job works on it, or there is no manifest", body = Complaint)))]
async fn verify(State(api): Shared, name: Name, body: Body) -> Answered<JobStarted> {
    let order: VerifyOrder = read_order(body).await?;
    if order.rate == Some(0) {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "at a rate of 0 it would never end"));
    }
    let job = api.operated().verify(image_name(name)?, order).await?;
    Ok(Json(JobStarted { job }))
}

/// The jobs at work and the last that ended, oldest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = JobList)))]
async fn jobs(State(api): Shared) -> Json<JobList> {
    Json(JobList { jobs: api.operated().jobs().list() })
}

/// How far a job has come.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(OfId), responses((status = 200, body = JobStatus)))]
async fn job(State(api): Shared, id: Id) -> Answered<JobStatus> {
    api.operated().jobs().status(id?.0).map(Json).ok_or_else(no_such_job)
}

/// Call a job off. It ends soon after.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(OfId), responses((status = 200, body = JobStatus)))]
async fn cancel_job(State(api): Shared, id: Id) -> Answered<JobStatus> {
    api.operated().jobs().cancel(id?.0).map(Json).ok_or_else(no_such_job)
}

/// Order parts of an image to be fetched ahead of demand.
///
/// Durable once answered. `headwater prefetch`.
#[utoipa::path(post, path = "/v1/images/{name}/prefetch", tag = "orders", params(OfName), request_body = PrefetchOrder,
    responses((status = 200, body = PrefetchReport), (status = 409, description = "Not as things are", body = Complaint)))]
async fn prefetch(State(api): Shared, name: Name, body: Body) -> Answered<PrefetchReport> {
    let order: PrefetchOrder = read_order(body).await?;
    Ok(Json(api.operated().prefetch(image_name(name)?, order).await?))
}

/// The orders to prefetch: the active ones and the last that ended, oldest first.
#[utoipa::path(get, path = "/v1/orders", tag = "orders", responses((status = 200, body = OrderList)))]
async fn orders(State(api): Shared) -> Answered<OrderList> {
    let orders = gather(api, |api| api.operated().orders()).await?;
    Ok(Json(OrderList { orders }))
}

/// How far an order to prefetch has come.
#[utoipa::path(get, path = "/v1/orders/{id}", tag = "orders", params(OfId), responses((status = 200, body = OrderStatus)))]
async fn order(State(api): Shared, id: Id) -> Answered<OrderStatus> {
    let id = id?.0;
    gather(api, move |api| api.operated().order(id)).await?.map(Json).ok_or_else(no_such_order)
}

/// Call an order to prefetch off. What has come stays.
#[utoipa::path(delete, path = "/v1/orders/{id}", tag = "orders", params(OfId), responses((status = 200, body = OrderStatus),
    (status = 409, description = "Not as things are", body = Complaint)))]
async fn cancel_order(State(api): Shared, id: Id) -> Answered<OrderStatus> {
    api.operated().cancel_order(id?.0).await?.map(Json).ok_or_else(no_such_order)
}

fn no_such_order() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such order, or it ended long ago")
}

fn no_such_job() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such job, or it ended long ago")
}

async fn pin_order(name: Name, body: Body) -> Result<(String, Option<Vec<ByteRange>>), Problem> {
    let PinOrder { ranges } = read_order(body).await?;
    let checked = |ranges: Vec<super::status::Range>| {
        let ranges = ranges.into_iter().map(|range| {
            let range = ByteRange::new(range.start, range.length).filter(|range| !range.is_empty());
            range.ok_or_else(|| Problem::new(StatusCode::BAD_REQUEST, "a range is empty, or ends beyond 2^64 bytes"))
        });
        ranges.collect::<Result<Vec<_>, _>>()
    };
    Ok((image_name(name)?, ranges.map(checked).transpose()?))
}
