//! The worker threads: one per core, each a current-thread tokio runtime with its own io_uring.
//!
//! Owns: the threads, their names, their start and their end. Does not own: the work. Work is sent as a closure that
//! makes a future on the worker, so futures need not be `Send`; it stays on its worker for life.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{mpsc, oneshot};

use crate::disk;

/// Closures that may wait for one worker to take them.
const QUEUE: usize = 1024;

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;
type Job = Box<dyn FnOnce() -> LocalFuture + Send>;

thread_local! {
    static INDEX: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The number of the worker that this code runs on; `None` on other threads.
pub fn index() -> Option<usize> {
    INDEX.get()
}

/// All workers. Dropping it stops them without waiting for their work; [`Workers::stop`] waits.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    jobs: mpsc::Sender<Job>,
    thread: thread::JoinHandle<()>,
    /// Work given out and not ended.
    busy: std::sync::Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `count` workers.
    pub fn start(count: usize, preference: disk::Preference) -> io::Result<Self> {
        let workers = (0..count.max(1)).map(|index| start_one(index, preference)).collect::<io::Result<_>>()?;
        Ok(Self { workers })
    }

    /// The number of workers.
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// Runs what `make` makes on worker `index`; the caller waits while that worker's queue is full.
    ///
    /// Cancel safety: the work is either handed over or dropped.
    pub async fn run_on<F: Future<Output = ()> + 'static>(
        &self,
        index: usize,
        make: impl FnOnce() -> F + Send + 'static,
    ) {
        let worker = &self.workers[index];
        let ticket = Ticket::take(&worker.busy);
        let job: Job = Box::new(move || {
            let work = make();
            Box::pin(async move {
                let _ticket = ticket;
                work.await;
            })
        });
        // It fails only when the worker is gone, and then there is nobody to do the work.
        let _ = worker.jobs.send(job).await;
    }

    /// Runs what `make` makes on the worker that has least to do.
    pub async fn run<F: Future<Output = ()> + 'static>(&self, make: impl FnOnce() -> F + Send + 'static) {
        let load = |index: &usize| self.workers[*index].busy.load(Ordering::Relaxed);
        let idlest = (0..self.workers.len()).min_by_key(load).unwrap_or(0);
        self.run_on(idlest, make).await;
    }

    /// Runs what `make` makes on the worker that has least to do, and waits for what comes of it; `None` if the worker
    /// ends before.
    ///
    /// Cancel safety: the work goes on, if it was handed over.
    pub async fn ask<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        make: impl FnOnce() -> F + Send + 'static,
    ) -> Option<T> {
        let (report, result) = oneshot::channel();
        let work = move || {
            let work = make();
            // Whoever asked may have given up.
            async move { drop(report.send(work.await)) }
        };
        self.run(work).await;
        result.await.ok()
    }

    /// Stops the workers: what still runs on them is dropped where it waits, then their threads end. Blocks.
    pub fn stop(self) {
        let threads: Vec<_> = self.workers.into_iter().map(|worker| worker.thread).collect();
        for thread in threads {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// Counts a piece of work from its handing over to its end.
#[derive(Debug)]
struct Ticket(std::sync::Arc<AtomicUsize>);

impl Ticket {
    fn take(busy: &std::sync::Arc<AtomicUsize>) -> Self {
        busy.fetch_add(1, Ordering::Relaxed);
        Self(std::sync::Arc::clone(busy))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn start_one(index: usize, preference: disk::Preference) -> io::Result<Worker> {
    let (jobs, queue) = mpsc::channel(QUEUE);
    // Made here, so that a failure is the caller's; entered by the thread that will own it.
    let (report, started) = std::sync::mpsc::sync_channel(1);
    let thread = thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        INDEX.set(Some(index));
        match runtime() {
            Ok(runtime) => runtime.block_on(serve(queue, preference, &report)),
            Err(error) => drop(report.send(Err(error))),
        }
    })?;
    started.recv().map_err(|_| io::Error::other("a worker died while it started"))??;
    Ok(Worker { jobs, thread, busy: std::sync::Arc::default() })
}

fn runtime() -> io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_all().build_local(LocalOptions::default())
}

/// Takes work until the queue is closed.
async fn serve(
    mut queue: mpsc::Receiver<Job>,
    preference: disk::Preference,
    report: &std::sync::mpsc::SyncSender<io::Result<()>>,
) {
    let attached = disk::attach(preference);
    let (attached, result) = match attached {
        Ok(attached) => (Some(attached), Ok(())),
        Err(error) => (None, Err(error)),
    };
    // The receiver is gone only when the caller has given up.
    let _ = report.send(result);
    if attached.is_none() {
        return;
    }
    while let Some(job) = queue.recv().await {
        tokio::task::spawn_local(job());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::sync_channel;

    #[tokio::test]
    async fn work_runs_where_it_is_sent_and_ends_with_its_worker() {
        let workers = Workers::start(3, disk::Preference::Auto).unwrap();
        let (report, reports) = sync_channel(3);
        for wanted in 0..3 {
            let report = report.clone();
            workers.run_on(wanted, move || async move { report.send(index().unwrap()).unwrap() }).await;
        }
        let mut seen: Vec<_> = (0..3).map(|_| reports.recv().unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
        let held = Arc::new(());
        let inside = Arc::clone(&held);
        workers
            .run(move || async move {
                std::future::pending::<()>().await;
                drop(inside)
            })
            .await;
        workers.stop();
        assert_eq!(Arc::strong_count(&held), 1, "unfinished work outlives its worker");
    }

    #[tokio::test]
    async fn work_goes_to_the_worker_that_has_least() {
        let workers = Workers::start(2, disk::Preference::Threads).unwrap();
        let (report, reports) = sync_channel(16);
        for _ in 0..8 {
            let report = report.clone();
            workers
                .run(move || async move {
                    report.send(index().unwrap()).unwrap();
                    std::future::pending::<()>().await;
                })
                .await;
        }
        let on_first = (0..8).filter(|_| reports.recv().unwrap() == 0).count();
        assert_eq!(on_first, 4);
        workers.stop();
    }
}
