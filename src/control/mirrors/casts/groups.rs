//! Which groups are heard: those that the operator named for good, those that servers name as long as that is of use.
//!
//! Owns: when a group is joined and left. Does not own: joining (`multicast`), what is done with what is heard.
//!
//! **Bounds.** 16 groups in all; a server names four for an image at most.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::net::multicast::Group;

/// Groups that are heard at the same time.
pub(super) const MOST_GROUPS: usize = 16;
/// A group in which nothing was heard for so long is left, though it is named: it does not reach us.
const DEAF: Duration = Duration::from_secs(30);
/// One that nobody names any more is left so long after its last session.
const IDLE: Duration = Duration::from_secs(10);
/// After one could not be joined.
const RETRY: Duration = Duration::from_secs(10);

/// All groups that are heard or are to be; `H` is what hears one.
#[derive(Debug)]
pub(super) struct Groups<H>(BTreeMap<Group, Place<H>>);

impl<H> Default for Groups<H> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

#[derive(Debug)]
struct Place<H> {
    /// The operator named it.
    for_good: bool,
    /// How many servers name it now, by images.
    words: usize,
    hearing: Option<H>,
    /// When it was joined, or that was tried.
    tried: Option<Instant>,
    /// When a session was heard, or somebody named it, last.
    used: Option<Instant>,
    has_heard: bool,
    /// Nothing came, and it is not tried again before it is named anew.
    gave_up: bool,
}

impl<H> Place<H> {
    const fn new(for_good: bool) -> Self {
        Self { for_good, words: 0, hearing: None, tried: None, used: None, has_heard: false, gave_up: false }
    }
}

impl<H> Groups<H> {
    /// A group that the operator named is heard.
    pub(super) fn keep(&mut self, group: Group, hearing: H) {
        let place = self.0.entry(group).or_insert_with(|| Place::new(true));
        (place.for_good, place.hearing) = (true, Some(hearing));
    }

    /// One server more names a group.
    pub(super) fn named(&mut self, group: Group) {
        self.0.entry(group).or_insert_with(|| Place::new(false)).words += 1;
    }

    /// One server less does.
    pub(super) fn unnamed(&mut self, group: Group) {
        let Some(place) = self.0.get_mut(&group) else { return };
        place.words = place.words.saturating_sub(1);
        if place.words == 0 {
            place.gave_up = false;
            if place.hearing.is_none() {
                self.0.remove(&group);
            }
        }
    }

    /// The groups that are to be joined now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Group> {
        let heard = self.0.values().filter(|place| place.hearing.is_some()).count();
        let is_due = |place: &Place<H>| {
            let may_be_tried = place.tried.is_none_or(|tried| now.saturating_duration_since(tried) >= RETRY);
            place.hearing.is_none() && place.words > 0 && !place.gave_up && may_be_tried
        };
        let due = self.0.iter_mut().filter(|(_, place)| is_due(place)).take(MOST_GROUPS.saturating_sub(heard));
        due.map(|(group, place)| {
            place.tried = Some(now);
            *group
        })
        .collect()
    }

    /// One of them was joined.
    pub(super) fn joined(&mut self, group: Group, hearing: H, now: Instant) {
        if let Some(place) = self.0.get_mut(&group) {
            (place.hearing, place.used, place.has_heard) = (Some(hearing), Some(now), false);
        }
    }

    /// Those that are heard.
    pub(super) fn heard(&self) -> impl Iterator<Item = (Group, &H)> {
        self.0.iter().filter_map(|(group, place)| Some((*group, place.hearing.as_ref()?)))
    }

    /// Looks at those that servers have named: `look` says whether anything has come, and whether a session is under
    /// way. Gives what heard those that are left.
    pub(super) fn review(&mut self, now: Instant, look: impl Fn(&H) -> (bool, bool)) -> Vec<(Group, H)> {
        let mut left = Vec::new();
        for (group, place) in self.0.iter_mut().filter(|(_, place)| !place.for_good) {
            let Some(hearing) = &place.hearing else { continue };
            let (has_heard, is_active) = look(hearing);
            place.has_heard |= has_heard;
            if is_active || place.words > 0 {
                place.used = Some(now);
            }
            let since = |time: Option<Instant>| time.map_or(Duration::ZERO, |time| now.saturating_duration_since(time));
            let is_deaf = !place.has_heard && since(place.tried) >= DEAF;
            let is_idle = !is_active && place.words == 0 && since(place.used) >= IDLE;
            if is_deaf || is_idle {
                place.gave_up = place.words > 0;
                left.extend(place.hearing.take().map(|hearing| (*group, hearing)));
            }
        }
        self.0.retain(|_, place| place.for_good || place.words > 0 || place.hearing.is_some());
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(number: u8) -> Group {
        format!("239.1.2.{number}:7000").parse().unwrap()
    }

    fn heard(groups: &Groups<u8>) -> Vec<u8> {
        groups.heard().map(|(_, hearing)| *hearing).collect()
    }

    fn join(groups: &mut Groups<u8>, now: Instant) -> usize {
        let due = groups.due(now);
        due.iter().for_each(|group| groups.joined(*group, 7, now));
        due.len()
    }

    #[test]
    fn what_the_operator_named_is_heard_for_good() {
        let (mut groups, now) = (Groups::default(), crate::clock::now());
        groups.keep(group(1), 1);
        groups.named(group(1));
        assert!(groups.due(now).is_empty(), "it is heard already");
        groups.unnamed(group(1));
        assert!(groups.review(now + 10 * IDLE, |_| (false, false)).is_empty());
        assert_eq!(heard(&groups), [1]);
    }

    #[test]
    fn what_servers_name_is_left_some_time_after_its_last_session() {
        let (mut groups, now) = (Groups::default(), crate::clock::now());
        groups.named(group(1));
        groups.named(group(1));
        assert_eq!(join(&mut groups, now), 1);
        groups.unnamed(group(1));
        assert!(groups.review(now + 10 * IDLE, |_| (true, false)).is_empty(), "one still names it");
        groups.unnamed(group(1));
        assert!(groups.review(now + 20 * IDLE, |_| (true, true)).is_empty(), "a session goes on");
        assert!(groups.review(now + 21 * IDLE - Duration::from_secs(1), |_| (true, false)).is_empty());
        assert_eq!(groups.review(now + 21 * IDLE, |_| (true, false)), [(group(1), 7)]);
        assert!(groups.0.is_empty());
    }

    #[test]
    fn a_group_that_does_not_reach_us_is_left_until_it_is_named_anew() {
        let (mut groups, now) = (Groups::default(), crate::clock::now());
        groups.named(group(1));
        assert_eq!(join(&mut groups, now), 1);
        assert!(groups.review(now + DEAF / 2, |_| (false, false)).is_empty());
        assert_eq!(groups.review(now + DEAF, |_| (false, false)).len(), 1);
        assert_eq!(join(&mut groups, now + 10 * DEAF), 0);
        groups.unnamed(group(1));
        groups.named(group(1));
        assert_eq!(join(&mut groups, now + 10 * DEAF), 1);
    }

    #[test]
    fn what_cannot_be_joined_is_tried_again_later_and_not_too_much_is_joined() {
        let (mut groups, now) = (Groups::<u8>::default(), crate::clock::now());
        groups.named(group(1));
        assert_eq!(groups.due(now), [group(1)]);
        assert!(groups.due(now + RETRY / 2).is_empty());
        assert_eq!(groups.due(now + RETRY), [group(1)]);
        groups.unnamed(group(1));
        assert!(groups.0.is_empty(), "nobody wants it any more");
        (0..100).for_each(|number| groups.named(group(number)));
        assert_eq!(join(&mut groups, now), MOST_GROUPS);
        assert_eq!(join(&mut groups, now + RETRY), 0);
    }
}
