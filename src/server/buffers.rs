//! Buffers that the connections of one worker share.
//!
//! A connection holds one while it has something to receive or to send, and gives it back when that is done. So a
//! busy connection always gets memory that is warm and mapped, and an idle one has none.

use std::cell::RefCell;

use bytes::BytesMut;

/// Room in each: a batch of replies and one reply more that is read inline.
pub(super) const ROOM: usize = 544 << 10;
/// Buffers that a worker keeps.
const KEPT: usize = 16;

thread_local! {
    static SPARE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Makes sure that `buffer` has memory.
pub(super) fn lend(buffer: &mut BytesMut) {
    if buffer.capacity() == 0 {
        *buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        // Also takes back what was split off, if nobody has it any more.
        buffer.reserve(ROOM);
    }
}

/// Takes the memory of `buffer`, which is left empty.
pub(super) fn give_back(buffer: &mut BytesMut) {
    let mut buffer = std::mem::take(buffer);
    if buffer.capacity() == 0 {
        return;
    }
    buffer.clear();
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < KEPT {
            spare.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_and_is_bounded() {
        let mut first = BytesMut::new();
        lend(&mut first);
        assert!(first.capacity() >= ROOM);
        first.extend_from_slice(b"something");
        let address = first.as_ptr();
        give_back(&mut first);
        assert_eq!(first.capacity(), 0);
        let mut second = BytesMut::new();
        lend(&mut second);
        assert!(second.is_empty());
        assert_eq!(second.as_ptr(), address);
        for _ in 0..2 * KEPT {
            give_back(&mut BytesMut::with_capacity(ROOM));
        }
        assert_eq!(SPARE.with_borrow(Vec::len), KEPT);
    }

    #[test]
    fn what_was_split_off_is_not_overwritten() {
        let mut buffer = BytesMut::new();
        lend(&mut buffer);
        buffer.extend_from_slice(b"sent later");
        let part = buffer.split().freeze();
        give_back(&mut buffer);
        lend(&mut buffer);
        assert!(buffer.capacity() >= ROOM);
        buffer.resize(ROOM, b'x');
        assert_eq!(&part[..], b"sent later");
    }
}
