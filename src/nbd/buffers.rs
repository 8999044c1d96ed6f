//! Buffers for the data of replies, used again and again.
//!
//! A fresh buffer costs more than the copy into it: the kernel clears each of its pages and maps it in, and what is
//! copied out of it next is not in the processor's caches. So buffers are kept, and the one that was given back last,
//! whose bytes are the warmest, is handed out first. They are not cleared in between: whoever hands bytes on has
//! filled all of them.
//!
//! A buffer comes back when the last reader of its bytes lets go of them, to the thread on which that happens. That is
//! nearly always the worker that received it.

use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};

use bytes::Bytes;

use crate::units::{KIB, MIB, to_usize};

/// Bytes that each thread keeps at most while nobody uses them.
const KEPT: usize = to_usize(8 * MIB);
/// Buffers are of this size or a doubling of it.
const SMALLEST: usize = to_usize(4 * KIB);
/// The sizes that are kept: up to 4 MiB, the largest chunk of a mirror.
const SIZES: usize = 11;

thread_local! {
    static SHELF: RefCell<Shelf> = RefCell::default();
}

/// Buffers that nobody uses.
#[derive(Debug, Default)]
struct Shelf {
    by_size: [Vec<Vec<u8>>; SIZES],
    bytes: usize,
}

impl Shelf {
    fn take(&mut self, size: usize) -> Option<Vec<u8>> {
        let buffer = self.by_size.get_mut(class(size))?.pop()?;
        self.bytes -= size;
        Some(buffer)
    }

    fn keep(&mut self, buffer: Vec<u8>) {
        let (size, class) = (buffer.len(), class(buffer.len()));
        if class >= SIZES {
            return;
        }
        if self.bytes + size > KEPT {
            // Most likely the sizes that are wanted have changed.
            *self = Self::default();
        }
        self.by_size[class].push(buffer);
        self.bytes += size;
    }
}

/// The place of a size, which is a doubling of [`SMALLEST`], in the shelf.
const fn class(size: usize) -> usize {
    (size / SMALLEST).trailing_zeros() as usize
}

/// A number of bytes to be filled.
#[derive(Default)]
pub(super) struct Buffer {
    /// All that there is, for the next user too.
    bytes: Vec<u8>,
    length: usize,
}

impl Buffer {
    /// `length` bytes, with anything in them.
    pub(super) fn of(length: usize) -> Self {
        let size = length.next_power_of_two().max(SMALLEST);
        let kept = SHELF.with_borrow_mut(|shelf| shelf.take(size));
        Self { bytes: kept.unwrap_or_else(|| vec![0; size]), length }
    }

    /// Makes the bytes readable by anybody. The buffer comes back when nobody needs them any more.
    pub(super) fn freeze(self) -> Bytes {
        if self.length == 0 { Bytes::new() } else { Bytes::from_owner(self) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if !bytes.is_empty() {
            // A thread that ends keeps nothing.
            let _ = SHELF.try_with(|shelf| shelf.borrow_mut().keep(bytes));
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> usize {
        SHELF.with_borrow(|shelf| {
            let bytes = shelf.by_size.iter().flatten().map(Vec::len).sum();
            assert_eq!(shelf.bytes, bytes, "the count is wrong");
            bytes
        })
    }

    #[test]
    fn a_buffer_comes_back_after_its_last_reader() {
        let bytes = Buffer::of(100_000).freeze();
        let place = bytes.as_ptr();
        let (first, second) = (bytes.slice(..10), bytes.slice(50..));
        drop((bytes, first));
        assert_eq!(kept(), 0, "somebody still reads it");
        drop(second);
        assert_eq!(kept(), 128 << 10);
        let again = Buffer::of(70_000);
        assert_eq!((again.as_ptr(), again.len(), kept()), (place, 70_000, 0));
    }

    #[test]
    fn what_is_kept_is_bounded_whatever_the_sizes() {
        let sizes = [1, 4096, 4097, 65_536, 1 << 20, 4 << 20, (4 << 20) + 1, 32 << 20];
        for length in sizes {
            let many: Vec<_> = (0..100).map(|_| Buffer::of(length)).collect();
            assert!(many.iter().all(|buffer| buffer.len() == length));
            drop(many);
            assert!(kept() <= KEPT);
            let size = length.next_power_of_two().max(SMALLEST);
            assert_eq!(kept() >= size, size <= 4 << 20, "the sizes in use are those that are kept");
        }
    }

    #[test]
    fn no_bytes_need_no_buffer() {
        drop(Buffer::of(0).freeze());
        drop(Buffer::default());
        assert_eq!(kept(), 4096, "of the first; the second had none");
    }
}
