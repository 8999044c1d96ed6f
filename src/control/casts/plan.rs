//! From an order to what a session is: its group, its rate, what is sent first.
//!
//! Owns: the arithmetic of orders. Does not own: images (`source`), sessions (`multicast`).

use std::net::Ipv4Addr;
use std::time::Duration;

use super::order::CastOrder;
use crate::cast::form::Run;
use crate::cast::sender::{Repair, Settings};
use crate::control::Refusal;
use crate::manifest::{ImageId, Shape};
use crate::net::multicast::Group;
use crate::ranges::ByteRange;
use crate::units::{ByteSize, MIB};

/// Bytes of datagrams per second unless an order says otherwise: a network of 100 Mbit/s, the slowest that is about.
pub(super) const RATE: u64 = 12 * MIB;
/// Less is no rate: the pauses between two datagrams would be seconds.
const LEAST_RATE: u64 = 16 << 10;
/// How long receivers that were told are waited for; and those that an order counts.
const PATIENCE: Duration = Duration::from_secs(5);
const LONG_PATIENCE: Duration = Duration::from_secs(300);
/// The longest patience.
const MOST_PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);
/// Parity that an order may ask for, in per cent.
const MOST_REPAIR: f64 = 100.0;
/// A session with a deadline is sent so much faster than it must be, in per cent, for what is lost on the way.
const SPARE: u64 = 25;
/// Bytes of datagrams for each of the image, in per cent: heads, announcements, some parity.
const OVERHEAD: u64 = 105;
/// The port of groups that nobody named.
const PORT: u16 = 10809;

/// The group that an order names; or one of the organisation's own (RFC 2365), made of the identity of the image.
pub(super) fn group(order: &CastOrder, image: ImageId) -> Result<Group, Refusal> {
    let made = || {
        let [first, second, third, ..] = image.0;
        format!("{}:{PORT}", Ipv4Addr::new(239, 192 + (first & 3), second, third))
    };
    let text = order.group.clone().unwrap_or_else(made);
    text.parse().map_err(|error: crate::net::multicast::ParseGroupError| Refusal::Invalid(error.to_string()))
}

/// How fast, and whether that is fast enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pace {
    pub(super) rate: u64,
    pub(super) min_rate: u64,
    /// By how much a deadline is missed at that rate.
    pub(super) late_by: Option<Duration>,
}

/// How fast `bytes` of an image are sent, of which `left` is the time until they are to be everywhere: as fast as that
/// needs and not much faster, and never faster than the order allows.
pub(super) fn pace(order: &CastOrder, bytes: u64, left: Option<Duration>) -> Result<Pace, Refusal> {
    let most = order.rate.unwrap_or(RATE);
    let least = order.min_rate.unwrap_or(most / 4).max(LEAST_RATE);
    if most < LEAST_RATE {
        return Err(Refusal::Invalid(format!("a rate of less than {} a second is too slow", ByteSize(LEAST_RATE))));
    }
    if order.min_rate.is_some_and(|least| least > most) {
        return Err(Refusal::Invalid("the least rate is more than the rate".to_owned()));
    }
    let least = least.min(most);
    let Some(left) = left else { return Ok(Pace { rate: most, min_rate: least, late_by: None }) };
    let datagrams = u128::from(bytes) * u128::from(OVERHEAD) / 100;
    let milliseconds = left.as_millis().max(1);
    let needed = u64::try_from(datagrams * 1000 / milliseconds).unwrap_or(u64::MAX);
    let wanted = u64::try_from(u128::from(needed) * u128::from(100 + SPARE) / 100).unwrap_or(u64::MAX);
    let rate = wanted.clamp(LEAST_RATE, most);
    let takes = u64::try_from(datagrams * 1000 / u128::from(rate)).map_or(Duration::MAX, Duration::from_millis);
    let late_by = takes.checked_sub(left).filter(|late| *late > Duration::from_millis(1));
    Ok(Pace { rate, min_rate: least.min(rate), late_by })
}

/// How a session is sent whose receivers `told` were told of.
pub(super) fn settings(order: &CastOrder, pace: Pace, told: u32) -> Result<Settings, Refusal> {
    let usual = if order.wait_for.is_some() { LONG_PATIENCE } else { PATIENCE };
    let patience = order.patience_seconds.map_or(Some(usual), |seconds| Duration::try_from_secs_f64(seconds).ok());
    let patience = patience.filter(|patience| *patience <= MOST_PATIENCE);
    let patience = patience.ok_or_else(|| Refusal::Invalid("nobody is so patient: a day at most".to_owned()))?;
    let repair = match order.repair_percent {
        None => Repair::Auto,
        Some(percent) if (0.0..=MOST_REPAIR).contains(&percent) => Repair::Percent(percent),
        Some(_) => return Err(Refusal::Invalid("repair is 0 to 100 per cent of the data".to_owned())),
    };
    Ok(Settings {
        rate: pace.rate,
        min_rate: pace.min_rate,
        repair,
        wait_for: order.wait_for.unwrap_or_else(|| told.max(1)),
        patience,
        carousel: order.carousel,
    })
}

/// The chunks of `ranges`, in their order. `None`: there are too many to number.
pub(super) fn runs(ranges: &[ByteRange], shape: Shape) -> Option<Vec<Run>> {
    let chunk = u64::from(shape.chunk_size);
    let mut runs: Vec<Run> = Vec::new();
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let (first, end) = (range.start() / chunk, range.end().min(shape.image_size).div_ceil(chunk));
        let (first, count) = (u32::try_from(first).ok()?, u32::try_from(end.saturating_sub(first)).ok()?);
        match runs.last_mut() {
            // Ranges that share a chunk, or follow each other.
            Some(last) if (last.first..=last.first + last.count).contains(&first) => {
                last.count = last.count.max(first + count - last.first);
            }
            _ if count > 0 => runs.push(Run { first, count }),
            _ => {}
        }
    }
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order() -> CastOrder {
        CastOrder::default()
    }

    #[test]
    fn a_group_is_named_or_made_of_the_image() {
        let of = |group: Option<&str>, image: u8| {
            let order = CastOrder { group: group.map(str::to_owned), ..order() };
            super::group(&order, ImageId([image; 32])).map(|group| group.to_string())
        };
        assert_eq!(of(Some("239.1.2.3:7"), 0).as_deref(), Ok("239.1.2.3:7"));
        assert_eq!(of(None, 0).as_deref(), Ok("239.192.0.0:10809"));
        assert_eq!(of(None, 255).as_deref(), Ok("239.195.255.255:10809"));
        for text in ["", "10.0.0.1:7", "239.1.2.3", "239.1.2.3:0", "host:7"] {
            assert!(matches!(of(Some(text), 0), Err(Refusal::Invalid(_))), "{text}");
        }
    }

    #[test]
    fn a_deadline_sets_the_pace_within_the_rate() {
        let of = |rate, min_rate, left: Option<u64>| {
            pace(&CastOrder { rate, min_rate, ..order() }, 100 * MIB, left.map(Duration::from_secs)).unwrap()
        };
        assert_eq!(of(None, None, None), Pace { rate: RATE, min_rate: RATE / 4, late_by: None });
        // 105 MiB in 105 s, and a quarter faster.
        let slow = of(None, None, Some(105));
        assert_eq!((slow.rate, slow.min_rate, slow.late_by), (MIB * 5 / 4, MIB * 5 / 4, None));
        assert_eq!(of(Some(2 * MIB), Some(MIB), Some(105)).min_rate, MIB);
        let late = of(Some(MIB), None, Some(100));
        assert_eq!((late.rate, late.late_by), (MIB, Some(Duration::from_secs(5))));
        let close = of(Some(MIB), None, Some(105));
        assert_eq!((close.rate, close.late_by), (MIB, None), "it can be met, without anything to spare");
        for (rate, min_rate) in [(Some(1), None), (Some(MIB), Some(2 * MIB)), (None, Some(RATE + 1))] {
            assert!(pace(&CastOrder { rate, min_rate, ..order() }, MIB, None).is_err(), "{rate:?} {min_rate:?}");
        }
    }

    #[test]
    fn those_that_are_told_are_waited_for() {
        let pace = Pace { rate: RATE, min_rate: RATE, late_by: None };
        let of = |wait_for, told| {
            let settings = settings(&CastOrder { wait_for, ..order() }, pace, told).unwrap();
            (settings.wait_for, settings.patience.as_secs())
        };
        assert_eq!([of(None, 0), of(None, 7), of(Some(0), 7), of(Some(40), 7)], [(1, 5), (7, 5), (0, 300), (40, 300)]);
        for seconds in [-1.0, f64::NAN, 1e6] {
            assert!(settings(&CastOrder { patience_seconds: Some(seconds), ..order() }, pace, 0).is_err());
        }
        for percent in [-1.0, f64::NAN, 101.0] {
            assert!(settings(&CastOrder { repair_percent: Some(percent), ..order() }, pace, 0).is_err());
        }
    }

    proptest! {
        /// The pace is always one that the order allows, and late only if the fastest is.
        #[test]
        fn no_pace_is_beyond_the_order(bytes in 1u64..1 << 40, rate in LEAST_RATE..1 << 32, seconds in 1u64..1 << 20) {
            let order = CastOrder { rate: Some(rate), ..order() };
            let found = pace(&order, bytes, Some(Duration::from_secs(seconds))).unwrap();
            prop_assert!(LEAST_RATE <= found.min_rate && found.min_rate <= found.rate && found.rate <= rate);
            prop_assert!(found.late_by.is_none() || found.rate == rate);
        }

        /// The chunks of runs are those of the ranges, and each range's chunks come where it does.
        #[test]
        fn runs_are_the_chunks_of_ranges(ranges in prop::collection::vec((0u64..500, 0u64..60), 0..12)) {
            let shape = Shape { image_size: 40 * 4096 + 7, chunk_size: 4096 };
            let ranges: Vec<_> = ranges.iter().map(|(start, length)| {
                let (start, end) = (start * 400, (start + length) * 400);
                ByteRange::between(start.min(shape.image_size), end.min(shape.image_size))
            }).collect();
            let runs = runs(&ranges, shape).unwrap();
            let mut expected = Vec::new();
            for range in ranges.iter().filter(|range| !range.is_empty()) {
                for chunk in range.start() / 4096..range.end().div_ceil(4096) {
                    if !expected.contains(&chunk) {
                        expected.push(chunk);
                    }
                }
            }
            let mut found = Vec::new();
            for run in &runs {
                prop_assert!(run.count > 0);
                for chunk in run.first..run.first + run.count {
                    if !found.contains(&u64::from(chunk)) {
                        found.push(u64::from(chunk));
                    }
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
