//! Repeats the reads of a recorded boot against an NBD server, compares what comes back, and says how long it took.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use futures_util::stream::{FuturesUnordered, StreamExt};
use hdrhistogram::Histogram;
use headwater::clock;
use headwater::export::{Export, LocalFuture, Piece};
use headwater::nbd::Uri;
use headwater::units::{ByteSize, to_usize};
use headwater::upstream::{Expectation, Remote, Settings};
use replay::alarm::Alarm;
use replay::pace::{Pace, Schedule};
use replay::stall::{Stall, Waits};
use replay::trace::{Read, Trace};
use serde::Serialize;
use tokio::runtime::{Builder, LocalOptions};

/// Repeats the reads of a recorded boot against an NBD server.
///
/// The trace is a CSV file with the columns seconds,op,offset,bytes, as nbdkit's log filter or blktrace can be made
/// to give it. Writes and flushes in it are counted and left out: a machine that is started from a shared image
/// writes elsewhere.
///
/// The total stall is the time during which at least one read was waited for, from the moment it was due: several that
/// wait at the same time count once. A resident image has some too; what counts is the difference.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The recorded boot.
    trace: PathBuf,
    /// The server, as in nbd://host/export.
    uri: Uri,
    /// The image that is served: every read is compared with it.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Reads in flight at most.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
    /// Connections.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: u16,
    /// Start each read when the machine did, this many times as fast; without it, as soon as there is room.
    ///
    /// A read's latency then counts from the moment when it was due, also when the server was late.
    #[arg(long, value_name = "FACTOR")]
    pace: Option<f64>,
    /// With --pace: a machine that waits does nothing else, so a read that is late delays all that follow.
    ///
    /// Each read comes as long after the previous one as in the recording, counted from when fewer than --depth reads
    /// were waited for. Without it reads come by the clock, also those that a machine would not have begun yet.
    #[arg(long, requires = "pace")]
    think: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed. Times are in seconds.
#[derive(Debug, Serialize)]
struct Report {
    reads: u64,
    bytes: u64,
    left_out: u64,
    compared: bool,
    seconds: f64,
    latency: Latency,
    stall: Stall,
}

#[derive(Debug, Serialize)]
struct Latency {
    mean: f64,
    median: f64,
    p90: f64,
    p99: f64,
    maximum: f64,
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(pace) = arguments.pace
        && !(pace.is_finite() && pace > 0.0)
    {
        bail!("--pace {pace}: it must be more than zero");
    }
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let report = runtime.block_on(replay(&arguments))?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}

async fn replay(arguments: &Arguments) -> anyhow::Result<Report> {
    let path = &arguments.trace;
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let trace = Trace::parse(&text).with_context(|| path.display().to_string())?;
    let image = arguments.image.as_ref().map(|path| open_image(path)).transpose()?;
    let settings = Settings { connections: arguments.connections.into(), ..Settings::default() };
    let remote = Remote::open(vec![arguments.uri.clone()], Expectation::default(), settings).await?;
    let size = remote.facts().size;
    if let Some(read) = trace.reads.iter().find(|read| read.range.end() > size) {
        bail!("the trace reads {:?} and the export has {size} bytes: is it another image?", read.range);
    }
    let start = clock::now();
    let mut run = Run::new(&remote, image.as_ref(), arguments.depth)?;
    let mut schedule = Schedule::new(arguments.pace(), start);
    for read in &trace.reads {
        let room = run.room().await?;
        run.start(*read, schedule.due(read.at, room)).await?;
    }
    let Run { latencies, waits, .. } = run.finish().await?;
    let seconds = clock::now().duration_since(start).as_secs_f64();
    let at = |quantile| Duration::from_micros(latencies.value_at_quantile(quantile)).as_secs_f64();
    Ok(Report {
        reads: latencies.len(),
        bytes: trace.reads.iter().map(|read| read.range.length()).sum(),
        left_out: trace.others,
        compared: image.is_some(),
        seconds,
        latency: Latency {
            mean: latencies.mean() / 1e6,
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            maximum: at(1.0),
        },
        stall: waits.total(),
    })
}

impl Arguments {
    fn pace(&self) -> Pace {
        match (self.pace, self.think) {
            (None, _) => Pace::Fast,
            (Some(factor), false) => Pace::Clock(factor),
            (Some(factor), true) => Pace::Thinking(factor),
        }
    }
}

type Answer<'a> = LocalFuture<'a, anyhow::Result<(Instant, Instant)>>;

/// Reads on their way, and what those before them came to.
struct Run<'a> {
    remote: &'a Remote,
    image: Option<&'a std::fs::File>,
    depth: usize,
    alarm: Alarm,
    waiting: FuturesUnordered<Answer<'a>>,
    latencies: Histogram<u64>,
    waits: Waits,
}

impl<'a> Run<'a> {
    fn new(remote: &'a Remote, image: Option<&'a std::fs::File>, depth: u16) -> anyhow::Result<Self> {
        // Microseconds, from one to an hour.
        let latencies = Histogram::new_with_bounds(1, 3_600_000_000, 3)?;
        let (waiting, waits) = (FuturesUnordered::new(), Waits::default());
        Ok(Self { remote, image, depth: depth.into(), alarm: Alarm::new()?, waiting, latencies, waits })
    }

    /// Waits until one more may be on its way. Gives back since when.
    async fn room(&mut self) -> anyhow::Result<Instant> {
        while self.waiting.len() >= self.depth {
            let Some(answer) = self.waiting.next().await else { break };
            self.note(answer?)?;
        }
        Ok(clock::now())
    }

    /// Starts a read when it is due; meanwhile others may be answered.
    async fn start(&mut self, read: Read, due: Instant) -> anyhow::Result<()> {
        loop {
            let answer = tokio::select! {
                biased;
                rung = self.alarm.until(due) => { rung?; break }
                Some(answer) = self.waiting.next() => answer?,
            };
            self.note(answer)?;
        }
        self.waiting.push(Box::pin(one(self.remote, read, due, self.image)));
        Ok(())
    }

    async fn finish(mut self) -> anyhow::Result<Self> {
        while let Some(answer) = self.waiting.next().await {
            self.note(answer?)?;
        }
        Ok(self)
    }

    fn note(&mut self, (due, answered): (Instant, Instant)) -> anyhow::Result<()> {
        let micros = answered.saturating_duration_since(due).as_micros();
        self.latencies.saturating_record(u64::try_from(micros)?.max(1));
        self.waits.add(due, answered);
        Ok(())
    }
}

fn open_image(path: &std::path::Path) -> anyhow::Result<std::fs::File> {
    std::fs::File::open(path).with_context(|| path.display().to_string())
}

/// Reads, and compares. Gives back when it was due and when the answer came.
async fn one(
    remote: &Remote,
    read: Read,
    due: Instant,
    image: Option<&std::fs::File>,
) -> anyhow::Result<(Instant, Instant)> {
    let pieces = remote.read(read.range).await.with_context(|| format!("reading {:?}", read.range))?;
    let answered = clock::now();
    if let Some(image) = image {
        compare(&pieces, read, image)?;
    }
    Ok((due, answered))
}

fn compare(pieces: &[Piece], read: Read, image: &std::fs::File) -> anyhow::Result<()> {
    let mut offset = read.range.start();
    for piece in pieces {
        let mut expected = vec![0; to_usize(piece.length())];
        image.read_exact_at(&mut expected, offset).context("reading the image")?;
        let same = match piece {
            Piece::Data(data) => data[..] == expected[..],
            Piece::Hole(_) => expected.iter().all(|byte| *byte == 0),
        };
        ensure!(same, "the server's bytes differ from the image's in {} bytes from {offset} on", piece.length());
        offset += piece.length();
    }
    ensure!(offset == read.range.end(), "the server sent {} bytes too few", read.range.end() - offset);
    Ok(())
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let compared = if self.compared { ", all as in the image" } else { "" };
        let Latency { mean, median, p90, p99, maximum } = self.latency;
        writeln!(
            f,
            "{} reads of {} ({} bytes) in {:.2} s{compared}; {} lines of the trace are no reads",
            self.reads,
            ByteSize(self.bytes),
            self.bytes,
            self.seconds,
            self.left_out
        )?;
        let ms = |seconds: f64| seconds * 1000.0;
        let Stall { seconds, sum_seconds, slow_reads } = self.stall;
        writeln!(
            f,
            "total stall: {seconds:.3} s (sum of all latencies {sum_seconds:.3} s), {slow_reads} reads took over 1 ms"
        )?;
        write!(
            f,
            "latency: mean {:.2} ms, median {:.2} ms, 90 % {:.2} ms, 99 % {:.2} ms, maximum {:.2} ms",
            ms(mean),
            ms(median),
            ms(p90),
            ms(p99),
            ms(maximum)
        )
    }
}
