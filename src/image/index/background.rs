//! Manifests for images that are being served, and threads that stand back behind those that serve.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::{IndexError, Made, Settings, make};
use crate::image::{Format, Seal};
use crate::manifest::Header;
use crate::units::ByteSize;

/// How nice the thread is to all others; the most is 19.
const NICENESS: i32 = 10;

/// A thread that makes what manifests are missing, one after another, and has each image announce its own when it is
/// done. Dropping it tells the thread to stop; [`Background::stop`] waits until it has.
#[derive(Debug)]
pub struct Background {
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Begins with the first image that has no identity. All were opened with this format.
    pub fn start(images: Vec<Arc<Seal>>, format: Format, settings: Settings) -> io::Result<Self> {
        let cancel = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&cancel);
        let thread = spawn("index", move || {
            for image in images.iter().filter(|image| image.identity().is_none()) {
                if told.load(Ordering::Relaxed) {
                    break;
                }
                index(image, format, &settings, &told);
            }
        })?;
        Ok(Self { cancel, thread: Some(thread) })
    }

    /// Has it stop, and waits until what is done is durable. Blocks.
    pub fn stop(mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
    }
}

/// Does `work` on a thread of its own with a low priority, which nobody waits for.
pub fn run_aside(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    spawn(name, work).map(drop)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Of this thread alone, and of those that it starts.
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(%error, "cannot lower the priority of a thread");
        }
        work();
    })
}

fn index(image: &Seal, format: Format, settings: &Settings, cancel: &AtomicBool) {
    let path = image.path().display();
    // It may have been made since the image was opened: for another name of the same file, or by hand.
    if let Ok(Some(Header { id: identity, .. })) = image.load() {
        tracing::info!(%path, %identity, "the image has a manifest");
        return;
    }
    tracing::info!(%path, rate = settings.rate.get().map(ByteSize).map(tracing::field::debug), "indexing in the background");
    match make(image.path(), format, settings, cancel, &|_| {}) {
        Ok(Made { read_bytes, .. }) => {
            tracing::info!(%path, read_bytes, "indexed");
            image.load_and_tell();
        }
        Err(IndexError::Cancelled) => tracing::info!(%path, "indexing stopped: the next run goes on from here"),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(tracing::field::display);
            tracing::warn!(%error, cause, "cannot index: the image has no identity");
        }
    }
}
