//! Records after the handshake (RFC 8446, 4.6, 5 and 6).
//!
//! Owns: framing, numbers, key updates in both directions, alerts, the end. Does not own: the bytes before and behind
//! a record, which whoever holds the socket keeps.
//!
//! A key update that the peer asks for is sent before the next record that we send anyway: the RFC wants no more, and a
//! peer that asks often is answered once.

use std::fmt;
use std::io::IoSlice;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::keys::{Keys, Suite, TAG};

/// Bytes of content in one record at most.
pub const MAX_PLAIN: usize = 1 << 14;
/// What a record adds to its content: the header, its kind, the tag.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// Bytes of a whole record at most ("TLSCiphertext").
pub const MAX_SEALED: usize = HEADER + MAX_PLAIN + 256;

const HEADER: usize = 5;
/// Records that bring no content, in a row, before the peer is given up.
const MAX_IDLE: u32 = 32;
/// The longest message of a handshake that is put together: a ticket, which nobody uses.
const MAX_MESSAGE: usize = 4 + (1 << 16);
/// Records that are sealed with one key. AES-GCM is good for 2^24.5 full ones ("Limits on Key Usage").
const KEY_RECORDS: u64 = 1 << 23;

/// Kinds of content.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION: u8 = 23;

/// Messages of a handshake that come after it.
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Alerts that are not the end of everything.
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;

/// Why a session cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RecordError {
    /// A record that cannot be one.
    #[error("what came is not a TLS record")]
    NotARecord,
    /// A record that the peer has not sent, or has not sent here.
    #[error("a TLS record does not hold against its key")]
    Forged,
    /// Something that must not come after the handshake.
    #[error("a TLS message of kind {0} where none may come")]
    Unexpected(u8),
    /// Record after record without content.
    #[error("too many TLS records without content")]
    Idle,
    /// The peer has given up, and says why.
    #[error("the peer ended TLS: {}", alert_name(*.0))]
    Alert(u8),
    /// The secrets of a session do not fit its suite, or are used up.
    #[error("the keys of the TLS session cannot be used")]
    Keys,
}

/// The name of an alert ("Alert Protocol"), those that a peer sends for its reasons.
const fn alert_name(alert: u8) -> &'static str {
    match alert {
        10 => "unexpected message",
        20 => "bad record",
        40 => "no common parameters",
        42 => "our certificate is bad",
        43 => "our certificate is of an unsupported kind",
        44 => "our certificate was revoked",
        45 => "our certificate has expired",
        46 => "our certificate is not accepted",
        48 => "our certificate is signed by an unknown authority",
        49 => "access denied",
        51 => "a signature or a digest is wrong",
        70 => "no common version",
        80 => "internal error",
        112 => "unknown server name",
        116 => "it requires a client certificate",
        _ => "a fatal alert",
    }
}

/// A session that can be written down, to go on in another process. There must be one of it only.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    suite: Suite,
    reads: SavedKeys,
    writes: SavedKeys,
    names: Vec<String>,
    partial: Vec<u8>,
    owes_update: bool,
    has_ended: bool,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct SavedKeys {
    secret: Vec<u8>,
    sequence: u64,
}

impl fmt::Debug for Saved {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = (self.reads.sequence, self.writes.sequence);
        f.debug_struct("Saved").field("suite", &self.suite).field("numbers", &numbers).finish_non_exhaustive()
    }
}

/// What is in a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Bytes of the record, which the input loses.
    pub length: usize,
    /// Where in them the content is, decrypted; empty if it was for the session itself.
    pub content: Range<usize>,
    /// Whether the peer has said that nothing more comes.
    pub is_end: bool,
}

/// An established session: both directions.
#[derive(Debug)]
pub struct Session {
    reads: Keys,
    writes: Keys,
    /// The names of the peer's certificate.
    names: Vec<String>,
    /// The beginning of a message that goes on in the next record.
    partial: Vec<u8>,
    /// The peer wants new keys.
    owes_update: bool,
    /// The peer has said that nothing more comes.
    has_ended: bool,
    /// Records without content, in a row.
    idle: u32,
}

impl Session {
    pub(super) const fn new(reads: Keys, writes: Keys, names: Vec<String>) -> Self {
        Self { reads, writes, names, partial: Vec::new(), owes_update: false, has_ended: false, idle: 0 }
    }

    /// Whom the peer's certificate names; nobody if it showed none.
    pub fn peer_names(&self) -> &[String] {
        &self.names
    }

    /// The suite.
    pub const fn suite(&self) -> Suite {
        self.reads.suite()
    }

    /// Everything that another process needs to go on. The numbers of the next records are in it: this session must not
    /// be used any more.
    pub fn save(&self) -> Saved {
        let saved = |keys: &Keys| SavedKeys { secret: keys.secret().to_vec(), sequence: keys.sequence() };
        Saved {
            suite: self.suite(),
            reads: saved(&self.reads),
            writes: saved(&self.writes),
            names: self.names.clone(),
            partial: self.partial.clone(),
            owes_update: self.owes_update,
            has_ended: self.has_ended,
        }
    }

    /// A session that another process has saved.
    pub fn restore(saved: Saved) -> Result<Self, RecordError> {
        let Saved { suite, reads, writes, names, partial, owes_update, has_ended } = saved;
        let keys = |saved: &SavedKeys| Keys::new(suite, &saved.secret, saved.sequence);
        if partial.len() > MAX_MESSAGE {
            return Err(RecordError::NotARecord);
        }
        Ok(Self { partial, owes_update, has_ended, ..Self::new(keys(&reads)?, keys(&writes)?, names) })
    }

    /// The length of the record at the front of `input`, once its header is there. `None`: it is not whole yet.
    pub fn whole_record(input: &[u8]) -> Result<Option<usize>, RecordError> {
        let Some(header) = input.first_chunk::<HEADER>() else {
            // A peer that has lost its place is not waited for.
            return if input.first().is_some_and(|kind| *kind != APPLICATION) {
                Err(RecordError::NotARecord)
            } else {
                Ok(None)
            };
        };
        let length = HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != APPLICATION || length <= HEADER + TAG || length > MAX_SEALED {
            return Err(RecordError::NotARecord);
        }
        Ok((input.len() >= length).then_some(length))
    }

    /// Decrypts the record at the front of `input` in place. `None`: it is not whole yet. What was opened must be
    /// removed from the input before the next call.
    pub fn open(&mut self, input: &mut [u8]) -> Result<Option<Opened>, RecordError> {
        let Some(length) = Self::whole_record(input)? else { return Ok(None) };
        let end = Opened { length, content: HEADER..HEADER, is_end: true };
        if self.has_ended {
            return Ok(Some(end));
        }
        let (header, cipher) = input[..length].split_at_mut(HEADER);
        let header = [header[0], header[1], header[2], header[3], header[4]];
        let inner = self.reads.open(header, cipher)?;
        // Padding is zeroes behind the kind.
        let kind_at = cipher[..inner].iter().rposition(|byte| *byte != 0).ok_or(RecordError::Unexpected(0))?;
        if kind_at > MAX_PLAIN {
            return Err(RecordError::NotARecord);
        }
        let content = HEADER..HEADER + kind_at;
        let kind = cipher[kind_at];
        self.idle = if kind == APPLICATION && kind_at > 0 { 0 } else { self.idle + 1 };
        if self.idle > MAX_IDLE {
            return Err(RecordError::Idle);
        }
        match kind {
            // A message must not be interrupted.
            APPLICATION if self.partial.is_empty() => Ok(Some(Opened { length, content, is_end: false })),
            HANDSHAKE if kind_at > 0 => {
                self.take_message(&input[content])?;
                Ok(Some(Opened { is_end: false, ..end }))
            }
            ALERT => {
                self.take_alert(&input[content])?;
                Ok(Some(Opened { is_end: self.has_ended, ..end }))
            }
            kind => Err(RecordError::Unexpected(kind)),
        }
    }

    fn take_alert(&mut self, content: &[u8]) -> Result<(), RecordError> {
        match content {
            [_, CLOSE_NOTIFY] => self.has_ended = true,
            [_, USER_CANCELED] => {}
            [_, alert] => return Err(RecordError::Alert(*alert)),
            _ => return Err(RecordError::Unexpected(ALERT)),
        }
        Ok(())
    }

    fn take_message(&mut self, content: &[u8]) -> Result<(), RecordError> {
        self.partial.extend_from_slice(content);
        loop {
            let Some([kind, high, middle, low]) = self.partial.first_chunk() else { return Ok(()) };
            let (kind, length) = (*kind, u32::from_be_bytes([0, *high, *middle, *low]));
            let whole = 4 + crate::units::to_usize(u64::from(length));
            if whole > MAX_MESSAGE || !matches!(kind, NEW_SESSION_TICKET | KEY_UPDATE) {
                return Err(RecordError::Unexpected(HANDSHAKE));
            }
            if self.partial.len() < whole {
                return Ok(());
            }
            if kind == KEY_UPDATE {
                // The next record has other keys, so nothing may follow in this one.
                self.owes_update |= match self.partial[..] {
                    [_, _, _, _, 0] => false,
                    [_, _, _, _, 1] => true,
                    _ => return Err(RecordError::Unexpected(HANDSHAKE)),
                };
                self.reads.advance()?;
            }
            self.partial.drain(..whole);
        }
    }

    /// Encrypts `parts` from their `from`th byte on, as much of them as fits `out`. Says how many bytes of them are in
    /// how many bytes of `out`.
    ///
    /// A record that is in one part is not copied.
    pub fn seal(
        &mut self,
        parts: &[IoSlice<'_>],
        mut from: usize,
        out: &mut [u8],
    ) -> Result<(usize, usize), RecordError> {
        let mut parts = parts.iter().map(|part| &part[..]);
        let mut part: &[u8] = &[];
        let (mut taken, mut at) = (0, 0);
        if self.owes_update || self.writes.sequence() >= KEY_RECORDS {
            if out.len() < OVERHEAD + 5 {
                return Ok((0, 0));
            }
            self.owes_update = false;
            at += self.seal_message(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0], out)?;
            self.writes.advance()?;
        }
        loop {
            while part.is_empty() {
                let Some(next) = parts.next() else { return Ok((taken, at)) };
                let skipped = from.min(next.len());
                from -= skipped;
                part = &next[skipped..];
            }
            let room = (out.len() - at).saturating_sub(OVERHEAD).min(MAX_PLAIN);
            if room == 0 {
                return Ok((taken, at));
            }
            let record = &mut out[at..];
            let length = if part.len() >= room {
                let (front, rest) = part.split_at(room);
                part = rest;
                self.seal_record(APPLICATION, front, record)?;
                room
            } else {
                // Small parts share a record.
                let mut length = 0;
                while length < room {
                    let count = part.len().min(room - length);
                    record[HEADER + length..HEADER + length + count].copy_from_slice(&part[..count]);
                    part = &part[count..];
                    length += count;
                    if part.is_empty() {
                        match parts.next() {
                            Some(next) => part = next,
                            None => break,
                        }
                    }
                }
                let header = header(length);
                record[..HEADER].copy_from_slice(&header);
                self.writes.seal_in_place(header, length, APPLICATION, &mut record[HEADER..length + OVERHEAD])?;
                length
            };
            taken += length;
            at += length + OVERHEAD;
        }
    }

    /// Writes the record that says that nothing more comes to the front of `out`. Says how long it is.
    pub fn seal_end(&mut self, out: &mut [u8]) -> Result<usize, RecordError> {
        if out.len() < OVERHEAD + 2 {
            return Ok(0);
        }
        self.seal_message(ALERT, &[1, CLOSE_NOTIFY], out)
    }

    fn seal_message(&mut self, kind: u8, message: &[u8], out: &mut [u8]) -> Result<usize, RecordError> {
        self.seal_record(kind, message, out)?;
        Ok(message.len() + OVERHEAD)
    }

    fn seal_record(&mut self, kind: u8, plain: &[u8], out: &mut [u8]) -> Result<(), RecordError> {
        let header = header(plain.len());
        out[..HEADER].copy_from_slice(&header);
        self.writes.seal(header, plain, kind, &mut out[HEADER..plain.len() + OVERHEAD])
    }
}

/// The header of a record with `length` bytes of content, which are at most [`MAX_PLAIN`].
fn header(length: usize) -> [u8; HEADER] {
    let length = u16::try_from(length + 1 + TAG).unwrap_or(u16::MAX).to_be_bytes();
    [APPLICATION, 3, 3, length[0], length[1]]
}

/// Feeds arbitrary bytes to a session: as they are, and as what is in records that the peer has sealed.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let keys = |byte| Keys::new(Suite::Aes128, &[byte; 32], 0).expect("a secret of the right length");
    let mut raw = data.to_vec();
    let mut session = Session::new(keys(1), keys(2), Vec::new());
    if let Ok(Some(opened)) = session.open(&mut raw) {
        assert!(opened.content.end <= opened.length && opened.length <= raw.len());
    }
    let (mut peer, mut out) = (keys(1), vec![0; MAX_SEALED]);
    let mut rest = data;
    while let [kind, length, tail @ ..] = rest {
        let (content, next) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = next;
        let header = header(content.len());
        out[..HEADER].copy_from_slice(&header);
        let record = &mut out[..content.len() + OVERHEAD];
        if peer.seal(header, content, *kind, &mut record[HEADER..]).is_err() {
            return;
        }
        match session.open(record) {
            Ok(Some(opened)) if opened.content.is_empty() => {}
            // What is of kind zero is padding.
            Ok(Some(opened)) => assert!(content.starts_with(&record[opened.content])),
            Ok(None) => panic!("a whole record is not whole"),
            Err(_) => return,
        }
        if content.first() == Some(&KEY_UPDATE) && *kind == HANDSHAKE && content.len() == 5 {
            let _ = peer.advance();
        }
    }
    let saved = session.save();
    assert!(Session::restore(saved).is_ok());
}
