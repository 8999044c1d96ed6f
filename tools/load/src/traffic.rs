//! The requests of one connection: which are sent, and what becomes of them.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::BytesMut;
use hdrhistogram::Histogram;
use headwater::clock;
use headwater::error::ErrorKind;
use headwater::nbd::errno;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::request::Header;
use headwater::nbd::wire::{CommandFlags, command};
use headwater::units::{to_u64, to_usize};

use crate::connection::{self, Outbox, Socket, Wait};
use crate::ledger::Ledger;
use crate::order::{Order, scale};
use crate::pattern::{Wrong, mix};
use crate::replies::{Event, Replies};
use crate::schedule::{Limits, Schedule};

/// Wrong blocks that are told one by one.
const TOLD: usize = 8;
/// Latencies are kept from one nanosecond to an hour, with three digits.
const LONGEST: u64 = 3_600_000_000_000;

/// What one connection does in one phase of a run.
#[derive(Debug)]
pub(crate) struct Job {
    /// Per cent of the requests that are reads.
    pub(crate) reads: u8,
    /// Which blocks.
    pub(crate) order: Order,
    /// When.
    pub(crate) schedule: Schedule,
    /// Until when.
    pub(crate) limits: Limits,
    /// Whether writes must be stable before they are answered.
    pub(crate) fua: bool,
    /// A flush after every so many writes.
    pub(crate) flush_every: Option<u64>,
    /// Leave out blocks that this run has not written.
    pub(crate) known_only: bool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Tally {
    /// Of reads and writes that counted, in nanoseconds.
    pub(crate) latencies: Histogram<u64>,
    /// Of flushes that counted.
    pub(crate) flush_latencies: Histogram<u64>,
    /// Reads and writes that counted.
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    /// All requests, also those that did not count.
    pub(crate) sent: u64,
    /// Requests that failed, by the name of the error, whether they counted or not.
    pub(crate) errors: BTreeMap<&'static str, u64>,
    /// Blocks whose data were looked at.
    pub(crate) checked: u64,
    /// Blocks with wrong data, and the first of them.
    pub(crate) wrong: u64,
    pub(crate) first_wrong: Vec<Wrong>,
    /// Requests that were due before the end and were not answered by then.
    pub(crate) behind: u64,
    /// When the last request was answered that counted.
    pub(crate) last: Option<Instant>,
    /// What ended the connection.
    pub(crate) lost: Option<anyhow::Error>,
}

impl Tally {
    fn new() -> anyhow::Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, LONGEST, 3).context("the bounds of a histogram");
        Ok(Self {
            latencies: histogram()?,
            flush_latencies: histogram()?,
            reads: 0,
            writes: 0,
            sent: 0,
            errors: BTreeMap::new(),
            checked: 0,
            wrong: 0,
            first_wrong: Vec::new(),
            behind: 0,
            last: None,
            lost: None,
        })
    }

    /// A request has been answered.
    fn count(&mut self, slot: &Slot, now: Instant) {
        let nanoseconds = u64::try_from(now.saturating_duration_since(slot.begun).as_nanos()).unwrap_or(u64::MAX);
        match slot.kind {
            Kind::Read => self.reads += 1,
            Kind::Write => self.writes += 1,
            Kind::Flush => return self.flush_latencies.saturating_record(nanoseconds.max(1)),
        }
        self.latencies.saturating_record(nanoseconds.max(1));
        self.last = Some(now);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct Slot {
    /// `None` while it is free.
    cookie: Option<u64>,
    kind: Kind,
    block: u64,
    offset: u64,
    /// When it was sent, or due.
    begun: Instant,
    /// Bytes that have come.
    received: u64,
    version: u64,
    failure: Option<ErrorKind>,
}

/// What keeps the next request from being sent.
enum Next {
    /// All slots are taken, or the block is.
    Replies,
    /// It is not due before.
    At(Instant),
    /// There is none.
    Done,
}

/// One connection and its requests.
#[derive(Debug)]
pub(crate) struct Traffic {
    socket: Socket,
    mode: ReplyMode,
    replies: Replies,
    outbox: Outbox,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Distinguishes requests that had the same slot.
    generation: u32,
    /// Where the region begins, and the size of its blocks.
    start: u64,
    size: u32,
    /// What is written. If data are checked, also what is read, with a place for each slot; otherwise all writes
    /// have the same payload.
    payloads: Vec<u8>,
    ledger: Ledger,
    /// A block whose turn has come while it was in flight.
    postponed: Option<u64>,
    /// Decides between reads and writes.
    random: u64,
    /// Requests of the current job, and its writes since the last flush.
    issued: u64,
    unflushed: u64,
}

impl Traffic {
    /// Takes over a connection on which `left_over` came behind the negotiation.
    pub(crate) fn new(
        socket: Socket,
        mode: ReplyMode,
        left_over: &BytesMut,
        depth: u32,
        (start, size): (u64, u32),
        ledger: Ledger,
        seed: u64,
    ) -> Self {
        let depth = to_usize(depth.into());
        let now = clock::now();
        let slot = Slot {
            cookie: None,
            kind: Kind::Flush,
            block: 0,
            offset: 0,
            begun: now,
            received: 0,
            version: 0,
            failure: None,
        };
        let copies = if ledger.checks() { depth } else { 1 };
        let mut payloads = vec![0; to_usize(size.into()) * copies];
        // Data that do not compress, in case the server's disk does.
        for (place, index) in payloads.iter_mut().zip(0..) {
            *place = mix(index).to_le_bytes()[0];
        }
        Self {
            socket,
            mode,
            replies: Replies::new(mode, left_over),
            outbox: Outbox::default(),
            slots: vec![slot; depth],
            free: (0..depth).rev().collect(),
            generation: 0,
            start,
            size,
            payloads,
            ledger,
            postponed: None,
            random: seed,
            issued: 0,
            unflushed: 0,
        }
    }

    /// Does a job to its end, or until the connection is lost.
    pub(crate) fn run(&mut self, job: &mut Job) -> anyhow::Result<Tally> {
        let mut tally = Tally::new()?;
        (self.issued, self.unflushed) = (0, 0);
        tally.lost = self.drive(job, &mut tally).err();
        tally.sent = self.issued;
        if let Some(until) = job.limits.until {
            let due = job.schedule.due_before(until) - job.schedule.due_before(job.limits.measure_from);
            tally.behind = due.saturating_sub(tally.reads + tally.writes);
        }
        Ok(tally)
    }

    fn drive(&mut self, job: &mut Job, tally: &mut Tally) -> anyhow::Result<()> {
        let mut now = clock::now();
        loop {
            let next = self.issue(job, now);
            if !self.outbox.is_empty() {
                self.outbox.send(&self.socket, &self.payloads)?;
            }
            let in_flight = self.slots.len() - self.free.len();
            let until = match next {
                Next::Done if in_flight == 0 => return Ok(()),
                Next::At(due) => Some(due),
                Next::Done | Next::Replies => None,
            };
            let received = if until.is_none() && self.outbox.is_empty() {
                self.socket.receive(self.replies.room(), Wait::Yes)?
            } else {
                self.socket.wait(!self.outbox.is_empty(), until)?;
                self.socket.receive(self.replies.room(), Wait::No)?
            };
            now = clock::now();
            if let Some(received) = received {
                self.replies.received(received);
                self.take_replies(&job.limits, tally, now)?;
            }
        }
    }

    /// Puts all requests that may be sent now into the outbox.
    fn issue(&mut self, job: &mut Job, now: Instant) -> Next {
        while let Some(&slot) = self.free.last() {
            if job.flush_every.is_some_and(|every| self.unflushed >= every) {
                self.unflushed = 0;
                self.send_flush(slot, now);
                continue;
            }
            let Limits { until, requests, .. } = job.limits;
            if job.limits.is_over(now) || requests.is_some_and(|requests| self.issued >= requests) {
                return Next::Done;
            }
            let due = job.schedule.due(self.issued);
            if let Some(due) = due.filter(|due| *due > now) {
                return Next::At(until.map_or(due, |until| until.min(due)));
            }
            let Some(block) = self.next_block(job) else { return Next::Done };
            if !self.ledger.claim(block) {
                self.postponed = Some(block);
                return Next::Replies;
            }
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let kind = if scale(mix(self.random), 100) < job.reads.into() { Kind::Read } else { Kind::Write };
            self.issued += 1;
            self.send(slot, kind, block, due.unwrap_or(now), job.fua);
        }
        Next::Replies
    }

    fn next_block(&mut self, job: &mut Job) -> Option<u64> {
        if let Some(block) = self.postponed.take() {
            return Some(block);
        }
        loop {
            let block = job.order.next()?;
            if !job.known_only || self.ledger.knows(block) {
                return Some(block);
            }
        }
    }

    fn send_flush(&mut self, slot: usize, now: Instant) {
        let cookie = self.occupy(slot, Kind::Flush, 0, 0, now);
        self.outbox.push(self.mode, Header { flags: 0, command: command::FLUSH, cookie, offset: 0, length: 0 });
    }

    fn send(&mut self, slot: usize, kind: Kind, block: u64, begun: Instant, fua: bool) {
        let offset = self.start + block * u64::from(self.size);
        let cookie = self.occupy(slot, kind, block, offset, begun);
        let flags = if fua && kind == Kind::Write { CommandFlags::FUA.bits() } else { 0 };
        let number = if kind == Kind::Write { command::WRITE } else { command::READ };
        self.outbox.push(self.mode, Header { flags, command: number, cookie, offset, length: self.size.into() });
        if kind == Kind::Write {
            let place = self.place(slot);
            self.outbox.push_payload(place.start, place.len());
            self.slots[slot].version = self.ledger.fill(&mut self.payloads[place], offset);
            self.unflushed += 1;
        }
    }

    fn occupy(&mut self, slot: usize, kind: Kind, block: u64, offset: u64, begun: Instant) -> u64 {
        self.free.pop();
        self.generation = self.generation.wrapping_add(1);
        let cookie = u64::from(self.generation) << 32 | to_u64(slot);
        self.slots[slot] =
            Slot { cookie: Some(cookie), kind, block, offset, begun, received: 0, version: 0, failure: None };
        cookie
    }

    /// Where the data of a slot are.
    fn place(&self, slot: usize) -> std::ops::Range<usize> {
        let size = to_usize(self.size.into());
        let start = if self.ledger.checks() { slot * size } else { 0 };
        start..start + size
    }

    fn take_replies(&mut self, limits: &Limits, tally: &mut Tally, now: Instant) -> anyhow::Result<()> {
        loop {
            let (slots, size) = (&self.slots, self.size);
            let range_of = |cookie| {
                let slot = slots.get(index(cookie)).filter(|slot| slot.cookie == Some(cookie))?;
                (slot.kind == Kind::Read).then_some((slot.offset, size))
            };
            let Some(event) = self.replies.next(range_of)? else { return Ok(()) };
            match event {
                Event::Data { cookie, offset, range } => {
                    let target = self.arrived(cookie, offset, to_u64(range.len()))?;
                    if let Some(target) = target {
                        self.payloads[target].copy_from_slice(self.replies.bytes(range));
                    }
                }
                Event::Hole { cookie, offset, length } => {
                    if let Some(target) = self.arrived(cookie, offset, length.into())? {
                        self.payloads[target].fill(0);
                    }
                }
                Event::Failure { cookie, kind } => {
                    let index = self.find(cookie)?;
                    self.slots[index].failure.get_or_insert(kind);
                }
                Event::End { cookie } => self.end(cookie, limits, tally, now)?,
            }
        }
    }

    /// Data have come that lie at `offset`. Gives their place if they are looked at.
    fn arrived(&mut self, cookie: u64, offset: u64, length: u64) -> anyhow::Result<Option<std::ops::Range<usize>>> {
        let index = self.find(cookie)?;
        let place = self.ledger.checks().then(|| self.place(index));
        let slot = &mut self.slots[index];
        let inside = offset.checked_sub(slot.offset).filter(|start| start + length <= self.size.into());
        let Some(start) = inside.filter(|_| slot.kind == Kind::Read) else {
            bail!("the server sent {length} bytes from {offset}, which were not asked for");
        };
        slot.received += length;
        Ok(place.map(|place| {
            let start = place.start + to_usize(start);
            start..start + to_usize(length)
        }))
    }

    fn end(&mut self, cookie: u64, limits: &Limits, tally: &mut Tally, now: Instant) -> anyhow::Result<()> {
        let index = self.find(cookie)?;
        let slot = self.slots[index];
        self.slots[index].cookie = None;
        self.free.push(index);
        match slot.failure {
            Some(kind) => *tally.errors.entry(errno::name(kind)).or_default() += 1,
            None if limits.counts(now) => tally.count(&slot, now),
            None => {}
        }
        match slot.kind {
            Kind::Write => self.ledger.written(slot.block, slot.version, slot.failure.is_none()),
            Kind::Read => {
                let complete = slot.failure.is_some() || slot.received == u64::from(self.size);
                ensure!(complete, "the server sent {} bytes of {}", slot.received, self.size);
                self.check(index, tally)?;
            }
            Kind::Flush => {}
        }
        Ok(())
    }

    fn check(&mut self, index: usize, tally: &mut Tally) -> anyhow::Result<()> {
        if !self.ledger.checks() {
            return Ok(());
        }
        let (slot, place) = (self.slots[index], self.place(index));
        let data = slot.failure.is_none().then(|| &self.payloads[place]);
        tally.checked += u64::from(data.is_some());
        if let Err(wrong) = self.ledger.read(slot.block, slot.offset, data).context("reading the image")? {
            tally.wrong += 1;
            if tally.first_wrong.len() < TOLD {
                tally.first_wrong.push(wrong);
            }
        }
        Ok(())
    }

    fn find(&self, cookie: u64) -> anyhow::Result<usize> {
        let index = index(cookie);
        let known = self.slots.get(index).is_some_and(|slot| slot.cookie == Some(cookie));
        ensure!(known, "the server answered a request that is not in flight");
        Ok(index)
    }

    /// Does not look at data from now on.
    pub(crate) fn stop_checking(&mut self) {
        self.ledger = Ledger::Unchecked;
    }

    /// Says goodbye.
    pub(crate) fn close(&self) {
        connection::disconnect(&self.socket, self.mode);
    }
}

/// The slot that a cookie names.
fn index(cookie: u64) -> usize {
    to_usize(cookie & u64::from(u32::MAX))
}
