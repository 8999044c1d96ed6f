//! Looks all the time at what a directory takes on the disk.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// What was seen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// The most bytes that were allocated at any look.
    pub(super) most: u64,
    /// Looks.
    pub(super) looks: u64,
}

/// A thread that looks.
#[derive(Debug)]
pub(super) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Sampler {
    pub(super) fn start(directory: PathBuf) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&stop);
        let look = move || {
            let mut seen = Seen::default();
            while !is_over.load(Ordering::Relaxed) {
                seen.most = seen.most.max(allocated(&directory));
                seen.looks += 1;
                std::thread::sleep(PAUSE);
            }
            seen
        };
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(look).context("starting a thread")?;
        Ok(Self { stop, thread })
    }

    pub(super) fn finish(self) -> anyhow::Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the sampler panicked"))
    }
}

/// What `du` sees, directories too. What goes away while we look counts as gone.
fn allocated(path: &Path) -> u64 {
    let Ok(data) = path.symlink_metadata() else { return 0 };
    let inside = std::fs::read_dir(path).into_iter().flatten().flatten();
    data.blocks() * 512 + inside.map(|entry| allocated(&entry.path())).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_that_was_there_is_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let empty = allocated(directory.path());
        std::fs::write(directory.path().join("file"), vec![1; 100_000]).unwrap();
        let full = allocated(directory.path());
        assert!(full >= empty + 100_000, "{full} after {empty}");
        let seen = Sampler { stop: Arc::default(), thread: std::thread::Builder::new().spawn(Seen::default).unwrap() };
        assert_eq!(seen.finish().unwrap().most, 0);
    }
}
