//! A group as its hearers: finding the mirror, putting blocks together, handing them over.
//!
//! Owns: the thread of a group, its socket, its sessions, and what is counted of datagrams that are none of theirs. Does
//! not own: a session (`heard`), making blocks whole (`mend`).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Notify, mpsc};

use super::heard::{Sense, Session};
use super::mend::{Done, Mender, Whole};
use crate::cast::SessionId;
use crate::cast::form::{self, Datagram, Key, Malformed, Terms};
use crate::cast::receiver::State;
use crate::clock;
use crate::manifest::ImageId;
use crate::mirror::Mirror;
use crate::net::multicast::{Group, Inlet};
use crate::ranges::ByteRange;
use crate::telemetry::Seldom;
use crate::units::to_u64;
use crate::worker::Workers;

/// Sessions of a group that are heard at the same time.
const MOST_SESSIONS: usize = 8;
/// Between two states that others see, while something is heard.
const SNAPSHOT: Duration = Duration::from_millis(200);
/// The longest sleep.
const TICK: Duration = Duration::from_secs(1);
/// Troubles are told at most this often.
const WARNINGS: Duration = Duration::from_secs(60);

/// Who has mirrors that a session can fill.
///
/// *Who implements it*: whoever knows the mirrors of a server. *Who calls it*: the thread of a group; it must not wait for
/// long.
pub trait Audience: fmt::Debug + Send + Sync {
    /// The mirror that has a manifest and holds this.
    fn mirror(&self, image: ImageId) -> Option<Mirror>;

    /// A session fills a mirror from now on. It brings `covers`.
    fn began(&self, mirror: &Mirror, terms: &Terms, covers: Vec<ByteRange>);

    /// It does not any more.
    fn ended(&self, mirror: &Mirror, terms: &Terms, state: State);
}

/// Hears one group. Dropped, it leaves the group, and sessions that are not over are abandoned.
#[derive(Debug)]
pub struct Hearing(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    is_left: AtomicBool,
    left: Notify,
}

/// What was heard so far.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Bytes of all datagrams.
    pub bytes: u64,
    /// Datagrams that are none of ours, or of images that nobody here has.
    pub foreign: u64,
    /// Those with a wrong tag.
    pub forged: u64,
    /// Those that were malformed.
    pub broken: u64,
    /// Those that the system threw away because the queue was full.
    pub overflowed: u64,
    /// Sessions that are under way, and some that were.
    pub sessions: Vec<HeardSession>,
}

/// One session, of one mirror.
#[derive(Debug, Clone)]
pub struct HeardSession {
    /// The session.
    pub session: SessionId,
    /// What it brings.
    pub image: ImageId,
    /// Whether it still does.
    pub state: State,
    /// Blocks that are here, and all; none while the plan is not known.
    pub blocks: (u32, u32),
    /// Bytes of symbols that were kept.
    pub kept_bytes: u64,
    /// Symbols that were here already, or that nobody wanted.
    pub skipped: u64,
    /// Blocks that were mended.
    pub mended: u64,
    /// Blocks whose bytes were not those of the image.
    pub wrong: u64,
}

/// Says which datagrams are to be lost before anybody sees them. Only tests have one.
type Lose = Box<dyn FnMut(&[u8]) -> bool + Send>;

impl Hearing {
    /// Joins a group and fills the mirrors of `audience` with what is heard, on a thread of its own. Blocks until it has
    /// joined.
    pub fn start(
        group: Group,
        interface: Option<String>,
        audience: Arc<dyn Audience>,
        workers: &Arc<Workers>,
    ) -> io::Result<Self> {
        Self::start_losing(group, interface, audience, workers, None)
    }

    pub(super) fn start_losing(
        group: Group,
        interface: Option<String>,
        audience: Arc<dyn Audience>,
        workers: &Arc<Workers>,
        lose: Option<Lose>,
    ) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let (mender, done) = Mender::start(format!("mend-{number}"), workers)?;
        let shared = Arc::new(Shared::default());
        let (report, started) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        let told = Arc::clone(&shared);
        thread::Builder::new().name(format!("hear-{number}")).spawn(move || {
            super::stand_back();
            let begin = || {
                let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
                let inlet = runtime.block_on(async { Inlet::join(group, interface.as_deref()) })?;
                Ok((runtime, inlet))
            };
            match begin() {
                Ok((runtime, inlet)) => {
                    // The receiver waits for this.
                    let _ = report.send(Ok(()));
                    let mut ears = Ears::new(audience, lose);
                    runtime.block_on(ears.hear(inlet, &mender, done, &told));
                }
                Err(error) => drop(report.send(Err(error))),
            }
        })?;
        started.recv().map_err(|_| io::Error::other("the thread of the group died"))??;
        Ok(Self(shared))
    }

    /// What was heard so far; a second ago at most.
    pub fn status(&self) -> Heard {
        self.0.heard().clone()
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        self.0.is_left.store(true, Ordering::Release);
        self.0.left.notify_one();
    }
}

impl Shared {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All sessions of a group.
struct Ears {
    audience: Arc<dyn Audience>,
    sessions: BTreeMap<SessionId, Session>,
    /// Blocks that can be made whole, and have not been handed over.
    ready: Vec<Whole>,
    /// The counters; its sessions are empty.
    counts: Heard,
    overflowed: u32,
    lose: Option<Lose>,
    warnings: Seldom,
    report: Vec<u8>,
}

impl Ears {
    fn new(audience: Arc<dyn Audience>, lose: Option<Lose>) -> Self {
        Self {
            audience,
            sessions: BTreeMap::new(),
            ready: Vec::new(),
            counts: Heard::default(),
            overflowed: 0,
            lose,
            warnings: Seldom::new(WARNINGS),
            report: Vec::new(),
        }
    }

    /// Hears until the group is left.
    async fn hear(&mut self, mut inlet: Inlet, mender: &Mender, mut done: mpsc::Receiver<Done>, shared: &Shared) {
        let (mut shown, mut looked) = (None, None);
        while !shared.is_left.load(Ordering::Acquire) {
            let now = clock::now();
            let sleep = self.next().map_or(TICK, |next| next.saturating_duration_since(now).min(TICK));
            tokio::select! {
                result = inlet.receive(|bytes, from| self.take(bytes, from)) => if let Err(error) = result {
                    self.trouble(&error).await;
                },
                Some(done) = done.recv() => self.delivered(done),
                () = tokio::time::sleep(sleep) => {}
                () = shared.left.notified() => {}
            }
            while let Ok(done) = done.try_recv() {
                self.delivered(done);
            }
            for whole in std::mem::take(&mut self.ready) {
                if !mender.take(whole).await {
                    return;
                }
            }
            let now = clock::now();
            if is_time(&mut looked, now, TICK) {
                self.look(&inlet, now);
            }
            self.report(&inlet, now).await;
            self.sessions.values_mut().for_each(Session::settle);
            if is_time(&mut shown, now, SNAPSHOT) {
                self.show(shared);
            }
        }
        self.sessions.values_mut().for_each(Session::leave);
        self.report(&inlet, clock::now()).await;
        self.sessions.values_mut().for_each(Session::settle);
        self.show(shared);
    }

    async fn trouble(&self, error: &io::Error) {
        if let Some(unsaid) = self.warnings.now(clock::now()) {
            tracing::warn!(%error, unsaid, "cannot hear a group");
        }
        tokio::time::sleep(TICK).await;
    }

    /// Takes a datagram.
    fn take(&mut self, bytes: &[u8], from: SocketAddr) {
        self.counts.bytes += to_u64(bytes.len());
        if self.lose.as_mut().is_some_and(|lose| lose(bytes)) {
            return;
        }
        if let Err(what) = self.understand(bytes, from) {
            match what {
                Malformed::Foreign => self.counts.foreign += 1,
                Malformed::Broken => self.counts.broken += 1,
                Malformed::Forged => self.counts.forged += 1,
            }
        }
    }

    fn understand(&mut self, bytes: &[u8], from: SocketAddr) -> Result<(), Malformed> {
        let (head, image) = form::peek(bytes)?;
        let now = clock::now();
        if !self.sessions.contains_key(&head.session) {
            let image = image.ok_or(Malformed::Foreign)?;
            self.begin(bytes, head.session, image, from, now)?;
        }
        let session = self.sessions.get_mut(&head.session).ok_or(Malformed::Foreign)?;
        let datagram = form::decode(bytes, session.key())?;
        match session.take(now, datagram, from, self.overflowed, &mut self.ready) {
            Sense::Good => Ok(()),
            Sense::Broken => Err(Malformed::Broken),
        }
    }

    /// A session that is not known was announced.
    fn begin(
        &mut self,
        bytes: &[u8],
        id: SessionId,
        image: ImageId,
        from: SocketAddr,
        now: Instant,
    ) -> Result<(), Malformed> {
        let mirror = self.audience.mirror(image).ok_or(Malformed::Foreign)?;
        let key = Key::new(image, id);
        let (_, Datagram::Announce(announce)) = form::decode(bytes, &key)? else { return Err(Malformed::Broken) };
        if !self.make_way() {
            if let Some(unsaid) = self.warnings.now(now) {
                tracing::warn!(session = %id, unsaid, "too many sessions in one group: this one is not heard");
            }
            return Err(Malformed::Foreign);
        }
        let Some(session) = Session::begin(mirror, &announce, key, from, &self.audience, now) else {
            if let Some(unsaid) = self.warnings.now(now) {
                tracing::warn!(session = %id, %image, unsaid, "the mirror cannot be filled: its chunks are not those of the manifest");
            }
            return Err(Malformed::Foreign);
        };
        self.sessions.insert(id, session);
        Ok(())
    }

    /// Makes room for another session. `false`: there is none.
    fn make_way(&mut self) -> bool {
        if self.sessions.len() < MOST_SESSIONS {
            return true;
        }
        let over = self.sessions.iter().find(|(_, session)| session.is_over()).map(|(id, _)| *id);
        over.and_then(|id| self.sessions.remove(&id)).is_some()
    }

    fn delivered(&mut self, done: Done) {
        if let Some(session) = self.sessions.get_mut(&done.session) {
            session.delivered(clock::now(), done);
        }
    }

    /// When somebody has something to do.
    fn next(&self) -> Option<Instant> {
        self.sessions.values().filter_map(Session::next).min()
    }

    /// What is done once a second.
    fn look(&mut self, inlet: &Inlet, now: Instant) {
        self.overflowed = inlet.overflowed();
        self.counts.overflowed = u64::from(self.overflowed);
        let total = self.overflowed;
        self.sessions.values_mut().for_each(|session| session.overflowed(total));
        self.sessions.retain(|_, session| !session.is_forgotten(now));
    }

    /// Sends the reports that are due.
    async fn report(&mut self, inlet: &Inlet, now: Instant) {
        for session in self.sessions.values_mut() {
            self.report.clear();
            if let Some(to) = session.report(now, &mut self.report)
                && let Err(error) = inlet.answer(&self.report, to).await
            {
                tracing::debug!(%to, %error, "cannot report");
            }
        }
    }

    fn show(&self, shared: &Shared) {
        let sessions = self.sessions.values().map(|session| session.figures().clone()).collect();
        *shared.heard() = Heard { sessions, ..self.counts.clone() };
    }
}

/// Whether `every` has passed since the last time it was time.
fn is_time(last: &mut Option<Instant>, now: Instant, every: Duration) -> bool {
    let is_time = last.is_none_or(|last| now.saturating_duration_since(last) >= every);
    if is_time {
        *last = Some(now);
    }
    is_time
}
