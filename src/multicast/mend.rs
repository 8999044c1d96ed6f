//! Making blocks whole, and handing them to their mirrors.
//!
//! What was lost of a block takes milliseconds to compute, in which the socket would not be read: so there is a thread for
//! it beside the one that hears. Workers store the blocks, where the mirrors belong; [`MOST`] are under way together, and
//! while they are the group is not heard. What the system then throws away is asked for again.
//!
//! Owns: the way of a complete block to its mirror. Does not own: when it is complete (`cast`), whether it is right (the
//! mirror).

use std::io;
use std::sync::{Arc, Weak};
use std::thread;

use bytes::Bytes;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::cast::SessionId;
use crate::cast::assembly::Partial;
use crate::cast::layout::Layout;
use crate::cast::receiver::Delivery;
use crate::mirror::{Cause, Mirror};
use crate::units::to_usize;
use crate::worker::Workers;

/// Blocks between the last of their symbols and their being stored, at most.
const MOST: usize = 8;

/// A block that can be made whole.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) session: SessionId,
    pub(super) block: u32,
    pub(super) partial: Partial,
    pub(super) layout: Arc<Layout>,
    pub(super) mirror: Mirror,
}

/// What came of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) session: SessionId,
    pub(super) block: u32,
    pub(super) delivery: Delivery,
}

/// The way in. Dropped, the thread ends.
#[derive(Debug)]
pub(super) struct Mender {
    queue: mpsc::Sender<(Whole, OwnedSemaphorePermit)>,
    permits: Arc<Semaphore>,
}

impl Mender {
    /// Starts a thread with this name. What comes of blocks is told by the second value.
    pub(super) fn start(name: String, workers: &Arc<Workers>) -> io::Result<(Self, mpsc::Receiver<Done>)> {
        let (queue, blocks) = mpsc::channel(MOST);
        let (results, done) = mpsc::channel(MOST);
        // Whoever stops the workers is to have the last of these.
        let workers = Arc::downgrade(workers);
        thread::Builder::new().name(name).spawn(move || {
            super::stand_back();
            match Builder::new_current_thread().build_local(LocalOptions::default()) {
                Ok(runtime) => runtime.block_on(mend(blocks, &workers, &results)),
                Err(error) => tracing::error!(%error, "nothing can be made whole"),
            }
        })?;
        Ok((Self { queue, permits: Arc::new(Semaphore::new(MOST)) }, done))
    }

    /// Hands a block over, once there is room for it. `false`: nobody takes any more.
    pub(super) async fn take(&self, whole: Whole) -> bool {
        let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return false };
        self.queue.send((whole, permit)).await.is_ok()
    }
}

async fn mend(
    mut blocks: mpsc::Receiver<(Whole, OwnedSemaphorePermit)>,
    workers: &Weak<Workers>,
    results: &mpsc::Sender<Done>,
) {
    while let Some((whole, permit)) = blocks.recv().await {
        let Whole { session, block, partial, layout, mirror } = whole;
        let Some(bytes) = partial.into_block() else {
            let _ = results.send(Done { session, block, delivery: Delivery::Wrong }).await;
            continue;
        };
        let Some(workers) = workers.upgrade() else { return };
        let results = results.clone();
        let deliver = move || async move {
            let delivery = deliver(&mirror, &layout, block, bytes.into()).await;
            drop(mirror);
            // The group may have been left.
            let _ = results.send(Done { session, block, delivery }).await;
            drop(permit);
        };
        workers.run(deliver).await;
    }
}

/// Gives the bytes of a block to a mirror.
async fn deliver(mirror: &Mirror, layout: &Layout, block: u32, bytes: Bytes) -> Delivery {
    let mut at = 0;
    let mut pieces = Vec::new();
    for range in layout.ranges(block) {
        let end = at + to_usize(range.length());
        if end > bytes.len() {
            return Delivery::Wrong;
        }
        pieces.push((range, bytes.slice(at..end)));
        at = end;
    }
    let offered = mirror.offer(Cause::Multicast, pieces).await;
    match () {
        () if offered.wrong > 0 => Delivery::Wrong,
        () if offered.unkept > 0 => Delivery::NoRoom,
        () => Delivery::Stored,
    }
}
