//! STUB (part W). The tree of tiers: several servers and what flows between them, as the status page and `headwater top` show it.
//!
//! Owns: asking the other servers of a tree, and joining what they say. Does not own: what each says of itself.

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;

use super::api::Api;

/// `GET /v1/tree`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
}
