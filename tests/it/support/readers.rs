//! Clients that read without pause, and check all that they get.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use headwater::export::conformance::Random;

use super::client::Client;
use super::eventually;

/// Bytes of one read.
const BLOCK: u64 = 16 << 10;

/// A number of clients, each with a thread of its own.
pub(crate) struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<[AtomicU64]>,
    threads: Vec<JoinHandle<Vec<Sample>>>,
}

/// One read.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) began: Instant,
    pub(crate) took: Duration,
}

impl Readers {
    /// One client for each URI; all hold `bytes`.
    pub(crate) fn start<'a>(uris: impl IntoIterator<Item = &'a str>, bytes: &Arc<Vec<u8>>) -> Self {
        let uris: Vec<_> = uris.into_iter().map(str::to_owned).collect();
        let stop = Arc::<AtomicBool>::default();
        let reads: Arc<[AtomicU64]> = uris.iter().map(|_| AtomicU64::default()).collect();
        let start = |(index, uri): (usize, String)| {
            let (stop, reads, bytes) = (Arc::clone(&stop), Arc::clone(&reads), Arc::clone(bytes));
            std::thread::spawn(move || read(&uri, index, &bytes, &stop, &reads[index]))
        };
        let threads = uris.into_iter().enumerate().map(start).collect();
        Self { stop, reads, threads }
    }

    /// Waits until each has read so many times more.
    pub(crate) fn go_on(&self, times: u64) {
        let before: Vec<_> = self.reads.iter().map(|reads| reads.load(Ordering::Relaxed)).collect();
        eventually("reads of everybody", || {
            assert!(!self.threads.iter().any(JoinHandle::is_finished), "a client has failed");
            let mut both = self.reads.iter().zip(&before);
            both.all(|(now, before)| now.load(Ordering::Relaxed) >= before + times)
        });
    }

    /// Has them all stop. Fails if one of them had an error, or wrong bytes.
    pub(crate) fn stop(self) -> Vec<Sample> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    }
}

fn read(uri: &str, index: usize, bytes: &[u8], stop: &AtomicBool, reads: &AtomicU64) -> Vec<Sample> {
    let mut client = Client::open(uri);
    let mut random = Random::new(index as u64 * 2 + 1);
    let mut samples = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let offset = random.below(bytes.len() as u64 - BLOCK);
        let began = Instant::now();
        let got = client.read(offset, BLOCK);
        samples.push(Sample { began, took: began.elapsed() });
        let expected = &bytes[offset as usize..][..BLOCK as usize];
        assert!(got == expected, "{uri}: wrong bytes at {offset}");
        reads.fetch_add(1, Ordering::Relaxed);
    }
    samples
}
