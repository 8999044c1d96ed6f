//! Replies on their way to the socket.
//!
//! Small things (headers, short reads) are copied into one buffer; large ones are queued as they are and leave by the
//! same vectored send. A reply that is one frame on the wire but too large to hold is streamed by an exclusive
//! writer; whatever others want to send meanwhile is held back until it has finished.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Poll, Waker};

use bytes::{Buf, Bytes, BytesMut};

use crate::net::Stream;

/// Data up to this size is copied behind its header instead of being queued by itself.
const COPIED: usize = 4096;
/// Streams pause while more than this waits to be sent.
pub(super) const HIGH_WATER: usize = 1 << 20;
/// Buffers in one send; the kernel takes 1024.
const VECTOR: usize = 64;
/// Shared data up to this size is copied when it has to wait.
const LET_GO: usize = 64 << 10;
/// Capacity that an idle connection may keep.
const KEPT: usize = 64 << 10;

/// What is to be sent on one connection.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    inner: RefCell<Inner>,
    /// Bytes that can be sent: the queue and the tail.
    sendable: Cell<usize>,
    /// Bytes that are held back.
    held: Cell<usize>,
}

#[derive(Debug, Default)]
struct Inner {
    queue: VecDeque<Bytes>,
    /// Comes after everything in the queue.
    tail: BytesMut,
    /// What others want to send while somebody streams; `None` when nobody does.
    held: Option<Vec<Bytes>>,
    /// Streams that wait for room, or for the stream before them to end.
    waiting: Vec<Waker>,
}

/// A whole reply, or a whole chunk of one: nothing else may come between its parts.
#[derive(Debug, Default)]
pub(super) struct Frame {
    parts: Vec<Bytes>,
    tail: BytesMut,
}

impl Frame {
    /// Where headers are written.
    pub(super) fn header(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Adds data, without a copy if it is worth that.
    pub(super) fn data(&mut self, data: Bytes) {
        if data.len() <= COPIED {
            return self.tail.extend_from_slice(&data);
        }
        if !self.tail.is_empty() {
            self.parts.push(self.tail.split().freeze());
        }
        self.parts.push(data);
    }

    fn into_parts(mut self) -> impl Iterator<Item = Bytes> {
        let tail = self.tail.split().freeze();
        self.parts.into_iter().chain((!tail.is_empty()).then_some(tail))
    }
}

impl Outbox {
    /// Bytes that wait to be sent, held back or not.
    pub(super) fn queued(&self) -> usize {
        self.sendable.get() + self.held.get()
    }

    /// Lets `write` append to what is sent next, if nobody streams. `write` says whether what it appended shall
    /// stay; if not, it is taken back.
    pub(super) fn append(&self, write: impl FnOnce(&mut BytesMut) -> bool) -> bool {
        let inner = &mut *self.inner.borrow_mut();
        if inner.held.is_some() {
            return false;
        }
        let before = inner.tail.len();
        let stays = write(&mut inner.tail);
        if !stays {
            inner.tail.truncate(before);
        }
        add(&self.sendable, inner.tail.len() - before);
        stays
    }

    /// Queues a frame.
    pub(super) fn send(&self, frame: Frame) {
        let inner = &mut *self.inner.borrow_mut();
        for part in frame.into_parts() {
            match &mut inner.held {
                Some(held) => {
                    add(&self.held, part.len());
                    held.push(part);
                }
                None => {
                    add(&self.sendable, part.len());
                    inner.push(part);
                }
            }
        }
    }

    /// Waits until there is room for more. For senders that can wait; replies that are complete are sent at once,
    /// because the connection takes no new requests while the outbox is full.
    pub(super) async fn room(&self) {
        self.wait_until(|| self.queued() < HIGH_WATER).await;
    }

    async fn wait_until(&self, condition: impl Fn() -> bool) {
        poll_fn(|context| {
            if condition() {
                return Poll::Ready(());
            }
            self.inner.borrow_mut().waiting.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Waits for its turn and begins to stream one frame. Everybody else is held back until the stream is dropped.
    pub(super) async fn stream(&self) -> Streaming<'_> {
        self.wait_until(|| self.inner.borrow().held.is_none()).await;
        self.inner.borrow_mut().held = Some(Vec::new());
        Streaming { outbox: self }
    }

    /// Sends as much as the socket takes now.
    pub(super) fn flush(&self, socket: &Stream) -> io::Result<()> {
        let mut inner = self.inner.borrow_mut();
        let before = self.sendable.get();
        while !inner.is_empty() {
            let sent = {
                let mut slices = [IoSlice::new(&[]); VECTOR];
                let count = inner.slices(&mut slices);
                socket.try_write_vectored(&slices[..count])
            };
            match sent {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    inner.advance(sent);
                    self.sendable.set(self.sendable.get() - sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    inner.let_go();
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if self.queued() == 0 && inner.tail.capacity() > KEPT {
            inner.tail = BytesMut::new();
        }
        let waiting = if self.sendable.get() < before { std::mem::take(&mut inner.waiting) } else { Vec::new() };
        drop(inner);
        waiting.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Whether the socket could take something now. While somebody streams, what is held back does not count.
    pub(super) fn has_something_to_send(&self) -> bool {
        !self.inner.borrow().is_empty()
    }
}

fn add(counter: &Cell<usize>, bytes: usize) {
    counter.set(counter.get() + bytes);
}

impl Inner {
    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.tail.is_empty()
    }

    fn push(&mut self, part: Bytes) {
        if part.len() <= COPIED {
            return self.tail.extend_from_slice(&part);
        }
        if !self.tail.is_empty() {
            self.queue.push_back(self.tail.split().freeze());
        }
        self.queue.push_back(part);
    }

    /// Copies what is a small part of something larger (a fetch of many chunks), which would be kept in memory for as
    /// long as the client does not read.
    fn let_go(&mut self) {
        for part in self.queue.iter_mut().filter(|part| part.len() <= LET_GO && !part.is_unique()) {
            *part = Bytes::copy_from_slice(part);
        }
    }

    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; VECTOR]) -> usize {
        let parts = self.queue.iter().map(|part| &part[..]).chain((!self.tail.is_empty()).then_some(&self.tail[..]));
        let mut count = 0;
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(part) = self.queue.front_mut() {
            if part.len() > sent {
                return part.advance(sent);
            }
            sent -= part.len();
            self.queue.pop_front();
        }
        if sent == self.tail.len() {
            // Keeps the capacity for the next batch.
            self.tail.clear();
        } else {
            self.tail.advance(sent);
        }
    }
}

/// The right to send one frame in parts.
#[derive(Debug)]
pub(super) struct Streaming<'a> {
    outbox: &'a Outbox,
}

impl Streaming<'_> {
    /// Queues a part, waiting for room first.
    pub(super) async fn send(&self, part: Bytes) {
        // What is held back waits for this stream, so this stream must not wait for it.
        self.outbox.wait_until(|| self.outbox.sendable.get() < HIGH_WATER).await;
        add(&self.outbox.sendable, part.len());
        self.outbox.inner.borrow_mut().push(part);
    }
}

impl Drop for Streaming<'_> {
    fn drop(&mut self) {
        let mut inner = self.outbox.inner.borrow_mut();
        for part in inner.held.take().unwrap_or_default() {
            inner.push(part);
        }
        add(&self.outbox.sendable, self.outbox.held.take());
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::poll;
    use std::pin::pin;

    /// What would be sent, in order.
    fn contents(outbox: &Outbox) -> Vec<u8> {
        let inner = outbox.inner.borrow();
        inner.queue.iter().flat_map(|part| part.iter().copied()).chain(inner.tail.iter().copied()).collect()
    }

    fn frame(header: &[u8], data: Bytes) -> Frame {
        let mut frame = Frame::default();
        frame.header().extend_from_slice(header);
        frame.data(data);
        frame
    }

    #[test]
    fn order_is_kept_across_copied_and_queued_parts() {
        let outbox = Outbox::default();
        let large = Bytes::from(vec![b'L'; COPIED + 1]);
        assert!(outbox.append(|tail| {
            tail.extend_from_slice(b"a");
            true
        }));
        outbox.send(frame(b"b", large.clone()));
        outbox.send(frame(b"c", Bytes::from_static(b"small")));
        assert!(!outbox.append(|tail| {
            tail.extend_from_slice(b"taken back");
            false
        }));
        let expected = [b"ab", &large[..], b"csmall"].concat();
        assert_eq!(contents(&outbox), expected);
        assert_eq!(outbox.queued(), expected.len());
        let mut inner = outbox.inner.borrow_mut();
        inner.advance(3);
        inner.advance(COPIED + 1);
        drop(inner);
        assert_eq!(contents(&outbox), b"small");
    }

    #[tokio::test]
    async fn a_stream_is_not_interrupted_and_nobody_is_forgotten() {
        let outbox = Outbox::default();
        let stream = outbox.stream().await;
        stream.send(Bytes::from_static(b"one ")).await;
        outbox.send(frame(b"other", Bytes::new()));
        assert!(!outbox.append(|_| true), "an inline reply came into a stream");
        let mut second = pin!(outbox.stream());
        assert!(poll!(&mut second).is_pending());
        stream.send(Bytes::from_static(b"two ")).await;
        assert_eq!(contents(&outbox), b"one two ");
        drop(stream);
        assert_eq!(contents(&outbox), b"one two other");
        assert!(poll!(&mut second).is_ready());
    }

    #[tokio::test]
    async fn a_stream_does_not_wait_for_what_waits_for_it() {
        let outbox = Outbox::default();
        let stream = outbox.stream().await;
        outbox.send(frame(b"held", Bytes::from(vec![0; HIGH_WATER])));
        let mut room = pin!(outbox.room());
        assert!(poll!(&mut room).is_pending());
        assert!(poll!(pin!(stream.send(Bytes::from_static(b"x")))).is_ready());
    }

    #[tokio::test]
    async fn a_stream_waits_for_room() {
        let outbox = Outbox::default();
        let stream = outbox.stream().await;
        stream.send(Bytes::from(vec![0; HIGH_WATER])).await;
        let mut next = pin!(stream.send(Bytes::from_static(b"x")));
        assert!(poll!(&mut next).is_pending());
        outbox.inner.borrow_mut().advance(1);
        outbox.sendable.set(HIGH_WATER - 1);
        assert!(poll!(&mut next).is_ready());
    }
}
