//! Pictures of what is here of an image, over the admin API.
//!
//! Owns: their form in JSON. Does not own: how they are made (`mirror::cells`).

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Answered, Api, Name, OfName, Problem, Shared, gather, image_name, named};
use crate::mirror::Cells;

/// Cells of a picture that says nothing about their number.
const USUAL: u64 = 256;
/// Cells of the largest picture: some 200 KiB of JSON.
const MOST: u64 = 4096;

/// `GET /v1/images/NAME/residency?cells=N`: the image cut into ranges of equal length, and how many bytes of each are
/// what. All lists are equally long; the sum of each is the figure of the same name in the status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Residency {
    /// The image.
    pub image: String,
    /// Its bytes.
    pub size: u64,
    /// Bytes of each range; the last one may be shorter.
    pub cell_bytes: u64,
    /// Here, checked and durable.
    pub resident_bytes: Vec<u64>,
    /// Known to be zero and not stored.
    pub zero_bytes: Vec<u64>,
    /// Pinned: never evicted. A part of it may not be here yet.
    pub pinned_bytes: Vec<u64>,
    /// Brought ahead of demand, and read by no client so far.
    pub unread_bytes: Vec<u64>,
    /// Being fetched.
    pub fetching_bytes: Vec<u64>,
}

impl Residency {
    fn new(image: String, cells: Cells) -> Self {
        let Cells { size, length, resident, zero, pinned, unread, fetching } = cells;
        Self {
            image,
            size,
            cell_bytes: length,
            resident_bytes: resident,
            zero_bytes: zero,
            pinned_bytes: pinned,
            unread_bytes: unread,
            fetching_bytes: fetching,
        }
    }
}

/// How fine a picture is to be.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cut {
    cells: Option<u64>,
}

/// `GET /v1/images/NAME/residency`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    named(OpenApiRouter::new(), routes!(residency))
}

/// What is here of an image, as a picture.
///
/// The image is cut into ranges of equal length; of each, how many bytes are resident, zero, pinned, brought ahead of demand
/// and not read yet, or being fetched.
#[utoipa::path(
    get,
    path = "/v1/images/{name}/residency",
    tag = "images",
    params(
        OfName,
        ("cells" = Option<u64>, Query, minimum = 1, maximum = 4096, description = "Ranges at most, 256 unless told: \
            less for an image that has not so many chunks"),
    ),
    responses((status = 200, body = Residency))
)]
async fn residency(State(api): Shared, name: Name, cut: Result<Query<Cut>, QueryRejection>) -> Answered<Residency> {
    let (name, Query(cut)) = (image_name(name)?, cut?);
    let most = cut.cells.unwrap_or(USUAL);
    if !(1..=MOST).contains(&most) {
        return Err(Problem::new(StatusCode::BAD_REQUEST, format!("cells: from 1 to {MOST}")));
    }
    let cells = {
        let name = name.clone();
        gather(api, move |api| api.operated().residency(&name, most)).await??
    };
    Ok(Json(Residency::new(name, cells)))
}
