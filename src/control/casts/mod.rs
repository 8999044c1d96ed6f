//! Casts: images that this server sends to a group.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Casts`]: taking orders, calling them off |
//! | [`order`] | what is said of them, as types that server and command line share |
//! | `plan` | from an order to group, rate, and what is sent first |
//! | `source` | what is to be sent of an image |
//! | `table` | those at work and the last that ended |
//! | `status` | what is said of a session |
//! | [`words`] | telling mirrors where to listen |
//! | `routes` | requests |
//!
//! A cast is not written down: one that is cut off by the end of the server leaves receivers that fetch the rest from
//! their upstreams, and whoever wants it sent again orders it again.
//!
//! Owns: orders to send, and what mirrors are told of them. Does not own: sending (`multicast`), receiving (`mirrors`).
//!
//! **Bounds.** 8 at work, 64 that ended remembered; one of an image to a group.

pub mod order;
mod plan;
pub(super) mod routes;
mod source;
mod status;
mod table;
pub mod words;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::join_all;

use self::order::{CastOrder, CastStatus, CastTaken};
use self::table::Table;
pub use self::words::Words;
use super::operated::{Operated, Refusal};
use crate::cast::form::{Run, Terms, symbol_for};
use crate::cast::layout::{self, Layout, LayoutError};
use crate::cast::{BLOCK, MOST_PARITY, SessionId};
use crate::clock::{self, Moment};
use crate::control::mirrors::{deadline_of, within};
use crate::control::prefetch::PrefetchOrder;
use crate::export::{NodeId, Registry, SharedExport, split_content_name};
use crate::fill::orders::Deadline;
use crate::fill::profile;
use crate::multicast::send::{Sending, Session};
use crate::multicast::terms::Zeroes;
use crate::net::multicast::{Group, Leaving, Outlet};
use crate::server::Steering;
use crate::worker::Workers;
use words::Word;

/// How long those who call a cast off wait until receivers have been told.
const GOODBYE: Duration = Duration::from_secs(2);

/// The casts of a server. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Casts(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    steering: Steering,
    registry: Arc<Registry>,
    operated: Arc<dyn Operated>,
    /// Not kept alive by us: sessions read on them.
    workers: Weak<Workers>,
    words: Words,
    table: Mutex<Table<Arc<Running>>>,
}

/// A cast at work.
#[derive(Debug)]
struct Running {
    image: String,
    group: Group,
    sending: Sending,
    layout: Arc<Layout>,
    symbol: u16,
    session: SessionId,
    deadline: Option<Deadline>,
    called_off: Mutex<bool>,
    /// As long as mirrors are to be told.
    _word: Option<Word>,
}

/// A cast that can begin.
struct Prepared {
    image: String,
    group: Group,
    leaving: Leaving,
    session: Session,
    deadline: Option<Deadline>,
    late_by: Option<Duration>,
}

/// What is sent first, and whether the rest follows.
struct Wanted {
    runs: Vec<Run>,
    rest: bool,
}

impl Casts {
    /// The casts of the server that is steered so, whose exports are in `registry` and operated by `operated`.
    pub fn start(
        steering: Steering,
        registry: Arc<Registry>,
        operated: Arc<dyn Operated>,
        workers: &Arc<Workers>,
    ) -> Self {
        let words = operated.words();
        words.tell_by(steering.notices.clone());
        let workers = Arc::downgrade(workers);
        Self(Arc::new(Shared { steering, registry, operated, workers, words, table: Mutex::default() }))
    }

    /// Begins to send an image.
    ///
    /// Cancel safety: it is begun or not.
    pub async fn cast(&self, image: String, order: CastOrder) -> Result<CastTaken, Refusal> {
        let ended = || Refusal::Failed("the server is going down".to_owned());
        let workers = self.0.workers.upgrade().ok_or_else(ended)?;
        let this = self.clone();
        let taken = workers.ask(move || async move {
            let prepared = this.prepare(image, &order).await?;
            this.begin(prepared, order.no_tell).await
        });
        taken.await.unwrap_or_else(|| Err(ended()))
    }

    /// Those at work and the last that ended, oldest first.
    pub fn list(&self) -> Vec<CastStatus> {
        let table = self.lock();
        let mut all: Vec<_> = table.all_ended().cloned().collect();
        let running: Vec<_> = table.all_running().map(|(id, running)| (id, Arc::clone(running))).collect();
        drop(table);
        all.extend(running.into_iter().map(|(id, running)| running.status(id)));
        all.sort_by_key(|status| status.cast);
        all
    }

    /// What came of all casts so far.
    pub(super) fn totals(&self) -> table::Totals {
        let table = self.lock();
        let mut totals = table.ended_totals();
        table.all_running().for_each(|(id, running)| totals.add(&running.status(id)));
        totals
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<CastStatus> {
        let table = self.lock();
        let running = match table.running(id) {
            Some(running) => Arc::clone(running),
            None => return table.ended(id).cloned(),
        };
        drop(table);
        Some(running.status(id))
    }

    /// Calls one off: receivers fetch the rest from their upstreams. `None`: there is none with this number.
    pub async fn cancel(&self, id: u64) -> Option<CastStatus> {
        let running = self.lock().running(id).cloned();
        if let Some(running) = running {
            running.call_off().await;
        }
        self.get(id)
    }

    /// Calls those off whose images not everybody may have any more.
    pub async fn call_off_restricted(&self) {
        let access = &self.0.steering.access;
        let running: Vec<_> = self.lock().all_running().map(|(_, running)| Arc::clone(running)).collect();
        join_all(running.iter().filter(|running| access.is_restricted(&running.image)).map(|running| async {
            tracing::warn!(image = running.image, "a cast is called off: not everybody may have the image any more");
            running.call_off().await;
        }))
        .await;
    }

    /// Calls all of them off, for the end of the server.
    pub async fn close(&self) {
        let running: Vec<_> = self.lock().all_running().map(|(_, running)| Arc::clone(running)).collect();
        join_all(running.iter().map(|running| running.call_off())).await;
    }

    fn lock(&self) -> MutexGuard<'_, Table<Arc<Running>>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<SharedExport, Refusal> {
        let found = self.0.registry.find(name).filter(|(full, _)| full == name);
        found.map(|(_, export)| export).ok_or_else(|| Refusal::UnknownImage(name.to_owned()))
    }

    /// Everything that can be found out before a datagram leaves. On a worker.
    async fn prepare(&self, image: String, order: &CastOrder) -> Result<Prepared, Refusal> {
        let now = clock::moment();
        let export = self.find(&image)?;
        if self.0.steering.access.is_restricted(&image) {
            let why = "not everybody may have it, and what is sent to a group is for whoever listens";
            return Err(Refusal::Conflict(format!("{image:?} cannot be cast: {why}")));
        }
        let deadline = deadline(order, now)?;
        let zeroes = source::read(&image, &export).await?;
        let group = plan::group(order, zeroes.image)?;
        self.lock().check(&image, group)?;
        let leaving = Leaving { interface: order.interface.clone(), hops: order.ttl.unwrap_or(1), mtu: order.mtu };
        let longest = longest(group, &leaving)?;
        let Wanted { runs, rest } = self.wanted(&image, order, &zeroes)?;
        let (pages, digest) = layout::pages(&runs, longest);
        let block = BLOCK.max(u64::from(zeroes.shape.chunk_size));
        let symbol = symbol_for(longest);
        let symbols = u16::try_from(block.div_ceil(u64::from(symbol.max(1)))).unwrap_or(u16::MAX);
        let too_many = || Refusal::Conflict(LayoutError::TooLarge.to_string());
        let terms = Terms {
            session: random_session(),
            image: zeroes.image,
            shape: zeroes.shape,
            block: u32::try_from(block).map_err(|_| too_many())?,
            symbol,
            parity: MOST_PARITY.min(symbols),
            pages: u16::try_from(pages.len()).map_err(|_| too_many())?,
            plan: digest,
            rest,
            deadline: deadline.map(Deadline::wall),
        };
        let plan: Vec<_> = pages.into_iter().flat_map(|page| page.runs).collect();
        let layout = self.layout(terms, plan.clone(), zeroes).await?;
        source::refuse_gaps(&image, &export, &layout.covers()).await?;
        let pace = plan::pace(order, layout.bytes(), deadline.map(|deadline| deadline.left(now)))?;
        let told = if order.no_tell { 0 } else { self.listeners(&image) };
        let settings = plan::settings(order, pace, told)?;
        let clients = self.0.steering.clients.clone();
        let session = Session { export, terms, plan, layout, settings, clients };
        Ok(Prepared { image, group, leaving, session, deadline, late_by: pace.late_by })
    }

    /// The layout of a session: a look at every chunk, which takes its time for a large image.
    async fn layout(&self, terms: Terms, plan: Vec<Run>, zeroes: Zeroes) -> Result<Arc<Layout>, Refusal> {
        let made = tokio::task::spawn_blocking(move || Layout::new(&terms, plan, |chunk| zeroes.is_zero(chunk))).await;
        let made = made.map_err(|_| Refusal::Failed("the thread died".to_owned()))?;
        made.map(Arc::new).map_err(|error| Refusal::Conflict(error.to_string()))
    }

    /// What an order is for.
    fn wanted(&self, image: &str, order: &CastOrder, zeroes: &Zeroes) -> Result<Wanted, Refusal> {
        let size = zeroes.shape.image_size;
        let (ranges, rest) = match (&order.ranges, &order.profile, order.all) {
            (None, None, _) => (self.profile(image, profile::Tag::default().as_str(), size).unwrap_or_default(), true),
            (Some(ranges), None, false) => (within(image, ranges, size)?, false),
            (None, Some(tag), false) => {
                let none = || Refusal::Conflict(format!("there is no profile {tag} of {image:?} here"));
                (self.profile(image, tag, size).ok_or_else(none)?, false)
            }
            _ => return Err(Refusal::Invalid("of ranges, profile and all only one makes sense".to_owned())),
        };
        let runs = plan::runs(&ranges, zeroes.shape);
        let runs = runs.ok_or_else(|| Refusal::Conflict(LayoutError::TooLarge.to_string()))?;
        Ok(Wanted { runs, rest })
    }

    /// What earlier runs read, in the order in which it is wanted.
    fn profile(&self, image: &str, tag: &str, size: u64) -> Option<Vec<crate::ranges::ByteRange>> {
        let profiles = self.0.operated.profiles(image).ok()?;
        Some(profiles.get(&tag.parse().ok()?)?.wishes(size))
    }

    /// Mirrors that hear at once what they are told of an export.
    fn listeners(&self, image: &str) -> u32 {
        let (base, content) = split_content_name(image);
        let whole = self.find(image).ok().and_then(|export| export.facts().identity);
        let mut names = BTreeSet::from([image.to_owned()]);
        names.extend(whole.filter(|_| content.is_none()).map(|identity| format!("{base}@{identity}")));
        let clients = names.iter().flat_map(|name| self.0.steering.clients.of_export(name));
        let nodes: BTreeSet<_> =
            clients.filter(|client| client.hears_notices()).filter_map(|client| client.node()).collect();
        u32::try_from(nodes.len()).unwrap_or(u32::MAX)
    }

    async fn begin(&self, prepared: Prepared, no_tell: bool) -> Result<CastTaken, Refusal> {
        let Prepared { image, group, leaving, session, deadline, late_by } = prepared;
        let (layout, terms, settings) = (Arc::clone(&session.layout), session.terms, session.settings);
        let ended = || Refusal::Failed("the server is going down".to_owned());
        let workers = self.0.workers.upgrade().ok_or_else(ended)?;
        let id = self.lock().reserve(&image, group)?;
        let begun = Arc::clone(&workers);
        let starting = move || Sending::start(session, move || Outlet::open(group, &leaving), &begun);
        let started =
            tokio::task::spawn_blocking(starting).await.unwrap_or_else(|died| Err(std::io::Error::other(died)));
        let sending = started.map_err(|error| {
            self.lock().withdraw(id);
            Refusal::Failed(format!("cannot begin to send: {error}"))
        })?;
        let (total_bytes, wait_for, rate) = (layout.bytes(), settings.wait_for, settings.rate);
        let (session, symbol) = (terms.session, terms.symbol);
        tracing::info!(cast = id, name = image, %session, %group, total_bytes, wait_for, rate, "casting");
        let running = Running {
            _word: (!no_tell).then(|| self.0.words.say(&image, group)),
            image,
            group,
            sending,
            layout,
            symbol,
            session,
            deadline,
            called_off: Mutex::new(false),
        };
        let running = Arc::new(running);
        self.lock().begin(id, Arc::clone(&running));
        let this = self.clone();
        workers
            .run(move || async move {
                running.sending.over().await;
                this.ended(id, &running);
            })
            .await;
        Ok(CastTaken {
            cast: id,
            session: session.to_string(),
            group: group.to_string(),
            total_bytes,
            wait_for,
            rate,
            late_by_seconds: late_by.map(|late| late.as_secs_f64()),
        })
    }

    fn ended(&self, id: u64, running: &Running) {
        let last = running.status(id);
        let complete =
            last.receivers.iter().filter(|receiver| receiver.state == order::ReceiverState::Complete).count();
        tracing::info!(
            cast = id,
            name = last.image,
            state = last.state.name(),
            seconds = last.seconds,
            sent_bytes = last.sent_bytes,
            receivers = last.receivers.len(),
            complete,
            error = last.error,
            "a cast is over"
        );
        // With the last of what there is of it, mirrors are told that it is over.
        drop(self.lock().end(id, last));
    }
}

impl Running {
    /// Calls it off, and waits until receivers have been told; not for long.
    async fn call_off(&self) {
        *self.called_off.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.sending.cancel();
        // If it takes longer, they find out by the silence.
        let _ = tokio::time::timeout(GOODBYE, self.sending.over()).await;
    }
}

/// Bytes of the longest datagram that reaches a group. In a runtime.
fn longest(group: Group, leaving: &Leaving) -> Result<usize, Refusal> {
    let outlet = Outlet::open(group, leaving);
    let outlet = outlet.map_err(|error| Refusal::Conflict(format!("cannot send to {group}: {error}")))?;
    Ok(outlet.longest())
}

fn deadline(order: &CastOrder, now: Moment) -> Result<Option<Deadline>, Refusal> {
    let CastOrder { deadline, deadline_seconds, .. } = *order;
    deadline_of(&PrefetchOrder { deadline, deadline_seconds, ..PrefetchOrder::default() }, now)
}

fn random_session() -> SessionId {
    let [a, b, c, d, e, f, g, h, ..] = NodeId::random().0;
    SessionId(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}
