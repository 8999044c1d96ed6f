//! TLS inside a stream: what has arrived and was not opened, what was sealed and has not left.
//!
//! Owns: buffers, and that whoever uses the stream sees plain bytes only. Does not own: records (`tls`), the socket's
//! readiness (`stream`).
//!
//! Sending keeps the promise of a socket: what is said to be sent has left. Bytes that were sealed and have not left are
//! not sent yet; whoever sends comes again with the same bytes at the front, as it does when a socket is full, and they
//! are not sealed twice. So nobody has to know that there is something to flush.
//!
//! Memory: a connection that has something to receive borrows [`ROOM`] and a record from its thread; one whose peer does
//! not take what was sealed keeps up to [`BATCH`] of it.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice};

use bytes::buf::Limit;
use bytes::{Buf, BufMut, BytesMut};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::tls::{Failure, MAX_PLAIN, MAX_SEALED, OVERHEAD, Opened, RecordError, Saved, Session};

/// Bytes received at once.
const ROOM: usize = 128 << 10;
/// Bytes sealed at once: sixteen whole records.
const BATCH: usize = 16 * (MAX_PLAIN + OVERHEAD);
/// Input buffers that a thread keeps.
const KEPT: usize = 16;

thread_local! {
    static SPARE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why a connection did not turn to TLS.
#[derive(Debug, Error)]
pub enum SecureError {
    /// The handshake failed.
    #[error("TLS failed: {0}")]
    Failed(#[from] Failure),
    /// The peer closed the connection before the handshake was over.
    #[error("the peer closed the connection during the TLS handshake")]
    Closed,
    /// The socket failed.
    #[error("the connection was lost during the TLS handshake: {0}")]
    Lost(#[from] io::Error),
}

/// What another process needs to go on with the TLS of a connection.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedTls {
    session: Saved,
    /// Received and not opened.
    cipher: Vec<u8>,
    /// Opened and not taken.
    plain: Vec<u8>,
    /// Sealed and not sent.
    sealed: Vec<u8>,
    /// How many of the bytes that are to be sent next `sealed` holds.
    ahead: usize,
}

impl SavedTls {
    /// How many of the bytes that were to be sent next are sealed already: they must be at the front of what is sent
    /// next, whoever sends it.
    pub const fn ahead(&self) -> usize {
        self.ahead
    }
}

impl fmt::Debug for SavedTls {
    /// Without bytes of the connection.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedTls").field("session", &self.session).field("ahead", &self.ahead).finish_non_exhaustive()
    }
}

/// The TLS of one connection.
#[derive(Debug)]
pub(super) struct Tls {
    session: Session,
    /// Received.
    cipher: BytesMut,
    /// What is left of the record at the front of `cipher`, which has been opened.
    front: Option<Opened>,
    /// Sealed and not sent.
    sealed: BytesMut,
    /// How many bytes at the front of what is sent next are in `sealed`.
    ahead: usize,
    has_ended: bool,
    /// Why nothing more can be read.
    failure: Option<RecordError>,
}

fn failed(error: RecordError) -> io::Error {
    io::Error::other(error)
}

fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

impl Tls {
    /// Goes on after a handshake, with what has arrived behind it.
    pub(super) fn new(session: Session, cipher: BytesMut) -> Self {
        let (front, sealed) = (None, BytesMut::new());
        Self { session, cipher, front, sealed, ahead: 0, has_ended: false, failure: None }
    }

    pub(super) fn restore(saved: SavedTls) -> Result<Self, RecordError> {
        let SavedTls { session, cipher, plain, sealed, ahead } = saved;
        let front = Opened { length: plain.len(), content: 0..plain.len(), is_end: false };
        let cipher = BytesMut::from(&[plain, cipher].concat()[..]);
        let mut tls = Self::new(Session::restore(session)?, cipher);
        tls.front = (front.length > 0).then_some(front);
        tls.sealed = BytesMut::from(&sealed[..]);
        tls.ahead = ahead;
        Ok(tls)
    }

    pub(super) fn save(&self) -> SavedTls {
        let opened = self.front.as_ref();
        SavedTls {
            session: self.session.save(),
            cipher: self.cipher[opened.map_or(0, |front| front.length)..].to_vec(),
            plain: opened.map_or(&[][..], |front| &self.cipher[front.content.clone()]).to_vec(),
            sealed: self.sealed.to_vec(),
            ahead: self.ahead,
        }
    }

    pub(super) fn peer_names(&self) -> &[String] {
        self.session.peer_names()
    }

    /// Whether a read would come to something without the socket.
    pub(super) fn has_input(&self) -> bool {
        self.front.is_some()
            || self.has_ended
            || self.failure.is_some()
            || !matches!(Session::whole_record(&self.cipher), Ok(None))
    }

    /// Bytes that have been received and not been taken; as many plain ones at most.
    pub(super) fn queued(&self) -> usize {
        self.cipher.len()
    }

    /// Appends plain bytes to the first stretch of `buffer`'s room; `Ok(0)` is the end, or that there is no room.
    pub(super) fn read(
        &mut self,
        buffer: &mut impl BufMut,
        receive: impl Fn(&mut Limit<&mut BytesMut>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let room = buffer.chunk_mut().len();
        loop {
            let delivered = self.deliver(buffer, room)?;
            if delivered > 0 || self.has_ended || room == 0 {
                self.give_back();
                return Ok(delivered);
            }
            self.lend();
            match receive(&mut (&mut self.cipher).limit(ROOM)) {
                // Without a word, as a socket ends. What was cut short is nobody's: NBD says how long everything is.
                Ok(0) => self.has_ended = true,
                Ok(_) => {}
                Err(error) => {
                    self.give_back();
                    return Err(error);
                }
            }
        }
    }

    /// Hands out what has been received, opening records as long as there is room.
    fn deliver(&mut self, buffer: &mut impl BufMut, room: usize) -> io::Result<usize> {
        let mut delivered = 0;
        while delivered < room {
            if self.front.is_none() {
                match self.open() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) if delivered == 0 => return Err(failed(error)),
                    Err(_) => break,
                }
            }
            let Some(front) = &mut self.front else { continue };
            let count = front.content.len().min(room - delivered);
            buffer.put_slice(&self.cipher[front.content.start..front.content.start + count]);
            delivered += count;
            front.content.start += count;
            if front.content.is_empty() {
                self.cipher.advance(front.length);
                self.front = None;
            }
        }
        Ok(delivered)
    }

    /// Opens the next record. `false`: there is none.
    fn open(&mut self) -> Result<bool, RecordError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if self.has_ended {
            return Ok(false);
        }
        let opened = self.session.open(&mut self.cipher).inspect_err(|error| self.failure = Some(*error))?;
        let Some(opened) = opened else { return Ok(false) };
        self.has_ended |= opened.is_end;
        if opened.content.is_empty() {
            self.cipher.advance(opened.length);
        } else {
            self.front = Some(opened);
        }
        Ok(true)
    }

    fn lend(&mut self) {
        if self.cipher.capacity() == 0 {
            self.cipher = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        }
        // Moves the beginning of a record to the front, if that makes the room.
        self.cipher.reserve(ROOM + MAX_SEALED - self.cipher.len().min(MAX_SEALED));
    }

    fn give_back(&mut self) {
        if !self.cipher.is_empty() || self.cipher.capacity() == 0 {
            return;
        }
        let mut buffer = std::mem::take(&mut self.cipher);
        buffer.clear();
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < KEPT {
                spare.push(buffer);
            }
        });
    }

    /// Sends what was sealed before, or seals and sends what fits a batch. Says how many bytes of `buffers` have left.
    pub(super) fn write(
        &mut self,
        buffers: &[IoSlice<'_>],
        send: impl Fn(&[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if !self.sealed.is_empty() {
            let sent = send(&self.sealed)?;
            self.sealed.advance(sent);
            if !self.sealed.is_empty() {
                return Err(would_block());
            }
            self.sealed = BytesMut::new();
            if self.ahead > 0 {
                return Ok(std::mem::take(&mut self.ahead));
            }
        }
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(BATCH, 0);
            let (taken, length) = self.session.seal(buffers, 0, scratch).map_err(failed)?;
            if length == 0 {
                return Ok(0);
            }
            let sent = match send(&scratch[..length]) {
                Ok(sent) if sent == length => return Ok(taken),
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            self.sealed = BytesMut::from(&scratch[sent..length]);
            self.ahead = taken;
            Err(would_block())
        })
    }

    /// Tells the peer that nothing more comes, if the socket takes it now.
    pub(super) fn end(&mut self, send: impl Fn(&[u8]) -> io::Result<usize>) {
        let mut record = [0; OVERHEAD + 2];
        if let Ok(length) = self.session.seal_end(&mut record) {
            self.sealed.extend_from_slice(&record[..length]);
            // A peer that takes nothing any more need not be told.
            let _ = send(&self.sealed);
        }
    }
}
