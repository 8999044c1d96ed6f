//! To which groups mirrors are told that an export is being sent.
//!
//! Several may want the same to be told: each session of this server, and each mirror that passes on what its upstream
//! tells. It is told as long as one of them does.
//!
//! Owns: who wants what told. Does not own: telling (`server::notices`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::net::multicast::Group;
use crate::server::Notices;

/// All that is told by a server. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Words(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// There is nobody to be told before a server runs.
    notices: OnceLock<Notices>,
    /// How many want it, by export and group.
    wanted: Mutex<BTreeMap<String, BTreeMap<Group, usize>>>,
}

/// Somebody who wants mirrors to be told. Dropped, they are told that it is over.
#[derive(Debug)]
pub struct Word {
    words: Words,
    export: String,
    group: Group,
}

impl Words {
    /// Names who tells. All that was to be told is told now. The first one stays.
    pub fn tell_by(&self, notices: Notices) {
        let wanted = self.lock();
        // A second one would be another server.
        let _ = self.0.notices.set(notices);
        wanted.keys().for_each(|export| self.tell(&wanted, export));
    }

    /// Has mirrors told that an export is sent to a group, as long as this lives.
    pub fn say(&self, export: &str, group: Group) -> Word {
        let mut wanted = self.lock();
        *wanted.entry(export.to_owned()).or_default().entry(group).or_default() += 1;
        self.tell(&wanted, export);
        Word { words: self.clone(), export: export.to_owned(), group }
    }

    fn tell(&self, wanted: &BTreeMap<String, BTreeMap<Group, usize>>, export: &str) {
        let groups: Vec<_> = wanted.get(export).map(|groups| groups.keys().copied().collect()).unwrap_or_default();
        if let Some(notices) = self.0.notices.get() {
            notices.cast(export, &groups);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, BTreeMap<Group, usize>>> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Word {
    /// The group.
    pub const fn group(&self) -> Group {
        self.group
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        let mut wanted = self.words.lock();
        let Some(groups) = wanted.get_mut(&self.export) else { return };
        if let Some(count) = groups.get_mut(&self.group) {
            *count -= 1;
            if *count == 0 {
                groups.remove(&self.group);
            }
        }
        if groups.is_empty() {
            wanted.remove(&self.export);
        }
        self.words.tell(&wanted, &self.export);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn group(number: u8) -> Group {
        format!("239.1.2.{number}:7000").parse().unwrap()
    }

    /// What is told of an export.
    fn told(words: &Words, export: &str) -> Vec<Group> {
        words.lock().get(export).map(|groups| groups.keys().copied().collect()).unwrap_or_default()
    }

    #[test]
    fn what_was_wanted_before_there_was_a_server_is_told_then() {
        let words = Words::default();
        let early = words.say("a", group(1));
        let notices = Notices::default();
        words.tell_by(notices.clone());
        assert_eq!(notices.groups("a"), [group(1)]);
        let other = words.say("a", group(2));
        assert_eq!(notices.groups("a"), [group(1), group(2)]);
        drop(early);
        assert_eq!(notices.groups("a"), [group(2)]);
        assert_eq!(other.group(), group(2));
        drop(other);
        assert!(notices.groups("a").is_empty());
    }

    proptest! {
        /// Held against a list of those who want something.
        #[test]
        fn it_is_told_as_long_as_one_wants_it(steps in prop::collection::vec((0u8..2, 0u8..3, any::<bool>()), 0..40)) {
            let words = Words::default();
            let mut held: Vec<Word> = Vec::new();
            for (export, number, is_more) in steps {
                let export = if export == 0 { "a" } else { "b" };
                if is_more {
                    held.push(words.say(export, group(number)));
                } else if let Some(at) = held.iter().position(|word| word.export == export && word.group == group(number)) {
                    held.remove(at);
                }
                for export in ["a", "b"] {
                    let mut expected: Vec<_> =
                        held.iter().filter(|word| word.export == export).map(Word::group).collect();
                    expected.sort_unstable();
                    expected.dedup();
                    prop_assert_eq!(told(&words, export), expected);
                }
            }
            drop(held);
            prop_assert!(words.lock().is_empty());
        }
    }
}
