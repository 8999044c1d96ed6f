//! One sending that fills many mirrors: how long it takes, what the origin sends, and what it costs, by loss.
//!
//! The yardstick is one unicast copy over the same link: `headwater prefetch` of everything by one mirror, without loss.
//! The clock runs from the order until the last mirror says that everything is there. Then all of it is read from each, and
//! compared.
//!
//! The link has no latency: the bed's proxy knows no datagrams.

use std::cell::RefCell;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use headwater::clock;
use headwater::units::ByteSize;
use load::children::{self, Cpus, Guard};
use load::process::{Sample, to_f64};
use serde_json::{Value, json};

use super::cast_reader;
use crate::bed::{Bed, CABLE, Link, Loss, Rate, output};
use crate::servers::{IMAGE, Mirror, Origin};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image, tell};

/// Where sessions are sent to.
pub(crate) const GROUP: &str = "239.211.0.1:7211";
/// How often mirrors are asked whether everything is there.
const GLANCE: Duration = Duration::from_millis(50);
/// How long a session may take in all.
const PATIENCE: Duration = Duration::from_secs(600);

/// The exit status of `headwater cast` when mirrors were left to their upstreams.
const LEFT_SOME: i32 = 3;

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many mirrors.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    receivers: u8,
    /// Bytes of data in the image. A quarter as much is holes.
    #[arg(long, default_value = "256M")]
    pub(super) size: ByteSize,
    /// Per cent of the session's datagrams that each mirror loses, at random.
    /// Without a value: none of these.
    #[arg(long, value_delimiter = ',', value_name = "PERCENT", num_args = 0.., default_value = "0,1,5")]
    loss: Vec<f64>,
    /// Also with such a loss on everything that comes in, at mirrors and at the origin: TCP, reports, announcements.
    #[arg(long, value_delimiter = ',', value_name = "PERCENT")]
    loss_of_everything: Vec<f64>,
    /// Bytes of datagrams per second. [default: 99 % of what the link carries]
    #[arg(long, value_name = "SIZE")]
    cast_rate: Option<ByteSize>,
    /// More words for `headwater cast`, as in `--cast-option=--repair=5%` (repeatable).
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub(super) cast_option: Vec<String>,
    /// Instead: what a session does to a client that reads at random from one of its mirrors.
    #[arg(long)]
    reader: bool,
    /// With --reader: reads per second; several take turns.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "20,200")]
    pub(super) reads_per_second: Vec<u32>,
    /// With --reader: rates of the session, in per cent of what the link carries; several take turns.
    #[arg(long, value_delimiter = ',', value_name = "PERCENT", default_value = "50,80")]
    pub(super) share: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
enum Variant {
    Unicast,
    Cast(Loss),
}

impl Variant {
    fn name(self) -> String {
        match self {
            Self::Unicast => "one unicast copy".into(),
            Self::Cast(Loss { permille, everything }) => {
                let percent = f64::from(permille) / 10.0;
                format!("cast, {percent} % lost{}", if everything { " of everything" } else { "" })
            }
        }
    }
}

/// What one distribution came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Trial {
    pub(super) seconds: f64,
    /// Over the origin's cable, headers included.
    pub(super) cable_bytes: f64,
    /// CPU seconds of the origin, and the mean of its mirrors.
    pub(super) cpu: [f64; 2],
    /// What `headwater cast` said at the end.
    pub(super) report: Value,
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    if options.reader {
        return cast_reader::run(lab, options);
    }
    let image = image::with_holes(lab, options.size.0)?;
    image::index(lab, &image)?;
    let bed = bed(lab, options.receivers)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let losses = |percents: &[f64], everything| {
        percents.iter().map(move |percent| Loss { permille: permille(*percent), everything }).collect::<Vec<_>>()
    };
    let casts = [losses(&options.loss, false), losses(&options.loss_of_everything, true)].concat();
    let variants: Vec<Variant> =
        std::iter::once(Variant::Unicast).chain(casts.into_iter().map(Variant::Cast)).collect();
    let rate = options.cast_rate.map_or_else(|| share(bed.link.rate, 99), |rate| rate.0);
    let runs = lab.in_turns(&variants, Variant::name, |variant| match variant {
        Variant::Unicast => unicast(lab, &bed, &origin, &image),
        Variant::Cast(loss) => {
            let hosts = || bed.mirrors.iter().chain(std::iter::once(&bed.origin).filter(|_| loss.everything));
            let receivers = receivers(lab, &bed, &origin)?;
            hosts().try_for_each(|host| host.lose(loss))?;
            let trial = cast(lab, &bed, &origin, &receivers, &words(rate, options))?;
            hosts().try_for_each(|host| host.lose(Loss::default()))?;
            tell(&format!("{:.2} s; comparing", trial.seconds));
            receivers.iter().try_for_each(|mirror| mirror.verify(&image))?;
            Ok(trial)
        }
    })?;
    Ok(table(options, &bed, rate, &variants, &runs))
}

/// Hosts on a cable each that carries packets as they are on a wire.
pub(super) fn bed(lab: &Lab, mirrors: u8) -> anyhow::Result<Bed> {
    let bed = Bed::new(Link { rate: lab.common.rate, latency: Duration::ZERO }, mirrors)?;
    bed.mirrors.iter().chain([&bed.origin]).try_for_each(|host| host.cut_packets())?;
    Ok(bed)
}

/// A part, in per cent, of the bytes of datagrams that a link carries: with 1472 in each, and the headers of UDP, IP and
/// Ethernet beside them.
pub(super) const fn share(link: Rate, percent: u64) -> u64 {
    link.0 / 8 * 1472 / 1514 * percent / 100
}

fn permille(percent: f64) -> u32 {
    // At most a thousand, so nothing is cut off.
    Duration::from_secs_f64(percent.clamp(0.0, 100.0) / 100.0).as_millis().try_into().unwrap_or(1000)
}

/// The words for `headwater cast`.
fn words(rate: u64, options: &Options) -> Vec<String> {
    let mut words = vec!["--all".to_owned()];
    if rate > 0 {
        words.push(format!("--rate={rate}"));
    }
    words.extend(options.cast_option.iter().cloned());
    words
}

/// The words for a mirror that fetches nothing by itself, and hears the group.
pub(super) fn joins() -> [String; 3] {
    ["--fill=none".into(), format!("--join={GROUP}"), format!("--interface={CABLE}")]
}

/// A mirror on each host, with nothing in it, that has joined.
pub(super) fn receivers(lab: &Lab, bed: &Bed, origin: &Origin) -> anyhow::Result<Vec<Mirror>> {
    let joins = joins();
    let words: Vec<&str> = joins.iter().map(String::as_str).collect();
    bed.mirrors.iter().map(|host| Mirror::start(lab, host, &origin.uri, &words)).collect()
}

/// One copy, as a mirror fetches it.
fn unicast(lab: &Lab, bed: &Bed, origin: &Origin, image: &std::path::Path) -> anyhow::Result<Trial> {
    let mirror = Mirror::start(lab, &bed.mirrors[0], &origin.uri, &["--fill=none"])?;
    let mirrors = [mirror];
    let trial = measured(bed, origin, &mirrors, || mirrors[0].order(&["prefetch", IMAGE, "--all"]).map(drop))?;
    mirrors[0].verify(image)?;
    Ok(trial)
}

/// One sending to all of them.
pub(super) fn cast(
    lab: &Lab,
    bed: &Bed,
    origin: &Origin,
    receivers: &[Mirror],
    words: &[String],
) -> anyhow::Result<Trial> {
    let mut command = cast_command(lab, origin, receivers.len());
    command.args(words);
    let log = lab.scratch().join("cast.log");
    std::fs::write(&log, "")?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let session = RefCell::new(None);
    let order = || {
        *session.borrow_mut() = Some(Guard::spawn(command, &log)?);
        Ok(())
    };
    let status = || session.borrow_mut().as_mut().map_or(Ok(None), Guard::ended);
    // What it leaves to upstreams, and what is not durable yet, comes after its end.
    let check = || {
        let failed = status()?.filter(|status| !matches!(status.code(), Some(0 | LEFT_SOME)));
        ensure!(failed.is_none(), "the session failed");
        Ok(())
    };
    let mut trial = measured_while(bed, origin, receivers, order, check).with_context(said)?;
    let deadline = clock::now() + PATIENCE;
    while status()?.is_none() {
        ensure!(clock::now() < deadline, "the session does not end: {}", said());
        std::thread::sleep(GLANCE);
    }
    let text = said();
    let report = text.find('{').map(|start| serde_json::Deserializer::from_str(&text[start..]).into_iter().next());
    trial.report = report.flatten().with_context(said)?.with_context(said)?;
    Ok(trial)
}

/// `headwater cast` of the image to so many receivers.
pub(super) fn cast_command(lab: &Lab, origin: &Origin, receivers: usize) -> Command {
    let mut command = children::command(Cpus::Free, &lab.headwater);
    command.args(["cast", IMAGE, "--json", "--group", GROUP, "--interface", CABLE]);
    command.arg(format!("--wait-for={receivers}")).arg("--at").arg(origin.admin());
    command
}

/// Ends all sessions of the origin.
pub(super) fn call_off(lab: &Lab, origin: &Origin) -> anyhow::Result<()> {
    let order = |words: &[&str]| {
        let mut command = children::command(Cpus::Free, &lab.headwater);
        output(command.arg("cast").args(words).arg("--at").arg(origin.admin()))
    };
    let list: Value = serde_json::from_str(&order(&["--list", "--json"])?)?;
    let is_active = |cast: &&Value| matches!(cast["state"].as_str(), Some("waiting" | "sending" | "ending"));
    for cast in list["casts"].as_array().into_iter().flatten().filter(is_active) {
        order(&["--cancel", &cast["cast"].to_string()])?;
    }
    Ok(())
}

/// From an order until all mirrors have everything.
pub(super) fn measured(
    bed: &Bed,
    origin: &Origin,
    mirrors: &[Mirror],
    order: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Trial> {
    measured_while(bed, origin, mirrors, order, || Ok(()))
}

fn measured_while(
    bed: &Bed,
    origin: &Origin,
    mirrors: &[Mirror],
    order: impl FnOnce() -> anyhow::Result<()>,
    check: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Trial> {
    let usage = |pid| Sample::take(pid);
    let before = usage(origin.pid())?;
    let theirs = mirrors.iter().map(|mirror| usage(mirror.pid())).collect::<anyhow::Result<Vec<_>>>()?;
    let (sent, start) = (bed.origin.sent_bytes()?, clock::now());
    order()?;
    let mut waiting: Vec<&Mirror> = mirrors.iter().collect();
    while !waiting.is_empty() {
        check()?;
        ensure!(clock::now().duration_since(start) < PATIENCE, "{} mirrors lack something", waiting.len());
        std::thread::sleep(GLANCE);
        let mut rest = Vec::new();
        for mirror in waiting {
            if !mirror.is_whole()? {
                rest.push(mirror);
            }
        }
        waiting = rest;
    }
    let seconds = clock::now().duration_since(start).as_secs_f64();
    let cable_bytes = to_f64(bed.origin.sent_bytes()? - sent);
    let mut all = 0.0;
    for (mirror, before) in mirrors.iter().zip(&theirs) {
        all += usage(mirror.pid())?.since(before).cpu_seconds;
    }
    let mean = all / to_f64(headwater::units::to_u64(mirrors.len()));
    let cpu = [usage(origin.pid())?.since(&before).cpu_seconds, mean];
    Ok(Trial { seconds, cable_bytes, cpu, report: Value::Null })
}

fn table(options: &Options, bed: &Bed, rate: u64, variants: &[Variant], runs: &[Vec<Trial>]) -> Table {
    let data = to_f64(options.size.0);
    let all = |index: usize, value: &dyn Fn(&Trial) -> f64| runs[index].iter().map(value).collect::<Vec<f64>>();
    let field = |name: &'static str| move |trial: &Trial| trial.report[name].as_f64().unwrap_or(0.0);
    // CPU seconds for each gigabit of data: the fraction of a core at 1 Gbit/s.
    let per_gigabit = |cpu: f64| cpu / (data * 8.0 / 1e9);
    let rows = variants.iter().enumerate().map(|(index, variant)| {
        let seconds = |index| all(index, &|trial| trial.seconds);
        let symbols = |trial: &Trial| {
            let sent = |name| field(name)(trial);
            (sent("parity_symbols") + sent("repair_symbols")) / sent("data_symbols")
        };
        let is_cast = matches!(variant, Variant::Cast(_));
        let of_cast = |value: &dyn Fn(&Trial) -> f64| if is_cast { Cell::of(all(index, value)) } else { Cell::none() };
        let cells = vec![
            Cell::of(seconds(index)),
            if is_cast { Cell::ratio(&seconds(index), &seconds(0)) } else { Cell::none() },
            Cell::of(all(index, &|trial| trial.cable_bytes / data)),
            of_cast(&|trial| field("sent_bytes")(trial) / data),
            of_cast(&symbols),
            Cell::of(all(index, &|trial| per_gigabit(trial.cpu[0]))),
            Cell::of(all(index, &|trial| per_gigabit(trial.cpu[1]))),
        ];
        Row::new(variant.name(), cells)
    });
    let details = variants.iter().zip(runs).flat_map(|(variant, runs)| runs.iter().map(|run| (variant.name(), run)));
    Table {
        title: format!(
            "{} of data to {} mirrors, {}, {} of datagrams a second",
            options.size,
            options.receivers,
            bed.link,
            ByteSize(rate)
        ),
        columns: vec![
            "seconds",
            "of one copy",
            "on the cable, of the data",
            "in datagrams, of the data",
            "parity and repair, of the data",
            "sender's cores at 1 Gbit/s",
            "a receiver's",
        ],
        rows: rows.collect(),
        details: details.map(|(name, run)| json!({ "variant": name, "cast": run.report })).collect(),
        ..Table::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn per_cent_are_counted_by_tenths() {
        assert_eq!([0.0, 0.5, 1.0, 5.0, 100.0, 1e9].map(permille), [0, 5, 10, 50, 1000, 1000]);
    }

    #[test]
    fn headers_have_their_share_of_the_link() {
        assert_eq!(share(Rate(200_000_000), 100), 24_306_472);
        assert_eq!(share(Rate(200_000_000), 50), 12_153_236);
        assert_eq!(share(Rate(0), 99), 0);
    }
}
