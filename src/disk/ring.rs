//! io_uring for one thread.
//!
//! Operations are entries of a table (a slab). An entry owns its operation, buffer included, from before the kernel
//! hears of it until its completion has been taken from the queue:
//!
//! | state | the kernel may touch the buffer | somebody waits |
//! | --- | --- | --- |
//! | `Running` | yes | yes |
//! | `Orphaned` | yes | no: the future was dropped |
//! | `Finished` | no | yes |
//!
//! Pushing an operation does not submit it. The driver task, which runs once all tasks that were ready before it
//! have run, submits whatever has gathered in one system call; that is how requests of one batch share it.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, Probe, opcode};
use slab::Slab;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::op::Op;
use crate::units::{to_u64, to_usize};

/// Operations that one submit can carry. More are submitted in several calls.
const ENTRIES: u32 = 256;

/// A ring and its table of operations. Belongs to one thread.
pub(super) struct Ring {
    inner: RefCell<Inner>,
}

struct Inner {
    uring: IoUring,
    table: Slab<Entry>,
    /// Wakes the driver task.
    driver: Option<Waker>,
    /// Whether there is something to submit that the driver has not been woken for.
    dirty: bool,
}

struct Entry {
    op: Op,
    state: State,
}

enum State {
    Running(Option<Waker>),
    Orphaned,
    Finished(io::Result<usize>),
}

impl Ring {
    /// Makes a ring, or says why this system has none for us (not built in, forbidden, too old).
    pub(super) fn new() -> io::Result<Rc<Self>> {
        let uring = build()?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring lacks operations"));
        }
        let inner = Inner { uring, table: Slab::new(), driver: None, dirty: false };
        Ok(Rc::new(Self { inner: RefCell::new(inner) }))
    }

    /// Starts `op`. The future gives it back with its result.
    pub(super) fn start(self: &Rc<Self>, op: Op) -> InRing {
        let mut inner = self.inner.borrow_mut();
        let key = inner.table.insert(Entry { op, state: State::Running(None) });
        inner.push(key);
        let driver = if inner.dirty { None } else { inner.driver.take() };
        inner.dirty = true;
        drop(inner);
        if let Some(waker) = driver {
            waker.wake();
        }
        InRing { ring: Rc::clone(self), key }
    }

    /// Submits what has gathered and hands out what has finished, until the future is dropped.
    pub(super) async fn drive(self: Rc<Self>) {
        let fd = self.inner.borrow().uring.as_raw_fd();
        // SAFETY: the ring owns the descriptor and never closes or changes it while it lives; `self` keeps the ring
        // alive until after the registration, which is declared later, has been dropped.
        let fd = match unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) } {
            Ok(fd) => fd,
            Err(error) => {
                tracing::error!(%error, "cannot watch the io_uring of this worker");
                return;
            }
        };
        poll_fn(|context| self.poll_drive(&fd, context)).await;
    }

    fn poll_drive(&self, fd: &AsyncFd<RawFd>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut inner = self.inner.borrow_mut();
            inner.driver = Some(context.waker().clone());
            let all_submitted = inner.submit();
            let wakers = inner.reap();
            drop(inner);
            wakers.into_iter().for_each(Waker::wake);
            if !all_submitted {
                context.waker().wake_by_ref();
            }
            match fd.poll_read_ready(context) {
                Poll::Pending => return Poll::Pending,
                // Cleared before the queue is read, so that a completion that comes meanwhile is not missed.
                Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
            }
        }
    }

    fn poll_op(&self, key: usize, context: &Context<'_>) -> Poll<(io::Result<usize>, Op)> {
        let mut inner = self.inner.borrow_mut();
        if let State::Running(waker) = &mut inner.table[key].state {
            *waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let Entry { op, state } = inner.table.remove(key);
        match state {
            State::Finished(result) => Poll::Ready((result, op)),
            State::Running(_) | State::Orphaned => unreachable!("an orphan has no future, and running was seen above"),
        }
    }

    fn orphan(&self, key: usize) {
        let mut inner = self.inner.borrow_mut();
        match inner.table[key].state {
            State::Running(_) => inner.table[key].state = State::Orphaned,
            State::Finished(_) | State::Orphaned => drop(inner.table.remove(key)),
        }
    }
}

impl Inner {
    /// Puts the entry at `key` into the submission queue, making room if there is none.
    fn push(&mut self, key: usize) {
        let entry = self.table[key].op.entry().user_data(to_u64(key));
        loop {
            // SAFETY: the entry's pointers lead into the operation, which stays in the table until its completion
            // (`reap`), even when nobody waits for it any more (`orphan`) and when the ring is dropped (`Drop`).
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
            if !self.submit() {
                std::thread::yield_now();
            }
        }
    }

    /// Tells the kernel of everything that was pushed. Says whether it took all of it: it does not when memory is
    /// short or too many completions wait.
    fn submit(&mut self) -> bool {
        self.dirty = false;
        while self.needs_the_kernel() {
            match self.uring.submit() {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.reap().into_iter().for_each(Waker::wake);
                    return false;
                }
            }
        }
        self.uring.submission().is_empty()
    }

    /// Whether there are entries to submit, completions that the kernel holds back because the queue was full, or
    /// work that it left for our next call.
    fn needs_the_kernel(&mut self) -> bool {
        let queue = self.uring.submission();
        !queue.is_empty() || queue.cq_overflow() || queue.taskrun()
    }

    /// Takes all completions, returning whom to wake.
    fn reap(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        let Self { uring, table, .. } = self;
        for completion in uring.completion() {
            let key = to_usize(completion.user_data());
            // Negative results are errors.
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(completion.result().wrapping_neg()));
            let entry = &mut table[key];
            if let State::Running(waker) = &mut entry.state {
                wakers.extend(waker.take());
                if let Ok(bytes) = result {
                    entry.op.filled(bytes);
                }
                entry.state = State::Finished(result);
            } else {
                table.remove(key);
            }
        }
        wakers
    }
}

impl Drop for Ring {
    /// Waits for the kernel to let go of every buffer.
    fn drop(&mut self) {
        let inner = self.inner.get_mut();
        while inner.table.iter().any(|(_, entry)| !matches!(entry.state, State::Finished(_))) {
            if let Err(error) = inner.uring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // The kernel may still write to these buffers: losing them is the only safe thing left.
                std::mem::forget(std::mem::take(&mut inner.table));
                return;
            }
            inner.reap();
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("operations", &self.inner.borrow().table.len()).finish()
    }
}

/// An operation in a ring. Dropping it lets the operation run on without anybody.
#[derive(Debug)]
pub(super) struct InRing {
    ring: Rc<Ring>,
    key: usize,
}

/// The key of a future that has given its operation back.
const TAKEN: usize = usize::MAX;

impl Future for InRing {
    type Output = (io::Result<usize>, Op);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = self.ring.poll_op(self.key, context);
        if result.is_ready() {
            self.key = TAKEN;
        }
        result
    }
}

impl Drop for InRing {
    fn drop(&mut self) {
        if self.key != TAKEN {
            self.ring.orphan(self.key);
        }
    }
}

/// The leanest ring that the kernel has whose completions epoll is told of: one submitter, and no interruption of
/// this thread while it runs (Linux 6.0), else a plain one. `DEFER_TASKRUN` would save a little more, but with it
/// the ring's descriptor does not become readable while nobody waits in the ring.
fn build() -> io::Result<IoUring> {
    let lean =
        IoUring::builder().setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag().setup_clamp().build(ENTRIES);
    lean.or_else(|_| IoUring::builder().setup_clamp().build(ENTRIES))
}
