//! One image to many mirrors, before they are needed: what the origin sends in relation to the data.
//!
//! *Star*: each mirror has the origin above it and is read by a client. *Chain*: each has the one before it above it, and
//! all are read at the same time, so that what one asks for the next one waits for. *Deployed*: `headwater prefetch --to`
//! has each fetch from another one. Bytes are those on the origin's cable, with headers.

use clap::{Args, ValueEnum};
use headwater::clock;
use headwater::units::{ByteSize, MIB};
use load::process::to_f64;

use crate::bed::{Bed, Host, output};
use crate::servers::{IMAGE, Mirror, Origin, fetched, load};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many mirrors.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=100))]
    mirrors: u8,
    /// Bytes of the image.
    #[arg(long, default_value = "256M")]
    size: ByteSize,
    /// The ways to compare.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "star,chain,prefetch,to")]
    ways: Vec<Way>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Each mirror from the origin, read by a client.
    Star,
    /// Each mirror from the one before it, read by a client.
    Chain,
    /// Each mirror from the one before it, by `headwater prefetch --all` on the last.
    Prefetch,
    /// By `headwater prefetch --all --to`.
    To,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Star => "all from the origin, read",
            Self::Chain => "each from the one before it, read",
            Self::Prefetch => "each from the one before it, the last one told to prefetch",
            Self::To => "deployed in a chain",
        }
    }

    const fn is_chained(self) -> bool {
        matches!(self, Self::Chain | Self::Prefetch)
    }
}

/// What one distribution came to.
struct Sent {
    origin: f64,
    all: f64,
    seconds: f64,
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let image = image::full(lab, options.size.0.max(64 * MIB))?;
    image::index(lab, &image)?;
    let bed = lab.bed(options.mirrors)?;
    let origin = Origin::start(lab, &bed, &image)?;
    // A program from before `prefetch` can still be measured by reading.
    let can = output(std::process::Command::new(&lab.headwater).args(["prefetch", "--help"])).unwrap_or_default();
    let able = |way: &Way| match way {
        Way::Star | Way::Chain => true,
        Way::Prefetch => !can.is_empty(),
        Way::To => can.contains("--to"),
    };
    let ways: Vec<Way> = options.ways.iter().copied().filter(able).collect();
    let runs = lab.in_turns(&ways, |way| way.name().into(), |way| distribute(lab, &bed, &origin, way))?;
    let size = std::fs::metadata(&image)?.len();
    let per = |bytes: f64| bytes / to_f64(size);
    let rows = ways.iter().zip(&runs).map(|(way, runs)| {
        let cells = vec![
            Cell::of(runs.iter().map(|sent| per(sent.origin)).collect()),
            Cell::of(runs.iter().map(|sent| per(sent.all)).collect()),
            Cell::of(runs.iter().map(|sent| sent.seconds).collect()),
        ];
        Row::new(way.name(), cells)
    });
    Ok(Table {
        title: format!("{} to {} mirrors, {}", options.size, options.mirrors, bed.link),
        columns: vec!["sent by the origin, of the image", "fetched by all, of the image", "seconds"],
        rows: rows.collect(),
        ..Table::default()
    })
}

fn distribute(lab: &Lab, bed: &Bed, origin: &Origin, way: Way) -> anyhow::Result<Sent> {
    let mut mirrors: Vec<Mirror> = Vec::new();
    for (index, host) in bed.mirrors.iter().enumerate() {
        let above = match index.checked_sub(1).filter(|_| way.is_chained()) {
            Some(before) => format!("nbd://{}/{IMAGE}", bed.mirrors[before].address),
            None => origin.uri.clone(),
        };
        mirrors.push(Mirror::start(lab, host, &above, &[])?);
    }
    let (before, start) = (bed.origin.sent_bytes()?, clock::now());
    match way {
        Way::Star | Way::Chain => read_all(&mirrors)?,
        Way::Prefetch => {
            drop(mirrors.last().map(|last| last.order(&["prefetch", IMAGE, "--all", "--wait"])).transpose()?)
        }
        Way::To => {
            let target = |(mirror, host): (&Mirror, &Host)| {
                format!("{}=nbd://{}/{IMAGE}", mirror.admin().display(), host.address)
            };
            let targets: Vec<String> = mirrors.iter().zip(&bed.mirrors).map(target).collect();
            let words = ["prefetch", IMAGE, "--all", "--wait", "--to", &targets.join(",")];
            output(std::process::Command::new(&lab.headwater).args(words))?;
        }
    }
    let seconds = clock::now().duration_since(start).as_secs_f64();
    let origin = to_f64(bed.origin.sent_bytes()? - before);
    let all = mirrors.iter().map(|mirror| Ok(fetched(&mirror.status()?))).sum::<anyhow::Result<f64>>()?;
    Ok(Sent { origin, all, seconds })
}

/// A client on each mirror at the same time, each reading all of it.
fn read_all(mirrors: &[Mirror]) -> anyhow::Result<()> {
    let read =
        |mirror: &Mirror| load(None, &mirror.uri(), &["--pattern=sequential", "--once", "--size=1M", "--depth=4"]);
    std::thread::scope(|scope| {
        let readers: Vec<_> = mirrors.iter().map(|mirror| scope.spawn(move || read(mirror))).collect();
        readers.into_iter().try_for_each(|reader| match reader.join() {
            Ok(report) => report.map(drop),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}
