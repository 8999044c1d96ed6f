//! What is kept whatever happens: ranges of an image whose chunks are never evicted.
//!
//! The file `pins` of a cache is one line of JSON and one with its CRC-32C. It is replaced as a whole, so what a crash
//! leaves is the pins before or those after.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::chunks::{Chunk, State};
use super::{Inner, Mirror};
use crate::ranges::{ByteRange, merged};
use crate::sealed::{seal, unseal};
use crate::units::ByteSize;

const NAME: &str = "pins";
/// One that is being made.
pub(super) const NEW_NAME: &str = "pins.new";
/// Ranges in one image; more are a mistake.
const MOST: usize = 4096;

#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    ranges: RwLock<Vec<ByteRange>>,
    /// Bytes of the disk that the space keeps for them: what they cost when they were granted, of chunks that may have
    /// become zero since. Locked by whoever changes them, while it blocks.
    granted: Mutex<u64>,
}

/// What is pinned after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// Bytes of the pinned ranges.
    pub bytes: u64,
    /// Of these, bytes that are here or known to be zero. What is not comes when it is read, and stays then.
    pub here: u64,
}

/// Why pins are not changed.
#[derive(Debug, Error)]
pub enum PinError {
    /// They would not fit.
    #[error(
        "{image}: pinning this keeps {} on the disk; {} is pinned already, and of the {} of --cache-size {} can be pinned: {} too much",
        ByteSize(*wanted), ByteSize(*pinned), ByteSize(*limit), ByteSize(*most), ByteSize((wanted + pinned).saturating_sub(*most))
    )]
    NoRoom {
        /// The image.
        image: String,
        /// Bytes of the disk that it needs.
        wanted: u64,
        /// Bytes that are pinned in all images now.
        pinned: u64,
        /// Bytes that can be: the limit without maps, manifests and headroom.
        most: u64,
        /// The limit of the cache.
        limit: u64,
    },
    /// They cannot be made durable.
    #[error("cannot write the pins: {0}")]
    Disk(#[from] io::Error),
}

impl Mirror {
    /// Pins ranges, which lie within the image: their chunks are never evicted. When this has returned it is durable.
    pub async fn pin(&self, ranges: &[ByteRange]) -> Result<Pinned, PinError> {
        let ranges = ranges.to_vec();
        self.0.change_pins(move |now| union(now, &ranges)).await
    }

    /// Takes pins back.
    pub async fn unpin(&self, ranges: &[ByteRange]) -> Result<Pinned, PinError> {
        let ranges = ranges.to_vec();
        self.0.change_pins(move |now| difference(now, &ranges)).await
    }
}

impl Inner {
    /// Cancel safety: it is carried out whole.
    async fn change_pins(
        self: &Arc<Self>,
        change: impl FnOnce(&[ByteRange]) -> Vec<ByteRange> + Send + 'static,
    ) -> Result<Pinned, PinError> {
        let inner = Arc::clone(self);
        let changed = tokio::task::spawn_blocking(move || inner.change_pins_now(change)).await;
        changed.unwrap_or_else(|_| Err(io::Error::other("the thread died").into()))
    }

    /// Blocks.
    fn change_pins_now(&self, change: impl FnOnce(&[ByteRange]) -> Vec<ByteRange>) -> Result<Pinned, PinError> {
        let mut granted = self.pins.granted.lock().unwrap_or_else(PoisonError::into_inner);
        let after = change(&self.pins.ranges());
        let cost = self.pinned_cost(&after);
        self.space.pin(*granted, cost).map_err(|most| PinError::NoRoom {
            image: self.name.clone(),
            wanted: cost.saturating_sub(*granted),
            pinned: self.space.usage().pinned,
            most,
            limit: self.space.limit(),
        })?;
        if let Err(error) = self.pins.replace(after.clone()) {
            self.space.pin_anyway(cost, *granted);
            return Err(error.into());
        }
        *granted = cost;
        Ok(self.pinned(&after))
    }

    /// Has the space keep what was granted before a restart, also if that is more than it would grant now.
    pub(super) fn restore_pins(&self) {
        let mut granted = self.pins.granted.lock().unwrap_or_else(PoisonError::into_inner);
        let cost = self.pinned_cost(&self.pins.ranges());
        self.space.pin_anyway(std::mem::replace(&mut granted, cost), cost);
    }

    /// The space keeps nothing for pins any more.
    pub(super) fn let_go_of_pins(&mut self) {
        let granted = self.pins.granted.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.space.pin_anyway(std::mem::take(granted), 0);
    }

    /// Bytes of the disk that the chunks of `ranges` take at most.
    pub(super) fn pinned_cost(&self, ranges: &[ByteRange]) -> u64 {
        self.pinned_chunks(ranges).map(|chunk| self.segments.cost(chunk)).sum()
    }

    /// The chunks that ranges touch, each once, without those known to be zero.
    fn pinned_chunks(&self, ranges: &[ByteRange]) -> impl Iterator<Item = Chunk> {
        let mut next = 0;
        let whole = ranges.iter().flat_map(|range| self.geometry.chunks(*range)).filter(move |chunk| {
            let is_new = chunk.number() >= next;
            next = next.max(chunk.number() + 1);
            is_new
        });
        whole.filter(|chunk| self.states.get(*chunk) != State::Zero)
    }

    fn pinned(&self, ranges: &[ByteRange]) -> Pinned {
        let bytes = ranges.iter().map(|range| range.length()).sum();
        let is_missing = |chunk: &Chunk| matches!(self.states.get(*chunk), State::Absent | State::Leaving);
        let missing = |range: &ByteRange| {
            let parts = self.geometry.chunks(*range).filter(is_missing);
            parts.map(|chunk| self.geometry.range(chunk).intersect(*range).length()).sum::<u64>()
        };
        Pinned { bytes, here: bytes - ranges.iter().map(missing).sum::<u64>() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    version: u32,
    /// Starts and ends.
    ranges: Vec<(u64, u64)>,
}

impl Pins {
    /// The pins of the cache in `directory`; none, and an error, if they cannot be read. Blocks.
    pub(super) fn load(directory: &Path, image_size: u64) -> (Self, Option<String>) {
        let (ranges, error) = match fs::read(directory.join(NAME)) {
            Ok(bytes) => match decode(&bytes, image_size) {
                Some(ranges) => (ranges, None),
                None => (Vec::new(), Some("the file is damaged".to_owned())),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Vec::new(), None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        (Self { directory: directory.to_owned(), ranges: RwLock::new(ranges), granted: Mutex::default() }, error)
    }

    /// All of them, apart from each other and in order.
    pub(super) fn ranges(&self) -> Vec<ByteRange> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a byte of `range` is pinned.
    pub(super) fn touch(&self, range: ByteRange) -> bool {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let next = ranges.partition_point(|pinned| pinned.end() <= range.start());
        ranges.get(next).is_some_and(|pinned| pinned.start() < range.end())
    }

    /// Replaces all pins. When this has returned without an error they are durable, and only then do they count.
    /// Blocks.
    pub(super) fn replace(&self, ranges: Vec<ByteRange>) -> io::Result<()> {
        if ranges.len() > MOST {
            return Err(io::Error::other(format!("an image cannot have more than {MOST} pinned ranges")));
        }
        let (path, new_path) = (self.directory.join(NAME), self.directory.join(NEW_NAME));
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new_path)?;
        file.write_all(&encode(&ranges))?;
        file.sync_all()?;
        crate::telemetry::crash_point("pins written");
        fs::rename(&new_path, &path)?;
        fs::File::open(&self.directory)?.sync_all()?;
        *self.ranges.write().unwrap_or_else(PoisonError::into_inner) = ranges;
        Ok(())
    }
}

/// `ranges` and `more`, joined where they touch.
pub(super) fn union(ranges: &[ByteRange], more: &[ByteRange]) -> Vec<ByteRange> {
    merged(&[ranges, more].concat())
}

/// `ranges` without `less`.
pub(super) fn difference(ranges: &[ByteRange], less: &[ByteRange]) -> Vec<ByteRange> {
    let mut left = ranges.to_vec();
    for hole in less {
        let around = |range: ByteRange| {
            let before = ByteRange::between(range.start(), hole.start().clamp(range.start(), range.end()));
            let after = ByteRange::between(hole.end().clamp(range.start(), range.end()), range.end());
            [before, after]
        };
        left = left.into_iter().flat_map(around).filter(|range| !range.is_empty()).collect();
    }
    left
}

fn encode(ranges: &[ByteRange]) -> Vec<u8> {
    let ranges = ranges.iter().map(|range| (range.start(), range.end())).collect();
    seal(serde_json::to_string(&Form { version: 1, ranges }).expect("numbers can be written"))
}

fn decode(bytes: &[u8], image_size: u64) -> Option<Vec<ByteRange>> {
    let form: Form = serde_json::from_str(unseal(bytes)?).ok()?;
    let is_sound = form.version == 1
        && form.ranges.len() <= MOST
        && form.ranges.iter().all(|(start, end)| start < end && *end <= image_size);
    let ranges: Vec<_> =
        form.ranges.into_iter().filter(|_| is_sound).map(|(start, end)| ByteRange::between(start, end)).collect();
    is_sound.then(|| union(&ranges, &[]))
}

/// Takes arbitrary bytes as a file of pins.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    if let Some(ranges) = decode(data, 1 << 40) {
        assert_eq!(decode(&encode(&ranges), 1 << 40), Some(ranges));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Vec<ByteRange>> {
        let range = (0u64..60, 0u64..20).prop_map(|(start, length)| ByteRange::between(start, start + length));
        prop::collection::vec(range, 0..8)
    }

    fn bytes(ranges: &[ByteRange]) -> Vec<bool> {
        (0..100).map(|at| ranges.iter().any(|range| range.start() <= at && at < range.end())).collect()
    }

    proptest! {
        #[test]
        fn sets_of_ranges_agree_with_sets_of_bytes(one in ranges(), other in ranges(), start in 0u64..80, length in 1u64..20) {
            let both = union(&one, &other);
            let wanted: Vec<_> = bytes(&one).into_iter().zip(bytes(&other)).map(|(one, other)| one || other).collect();
            prop_assert_eq!(bytes(&both), wanted);
            prop_assert!(both.windows(2).all(|pair| pair[0].end() < pair[1].start()), "joined and in order");
            let rest = difference(&both, &other);
            let wanted: Vec<_> = bytes(&both).into_iter().zip(bytes(&other)).map(|(all, less)| all && !less).collect();
            prop_assert_eq!(bytes(&rest), wanted);
            let directory = tempfile::tempdir().unwrap();
            let (pins, _) = Pins::load(directory.path(), 100);
            pins.replace(both.clone()).unwrap();
            let range = ByteRange::between(start, start + length);
            prop_assert_eq!(pins.touch(range), bytes(&both)[usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap()].contains(&true));
            let (again, error) = Pins::load(directory.path(), 100);
            prop_assert_eq!((again.ranges(), error), (both, None));
        }

        #[test]
        fn no_flipped_bit_is_believed(bit in 0usize..300) {
            let mut file = encode(&[ByteRange::between(0, 4096), ByteRange::between(8192, 1_000_000)]);
            let bit = bit % (8 * file.len());
            file[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode(&file, 1 << 40), None);
        }
    }
}
