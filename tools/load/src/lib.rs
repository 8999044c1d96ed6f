//! A load generator for NBD servers that costs less than the server it measures.
//!
//! | module | owns |
//! | --- | --- |
//! | [`arguments`] | the command line |
//! | `connection` | a socket, its negotiation, and requests on their way out |
//! | `replies` | replies, taken apart where they were received |
//! | `traffic` | the requests of one connection, in flight and done |
//! | `order` | which block is next |
//! | `schedule` | when a request is due, and when a run is over |
//! | `pattern`, `ledger` | data that say where they belong, and what must be there |
//! | [`process`] | what the server used |
//! | [`report`] | what a run came to |
//! | [`children`], [`figures`] | for programs that measure in turns: processes that end with us; medians and ratios |
//!
//! The wire is the library's: requests, replies and the negotiation come from [`headwater::nbd`].

pub mod arguments;
pub mod children;
mod connection;
pub mod figures;
mod ledger;
mod order;
mod pattern;
pub mod process;
mod replies;
pub mod report;
mod schedule;
mod traffic;

use std::ffi::OsString;
use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use headwater::clock;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::handshake::client::Agreed;
use headwater::nbd::wire::TransmissionFlags;
use headwater::ranges::ByteRange;
use headwater::units::ByteSize;
use rustix::thread::CpuSet;

use arguments::{Arguments, CpuList, Mix, Pattern};
use ledger::Ledger;
use order::{Member, Order};
use pattern::Stamp;
use process::{Sample, SystemCalls};
use report::{Circumstances, Report};
use schedule::{Limits, Schedule};
use traffic::{Job, Tally, Traffic};

/// Runs the program with the words of a command line, its name first.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "this is what the program is for")]
pub fn main(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = Arguments::parse_from(words);
    let result = run(&arguments).and_then(|report| {
        let text = if arguments.json { serde_json::to_string_pretty(&report)? } else { report.to_string() };
        Ok((report, text))
    });
    match result {
        Ok((report, text)) => {
            println!("{text}");
            if report.is_flawless() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the command line says.
pub fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    if let Some(CpuList(cpus)) = &arguments.cpus {
        pin(cpus).with_context(|| format!("cannot run on CPUs {cpus:?}"))?;
    }
    let mut session = Session::open(arguments)?;
    if arguments.fill {
        session.fill()?;
    }
    let (measured, circumstances) = session.measure()?;
    let alive = measured.iter().all(|tally| tally.lost.is_none());
    let read_back = if alive && session.writes_are_checked() { session.read_back()? } else { Vec::new() };
    session.close();
    Report::new(&measured, &read_back, &circumstances)
}

/// Keeps this thread, and those that it starts, on some CPUs.
pub fn pin(cpus: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// All connections to a server, and what they are used for.
struct Session<'a> {
    arguments: &'a Arguments,
    replies: ReplyMode,
    /// Blocks of the region.
    blocks: u64,
    connections: Vec<Traffic>,
}

impl<'a> Session<'a> {
    fn open(arguments: &'a Arguments) -> anyhow::Result<Self> {
        let image = arguments
            .image
            .as_ref()
            .map(|path| File::open(path).map(Arc::new).with_context(|| path.display().to_string()));
        let image = image.transpose()?;
        let mut session = Self { arguments, replies: ReplyMode::Simple, blocks: 0, connections: Vec::new() };
        for index in 0..arguments.connections {
            let member = Member { index: index.into(), of: arguments.connections.into() };
            let (socket, agreed, left_over) = connection::open(&arguments.uri, arguments.replies.map(ReplyMode::from))
                .with_context(|| format!("connection {index} to {}", arguments.uri))?;
            let region = usable(arguments, &agreed)?;
            session.replies = agreed.replies;
            session.blocks = region.length() / u64::from(arguments.size);
            let ledger = session.ledger(member, region, image.clone())?;
            let blocks = (region.start(), arguments.size);
            let seed = pattern::mix(arguments.seed ^ pattern::mix(member.index));
            let traffic = Traffic::new(socket, agreed.replies, &left_over, arguments.depth, blocks, ledger, seed);
            session.connections.push(traffic);
        }
        Ok(session)
    }

    fn ledger(&self, member: Member, region: ByteRange, image: Option<Arc<File>>) -> anyhow::Result<Ledger> {
        let arguments = self.arguments;
        if let Some(file) = image {
            return Ok(Ledger::Image { file, buffer: Vec::new() });
        }
        if !arguments.verify && !arguments.fill {
            return Ok(Ledger::Unchecked);
        }
        let stamp = Stamp::new(arguments.seed, arguments.size, region.start())
            .context("--verify needs blocks of a multiple of 32 bytes that start at such a multiple")?;
        let (first, count) = member.share(self.blocks);
        Ok(Ledger::pattern(stamp, first, count))
    }

    /// Whether each connection must keep to its own blocks, because it alone knows their data.
    fn own_blocks(&self) -> bool {
        self.arguments.verify && self.arguments.image.is_none()
    }

    fn writes_are_checked(&self) -> bool {
        self.arguments.verify && self.arguments.rw != Mix::Read
    }

    fn members(&self) -> impl Iterator<Item = Member> + use<> {
        let of = u64::from(self.arguments.connections);
        (0..of).map(move |index| Member { index, of })
    }

    /// A job that goes through all blocks once, in order and as fast as it can.
    fn pass(&self, member: Member, reads: u8, known_only: bool) -> Job {
        Job {
            reads,
            order: Order::new(Pattern::Sequential, true, true, self.blocks, member, 0),
            schedule: Schedule::Closed,
            limits: Limits { measure_from: clock::now(), until: None, requests: None },
            fua: false,
            flush_every: None,
            known_only,
        }
    }

    fn fill(&mut self) -> anyhow::Result<()> {
        let jobs = self.members().map(|member| self.pass(member, 0, false)).collect();
        for tally in self.phase(jobs, |_| Ok(()))? {
            if let Some(error) = tally.lost {
                return Err(error).context("writing the pattern");
            }
            ensure!(tally.errors.is_empty(), "writing the pattern failed: {:?}", tally.errors);
        }
        if !self.arguments.verify {
            self.connections.iter_mut().for_each(Traffic::stop_checking);
        }
        Ok(())
    }

    fn read_back(&mut self) -> anyhow::Result<Vec<Tally>> {
        let jobs = self.members().map(|member| self.pass(member, 100, true)).collect();
        self.phase(jobs, |_| Ok(()))
    }

    fn measure(&mut self) -> anyhow::Result<(Vec<Tally>, Circumstances<'a>)> {
        let arguments = self.arguments;
        let counter = arguments.pid.filter(|_| arguments.syscalls).map(SystemCalls::start);
        let start = clock::now();
        let measure_from = start + arguments.ramp;
        let amount = amount(arguments);
        let until = (amount.is_none() && !arguments.once).then(|| measure_from + arguments.time);
        let jobs = self.members().map(|member| self.job(member, start, measure_from, until, amount)).collect();
        let mut usage = None;
        let tallies = self.phase(jobs, |running| {
            let Some(pid) = arguments.pid else { return Ok(()) };
            running.wait_until(Some(measure_from));
            let before = Sample::take(pid)?;
            running.wait_until(until);
            usage = Some(Sample::take(pid)?.since(&before));
            Ok(())
        })?;
        let system_calls =
            counter.map(|counter| counter.and_then(SystemCalls::finish).map_err(|error| format!("{error:#}")));
        let circumstances =
            Circumstances { arguments, replies: self.replies, measure_from, until, usage, system_calls };
        Ok((tallies, circumstances))
    }

    fn job(
        &self,
        member: Member,
        start: Instant,
        measure_from: Instant,
        until: Option<Instant>,
        amount: Option<u64>,
    ) -> Job {
        let arguments = self.arguments;
        let reads = match arguments.rw {
            Mix::Read => 100,
            Mix::Write => 0,
            Mix::Mixed => arguments.mix,
        };
        let own = self.own_blocks();
        let order = Order::new(arguments.pattern, arguments.once, own, self.blocks, member, arguments.seed);
        let schedule = match arguments.rate {
            Some(rate) => Schedule::Open { start, rate, member },
            None => Schedule::Closed,
        };
        let requests = amount.map(|amount| member.share(amount).1);
        let limits = Limits { measure_from, until, requests };
        let (fua, flush_every) = (arguments.fua, arguments.flush_every);
        Job { reads, order, schedule, limits, fua, flush_every, known_only: false }
    }

    /// Lets each connection do its job, on a thread of its own, and `watch` meanwhile.
    fn phase(
        &mut self,
        jobs: Vec<Job>,
        watch: impl FnOnce(&Running) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<Tally>> {
        std::thread::scope(|scope| {
            let (ended, running) = mpsc::sync_channel::<()>(1);
            let mut threads = Vec::new();
            for (index, (traffic, mut job)) in self.connections.iter_mut().zip(jobs).enumerate() {
                let ended = ended.clone();
                let work = move || {
                    let tally = traffic.run(&mut job);
                    drop(ended);
                    tally
                };
                let thread = std::thread::Builder::new().name(format!("load-{index}")).spawn_scoped(scope, work);
                threads.push(thread.context("starting a thread")?);
            }
            drop(ended);
            let watched = watch(&Running { threads: running });
            let mut tallies = Vec::new();
            for (index, thread) in threads.into_iter().enumerate() {
                let Ok(tally) = thread.join() else { bail!("the thread of connection {index} panicked") };
                let mut tally = tally?;
                tally.lost = tally.lost.map(|error| error.context(format!("connection {index}")));
                tallies.push(tally);
            }
            watched.map(|()| tallies)
        })
    }

    fn close(&self) {
        self.connections.iter().for_each(Traffic::close);
    }
}

/// Threads that are at work. Each holds an end of this channel, which nobody sends on.
struct Running {
    threads: mpsc::Receiver<()>,
}

impl Running {
    /// Waits until `time`, or until all threads have ended.
    fn wait_until(&self, time: Option<Instant>) {
        let rest = time.map_or(Duration::MAX, |time| time.saturating_duration_since(clock::now()));
        let ended = self.threads.recv_timeout(rest);
        debug_assert!(matches!(ended, Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)));
    }
}

/// The number of requests, if that is what ends the run.
fn amount(arguments: &Arguments) -> Option<u64> {
    arguments.requests.or_else(|| arguments.total.map(|ByteSize(bytes)| bytes.div_ceil(arguments.size.into())))
}

/// The region that is used, cut to whole blocks, if the server takes such requests.
fn usable(arguments: &Arguments, agreed: &Agreed) -> anyhow::Result<ByteRange> {
    let region = arguments.region.unwrap_or_else(|| ByteRange::between(0, agreed.size));
    ensure!(region.end() <= agreed.size, "the region ends at {} and the export at {}", region.end(), agreed.size);
    ensure!(region.length() >= arguments.size.into(), "the region is smaller than one request");
    let (size, sizes) = (arguments.size, agreed.block_sizes);
    ensure!(size <= sizes.maximum, "the server takes requests of at most {} bytes", sizes.maximum);
    let aligned = size.is_multiple_of(sizes.minimum) && region.start().is_multiple_of(sizes.minimum.into());
    ensure!(aligned, "the server takes multiples of {} bytes only", sizes.minimum);
    let writes = arguments.rw != Mix::Read || arguments.fill;
    ensure!(!(writes && agreed.flags.contains(TransmissionFlags::READ_ONLY)), "the export is read-only");
    ensure!(!arguments.fua || agreed.flags.contains(TransmissionFlags::SEND_FUA), "the server has no FUA");
    let flushes = arguments.flush_every.is_some();
    ensure!(!flushes || agreed.flags.contains(TransmissionFlags::SEND_FLUSH), "the server has no flush");
    Ok(region)
}
