//! What the upstream says is zero, so that it need not be fetched.
//!
//! A server may send holes as holes in its replies, or only when it is asked for extents; asking covers both. Each
//! region is asked about once, when the first chunk of it is missed: one more round trip in a gibibyte.
//!
//! No answer is no misfortune: what is not known to be zero is taken as data, which is slower and right. So nobody
//! waits long for one, and a server that does not give one is asked again after a while only.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout};

use super::chunks::{Geometry, State, States};
use super::flight::Flights;
use crate::error::{ErrorKind, Result};
use crate::export::{Context, SharedExport};
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::units::{GIB, to_usize};

/// What is asked about at once.
const REGION: u64 = GIB;
/// Extents in one answer.
const EXTENTS: usize = 32 << 10;
/// Answers for one region, before the rest of it is taken as data.
const ANSWERS: usize = 1024;
/// After no answer, the next question waits this long; doubled each time, up to 64 times.
const PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Chart {
    geometry: Geometry,
    regions: Box<[Region]>,
}

#[derive(Debug, Default)]
struct Region {
    is_known: AtomicBool,
    /// Held by whoever asks.
    asking: AsyncMutex<Silence>,
}

/// How often there was no answer, and since when.
#[derive(Debug, Default)]
struct Silence {
    times: u32,
    last: Option<Instant>,
}

impl Silence {
    fn lasts(&self) -> bool {
        self.last.is_some_and(|last| last.elapsed() < PAUSE * (1 << self.times.min(6)))
    }
}

impl Chart {
    pub(super) fn new(geometry: Geometry) -> Self {
        let regions = (0..geometry.size().div_ceil(REGION)).map(|_| Region::default()).collect();
        Self { geometry, regions }
    }

    /// Marks what the upstream says is zero in all regions that `range` touches, as far as it says so within `limit`
    /// for each. `marked` is told of each range with a chunk that was marked.
    ///
    /// Cancel safety: whoever comes next asks again.
    pub(super) async fn cover(
        &self,
        range: ByteRange,
        limit: Duration,
        lower: &SharedExport,
        (states, flights): (&States, &Flights),
        marked: impl Fn(ByteRange),
    ) {
        for number in range.start() / REGION..range.end().div_ceil(REGION) {
            let region = &self.regions[to_usize(number)];
            if region.is_known.load(Ordering::Acquire) {
                continue;
            }
            let Ok(mut silence) = timeout(limit, region.asking.lock()).await else { continue };
            if region.is_known.load(Ordering::Acquire) || silence.lasts() {
                continue;
            }
            let whole = ByteRange::between(number * REGION, self.geometry.size().min((number + 1) * REGION));
            match timeout(limit, self.ask(whole, lower, (states, flights), &marked)).await {
                Ok(Ok(())) => region.is_known.store(true, Ordering::Release),
                // It has answered, and will not say.
                Ok(Err(error)) if error.kind() != ErrorKind::Unavailable => {
                    tracing::debug!(error = %error.chain(), "the upstream does not say what is zero");
                    region.is_known.store(true, Ordering::Release);
                }
                Ok(Err(_)) | Err(_) => {
                    tracing::debug!(region = whole.start(), "no answer in time to what is zero");
                    *silence = Silence { times: silence.times + 1, last: Some(Instant::now()) };
                }
            }
        }
    }

    async fn ask(
        &self,
        region: ByteRange,
        lower: &SharedExport,
        (states, flights): (&States, &Flights),
        marked: &impl Fn(ByteRange),
    ) -> Result<()> {
        if !lower.facts().contexts.contains(&Context::Allocation) {
            return Ok(());
        }
        let mut start = region.start();
        for _ in 0..ANSWERS {
            if start >= region.end() {
                break;
            }
            let rest = ByteRange::between(start, region.end());
            for extent in lower.extents(rest, Context::Allocation, EXTENTS).await? {
                let range = ByteRange::between(start, (start + extent.length).min(region.end()));
                if extent.status & u64::from(Allocation::ZERO.bits()) != 0 {
                    self.mark(range, states, flights);
                    marked(range);
                }
                start = range.end();
            }
        }
        Ok(())
    }

    fn mark(&self, range: ByteRange, states: &States, flights: &Flights) {
        let _table = flights.lock();
        for chunk in self.geometry.whole_chunks(range) {
            // A chunk in flight is absent too; its fetch finds it marked and lands at once.
            states.change(chunk, State::Absent, State::Zero);
        }
    }
}
