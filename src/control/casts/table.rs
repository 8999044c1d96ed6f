//! The casts of a server: those at work, and the last that ended.
//!
//! **Bounds.** 8 at work, 64 that ended.

use std::collections::BTreeMap;

use super::order::{CastState, CastStatus};
use crate::control::Refusal;
use crate::net::multicast::Group;

/// Casts at work at the same time: each has a thread, and memory for some blocks.
const MOST_AT_WORK: usize = 8;
/// Ended ones that are remembered.
const REMEMBERED: usize = 64;

/// All casts; `R` is what there is of one that is at work.
#[derive(Debug)]
pub(super) struct Table<R> {
    /// How many there were.
    count: u64,
    at_work: BTreeMap<u64, Row<R>>,
    ended: BTreeMap<u64, CastStatus>,
    /// Of those that have ended and are not remembered.
    forgotten: Totals,
}

/// What came of casts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::control) struct Totals {
    /// Casts that came to their ends.
    pub(in crate::control) done: u64,
    /// Casts that could not go on.
    pub(in crate::control) failed: u64,
    /// Casts that were called off.
    pub(in crate::control) cancelled: u64,
    /// Bytes sent.
    pub(in crate::control) sent_bytes: u64,
}

impl Totals {
    pub(super) fn add(&mut self, cast: &CastStatus) {
        match cast.state {
            CastState::Waiting | CastState::Sending | CastState::Ending => {}
            CastState::Done => self.done += 1,
            CastState::Failed => self.failed += 1,
            CastState::Cancelled => self.cancelled += 1,
        }
        self.sent_bytes += cast.sent_bytes;
    }
}

#[derive(Debug)]
struct Row<R> {
    image: String,
    group: Group,
    /// `None` until it has begun.
    running: Option<R>,
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self { count: 0, at_work: BTreeMap::new(), ended: BTreeMap::new(), forgotten: Totals::default() }
    }
}

impl<R> Table<R> {
    /// Refuses one cast more of an image to a group, where that is one too many.
    pub(super) fn check(&self, image: &str, group: Group) -> Result<(), Refusal> {
        if let Some((id, _)) = self.at_work.iter().find(|(_, row)| row.image == image && row.group == group) {
            let why = format!("cast {id} sends {image:?} to {group} already: wait for it, or call it off");
            return Err(Refusal::Conflict(why));
        }
        if self.at_work.len() >= MOST_AT_WORK {
            return Err(Refusal::Conflict(format!("{MOST_AT_WORK} casts are at work: wait for one of them")));
        }
        Ok(())
    }

    /// Takes a place for one that is to begin, and gives its number.
    pub(super) fn reserve(&mut self, image: &str, group: Group) -> Result<u64, Refusal> {
        self.check(image, group)?;
        self.count += 1;
        self.at_work.insert(self.count, Row { image: image.to_owned(), group, running: None });
        Ok(self.count)
    }

    /// It has begun.
    pub(super) fn begin(&mut self, id: u64, running: R) {
        if let Some(row) = self.at_work.get_mut(&id) {
            row.running = Some(running);
        }
    }

    /// It did not begin after all.
    pub(super) fn withdraw(&mut self, id: u64) {
        self.at_work.remove(&id);
    }

    /// It has ended so. Gives what there was of it.
    pub(super) fn end(&mut self, id: u64, last: CastStatus) -> Option<R> {
        let row = self.at_work.remove(&id)?;
        self.ended.insert(id, last);
        while self.ended.len() > REMEMBERED
            && let Some((_, oldest)) = self.ended.pop_first()
        {
            self.forgotten.add(&oldest);
        }
        row.running
    }

    /// One that has begun and not ended.
    pub(super) fn running(&self, id: u64) -> Option<&R> {
        self.at_work.get(&id)?.running.as_ref()
    }

    /// Those that have begun and not ended, oldest first.
    pub(super) fn all_running(&self) -> impl Iterator<Item = (u64, &R)> {
        self.at_work.iter().filter_map(|(id, row)| Some((*id, row.running.as_ref()?)))
    }

    /// What came of all that have ended.
    pub(super) fn ended_totals(&self) -> Totals {
        let mut totals = self.forgotten;
        self.ended.values().for_each(|cast| totals.add(cast));
        totals
    }

    /// How one ended.
    pub(super) fn ended(&self, id: u64) -> Option<&CastStatus> {
        self.ended.get(&id)
    }

    /// How the last ones ended, oldest first.
    pub(super) fn all_ended(&self) -> impl Iterator<Item = &CastStatus> {
        self.ended.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(number: u8) -> Group {
        format!("239.1.2.{number}:7000").parse().unwrap()
    }

    fn ended(id: u64) -> CastStatus {
        CastStatus { cast: id, ..CastStatus::default() }
    }

    #[test]
    fn an_image_is_sent_to_a_group_once_at_a_time() {
        let mut table = Table::<&str>::default();
        let first = table.reserve("a", group(1)).unwrap();
        assert!(table.reserve("a", group(1)).unwrap_err().to_string().contains("cast 1 sends \"a\" to 239.1.2.1:7000"));
        assert!(table.reserve("a", group(2)).is_ok() && table.reserve("b", group(1)).is_ok());
        assert!(table.running(first).is_none(), "it has not begun");
        table.begin(first, "running");
        assert_eq!(table.running(first), Some(&"running"));
        assert_eq!(table.all_running().collect::<Vec<_>>(), [(first, &"running")]);
        assert_eq!(table.end(first, ended(first)), Some("running"));
        assert_eq!(table.end(first, ended(first)), None, "it ends once");
        assert!(table.reserve("a", group(1)).is_ok());
    }

    #[test]
    fn one_that_does_not_begin_leaves_nothing() {
        let mut table = Table::<()>::default();
        let id = table.reserve("a", group(1)).unwrap();
        table.withdraw(id);
        assert!(table.ended(id).is_none() && table.all_running().next().is_none());
        assert_eq!(table.reserve("a", group(1)), Ok(id + 1), "no number is given twice");
    }

    #[test]
    fn some_work_and_some_are_remembered() {
        let mut table = Table::<()>::default();
        for number in 0..MOST_AT_WORK {
            table.reserve(&number.to_string(), group(1)).unwrap();
        }
        assert!(matches!(table.reserve("more", group(1)), Err(Refusal::Conflict(_))));
        for _ in 0..REMEMBERED + 10 {
            table.withdraw(1);
            let id = table.reserve("0", group(1)).unwrap();
            table.begin(id, ());
            table.end(id, ended(id));
        }
        assert_eq!(table.all_ended().count(), REMEMBERED);
        assert_eq!(table.all_ended().next().unwrap().cast, to_first(MOST_AT_WORK));
        assert!(table.ended(to_first(MOST_AT_WORK) - 1).is_none());
    }

    /// The first that is remembered.
    fn to_first(at_work: usize) -> u64 {
        crate::units::to_u64(at_work) + 11
    }
}
