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
use tokio::time::{Instant, timeout_at};

use super::chunks::Geometry;
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
    asking: AsyncMutex<Asking>,
}

/// How far the answers to one region go.
#[derive(Debug, Default)]
struct Asking {
    /// Bytes from the start of the region that are known.
    reached: u64,
    /// How often there was no answer, and the last time.
    silences: u32,
    silent: Option<Instant>,
}

impl Asking {
    fn has_to_pause(&self) -> bool {
        let doubled = self.silences.saturating_sub(1).min(6);
        self.silent.is_some_and(|last| last.elapsed() < PAUSE * (1 << doubled))
    }
}

impl Chart {
    pub(super) fn new(geometry: Geometry) -> Self {
        let regions = (0..geometry.size().div_ceil(REGION)).map(|_| Region::default()).collect();
        Self { geometry, regions }
    }

    /// Gives `mark` what the upstream says is zero in all regions that `range` touches, as far as it says so until
    /// `deadline`.
    ///
    /// Cancel safety: whoever comes next asks for the rest.
    pub(super) async fn cover(
        &self,
        range: ByteRange,
        deadline: Instant,
        lower: &SharedExport,
        mark: impl Fn(ByteRange),
    ) {
        for number in range.start() / REGION..range.end().div_ceil(REGION) {
            let region = &self.regions[to_usize(number)];
            if region.is_known.load(Ordering::Acquire) {
                continue;
            }
            let Ok(mut asking) = timeout_at(deadline, region.asking.lock()).await else { return };
            if region.is_known.load(Ordering::Acquire) || asking.has_to_pause() {
                continue;
            }
            let whole = ByteRange::between(number * REGION, self.geometry.size().min((number + 1) * REGION));
            let ask = self.ask(whole, &mut asking.reached, lower, &mark);
            match timeout_at(deadline, ask).await {
                Ok(Ok(())) => region.is_known.store(true, Ordering::Release),
                // It has answered, and will not say.
                Ok(Err(error)) if error.kind() != ErrorKind::Unavailable => {
                    tracing::debug!(error = %error.chain(), "the upstream does not say what is zero");
                    region.is_known.store(true, Ordering::Release);
                }
                Ok(Err(_)) | Err(_) => {
                    tracing::debug!(region = whole.start(), "no answer in time to what is zero");
                    asking.silences += 1;
                    asking.silent = Some(Instant::now());
                }
            }
        }
    }

    async fn ask(
        &self,
        region: ByteRange,
        reached: &mut u64,
        lower: &SharedExport,
        mark: &impl Fn(ByteRange),
    ) -> Result<()> {
        if !lower.facts().contexts.contains(&Context::Allocation) {
            return Ok(());
        }
        for _ in 0..ANSWERS {
            let mut start = region.start() + *reached;
            if start >= region.end() {
                break;
            }
            let rest = ByteRange::between(start, region.end());
            for extent in lower.extents(rest, Context::Allocation, EXTENTS).await? {
                let range = ByteRange::between(start, (start + extent.length).min(region.end()));
                if extent.status & u64::from(Allocation::ZERO.bits()) != 0 {
                    mark(range);
                }
                start = range.end();
            }
            *reached = start - region.start();
        }
        Ok(())
    }
}
