//! Profiles of images, over the admin API.
//!
//! Profiles are the one thing that is not JSON here: they travel as they lie in files.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Answered, Api, Name, OfName, Problem, Shared, image_name, named, read_body};
use super::status::{Complaint, ProfileReport};
use crate::fill::profile::{LARGEST, Profiles, Refused, Store, Tag};
use crate::units::{to_u64, to_usize};

/// What can be done with the profiles of an image.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    named(OpenApiRouter::new(), routes!(export_profile, import_profile, forget_profile))
}

type Asked<T> = Result<Query<T>, QueryRejection>;

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Import {
    /// Whether profiles of an image of another identity are taken.
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Forget {
    /// The workload; all of them without.
    #[param(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    tag: Option<String>,
}

/// The profiles of an image, as they lie in files.
///
/// `headwater profile`.
#[utoipa::path(get, path = "/v1/images/{name}/profile", tag = "images", params(OfName),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
async fn export_profile(State(api): Shared, name: Name) -> Result<impl IntoResponse, Problem> {
    let (_, store) = find(&api, name)?;
    let profiles = store.profiles();
    if profiles.is_empty() {
        return Err(Problem::new(StatusCode::NOT_FOUND, "the image has no profile yet"));
    }
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], profiles.encode()))
}

/// Put profiles in the place of those that an image has.
#[utoipa::path(put, path = "/v1/images/{name}/profile", tag = "images", params(OfName, Import),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "A file of profiles."),
    responses((status = 200, body = ProfileReport),
        (status = 409, description = "They are of another image, or too many", body = Complaint)))]
async fn import_profile(State(api): Shared, name: Name, asked: Asked<Import>, body: Body) -> Answered<ProfileReport> {
    let Query(Import { force }) = asked?;
    let (name, store) = find(&api, name)?;
    let bytes = read_body(body, to_usize(LARGEST)).await?;
    let profiles = Profiles::decode(&bytes).map_err(Refused::from)?;
    store.import(&profiles, force)?;
    store.save_aside().await;
    let tags = to_u64(profiles.iter().count());
    tracing::info!(name, tags, "imported profiles");
    Ok(Json(ProfileReport { tags }))
}

/// Forget the profile of a workload, or all of an image.
#[utoipa::path(delete, path = "/v1/images/{name}/profile", tag = "images", params(OfName, Forget),
    responses((status = 200, body = ProfileReport)))]
async fn forget_profile(State(api): Shared, name: Name, asked: Asked<Forget>) -> Answered<ProfileReport> {
    let Query(Forget { tag }) = asked?;
    let tag: Option<Tag> = tag.map(|tag| tag.parse()).transpose().map_err(bad_request)?;
    let (name, store) = find(&api, name)?;
    let tags = store.forget(tag.as_ref());
    if let Some(tag) = tag.filter(|_| tags == 0) {
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            format!("the image has no profile {tag:?}", tag = tag.as_str()),
        ));
    }
    store.save_aside().await;
    tracing::info!(name, tags, "forgot profiles");
    Ok(Json(ProfileReport { tags }))
}

fn find(api: &Api, name: Name) -> Result<(String, Arc<Store>), Problem> {
    let name = image_name(name)?;
    let store = api.operated().profiles(&name)?;
    Ok((name, store))
}

fn bad_request(error: impl ToString) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, error.to_string())
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::Format(_) => StatusCode::BAD_REQUEST,
            Refused::Foreign(_) | Refused::TooManyTags(_) => StatusCode::CONFLICT,
        };
        Self::new(status, refused.to_string())
    }
}
