//! Recording what clients of one image read in their first minute.
//!
//! All connections that begin while a run is open take part in it. Each notes what it touches on its own: in a map behind
//! a lock that nobody else takes while the connection is at work, so a read costs two uncontended atomic operations and a
//! look into a small tree, and only while its window lasts. The run is closed when all its parts are over, or after four
//! windows, and given out by [`Recording::next_run`], which also notices that a client has become idle.
//!
//! A touch is told as the time since its own connection began; of several clients that touched a page the earliest
//! counts. Memory: at most [`MOST_TOUCHES`] spans in all parts of a run, some 12 MiB; what comes then is not recorded.
//!
//! Owns: who takes part, and when a run is over. Does not own: what is learnt from it.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::spans::{FirstCome, Spans};
use super::{LATEST_MS, MOST_PAGES, MOST_SPANS, PAGE, Settings};
use crate::clock;
use crate::ranges::ByteRange;

/// Spans that the parts of one run note in all.
pub const MOST_TOUCHES: usize = 4 * MOST_SPANS;
/// Clients that take part in one run. Clones of one machine read nearly the same: a few of them tell it all.
const MOST_PARTS: usize = 64;
/// Windows that a run lasts at most, however many clients come one after the other.
const LONGEST_RUN: u32 = 4;
/// Finished runs that wait to be taken; then the oldest goes.
const MOST_FINISHED: usize = 4;

/// What clients touched in one run, with the milliseconds from their connection to the first touch of each page.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Run(Spans<u32>);

impl Run {
    /// At most [`MOST_PAGES`] and [`MOST_SPANS`] of these, those that were touched first.
    pub(super) fn of(touches: Spans<u32>) -> Self {
        Self(touches.bounded(MOST_PAGES, MOST_SPANS, |first_ms| *first_ms))
    }

    /// The pages and their times.
    pub(super) const fn touches(&self) -> &Spans<u32> {
        &self.0
    }

    /// Bytes of the pages.
    pub fn bytes(&self) -> u64 {
        self.0.pages() * PAGE
    }
}

/// Records the clients of one image. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Recording(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: Settings,
    state: Mutex<State>,
    /// Told when a run has finished, and when the first client of one has come.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    open: Option<Open>,
    finished: Vec<Run>,
}

/// A run that clients take part in.
#[derive(Debug)]
struct Open {
    began: Instant,
    joined: usize,
    /// Parts that may still note something.
    live: Vec<Arc<Own>>,
    /// What parts that have ended noted.
    gathered: Spans<u32>,
    /// Spans that may still be noted, in all parts.
    room: Arc<AtomicUsize>,
}

/// What one connection notes; shared with the run, which looks at it rarely.
struct Own {
    began: Instant,
    notes: Mutex<Notes>,
}

struct Notes {
    touched: FirstCome<u32>,
    last: Instant,
    /// Nothing is noted any more.
    has_ended: bool,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").field("began", &self.began).finish_non_exhaustive()
    }
}

impl Own {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notes {
    /// When nothing will be noted any more, unless something is before.
    fn end(&self, began: Instant, settings: &Settings) -> Instant {
        (began + settings.window).min(self.last + settings.idle)
    }
}

/// What one connection contributes to a run. Dropped when the connection ends or [`Self::is_over`] says so.
#[derive(Debug)]
pub struct Part {
    recording: Recording,
    own: Arc<Own>,
    room: Arc<AtomicUsize>,
}

impl Recording {
    /// Nobody is recorded yet.
    pub fn new(settings: Settings) -> Self {
        Self(Arc::new(Shared { settings, state: Mutex::default(), changed: Notify::new() }))
    }

    /// How it records.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// A client that connects now takes part. `None`: it does not, because nothing is recorded or enough others are.
    pub fn join(&self, now: Instant) -> Option<Part> {
        if self.0.settings.window.is_zero() {
            return None;
        }
        let mut state = self.state();
        self.advance(&mut state, now);
        let open = state.open.get_or_insert_with(|| Open {
            began: now,
            joined: 0,
            live: Vec::new(),
            gathered: Spans::default(),
            room: Arc::new(AtomicUsize::new(MOST_TOUCHES)),
        });
        if open.joined == MOST_PARTS {
            return None;
        }
        open.joined += 1;
        let notes = Notes { touched: FirstCome::new(), last: now, has_ended: false };
        let own = Arc::new(Own { began: now, notes: Mutex::new(notes) });
        open.live.push(Arc::clone(&own));
        let room = Arc::clone(&open.room);
        drop(state);
        self.0.changed.notify_one();
        Some(Part { recording: self.clone(), own, room })
    }

    /// The next run that is over. One task waits for it.
    ///
    /// Cancel safety: no run is lost.
    pub async fn next_run(&self) -> Run {
        loop {
            let changed = self.0.changed.notified();
            let (run, deadline) = self.poll(clock::now());
            if let Some(run) = run {
                return run;
            }
            match deadline {
                Some(deadline) => {
                    // Whatever comes first: there is something new to look at.
                    let _ = tokio::time::timeout_at(deadline.into(), changed).await;
                }
                None => changed.await,
            }
        }
    }

    /// A run that is over, if there is one, and when to look again if nothing is told before.
    pub(super) fn poll(&self, now: Instant) -> (Option<Run>, Option<Instant>) {
        let mut state = self.state();
        self.advance(&mut state, now);
        if !state.finished.is_empty() {
            return (Some(state.finished.remove(0)), None);
        }
        let deadline = state.open.as_ref().and_then(|open| self.deadline(open));
        (None, deadline)
    }

    /// Ends the open run, as a server does that ends, and gives out all that wait to be taken.
    pub fn finish(&self) -> Vec<Run> {
        let mut state = self.state();
        if let Some(open) = state.open.take() {
            close(open, &mut state.finished);
        }
        std::mem::take(&mut state.finished)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the run, or the first of its parts, is over.
    fn deadline(&self, open: &Open) -> Option<Instant> {
        let ends = open.live.iter().map(|own| own.notes().end(own.began, &self.0.settings));
        Some(ends.min()?.min(self.last_end(open)))
    }

    fn last_end(&self, open: &Open) -> Instant {
        open.began + self.0.settings.window * LONGEST_RUN
    }

    /// Takes in parts that are over, and closes the run if all are or it has lasted too long.
    fn advance(&self, state: &mut State, now: Instant) {
        let Some(open) = &mut state.open else { return };
        let settings = &self.0.settings;
        let gathered = &mut open.gathered;
        open.live.retain(|own| {
            let mut notes = own.notes();
            let is_over = notes.has_ended || now >= notes.end(own.began, settings);
            if is_over {
                gather(gathered, &mut notes);
            }
            !is_over
        });
        if (open.live.is_empty() || now >= self.last_end(open))
            && let Some(open) = state.open.take()
        {
            close(open, &mut state.finished);
        }
    }
}

/// Takes what a part has noted; it notes nothing any more.
fn gather(gathered: &mut Spans<u32>, notes: &mut Notes) {
    notes.has_ended = true;
    let touched = std::mem::take(&mut notes.touched).to_spans();
    *gathered = gathered.combine(&touched, |one, other| one.into_iter().chain(other).min());
}

fn close(open: Open, finished: &mut Vec<Run>) {
    let mut gathered = open.gathered;
    open.live.iter().for_each(|own| gather(&mut gathered, &mut own.notes()));
    if gathered.is_empty() {
        return;
    }
    if finished.len() == MOST_FINISHED {
        finished.remove(0);
    }
    finished.push(Run::of(gathered));
}

impl Part {
    /// The client reads `range`. Cheap; after the part is over it does nothing.
    pub fn note(&mut self, now: Instant, range: ByteRange) {
        let mut notes = self.own.notes();
        if range.is_empty() || notes.has_ended || now >= notes.end(self.own.began, self.recording.settings()) {
            return;
        }
        notes.last = notes.last.max(now);
        let elapsed = now.saturating_duration_since(self.own.began).as_millis();
        let first_ms = u32::try_from(elapsed).unwrap_or(u32::MAX).min(LATEST_MS);
        let (start, end) = (range.start() / PAGE, range.end().div_ceil(PAGE));
        let room = &self.room;
        notes.touched.fill(start, end, first_ms, &mut || {
            room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        });
    }

    /// Whether its window is over or its client idle: nothing will be noted any more, and it may be dropped.
    pub fn is_over(&self, now: Instant) -> bool {
        let notes = self.own.notes();
        notes.has_ended || now >= notes.end(self.own.began, self.recording.settings())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.own.notes().has_ended = true;
        // Whoever waits for runs takes in what was noted: that may be much, and a connection has better to do.
        self.recording.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::super::spans::tests::{Naive, naive};
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn settings() -> Settings {
        Settings { window: Duration::from_secs(60), idle: Duration::from_secs(15), ..Settings::default() }
    }

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn pages(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start * PAGE, end * PAGE)
    }

    /// The run that is over at `now`.
    fn taken(recording: &Recording, now: Instant) -> Option<Naive<u32>> {
        recording.poll(now).0.map(|run| naive(run.touches()))
    }

    #[test]
    fn parts_are_told_from_their_own_beginning_and_the_earliest_touch_counts() {
        let (recording, start) = (Recording::new(settings()), clock::now());
        let mut one = recording.join(start).unwrap();
        let mut other = recording.join(start + seconds(5)).unwrap();
        one.note(start + seconds(7), pages(0, 2));
        one.note(start + seconds(8), pages(1, 3));
        other.note(start + seconds(8), ByteRange::between(PAGE + 5, PAGE + 6));
        drop(one);
        assert_eq!(taken(&recording, start + seconds(9)), None, "the other one is at it");
        drop(other);
        let run = taken(&recording, start + seconds(9)).unwrap();
        assert_eq!(run, Naive::from([(0, 7000), (1, 3000), (2, 8000)]));
        assert_eq!(taken(&recording, start + seconds(9)), None, "a run is given out once");
    }

    #[test]
    fn a_part_ends_with_its_window_or_when_its_client_is_idle() {
        let (recording, start) = (Recording::new(settings()), clock::now());
        let mut idle = recording.join(start).unwrap();
        idle.note(start + seconds(14), pages(0, 1));
        assert_eq!(recording.poll(start + seconds(14)), (None, Some(start + seconds(29))));
        assert!(!idle.is_over(start + seconds(28)) && idle.is_over(start + seconds(29)));
        idle.note(start + seconds(29), pages(5, 6));
        assert_eq!(taken(&recording, start + seconds(29)).unwrap(), Naive::from([(0, 14_000)]), "without its end");
        assert!(idle.is_over(start), "its run is over");
        let start = start + seconds(100);
        let mut busy = recording.join(start).unwrap();
        (0..80).for_each(|second| busy.note(start + seconds(second), pages(second, second + 1)));
        assert!(busy.is_over(start + seconds(60)));
        assert_eq!(taken(&recording, start + seconds(60)).unwrap().len(), 60);
    }

    #[test]
    fn a_run_ends_after_four_windows_though_clients_keep_coming() {
        let (recording, start) = (Recording::new(settings()), clock::now());
        let mut parts = Vec::new();
        for second in 0..240 {
            let now = start + seconds(second);
            if second % 30 == 0 {
                parts.push(recording.join(now).unwrap());
            }
            parts.iter_mut().for_each(|part| part.note(now, pages(second, second + 1)));
            assert_eq!(taken(&recording, now), None, "second {second}");
        }
        assert_eq!(taken(&recording, start + seconds(240)).unwrap().len(), 240);
        let last = parts.last_mut().unwrap();
        assert!(last.is_over(start + seconds(240)), "it does not run into the next one");
    }

    #[test]
    fn who_reads_nothing_is_no_run_and_a_window_of_zero_records_nothing() {
        let (recording, start) = (Recording::new(settings()), clock::now());
        drop(recording.join(start));
        assert_eq!(recording.poll(start), (None, None));
        let off = Recording::new(Settings { window: Duration::ZERO, ..settings() });
        assert!(off.join(start).is_none());
    }

    #[test]
    fn everything_has_a_bound() {
        let (recording, start) = (Recording::new(settings()), clock::now());
        let mut parts: Vec<_> = (0..MOST_PARTS).map(|_| recording.join(start).unwrap()).collect();
        assert!(recording.join(start).is_none(), "enough take part");
        for page in 0..MOST_TOUCHES as u64 + 5 {
            parts[0].note(start, pages(2 * page, 2 * page + 1));
        }
        parts[1].note(start, pages(1, 2));
        assert_eq!(parts[0].own.notes().touched.to_spans().len(), MOST_TOUCHES);
        assert_eq!(parts[1].own.notes().touched.to_spans().len(), 0, "one room for all");
        drop(parts);
        let runs = recording.finish();
        assert_eq!((runs.len(), runs[0].touches().len()), (1, MOST_SPANS));
        for _ in 0..MOST_FINISHED + 1 {
            let mut part = recording.join(start).unwrap();
            part.note(start, pages(0, 1));
            drop(part);
        }
        assert_eq!(recording.finish().len(), MOST_FINISHED);
    }

    #[tokio::test]
    async fn whoever_waits_is_told_when_the_last_client_leaves() {
        let recording = Recording::new(settings());
        let next = recording.next_run();
        let client = async {
            let mut part = recording.join(clock::now()).unwrap();
            tokio::task::yield_now().await;
            part.note(clock::now(), pages(3, 4));
        };
        let (run, ()) = tokio::join!(next, client);
        assert_eq!(naive(run.touches()).into_keys().collect::<Vec<_>>(), [3]);
    }

    proptest! {
        #[test]
        fn a_run_is_the_union_of_first_touches(
            reads in prop::collection::vec((0usize..3, 0u64..50 * PAGE, 1u64..8 * PAGE), 0..60),
        ) {
            let (recording, start) = (Recording::new(settings()), clock::now());
            let mut parts: Vec<_> = (0..3).map(|_| recording.join(start).unwrap()).collect();
            let mut wanted = Naive::new();
            for (index, (part, offset, length)) in reads.into_iter().enumerate() {
                let after = u32::try_from(index).unwrap() * 7;
                let range = ByteRange::between(offset, offset + length);
                parts[part].note(start + Duration::from_millis(after.into()), range);
                for page in offset / PAGE..=(offset + length - 1) / PAGE {
                    wanted.entry(page).or_insert(after);
                }
            }
            drop(parts);
            prop_assert_eq!(taken(&recording, start + seconds(1)).unwrap_or_default(), wanted);
        }
    }
}
