//! Which way the current thread does its file operations.
//!
//! A worker attaches a ring to its thread for as long as it runs. On a thread without one, and where io_uring is
//! refused (containers often forbid it), the same operations go to tokio's pool of blocking threads.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Once;

use super::op::Op;
use super::ring::Ring;

/// What the operator wants file operations to be done by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preference {
    /// io_uring where it is allowed, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads.
    Threads,
}

thread_local! {
    static RING: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// The ring of this thread, which detaches when this is dropped.
#[derive(Debug)]
pub struct Attached(());

impl Drop for Attached {
    fn drop(&mut self) {
        RING.with_borrow_mut(Option::take);
    }
}

/// Gives this thread its way of doing file operations. Call once, within its tokio `LocalRuntime` or `LocalSet`.
///
/// Fails only when io_uring was demanded and is refused.
pub fn attach(preference: Preference) -> io::Result<Attached> {
    if preference != Preference::Threads {
        match Ring::new() {
            Ok(ring) => {
                tokio::task::spawn_local(Rc::clone(&ring).drive());
                RING.with_borrow_mut(|current| *current = Some(ring));
            }
            Err(error) if preference == Preference::Uring => return Err(error),
            Err(error) => warn_once(&error),
        }
    }
    Ok(Attached(()))
}

fn warn_once(error: &io::Error) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        tracing::warn!(%error, "io_uring is refused here: using threads for file operations, which costs more CPU");
    });
}

/// Does `op` the way of this thread and gives it back with its result.
///
/// Cancel safety: the operation goes on without its caller.
pub(super) async fn run(op: Op) -> (io::Result<usize>, Op) {
    let ring = RING.with_borrow(Option::clone);
    match ring {
        Some(ring) => ring.start(op).await,
        None => run_blocking(op).await,
    }
}

async fn run_blocking(mut op: Op) -> (io::Result<usize>, Op) {
    let work = tokio::task::spawn_blocking(move || {
        let result = op.perform();
        if let Ok(bytes) = result {
            op.filled(bytes);
        }
        (result, op)
    });
    work.await.expect("file operations do not panic, and the runtime outlives its tasks")
}
