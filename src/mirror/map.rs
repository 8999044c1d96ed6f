//! The `map` file: which chunks are here, with the checksum of each. Encoding and decoding only.
//!
//! The file is a header of one block and then two slots for each page, all of 4096 bytes, little-endian.
//!
//! | header bytes | meaning |
//! | --- | --- |
//! | 0..8 | `HEADWMAP` |
//! | 8..12 | version, 1 |
//! | 12..16 | chunk size |
//! | 16..24 | image size |
//! | 24..40 | the id of this cache |
//! | 40 | 1 if the identity of the image is known, else 0 |
//! | 41..73 | the identity |
//! | 4092..4096 | CRC-32C of what comes before |
//!
//! | page bytes | meaning |
//! | --- | --- |
//! | 0..4 | CRC-32C of the rest of the slot |
//! | 4..8 | number of the page |
//! | 8..16 | sequence: one more with each writing of the page |
//! | 16..816 | for each of 800 chunks: 0 absent, 1 resident, 2 zero |
//! | 816..4016 | for each of 800 chunks: CRC-32C of its bytes if resident |
//!
//! **Crash rule.** A page is written to the slot that does not hold its newest version, so a write that is cut off
//! leaves the version before. A slot that is all zero was never written. A page with neither slot right is taken as
//! empty: its chunks are fetched again. A page is written only after the bytes of its chunks are durable, so the map
//! may lack a chunk that is there, and never names one that is not.

use thiserror::Error;

use super::chunks::{Chunk, Geometry, State, States, checksum};
use crate::export::{ImageId, NodeId};
pub use crate::manifest::CHUNK_SIZES;
use crate::units::to_usize;

/// The unit of writing.
pub(super) const BLOCK: usize = 4096;
/// Chunks in a page.
const ENTRIES: u64 = 800;

const MAGIC: &[u8; 8] = b"HEADWMAP";
const VERSION: u32 = 1;
const STATES_AT: usize = 16;
const CHECKSUMS_AT: usize = STATES_AT + 800;

/// What a map says of its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the image.
    pub image_size: u64,
    /// Bytes of a chunk: a power of two within [`CHUNK_SIZES`].
    pub chunk_size: u32,
    /// Names this cache.
    pub node: NodeId,
    /// What the image holds, if it was known when the cache was made.
    pub identity: Option<ImageId>,
}

/// Why a file is not a map that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// It was written by a newer version.
    #[error("it has version {0}, and this program knows version {VERSION}")]
    Version(u32),
    /// Its header is damaged.
    #[error("its header is damaged")]
    Damaged,
}

impl Header {
    pub(super) const fn geometry(&self) -> Geometry {
        Geometry::new(self.image_size, self.chunk_size)
    }

    pub(super) fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..8].copy_from_slice(MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&self.chunk_size.to_le_bytes());
        block[16..24].copy_from_slice(&self.image_size.to_le_bytes());
        block[24..40].copy_from_slice(&self.node.0);
        if let Some(identity) = self.identity {
            block[40] = 1;
            block[41..73].copy_from_slice(&identity.0);
        }
        let sum = checksum(&block[..BLOCK - 4]);
        block[BLOCK - 4..].copy_from_slice(&sum.to_le_bytes());
        block
    }

    pub(super) fn decode(block: &[u8]) -> Result<Self, HeaderError> {
        let block: &[u8; BLOCK] = block.try_into().map_err(|_| HeaderError::Damaged)?;
        if checksum(&block[..BLOCK - 4]) != u32_at(block, BLOCK - 4) {
            return Err(HeaderError::Damaged);
        }
        match u32_at(block, 8) {
            VERSION => {}
            other => return Err(HeaderError::Version(other)),
        }
        let header = Self {
            image_size: u64_at(block, 16),
            chunk_size: u32_at(block, 12),
            node: NodeId(array_at(block, 24)),
            identity: (block[40] == 1).then(|| ImageId(array_at(block, 41))),
        };
        let sound =
            &block[..8] == MAGIC && header.chunk_size.is_power_of_two() && CHUNK_SIZES.contains(&header.chunk_size);
        if sound { Ok(header) } else { Err(HeaderError::Damaged) }
    }
}

fn array_at<const N: usize>(block: &[u8; BLOCK], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&block[at..at + N]);
    array
}

fn u32_at(block: &[u8; BLOCK], at: usize) -> u32 {
    u32::from_le_bytes(array_at(block, at))
}

fn u64_at(block: &[u8; BLOCK], at: usize) -> u64 {
    u64::from_le_bytes(array_at(block, at))
}

/// The number of pages of an image.
pub(super) const fn pages(geometry: Geometry) -> u64 {
    geometry.count().div_ceil(ENTRIES)
}

/// The page that holds a chunk.
pub(super) const fn page_of(chunk: Chunk) -> u64 {
    chunk.number() / ENTRIES
}

/// The chunks that a page holds.
pub(super) fn chunks_of(geometry: Geometry, page: u64) -> impl Iterator<Item = Chunk> {
    (page * ENTRIES..(page + 1) * ENTRIES).map_while(move |number| geometry.chunk(number))
}

/// Where the slot is that a page is written to with this sequence.
pub(super) const fn slot_at(page: u64, sequence: u64) -> u64 {
    (1 + 2 * page + sequence % 2) * BLOCK as u64
}

/// The length of the file.
pub(super) const fn file_length(geometry: Geometry) -> u64 {
    (1 + 2 * pages(geometry)) * BLOCK as u64
}

/// The chunks of a page, with their places in it.
fn entries(geometry: Geometry, page: u64) -> impl Iterator<Item = (usize, Chunk)> {
    (0..ENTRIES).filter_map(move |place| Some((to_usize(place), geometry.chunk(page * ENTRIES + place)?)))
}

/// A page with what is durable now.
pub(super) fn encode_page(geometry: Geometry, states: &States, page: u64, sequence: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[4..8]
        .copy_from_slice(&u32::try_from(page).expect("2^32 pages are 12 PiB of the smallest chunks").to_le_bytes());
    block[8..16].copy_from_slice(&sequence.to_le_bytes());
    for (place, chunk) in entries(geometry, page) {
        match states.get(chunk) {
            State::Absent | State::Volatile | State::Leaving => {}
            State::Resident | State::Unverified => {
                block[STATES_AT + place] = 1;
                let at = CHECKSUMS_AT + 4 * place;
                block[at..at + 4].copy_from_slice(&states.checksum(chunk).to_le_bytes());
            }
            State::Zero => block[STATES_AT + place] = 2,
        }
    }
    let sum = checksum(&block[4..]);
    block[..4].copy_from_slice(&sum.to_le_bytes());
    block
}

/// What was found of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// It was never written.
    Nothing,
    /// Its newest version has this sequence.
    Version(u64),
    /// Something was there, and none of it is right.
    Damaged,
}

/// Takes over the newest right version of a page from its two slots.
pub(super) fn decode_page(geometry: Geometry, states: &States, page: u64, slots: &[u8]) -> Found {
    let mut newest: Option<(u64, &[u8; BLOCK])> = None;
    let mut is_blank = true;
    for slot in slots.chunks(BLOCK) {
        is_blank &= slot.iter().all(|byte| *byte == 0);
        let Ok(block) = <&[u8; BLOCK]>::try_from(slot) else { continue };
        let right = checksum(&block[4..]) == u32_at(block, 0) && u64::from(u32_at(block, 4)) == page;
        let sequence = u64_at(block, 8);
        if right && newest.is_none_or(|(last, _)| sequence > last) {
            newest = Some((sequence, block));
        }
    }
    let Some((sequence, block)) = newest else {
        return if is_blank { Found::Nothing } else { Found::Damaged };
    };
    for (place, chunk) in entries(geometry, page) {
        match block[STATES_AT + place] {
            1 => {
                states.set_checksum(chunk, u32_at(block, CHECKSUMS_AT + 4 * place));
                states.set(chunk, State::Unverified);
            }
            2 => states.set(chunk, State::Zero),
            _ => {}
        }
    }
    Found::Version(sequence)
}

/// Takes arbitrary bytes as a map: a header, then pages.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let (header, blocks) = data.split_at(data.len().min(BLOCK));
    // A header whose checksum is right is rare among arbitrary bytes, so the pages are read under one of ours too.
    let _ = Header::decode(header).map(|header| assert_eq!(Header::decode(&header.encode()), Ok(header)));
    let geometry = Geometry::new(10 << 20, 4096);
    let states = States::new(geometry);
    for (page, slots) in (0..).zip(blocks.chunks(2 * BLOCK)).take(to_usize(pages(geometry))) {
        if let Found::Version(sequence) = decode_page(geometry, &states, page, slots) {
            let again = encode_page(geometry, &states, page, sequence.wrapping_add(1));
            let copy = States::new(geometry);
            assert_eq!(decode_page(geometry, &copy, page, &again), Found::Version(sequence.wrapping_add(1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::ByteRange;
    use crate::units::to_u64;
    use proptest::prelude::*;

    const HEADER: Header =
        Header { image_size: 123_456_789, chunk_size: 65_536, node: NodeId([7; 16]), identity: Some(ImageId([9; 32])) };

    #[test]
    fn a_header_reads_back() {
        assert_eq!(Header::decode(&HEADER.encode()), Ok(HEADER));
        let unknown = Header { identity: None, ..HEADER };
        assert_eq!(Header::decode(&unknown.encode()), Ok(unknown));
    }

    #[test]
    fn a_header_that_is_not_ours_is_refused_with_its_reason() {
        assert_eq!(Header::decode(b""), Err(HeaderError::Damaged));
        assert_eq!(Header::decode(&[0; BLOCK]), Err(HeaderError::Damaged));
        assert_eq!(Header::decode(MAGIC), Err(HeaderError::Damaged));
        let mut newer = HEADER.encode();
        newer[8] = 2;
        assert_eq!(Header::decode(&newer), Err(HeaderError::Damaged), "a flipped bit is no newer version");
        let sum = checksum(&newer[..BLOCK - 4]);
        newer[BLOCK - 4..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::decode(&newer), Err(HeaderError::Version(2)));
        for byte in [0, 12, 20, 40, 60, 4000, 4095] {
            let mut damaged = HEADER.encode();
            damaged[byte] ^= 1;
            assert_eq!(Header::decode(&damaged), Err(HeaderError::Damaged), "byte {byte}");
        }
        let absurd = Header { chunk_size: 3, ..HEADER };
        assert_eq!(Header::decode(&absurd.encode()), Err(HeaderError::Damaged));
    }

    /// States with every kind of chunk in them, the same for the same seed.
    fn mixed(geometry: Geometry, seed: u64) -> States {
        let states = States::new(geometry);
        for chunk in geometry.chunks(ByteRange::between(0, geometry.size())) {
            let value = chunk.number().wrapping_mul(seed | 1) >> 3;
            let state =
                [State::Absent, State::Volatile, State::Resident, State::Unverified, State::Zero, State::Leaving];
            states.set_checksum(chunk, u32::try_from(value & 0xffff_ffff).unwrap());
            states.set(chunk, state[to_usize(value % 6)]);
        }
        states
    }

    /// What a restart makes of a state that was in memory when the page was written.
    fn after_restart(state: State) -> State {
        match state {
            State::Absent | State::Volatile | State::Leaving => State::Absent,
            State::Resident | State::Unverified => State::Unverified,
            State::Zero => State::Zero,
        }
    }

    #[test]
    fn only_what_is_durable_reads_back() {
        let geometry = Geometry::new(4096 * 2000 + 1, 4096);
        assert_eq!(pages(geometry), 3);
        let states = mixed(geometry, 0x9e37_79b9);
        let read = States::new(geometry);
        for page in 0..3 {
            let block = encode_page(geometry, &states, page, 5);
            assert_eq!(decode_page(geometry, &read, page, &block), Found::Version(5));
        }
        for chunk in geometry.chunks(ByteRange::between(0, geometry.size())) {
            assert_eq!(read.get(chunk), after_restart(states.get(chunk)), "{chunk:?}");
            if read.get(chunk) == State::Unverified {
                assert_eq!(read.checksum(chunk), states.checksum(chunk));
            }
        }
    }

    #[test]
    fn the_newer_slot_counts_if_it_is_right() {
        let geometry = Geometry::new(4096 * 10, 4096);
        let (old, new) = (mixed(geometry, 3), mixed(geometry, 11));
        let slots = |damage: Option<usize>| {
            let mut slots = [encode_page(geometry, &new, 0, 8), encode_page(geometry, &old, 0, 7)].concat();
            damage.into_iter().for_each(|byte| slots[byte] ^= 0x10);
            slots
        };
        let found = |slots: &[u8]| decode_page(geometry, &States::new(geometry), 0, slots);
        assert_eq!(found(&slots(None)), Found::Version(8));
        for byte in [0, 5, 9, 20, 900, 4095] {
            assert_eq!(found(&slots(Some(byte))), Found::Version(7), "byte {byte}");
            assert_eq!(found(&slots(Some(BLOCK + byte))), Found::Version(8), "byte {byte}");
        }
        assert_eq!(found(&[0; 2 * BLOCK]), Found::Nothing);
        assert_eq!(found(&[0; 100]), Found::Nothing);
        assert_eq!(found(&[1; 2 * BLOCK]), Found::Damaged);
        // A page of another place is not this page.
        assert_eq!(found(&encode_page(geometry, &new, 1, 8)), Found::Damaged);
    }

    #[test]
    fn slots_alternate_and_do_not_overlap() {
        let geometry = Geometry::new(4096 * 3000, 4096);
        let mut places: Vec<_> = (0..pages(geometry)).flat_map(|page| [slot_at(page, 4), slot_at(page, 5)]).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(to_u64(places.len()), 2 * pages(geometry));
        assert_eq!(places[0], BLOCK as u64);
        assert_eq!(places[places.len() - 1] + BLOCK as u64, file_length(geometry));
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_decoder(data in prop::collection::vec(any::<u8>(), 0..20_000)) {
            fuzz(&data);
        }

        #[test]
        fn no_flipped_bit_is_believed(seed: u64, bit in 0usize..8 * BLOCK) {
            let geometry = Geometry::new(4096 * 700, 4096);
            let mut block = encode_page(geometry, &mixed(geometry, seed), 0, 1);
            block[bit / 8] ^= 1 << (bit % 8);
            let states = States::new(geometry);
            prop_assert_eq!(decode_page(geometry, &states, 0, &block), Found::Damaged);
        }
    }
}
