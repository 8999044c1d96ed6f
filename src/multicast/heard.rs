//! One session as its hearer: from its first announcement to its end.
//!
//! A session begins with an announcement that has a right tag, of an image that a mirror here has by its identity and with
//! a manifest. Once its plan is known so is its layout, and symbols are taken. What its datagrams say is weighed by the
//! protocol; this keeps the bytes, and tells whoever planned when it began and ended.
//!
//! Owns: the state of one session. Does not own: the socket, the thread (`receive`), making blocks whole (`mend`).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::mend::{Done, Whole};
use super::receive::{Audience, HeardSession};
use crate::cast::ReceiverId;
use crate::cast::assembly::Assembly;
use crate::cast::form::{self, Announce, Datagram, Head, Key, Run, Terms};
use crate::cast::layout::{Layout, Plan};
use crate::cast::receiver::{Delivery, Receiver, State, Take};
use crate::mirror::Mirror;
use crate::units::to_u64;

/// A session that is not heard for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// What a datagram was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sense {
    /// One of this session.
    Good,
    /// None that a sender sends, or of another plan.
    Broken,
}

/// A session that is heard.
#[derive(Debug)]
pub(super) struct Session {
    terms: Terms,
    key: Key,
    audience: Arc<dyn Audience>,
    /// Gone once it is over here.
    mirror: Option<Mirror>,
    receiver: ReceiverId,
    /// Where the sender was heard last.
    from: SocketAddr,
    heard: Instant,
    announced: Announce,
    plan: Plan,
    part: Option<Part>,
    /// The number of the next report.
    number: u32,
    figures: HeardSession,
}

/// What there is once the layout is known.
#[derive(Debug)]
struct Part {
    began: Instant,
    layout: Arc<Layout>,
    receiver: Receiver,
    assembly: Assembly,
    /// Blocks of which parity was kept.
    mended: HashSet<u32>,
    /// What the system had thrown away before.
    overflowed: u32,
}

impl Session {
    /// A session that was announced. `None`: the mirror cannot take part.
    pub(super) fn begin(
        mirror: Mirror,
        announce: &Announce,
        key: Key,
        from: SocketAddr,
        audience: &Arc<dyn Audience>,
        now: Instant,
    ) -> Option<Self> {
        let terms = announce.terms;
        let shape = mirror.manifest_shape()?;
        if shape != terms.shape || mirror.chunk_size() != u64::from(shape.chunk_size) {
            return None;
        }
        let figures = HeardSession {
            session: terms.session,
            image: terms.image,
            state: State::Receiving,
            blocks: (0, 0),
            kept_bytes: 0,
            skipped: 0,
            mended: 0,
            wrong: 0,
        };
        Some(Self {
            terms,
            key,
            audience: Arc::clone(audience),
            receiver: ReceiverId(mirror.node().0),
            mirror: Some(mirror),
            from,
            heard: now,
            announced: *announce,
            plan: Plan::default(),
            part: None,
            number: 0,
            figures,
        })
    }

    pub(super) const fn key(&self) -> &Key {
        &self.key
    }

    /// Takes a datagram with a right tag. A block that is complete by it goes to `ready`.
    pub(super) fn take(
        &mut self,
        now: Instant,
        (head, datagram): (Head, Datagram<'_>),
        from: SocketAddr,
        overflowed: u32,
        ready: &mut Vec<Whole>,
    ) -> Sense {
        self.heard = now;
        match datagram {
            Datagram::Announce(announce) if announce.terms == self.terms => {
                self.from = from;
                self.announced = announce;
                if self.part.is_none() && self.terms.pages == 0 {
                    self.make_part(Vec::new(), now, overflowed);
                }
                self.with_receiver(now, head.number, |receiver, now| receiver.announced(now, &announce));
            }
            Datagram::Page(page) => {
                self.with_receiver(now, head.number, |_, _| ());
                if self.part.is_none()
                    && let Some(runs) = self.plan.take(&self.terms, page)
                {
                    self.make_part(runs, now, overflowed);
                }
            }
            Datagram::Word(word) => self.with_receiver(now, head.number, |receiver, now| receiver.told(now, &word)),
            Datagram::Symbol { block, index, bytes } if bytes.len() == usize::from(self.terms.symbol) => {
                return self.symbol(now, head.number, (block, index, bytes), ready);
            }
            Datagram::Announce(_) | Datagram::Symbol { .. } | Datagram::Report(_) => return Sense::Broken,
        }
        Sense::Good
    }

    /// The receiver hears a datagram, and what it says.
    fn with_receiver(&mut self, now: Instant, number: u32, say: impl FnOnce(&mut Receiver, Duration)) {
        let Some(part) = &mut self.part else { return };
        let now = now.saturating_duration_since(part.began);
        part.receiver.heard(now, number);
        say(&mut part.receiver, now);
    }

    /// Now that the plan is known.
    fn make_part(&mut self, runs: Vec<Run>, now: Instant, overflowed: u32) {
        let Some(mirror) = &self.mirror else { return };
        let layout = match Layout::new(&self.terms, runs, |chunk| mirror.is_known_zero(chunk)) {
            Ok(layout) => Arc::new(layout),
            Err(error) => {
                tracing::warn!(session = %self.terms.session, %error, "a session that cannot be understood");
                self.mirror = None;
                return;
            }
        };
        let has = |block| holds(mirror, &layout, block);
        let seed = u64::from_le_bytes(*self.receiver.0.first_chunk().expect("16 bytes")) ^ self.terms.session.0;
        let mut receiver = Receiver::new(self.receiver, Arc::clone(&layout), has, seed);
        receiver.announced(Duration::ZERO, &self.announced);
        let (done, blocks) = receiver.done();
        tracing::info!(session = %self.terms.session, image = %self.terms.image, done, blocks, "hearing a session");
        self.audience.began(mirror, &self.terms, layout.covers());
        if let Err(error) = mirror.check_room(&layout.covers()) {
            tracing::warn!(session = %self.terms.session, %error, "a session brings more than can be kept: not taking part");
            receiver.leave();
        }
        let assembly = Assembly::default();
        self.part = Some(Part { began: now, layout, receiver, assembly, mended: HashSet::new(), overflowed });
    }

    fn symbol(
        &mut self,
        now: Instant,
        number: u32,
        (block, index, bytes): (u32, u16, &[u8]),
        ready: &mut Vec<Whole>,
    ) -> Sense {
        let Some(part) = &mut self.part else { return Sense::Good };
        let now = now.saturating_duration_since(part.began);
        part.receiver.heard(now, number);
        let take = part.receiver.symbol(now, block, index);
        match take {
            Take::Foreign => return Sense::Broken,
            Take::Skip => {
                self.figures.skipped += 1;
                return Sense::Good;
            }
            Take::KeepInstead(other) => {
                part.assembly.forget(other);
                part.mended.remove(&other);
            }
            Take::Keep | Take::Complete => {}
        }
        part.assembly.keep(&part.layout, self.terms.parity, block, index, bytes);
        self.figures.kept_bytes += to_u64(bytes.len());
        if index >= part.layout.symbols(block) {
            part.mended.insert(block);
        }
        if take == Take::Complete {
            self.figures.mended += u64::from(part.mended.remove(&block));
            match (part.assembly.take(block), &self.mirror) {
                (Some(partial), Some(mirror)) => ready.push(Whole {
                    session: self.terms.session,
                    block,
                    partial,
                    layout: Arc::clone(&part.layout),
                    mirror: mirror.clone(),
                }),
                _ => part.receiver.delivered(now, block, Delivery::NoRoom),
            }
        }
        Sense::Good
    }

    /// What came of a block.
    pub(super) fn delivered(&mut self, now: Instant, done: Done) {
        self.figures.wrong += u64::from(done.delivery == Delivery::Wrong);
        let Some(part) = &mut self.part else { return };
        let now = now.saturating_duration_since(part.began);
        part.receiver.delivered(now, done.block, done.delivery);
        if part.receiver.state() == State::Complete
            && let Some(mirror) = &self.mirror
        {
            // A cache that is full has given back the first for the last.
            (0..part.layout.blocks()).filter(|block| !holds(mirror, &part.layout, *block)).for_each(|block| {
                part.receiver.evicted(now, block);
            });
        }
    }

    /// Datagrams that the system threw away so far, of all sessions.
    pub(super) fn overflowed(&mut self, total: u32) {
        if let Some(part) = &mut self.part {
            part.receiver.overflowed(total.saturating_sub(part.overflowed));
        }
    }

    /// Leaves: the next report says so.
    pub(super) fn leave(&mut self) {
        if let Some(part) = &mut self.part
            && part.receiver.state() == State::Receiving
        {
            part.receiver.leave();
        }
    }

    /// Appends a report, if one is due. Gives where to.
    pub(super) fn report(&mut self, now: Instant, bytes: &mut Vec<u8>) -> Option<SocketAddr> {
        let part = self.part.as_mut()?;
        let report = part.receiver.report(now.saturating_duration_since(part.began))?;
        let head = Head { session: self.terms.session, number: self.number };
        self.number = self.number.wrapping_add(1);
        form::encode(head, &Datagram::Report(report), &self.key, bytes);
        Some(self.from)
    }

    /// Looks whether it is over here, and says so once.
    pub(super) fn settle(&mut self) {
        let Some(part) = &mut self.part else { return };
        let state = part.receiver.state();
        self.figures.state = state;
        self.figures.blocks = part.receiver.done();
        if state != State::Receiving
            && let Some(mirror) = self.mirror.take()
        {
            part.assembly = Assembly::default();
            let (done, blocks) = part.receiver.done();
            tracing::info!(session = %self.terms.session, ?state, done, blocks, "a session is over here");
            self.audience.ended(&mirror, &self.terms, state);
        }
    }

    /// When something is to be done, at the latest; `None`: when it is heard.
    pub(super) fn next(&self) -> Option<Instant> {
        let part = self.part.as_ref()?;
        part.began.checked_add(part.receiver.next())
    }

    /// Whether nothing more is to be done, so that it can make way for another.
    pub(super) fn is_over(&self) -> bool {
        self.mirror.is_none()
    }

    /// Whether it has not been heard for long.
    pub(super) fn is_forgotten(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) >= FORGOTTEN && (self.is_over() || self.part.is_none())
    }

    pub(super) const fn figures(&self) -> &HeardSession {
        &self.figures
    }
}

/// Whether all of a block is here.
fn holds(mirror: &Mirror, layout: &Layout, block: u32) -> bool {
    layout.ranges(block).into_iter().all(|range| mirror.holds(range))
}

impl Drop for Session {
    /// Whoever planned for it is not left waiting.
    fn drop(&mut self) {
        self.settle();
        if self.part.is_some()
            && let Some(mirror) = self.mirror.take()
        {
            self.audience.ended(&mirror, &self.terms, State::Abandoned);
        }
    }
}
