//! What one connection has answered, on its way to the figures.
//!
//! Owns: when a request has arrived, and the notes of what was answered since the last send. Does not own: the figures
//! (`figures`, `clients`).
//!
//! A reading of the clock costs as much as a tenth of a short read, so requests share them: one when input has been received,
//! one when answers are about to leave. Notes are published before the answers leave: a client that has its answer is in
//! the figures. What is still to be received, and what the socket does not take, is not in these times.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use super::clients::Counts;
use super::figures::{Answers, ExportFigures, Operation};
use crate::clock;
use crate::error::ErrorKind;
use crate::nbd::reply::ReplyTo;

/// Notes that are kept until something is sent. Requests that arrived together and are of one kind are one note.
const NOTES: usize = 8;

/// A request that has been taken, as whoever answers it needs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) to: ReplyTo,
    pub(super) operation: Operation,
    /// Bytes of the image that it is about.
    pub(super) bytes: u64,
    /// When the last of it had arrived; `None`: it is not timed.
    pub(super) began: Option<Instant>,
}

impl Asked {
    /// Nobody wants to know how long it takes.
    pub(super) fn untimed(self) -> Self {
        Self { began: None, ..self }
    }
}

/// When what is in the input was received.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// The last bytes of the input, so many, came last.
    fresh: usize,
    last: Instant,
    /// When the others came, or before.
    earlier: Instant,
}

impl Arrivals {
    /// All that is there has come by `now`.
    pub(super) const fn new(now: Instant) -> Self {
        Self { fresh: usize::MAX, last: now, earlier: now }
    }

    /// Notes that `count` bytes have come behind `before` that were there.
    pub(super) fn note(&mut self, before: usize, count: usize, now: Instant) {
        if count == 0 {
            return;
        }
        if before > 0 && before <= self.fresh {
            self.earlier = self.last;
        }
        (self.fresh, self.last) = (count, now);
    }

    /// When the byte had come that so many others that are there come behind.
    pub(super) const fn of(&self, behind: usize) -> Instant {
        if behind < self.fresh { self.last } else { self.earlier }
    }
}

/// Answers of one kind to requests that arrived together.
#[derive(Debug)]
struct Note {
    answers: Answers,
    began: Option<Instant>,
}

/// The notes of one connection. What is left when it ends was not sent, and does not count.
#[derive(Debug)]
pub(super) struct Ledger {
    figures: Arc<ExportFigures>,
    counts: Arc<Counts>,
    notes: RefCell<Vec<Note>>,
}

impl Ledger {
    pub(super) fn new(figures: Arc<ExportFigures>, counts: Arc<Counts>) -> Self {
        Self { figures, counts, notes: RefCell::new(Vec::with_capacity(NOTES)) }
    }

    /// Notes answers that are about to leave.
    pub(super) fn note(&self, answers: Answers, began: Option<Instant>) {
        let mut notes = self.notes.borrow_mut();
        let is_like = |note: &&mut Note| {
            let Answers { operation, error, .. } = note.answers;
            (operation, error, note.began) == (answers.operation, answers.error, began)
        };
        // The last is the likeliest.
        if let Some(note) = notes.iter_mut().rev().find(is_like) {
            note.answers.requests += answers.requests;
            note.answers.bytes += answers.bytes;
            return;
        }
        if notes.len() == NOTES {
            drop(notes);
            self.publish();
            notes = self.notes.borrow_mut();
        }
        notes.push(Note { answers, began });
    }

    /// As [`Self::note`], of one request.
    pub(super) fn note_one(&self, asked: &Asked, error: Option<ErrorKind>) {
        let bytes = if error.is_some() { 0 } else { asked.bytes };
        self.note(Answers { operation: asked.operation, requests: 1, bytes, error }, asked.began);
    }

    /// Adds what was noted to the figures. To be called before anything is sent.
    pub(super) fn publish(&self) {
        let mut notes = self.notes.borrow_mut();
        if notes.is_empty() {
            return;
        }
        let now = clock::now();
        for Note { answers, began } in notes.drain(..) {
            let took = began.map(|began| now.saturating_duration_since(began));
            self.figures.note(answers, took);
            if let Some(took) = took {
                self.counts.note_timed(answers.requests, took);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn answers(operation: Operation, bytes: u64) -> Answers {
        Answers { operation, requests: 1, bytes, error: None }
    }

    #[test]
    fn what_came_with_an_earlier_receipt_has_its_time() {
        let start = clock::now();
        let at = |second| start + Duration::from_secs(second);
        let mut arrivals = Arrivals::new(at(0));
        assert_eq!(arrivals.of(99), at(0), "it came with the handshake");
        arrivals.note(100, 50, at(1));
        arrivals.note(150, 0, at(9));
        assert_eq!([arrivals.of(149), arrivals.of(50)], [at(0); 2]);
        assert_eq!([arrivals.of(49), arrivals.of(0)], [at(1); 2]);
        arrivals.note(60, 10, at(2));
        assert_eq!(arrivals.of(69), at(0), "some of it is of the first");
        assert_eq!(arrivals.of(9), at(2));
        arrivals.note(7, 20, at(3));
        assert_eq!([arrivals.of(26), arrivals.of(19)], [at(2), at(3)]);
        arrivals.note(0, usize::MAX, at(4));
        assert_eq!(arrivals.of(0), at(4), "it went straight to its place");
        arrivals.note(0, 5, at(5));
        assert_eq!(arrivals.of(4), at(5));
    }

    #[test]
    fn nothing_counts_before_it_is_published_and_everything_afterwards() {
        let (figures, counts) = (Arc::new(ExportFigures::default()), Arc::new(Counts::default()));
        let ledger = Ledger::new(Arc::clone(&figures), Arc::clone(&counts));
        let began = Some(clock::now());
        for _ in 0..3 {
            ledger.note(answers(Operation::Read, 512), began);
            ledger.note(answers(Operation::Write, 4096), began);
        }
        ledger.note(answers(Operation::BlockStatus, 0), None);
        assert_eq!(figures.counts(Operation::Read).requests, 0);
        ledger.publish();
        let read = figures.counts(Operation::Read);
        assert_eq!((read.requests, read.bytes, read.latency.count()), (3, 1536, 3));
        assert_eq!(figures.counts(Operation::Write).bytes, 3 * 4096);
        assert_eq!(figures.counts(Operation::BlockStatus).requests, 1);
        assert_eq!(counts.timed_requests.get(), 6);
        ledger.note(answers(Operation::Read, 1), began);
        drop(ledger);
        assert_eq!(figures.counts(Operation::Read), read, "it was not sent");
    }

    #[test]
    fn notes_that_are_too_many_are_published() {
        let (figures, counts) = (Arc::new(ExportFigures::default()), Arc::new(Counts::default()));
        let ledger = Ledger::new(Arc::clone(&figures), counts);
        let start = clock::now();
        for number in 0..20 {
            ledger.note(answers(Operation::Read, 1), Some(start - Duration::from_secs(number)));
        }
        assert!(ledger.notes.borrow().len() <= NOTES && ledger.notes.borrow().capacity() == NOTES);
        ledger.publish();
        let read = figures.counts(Operation::Read);
        assert_eq!((read.requests, read.bytes), (20, 20));
        assert!(read.latency.longest().unwrap() > Duration::from_secs(18));
    }
}
