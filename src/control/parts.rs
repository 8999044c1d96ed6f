//! The status, and its parts each by itself: nothing is computed for them that the status does not have.
//!
//! Owns: the views of exports, clients, images, the cache and upstreams. Does not own: what they show.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Answered, Api, Id, Name, OfId, OfName, Problem, Shared, gather, image_name, named};
use super::status::{
    CacheStatus, ClientList, ClientStatus, ExportList, ExportStatus, ImageList, ImageStatus, ImageUpstream, Status,
    UpstreamList,
};
use crate::export::Facts;
use crate::server::transmission_flags;
use crate::units::to_u64;

pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    let router = OpenApiRouter::new()
        .routes(routes!(status))
        .routes(routes!(exports))
        .routes(routes!(clients))
        .routes(routes!(client, close_client))
        .routes(routes!(images))
        .routes(routes!(cache))
        .routes(routes!(upstreams));
    [routes!(export), routes!(image)].into_iter().fold(router, named)
}

/// All that is to be known of a server.
///
/// It looks at every chunk of every mirror; ask for parts of it where that is enough. `headwater status`.
#[utoipa::path(get, path = "/v1/status", tag = "server", responses((status = 200, body = Status)))]
async fn status(State(api): Shared) -> Answered<Status> {
    gather(api, Api::status).await.map(Json)
}

/// What clients can connect to, by name.
#[utoipa::path(get, path = "/v1/exports", tag = "exports", responses((status = 200, body = ExportList)))]
async fn exports(State(api): Shared) -> Json<ExportList> {
    Json(ExportList { exports: list_exports(&api) })
}

/// One export.
#[utoipa::path(get, path = "/v1/exports/{name}", tag = "exports", params(OfName),
    responses((status = 200, body = ExportStatus)))]
async fn export(State(api): Shared, name: Name) -> Answered<ExportStatus> {
    let name = image_name(name)?;
    let found = list_exports(&api).into_iter().find(|export| export.name == name);
    found.map(Json).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("there is no export {name:?} here")))
}

fn list_exports(api: &Api) -> Vec<ExportStatus> {
    let (clients, draining) = (api.site().steering.clients.list(), api.redirects().drain_status());
    let status = |name: String, facts: &Facts| ExportStatus {
        size: facts.size,
        writable: facts.writable,
        flags: flags(facts),
        clients: to_u64(clients.iter().filter(|client| client.export == name).count()),
        draining: draining.covers(&name),
        identity: facts.identity.map(|identity| identity.to_string()),
        description: facts.description.clone(),
        name,
    };
    api.redirects().registry().all().into_iter().map(|(name, export)| status(name, &export.facts())).collect()
}

/// As `headwater info` prints them.
fn flags(facts: &Facts) -> Vec<String> {
    let names = transmission_flags(facts);
    let names = names.iter_names().map(|(name, _)| name.trim_start_matches("SEND_").to_lowercase().replace('_', "-"));
    names.collect()
}

/// Who is connected, oldest first.
#[utoipa::path(get, path = "/v1/clients", tag = "clients", responses((status = 200, body = ClientList)))]
async fn clients(State(api): Shared) -> Json<ClientList> {
    Json(ClientList { clients: api.site().steering.clients.list() })
}

/// One client.
#[utoipa::path(get, path = "/v1/clients/{id}", tag = "clients", params(OfId), responses((status = 200, body = ClientStatus)))]
async fn client(State(api): Shared, id: Id) -> Answered<ClientStatus> {
    let handle = api.site().steering.clients.find(id?.0);
    handle.and_then(|handle| handle.status()).map(Json).ok_or_else(no_such_client)
}

/// Close the connection of a client.
///
/// It is closed when nothing is in flight, or after a second when what has been received is answered. Nothing keeps the
/// client from coming back: `POST /v1/exports/{name}/drain` does. The answer is what it had done until now.
#[utoipa::path(delete, path = "/v1/clients/{id}", tag = "clients", params(OfId),
    responses((status = 200, body = ClientStatus)))]
async fn close_client(State(api): Shared, id: Id) -> Answered<ClientStatus> {
    let handle = api.site().steering.clients.find(id?.0).ok_or_else(no_such_client)?;
    let status = handle.status().ok_or_else(no_such_client)?;
    handle.close();
    tracing::info!(client = status.id, peer = status.peer, export = status.export, "closing a client's connection");
    Ok(Json(status))
}

fn no_such_client() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no such client, or it has left")
}

/// All images, by name.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = ImageList)))]
async fn images(State(api): Shared) -> Answered<ImageList> {
    let images = gather(api, Api::images).await?;
    Ok(Json(ImageList { images }))
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{name}", tag = "images", params(OfName),
    responses((status = 200, body = ImageStatus)))]
async fn image(State(api): Shared, name: Name) -> Answered<ImageStatus> {
    let name = image_name(name)?;
    let found = gather(api, Api::images).await?.into_iter().find(|image| image.name == name);
    found.map(Json).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("there is no image {name:?} here")))
}

/// The cache that all mirrors share. A server of real images has none.
#[utoipa::path(get, path = "/v1/cache", tag = "images", responses((status = 200, body = CacheStatus),
    (status = 404, description = "There is none", body = super::status::Complaint)))]
async fn cache(State(api): Shared) -> Answered<CacheStatus> {
    let cache = gather(api, |api| api.operated().cache()).await?;
    cache.map(Json).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "this server has no cache: all is real here"))
}

/// The servers that mirrors are filled from, by image, in order of preference.
#[utoipa::path(get, path = "/v1/upstreams", tag = "images", responses((status = 200, body = UpstreamList)))]
async fn upstreams(State(api): Shared) -> Answered<UpstreamList> {
    let images = gather(api, Api::images).await?;
    let of_image = |image: ImageStatus| {
        let upstreams = image.mirror.map_or_else(Vec::new, |mirror| mirror.upstreams);
        upstreams.into_iter().map(move |upstream| ImageUpstream { image: image.name.clone(), upstream })
    };
    Ok(Json(UpstreamList { upstreams: images.into_iter().flat_map(of_image).collect() }))
}
