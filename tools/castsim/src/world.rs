//! A sender, receivers and the network between them. Symbols are not moved, only their numbers.
//!
//! The sender paces; every datagram takes [`DELAY`] to each receiver and each report as long back, if they are not lost. Time
//! goes from one event to the next.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use headwater::cast::form::{Report, Terms};
use headwater::cast::layout::Layout;
use headwater::cast::receiver::{Delivery, Receiver, State, Take};
#[cfg(test)]
use headwater::cast::sender::Progress;
use headwater::cast::sender::{Packet, Repair, Sender, Settings, Step};
use headwater::cast::{BLOCK, MOST_PARITY, ReceiverId, SessionId};
use headwater::manifest::{ImageId, Shape};

use crate::loss::{Kind, Loss};

/// One way.
pub(crate) const DELAY: Duration = Duration::from_millis(1);
/// Bytes of a symbol.
pub(crate) const SYMBOL: u16 = 1444;
/// Bytes of a datagram beside its symbol, and of headers of Ethernet, IP and UDP.
const HEAD: u64 = 28;
const HEADERS: u64 = 14 + 20 + 8;
/// Bytes that a receiver's queue holds, if it is slower than the sender.
const QUEUE: f64 = 256.0 * 1024.0;
/// Nothing takes longer.
const LONGEST: Duration = Duration::from_secs(3600);

/// Bytes of a datagram with a symbol.
pub(crate) fn datagram() -> u64 {
    u64::from(SYMBOL) + HEAD
}

/// Bytes of a datagram.
fn length(packet: &Packet) -> u64 {
    match packet {
        Packet::Symbol { .. } => datagram(),
        Packet::Announce(_) => 160,
        Packet::Page(_) => 1472,
        Packet::Word(word) => 40 + 8 * (word.coming.len() + word.unicast.len() + 2 * word.dropped.len()) as u64,
    }
}

/// What is simulated.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Bytes of data.
    pub(crate) size: u64,
    pub(crate) chunk: u32,
    pub(crate) receivers: usize,
    pub(crate) kind: Kind,
    pub(crate) loss: f64,
    pub(crate) rate: u64,
    pub(crate) min_rate: u64,
    pub(crate) repair: Repair,
    pub(crate) carousel: bool,
    /// Receivers that the sender waits for; all of them that are there from the start unless told.
    pub(crate) wait_for: Option<u32>,
    pub(crate) seed: u64,
    /// What is particular about the first receivers.
    pub(crate) oddities: Vec<Oddity>,
    /// The sender is killed then.
    pub(crate) sender_dies: Option<Duration>,
    /// It is called off then.
    pub(crate) cancelled: Option<Duration>,
}

/// What is particular about a receiver. Times are since the simulation began.
#[derive(Debug, Clone, Default)]
pub(crate) struct Oddity {
    /// It joins then.
    pub(crate) joins: Duration,
    /// It is killed then.
    pub(crate) dies: Option<Duration>,
    /// Nothing comes or goes meanwhile.
    pub(crate) down: Option<Range<Duration>>,
    /// Bytes per second that it can take.
    pub(crate) takes: Option<f64>,
    /// It has every block already.
    pub(crate) has_all: bool,
}

impl Plan {
    pub(crate) const fn new(size: u64, receivers: usize, kind: Kind, loss: f64) -> Self {
        Self {
            size,
            chunk: 64 * 1024,
            receivers,
            kind,
            loss,
            rate: 25_000_000,
            min_rate: 1_000_000,
            repair: Repair::Auto,
            carousel: false,
            wait_for: None,
            seed: 1,
            oddities: Vec::new(),
            sender_dies: None,
            cancelled: None,
        }
    }

    fn oddity(&self, receiver: usize) -> Oddity {
        self.oddities.get(receiver).cloned().unwrap_or_default()
    }

    fn terms(&self) -> Terms {
        Terms {
            session: SessionId(self.seed),
            image: ImageId([7; 32]),
            shape: Shape { image_size: self.size, chunk_size: self.chunk },
            block: u32::try_from(BLOCK).expect("a few").max(self.chunk),
            symbol: SYMBOL,
            parity: MOST_PARITY,
            pages: 0,
            plan: 0,
            rest: true,
            deadline: None,
        }
    }

    fn settings(&self) -> Settings {
        let there = (0..self.receivers).filter(|receiver| self.oddity(*receiver).joins.is_zero()).count();
        Settings {
            rate: self.rate,
            min_rate: self.min_rate,
            repair: self.repair,
            wait_for: self.wait_for.unwrap_or_else(|| u32::try_from(there).unwrap_or(u32::MAX)),
            patience: Duration::from_secs(120),
            carousel: self.carousel,
        }
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) datagrams: u64,
    /// Of all of them, headers not included.
    pub(crate) bytes: u64,
    /// Data symbols of the image.
    pub(crate) symbols: u64,
    /// From the first symbol until the last receiver that could be was complete.
    pub(crate) seconds: f64,
    /// From then until the sender was done.
    pub(crate) after: f64,
    /// Receivers that have everything.
    pub(crate) whole: usize,
    /// Blocks that receivers lack, in all.
    pub(crate) lacking: u64,
    /// Reports in the second with most of them, since the first symbol.
    pub(crate) peak: usize,
    /// The same while receivers joined.
    #[cfg(test)]
    pub(crate) joining: usize,
    pub(crate) parity: u64,
    pub(crate) repairs: u64,
    /// Bytes per second at the end.
    pub(crate) rate: u64,
    /// The sender came to an end of its own.
    pub(crate) has_ended: bool,
    #[cfg(test)]
    pub(crate) states: Vec<State>,
    #[cfg(test)]
    pub(crate) progress: Option<Progress>,
}

impl Outcome {
    /// All bytes, headers too, by those of the data.
    pub(crate) fn overhead(&self) -> f64 {
        (self.bytes + self.datagrams * HEADERS) as f64 / (self.symbols * u64::from(SYMBOL)) as f64
    }

    /// The time by that of one copy without loss.
    pub(crate) fn slowdown(&self, rate: u64) -> f64 {
        self.seconds * rate as f64 / (self.symbols * datagram()) as f64
    }
}

struct Hearer {
    receiver: Receiver,
    oddity: Oddity,
    /// Bytes in its queue, and since when.
    queue: (f64, Duration),
    complete: Option<Duration>,
    wake: Duration,
}

impl Hearer {
    fn is_there(&self, now: Duration) -> bool {
        now >= self.oddity.joins && self.oddity.dies.is_none_or(|dies| now < dies)
    }

    fn hears(&mut self, now: Duration) -> bool {
        let is_up = self.oddity.down.as_ref().is_none_or(|down| !down.contains(&now));
        self.is_there(now) && is_up && self.has_room(now)
    }

    fn has_room(&mut self, now: Duration) -> bool {
        let Some(takes) = self.oddity.takes else { return true };
        let (queued, since) = self.queue;
        let left = (queued - takes * (now - since).as_secs_f64()).max(0.0);
        let has_room = left + datagram() as f64 <= QUEUE;
        self.queue = (left + if has_room { datagram() as f64 } else { 0.0 }, now);
        has_room
    }

    fn hear(&mut self, now: Duration, number: u32, packet: &Packet) {
        self.receiver.heard(now, number);
        match packet {
            Packet::Announce(announce) => self.receiver.announced(now, announce),
            Packet::Word(word) => self.receiver.told(now, word),
            Packet::Page(_) => {}
            Packet::Symbol { block, index } => {
                if self.receiver.symbol(now, *block, *index) == Take::Complete {
                    self.receiver.delivered(now, *block, Delivery::Stored);
                }
            }
        }
        if self.complete.is_none() && self.receiver.state() == State::Complete {
            self.complete = Some(now);
        }
    }
}

struct World {
    sender: Option<Sender>,
    hearers: Vec<Hearer>,
    loss: Loss,
    now: Duration,
    /// When the sender may send, or wants to be asked.
    free: Duration,
    waits: Duration,
    flying: VecDeque<(Duration, u32, Packet)>,
    reports: VecDeque<(Duration, Report)>,
    number: u32,
    bytes: u64,
    first: Option<Duration>,
    ended: Option<Duration>,
    told: Vec<Duration>,
    cancelled: Option<Duration>,
    dies: Option<Duration>,
}

/// Runs it until the session is over for all.
pub(crate) fn run(plan: &Plan) -> Outcome {
    let terms = plan.terms();
    let layout = Arc::new(Layout::new(&terms, Vec::new(), |_| false).expect("there are data"));
    let symbols = (0..layout.blocks()).map(|block| u64::from(layout.symbols(block))).sum();
    let hearer = |number: usize| {
        let mut id = ReceiverId([0; 16]);
        id.0[..8].copy_from_slice(&(number as u64).to_le_bytes());
        let oddity = plan.oddity(number);
        let seed = plan.seed.wrapping_mul(1_000_003).wrapping_add(number as u64);
        let receiver = Receiver::new(id, Arc::clone(&layout), |_| oddity.has_all, seed);
        Hearer { receiver, oddity, queue: (0.0, Duration::ZERO), complete: None, wake: Duration::MAX }
    };
    let mut world = World {
        sender: Some(Sender::new(Arc::clone(&layout), terms, plan.settings(), plan.seed)),
        hearers: (0..plan.receivers).map(hearer).collect(),
        loss: Loss::new(plan.kind, plan.loss, plan.receivers, plan.seed),
        now: Duration::ZERO,
        free: Duration::ZERO,
        waits: Duration::ZERO,
        flying: VecDeque::new(),
        reports: VecDeque::new(),
        number: 0,
        bytes: 0,
        first: None,
        ended: None,
        told: Vec::new(),
        cancelled: plan.cancelled,
        dies: plan.sender_dies,
    };
    while world.now < LONGEST && world.turn() {}
    world.outcome(symbols)
}

impl World {
    /// Goes to the next event. `false`: there is none.
    fn turn(&mut self) -> bool {
        let sender =
            if self.sender.is_some() && self.ended.is_none() { self.free.max(self.waits) } else { Duration::MAX };
        let flying = self.flying.front().map_or(Duration::MAX, |(at, ..)| *at);
        let report = self.reports.front().map_or(Duration::MAX, |(at, _)| *at);
        let wake = self.hearers.iter().map(|hearer| hearer.wake).min().unwrap_or(Duration::MAX);
        let orders = self.cancelled.unwrap_or(Duration::MAX).min(self.dies.unwrap_or(Duration::MAX));
        let next = sender.min(flying).min(report).min(wake).min(orders);
        if next == Duration::MAX {
            return false;
        }
        self.now = self.now.max(next);
        match next {
            _ if next == orders => self.order(),
            _ if next == flying => self.arrive(),
            _ if next == report => self.take_report(),
            _ if next == sender => self.send(),
            _ => self.wake(),
        }
        true
    }

    fn order(&mut self) {
        if self.dies.take_if(|dies| *dies <= self.now).is_some() {
            self.sender = None;
        }
        if self.cancelled.take_if(|at| *at <= self.now).is_some()
            && let Some(sender) = &mut self.sender
        {
            sender.cancel();
            self.waits = self.now;
        }
    }

    fn send(&mut self) {
        let Some(sender) = &mut self.sender else { return };
        match sender.step(self.now) {
            Step::Send(packet) => {
                let bytes = length(&packet);
                self.bytes += bytes;
                if matches!(packet, Packet::Symbol { .. }) {
                    self.first.get_or_insert(self.now);
                }
                self.free = self.now + Duration::from_secs_f64(bytes as f64 / sender.rate() as f64);
                self.waits = Duration::ZERO;
                self.flying.push_back((self.now + DELAY, self.number, packet));
                self.number = self.number.wrapping_add(1);
            }
            Step::Wait(until) => {
                assert!(until > self.now, "it waits for what has been");
                self.waits = until;
            }
            Step::Ended => self.ended = Some(self.now),
        }
    }

    fn arrive(&mut self) {
        let Some((_, number, packet)) = self.flying.pop_front() else { return };
        self.loss.next();
        for (index, hearer) in self.hearers.iter_mut().enumerate() {
            if !self.loss.is_lost(index) && hearer.hears(self.now) {
                hearer.hear(self.now, number, &packet);
                hearer.wake = hearer.receiver.next();
            }
        }
    }

    fn take_report(&mut self) {
        let Some((_, report)) = self.reports.pop_front() else { return };
        self.told.push(self.now);
        if let Some(sender) = &mut self.sender {
            sender.report(self.now, &report);
            self.waits = Duration::ZERO;
        }
    }

    fn wake(&mut self) {
        for hearer in self.hearers.iter_mut().filter(|hearer| hearer.wake <= self.now) {
            if !hearer.is_there(self.now) {
                hearer.wake = Duration::MAX;
                continue;
            }
            if let Some(report) = hearer.receiver.report(self.now) {
                let is_up = hearer.oddity.down.as_ref().is_none_or(|down| !down.contains(&self.now));
                if is_up && !self.loss.by_chance() {
                    self.reports.push_back((self.now + DELAY, report));
                }
            }
            hearer.wake = hearer.receiver.next();
            assert!(hearer.wake > self.now, "it wants to be asked again at once");
        }
    }

    fn outcome(self, symbols: u64) -> Outcome {
        let first = self.first.unwrap_or_default();
        let last = self.hearers.iter().filter_map(|hearer| hearer.complete).max().unwrap_or(self.now);
        let peak_of = |times: Vec<Duration>| {
            let in_second = |at: &Duration| {
                times.iter().filter(|other| (*at..*at + Duration::from_secs(1)).contains(*other)).count()
            };
            times.iter().map(in_second).max().unwrap_or(0)
        };
        let told = |has_begun: bool| self.told.iter().copied().filter(|at| (*at >= first) == has_begun).collect();
        let progress = self.sender.as_ref().map(Sender::progress);
        Outcome {
            datagrams: u64::from(self.number),
            bytes: self.bytes,
            symbols,
            seconds: last.saturating_sub(first).as_secs_f64(),
            after: self.ended.unwrap_or(self.now).saturating_sub(last).as_secs_f64(),
            whole: self.hearers.iter().filter(|hearer| hearer.complete.is_some()).count(),
            lacking: self.hearers.iter().map(|hearer| hearer.receiver.lacking().len() as u64).sum(),
            peak: peak_of(told(true)),
            #[cfg(test)]
            joining: peak_of(told(false)),
            parity: progress.as_ref().map_or(0, |progress| progress.parity),
            repairs: progress.as_ref().map_or(0, |progress| progress.repairs),
            rate: self.sender.as_ref().map_or(0, Sender::rate),
            has_ended: self.ended.is_some(),
            #[cfg(test)]
            states: self.hearers.iter().map(|hearer| hearer.receiver.state()).collect(),
            #[cfg(test)]
            progress,
        }
    }
}
