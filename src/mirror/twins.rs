//! Chunks with the same bytes, in one image or several: where the bytes of a digest are.
//!
//! Only chunks on this disk are in the table, one for each digest: some 40 bytes of memory a chunk of 64 KiB. It may
//! lag behind: whoever finds a chunk here holds its bytes against the digest, as with any other source.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A chunk of one of the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The image's number in its [`Space`](super::Space).
    pub(super) image: u32,
    /// The chunk's number in the image.
    pub(super) chunk: u64,
}

#[derive(Debug, Default)]
pub(super) struct Twins {
    places: Mutex<HashMap<u128, Place>>,
}

impl Twins {
    fn places(&self) -> MutexGuard<'_, HashMap<u128, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the bytes of `key` are at `place`.
    pub(super) fn add(&self, key: u128, place: Place) {
        self.places().insert(key, place);
    }

    /// Where the bytes of `key` may be.
    pub(super) fn find(&self, key: u128) -> Option<Place> {
        self.places().get(&key).copied()
    }

    /// Forgets that the bytes of `key` are at `place`.
    pub(super) fn remove(&self, key: u128, place: Place) {
        let mut places = self.places();
        if places.get(&key) == Some(&place) {
            places.remove(&key);
        }
    }

    /// Forgets all of one image.
    pub(super) fn remove_image(&self, image: u32) {
        self.places().retain(|_, place| place.image != image);
    }
}
