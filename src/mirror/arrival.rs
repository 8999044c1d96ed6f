//! What came over, cut into chunks, and what of it one write can store.

use bytes::BytesMut;

use super::chunks::{Chunk, Geometry, checksum};
use super::flight::{ChunkData, Slice};
use crate::error::{Error, ErrorKind, Result};
use crate::export::Piece;
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// A chunk that came over.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) chunk: Chunk,
    pub(super) data: ChunkData,
    /// Whether it is to be stored.
    pub(super) is_kept: bool,
}

impl Arrival {
    pub(super) fn checksum(&self) -> u32 {
        match &self.data {
            ChunkData::Bytes(bytes) => checksum(bytes),
            ChunkData::Zero => 0,
        }
    }
}

/// Cuts the pieces of `range` into its chunks, none of which is to be stored yet.
pub(super) fn split(
    geometry: Geometry,
    chunks: impl Iterator<Item = Chunk>,
    range: ByteRange,
    pieces: &[Piece],
) -> Result<Vec<Arrival>> {
    let total: u64 = pieces.iter().map(Piece::length).sum();
    if total != range.length() {
        return Err(Error::new(ErrorKind::Io, format!("{total} bytes came where {} were asked for", range.length())));
    }
    let mut cursor = Cursor { pieces, index: 0, at: 0 };
    Ok(chunks
        .map(|chunk| Arrival { chunk, data: cursor.take(geometry.range(chunk).length()), is_kept: false })
        .collect())
}

/// A place in a list of pieces.
struct Cursor<'a> {
    pieces: &'a [Piece],
    index: usize,
    /// Bytes of the current piece that are used up.
    at: u64,
}

impl Cursor<'_> {
    /// The next `length` bytes, where they are if they are all from one piece.
    fn take(&mut self, length: u64) -> ChunkData {
        if let Some(piece) = self.pieces.get(self.index)
            && piece.length() - self.at >= length
        {
            let start = to_usize(self.at);
            self.advance(length);
            return match piece {
                Piece::Hole(_) => ChunkData::Zero,
                Piece::Data(bytes) => {
                    ChunkData::of(Slice { whole: bytes.clone(), range: start..start + to_usize(length) })
                }
            };
        }
        let mut bytes = BytesMut::zeroed(to_usize(length));
        let mut filled = 0;
        while filled < bytes.len()
            && let Some(piece) = self.pieces.get(self.index)
        {
            let count = to_usize((piece.length() - self.at).min(to_u64(bytes.len() - filled)));
            if let Piece::Data(data) = piece {
                let start = to_usize(self.at);
                bytes[filled..filled + count].copy_from_slice(&data[start..start + count]);
            }
            filled += count;
            self.advance(to_u64(count));
        }
        ChunkData::of(bytes.freeze().into())
    }

    fn advance(&mut self, length: u64) {
        self.at += length;
        if self.pieces.get(self.index).is_some_and(|piece| piece.length() == self.at) {
            (self.index, self.at) = (self.index + 1, 0);
        }
    }
}

/// Neighbouring chunks that one write can store.
#[derive(Debug)]
pub(super) struct Write<'a> {
    pub(super) arrivals: &'a [Arrival],
    pub(super) slice: Slice,
}

/// Groups what is to be stored by whose bytes lie side by side in one piece. `arrivals` are neighbours.
pub(super) fn contiguous(arrivals: &[Arrival]) -> impl Iterator<Item = Write<'_>> {
    let together = |left: &Arrival, right: &Arrival| match (&left.data, &right.data) {
        (ChunkData::Bytes(left), ChunkData::Bytes(right)) => left.clone().join(right),
        _ => false,
    };
    let together = move |left: &Arrival, right: &Arrival| left.is_kept && right.is_kept && together(left, right);
    arrivals.chunk_by(together).filter(|group| group.iter().all(|arrival| arrival.is_kept)).filter_map(|group| {
        match (&group.first()?.data, &group.last()?.data) {
            (ChunkData::Bytes(first), ChunkData::Bytes(last)) => {
                let slice = Slice { whole: first.whole.clone(), range: first.range.start..last.range.end };
                Some(Write { arrivals: group, slice })
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::is_zero;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn chunks(geometry: Geometry) -> impl Iterator<Item = Chunk> {
        geometry.chunks(ByteRange::between(0, geometry.size()))
    }

    proptest! {
        #[test]
        fn any_pieces_are_cut_into_chunks_and_written_where_they_belong(
            lengths in prop::collection::vec((1u64..90, any::<bool>(), 0u8..3), 1..20),
        ) {
            let mut contents = Vec::new();
            let mut pieces = Vec::new();
            for (length, hole, byte) in lengths {
                contents.resize(contents.len() + to_usize(length), if hole { 0 } else { byte });
                let data = Bytes::from(vec![byte; to_usize(length)]);
                pieces.push(if hole { Piece::Hole(length) } else { Piece::Data(data) });
            }
            let geometry = Geometry::new(to_u64(contents.len()), 32);
            let whole = ByteRange::between(0, geometry.size());
            let mut arrivals = split(geometry, chunks(geometry), whole, &pieces).unwrap();
            arrivals.iter_mut().for_each(|arrival| arrival.is_kept = true);
            let mut written = vec![0; contents.len()];
            let mut stored = 0;
            for write in contiguous(&arrivals) {
                let start = to_usize(geometry.range(write.arrivals[0].chunk).start());
                written[start..start + write.slice.len()].copy_from_slice(&write.slice);
                stored += write.arrivals.len();
            }
            prop_assert_eq!(&written, &contents);
            let with_bytes = arrivals.iter().filter(|arrival| arrival.data != ChunkData::Zero);
            prop_assert_eq!(stored, with_bytes.count(), "zero chunks are known, not stored");
            for arrival in &arrivals {
                let range = geometry.range(arrival.chunk);
                let expected = &contents[to_usize(range.start())..to_usize(range.end())];
                match &arrival.data {
                    ChunkData::Zero => prop_assert!(is_zero(expected)),
                    ChunkData::Bytes(bytes) => {
                        prop_assert_eq!(&bytes[..], expected);
                        prop_assert_eq!(arrival.checksum(), checksum(expected));
                        prop_assert!(!is_zero(expected));
                    }
                }
            }
        }
    }

    #[test]
    fn a_run_that_came_whole_is_one_write() {
        let geometry = Geometry::new(1000, 64);
        let pieces = [Piece::Data(Bytes::from(vec![1; 1000]))];
        let mut arrivals = split(geometry, chunks(geometry), ByteRange::between(0, 1000), &pieces).unwrap();
        arrivals.iter_mut().for_each(|arrival| arrival.is_kept = true);
        assert_eq!(contiguous(&arrivals).count(), 1);
        arrivals[7].is_kept = false;
        let stored: Vec<_> = contiguous(&arrivals).map(|write| write.arrivals.len()).collect();
        assert_eq!(stored, [7, 8], "what is not kept is not written");
    }

    #[test]
    fn too_few_bytes_are_not_taken_for_zeroes() {
        let geometry = Geometry::new(100, 64);
        let pieces = [Piece::Data(Bytes::from(vec![1; 99]))];
        let error = split(geometry, chunks(geometry), ByteRange::between(0, 100), &pieces).unwrap_err();
        assert_eq!(error.to_string(), "99 bytes came where 100 were asked for");
    }
}
