//! Mirrors that are filled by casts: which groups are heard, and what becomes of what a session did not bring.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | sessions and their orders |
//! | `groups` | when a group is joined and left |
//!
//! For each session that fills a mirror there is an order to prefetch what it covers, written down like any other. As
//! long as the session lasts the order is held, and so is the background of that image; then it fetches what is lacking.
//! So a mirror that is killed, or whose sender is, gets the rest by itself. After a restart an order is held for a
//! moment, in which its session may be heard again.
//!
//! Owns: all that. Does not own: hearing and storing (`multicast`), carrying out orders (`fill`).
//!
//! **Bounds.** 16 groups; 256 beginnings and ends of sessions that wait to be noted: a session of which that is lost
//! leaves the rest to demand.

mod groups;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Notify, mpsc};

use self::groups::Groups;
use super::{Generation, MirrorError, Mirrors, Shared};
use crate::cast::SessionId;
use crate::cast::form::Terms;
use crate::cast::receiver::State as Reception;
use crate::clock::{self, Moment};
use crate::control::casts::order::{HeardStatus, ReceptionStatus};
use crate::control::casts::words::{Word, Words};
use crate::export::{ImageId, NodeId};
use crate::fill::deadline::Strategy;
use crate::fill::orders::{Deadline, MOST_RANGES, Order, Spec, State, What};
use crate::mirror::Mirror;
use crate::multicast::receive::{Audience, Heard, HeardSession, Hearing};
use crate::net::multicast::Group;
use crate::ranges::{ByteRange, fewer};
use crate::telemetry::seldom;
use crate::worker::Workers;

/// Beginnings and ends of sessions that wait to be noted.
const EVENTS: usize = 256;
/// How often groups are looked at if nothing happens.
const LOOK: Duration = Duration::from_secs(1);
/// After a restart orders of sessions are held for so long.
const GRACE: Duration = Duration::from_secs(15);

/// What an operator says of groups.
#[derive(Debug, Clone, Default)]
pub struct Hear {
    /// Those that are heard for good.
    pub join: Vec<Group>,
    /// The interface, by its name or an address of it; `None`: that of the route to the group.
    pub interface: Option<String>,
    /// Whether those are heard too that servers name.
    pub by_word: bool,
}

/// What the mirrors of a server hear.
#[derive(Debug)]
pub(super) struct Receptions {
    hear: Hear,
    /// What is told to mirrors below.
    words: Words,
    groups: Mutex<Groups<Hearing>>,
    /// Sessions that fill a mirror now.
    sessions: Mutex<BTreeMap<SessionId, NodeId>>,
    started: Moment,
    changed: Notify,
    events: mpsc::Sender<Event>,
    /// Until somebody notes them.
    noted: Mutex<Option<mpsc::Receiver<Event>>>,
}

/// What the thread of a group tells.
#[derive(Debug)]
enum Event {
    Began { node: NodeId, session: SessionId, deadline: Option<SystemTime>, covers: Vec<ByteRange> },
    Ended { node: NodeId },
}

/// A group that a server names: heard, if that is wanted, and told to mirrors below, as long as this lives.
#[derive(Debug)]
pub(super) struct Tip {
    receptions: Arc<Receptions>,
    word: Word,
}

impl Receptions {
    pub(super) fn new(hear: Hear) -> Arc<Self> {
        let (events, noted) = mpsc::channel(EVENTS);
        Arc::new(Self {
            hear,
            words: Words::default(),
            groups: Mutex::default(),
            sessions: Mutex::default(),
            started: clock::moment(),
            changed: Notify::new(),
            events,
            noted: Mutex::new(Some(noted)),
        })
    }

    /// What is told to mirrors below.
    pub(super) const fn words(&self) -> &Words {
        &self.words
    }

    /// A server says that the image that is called so here is sent to a group.
    pub(super) fn named(self: &Arc<Self>, name: &str, group: Group) -> Tip {
        if self.hear.by_word {
            self.groups().named(group);
            self.changed.notify_one();
        }
        Tip { receptions: Arc::clone(self), word: self.words.say(name, group) }
    }

    /// Whether an order waits for a cast.
    fn holds(&self, order: &Order, now: Instant) -> bool {
        let What::Cast(session) = order.what else { return false };
        // One that was ordered since belongs to a session that is heard, or was.
        let is_old = order.ordered_at < self.started.wall;
        let is_early = is_old && now.saturating_duration_since(self.started.steady) < GRACE;
        order.state == State::Active && (is_early || self.sessions().contains_key(&session))
    }

    fn note(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            tracing::warn!("too many casts begin and end at once: what one of them lacks is fetched on demand only");
        }
    }

    fn groups(&self) -> MutexGuard<'_, Groups<Hearing>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<SessionId, NodeId>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tip {
    /// The group.
    pub(super) const fn group(&self) -> Group {
        self.word.group()
    }
}

impl Drop for Tip {
    fn drop(&mut self) {
        if self.receptions.hear.by_word {
            self.receptions.groups().unnamed(self.word.group());
        }
    }
}

/// The mirrors of a server, for the threads of groups. It does not keep them alive.
#[derive(Debug)]
struct Ear(Weak<Shared>);

impl Ear {
    fn of(mirrors: &Mirrors) -> Arc<dyn Audience> {
        Arc::new(Self(Arc::downgrade(&mirrors.0)))
    }
}

impl Audience for Ear {
    fn mirror(&self, image: ImageId) -> Option<Mirror> {
        let mirrors = Mirrors(self.0.upgrade()?);
        let generations = mirrors.generations();
        let is_it = |mirror: &&Mirror| mirror.image() == Some(image) && mirror.has_manifest();
        generations.iter().rev().map(|generation| &generation.mirror).find(is_it).cloned()
    }

    fn began(&self, mirror: &Mirror, terms: &Terms, covers: Vec<ByteRange>) {
        let Some(shared) = self.0.upgrade() else { return };
        let (node, session) = (mirror.node(), terms.session);
        shared.receptions.sessions().insert(session, node);
        shared.receptions.note(Event::Began { node, session, deadline: terms.deadline, covers });
    }

    fn ended(&self, mirror: &Mirror, terms: &Terms, state: Reception) {
        let Some(shared) = self.0.upgrade() else { return };
        shared.receptions.sessions().remove(&terms.session);
        seldom!(info, session = %terms.session, state = name_of(state), "a cast is over for a mirror");
        shared.receptions.note(Event::Ended { node: mirror.node() });
    }
}

impl Mirrors {
    /// Joins the groups that the operator named, and sees to all that are heard from now on.
    pub(super) async fn listen(&self, workers: &Arc<Workers>) -> Result<(), MirrorError> {
        for group in self.0.receptions.hear.join.clone() {
            let hearing = self.hear(group, workers);
            let hearing = hearing.map_err(|source| MirrorError::Join { group, source })?;
            self.0.receptions.groups().keep(group, hearing);
            tracing::info!(%group, "joined");
        }
        let noted = self.0.receptions.noted.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(noted) = noted {
            let this = self.clone();
            workers.run(move || this.note_events(noted)).await;
        }
        let this = self.clone();
        workers.run(move || this.mind_groups()).await;
        Ok(())
    }

    /// Blocks until the group is joined.
    fn hear(&self, group: Group, workers: &Arc<Workers>) -> std::io::Result<Hearing> {
        Hearing::start(group, self.0.receptions.hear.interface.clone(), Ear::of(self), workers)
    }

    /// Joins and leaves groups as servers name them, for ever.
    async fn mind_groups(self) {
        loop {
            let now = clock::now();
            let Some(workers) = self.0.workers.upgrade() else { return };
            let due = self.0.receptions.groups().due(now);
            for group in due {
                let (this, begun) = (self.clone(), Arc::clone(&workers));
                let joining = tokio::task::spawn_blocking(move || this.hear(group, &begun)).await;
                match joining.unwrap_or_else(|died| Err(std::io::Error::other(died))) {
                    Ok(hearing) => {
                        tracing::info!(%group, "joined: the upstream sends an image there");
                        self.0.receptions.groups().joined(group, hearing, now);
                    }
                    Err(error) => tracing::warn!(%group, %error, "cannot join a group to which an image is sent"),
                }
            }
            drop(workers);
            let left = self.0.receptions.groups().review(now, |hearing| {
                let Heard { bytes, sessions, .. } = hearing.status();
                (bytes > 0, sessions.iter().any(|session| session.state == Reception::Receiving))
            });
            for (group, hearing) in left {
                tracing::info!(%group, "left");
                // Sessions that are not over end now, and that is noted.
                drop(hearing);
            }
            // Whether it is news or time does not matter.
            let _ = tokio::time::timeout(LOOK, self.0.receptions.changed.notified()).await;
        }
    }

    /// Notes sessions that begin and end, for ever.
    async fn note_events(self, mut noted: mpsc::Receiver<Event>) {
        while let Some(event) = noted.recv().await {
            let node = match &event {
                Event::Began { node, .. } | Event::Ended { node } => *node,
            };
            let Some(generation) = self.of_node(node) else { continue };
            if let Event::Began { session, deadline, covers, .. } = event {
                let this = self.clone();
                let ordered = Arc::clone(&generation);
                let ordering = move || this.order_rest(&ordered, session, deadline, &covers);
                if tokio::task::spawn_blocking(ordering).await.is_err() {
                    tracing::error!(%session, "cannot order the rest of a cast: the thread died");
                }
            }
            let is_held = self.0.receptions.sessions().values().any(|other| *other == node);
            generation.filled.image().hold(is_held);
            self.hold_orders();
        }
    }

    /// Orders what a session covers, unless that was done. Blocks.
    fn order_rest(
        &self,
        generation: &Arc<Generation>,
        session: SessionId,
        deadline: Option<SystemTime>,
        covers: &[ByteRange],
    ) {
        let (name, now) = (self.operated_name(generation), clock::moment().wall);
        let identity = generation.mirror.image();
        let is_it = |order: &Arc<Order>| order.what == What::Cast(session) && order.identity == identity;
        if self.0.orders.list().iter().any(is_it) || generation.mirror.here(covers).is_all() {
            return;
        }
        if let Err(error) = generation.mirror.check_room(covers) {
            return tracing::warn!(name, %error, "what a cast does not bring is left to demand");
        }
        let deadline = deadline.filter(|deadline| *deadline > now).map(Deadline::at);
        let spec = Spec {
            identity,
            ranges: fewer(covers, MOST_RANGES),
            what: What::Cast(session),
            deadline,
            strategy: if deadline.is_some() { Strategy::Jit } else { Strategy::default() },
            ..Spec::all(&name, 0)
        };
        match self.0.orders.add(spec, now) {
            Ok(order) => self.hand_over(order, generation),
            Err(error) => tracing::warn!(name, %error, "what a cast does not bring is left to demand"),
        }
    }

    /// Holds the orders that wait for casts, and lets the others go on.
    pub(super) fn hold_orders(&self) {
        let now = clock::now();
        self.0.engine.hold(|order| self.0.receptions.holds(order, now));
    }

    /// Whether an order waits for a cast.
    pub(super) fn is_held(&self, order: &Order) -> bool {
        self.0.receptions.holds(order, clock::now())
    }

    fn of_node(&self, node: NodeId) -> Option<Arc<Generation>> {
        self.generations().iter().find(|generation| generation.mirror.node() == node).cloned()
    }

    /// What is heard, as operators see it.
    pub(super) fn reception_list(&self) -> Vec<ReceptionStatus> {
        let heard: Vec<_> =
            self.0.receptions.groups().heard().map(|(group, hearing)| (group, hearing.status())).collect();
        heard.into_iter().map(|(group, heard)| self.reception(group, heard)).collect()
    }

    fn reception(&self, group: Group, heard: Heard) -> ReceptionStatus {
        let Heard { bytes, foreign, forged, broken, overflowed, sessions } = heard;
        ReceptionStatus {
            group: group.to_string(),
            interface: self.0.receptions.hear.interface.clone(),
            bytes,
            foreign,
            forged,
            broken,
            overflowed,
            sessions: sessions.iter().map(|session| self.heard_session(session)).collect(),
        }
    }

    fn heard_session(&self, heard: &HeardSession) -> HeardStatus {
        let generations = self.generations().clone();
        let of_image = generations.iter().rev().find(|generation| generation.mirror.image() == Some(heard.image));
        let name = of_image.map_or_else(|| heard.image.to_string(), |generation| self.operated_name(generation));
        HeardStatus {
            session: heard.session.to_string(),
            image: name,
            state: name_of(heard.state).to_owned(),
            done_blocks: heard.blocks.0,
            blocks: heard.blocks.1,
            kept_bytes: heard.kept_bytes,
            skipped: heard.skipped,
            mended: heard.mended,
            wrong: heard.wrong,
        }
    }
}

const fn name_of(state: Reception) -> &'static str {
    match state {
        Reception::Receiving => "receiving",
        Reception::Complete => "complete",
        Reception::Lacking => "lacking",
        Reception::Abandoned => "abandoned",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(what: What, state: State) -> Order {
        let spec = Spec { what, ..Spec::all("a", 1000) };
        let directory = tempfile::tempdir().unwrap();
        let space = crate::mirror::Space::new(directory.path(), crate::mirror::SpaceSettings::default());
        let orders = crate::fill::orders::Orders::open(directory.path(), &space);
        let order = orders.add(spec, clock::moment().wall).unwrap();
        Order { state, ..Order::clone(&order) }
    }

    #[test]
    fn orders_of_casts_are_held_while_these_last_and_after_a_restart_for_a_moment() {
        let receptions = Receptions::new(Hear::default());
        let Moment { steady: early, wall } = receptions.started;
        let (session, late) = (SessionId(7), early + GRACE);
        let new = order(What::Cast(session), State::Active);
        assert!(!receptions.holds(&new, early), "its session was heard since the start, and is over");
        let cast = Order { ordered_at: wall - GRACE, ..new };
        assert!(receptions.holds(&cast, early) && !receptions.holds(&cast, late));
        receptions.sessions().insert(session, NodeId([1; 16]));
        assert!(receptions.holds(&cast, late));
        assert!(!receptions.holds(&order(What::Cast(SessionId(8)), State::Active), late));
        assert!(!receptions.holds(&order(What::Cast(session), State::Cancelled), late));
        assert!(!receptions.holds(&order(What::All, State::Active), early));
    }

    #[test]
    fn what_a_server_names_is_told_below_also_by_those_that_do_not_listen() {
        let group: Group = "239.1.2.3:7".parse().unwrap();
        for by_word in [false, true] {
            let receptions = Receptions::new(Hear { by_word, ..Hear::default() });
            let notices = crate::server::Notices::default();
            receptions.words().tell_by(notices.clone());
            let tip = receptions.named("a", group);
            assert_eq!((notices.groups("a"), tip.group()), (vec![group], group));
            assert_eq!(receptions.groups().due(clock::now()).len(), usize::from(by_word));
            drop(tip);
            assert!(notices.groups("a").is_empty());
            assert!(receptions.groups().due(clock::now() + GRACE).is_empty());
        }
    }
}
