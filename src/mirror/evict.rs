//! Giving space back.
//!
//! Order of events for chunks that are evicted: they begin to *leave*, which no read looks at any more; the map forgets
//! them, durably; nobody sends from their pages any more; their bytes are punched out; they are absent, and their space
//! is given back. A crash in between leaves bytes that no map names, which the next start punches out.
//!
//! A socket to which bytes were given from the page cache refers to its pages until the peer has taken them, and
//! punching out a part of a large page would zero it in place. So the page cache is asked to let go first, and what it
//! does not let go of stays on the disk, charged, until it does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::Inner;
use super::chunks::{Chunk, State};
use super::map::page_of;
use super::policy::Segment;
use super::space::Space;
use crate::ranges::ByteRange;
use crate::telemetry::crash_point;
use crate::units::{MIB, to_u64};

/// Bytes that leave together: one writing of the map for all of them.
const ROUND: u64 = 64 * MIB;
/// The largest page of the page cache.
const LARGEST_PAGE: u64 = 2 * MIB;
/// Segments of which nothing can go that one choice passes over.
const PASSED_OVER: u32 = 256;
/// Rounds of the clock between two savings of what is hot.
const SAVE_EVERY: u32 = 60;

impl Space {
    /// Keeps some space free, for ever. One task of a worker does this.
    pub async fn run_evictor(self: Arc<Self>) {
        let mut seconds = interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rounds = 0;
        loop {
            tokio::select! {
                () = self.wanted.notified() => {}
                _ = seconds.tick() => {
                    self.clock.advance();
                    rounds += 1;
                    if rounds % SAVE_EVERY == 0 {
                        self.save_heat().await;
                    }
                }
            }
            self.make_room().await;
        }
    }

    /// Gives space back until there is enough, or none can be given back.
    pub async fn make_room(&self) {
        loop {
            let shortage = if self.is_disk_out() { 0 } else { self.shortage() };
            if shortage == 0 {
                self.lacking.store(0, Ordering::Release);
                // Who waits may have asked before others gave back what they did not need.
                self.freed.notify_waiters();
                return;
            }
            let freed = self.round(shortage.min(ROUND)).await;
            let asked = self.asked.load(Ordering::Acquire);
            self.asked.fetch_sub(if freed == 0 { asked } else { asked.min(freed) }, Ordering::AcqRel);
            if freed == 0 {
                self.lacking.store(0, Ordering::Release);
            }
            self.freed.notify_waiters();
            if freed == 0 {
                return;
            }
        }
    }

    /// Evicts segments with so many bytes, or as many as there are. Gives the bytes that were given back.
    async fn round(&self, wanted: u64) -> u64 {
        let mut freed = 0;
        for (image, numbers) in self.choose(wanted) {
            if let Some(member) = self.member(image) {
                freed += member.evict(&numbers).await;
            }
            for number in numbers {
                self.put_back(Segment { image, number });
            }
        }
        freed
    }

    /// The next to go, by image. What is pinned or in use is passed over.
    fn choose(&self, wanted: u64) -> BTreeMap<u32, Vec<u32>> {
        let mut chosen: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let (mut bytes, mut passed_over) = (0, 0);
        while bytes < wanted
            && passed_over < PASSED_OVER
            && let Some(segment) = self.victim()
        {
            let evictable = self.member(segment.image).map_or(0, |member| member.evictable(segment.number));
            bytes += evictable;
            passed_over += u32::from(evictable == 0);
            chosen.entry(segment.image).or_default().push(segment.number);
        }
        // And those that have to try again.
        for member in self.members() {
            if !member.lingering().is_empty() {
                chosen.entry(member.number).or_default();
            }
        }
        chosen
    }

    /// Saves what is hot, so that a restart goes on with it.
    async fn save_heat(&self) {
        for member in self.members() {
            member.save_heat().await;
        }
    }
}

impl Inner {
    /// Evicts what can be evicted of these segments. Gives the bytes that were given back.
    pub(super) async fn evict(&self, numbers: &[u32]) -> u64 {
        // What is not durable yet cannot leave. Were others evicted instead, a cache that is small for what comes in a
        // second would keep what is new and lose what is good.
        let is_volatile = |chunk| self.states.get(chunk) == State::Volatile;
        if numbers.iter().any(|number| self.segments.chunks(*number).any(is_volatile)) {
            self.flush_group().await;
        }
        let leaving: Vec<_> = numbers.iter().flat_map(|number| self.take_out(*number)).collect();
        let pages: BTreeSet<_> = leaving.iter().map(|(chunk, _)| page_of(*chunk)).collect();
        if let Err(error) = self.write_map(pages).await {
            self.disk_failed("cannot write the map: nothing is evicted", &error);
            for (chunk, state) in leaving {
                let state = if state == State::Resident { State::Unverified } else { state };
                self.states.set(chunk, state);
                self.pending.changed(chunk, chunk);
            }
            return 0;
        }
        crash_point("map forgot, not punched");
        let mut lingering = std::mem::take(&mut *self.lingering());
        lingering.extend(leaving.into_iter().map(|(chunk, _)| chunk));
        lingering.sort_unstable();
        // Only as much as one large page can hold together: what is in use must not keep more on the disk.
        let place = |chunk: &Chunk| self.geometry.range(*chunk).start() / LARGEST_PAGE;
        let neighbours =
            |left: &Chunk, right: &Chunk| left.number() + 1 == right.number() && place(left) == place(right);
        let mut freed = 0;
        for run in lingering.chunk_by(neighbours) {
            if self.punch_out(run).await {
                freed += run.iter().map(|chunk| self.depart(*chunk)).sum::<u64>();
            } else {
                self.lingering().extend_from_slice(run);
            }
            crash_point("half of it punched");
        }
        self.space.stats().evicted_bytes.add(freed);
        freed
    }

    /// Bytes of the chunks of a segment that can leave, once they are durable.
    fn evictable(&self, number: u32) -> u64 {
        let chunks = self.segments.chunks(number).filter(|chunk| self.may_leave(*chunk, self.states.get(*chunk)));
        if self.segments.is_held(number) { 0 } else { chunks.map(|chunk| self.segments.cost(chunk)).sum() }
    }

    fn may_leave(&self, chunk: Chunk, state: State) -> bool {
        match state {
            State::Resident | State::Unverified | State::Volatile => !self.pins.touch(self.geometry.range(chunk)),
            State::Absent => self.segments.is_charged(chunk),
            State::Leaving | State::Zero => false,
        }
    }

    /// Lets chunks of a segment begin to leave: those that are durable here, not pinned, and not on their way to
    /// somebody; and what is charged without being used.
    fn take_out(&self, number: u32) -> Vec<(Chunk, State)> {
        if self.segments.is_held(number) {
            return Vec::new();
        }
        let mut leaving = Vec::new();
        let table = self.flights.lock();
        for chunk in self.segments.chunks(number) {
            let state = self.states.get(chunk);
            if state != State::Volatile && self.may_leave(chunk, state) && !table.contains_key(&chunk) {
                self.states.set(chunk, State::Leaving);
                leaving.push((chunk, state));
            }
        }
        self.segments.depart(number);
        // Somebody may have begun to send from it since we asked.
        if self.segments.is_held(number) {
            leaving.drain(..).for_each(|(chunk, state)| self.states.set(chunk, state));
        }
        drop(table);
        leaving
    }

    /// Gives the bytes of neighbouring chunks back to the file system, unless somebody still sends from them.
    async fn punch_out(&self, run: &[Chunk]) -> bool {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return true };
        let range = self.geometry.run(*first, *last);
        let data = self.store.data();
        let start = range.start() / LARGEST_PAGE * LARGEST_PAGE;
        let around = ByteRange::between(start, range.end().next_multiple_of(LARGEST_PAGE));
        if !data.drop_pages(range, range) && !data.drop_pages(around, range) {
            return false;
        }
        // Whole pages, or the end of the last one would be zeroed in place instead of being let go.
        let page = to_u64(rustix::param::page_size());
        let whole = ByteRange::between(range.start(), range.end().next_multiple_of(page));
        let result = data.punch(whole).await;
        if let Err(error) = &result {
            self.disk_failed("cannot give space back", error);
        }
        result.is_ok()
    }

    /// A chunk has left. Gives the bytes that it took.
    fn depart(&self, chunk: Chunk) -> u64 {
        let _table = self.flights.lock();
        if let Some(key) = self.truth.get().and_then(|truth| truth.key(self.geometry, chunk)) {
            self.space.twins.remove(key, self.place(chunk));
        }
        self.states.set(chunk, State::Absent);
        self.origins.left(chunk);
        self.stats.evicted_chunks.add(1);
        self.space.stats().evicted_chunks.add(1);
        self.discharge(chunk)
    }

    /// Gives back what a chunk is charged with, if it is. To be called under the lock of the flights.
    pub(super) fn discharge(&self, chunk: Chunk) -> u64 {
        let Some(left) = self.segments.discharge(chunk) else { return 0 };
        let cost = self.segments.cost(chunk);
        self.space.discharge(cost);
        if left == 0 {
            let number = self.segments.of(chunk);
            self.space.emptied(self.segment(number));
            self.segments.heat().forget(number);
        }
        cost
    }

    /// What is hot goes to the disk.
    pub(super) async fn save_heat(&self) {
        if self.space.is_disk_out() {
            return;
        }
        let bytes = self.segments.heat().encode(self.space.clock.now());
        if let Err(error) = self.store.save_heat(bytes).await {
            self.warn_of_disk("cannot save what is hot", &error);
        }
    }
}
