//! STUB (part P). What may be changed while a server runs.

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;

use super::api::Api;

/// `GET` and `PATCH /v1/settings`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
}
