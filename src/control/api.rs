//! Requests: routes, bodies, errors.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/status` | | [`Status`] |
//! | `POST /v1/images/NAME/pin`, `.../unpin` | [`PinOrder`] | [`PinReport`] |
//! | `POST /v1/images/NAME/verify` | [`VerifyOrder`] | [`JobStarted`] |
//! | `GET /v1/images/NAME/profile` | | profiles, as they lie in files |
//! | `PUT /v1/images/NAME/profile?force=true` | the same | [`ProfileReport`](super::status::ProfileReport) |
//! | `DELETE /v1/images/NAME/profile?tag=TAG` | | the same |
//! | `GET /v1/jobs/ID`, `DELETE /v1/jobs/ID` | | [`JobStatus`] |
//! | `POST /v1/images/NAME/prefetch` | [`PrefetchOrder`] | [`PrefetchReport`] |
//! | `GET /v1/orders` | | [`OrderList`] |
//! | `GET /v1/orders/ID`, `DELETE /v1/orders/ID` | | [`OrderStatus`] |
//!
//! `redirect::routes` has those that move clients, `casts::routes` those that send images to groups.
//!
//! `NAME` is percent-encoded, its slashes too. An empty body stands for `{}`. What cannot be done is answered with a
//! [`Complaint`]: 400 it makes no sense, 403 a browser, 404 no such thing, 409 not as things are, 413 too long a body,
//! 500 it was tried and failed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;

use super::casts::{self, Casts};
use super::client::Client;
use super::load::Loads;
use super::operated::{Operated, Refusal};
use super::prefetch::{OrderList, OrderState, OrderStatus, PrefetchOrder, PrefetchReport};
use super::redirect::{Redirects, order::RedirectState, routes};
use super::status::{Complaint, JobStarted, JobStatus, PinOrder, PinReport, Status, VerifyOrder};
use crate::clock;
use crate::ranges::ByteRange;
use crate::server::Steering;
use crate::units::to_u64;

/// Bytes of the longest body that is taken.
const LONGEST_BODY: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// Who can send requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Whom the file system lets open the socket.
    Owner,
    /// Everybody on this machine, and every page that a browser on it shows.
    Machine,
}

/// A server, as its admin API needs it.
#[derive(Debug)]
pub struct Site {
    /// Its images.
    pub operated: Arc<dyn Operated>,
    /// Its clients, and what they have asked for.
    pub steering: Steering,
    /// The orders to move them.
    pub redirects: Redirects,
    /// What it sends to groups.
    pub casts: Casts,
    /// Where clients connect to, as URIs without the name of an export.
    pub listen: Vec<String>,
    /// Other servers of its tree, which the status page shows beside it.
    pub neighbours: Vec<Client>,
}

/// What requests are answered from.
#[derive(Debug)]
pub(super) struct Api {
    site: Site,
    loads: Loads,
    started: Instant,
    /// Held while status is gathered, which may block on a disk: one thread is enough to find that out.
    gathering: Arc<Mutex<()>>,
}

pub(super) type Shared = State<Arc<Api>>;
pub(super) type Name = Result<Path<HashMap<String, String>>, PathRejection>;
pub(super) type Answered<T> = Result<Json<T>, Problem>;

impl Api {
    pub(super) fn new(site: Site, loads: Loads) -> Self {
        Self { site, loads, started: clock::now(), gathering: Arc::default() }
    }

    pub(super) fn router(self, reach: Reach) -> Router {
        let nowhere = async || Problem::new(StatusCode::NOT_FOUND, "there is no such thing in this API");
        let not_so = async || Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this cannot be done with it");
        let router = Router::new()
            .route("/v1/status", get(status))
            .route("/v1/images/{name}/pin", post(pin))
            .route("/v1/images//pin", post(pin))
            .route("/v1/images/{name}/unpin", post(unpin))
            .route("/v1/images//unpin", post(unpin))
            .route("/v1/images/{name}/verify", post(verify))
            .route("/v1/images//verify", post(verify))
            .route("/v1/images/{name}/profile", super::profiles::routes())
            .route("/v1/images//profile", super::profiles::routes())
            .route("/v1/jobs/{id}", get(job).delete(cancel))
            .route("/v1/images/{name}/prefetch", post(prefetch))
            .route("/v1/images//prefetch", post(prefetch))
            .route("/v1/orders", get(orders))
            .route("/v1/orders/{id}", get(order).delete(cancel_order))
            .merge(routes::router())
            .merge(casts::routes::router())
            .merge(super::settings::routes().split_for_parts().0)
            .merge(super::load::routes().split_for_parts().0)
            .merge(super::tree::routes().split_for_parts().0)
            .merge(super::metrics::routes().split_for_parts().0)
            .merge(super::page::routes().split_for_parts().0)
            .fallback(nowhere)
            .method_not_allowed_fallback(not_so)
            .with_state(Arc::new(self));
        match reach {
            Reach::Owner => router,
            Reach::Machine => router.layer(middleware::from_fn(refuse_browsers)),
        }
    }

    pub(super) fn operated(&self) -> &dyn Operated {
        &*self.site.operated
    }

    pub(super) const fn redirects(&self) -> &Redirects {
        &self.site.redirects
    }

    pub(super) const fn casts(&self) -> &Casts {
        &self.site.casts
    }

    /// What the server does just now.
    pub(super) const fn loads(&self) -> &Loads {
        &self.loads
    }

    pub(super) const fn site(&self) -> &Site {
        &self.site
    }

    /// Blocks.
    fn status(&self) -> Status {
        let site = &self.site;
        let clients = site.steering.clients.list();
        let mut images = site.operated.images();
        for image in &mut images {
            image.clients = to_u64(clients.iter().filter(|client| client.export == image.name).count());
        }
        let mut orders = site.operated.orders();
        orders.retain(|order| order.state == OrderState::Active);
        let mut redirects = site.redirects.list();
        redirects.retain(|order| order.state == RedirectState::Active);
        let mut casts = site.casts.list();
        casts.retain(|cast| !cast.is_over());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            role: site.operated.role(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            images,
            clients,
            cache: site.operated.cache(),
            link: site.operated.link(),
            orders,
            redirects,
            casts,
            receptions: site.operated.receptions(),
            draining: site.redirects.drain_status(),
            listen: site.listen.clone(),
        }
    }
}

async fn status(State(api): Shared) -> Answered<Status> {
    gather(api, Api::status).await.map(Json)
}

/// Gathers what may block, one at a time.
async fn gather<T: Send + 'static>(api: Arc<Api>, what: impl FnOnce(&Api) -> T + Send + 'static) -> Result<T, Problem> {
    let turn = Arc::clone(&api.gathering).lock_owned().await;
    let gather = move || {
        let _turn = turn;
        what(&api)
    };
    let gathered = tokio::task::spawn_blocking(gather).await;
    gathered.map_err(|_| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "gathering the status failed"))
}

async fn pin(State(api): Shared, name: Name, body: Body) -> Answered<PinReport> {
    let (name, ranges) = pin_order(name, body).await?;
    let report = api.site.operated.pin(name.clone(), ranges).await?;
    tracing::info!(name, pinned_bytes = report.pinned_bytes, "pinned");
    Ok(Json(report))
}

async fn unpin(State(api): Shared, name: Name, body: Body) -> Answered<PinReport> {
    let (name, ranges) = pin_order(name, body).await?;
    let report = api.site.operated.unpin(name.clone(), ranges).await?;
    tracing::info!(name, pinned_bytes = report.pinned_bytes, "unpinned");
    Ok(Json(report))
}

async fn verify(State(api): Shared, name: Name, body: Body) -> Answered<JobStarted> {
    let order: VerifyOrder = read_order(body).await?;
    if order.rate == Some(0) {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "at a rate of 0 it would never end"));
    }
    let job = api.site.operated.verify(image_name(name)?, order).await?;
    Ok(Json(JobStarted { job }))
}

async fn job(State(api): Shared, id: Result<Path<u64>, PathRejection>) -> Answered<JobStatus> {
    api.site.operated.jobs().status(id?.0).map(Json).ok_or_else(no_such_job)
}

async fn cancel(State(api): Shared, id: Result<Path<u64>, PathRejection>) -> Answered<JobStatus> {
    api.site.operated.jobs().cancel(id?.0).map(Json).ok_or_else(no_such_job)
}

async fn prefetch(State(api): Shared, name: Name, body: Body) -> Answered<PrefetchReport> {
    let order: PrefetchOrder = read_order(body).await?;
    Ok(Json(api.site.operated.prefetch(image_name(name)?, order).await?))
}

async fn orders(State(api): Shared) -> Answered<OrderList> {
    let orders = gather(api, |api| api.site.operated.orders()).await?;
    Ok(Json(OrderList { orders }))
}

async fn order(State(api): Shared, id: Result<Path<u64>, PathRejection>) -> Answered<OrderStatus> {
    let Path(id) = id?;
    gather(api, move |api| api.site.operated.order(id)).await?.map(Json).ok_or_else(no_such_order)
}

async fn cancel_order(State(api): Shared, id: Result<Path<u64>, PathRejection>) -> Answered<OrderStatus> {
    api.site.operated.cancel_order(id?.0).await?.map(Json).ok_or_else(no_such_order)
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

/// The image that a path names: the one whose name is empty if there is nothing between the slashes.
pub(super) fn image_name(name: Name) -> Result<String, Problem> {
    let Path(mut parts) = name?;
    Ok(parts.remove("name").unwrap_or_default())
}

/// Reads a body of JSON, of whatever type it is said to be.
pub(super) async fn read_order<T: DeserializeOwned + Default>(body: Body) -> Result<T, Problem> {
    let bytes = read_body(body, LONGEST_BODY).await?;
    if bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes).map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))
}

/// Reads a body of at most `longest` bytes.
pub(super) async fn read_body(body: Body, longest: usize) -> Result<Bytes, Problem> {
    let body = tokio::time::timeout(BODY_PATIENCE, Limited::new(body, longest).collect());
    match body.await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let kib = longest / 1024;
            Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {kib} KiB")))
        }
        Ok(Err(_)) => Err(Problem::new(StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    }
}

/// Refuses what a page in a browser may have sent: it has an origin, or it came here by a name that somebody else's
/// name server gave this machine (DNS rebinding).
async fn refuse_browsers(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        return Problem::new(StatusCode::FORBIDDEN, "browsers are not served here").into_response();
    }
    if !is_for_loopback(request.headers(), request.uri()) {
        let why = "the Host of a request must be localhost or a loopback address";
        return Problem::new(StatusCode::FORBIDDEN, why).into_response();
    }
    next.run(request).await
}

fn is_for_loopback(headers: &HeaderMap, uri: &Uri) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (host, second) = (hosts.next().and_then(|host| host.to_str().ok()), hosts.next());
    let in_target = uri.authority().is_none_or(|authority| is_loopback(authority.as_str()));
    second.is_none() && host.is_some_and(is_loopback) && in_target
}

/// Whether `HOST[:PORT]` names this machine by itself.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(name, _)| name),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Why a request is not done.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    error: String,
}

impl Problem {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status, Json(Complaint { error: self.error })).into_response()
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal {
            Refusal::UnknownImage(_) => StatusCode::NOT_FOUND,
            Refusal::Invalid(_) => StatusCode::BAD_REQUEST,
            Refusal::Conflict(_) => StatusCode::CONFLICT,
            Refusal::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, refusal.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_few_names() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:9", "[::1]", "[::1]:9"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::2]", "0.0.0.0", "[", "::1"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_request_is_for_loopback_only_if_all_of_it_says_so() {
        let with = |hosts: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(header::HOST, host.parse().unwrap());
            }
            headers
        };
        let path = Uri::from_static("/v1/status");
        assert!(is_for_loopback(&with(&["localhost:1"]), &path));
        assert!(!is_for_loopback(&with(&[]), &path));
        assert!(!is_for_loopback(&with(&["localhost", "evil.example"]), &path));
        assert!(is_for_loopback(&with(&["localhost"]), &Uri::from_static("http://127.0.0.1:1/v1/status")));
        assert!(!is_for_loopback(&with(&["localhost"]), &Uri::from_static("http://evil.example/v1/status")));
    }
}
