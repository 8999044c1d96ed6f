//! Replies on their way to the socket.
//!
//! Small things (headers, short reads) are copied into one buffer; large ones are queued as they are and leave by the
//! same vectored send; parts of files go to the socket without passing through here. A reply that is one frame on the
//! wire but too large to hold is streamed by an exclusive writer; whatever others want to send meanwhile is held back
//! until it has finished.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::rc::Rc;
use std::task::{Poll, Waker};

use bytes::{Buf, Bytes, BytesMut};

use super::buffers;
use crate::export::FileRange;
use crate::net::Stream;
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// Data up to this size is copied behind its header instead of being queued by itself.
const COPIED: usize = 4096;
/// Streams pause while more than this waits to be sent.
pub(super) const HIGH_WATER: usize = 1 << 20;
/// Buffers in one send; the kernel takes 1024.
const VECTOR: usize = 64;
/// Shared data up to this size is copied when it has to wait.
const LET_GO: usize = 64 << 10;

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
    queue: VecDeque<Part>,
    /// Comes after everything in the queue.
    tail: BytesMut,
    /// What others want to send while somebody streams; `None` when nobody does.
    held: Option<Vec<Part>>,
    /// Streams that wait for room, or for the stream before them to end.
    waiting: Vec<Waker>,
    /// The front of the queue is being read from disk.
    is_thawing: bool,
}

/// Something that is sent as it is.
#[derive(Debug)]
pub(super) enum Part {
    Bytes(Bytes),
    File(FilePart),
}

/// A stretch of a file.
#[derive(Debug)]
pub(super) struct FilePart {
    pub(super) place: FileRange,
    /// Whether it was in memory a moment ago. The disk must not keep a whole worker waiting.
    is_warm: bool,
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::File(part) => to_usize(part.place.range.length()),
        }
    }
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

    /// Whether all has been sent that can be sent.
    pub(super) fn is_clear(&self) -> bool {
        self.inner.borrow().is_empty()
    }

    /// Whether somebody streams a frame.
    pub(super) fn is_streaming(&self) -> bool {
        self.inner.borrow().held.is_some()
    }

    /// Lets `write` append to what is sent next, if nobody streams. `write` says whether what it appended shall
    /// stay; if not, it is taken back.
    pub(super) fn append(&self, write: impl FnOnce(&mut BytesMut) -> bool) -> bool {
        !self.is_streaming() && self.append_now(write)
    }

    fn append_now(&self, write: impl FnOnce(&mut BytesMut) -> bool) -> bool {
        let inner = &mut *self.inner.borrow_mut();
        buffers::lend(&mut inner.tail);
        let before = inner.tail.len();
        let stays = write(&mut inner.tail);
        if !stays {
            inner.tail.truncate(before);
        }
        add(&self.sendable, inner.tail.len() - before);
        stays
    }

    /// Queues a stretch of a file behind what was appended before.
    fn push_file(&self, place: FileRange) {
        let part = Part::File(FilePart { place, is_warm: true });
        add(&self.sendable, part.len());
        self.inner.borrow_mut().push(part);
    }

    /// Queues a frame: what `header` writes, and a stretch of a file that is in memory now. Not while somebody streams.
    pub(super) fn send_file(&self, header: impl FnOnce(&mut BytesMut), place: FileRange) {
        let appended = self.append(|tail| {
            header(tail);
            true
        });
        assert!(appended, "a stream must not be interrupted");
        self.push_file(place);
    }

    /// Queues a frame.
    pub(super) fn send(&self, frame: Frame) {
        let inner = &mut *self.inner.borrow_mut();
        for part in frame.into_parts() {
            match &mut inner.held {
                Some(held) => {
                    add(&self.held, part.len());
                    held.push(Part::Bytes(part));
                }
                None => {
                    add(&self.sendable, part.len());
                    inner.push(Part::Bytes(part));
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
    pub(super) async fn stream(self: &Rc<Self>) -> Streaming {
        self.wait_until(|| !self.is_streaming()).await;
        self.begin_stream()
    }

    /// Begins to stream one frame, if nobody else does.
    pub(super) fn try_stream(self: &Rc<Self>) -> Option<Streaming> {
        (!self.is_streaming()).then(|| self.begin_stream())
    }

    fn begin_stream(self: &Rc<Self>) -> Streaming {
        self.inner.borrow_mut().held = Some(Vec::new());
        Streaming { outbox: Rc::clone(self) }
    }

    /// Sends as much as the socket takes now. What comes back must be read first: it has left the memory since it was
    /// queued. Give it to [`Self::thaw`].
    pub(super) fn flush(&self, socket: &Stream) -> io::Result<Option<FileRange>> {
        let mut inner = self.inner.borrow_mut();
        let before = self.sendable.get();
        let mut frozen = None;
        while !inner.is_empty() && !inner.is_thawing {
            match inner.send_front(socket) {
                Ok(Sent::Bytes(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(Sent::Bytes(sent)) => {
                    inner.advance(sent);
                    self.sendable.set(self.sendable.get() - sent);
                }
                Ok(Sent::NotInMemory(place)) => {
                    inner.is_thawing = true;
                    frozen = Some(place);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    inner.let_go();
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if inner.is_empty() {
            buffers::give_back(&mut inner.tail);
        }
        let waiting = if self.sendable.get() < before { std::mem::take(&mut inner.waiting) } else { Vec::new() };
        drop(inner);
        waiting.into_iter().for_each(Waker::wake);
        Ok(frozen)
    }

    /// Takes out all that waits to be sent: what comes before the rest of a frame that somebody streams, and what comes
    /// behind it.
    pub(super) fn take(&self) -> (Vec<Part>, Vec<Part>) {
        let mut inner = self.inner.borrow_mut();
        let tail = inner.tail.split().freeze();
        let before = inner.queue.drain(..).chain((!tail.is_empty()).then_some(Part::Bytes(tail))).collect();
        let behind = inner.held.take().unwrap_or_default();
        self.sendable.set(0);
        self.held.set(0);
        (before, behind)
    }

    /// Replaces the stretch of a file at the front by its bytes.
    pub(super) fn thaw(&self, bytes: Bytes) {
        let mut inner = self.inner.borrow_mut();
        inner.is_thawing = false;
        if let Some(front) = inner.queue.front_mut() {
            debug_assert_eq!(front.len(), bytes.len());
            *front = Part::Bytes(bytes);
        }
    }

    /// Whether the socket could take something now. While somebody streams, what is held back does not count.
    pub(super) fn has_something_to_send(&self) -> bool {
        let inner = self.inner.borrow();
        !inner.is_empty() && !inner.is_thawing
    }
}

fn add(counter: &Cell<usize>, bytes: usize) {
    counter.set(counter.get() + bytes);
}

/// What came of sending the front of the queue.
enum Sent {
    Bytes(usize),
    NotInMemory(FileRange),
}

impl Inner {
    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.tail.is_empty()
    }

    fn push(&mut self, part: Part) {
        match part {
            Part::Bytes(bytes) if bytes.len() <= COPIED => {
                buffers::lend(&mut self.tail);
                self.tail.extend_from_slice(&bytes);
            }
            part => {
                if !self.tail.is_empty() {
                    self.queue.push_back(Part::Bytes(self.tail.split().freeze()));
                }
                self.queue.push_back(part);
            }
        }
    }

    /// Copies what is a small part of something larger (a fetch of many chunks), which would be kept in memory for as
    /// long as the client does not read.
    fn let_go(&mut self) {
        for part in &mut self.queue {
            if let Part::Bytes(bytes) = part
                && bytes.len() <= LET_GO
                && !bytes.is_unique()
            {
                *bytes = Bytes::copy_from_slice(bytes);
            }
        }
    }

    fn send_front(&mut self, socket: &Stream) -> io::Result<Sent> {
        let Some(Part::File(part)) = self.queue.front_mut() else {
            let mut slices = [IoSlice::new(&[]); VECTOR];
            let (count, more) = self.slices(&mut slices);
            return socket.try_write_vectored(&slices[..count], more).map(Sent::Bytes);
        };
        let FileRange { file, range, .. } = &part.place;
        if !std::mem::take(&mut part.is_warm) && !file.is_in_memory(*range) {
            return Ok(Sent::NotInMemory(part.place.clone()));
        }
        match socket.try_send_file(file, range.start(), to_usize(range.length())) {
            // The kernel counts pages that it could not read as being there. Whoever reads it finds out what is to be
            // done about it.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Sent::NotInMemory(part.place.clone())),
            result => result.map(Sent::Bytes),
        }
    }

    /// What one send can take from the front on, and whether a file follows.
    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; VECTOR]) -> (usize, bool) {
        let mut count = 0;
        for (slice, part) in slices.iter_mut().zip(&self.queue) {
            let Part::Bytes(bytes) = part else { return (count, true) };
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        if count < VECTOR && !self.tail.is_empty() {
            slices[count] = IoSlice::new(&self.tail);
            count += 1;
        }
        (count, false)
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(part) = self.queue.front_mut() {
            if part.len() > sent {
                match part {
                    Part::Bytes(bytes) => bytes.advance(sent),
                    Part::File(FilePart { place: FileRange { range, .. }, .. }) => {
                        *range = ByteRange::between(range.start() + to_u64(sent), range.end());
                    }
                }
                return;
            }
            sent -= part.len();
            self.queue.pop_front();
        }
        self.tail.advance(sent);
    }
}

/// The right to send one frame in parts.
#[derive(Debug)]
pub(super) struct Streaming {
    outbox: Rc<Outbox>,
}

impl Streaming {
    /// Queues a part, waiting for room first.
    pub(super) async fn send(&self, part: Bytes) {
        // What is held back waits for this stream, so this stream must not wait for it.
        self.outbox.wait_until(|| self.outbox.sendable.get() < HIGH_WATER).await;
        add(&self.outbox.sendable, part.len());
        self.outbox.inner.borrow_mut().push(Part::Bytes(part));
    }

    /// Lets `write` append, as [`Outbox::append`] does.
    pub(super) fn append(&self, write: impl FnOnce(&mut BytesMut) -> bool) -> bool {
        self.outbox.append_now(write)
    }

    /// Queues a stretch of a file that is in memory now.
    pub(super) fn send_file(&self, place: FileRange) {
        self.outbox.push_file(place);
    }
}

impl Drop for Streaming {
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
    use crate::disk::{Access, File};
    use crate::net::Detached;
    use futures_util::poll;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::pin::pin;
    use std::sync::Arc;

    /// What would be sent, in order.
    fn contents(outbox: &Outbox) -> Vec<u8> {
        let inner = outbox.inner.borrow();
        let bytes = inner.queue.iter().flat_map(|part| match part {
            Part::Bytes(bytes) => bytes.to_vec(),
            Part::File(part) => panic!("{part:?}"),
        });
        bytes.chain(inner.tail.iter().copied()).collect()
    }

    fn frame(header: &[u8], data: Bytes) -> Frame {
        let mut frame = Frame::default();
        frame.header().extend_from_slice(header);
        frame.data(data);
        frame
    }

    #[test]
    fn order_is_kept_across_copied_and_queued_parts() {
        let outbox = Rc::new(Outbox::default());
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
        let outbox = Rc::new(Outbox::default());
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
        let outbox = Rc::new(Outbox::default());
        let stream = outbox.stream().await;
        outbox.send(frame(b"held", Bytes::from(vec![0; HIGH_WATER])));
        let mut room = pin!(outbox.room());
        assert!(poll!(&mut room).is_pending());
        assert!(poll!(pin!(stream.send(Bytes::from_static(b"x")))).is_ready());
    }

    #[tokio::test]
    async fn a_stream_waits_for_room() {
        let outbox = Rc::new(Outbox::default());
        let stream = outbox.stream().await;
        stream.send(Bytes::from(vec![0; HIGH_WATER])).await;
        let mut next = pin!(stream.send(Bytes::from_static(b"x")));
        assert!(poll!(&mut next).is_pending());
        outbox.inner.borrow_mut().advance(1);
        outbox.sendable.set(HIGH_WATER - 1);
        assert!(poll!(&mut next).is_ready());
    }

    /// Receives what has been sent.
    fn receive(socket: &mut UnixStream, received: &mut Vec<u8>) {
        let before = received.len();
        match socket.read_to_end(received) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => panic!("{result:?}"),
        }
        assert!(received.len() > before, "nothing was sent");
    }

    #[tokio::test]
    async fn a_file_that_leaves_the_memory_while_it_waits_is_read_again() {
        const SIZE: usize = 4 << 20;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let bytes: Vec<u8> = (0..SIZE).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect();
        std::fs::write(&path, &bytes).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let file = Arc::new(File::open(&path, Access::ReadOnly).unwrap());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let socket = Detached::from_unix(ours).unwrap().attach().unwrap();

        let outbox = Outbox::default();
        let range = ByteRange::between(1, to_u64(SIZE));
        let header = |tail: &mut BytesMut| tail.extend_from_slice(b"header");
        outbox.send_file(header, FileRange { file: Arc::clone(&file), range, hold: None });
        outbox.send(frame(b"next", Bytes::new()));
        let mut received = Vec::new();
        assert!(outbox.flush(&socket).unwrap().is_none(), "it was in memory a moment ago");
        assert!(outbox.has_something_to_send() && !outbox.is_clear(), "no socket takes so much");
        rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        receive(&mut theirs, &mut received);
        let frozen = outbox.flush(&socket).unwrap().expect("the rest has to be read");
        assert_eq!(frozen.range, ByteRange::between(to_u64(received.len() - b"header".len() + 1), to_u64(SIZE)));
        assert!(!outbox.has_something_to_send() && !outbox.is_clear(), "room to send is of no use now");
        assert!(outbox.flush(&socket).unwrap().is_none(), "it is asked for once");
        assert_eq!(outbox.queued(), to_usize(frozen.range.length()) + b"next".len());
        outbox.thaw(Bytes::copy_from_slice(&bytes[to_usize(frozen.range.start())..]));
        while !outbox.is_clear() {
            assert!(outbox.has_something_to_send());
            socket.writable().await.unwrap();
            assert!(outbox.flush(&socket).unwrap().is_none());
            receive(&mut theirs, &mut received);
        }
        assert_eq!(outbox.queued(), 0);
        assert!(received == [b"header", &bytes[1..], b"next"].concat());
    }
}
