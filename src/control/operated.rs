//! What a server must be able to do to be operated.

use std::pin::Pin;
use std::sync::Arc;

use thiserror::Error;

use super::casts::Words;
use super::casts::order::ReceptionStatus;
use super::figures::MirrorFigures;
use super::jobs::Jobs;
use super::prefetch::{OrderStatus, PrefetchOrder, PrefetchReport};
use super::settings::Settings;
use super::status::{CacheStatus, ImageStatus, LinkStatus, PinReport, Role, VerifyOrder};
use crate::fill::profile::Store;
use crate::ranges::ByteRange;

/// What comes of an order.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send + 'a>>;

/// A server as its operators see it.
///
/// *Who implements it*: each role that a server can have. *Who calls it*: the admin API, on the main thread, for one
/// request at a time or several. What has to be done on workers is handed over to them.
///
/// *Cancel safety*: an answer is dropped when whoever ordered it hangs up, or after a minute. The order is then carried out
/// whole or not at all.
pub trait Operated: Send + Sync + std::fmt::Debug {
    /// What the server does.
    fn role(&self) -> Role;

    /// All images, by name; `clients` is filled in by the caller. May block.
    fn images(&self) -> Vec<ImageStatus>;

    /// What happened to each mirror, by name: cheap.
    fn figures(&self) -> Vec<MirrorFigures> {
        Vec::new()
    }

    /// The cache, if there is one. May block.
    fn cache(&self) -> Option<CacheStatus>;

    /// How the link to the upstreams is used, if there is one.
    fn link(&self) -> Option<LinkStatus>;

    /// The table in which orders that take long are kept.
    fn jobs(&self) -> &Jobs;

    /// Keeps `ranges` of an image whatever happens, or all of it. Durable once answered.
    fn pin(&self, image: String, ranges: Option<Vec<ByteRange>>) -> Answer<'_, PinReport>;

    /// Ends that.
    fn unpin(&self, image: String, ranges: Option<Vec<ByteRange>>) -> Answer<'_, PinReport>;

    /// The profiles of an image.
    fn profiles(&self, image: &str) -> Result<Arc<Store>, Refusal>;

    /// Begins to check what is here of an image; gives the number of the job.
    fn verify(&self, image: String, order: VerifyOrder) -> Answer<'_, u64>;

    /// Orders parts of an image to be fetched ahead of demand. Durable once answered.
    fn prefetch(&self, image: String, order: PrefetchOrder) -> Answer<'_, PrefetchReport> {
        let _ = order;
        Box::pin(
            async move { Err(Refusal::Invalid(format!("{image:?} is not filled here: there is nothing to order"))) },
        )
    }

    /// The orders that are active and the last that ended, oldest first. May block.
    fn orders(&self) -> Vec<OrderStatus> {
        Vec::new()
    }

    /// One of them. May block.
    fn order(&self, id: u64) -> Option<OrderStatus> {
        self.orders().into_iter().find(|order| order.order == id)
    }

    /// The groups that its mirrors hear. May block.
    fn receptions(&self) -> Vec<ReceptionStatus> {
        Vec::new()
    }

    /// Where it says to which groups its images are sent, as far as it was told by others.
    fn words(&self) -> Words {
        Words::default()
    }

    /// What may be changed of it while it runs, as it is now.
    fn settings(&self) -> Settings {
        Settings::default()
    }

    /// Changes those settings that are named, all of them or none. Only such that [`Self::settings`] has are named, and
    /// the level of the log, which is not its own. May block.
    fn change_settings(&self, order: &Settings) -> Result<(), Refusal> {
        let _ = order;
        Ok(())
    }

    /// Calls an order off; `None` if there is none with this number.
    fn cancel_order(&self, id: u64) -> Answer<'_, Option<OrderStatus>> {
        let _ = id;
        Box::pin(async { Ok(None) })
    }
}

/// Why an order is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// There is no such image.
    #[error("there is no image {0:?} here")]
    UnknownImage(String),
    /// The order makes no sense for this image: one that could never be carried out.
    #[error("{0}")]
    Invalid(String),
    /// Not as things are.
    #[error("{0}")]
    Conflict(String),
    /// It was tried, and failed.
    #[error("{0}")]
    Failed(String),
}
