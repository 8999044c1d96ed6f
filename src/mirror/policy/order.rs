//! What the evictor calls: a policy, admission and counters.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::duel::{Distance, Duel};
use super::{Clock, Kind, Policy, Segment, Word, WordOf};

/// The answers that are remembered: for an eighth of the segments that are here, at most for so many. 60 bytes each.
const MOST_ANSWERS: usize = 4096;
const SHARE_OF_ANSWERS: usize = 8;

/// Who decides whether a segment is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Admission {
    /// All are.
    Always,
    /// All are as long as that pays; see `duel`.
    #[default]
    Measured,
}

/// Whether there is room for a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Nothing has to go for it, now or as it grows. What is free only because the evictor works in whole segments or
    /// ahead of demand is not meant: a cache that was full once and lost nothing since has no free space.
    Free,
    /// Another has to go for it.
    Taken,
}

/// What happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Segments that were let in.
    pub admitted: u64,
    /// Segments that were not.
    pub bypassed: u64,
    /// Of these, how many were let in at once when the same chunk was wanted again.
    pub regretted: u64,
    /// Segments that had to go.
    pub evicted: u64,
    /// Whether only a few are let in at present.
    pub thrashing: bool,
}

/// The order of eviction of all images of a server, with admission.
///
/// The life of a segment here: [`should_admit`](Self::should_admit) says yes, [`admitted`](Self::admitted) takes it
/// in; [`victim`](Self::victim) chooses it, and after that it is either [`evicted`](Self::evicted) or
/// [put back](Self::put_back). [`remove`](Self::remove) takes it out for other reasons: its image is closed, its last
/// chunk was lost, it is pinned from now on. What is pinned for good should not be in the order.
///
/// Uses are noted in [`Heat`](super::Heat), not here. The time moves here with each segment that is let in or refused,
/// and must be moved once a second by someone.
#[derive(Debug)]
pub struct Order {
    policy: Box<dyn Policy>,
    clock: Arc<Clock>,
    /// Victims that could not go, since `parked_at`. They come back into the order when the time has moved, so that
    /// who looks for a victim sees each of them once, and then `None`.
    parked: Vec<Segment>,
    parked_at: u64,
    answers: Answers,
    duel: Option<Duel>,
    counters: Counters,
}

impl Order {
    /// Without segments.
    pub fn new(kind: Kind, admission: Admission, clock: Arc<Clock>) -> Self {
        Self {
            policy: kind.policy(),
            clock,
            parked: Vec::new(),
            parked_at: 0,
            answers: Answers::default(),
            duel: match admission {
                Admission::Always => None,
                Admission::Measured => Some(Duel::new(kind)),
            },
            counters: Counters::default(),
        }
    }

    /// Whether a segment that has no chunk here is to get one: `chunk`, counted within the segment.
    ///
    /// To be asked before each chunk that is fetched because of a read, as long as its segment has none, and once for
    /// each fetch. An answer holds for the chunks of a segment that come one after another. But when a chunk is wanted a
    /// second time while the refusal is remembered, the segment is let in: as long as that lasts, to bypass costs two
    /// fetches at most.
    pub fn should_admit(&mut self, segment: Segment, chunk: u32, space: Space, word_of: WordOf<'_>) -> bool {
        if let Some(answer) = self.answers.get(segment) {
            if let Answer::Bypassed(wanted) = answer
                && (!wanted.add(chunk) || space == Space::Free)
            {
                *answer = Answer::Admitted;
                self.counters.regretted += 1;
                if let Some(duel) = &mut self.duel {
                    duel.missed(segment, Distance::Short, self.policy.len(), space);
                }
            }
            return *answer == Answer::Admitted;
        }
        let resident = self.policy.len();
        let admit = self.duel.as_mut().is_none_or(|duel| {
            duel.poll(resident, word_of);
            duel.missed(segment, Distance::Long, resident, space);
            space == Space::Free || duel.admits(segment)
        });
        let answer = if admit { Answer::Admitted } else { Answer::Bypassed(Chunks::of(chunk)) };
        self.answers.push(segment, answer, (resident / SHARE_OF_ANSWERS).clamp(1, MOST_ANSWERS));
        if !admit {
            self.counters.bypassed += 1;
            self.clock.advance();
        }
        admit
    }

    /// A segment has got its first chunk.
    pub fn admitted(&mut self, segment: Segment, word: Word) {
        self.policy.insert(segment, word);
        self.counters.admitted += 1;
        let now = self.clock.advance();
        if let Some(duel) = &mut self.duel {
            duel.came(segment, now);
        }
    }

    /// A segment was here before a restart. To be called with the one not used for longest first.
    pub fn restore(&mut self, segment: Segment, word: Word) {
        self.policy.restore(segment, word);
        if let Some(duel) = &mut self.duel {
            duel.came(segment, word.time());
        }
    }

    /// The segment that should go next. It is out of the order until it is put back. `None`: there is none, or all
    /// have been put back since the time moved last.
    pub fn victim(&mut self, word_of: WordOf<'_>) -> Option<Segment> {
        let now = self.clock.now();
        if now != self.parked_at {
            for segment in self.parked.drain(..) {
                self.policy.put_back(segment, word_of(segment), self.parked_at);
            }
            self.parked_at = now;
        }
        self.policy.victim(word_of)
    }

    /// A victim is gone. Its word is to be forgotten after this.
    pub fn evicted(&mut self, segment: Segment) {
        self.policy.evicted(segment);
        self.counters.evicted += 1;
        self.gone(segment);
    }

    /// A victim cannot go now: it is in use.
    pub fn put_back(&mut self, segment: Segment) {
        self.parked.push(segment);
    }

    /// Takes out a segment that is in the order.
    pub fn remove(&mut self, segment: Segment) {
        match self.parked.iter().position(|parked| *parked == segment) {
            Some(index) => drop(self.parked.swap_remove(index)),
            None => self.policy.remove(segment),
        }
        self.gone(segment);
    }

    fn gone(&mut self, segment: Segment) {
        if let Some(duel) = &mut self.duel {
            duel.went(segment);
        }
    }

    /// The number of segments in the order.
    pub fn len(&self) -> usize {
        self.policy.len() + self.parked.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        Counters { thrashing: self.duel.as_ref().is_some_and(Duel::is_thrashing), ..self.counters }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Admitted,
    /// And these chunks were wanted since.
    Bypassed(Chunks),
}

/// Chunks of a segment, a bit for each: as many as there are at most, of 4 KiB in a MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Chunks([u64; 4]);

impl Chunks {
    fn of(chunk: u32) -> Self {
        let mut chunks = Self::default();
        chunks.add(chunk);
        chunks
    }

    /// Whether it was not there yet.
    fn add(&mut self, chunk: u32) -> bool {
        let [word, ..] = (chunk / 64 % 4).to_le_bytes();
        let word = &mut self.0[usize::from(word)];
        let bit = 1 << (chunk % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// What was answered for the segments that were asked for last.
#[derive(Debug, Default)]
struct Answers {
    given: HashMap<Segment, Answer>,
    /// Oldest first.
    order: VecDeque<Segment>,
}

impl Answers {
    fn get(&mut self, segment: Segment) -> Option<&mut Answer> {
        self.given.get_mut(&segment)
    }

    /// Of a segment without an answer.
    fn push(&mut self, segment: Segment, answer: Answer, capacity: usize) {
        self.given.insert(segment, answer);
        self.order.push_back(segment);
        while self.order.len() > capacity {
            let oldest = self.order.pop_front();
            oldest.map(|oldest| self.given.remove(&oldest));
        }
    }
}
