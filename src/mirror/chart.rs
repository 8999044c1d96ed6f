//! What the upstream says is zero, so that it need not be fetched.
//!
//! A server may send holes as holes in its replies, or only when it is asked for extents; asking covers both. Each
//! region is asked about once, when the first chunk of it is missed: one more round trip in a gibibyte.

use tokio::sync::OnceCell;

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

#[derive(Debug)]
pub(super) struct Chart {
    geometry: Geometry,
    regions: Box<[OnceCell<()>]>,
}

impl Chart {
    pub(super) fn new(geometry: Geometry) -> Self {
        let regions = (0..geometry.size().div_ceil(REGION)).map(|_| OnceCell::new()).collect();
        Self { geometry, regions }
    }

    /// Marks what the upstream says is zero in all regions that `range` touches. `marked` is told of each range with
    /// a chunk that was marked. Fails only if the upstream cannot be reached.
    ///
    /// Cancel safety: whoever comes next asks again.
    pub(super) async fn cover(
        &self,
        range: ByteRange,
        lower: &SharedExport,
        states: &States,
        flights: &Flights,
        marked: impl Fn(ByteRange),
    ) -> Result<()> {
        for number in range.start() / REGION..range.end().div_ceil(REGION) {
            let region = ByteRange::between(number * REGION, self.geometry.size().min((number + 1) * REGION));
            let ask = || async {
                match self.ask(region, lower, states, flights, &marked).await {
                    // Without an answer everything is taken as data, which is slower and right.
                    Err(error) if error.kind() != ErrorKind::Unavailable => {
                        tracing::debug!(error = %error.chain(), "the upstream does not say what is zero");
                        Ok(())
                    }
                    result => result,
                }
            };
            self.regions[to_usize(number)].get_or_try_init(ask).await?;
        }
        Ok(())
    }

    async fn ask(
        &self,
        region: ByteRange,
        lower: &SharedExport,
        states: &States,
        flights: &Flights,
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
