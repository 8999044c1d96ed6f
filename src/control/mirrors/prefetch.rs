//! Orders to fetch ahead of demand: taken, told of, called off.
//!
//! What is ordered is resolved to ranges at once. From then on an order is for the bytes of the image that there was:
//! when the upstream's image is replaced the order fails, because nobody has its bytes any more.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{Generation, Mirrors};
use crate::clock::{self, Moment};
use crate::control::Refusal;
use crate::control::prefetch::{OrderStatus, PrefetchOrder, PrefetchReport};
use crate::control::status::Range;
use crate::fill::orders::{Deadline, MOST_RANGES, Order, OrderError, Spec, What, merged};
use crate::mirror::Here;
use crate::nbd::Uri;
use crate::nbd::uri::Security;
use crate::ranges::ByteRange;

/// Servers that one order may name as its source.
const MOST_SOURCES: usize = 16;
/// A deadline that is further away is a mistake.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 60 * 60);

impl Mirrors {
    /// What earlier runs of an image read, by the tag under which that was kept; `None` if nothing is.
    fn profile_ranges(&self, generation: &Generation, tag: &str) -> Option<Vec<ByteRange>> {
        let profile = generation.profiles.get(&tag.parse().ok()?)?;
        Some(profile.wishes(generation.mirror.size()))
    }

    /// Takes an order. Cancel safety: it is taken whole or not at all.
    pub(super) async fn take_order(&self, image: String, order: PrefetchOrder) -> Result<PrefetchReport, Refusal> {
        let this = self.clone();
        let taken = tokio::task::spawn_blocking(move || this.take_order_now(&image, order)).await;
        taken.unwrap_or_else(|_| Err(Refusal::Failed("the thread died".to_owned())))
    }

    /// Blocks.
    fn take_order_now(&self, image: &str, order: PrefetchOrder) -> Result<PrefetchReport, Refusal> {
        let generation = self.find(image)?;
        let now = clock::moment();
        let (ranges, what) = self.resolve(image, &generation, &order)?;
        let spec = Spec {
            identity: generation.mirror.image(),
            ranges,
            what,
            rate: rate(order.rate)?,
            deadline: deadline_of(&order, now)?,
            strategy: match &order.strategy {
                Some(text) => text.parse().map_err(|error| Refusal::Invalid(format!("{text:?}: {error}")))?,
                None => Default::default(),
            },
            source: sources(order.source)?,
            ..Spec::all(image, 0)
        };
        if !spec.source.is_empty() && !generation.mirror.has_manifest() {
            let why = "has no manifest here, so what another mirror sends could not be verified: index it first";
            return Err(Refusal::Conflict(format!("{image:?} {why}")));
        }
        refuse_downgrade(image, &generation.remote.uris(), &spec.source)?;
        generation.mirror.check_room(&spec.ranges).map_err(|error| Refusal::Conflict(error.to_string()))?;
        let order = self.0.orders.add(spec, now.wall).map_err(refusal)?;
        // At once, and not when the runner comes to it: it is to be forecast.
        self.hand_over(Arc::clone(&order), &generation);
        let here = generation.mirror.here(&order.ranges);
        let (id, total, here_bytes) = (order.id, here.total, here.done());
        tracing::info!(order = id, name = image, total, here_bytes, strategy = %order.strategy, "ordered to prefetch");
        let active: Vec<_> = self.0.orders.active().iter().map(|order| (order.id, order.image.clone())).collect();
        Ok(PrefetchReport::new(&order, here, self.0.orders.forecast().as_ref(), &active))
    }

    /// The ranges that an order means, in order and apart from each other, and what that is.
    fn resolve(
        &self,
        image: &str,
        generation: &Generation,
        order: &PrefetchOrder,
    ) -> Result<(Vec<ByteRange>, What), Refusal> {
        let size = generation.mirror.size();
        match (&order.ranges, &order.profile, order.all) {
            (None, None, _) => Ok((merged(&[ByteRange::between(0, size)]), What::All)),
            (Some(ranges), None, false) => Ok((within(image, ranges, size)?, What::Ranges)),
            (None, Some(tag), false) => {
                let none =
                    || Refusal::Conflict(format!("no profile {tag} of {image:?} here: it is there after a first run"));
                let ranges = self.profile_ranges(generation, tag).ok_or_else(none)?;
                // Chunks come whole in any case, and so there are fewer ranges.
                let chunk = generation.mirror.chunk_size();
                let whole = |range: &ByteRange| {
                    let end = range.end().next_multiple_of(chunk).min(size);
                    ByteRange::between(range.start() / chunk * chunk, end)
                };
                Ok((merged(&ranges.iter().map(whole).collect::<Vec<_>>()), What::Profile(tag.clone())))
            }
            _ => Err(Refusal::Invalid("of ranges, profile and all only one makes sense".to_owned())),
        }
    }

    /// All orders. Looks at every chunk that they are for.
    pub(super) fn order_list(&self) -> Vec<OrderStatus> {
        let (forecast, now) = (self.0.orders.forecast(), clock::moment());
        let status = |order: &Arc<Order>| {
            let held = self.is_held(order);
            OrderStatus { held, ..OrderStatus::new(order, self.here(order), forecast.as_ref(), now) }
        };
        self.0.orders.list().iter().map(status).collect()
    }

    pub(super) fn order_status(&self, id: u64) -> Option<OrderStatus> {
        // First: of an order that was seen done, what is counted then came before or has left since.
        let order = self.0.orders.get(id)?;
        let here = self.here(&order);
        let held = self.is_held(&order);
        Some(OrderStatus { held, ..OrderStatus::new(&order, here, self.0.orders.forecast().as_ref(), clock::moment()) })
    }

    /// Calls an order off. Cancel safety: it is called off or not.
    pub(super) async fn call_off(&self, id: u64) -> Result<Option<OrderStatus>, Refusal> {
        let this = self.clone();
        let called_off = move || match this.0.orders.cancel(id, clock::moment().wall) {
            Ok(order) => Ok(order.and_then(|_| this.order_status(id))),
            Err(error) => Err(Refusal::Failed(format!(
                "order {id} is called off, but goes on after a restart, because that cannot be written down: {error}"
            ))),
        };
        let done = tokio::task::spawn_blocking(called_off).await;
        done.unwrap_or_else(|_| Err(Refusal::Failed("the thread died".to_owned())))
    }

    /// What is here of an order now: nothing, if its image is not.
    fn here(&self, order: &Order) -> Here {
        match self.generation_of(order) {
            Ok(generation) => generation.mirror.here(&order.ranges),
            Err(_) => Here { total: order.total_bytes(), ..Here::default() },
        }
    }

    /// The generation that an order is for; or why there is none any more.
    pub(super) fn generation_of(&self, order: &Order) -> Result<Arc<Generation>, String> {
        let generation = self.find(&order.image).map_err(|_| "the image is not mirrored here any more".to_owned())?;
        let (size, identity) = (generation.mirror.size(), generation.mirror.image());
        if order.identity.is_some() && identity != order.identity {
            return Err("the image has been replaced by another one".to_owned());
        }
        if order.ranges.last().is_some_and(|last| last.end() > size) {
            return Err("the image has been replaced by a smaller one".to_owned());
        }
        Ok(generation)
    }
}

fn refusal(error: OrderError) -> Refusal {
    match error {
        OrderError::TooManyRanges(_) => Refusal::Invalid(error.to_string()),
        OrderError::TooMany | OrderError::TooLong | OrderError::NoRoom | OrderError::Elsewhere => {
            Refusal::Conflict(error.to_string())
        }
        OrderError::Disk(_) => Refusal::Failed(error.to_string()),
    }
}

/// Ranges that an operator named, if the image has them.
pub(in crate::control) fn within(image: &str, ranges: &[Range], size: u64) -> Result<Vec<ByteRange>, Refusal> {
    let checked = |range: &Range| {
        let empty = || Refusal::Invalid("a range is empty, or ends beyond 2^64 bytes".to_owned());
        let range = ByteRange::new(range.start, range.length).filter(|range| !range.is_empty()).ok_or_else(empty)?;
        if range.end() > size {
            let end = range.end();
            return Err(Refusal::Invalid(format!("{image:?} has {size} bytes, and the range ends at {end}")));
        }
        Ok(range)
    };
    if ranges.is_empty() || ranges.len() > MOST_RANGES {
        return Err(Refusal::Invalid(format!("an order is for 1 to {MOST_RANGES} ranges")));
    }
    Ok(merged(&ranges.iter().map(checked).collect::<Result<Vec<_>, _>>()?))
}

fn rate(rate: Option<u64>) -> Result<Option<u64>, Refusal> {
    if rate == Some(0) { Err(Refusal::Invalid("at a rate of 0 it would never end".to_owned())) } else { Ok(rate) }
}

/// The deadline that an order names, if it does.
pub(in crate::control) fn deadline_of(order: &PrefetchOrder, now: Moment) -> Result<Option<Deadline>, Refusal> {
    let refused = |why: &str| Err(Refusal::Invalid(format!("the deadline {why}")));
    let (seconds, is_time_of_day) = match (order.deadline, order.deadline_seconds) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return refused("is named twice: as a time of day, and as a time from now"),
        (Some(at), None) => (at, true),
        (None, Some(after)) => (after, false),
    };
    let Ok(time) = Duration::try_from_secs_f64(seconds) else { return refused("is no time") };
    let deadline = if is_time_of_day {
        SystemTime::UNIX_EPOCH.checked_add(time).map(Deadline::at)
    } else {
        Deadline::after(time, now)
    };
    match deadline.map(|deadline| (deadline, deadline.left(now))) {
        Some((_, Duration::ZERO)) => refused("has passed"),
        Some((deadline, left)) if left <= LONGEST => Ok(Some(deadline)),
        _ => refused("is more than a year away"),
    }
}

/// What an image's upstreams send by TLS is not fetched without it.
fn refuse_downgrade(image: &str, upstreams: &[Uri], sources: &[String]) -> Result<(), Refusal> {
    let is_bare = |source: &&String| source.parse().is_ok_and(|uri: Uri| !uri.is_protected());
    match sources.iter().find(is_bare) {
        Some(source) if upstreams.iter().all(|uri| uri.security == Security::Tls) => Err(Refusal::Conflict(format!(
            "{image:?} is fetched through TLS, and {source} has none: name it with nbds://, or by a unix socket"
        ))),
        _ => Ok(()),
    }
}

/// The servers that an order names, if they can be used.
fn sources(sources: Vec<String>) -> Result<Vec<String>, Refusal> {
    if sources.len() > MOST_SOURCES {
        return Err(Refusal::Invalid(format!("an order can name {MOST_SOURCES} sources")));
    }
    for source in &sources {
        let refused = |why: String| Refusal::Invalid(format!("the source {source:?}: {why}"));
        let _: Uri = source.parse().map_err(|error: crate::nbd::uri::ParseUriError| refused(error.to_string()))?;
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_lie_ahead_and_not_too_far() {
        let now = clock::moment();
        let of = |deadline, deadline_seconds| {
            deadline_of(&PrefetchOrder { deadline, deadline_seconds, ..PrefetchOrder::default() }, now)
                .map_err(|error| error.to_string())
        };
        let today = now.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        assert_eq!(of(None, None), Ok(None));
        assert_eq!(of(None, Some(60.0)).unwrap().unwrap().left(now), Duration::from_secs(60));
        let left = of(Some(today + 60.0), None).unwrap().unwrap().left(now);
        assert!(left.abs_diff(Duration::from_secs(60)) < Duration::from_millis(1), "{left:?}");
        for (at, after, why) in [
            (Some(today - 1.0), None, "has passed"),
            (None, Some(0.0), "has passed"),
            (Some(1.0), Some(1.0), "named twice"),
            (None, Some(-1.0), "no time"),
            (Some(f64::NAN), None, "no time"),
            (None, Some(f64::INFINITY), "no time"),
            (None, Some(1e12), "a year away"),
            (Some(1e19), None, "a year away"),
        ] {
            assert!(of(at, after).unwrap_err().contains(why), "{at:?} {after:?}");
        }
    }

    #[test]
    fn tls_is_not_given_up_for_a_source() {
        let of = |upstreams: &[&str], source: &str| {
            let upstreams: Vec<Uri> = upstreams.iter().map(|uri| uri.parse().unwrap()).collect();
            refuse_downgrade("x", &upstreams, &[source.to_owned()]).is_ok()
        };
        assert!(!of(&["nbds://a/x"], "nbd://b/x"));
        assert!(of(&["nbds://a/x"], "nbds://b/x") && of(&["nbds://a/x"], "nbd+unix:///x?socket=/s"));
        assert!(of(&["nbd://a/x"], "nbd://b/x") && of(&["nbds://a/x", "nbd://c/x"], "nbd://b/x"));
    }

    #[test]
    fn sources_are_uris() {
        let of = |text: &str| sources(vec![text.to_owned()]).map_err(|error| error.to_string());
        assert_eq!(of("nbd://a/b"), Ok(vec!["nbd://a/b".to_owned()]));
        assert_eq!(of("nbds://a/b"), Ok(vec!["nbds://a/b".to_owned()]));
        assert!(of("a").is_err());
        assert!(sources(vec!["nbd://a/b".to_owned(); 17]).is_err());
    }
}
