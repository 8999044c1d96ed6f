//! A session as its sender: reading, encoding, pacing, listening to reports.
//!
//! A session has a thread: it asks the protocol what is next, encodes it and lets it leave when its time has come. Blocks
//! are read ahead by a worker, where the image belongs, as many as the protocol has in its window; their parity is
//! computed when it is first sent, and both are forgotten when the block leaves the window. So the memory of a session is
//! that of `2 * DEPTH` blocks with their parity.
//!
//! Owns: the thread, its queues, what is known of the session from outside. Does not own: which datagram is next (`cast`),
//! the socket's options (`net`).

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Notify, mpsc, watch};

use super::pace::Pace;
use crate::cast::form::{self, Announce, Datagram, Head, Key, Page, Phase, Report, Run, Terms};
use crate::cast::layout::{self, Layout};
use crate::cast::sender::{MOST_LISTENERS, Packet, Progress, Sender, Settings, Step};
use crate::cast::{DEPTH, ReceiverId, code};
use crate::clock;
use crate::error::Result;
use crate::export::{SharedExport, append};
use crate::net::multicast::{BATCH, Outlet};
use crate::server::ClientTable;
use crate::units::to_u64;
use crate::worker::Workers;

/// Blocks that are read or have been read, at most.
const WINDOW: usize = 2 * DEPTH;
/// Between two states that others see.
const SNAPSHOT: Duration = Duration::from_millis(200);
/// Shorter waits are slept through on the thread: the runtime's timers have a grain of a millisecond.
const SHORT: Duration = Duration::from_millis(3);
/// How often it is looked what clients have been sent.
const LOOK: Duration = Duration::from_micros(500);
/// While a block is waited for, receivers are told so often that the sender lives.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

/// What is to be sent, and how.
#[derive(Debug)]
pub struct Session {
    /// Where the bytes come from. What it reads is believed: receivers hold it against the manifest.
    pub export: SharedExport,
    /// What the session is.
    pub terms: Terms,
    /// The plan of the terms.
    pub plan: Vec<Run>,
    /// Their layout.
    pub layout: Arc<Layout>,
    /// How it is sent.
    pub settings: Settings,
    /// The clients of the same server: what they are sent goes first.
    pub clients: ClientTable,
}

/// A session under way, or over. Cheap to clone; all clones are one. Dropping all of them does not end it.
#[derive(Debug, Clone)]
pub struct Sending(Arc<Shared>);

/// What has become of a session so far.
#[derive(Debug, Clone)]
pub struct Sent {
    /// How far it is.
    pub phase: Phase,
    /// The same by receivers and symbols. Times in it are since the session began.
    pub progress: Progress,
    /// How long ago it began; at its end, how long it took.
    pub elapsed: Duration,
    /// Where receivers are.
    pub addresses: Vec<(ReceiverId, SocketAddr)>,
    /// Bytes of all datagrams, without the headers of UDP and IP.
    pub bytes: u64,
    /// Bytes of datagrams per second, now.
    pub rate: u64,
    /// Reports that could not be believed.
    pub malformed: u64,
    /// Why it ended early.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Shared {
    sent: Mutex<Sent>,
    is_cancelled: AtomicBool,
    cancelled: Notify,
    is_over: watch::Sender<bool>,
}

impl Sending {
    /// Begins a session on a thread of its own. `outlet` makes the socket there; if it cannot, nothing begins. Blocks for
    /// as long as that takes.
    pub fn start(
        session: Session,
        outlet: impl FnOnce() -> io::Result<Outlet> + Send + 'static,
        workers: &Arc<Workers>,
    ) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let shared = Arc::new(Shared {
            sent: Mutex::new(nothing_yet(&session.settings)),
            is_cancelled: AtomicBool::new(false),
            cancelled: Notify::new(),
            is_over: watch::Sender::new(false),
        });
        let (report, started) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        let (told, workers) = (Arc::clone(&shared), Arc::clone(workers));
        let name = format!("cast-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        thread::Builder::new().name(name).spawn(move || {
            let over = Over(told);
            let begin = || {
                let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
                let outlet = runtime.block_on(async { outlet() })?;
                Ok((runtime, outlet))
            };
            match begin() {
                Ok((runtime, outlet)) => {
                    // The receiver waits for this.
                    let _ = report.send(Ok(()));
                    runtime.block_on(send(session, outlet, workers, &over.0));
                }
                Err(error) => drop(report.send(Err(error))),
            }
        })?;
        started.recv().map_err(|_| io::Error::other("the thread of the session died"))??;
        Ok(Self(shared))
    }

    /// How far it is, a fifth of a second ago at most.
    pub fn status(&self) -> Sent {
        self.0.sent().clone()
    }

    /// Calls it off: receivers are told, and fetch what they lack from their upstreams.
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Release);
        self.0.cancelled.notify_one();
    }

    /// Waits until it is over.
    ///
    /// Cancel safety: it goes on.
    pub async fn over(&self) {
        // It fails only when the sender is gone, which is held here.
        let _ = self.0.is_over.subscribe().wait_for(|is_over| *is_over).await;
    }
}

impl Shared {
    fn sent(&self) -> std::sync::MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the session is over when its thread ends, however it ends.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.sent().error = Some("the thread of the session died".to_owned());
        }
        self.0.is_over.send_replace(true);
    }
}

fn nothing_yet(settings: &Settings) -> Sent {
    let progress = Progress { passed: 0, data: 0, parity: 0, repairs: 0, listeners: Vec::new(), is_complete: false };
    Sent {
        phase: Phase::Waiting,
        progress,
        elapsed: Duration::ZERO,
        addresses: Vec::new(),
        bytes: 0,
        rate: settings.rate,
        malformed: 0,
        error: None,
    }
}

/// A block that has been read, and what its bytes came to.
type Read = (u32, Result<Vec<u8>>);

/// Reads blocks, as they are wanted, until nobody wants any more. To be run on a worker. There are never more wanted than
/// [`WINDOW`].
async fn read_ahead(
    export: SharedExport,
    layout: Arc<Layout>,
    symbol: u16,
    mut wanted: mpsc::Receiver<u32>,
    read: mpsc::Sender<Read>,
) {
    while let Some(block) = wanted.recv().await {
        let (export, layout, read) = (Arc::clone(&export), Arc::clone(&layout), read.clone());
        tokio::task::spawn_local(async move {
            let bytes = read_block(&export, &layout, symbol, block).await;
            // The session may be over.
            let _ = read.send((block, bytes)).await;
        });
    }
}

/// The bytes of a block, filled up to whole symbols.
async fn read_block(export: &SharedExport, layout: &Layout, symbol: u16, block: u32) -> Result<Vec<u8>> {
    let whole = usize::from(layout.symbols(block)) * usize::from(symbol);
    let mut bytes = Vec::with_capacity(whole);
    for range in layout.ranges(block) {
        append(&export.read(range).await?, &mut bytes);
    }
    bytes.resize(whole, 0);
    Ok(bytes)
}

/// A block in the window.
#[derive(Debug)]
struct Block {
    data: Vec<u8>,
    parity: Option<Vec<u8>>,
}

impl Block {
    fn symbol(&mut self, index: u16, terms: &Terms) -> &[u8] {
        let size = usize::from(terms.symbol);
        let at = usize::from(index) * size;
        if at < self.data.len() {
            return &self.data[at..at + size];
        }
        let parity = self.parity.get_or_insert_with(|| code::parity(&self.data, terms.symbol, terms.parity));
        &parity[at - self.data.len()..][..size]
    }
}

/// What is to be done.
enum Next {
    /// The batch is to leave, in datagrams of so many bytes.
    Batch(usize),
    /// Nothing before then.
    Wait(Duration),
    /// A block is waited for.
    Block,
    Ended,
}

/// A session on its thread.
struct Line {
    outlet: Outlet,
    sender: Sender,
    terms: Terms,
    pages: Vec<Page>,
    key: Key,
    /// The number of the next datagram.
    number: u32,
    began: Instant,
    pace: Pace,
    /// The rate that it goes on with beside busy clients.
    least: u64,
    clients: ClientTable,
    /// What they had been sent, and when to ask again.
    sent: (u64, Duration),
    /// What the protocol has said and what could not be done yet, and its number.
    staged: Option<(Step, u32)>,
    batch: Vec<u8>,
    blocks: HashMap<u32, Block>,
    /// Blocks that are being read.
    asked: HashSet<u32>,
    wanted: mpsc::Sender<u32>,
    read: mpsc::Receiver<Read>,
    addresses: HashMap<ReceiverId, SocketAddr>,
    bytes: u64,
    malformed: u64,
    /// What was announced last, and when.
    announced: Option<(Announce, Duration)>,
    is_cancelled: bool,
    error: Option<String>,
    shown: Duration,
}

async fn send(session: Session, outlet: Outlet, workers: Arc<Workers>, shared: &Shared) {
    let Session { export, terms, plan, layout, settings, clients } = session;
    let (wanted, requests) = mpsc::channel(WINDOW);
    let (results, read) = mpsc::channel(WINDOW);
    let (symbol, of_reader) = (terms.symbol, Arc::clone(&layout));
    workers.run(move || read_ahead(export, of_reader, symbol, requests, results)).await;
    // Whoever stops them is to have the last of these.
    drop(workers);
    let (pages, _) = layout::pages(&plan, outlet.longest());
    let mut line = Line {
        sender: Sender::new(layout, terms, settings, terms.session.0),
        key: Key::new(terms.image, terms.session),
        outlet,
        terms,
        pages,
        number: 0,
        began: clock::now(),
        pace: Pace::default(),
        least: settings.min_rate,
        sent: (clients.sent().0, Duration::ZERO),
        clients,
        staged: None,
        batch: Vec::new(),
        blocks: HashMap::new(),
        asked: HashSet::new(),
        wanted,
        read,
        addresses: HashMap::new(),
        bytes: 0,
        malformed: 0,
        announced: None,
        is_cancelled: false,
        error: None,
        shown: Duration::ZERO,
    };
    while let Some(now) = line.turn(shared).await {
        if now.saturating_sub(line.shown) >= SNAPSHOT {
            line.shown = now;
            line.show(shared);
        }
    }
    line.show(shared);
}

impl Line {
    fn now(&self) -> Duration {
        clock::now().saturating_duration_since(self.began)
    }

    /// One turn: what has come is heard, then a batch leaves or something is waited for. `None`: it is over.
    async fn turn(&mut self, shared: &Shared) -> Option<Duration> {
        // The runtime looks at the socket meanwhile.
        tokio::task::yield_now().await;
        let now = self.now();
        self.hear(now);
        while let Ok(read) = self.read.try_recv() {
            self.take_block(read);
        }
        if shared.is_cancelled.load(Ordering::Acquire) {
            self.cancel(None);
        }
        self.give_way(now);
        let wait = self.pace.wait(now);
        if !wait.is_zero() {
            self.pause(wait, shared).await;
            return Some(now);
        }
        self.look_ahead();
        match self.gather(now) {
            Next::Batch(size) => {
                let length = self.batch.len();
                self.pace.leave(now, length, self.sender.rate(), self.least);
                self.bytes += to_u64(length);
                if let Err(error) = self.outlet.send(&self.batch, size).await {
                    self.error = Some(format!("cannot send: {error}"));
                    return None;
                }
            }
            Next::Wait(until) => self.pause(until.saturating_sub(now).clamp(SHORT, SNAPSHOT), shared).await,
            Next::Block => self.wait_for_block(now, shared).await,
            Next::Ended => return None,
        }
        Some(now)
    }

    /// Leaves the line to what clients have been sent. They are not asked all the time if there are many.
    fn give_way(&mut self, now: Duration) {
        let (before, again) = self.sent;
        if now >= again {
            let (sent, clients) = self.clients.sent();
            let pause = LOOK + Duration::from_micros(to_u64(clients));
            self.sent = (sent, now + pause);
            self.pace.give_way(now, sent.saturating_sub(before), self.sender.rate());
        }
    }

    /// Has the session end, and says why if that is nobody's wish.
    fn cancel(&mut self, why: Option<String>) {
        self.error = self.error.take().or(why);
        if !self.is_cancelled {
            self.is_cancelled = true;
            self.staged = None;
            self.sender.cancel();
        }
    }

    /// Waits; what comes meanwhile cuts a long wait short.
    async fn pause(&mut self, wait: Duration, shared: &Shared) {
        if wait < SHORT {
            return thread::sleep(wait);
        }
        let now = self.now();
        let mut reports = Vec::new();
        let is_open = !self.read.is_closed();
        tokio::select! {
            () = tokio::time::sleep(wait - Duration::from_millis(1)) => {}
            () = shared.cancelled.notified() => {}
            Some(read) = self.read.recv(), if is_open => self.take_block(read),
            _ = self.outlet.receive(|bytes, from| reports.push((form::decode(bytes, &self.key).ok().and_then(report_of), from))) => {}
        }
        self.take_reports(now, reports);
    }

    /// Waits for blocks from the image, and tells receivers that the sender lives.
    async fn wait_for_block(&mut self, now: Duration, shared: &Shared) {
        if self.asked.is_empty() || self.wanted.is_closed() {
            return self.cancel(Some("nobody reads the image any more".to_owned()));
        }
        if let Some((announce, when)) = self.announced
            && now.saturating_sub(when) >= SIGN_OF_LIFE
        {
            self.announce_again(announce, now).await;
        }
        self.pause(SIGN_OF_LIFE, shared).await;
    }

    /// Says once more what was announced last. It has the number of a datagram that was sent: the protocol does not count
    /// it.
    async fn announce_again(&mut self, announce: Announce, now: Duration) {
        self.batch.clear();
        self.encode(&Packet::Announce(announce), self.number.wrapping_sub(1), now);
        let length = self.batch.len();
        self.bytes += to_u64(length);
        if let Err(error) = self.outlet.send(&self.batch, length).await {
            self.cancel(Some(format!("cannot send: {error}")));
        }
    }

    /// Takes the reports that are there.
    fn hear(&mut self, now: Duration) {
        let mut reports = Vec::new();
        let key = &self.key;
        let take = &mut |bytes: &[u8], from| reports.push((form::decode(bytes, key).ok().and_then(report_of), from));
        if let Err(error) = self.outlet.take(take) {
            tracing::debug!(%error, "cannot hear reports");
        }
        self.take_reports(now, reports);
    }

    fn take_reports(&mut self, now: Duration, reports: Vec<(Option<Report>, SocketAddr)>) {
        for (report, from) in reports {
            let Some(report) = report else {
                self.malformed += 1;
                continue;
            };
            if self.addresses.len() < MOST_LISTENERS || self.addresses.contains_key(&report.receiver) {
                self.addresses.insert(report.receiver, from);
            }
            self.sender.report(now, &report);
        }
    }

    /// Has blocks read that are sent soon, and forgets those that are not.
    fn look_ahead(&mut self) {
        let window = self.sender.window();
        // With its last symbol a block leaves the window; it may still wait for being read.
        let staged = match &self.staged {
            Some((Step::Send(Packet::Symbol { block, .. }), _)) => Some(*block),
            _ => None,
        };
        self.blocks.retain(|block, _| window.contains(block) || Some(*block) == staged);
        for block in window.into_iter().take(WINDOW) {
            self.ask_for(block);
        }
    }

    fn ask_for(&mut self, block: u32) {
        let is_known = self.blocks.contains_key(&block) || self.asked.contains(&block);
        if !is_known && self.asked.len() < WINDOW && self.wanted.try_send(block).is_ok() {
            self.asked.insert(block);
        }
    }

    fn take_block(&mut self, (block, read): Read) {
        self.asked.remove(&block);
        match read {
            Ok(data) => drop(self.blocks.insert(block, Block { data, parity: None })),
            Err(error) => self.cancel(Some(format!("cannot read the image: {}", error.chain()))),
        }
    }

    /// What the protocol says is next. Datagrams are numbered as it names them, whether they leave or not.
    fn step(&mut self, now: Duration) -> (Step, u32) {
        self.staged.take().unwrap_or_else(|| {
            let step = self.sender.step(now);
            let number = self.number;
            if matches!(step, Step::Send(_)) {
                self.number = number.wrapping_add(1);
            }
            (step, number)
        })
    }

    /// Fills the batch with what is to leave now: symbols together, all else alone.
    fn gather(&mut self, now: Duration) -> Next {
        self.batch.clear();
        let (mut count, mut most, mut size) = (0, 1, 0);
        while count < most {
            let (step, number) = self.step(now);
            let alone = match &step {
                Step::Send(Packet::Symbol { block, index }) => {
                    if self.blocks.contains_key(block) {
                        self.encode(&Packet::Symbol { block: *block, index: *index }, number, now);
                        count += 1;
                        if count == 1 {
                            size = self.batch.len();
                            most = Pace::burst(size, self.sender.rate(), BATCH);
                        }
                        continue;
                    }
                    self.ask_for(*block);
                    Next::Block
                }
                Step::Send(packet) if count == 0 => {
                    self.encode(packet, number, now);
                    return Next::Batch(self.batch.len());
                }
                Step::Send(_) => Next::Batch(0),
                Step::Wait(until) if count == 0 => return Next::Wait(*until),
                Step::Ended if count == 0 => return Next::Ended,
                // It is said again.
                Step::Wait(_) | Step::Ended => break,
            };
            self.staged = Some((step, number));
            if count == 0 {
                return alone;
            }
            break;
        }
        Next::Batch(size)
    }

    /// Appends a datagram to the batch.
    fn encode(&mut self, packet: &Packet, number: u32, now: Duration) {
        let Self { batch, blocks, terms, pages, key, .. } = self;
        let head = Head { session: terms.session, number };
        let mut put = |datagram: &Datagram<'_>| form::encode(head, datagram, key, batch);
        match packet {
            Packet::Announce(announce) => {
                self.announced = Some((*announce, now));
                put(&Datagram::Announce(*announce));
            }
            Packet::Page(number) => {
                // There is one for each that the terms promise.
                let Some(page) = pages.get(usize::from(*number)) else { return };
                put(&Datagram::Page(page.clone()));
            }
            Packet::Symbol { block, index } => {
                let Some(bytes) = blocks.get_mut(block).map(|block| block.symbol(*index, terms)) else { return };
                put(&Datagram::Symbol { block: *block, index: *index, bytes });
            }
            Packet::Word(word) => put(&Datagram::Word(word.clone())),
        }
    }

    /// Shows others how far it is.
    fn show(&self, shared: &Shared) {
        let sent = Sent {
            phase: self.announced.map_or(Phase::Waiting, |(announce, _)| announce.phase),
            progress: self.sender.progress(),
            elapsed: self.now(),
            addresses: self.addresses.iter().map(|(receiver, address)| (*receiver, *address)).collect(),
            bytes: self.bytes,
            rate: self.sender.rate(),
            malformed: self.malformed,
            error: self.error.clone(),
        };
        *shared.sent() = sent;
    }
}

fn report_of((_, datagram): (Head, Datagram<'_>)) -> Option<Report> {
    match datagram {
        Datagram::Report(report) => Some(report),
        _ => None,
    }
}
