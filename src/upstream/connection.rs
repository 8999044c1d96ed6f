//! One connection to a server.
//!
//! A task of the worker that opened it owns the socket; handles on any worker send it requests. The task ends when
//! the connection is lost (then every request in flight learns of it by its dropped reply) or when the last handle
//! is gone (then it says goodbye).

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Sleep;

use super::opening::{CONTEXTS, Introduction, OpenFailure, facts, open_export, position, put_disconnect};
use super::{Role, Stats};
use crate::clock;
use crate::error::Error as RequestError;
use crate::export::Facts;
use crate::nbd::Uri;
use crate::nbd::client::{Answer, Completion, InFlight, Received, Request};
use crate::nbd::handshake::client::Agreed;
use crate::nbd::reply::Violation;
use crate::net::Stream;
use crate::ranges::ByteRange;
use crate::units::to_u64;

/// Requests in flight on one connection. Servers work on some 16 at a time; more keep the pipe full.
pub(super) const DEPTH: usize = 64;
/// Input that is not data is taken in pieces of this size.
const INPUT: usize = 64 << 10;
/// What is taken at once before long data: a header, and little that has to be copied to its place.
const HEADERS: usize = 512;
/// Bytes that are received before others on the worker get their turn: some 100 microseconds' worth.
const TURN: usize = 512 << 10;

/// A request on its way to a connection's task.
struct Job {
    request: Request,
    data: Bytes,
    waiting: Waiting,
}

/// Who waits for an answer.
struct Waiting {
    reply: oneshot::Sender<Result<Answer, RequestError>>,
    since: Instant,
}

/// A way to send requests over one connection, from any worker.
#[derive(Clone)]
pub(super) struct Handle {
    jobs: mpsc::Sender<Job>,
    in_flight: Arc<AtomicUsize>,
    received: Arc<AtomicU64>,
    /// The number of the server in its pool.
    pub(super) server: usize,
    /// The worker that the connection lives on.
    pub(super) worker: Option<usize>,
    pub(super) agreed: Arc<Agreed>,
    /// Who the server was told that we are.
    pub(super) role: Role,
    task: AbortHandle,
}

/// A connection that is to end after its last request. It is not kept alive by this.
#[derive(Debug)]
pub(super) struct Leaving {
    in_flight: Arc<AtomicUsize>,
    received: Arc<AtomicU64>,
    task: AbortHandle,
}

impl Leaving {
    pub(super) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Requests that wait for an answer.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Bytes that have come over.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Ends it now: its requests learn that it is lost.
    pub(super) fn cut(&self) {
        self.task.abort();
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("worker", &self.worker).field("in_flight", &self.in_flight()).finish()
    }
}

/// Counts a request while its caller waits.
struct InFlightGuard<'a>(&'a AtomicUsize);

impl Drop for InFlightGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Handle {
    pub(super) fn is_alive(&self) -> bool {
        !self.jobs.is_closed()
    }

    /// Bytes that have come over.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Whether both are the same connection.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.jobs.same_channel(&other.jobs)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// To see the connection off, once this and all other handles are gone.
    pub(super) fn leave(self) -> Leaving {
        Leaving { in_flight: self.in_flight, received: self.received, task: self.task }
    }

    /// Sends a request and waits for its reply; `None` when the connection is lost before.
    ///
    /// Cancel safety: the reply is thrown away when it comes.
    pub(super) async fn ask(&self, request: Request, data: Bytes) -> Option<Result<Answer, RequestError>> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let _counted = InFlightGuard(&self.in_flight);
        let (reply, answer) = oneshot::channel();
        let waiting = Waiting { reply, since: clock::now() };
        self.jobs.send(Job { request, data, waiting }).await.ok()?;
        answer.await.ok()
    }
}

/// Opens a connection that lives on this worker, unless `admit` refuses its export. `ended` is called with the reason
/// when it is lost.
pub(super) async fn start(
    uri: &Uri,
    introduction: Introduction,
    stall_timeout: Duration,
    stats: [Arc<Stats>; 2],
    admit: impl FnOnce(&Facts) -> Result<(), OpenFailure>,
    ended: impl FnOnce(String) + 'static,
) -> Result<Handle, OpenFailure> {
    let (stream, input, agreed) = open_export(uri, introduction, &CONTEXTS).await?;
    admit(&facts(&agreed))?;
    let (jobs, queue) = mpsc::channel(DEPTH);
    let (agreed, received) = (Arc::new(agreed), Arc::<AtomicU64>::default());
    let driver = Driver {
        in_flight: InFlight::new(agreed.replies),
        stream,
        agreed: Arc::clone(&agreed),
        queue,
        received: Arc::clone(&received),
        input,
        output: Output::default(),
        stall: Stall::new(stall_timeout),
        stats,
    };
    let task = tokio::task::spawn_local(async move {
        if let Err(reason) = driver.run().await {
            ended(reason.to_string());
        }
    });
    Ok(Handle {
        jobs,
        in_flight: Arc::default(),
        received,
        server: 0,
        worker: crate::worker::index(),
        agreed,
        role: introduction.role,
        task: task.abort_handle(),
    })
}

/// Why a connection was lost.
#[derive(Debug, Error)]
enum Lost {
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("the server closed the connection")]
    Closed,
    #[error("the server broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the server has not answered for {0} s")]
    Stalled(u64),
}

/// The task that owns a connection.
struct Driver {
    stream: Stream,
    agreed: Arc<Agreed>,
    queue: mpsc::Receiver<Job>,
    /// Bytes that have come over, for the handles.
    received: Arc<AtomicU64>,
    in_flight: InFlight<Waiting>,
    input: BytesMut,
    output: Output,
    stall: Stall,
    /// Of the server, and of all.
    stats: [Arc<Stats>; 2],
}

/// What is to be sent: requests, and the payloads of writes as they are.
#[derive(Default)]
struct Output {
    parts: std::collections::VecDeque<Bytes>,
    tail: BytesMut,
}

impl Output {
    fn push(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.parts.push_back(self.tail.split().freeze());
            self.parts.push_back(data);
        }
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.tail.is_empty()
    }

    fn flush(&mut self, stream: &Stream) -> io::Result<()> {
        while !self.is_empty() {
            let part = self.parts.front().map_or(&self.tail[..], |part| &part[..]);
            let second = if self.parts.len() > 1 { &self.parts[1][..] } else { &[] };
            match stream.try_write_vectored(&[IoSlice::new(part), IoSlice::new(second)], false) {
                Ok(sent) => self.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn advance(&mut self, mut sent: usize) {
        use bytes::Buf;
        while let Some(part) = self.parts.front_mut() {
            if part.len() > sent {
                return part.advance(sent);
            }
            sent -= part.len();
            self.parts.pop_front();
        }
        self.tail.advance(sent);
    }
}

/// Notices that nothing comes although something should.
struct Stall {
    limit: Duration,
    last: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Stall {
    fn new(limit: Duration) -> Self {
        Self { limit, last: clock::now(), timer: Box::pin(tokio::time::sleep(limit)) }
    }

    fn progress(&mut self) {
        self.last = clock::now();
    }

    /// Ready once nothing has come for the whole limit. The timer is set anew only when it fires.
    fn poll(&mut self, context: &mut TaskContext<'_>) -> Poll<()> {
        while self.timer.as_mut().poll(context).is_ready() {
            let end = self.last + self.limit;
            if clock::now() >= end {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(end.into());
        }
        Poll::Pending
    }
}

enum Event {
    Job(Job),
    Readable,
    Writable,
    NoHandles,
    Stalled,
}

impl Driver {
    /// Serves until there is nobody to serve.
    async fn run(mut self) -> Result<(), Lost> {
        loop {
            self.output.flush(&self.stream)?;
            match poll_fn(|context| self.poll_event(context)).await {
                Event::Job(job) => {
                    self.submit(job);
                    // Whatever else is waiting leaves by the same send.
                    while self.in_flight.len() < DEPTH {
                        let Ok(job) = self.queue.try_recv() else { break };
                        self.submit(job);
                    }
                }
                Event::Readable => {
                    if self.receive()? {
                        // More is there; hits on this worker must not wait for all of it.
                        tokio::task::yield_now().await;
                    }
                }
                Event::Writable => {}
                // Whoever waits for a reply has a handle: nobody does.
                Event::NoHandles => return self.say_goodbye().await,
                Event::Stalled => return Err(Lost::Stalled(self.stall.limit.as_secs())),
            }
        }
    }

    fn poll_event(&mut self, context: &mut TaskContext<'_>) -> Poll<Event> {
        if self.stream.poll_readable(context).is_ready() {
            return Poll::Ready(Event::Readable);
        }
        if self.in_flight.len() < DEPTH {
            match self.queue.poll_recv(context) {
                Poll::Ready(Some(job)) => return Poll::Ready(Event::Job(job)),
                Poll::Ready(None) => return Poll::Ready(Event::NoHandles),
                Poll::Pending => {}
            }
        }
        if !self.output.is_empty() && self.stream.poll_writable(context).is_ready() {
            return Poll::Ready(Event::Writable);
        }
        if !self.in_flight.is_empty() && self.stall.poll(context).is_ready() {
            return Poll::Ready(Event::Stalled);
        }
        Poll::Pending
    }

    fn submit(&mut self, job: Job) {
        if self.in_flight.is_empty() {
            self.stall.progress();
        }
        // Whoever asked may have gone meanwhile.
        if job.waiting.reply.is_closed() {
            return;
        }
        self.in_flight.submit(job.request, job.waiting, &mut self.output.tail);
        self.output.push(job.data);
    }

    /// Takes what has arrived, up to a turn's worth. `true`: there may be more.
    fn receive(&mut self) -> Result<bool, Lost> {
        let mut taken = 0;
        while taken < TURN {
            let straight = self.input.is_empty() && self.in_flight.data_target().is_some();
            let received = if straight {
                let target = self.in_flight.data_target().unwrap_or_default();
                self.stream.try_read(target)
            } else if self.in_flight.expects_long_data() {
                self.input.reserve(INPUT);
                self.stream.try_read_buf(&mut (&mut self.input).limit(HEADERS))
            } else {
                self.input.reserve(INPUT);
                self.stream.try_read_buf(&mut self.input)
            };
            match received {
                Ok(0) => return Err(Lost::Closed),
                Ok(count) => {
                    taken += count;
                    self.received.fetch_add(to_u64(count), Ordering::Relaxed);
                    self.stall.progress();
                    if straight && let Some(completion) = self.in_flight.filled(count)? {
                        self.complete(completion);
                    }
                    self.take_replies()?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    fn take_replies(&mut self) -> Result<(), Lost> {
        loop {
            match self.in_flight.receive(&mut self.input)? {
                Received::NeedInput => return Ok(()),
                Received::Progress => {}
                Received::Reply(completion) => self.complete(completion),
            }
        }
    }

    fn complete(&self, completion: Completion<Waiting>) {
        let Completion { tag: Waiting { reply, since }, result } = completion;
        let took = clock::now().saturating_duration_since(since);
        let result = result.map(|answer| self.translate(answer));
        let received = match &result {
            Ok(Answer::Data { bytes, holes }) => {
                to_u64(bytes.len()) - holes.iter().map(|hole: &ByteRange| hole.length()).sum::<u64>()
            }
            _ => 0,
        };
        for stats in &self.stats {
            stats.requests.add(1);
            stats.received_bytes.add(received);
            stats.latencies.record(took, 1);
        }
        // Whoever asked may have gone meanwhile.
        let _ = reply.send(result);
    }

    /// Replaces the context ids of this connection by positions that hold for all.
    fn translate(&self, answer: Answer) -> Answer {
        let Answer::Status(contexts) = answer else { return answer };
        let known = contexts.into_iter().filter_map(|(id, extents)| {
            let (_, name) = self.agreed.contexts.iter().find(|(known, _)| *known == id)?;
            let context = CONTEXTS.into_iter().find(|context| context.name() == name)?;
            Some((position(context), extents))
        });
        Answer::Status(known.collect())
    }

    async fn say_goodbye(mut self) -> Result<(), Lost> {
        put_disconnect(&mut self.output.tail, self.agreed.replies);
        let mut last = BytesMut::new();
        self.output.parts.iter().for_each(|part| last.extend_from_slice(part));
        last.extend_from_slice(&self.output.tail);
        // The server may be gone already, and nobody waits for it any more.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.stream.write_all(&mut last)).await;
        self.stream.end_tls();
        Ok(())
    }
}
