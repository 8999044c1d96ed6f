//! STUB (part W). The status page: one document with its script and style, from the binary. It holds no data: its script asks the
//! API, with the token that the operator gives it.

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;

use super::api::Api;

/// `GET /`, and what the page needs beside it. Served without a token.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
}
