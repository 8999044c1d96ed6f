//! All routes, and what requests are answered from.
//!
//! A room's routes are where its handlers are, each with what is said of it for programs (`document`): `routes()` of
//! `parts`, `images`, `profiles`, `redirect`, `casts`, `settings`, `load`, `tree`, `metrics`, `page`.
//!
//! Names in paths are percent-encoded, their slashes too. An empty body stands for `{}`. What cannot be done is answered
//! with a [`Complaint`]: 400 it makes no sense, 401 the token is missing or wrong, 403 the page of a stranger, 404 no
//! such thing, 405 not with this method, 408 the body took too long, 409 not as things are, 413 too long a body, 500 it
//! was tried and failed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, middleware};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;
use utoipa::IntoParams;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use super::access::{TokenCell, Way, ask_for_token, refuse_strangers};
use super::casts::{self, Casts};
use super::client::Client;
use super::load::Loads;
use super::operated::{Operated, Refusal};
use super::prefetch::OrderState;
use super::redirect::{self, Redirects, order::RedirectState};
use super::status::{ClientStatus, Complaint, ImageStatus, JobState, Status};
use super::tree::Neighbours;
use super::{document, images, load, metrics, page, parts, profiles, residency, settings, tree};
use crate::clock;
use crate::server::Steering;
use crate::units::to_u64;

/// Bytes of the longest body that is taken.
const LONGEST_BODY: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

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
    neighbours: Neighbours,
    loads: Loads,
    started: Instant,
    /// Held while status is gathered, which may block on a disk: one thread is enough to find that out.
    gathering: Arc<Mutex<()>>,
}

pub(super) type Shared = State<Arc<Api>>;
pub(super) type Name = Result<Path<HashMap<String, String>>, PathRejection>;
pub(super) type Id = Result<Path<u64>, PathRejection>;
pub(super) type Answered<T> = Result<Json<T>, Problem>;

impl Api {
    pub(super) fn new(site: Site, loads: Loads) -> Self {
        let neighbours = Neighbours::new(site.neighbours.clone());
        Self { site, neighbours, loads, started: clock::now(), gathering: Arc::default() }
    }

    /// Answers requests; `token` is what they must carry, if they come by TCP.
    pub(super) fn router(self, token: Option<&TokenCell>) -> Router {
        let nowhere = async || Problem::new(StatusCode::NOT_FOUND, "there is no such thing in this API");
        let not_so = async || Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this cannot be done with it");
        let (mut guarded, open) = (Router::from(routes()), Router::from(open_routes()));
        if let Some(token) = token {
            guarded = guarded.route_layer(middleware::from_fn_with_state(token.clone(), ask_for_token));
        }
        let way = if token.is_some() { Way::Tcp } else { Way::Unix };
        guarded
            .merge(open)
            .fallback(nowhere)
            .method_not_allowed_fallback(not_so)
            .layer(middleware::from_fn_with_state(way, refuse_strangers))
            .with_state(Arc::new(self))
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

    pub(super) const fn neighbours(&self) -> &Neighbours {
        &self.neighbours
    }

    /// All images with the number of their clients. Blocks.
    pub(super) fn images(&self) -> Vec<ImageStatus> {
        self.images_of(&self.site.steering.clients.list())
    }

    fn images_of(&self, clients: &[ClientStatus]) -> Vec<ImageStatus> {
        let mut images = self.site.operated.images();
        for image in &mut images {
            image.clients = to_u64(clients.iter().filter(|client| client.export == image.name).count());
        }
        images
    }

    /// Blocks.
    pub(super) fn status(&self) -> Status {
        let site = &self.site;
        let clients = site.steering.clients.list();
        let mut orders = site.operated.orders();
        orders.retain(|order| order.state == OrderState::Active);
        let mut redirects = site.redirects.list();
        redirects.retain(|order| order.state == RedirectState::Active);
        let mut casts = site.casts.list();
        casts.retain(|cast| !cast.is_over());
        let mut jobs = site.operated.jobs().list();
        jobs.retain(|job| job.state == JobState::Running);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            role: site.operated.role(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            images: self.images_of(&clients),
            clients,
            cache: site.operated.cache(),
            link: site.operated.link(),
            orders,
            redirects,
            casts,
            receptions: site.operated.receptions(),
            draining: site.redirects.drain_status(),
            listen: site.listen.clone(),
            server: site.steering.node.to_string(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            jobs,
        }
    }
}

/// What whoever may ask can ask for.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    let rooms = [
        parts::routes(),
        images::routes(),
        profiles::routes(),
        redirect::routes::routes(),
        casts::routes::routes(),
        settings::routes(),
        load::routes(),
        residency::routes(),
        tree::routes(),
        metrics::routes(),
    ];
    rooms.into_iter().fold(OpenApiRouter::new(), OpenApiRouter::merge)
}

/// What anybody may ask for: it says nothing of the server.
pub(super) fn open_routes() -> OpenApiRouter<Arc<Api>> {
    document::routes().merge(page::routes())
}

/// Adds what can be done with something at a path with `{name}` in it, also for the one whose name is empty.
pub(super) fn named(
    router: OpenApiRouter<Arc<Api>>,
    (schemas, paths, methods): UtoipaMethodRouter<Arc<Api>>,
) -> OpenApiRouter<Arc<Api>> {
    let unnamed: Vec<_> = paths.paths.keys().map(|path| path.replace("{name}", "")).collect();
    let router = router.routes((schemas, paths, methods.clone()));
    unnamed.into_iter().fold(router, |router, path| router.route(&path, methods.clone()))
}

/// The name of an image or an export.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "it describes what `image_name` reads")]
pub(super) struct OfName {
    /// Its name, as the status has it. The name may also be empty, where there are two slashes then.
    name: String,
}

/// The number of something.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "it describes what `Id` reads")]
pub(super) struct OfId {
    /// Its number.
    id: u64,
}

/// Gathers what may block, one at a time.
pub(super) async fn gather<T: Send + 'static>(
    api: Arc<Api>,
    what: impl FnOnce(&Api) -> T + Send + 'static,
) -> Result<T, Problem> {
    let turn = Arc::clone(&api.gathering).lock_owned().await;
    let gather = move || {
        let _turn = turn;
        what(&api)
    };
    let gathered = tokio::task::spawn_blocking(gather).await;
    gathered.map_err(|_| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "gathering the status failed"))
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
    // The fields of an order in a list, without their names, would be understood too.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "an order is an object: {...}"));
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
