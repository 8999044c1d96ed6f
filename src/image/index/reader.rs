//! From the bytes of an image to the digests of its chunks, block by block.

use std::io;
use std::sync::Arc;

use tokio::runtime::{Builder, LocalOptions, LocalRuntime};

use super::pace::Pace;
use crate::disk::{self, Attached, File, Preference, Span};
use crate::export::{Piece, SharedExport, append};
use crate::image::Image;
use crate::image::seal::read_exact_at;
use crate::manifest::{ChunkHasher, Digest};
use crate::ranges::ByteRange;
use crate::units::{KIB, MIB, to_usize};

/// What is read at once: small enough to be in the core's own cache when it is hashed.
const BUFFER: u64 = 256 * KIB;

/// What is asked of an export at once.
const REQUEST: u64 = MIB;

/// Whatever gives digests, for one thread.
pub(super) trait Reader {
    /// Appends the digests of the chunks of `block`, which begins with one, and tells how many bytes it read.
    fn digests(&mut self, block: ByteRange, pace: &Pace<'_>, output: &mut Vec<u8>) -> io::Result<u64>;
}

/// Reads `image`, whose contents are all in `file`.
pub(super) fn reader_of(image: &Image, file: &Arc<File>, chunk_size: u32) -> io::Result<Box<dyn Reader>> {
    if image.is_raw {
        return Ok(Box::new(RawReader::new(Arc::clone(file), chunk_size)));
    }
    Ok(Box::new(ExportReader::new(SharedExport::clone(&image.export), chunk_size)?))
}

/// Reads a file that is the image, leaving out its holes.
#[derive(Debug)]
struct RawReader {
    file: Arc<File>,
    chunk_size: u64,
    buffer: Vec<u8>,
}

impl RawReader {
    fn new(file: Arc<File>, chunk_size: u32) -> Self {
        Self { file, chunk_size: u64::from(chunk_size), buffer: vec![0; to_usize(BUFFER)] }
    }

    /// Appends the digests of the chunks of `range`: of several if they fit the buffer together, else of one.
    fn read(&mut self, range: ByteRange, pace: &Pace<'_>, output: &mut Vec<u8>) -> io::Result<()> {
        let mut chunk = ChunkHasher::new();
        for part in range.pieces(BUFFER) {
            pace.admit(part.length())?;
            let bytes = &mut self.buffer[..to_usize(part.length())];
            read_exact_at(&self.file, bytes, part.start())?;
            if self.chunk_size > BUFFER {
                chunk.update(bytes);
                continue;
            }
            push_digests(bytes, self.chunk_size, output);
        }
        if self.chunk_size > BUFFER && !range.is_empty() {
            output.extend_from_slice(&chunk.finish().0);
        }
        Ok(())
    }
}

impl Reader for RawReader {
    fn digests(&mut self, block: ByteRange, pace: &Pace<'_>, output: &mut Vec<u8>) -> io::Result<u64> {
        let spans = self.file.spans(block, usize::MAX)?;
        let mut bytes = 0;
        // Chunks of data that follow each other and fit the buffer.
        let mut together = ByteRange::between(block.start(), block.start());
        for chunk in block.pieces(self.chunk_size) {
            let is_hole = is_hole(&spans, chunk);
            if is_hole || together.length() + chunk.length() > BUFFER {
                self.read(together, pace, output)?;
                together = ByteRange::between(chunk.start(), chunk.start());
            }
            if is_hole {
                output.extend_from_slice(&Digest::ZERO.0);
                together = ByteRange::between(chunk.end(), chunk.end());
            } else {
                together = ByteRange::between(together.start(), chunk.end());
                bytes += chunk.length();
            }
        }
        self.read(together, pace, output)?;
        Ok(bytes)
    }
}

/// Whether `range` lies in one of the holes; `spans` are in order.
fn is_hole(spans: &[Span], range: ByteRange) -> bool {
    let first = spans.partition_point(|span| span.range.end() <= range.start());
    spans.get(first).is_some_and(|span| span.is_hole && span.range.end() >= range.end())
}

fn push_digests(bytes: &[u8], chunk_size: u64, output: &mut Vec<u8>) {
    for chunk in bytes.chunks(to_usize(chunk_size)) {
        output.extend_from_slice(&Digest::of(chunk).0);
    }
}

/// Reads an image through its export, for formats that are no plain bytes.
struct ExportReader {
    export: SharedExport,
    chunk_size: u64,
    buffer: Vec<u8>,
    // Before the runtime, whose it is.
    _attached: Attached,
    runtime: LocalRuntime,
}

impl ExportReader {
    fn new(export: SharedExport, chunk_size: u32) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        let attached = runtime.block_on(async { disk::attach(Preference::Threads) })?;
        Ok(Self { export, chunk_size: u64::from(chunk_size), buffer: Vec::new(), _attached: attached, runtime })
    }
}

impl Reader for ExportReader {
    fn digests(&mut self, block: ByteRange, pace: &Pace<'_>, output: &mut Vec<u8>) -> io::Result<u64> {
        let mut read = 0;
        for range in block.pieces(REQUEST.max(self.chunk_size)) {
            let pieces =
                self.runtime.block_on(self.export.read(range)).map_err(|error| io::Error::other(error.chain()))?;
            if let [Piece::Hole(_)] = &pieces[..] {
                let chunks = to_usize(range.length().div_ceil(self.chunk_size));
                (0..chunks).for_each(|_| output.extend_from_slice(&Digest::ZERO.0));
                pace.admit(0)?;
                continue;
            }
            self.buffer.clear();
            append(&pieces, &mut self.buffer);
            let data = pieces.iter().filter(|piece| matches!(piece, Piece::Data(_)));
            read += data.map(Piece::length).sum::<u64>();
            push_digests(&self.buffer, self.chunk_size, output);
            pace.admit(range.length())?;
        }
        Ok(read)
    }
}
