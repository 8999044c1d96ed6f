//! Where the export of a connection sits, which may be replaced between two requests.
//!
//! Owns: the connection's own export, the one that serves it now, and what becomes of requests that were under way when
//! that changed. Does not own: when it is changed (`transmission`), and by whose order (`steering`).
//!
//! What only reads can be asked twice. So on a read-only connection a request that fails where it began is asked of the
//! export that has come since, and one that hangs there is asked of both after a short while, and the first answer
//! counts. On a writable connection nothing is under way when the export is replaced, and nothing is asked twice.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::clients::Counts;
use crate::clock;
use crate::error::Result;
use crate::export::{Context, Export, SharedExport};

/// What requests under way are given to finish where they began, before they are asked of the new export too.
const GRACE: Duration = Duration::from_millis(50);
/// Exports that one request is asked of at the same time. When a third comes, the oldest is given up.
const ATTEMPTS: usize = 2;

/// The place of a connection's export.
#[derive(Debug)]
pub(super) struct Seat {
    own: SharedExport,
    now: RefCell<Rc<Occupant>>,
    /// What the client was promised that BLOCK_STATUS tells.
    contexts: Vec<Context>,
    is_read_only: bool,
    moved: Notify,
    moved_at: Cell<Instant>,
    counts: Arc<Counts>,
}

/// The export that serves a connection for a while.
#[derive(Debug)]
pub(super) struct Occupant {
    pub(super) export: SharedExport,
    /// How many there were before.
    turn: u64,
    /// What the client was promised and this one cannot tell.
    lacks: Vec<Context>,
}

impl Occupant {
    /// Whether it can tell the status in a context.
    pub(super) fn tells(&self, context: Context) -> bool {
        !self.lacks.contains(&context)
    }
}

impl Seat {
    pub(super) fn new(own: SharedExport, contexts: Vec<Context>, is_read_only: bool, counts: Arc<Counts>) -> Self {
        let first = Occupant { export: Arc::clone(&own), turn: 0, lacks: Vec::new() };
        let (now, moved_at) = (RefCell::new(Rc::new(first)), Cell::new(clock::now()));
        Self { own, now, contexts, is_read_only, moved: Notify::new(), moved_at, counts }
    }

    /// Whether requests may be asked again, so that the export may be replaced while some are under way.
    pub(super) const fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Whether another export has the image that the client knows, as far as both say. A name may stand for another
    /// content by now than when the client came.
    pub(super) fn is_same_image(&self, other: &dyn Export) -> bool {
        let (own, other) = (self.own.facts(), other.facts());
        let is_another = own.identity.zip(other.identity).is_some_and(|(one, other)| one != other);
        own.size == other.size && !is_another
    }

    /// The connection's own export.
    pub(super) fn own(&self) -> &dyn Export {
        &*self.own
    }

    /// For what needs no waiting.
    pub(super) fn with<T>(&self, ask: impl FnOnce(&dyn Export) -> T) -> T {
        ask(&*self.now.borrow().export)
    }

    /// Who serves the connection now. Whoever waits for an answer keeps this.
    pub(super) fn now(&self) -> Rc<Occupant> {
        Rc::clone(&self.now.borrow())
    }

    /// Replaces the export, at `now`; `None`: by the connection's own one.
    pub(super) fn put(&self, export: Option<SharedExport>, now: Instant) {
        let lacks = export.as_ref().map_or_else(Vec::new, |export| {
            let offered = export.facts().contexts;
            self.contexts.iter().copied().filter(|context| !offered.contains(context)).collect()
        });
        let turn = self.turn() + 1;
        let export = export.unwrap_or_else(|| Arc::clone(&self.own));
        let before = self.now.replace(Rc::new(Occupant { export, turn, lacks }));
        self.moved_at.set(now);
        self.moved.notify_waiters();
        drop(before);
    }

    fn turn(&self) -> u64 {
        self.now.borrow().turn
    }

    /// Asks the export for something that may take a while. `request` is one that changes nothing, unless the
    /// connection is writable; then it is called once.
    ///
    /// A request that is asked of two exports at once holds up to twice the memory that it is counted for.
    pub(super) async fn ask<T>(&self, request: impl AsyncFn(Rc<Occupant>) -> Result<T>) -> Result<T> {
        let at = self.now();
        if !self.is_read_only {
            return request(at).await;
        }
        let mut turn = at.turn;
        let mut first = Box::pin(request(at));
        let answer = tokio::select! {
            biased;
            answer = &mut first => Some(answer),
            () = self.has_moved_since(turn) => None,
        };
        let mut attempts = match answer {
            // It failed where it was asked, and there is somebody else by now.
            Some(Err(_)) if turn != self.turn() => Vec::new(),
            Some(answer) => return answer,
            // It hangs there.
            None => vec![first],
        };
        self.counts.replayed.add(1);
        loop {
            if attempts.len() == ATTEMPTS {
                drop(attempts.remove(0));
            }
            let at = self.now();
            turn = at.turn;
            attempts.push(Box::pin(request(at)));
            let failure = tokio::select! {
                biased;
                answer = best_of(&mut attempts, || turn == self.turn()) => match answer {
                    Ok(found) => return Ok(found),
                    Err(error) => error,
                },
                () = self.has_moved_since(turn) => continue,
            };
            if turn == self.turn() {
                return Err(failure);
            }
        }
    }

    /// Waits until another export has been here for a while than in `turn`.
    async fn has_moved_since(&self, turn: u64) {
        loop {
            let moved = self.moved.notified();
            if self.turn() != turn {
                break;
            }
            moved.await;
        }
        sleep_until((self.moved_at.get() + GRACE).into()).await;
    }
}

/// The first answer that is no error; those that have answered are over. While nobody else can be asked (`is_last`), an
/// error counts when no attempt is left.
async fn best_of<T>(
    attempts: &mut Vec<Pin<Box<impl Future<Output = Result<T>>>>>,
    is_last: impl Fn() -> bool,
) -> Result<T> {
    poll_fn(|context| {
        let mut index = 0;
        while index < attempts.len() {
            match attempts[index].as_mut().poll(context) {
                Poll::Pending => index += 1,
                Poll::Ready(answer) => {
                    drop(attempts.remove(index));
                    if answer.is_ok() || attempts.is_empty() || !is_last() {
                        return Poll::Ready(answer);
                    }
                }
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::export::memory::Memory;
    use crate::export::wrappers::{Fault, Gate};
    use crate::export::{Piece, assemble};
    use crate::ranges::ByteRange;

    fn holding(byte: u8) -> SharedExport {
        Arc::new(Memory::holding(vec![byte; 16]).read_only())
    }

    fn broken(message: &'static str) -> SharedExport {
        Arc::new(Fault::new(holding(0), move |_| Some(Error::new(ErrorKind::Io, message))))
    }

    fn seat(own: SharedExport, is_read_only: bool) -> Seat {
        Seat::new(own, vec![Context::Allocation, Context::Residency], is_read_only, Arc::default())
    }

    async fn read(seat: &Seat) -> Result<Vec<Piece>> {
        seat.ask(async |at| at.export.read(ByteRange::between(0, 16)).await).await
    }

    async fn byte(seat: &Seat) -> u8 {
        assemble(&read(seat).await.unwrap())[0]
    }

    #[tokio::test]
    async fn a_request_goes_to_whoever_is_there() {
        let seat = seat(holding(1), true);
        assert_eq!(byte(&seat).await, 1);
        seat.put(Some(holding(2)), clock::now());
        assert_eq!(byte(&seat).await, 2);
        seat.put(None, clock::now());
        assert_eq!(byte(&seat).await, 1);
        assert_eq!(seat.counts.replayed.get(), 0);
    }

    #[tokio::test]
    async fn what_hangs_is_asked_of_all_who_come_and_the_first_answer_counts() {
        let gates = [1, 2, 3].map(|byte| Arc::new(Gate::new(holding(byte))));
        let seat = seat(Arc::clone(&gates[0]) as _, true);
        let switches = async {
            gates[0].arrived(1).await;
            seat.put(Some(Arc::clone(&gates[1]) as _), clock::now());
            gates[1].arrived(1).await;
            seat.put(Some(Arc::clone(&gates[2]) as _), clock::now());
            gates[2].arrived(1).await;
            // Two at a time: the first was given up.
            gates[0].open();
            gates[1].open();
        };
        let (found, ()) = tokio::join!(byte(&seat), switches);
        assert_eq!(found, 2);
        assert_eq!(seat.counts.replayed.get(), 1, "it is one request");
    }

    #[tokio::test]
    async fn what_finishes_in_time_is_asked_once() {
        let (gate, next) = (Arc::new(Gate::new(holding(1))), Arc::new(Gate::new(holding(2))));
        let seat = seat(Arc::clone(&gate) as _, true);
        let switch = async {
            gate.arrived(1).await;
            seat.put(Some(Arc::clone(&next) as _), clock::now());
            gate.open();
        };
        assert_eq!(tokio::join!(byte(&seat), switch).0, 1);
        assert_eq!(seat.counts.replayed.get(), 0);
    }

    #[tokio::test]
    async fn an_error_is_one_of_the_last_export() {
        let gate = Arc::new(Gate::new(broken("the old one")));
        let seat = seat(Arc::clone(&gate) as _, true);
        let switch = async {
            gate.arrived(1).await;
            seat.put(Some(broken("the new one")), clock::now());
            gate.open();
        };
        let (result, ()) = tokio::join!(read(&seat), switch);
        assert_eq!(result.unwrap_err().to_string(), "the new one");
        assert_eq!(read(&seat).await.unwrap_err().to_string(), "the new one");
    }

    #[tokio::test]
    async fn what_writes_is_asked_once() {
        let gate = Arc::new(Gate::new(broken("the old one")));
        let seat = seat(Arc::clone(&gate) as _, false);
        let switch = async {
            gate.arrived(1).await;
            seat.put(Some(holding(2)), clock::now());
            gate.open();
        };
        let (result, ()) = tokio::join!(read(&seat), switch);
        assert_eq!(result.unwrap_err().to_string(), "the old one");
    }

    #[test]
    fn what_the_new_one_lacks_is_known() {
        let seat = seat(holding(1), true);
        assert!(seat.now().tells(Context::Residency));
        seat.put(Some(holding(2)), clock::now());
        assert!(seat.now().tells(Context::Allocation) && !seat.now().tells(Context::Residency));
        seat.put(None, clock::now());
        assert!(seat.now().tells(Context::Residency));
    }
}
