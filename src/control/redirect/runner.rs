//! Moving clients, each by its way.
//!
//! | way | what is done | when it has worked |
//! | --- | --- | --- |
//! | notice | the mirror is told | all its connections have left |
//! | relay | the other server's export is put under each connection | each has been switched |
//! | close | the connection is closed when all is answered | it has left; it comes back where its own address leads |
//!
//! While the own export cannot be read, clients that are moved by notice or close are relayed meanwhile.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::claims::Subject;
use super::order::{ClientState, RedirectState, Way};
use super::relay::Relay;
use super::select::Group;
use super::table::{Order, milliseconds};
use super::targets::{Targets, can_serve, open_relay};
use super::{Plan, Redirects};
use crate::clock;
use crate::export::{NodeId, SharedExport};
use crate::server::{ClientHandle, News, SwitchError, Switched};

/// Clients of one order that are moved at the same time.
const AT_ONCE: usize = 32;
/// How long a client may take to leave.
const LEAVING: Duration = Duration::from_secs(30);
/// How long a mirror may take to come back after this server was restarted.
const RETURNING: Duration = Duration::from_secs(600);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_secs(1);

const CALLED_OFF: &str = "the order was called off";

/// What is done to one client.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) subject: Subject,
    /// How; or why not at all.
    how: Result<How, &'static str>,
    handles: Vec<ClientHandle>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Notice(NodeId),
    /// As it was before the restart.
    NoticeAgain(NodeId),
    Relay,
    Close,
}

/// The way by which a client is moved; `None`: by none.
pub(super) fn way_of(plan: &Plan, group: &Group) -> Option<Way> {
    let hears = group.hears && group.node.is_some();
    match plan.way {
        _ if plan.targets.is_here => Some(Way::Relay),
        // Who can be told is told, unless there is nowhere to go.
        Way::Close if plan.is_drain && hears && !plan.targets.uris.is_empty() => Some(Way::Notice),
        Way::Auto if hears => Some(Way::Notice),
        Way::Auto if plan.is_drain => None,
        Way::Auto => Some(Way::Relay),
        Way::Notice if !hears => None,
        way => Some(way),
    }
}

impl Move {
    pub(super) fn new(group: &Group, way: Option<Way>, handles: Vec<ClientHandle>) -> Self {
        let first = group.ids.first().copied().unwrap_or_default();
        let subject = group.node.map_or(Subject::Client(first), Subject::Mirror);
        let how = match (way, group.node) {
            (Some(Way::Notice), Some(node)) => Ok(How::Notice(node)),
            (Some(Way::Close), _) => Ok(How::Close),
            (Some(_), _) => Ok(How::Relay),
            (None, _) => Err("it is not a mirror that listens: it has to leave by itself, or to be closed"),
        };
        Self { subject, how, handles }
    }

    /// Whether there is anything to do.
    pub(super) const fn is_open(&self) -> bool {
        matches!(self.how, Ok(How::Notice(_) | How::NoticeAgain(_)))
    }
}

/// What is left to be done of an order whose server was restarted.
pub(super) fn after_restart(order: &Order) -> Vec<Move> {
    let each = |index| {
        order.row(index, |row| {
            let node = row.report.mirror.as_ref().and_then(|node| node.parse::<NodeId>().ok());
            let subject = node.map_or(Subject::Client(row.report.id), Subject::Mirror);
            let is_over = row.report.state.is_final();
            let how = match node.filter(|_| row.report.way == Way::Notice && !is_over) {
                Some(node) => Ok(How::NoticeAgain(node)),
                None => Err("the server was restarted"),
            };
            if how.is_err() && !is_over {
                row.report.state = ClientState::Left;
                row.report.why = Some("its connection was lost when this server was restarted".to_owned());
            }
            Move { subject, how, handles: Vec::new() }
        })
    };
    (0..order.rows()).map(each).collect()
}

/// What came of a client.
struct Outcome {
    state: ClientState,
    why: Option<String>,
}

impl Outcome {
    const fn plain(state: ClientState) -> Self {
        Self { state, why: None }
    }

    fn because(state: ClientState, why: impl Into<String>) -> Self {
        Self { state, why: Some(why.into()) }
    }
}

/// An order at work.
struct Run<'a> {
    redirects: &'a Redirects,
    order: &'a Order,
    targets: &'a Targets,
    old: &'a SharedExport,
    relay: OnceCell<Result<Arc<Relay>, String>>,
    /// Whether clients must be relayed before anything else is tried.
    is_urgent: bool,
}

impl Redirects {
    /// Carries an order out, and goes on watching its relays.
    pub(super) async fn carry_out(self, order: Arc<Order>, moves: Vec<Move>, targets: Targets, old: SharedExport) {
        let leaves = |each: &Move| matches!(each.how, Ok(How::Notice(_) | How::NoticeAgain(_) | How::Close));
        let is_urgent =
            !targets.uris.is_empty() && !old.facts().writable && moves.iter().any(leaves) && !can_serve(&old).await;
        let run =
            Run { redirects: &self, order: &order, targets: &targets, old: &old, relay: OnceCell::new(), is_urgent };
        stream::iter(moves.iter().enumerate())
            .for_each_concurrent(AT_ONCE, |(index, each)| run.move_one(index, each))
            .await;
        let relay = run.relay.into_inner().and_then(Result::ok);
        let status = order.status();
        let nobody = status.counts.total > 0 && status.counts.failed == status.counts.total;
        let (state, error) = if nobody {
            let why = status.clients.iter().find_map(|client| client.why.clone());
            (RedirectState::Failed, Some(why.unwrap_or_else(|| "no client could be moved".to_owned())))
        } else {
            (RedirectState::Done, None)
        };
        self.0.claims.release(order.id);
        self.0.table.end(&order, state, error).await;
        let counts = order.status().counts;
        tracing::info!(order = order.id, moved = counts.moved, of = counts.total, "an order to redirect has ended");
        if let Some(relay) = relay {
            self.watch(&order, &moves, relay).await;
        }
    }

    /// Brings clients back when the relay that serves them went back, until the last of them has left it.
    async fn watch(&self, order: &Order, moves: &[Move], relay: Arc<Relay>) {
        let mut went_back = relay.went_back();
        // From here on clients alone keep it.
        drop(relay);
        let Ok(reason) = went_back.wait_for(Option::is_some).await.map(|reason| reason.clone()) else { return };
        let why = format!("went back: {}", reason.unwrap_or_default());
        for (index, each) in moves.iter().enumerate() {
            let mut is_ours = false;
            for handle in &each.handles {
                if self.0.claims.is_relayed_by(handle.id(), order.id) {
                    is_ours = true;
                    self.0.claims.set_relayed(handle.id(), None);
                    // Who has left needs nothing.
                    let _ = handle.switch(None).await;
                }
            }
            if is_ours {
                order.row(index, |row| {
                    (row.report.state, row.report.why) = (ClientState::Stayed, Some(why.clone()));
                });
            }
        }
        self.0.table.note();
    }
}

impl Run<'_> {
    async fn move_one(&self, index: usize, each: &Move) {
        if self.order.row(index, |row| row.report.state.is_final()) {
            return;
        }
        let outcome = match each.how {
            _ if *self.order.ended().borrow() => Outcome::because(ClientState::Stayed, CALLED_OFF),
            Err(why) => Outcome::because(ClientState::Stayed, why),
            Ok(how) => match self.taken_over(each) {
                Some(outcome) => outcome,
                None => {
                    self.order.row(index, |row| row.report.state = ClientState::Moving);
                    self.go(index, each, how).await
                }
            },
        };
        self.order.row(index, |row| {
            (row.report.state, row.report.why) = (outcome.state, outcome.why);
        });
        self.redirects.0.table.note();
    }

    fn taken_over(&self, each: &Move) -> Option<Outcome> {
        let other = self.redirects.0.claims.is_taken_over(self.order.id, each.subject)?;
        Some(by_another(other))
    }

    async fn go(&self, index: usize, each: &Move, how: How) -> Outcome {
        if how == How::Relay {
            return self.relay_each(index, each).await;
        }
        let relayed = self.is_urgent && self.relay_each(index, each).await.state == ClientState::Moved;
        let mut outcome = match how {
            How::Notice(node) => self.tell(index, each, node, Instant::from_std(clock::now()) + LEAVING, true).await,
            How::NoticeAgain(node) => {
                self.tell(index, each, node, Instant::from_std(clock::now()) + RETURNING, false).await
            }
            How::Close | How::Relay => self.close_each(index, each).await,
        };
        if relayed && matches!(outcome.state, ClientState::Stayed | ClientState::Failed) {
            let why = outcome.why.unwrap_or_default();
            outcome =
                Outcome::because(ClientState::Moved, format!("{why}; relayed, because it cannot be served from here"));
        }
        outcome
    }

    /// Tells a mirror, and waits until it has left.
    async fn tell(&self, index: usize, each: &Move, node: NodeId, deadline: Instant, was_seen: bool) -> Outcome {
        let notices = &self.redirects.0.steering.notices;
        let export = &self.order.status().export;
        notices.tell(export, node, News::Moved(self.targets.uris.clone()));
        let mut ended = self.order.ended();
        let outcome = tokio::select! {
            seen = self.left(export, node, was_seen) => match seen {
                true => Outcome::plain(ClientState::Moved),
                false => Outcome::because(ClientState::Left, "it did not come back"),
            },
            () = sleep_until(deadline) => self.too_late(export, node),
            _ = ended.wait_for(|ended| *ended) => Outcome::because(ClientState::Stayed, CALLED_OFF),
            other = self.redirects.0.claims.taken_over(self.order.id, each.subject) => by_another(other),
        };
        // What another order tells now stands.
        if self.redirects.0.claims.is_taken_over(self.order.id, each.subject).is_none() {
            notices.forget(export, node);
        }
        if outcome.state == ClientState::Moved {
            // It took over by itself, request by request.
            self.order.row(index, |row| row.report.pause_ms = Some(0.0));
        }
        outcome
    }

    fn too_late(&self, export: &str, node: NodeId) -> Outcome {
        if self.of_node(export, node).is_empty() {
            let why = "it did not come back in 10 minutes after this server was restarted: it may have moved before";
            return Outcome::because(ClientState::Left, why);
        }
        Outcome::because(ClientState::Stayed, "it was told and did not leave in time: its own log says why")
    }

    fn of_node(&self, export: &str, node: NodeId) -> Vec<ClientHandle> {
        let mut handles = self.redirects.0.steering.clients.of_export(export);
        handles.retain(|handle| handle.node() == Some(node));
        handles
    }

    /// Waits until no connection of a mirror is left, after it had some.
    async fn left(&self, export: &str, node: NodeId, was_seen: bool) -> bool {
        let mut seen = was_seen;
        loop {
            let handles = self.of_node(export, node);
            if handles.is_empty() && seen {
                return true;
            }
            if handles.is_empty() {
                // It may have come and gone between two looks: then it has asked.
                let has_asked = self.redirects.0.steering.notices.is_asked(export, node);
                tokio::time::sleep(LOOK).await;
                if has_asked && self.of_node(export, node).is_empty() {
                    return true;
                }
                continue;
            }
            seen = true;
            join_all(handles.iter().map(ClientHandle::gone)).await;
        }
    }

    /// Puts the other server's export under each connection, or the own one again.
    async fn relay_each(&self, index: usize, each: &Move) -> Outcome {
        let relay = if self.targets.is_here {
            None
        } else {
            let opened = self.relay.get_or_init(|| open_relay(self.targets, self.old)).await;
            match opened {
                Ok(relay) => Some(Arc::clone(relay)),
                Err(why) => return Outcome::because(ClientState::Failed, why.clone()),
            }
        };
        let switches = each.handles.iter().map(|handle| self.switch(handle, relay.as_ref()));
        let (mut pause, mut in_flight, mut moved, mut failure) = (Duration::ZERO, 0, 0, None);
        for switched in join_all(switches).await {
            match switched {
                Ok(switched) => {
                    pause = pause.max(switched.pause);
                    in_flight += switched.in_flight;
                    moved += 1;
                }
                Err(SwitchError::Gone) => {}
                Err(error) => failure = Some(error.to_string()),
            }
        }
        match failure {
            Some(why) => return Outcome::because(ClientState::Failed, why),
            None if moved == 0 => return Outcome::because(ClientState::Left, "it left before its turn came"),
            None => {}
        }
        self.order.row(index, |row| {
            row.report.pause_ms = Some(milliseconds(pause));
            row.report.in_flight = in_flight;
        });
        Outcome::plain(ClientState::Moved)
    }

    async fn switch(&self, handle: &ClientHandle, relay: Option<&Arc<Relay>>) -> Result<Switched, SwitchError> {
        let label = || self.targets.uris.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let export = relay.map(|relay| (Arc::clone(relay) as SharedExport, label()));
        let claims = &self.redirects.0.claims;
        let switched = handle.switch(export).await?;
        claims.set_relayed(handle.id(), relay.map(|_| self.order.id));
        Ok(switched)
    }

    /// Closes each connection when all is answered, and waits until it has left.
    async fn close_each(&self, index: usize, each: &Move) -> Outcome {
        let in_flight = each.handles.iter().filter_map(ClientHandle::status).map(|status| status.requests_in_flight);
        let in_flight = in_flight.sum();
        let (began, deadline) = (clock::now(), Instant::from_std(clock::now()) + LEAVING);
        each.handles.iter().for_each(ClientHandle::close);
        let gone = timeout_at(deadline, join_all(each.handles.iter().map(ClientHandle::gone))).await;
        if gone.is_err() {
            return Outcome::because(
                ClientState::Failed,
                "it was to be closed, and its requests were not answered in 30 s",
            );
        }
        if self.old.facts().writable
            && let Err(error) = self.old.flush().await
        {
            let why = format!("it was closed, and what it had written could not be made durable: {}", error.chain());
            return Outcome::because(ClientState::Failed, why);
        }
        let pause = clock::now().saturating_duration_since(began);
        self.order.row(index, |row| {
            (row.report.in_flight, row.report.pause_ms) = (in_flight, Some(milliseconds(pause)));
        });
        Outcome::because(ClientState::Moved, "it was closed: it comes back where its own address leads")
    }
}

fn by_another(order: u64) -> Outcome {
    Outcome::because(ClientState::Stayed, format!("order {order} moves it now"))
}
