//! STUB (part M). `/metrics`: what a server has done, for Prometheus.

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;

use super::api::Api;

/// `GET /metrics`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
}
