//! From bytes that arrived to a chunk that is stored, or let go of.
//!
//! What came is answered first and stored afterwards: no client waits for space or for the disk. Space is asked for when
//! a fetch begins ([`Room`]). What has none, what came before a manifest or before something was lost, and what the disk
//! does not take, has been answered, and that is all.
//!
//! Owns: what happens to a chunk between its arrival and its being volatile: why it came, its space, its place in the data
//! file, its charge. Does not own: making it durable (`flusher`), the account (`space`).

use std::cell::RefCell;
use std::io::{self, IoSlice};

use tokio::sync::OnceCell;

use super::Inner;
use super::arrival::{Arrival, Write, contiguous};
use super::chunks::{Chunk, State};
use super::flight::{ChunkData, Claim, Slice};
use super::flusher::Epoch;
use super::space::{Reservation, is_full};
use crate::disk::Inline;
use crate::telemetry::crash_point;
use crate::units::{MIB, to_u64};

/// What a full disk is asked for beyond what does not fit: the next chunks are on their way.
const SPARE: u64 = 16 * MIB;

impl Inner {
    /// Reserves space for those chunks that are to be kept. Gives whether there is some. The first call decides.
    pub(super) async fn reserve(&self, room: &Room) -> bool {
        let reserve = async || {
            if room.kept.is_empty() {
                return None;
            }
            let bytes = room.kept.iter().map(|chunk| self.segments.cost(*chunk)).sum();
            let reservation = self.space.reserve(bytes).await;
            // Who fetches ahead has nobody to serve: nothing comes then.
            if reservation.is_none() && !room.is_ahead {
                self.space.stats().bypassed_chunks.add(to_u64(room.kept.len()));
            }
            reservation.map(RefCell::new)
        };
        room.reservation.get_or_init(reserve).await.is_some()
    }

    /// Gives everybody what came, then stores it.
    pub(super) async fn land(&self, claims: &[&Claim], mut arrivals: Vec<Arrival>, room: &Room) {
        for (claim, arrival) in claims.iter().zip(&arrivals) {
            self.note_arrival(claim, arrival);
            claim.flight.land(Ok(arrival.data.clone()));
        }
        crash_point("arrived");
        let has_room = self.reserve(room).await;
        for arrival in &mut arrivals {
            let mut table = self.flights.lock();
            let is_current = room.epoch == self.pending.epoch();
            match &arrival.data {
                ChunkData::Zero if is_current && self.mark_zero(arrival.chunk) => {
                    self.pending.changed(arrival.chunk, arrival.chunk);
                }
                ChunkData::Zero => {}
                // What is still leaving cannot be written over.
                ChunkData::Bytes(_) => {
                    let is_absent = self.states.get(arrival.chunk) == State::Absent;
                    arrival.is_kept = is_current && is_absent && has_room && room.keeps(arrival.chunk);
                }
            }
            if !arrival.is_kept {
                self.origins.left(arrival.chunk);
                table.remove(&arrival.chunk);
            }
        }
        // Whoever waited sends the bytes to its clients first, while they are in the processor's caches.
        tokio::task::yield_now().await;
        for write in contiguous(&arrivals) {
            self.store_chunks(write, room).await;
        }
    }

    /// Remembers why a chunk came.
    fn note_arrival(&self, claim: &Claim, arrival: &Arrival) {
        // A client that begins to want it sees either that it has not landed, or the mark.
        let _table = self.flights.lock();
        if matches!(arrival.data, ChunkData::Bytes(_)) {
            self.origins.came(arrival.chunk, claim.flight.cause(), claim.flight.is_wanted());
        }
    }

    /// Writes chunks to the data file. If that fails they are absent: they have been answered, and that is all.
    async fn store_chunks(&self, write: Write<'_>, room: &Room) {
        let Write { arrivals, slice } = write;
        let Some(first) = arrivals.first() else { return };
        let offset = self.geometry.range(first.chunk).start();
        let checksums: Vec<_> = arrivals.iter().map(Arrival::checksum).collect();
        let mut result = self.write_data(&slice, offset).await;
        if result.as_ref().is_err_and(is_full) {
            self.space.ask(to_u64(slice.len()) + SPARE).await;
            result = self.write_data(&slice, offset).await;
        }
        if let Err(error) = &result {
            self.stats.unstored_chunks.add(to_u64(arrivals.len()));
            self.disk_failed("cannot store what was fetched: serving without storing", error);
        }
        if !self.note_stored(arrivals, &checksums, result.is_ok(), room) {
            for arrival in arrivals {
                self.origins.left(arrival.chunk);
                self.give_back(arrival.chunk).await;
                self.flights.lock().remove(&arrival.chunk);
            }
            return;
        }
        for arrival in arrivals {
            self.pending.wrote(arrival.chunk, self.geometry.range(arrival.chunk).length(), room.epoch);
            if let Some(key) = self.truth.get().and_then(|truth| truth.key(self.geometry, arrival.chunk)) {
                self.space.twins.add(key, self.place(arrival.chunk));
            }
        }
        crash_point("written, not synced");
    }

    /// Charges chunks that have been written, and says so in their states if they may be read: gives whether.
    fn note_stored(&self, arrivals: &[Arrival], checksums: &[u32], is_written: bool, room: &Room) -> bool {
        let mut table = self.flights.lock();
        let is_stored = is_written && room.epoch == self.pending.epoch();
        for (arrival, checksum) in arrivals.iter().zip(checksums) {
            // Also what could not be written whole: a part of it may be there.
            self.charge(arrival.chunk, room);
            if is_stored {
                self.states.set_checksum(arrival.chunk, *checksum);
                self.states.set(arrival.chunk, State::Volatile);
                table.remove(&arrival.chunk);
            }
        }
        is_stored
    }

    async fn write_data(&self, slice: &Slice, offset: u64) -> io::Result<()> {
        match self.store.data().try_write_at(&[IoSlice::new(slice)], offset) {
            Inline::Done => Ok(()),
            Inline::WouldBlock => self.store.data().write_all_at(slice.bytes(), offset, false).await,
        }
    }

    /// Charges a chunk that is on the disk now, with what was reserved for it. To be called under the lock of the
    /// flights.
    fn charge(&self, chunk: Chunk, room: &Room) {
        let Some(count) = self.segments.charge(chunk) else { return };
        room.keep(self.segments.cost(chunk));
        if count == 1 {
            let number = self.segments.of(chunk);
            self.space.admitted(self.segment(number), self.segments.heat().word(number));
        }
    }
}

/// Space for what a run brings.
#[derive(Debug)]
pub(super) struct Room {
    /// Chunks that are to be stored, in order.
    pub(super) kept: Vec<Chunk>,
    /// Unset while it is waited for.
    reservation: OnceCell<Option<RefCell<Reservation>>>,
    /// When the fetch began. What came before a manifest, or before something was lost, is answered and not kept.
    epoch: Epoch,
    /// Whether nobody waits for it: without space it is not fetched.
    is_ahead: bool,
}

impl Room {
    pub(super) const fn new(kept: Vec<Chunk>, epoch: Epoch, is_ahead: bool) -> Self {
        Self { kept, reservation: OnceCell::const_new(), epoch, is_ahead }
    }

    fn keeps(&self, chunk: Chunk) -> bool {
        self.kept.binary_search(&chunk).is_ok()
    }

    fn keep(&self, bytes: u64) {
        if let Some(Some(reservation)) = self.reservation.get() {
            reservation.borrow_mut().keep(bytes);
        }
    }
}
