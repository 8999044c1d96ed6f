//! What is said over the admin API about orders to prefetch, as types that the server writes and the command line reads.
//!
//! Times of day are seconds since 1970 as JSON numbers with fractions; all other times are lengths in seconds.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::status::Range;
use crate::clock::Moment;
use crate::fill::orders::{Expected, Forecast, Order, State, What};
use crate::mirror::Here;

/// `POST /v1/images/NAME/prefetch`. Of `ranges`, `profile` and `all` at most one; none of them means all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrefetchOrder {
    /// Which parts.
    pub ranges: Option<Vec<Range>>,
    /// What earlier runs read: the tag of a profile, empty for the one that the server records.
    pub profile: Option<String>,
    /// All of it.
    pub all: bool,
    /// Bytes per second at most; `null`: what demand and other orders leave.
    pub rate: Option<u64>,
    /// The time of day when it is to be here.
    pub deadline: Option<f64>,
    /// Or how long from now.
    pub deadline_seconds: Option<f64>,
    /// `jit`, `aggressive` or `hybrid`; `null` for the last.
    pub strategy: Option<String>,
    /// URIs of servers that are asked before the image's own upstream.
    pub source: Vec<String>,
}

/// The answer to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PrefetchReport {
    /// The number of the order.
    pub order: u64,
    /// Bytes that it is for.
    pub total_bytes: u64,
    /// Of these, bytes that are here already, or known to be zero.
    pub here_bytes: u64,
    /// What comes over in a second for all orders together; `null` while that is not known.
    pub rate_bytes_per_second: Option<f64>,
    /// When it is expected to be done, from now on; `null` while that is not known.
    pub expected_end_seconds: Option<f64>,
    /// The orders that are expected to miss their deadlines now: this one and others.
    pub late: Vec<Late>,
}

/// An order that is expected to miss its deadline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Late {
    /// Its number.
    pub order: u64,
    /// Its image.
    pub image: String,
    /// By how much.
    pub by_seconds: f64,
}

/// `GET /v1/orders`: the active ones and the last that ended, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OrderList {
    /// Each of them.
    pub orders: Vec<OrderStatus>,
}

/// `GET /v1/orders/N`: one order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct OrderStatus {
    /// Its number.
    pub order: u64,
    /// The image.
    pub image: String,
    /// What the image held when it was ordered.
    pub identity: Option<String>,
    /// `all`, `ranges`, `profile TAG` or `cast SESSION`.
    pub what: String,
    /// Whether it waits because a cast brings what it is for.
    pub held: bool,
    /// Whether it is still to be carried out.
    pub state: OrderState,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes that it is for.
    pub total_bytes: u64,
    /// Of these, bytes that are here now, durably, or known to be zero. Falls when something is evicted.
    pub here_bytes: u64,
    /// Bytes per second at most, as ordered.
    pub rate: Option<u64>,
    /// How it uses the time until its deadline.
    pub strategy: String,
    /// When it is to be here.
    pub deadline: Option<f64>,
    /// How long that is from now on; 0 if it has passed.
    pub deadline_seconds: Option<f64>,
    /// When it was ordered.
    pub ordered: f64,
    /// When it ended.
    pub ended: Option<f64>,
    /// Servers that are asked first.
    pub source: Vec<String>,
    /// When it is expected to be done, from now on; `null` while that is not known, and when it has ended.
    pub expected_end_seconds: Option<f64>,
    /// By how much it is expected to miss its deadline; for one that has ended, by how much it did.
    pub late_by_seconds: Option<f64>,
}

/// Whether an order is still to be carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OrderState {
    /// It is.
    #[default]
    Active,
    /// All of it has come.
    Done,
    /// It was called off.
    Cancelled,
    /// It cannot be carried out any more.
    Failed,
}

impl OrderStatus {
    /// What is to be said of `order` now.
    pub(super) fn new(order: &Order, here: Here, forecast: Option<&Forecast>, now: Moment) -> Self {
        let (state, error) = match &order.state {
            State::Active => (OrderState::Active, None),
            State::Done => (OrderState::Done, None),
            State::Cancelled => (OrderState::Cancelled, None),
            State::Failed(why) => (OrderState::Failed, Some(why.clone())),
        };
        let expected = forecast.and_then(|forecast| expected(forecast, order.id)).filter(|_| error.is_none());
        let missed = || {
            let late = order.ended_at?.duration_since(order.deadline?.wall()).ok()?;
            (state == OrderState::Done).then_some(late)
        };
        Self {
            order: order.id,
            image: order.image.clone(),
            identity: order.identity.map(|identity| identity.to_string()),
            what: match &order.what {
                What::All => "all".to_owned(),
                What::Profile(tag) => format!("profile {tag}"),
                What::Ranges => "ranges".to_owned(),
                What::Cast(session) => format!("cast {session}"),
            },
            held: false,
            state,
            error,
            total_bytes: here.total,
            here_bytes: here.done(),
            rate: order.rate,
            strategy: order.strategy.to_string(),
            deadline: order.deadline.map(|deadline| seconds(deadline.wall())),
            deadline_seconds: order.deadline.map(|deadline| deadline.left(now).as_secs_f64()),
            ordered: seconds(order.ordered_at),
            ended: order.ended_at.map(seconds),
            source: order.source.clone(),
            expected_end_seconds: expected.map(|expected| expected.end.as_secs_f64()),
            late_by_seconds: expected
                .and_then(|expected| expected.late_by)
                .or_else(missed)
                .map(|late| late.as_secs_f64()),
        }
    }
}

impl PrefetchReport {
    /// The answer to whoever ordered `order`; `active` are all orders with their images.
    pub(super) fn new(order: &Order, here: Here, forecast: Option<&Forecast>, active: &[(u64, String)]) -> Self {
        let late = |expected: &Expected| {
            let image = active.iter().find(|(id, _)| *id == expected.id)?.1.clone();
            Some(Late { order: expected.id, image, by_seconds: expected.late_by?.as_secs_f64() })
        };
        Self {
            order: order.id,
            total_bytes: here.total,
            here_bytes: here.done(),
            rate_bytes_per_second: forecast.map(|forecast| forecast.rate).filter(|rate| *rate > 0.0),
            expected_end_seconds: forecast
                .and_then(|forecast| expected(forecast, order.id))
                .map(|expected| expected.end.as_secs_f64()),
            late: forecast.map_or_else(Vec::new, |forecast| forecast.orders.iter().filter_map(late).collect()),
        }
    }
}

fn expected(forecast: &Forecast, id: u64) -> Option<&Expected> {
    forecast.orders.iter().find(|expected| expected.id == id)
}

/// Since 1970.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fill::orders::{Deadline, Orders, Spec};
    use crate::mirror::{Space, SpaceSettings};

    #[test]
    fn an_order_tells_what_is_expected_and_then_what_was() {
        let directory = tempfile::tempdir().unwrap();
        let orders = Orders::open(directory.path(), &Space::new(directory.path(), SpaceSettings::default()));
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let spec = Spec { deadline: Some(Deadline::at(at(100))), ..Spec::all("a", 1000) };
        let order = orders.add(spec, at(40)).unwrap();
        let here = Here { total: 1000, resident: 300, zero: 100 };
        let now = Moment { wall: at(50), ..crate::clock::moment() };
        let late = Expected { id: 1, end: Duration::from_secs(60), late_by: Some(Duration::from_secs(10)) };
        let forecast = Forecast { rate: 10.0, orders: vec![late] };
        let status = OrderStatus::new(&order, here, Some(&forecast), now);
        assert_eq!((status.total_bytes, status.here_bytes, status.state), (1000, 400, OrderState::Active));
        assert_eq!((status.deadline, status.deadline_seconds), (Some(100.0), Some(50.0)));
        assert_eq!((status.expected_end_seconds, status.late_by_seconds), (Some(60.0), Some(10.0)));
        let unknown = OrderStatus::new(&order, here, None, now);
        assert_eq!((unknown.expected_end_seconds, unknown.late_by_seconds), (None, None));
        let report = PrefetchReport::new(&order, here, Some(&forecast), &[(1, "a".to_owned())]);
        assert_eq!(report.late, [Late { order: 1, image: "a".to_owned(), by_seconds: 10.0 }]);
        assert_eq!((report.rate_bytes_per_second, report.expected_end_seconds), (Some(10.0), Some(60.0)));
        orders.end_now(1, State::Done, at(130));
        let ended = OrderStatus::new(&orders.get(1).unwrap(), here, None, now);
        assert_eq!((ended.state, ended.late_by_seconds, ended.ended), (OrderState::Done, Some(30.0), Some(130.0)));
    }
}
