//! `headwater balance`, measured.
//!
//! *Steps*: three servers of one image, and many clients of uneven load that all came to the first: how many steps there are
//! until the servers share it.
//!
//! *Standby*, after Jump-Start Cloud (Wu, Shen, Wu, Lin; figure 3): virtual machines on some hosts read from one image
//! server, whose disk is what is short; a standby after the other is brought in by `--target-latency`, and what is measured
//! is how long a read takes on average. Each host has a mirror that keeps next to nothing and is what is moved; a bucket on
//! each image server's cable stands for its disk. A machine reads as [`crate::poisson`] has it, and waits for each answer:
//! the next read is due an exponentially distributed time after it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use headwater::clock;
use headwater::units::{ByteSize, MIB};
use load::children::{self, Cpus, Guard};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;

use crate::bed::{Bed, Host, Link, Rate};
use crate::poisson::{Machine, Pattern};
use crate::servers::{IMAGE, Mirror, Origin, wait_for_line};
use crate::table::{Cell, Row, Table};
use crate::{Lab, beside, image, tell};

mod chart;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Looks of a balancer that wait for us.
const LOOKS: usize = 64;
/// The servers of the first part.
const SERVERS: u8 = 3;

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What is measured.
    #[arg(long, value_enum, default_value = "steps")]
    part: Part,
    /// Bytes of the image.
    #[arg(long, default_value = "256M")]
    size: ByteSize,
    /// Clients of uneven load, for the steps.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(2..=256))]
    clients: u16,
    /// Images at most, for the standbys.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=8))]
    images: u8,
    /// Hosts, for the standbys.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=32))]
    hosts: u8,
    /// Machines, spread evenly over the hosts.
    #[arg(long, default_value_t = 56, value_parser = clap::value_parser!(u16).range(1..=256))]
    machines: u16,
    /// Requests per second of each machine that reads at random, 4K to 64K.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "5,20")]
    random: Vec<u32>,
    /// Requests per second of each machine that reads sequentially, 64K each.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "50,200")]
    sequential: Vec<u32>,
    /// Requests of each machine while it is measured.
    #[arg(long, value_name = "N", default_value_t = 12)]
    requests: usize,
    /// What an image server's disk gives to random reads.
    #[arg(long, value_name = "RATE", default_value = "40M")]
    random_disk: Rate,
    /// What it gives to sequential reads.
    #[arg(long, value_name = "RATE", default_value = "80M")]
    sequential_disk: Rate,
    /// Where a plot of the standbys goes.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Steps until three servers share their load.
    Steps,
    /// The delay of reads by the number of images.
    Standby,
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let image = image::full(lab, options.size.0.max(16 * MIB))?;
    image::index(lab, &image)?;
    match options.part {
        Part::Steps => steps(lab, options, &image),
        Part::Standby => standby(lab, options, &image),
    }
}

/// A bed without latency: the buckets are what is short.
fn bed(lab: &Lab, hosts: u8) -> anyhow::Result<Bed> {
    Bed::new(Link { rate: lab.common.rate, latency: Duration::ZERO }, hosts)
}

/// An image server beside the origin.
struct Server {
    admin: PathBuf,
    address: String,
    _guard: Guard,
}

impl Server {
    fn start(lab: &Lab, host: &Host, image: &Path, number: u8) -> anyhow::Result<Self> {
        let at = |name: &str| lab.scratch().join(format!("server{number}.{name}"));
        let mut command = host.command(&lab.headwater);
        command.args(["--log-format=json", "serve", "--read-only"]).arg(format!("--listen={}:10809", host.address));
        command.arg(format!("--admin={}", at("admin").display())).arg(format!("{IMAGE}={}", image.display()));
        let log = at("log");
        let mut guard = Guard::spawn(command, &log)?;
        wait_for_line(&mut guard, &log, |line| line.starts_with("nbd"))?;
        Ok(Self { admin: at("admin"), address: host.address.to_string(), _guard: guard })
    }
}

/// `headwater balance --watch`.
struct Balancer {
    child: Child,
    lines: Receiver<Value>,
}

impl Balancer {
    /// Watches servers, by their admin sockets and the addresses by which others reach them.
    fn start(lab: &Lab, servers: &[(PathBuf, String)], words: &[String]) -> anyhow::Result<Self> {
        let mut command = children::command(Cpus::Free, &lab.headwater);
        command.args(["balance", "--watch", "--json"]).args(words);
        for (admin, address) in servers {
            command.arg(format!("--uri={}=nbd://{address}", admin.display()));
        }
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let stdout = BufReader::new(child.stdout.take().context("it writes to us")?);
        let (sender, lines) = sync_channel(LOOKS);
        std::thread::Builder::new().spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let Ok(look) = serde_json::from_str(&line) else { return };
                if sender.send(look).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { child, lines })
    }

    /// All looks until one that is it.
    fn until(&self, lab: &Lab, mut is: impl FnMut(&Value) -> bool) -> anyhow::Result<Vec<Value>> {
        let deadline = clock::now() + PATIENCE;
        let mut looks = Vec::new();
        loop {
            lab.go_on()?;
            ensure!(clock::now() < deadline, "it does not come to an end: {:?}", looks.last());
            match self.lines.recv_timeout(Duration::from_secs(1)) {
                Ok(look) => {
                    let is_last = is(&look);
                    looks.push(look);
                    if is_last {
                        return Ok(looks);
                    }
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                Err(error) => return Err(error).context("headwater balance has ended"),
            }
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It ends between two steps; if it has ended already that is as good.
            let _ = kill_process(pid, Signal::INT);
        }
        let _ = self.child.wait();
    }
}

fn steps(lab: &Lab, options: &Options, image: &Path) -> anyhow::Result<Table> {
    let bed = bed(lab, SERVERS)?;
    let mut hosts = vec![&bed.origin];
    hosts.extend(&bed.mirrors[..usize::from(SERVERS) - 1]);
    let servers: Vec<Server> = (0..SERVERS)
        .zip(&hosts)
        .map(|(number, host)| Server::start(lab, host, image, number))
        .collect::<Result<_, _>>()?;
    let machines = bed.mirrors.last().context("there is a host for clients")?;
    let size = std::fs::metadata(image)?.len();
    let mut clients = Vec::new();
    for number in 0..options.clients {
        // Six kinds, the largest asks for six times as much as the smallest.
        let rate = f64::from(4 * (1 + u32::from(number) * 5 % 6));
        let machine = Machine::new(number.into(), rate, Pattern::Random, size);
        let uri = format!("nbd://{}/{IMAGE}", servers[0].address);
        clients.push(play(
            lab,
            Some(machines),
            &uri,
            image,
            machine,
            20_000,
            &format!("client{number}"),
            &["--pace=1"],
        )?);
    }
    let named: Vec<_> = servers.iter().map(|server| (server.admin.clone(), server.address.clone())).collect();
    let list = named.iter().map(|(admin, _)| admin.display().to_string()).collect::<Vec<_>>().join(",");
    let words = ["--interval=3s".to_owned(), format!("--servers={list}")];
    let balancer = Balancer::start(lab, &named, &words)?;
    let mut has_moved = false;
    let looks = balancer.until(lab, |look| {
        has_moved |= look["verdict"] == "moved";
        has_moved && (look["verdict"] == "within" || look["verdict"] == "stuck")
    })?;
    drop(balancer);
    for (client, _) in &mut clients {
        ensure!(client.ended()?.is_none(), "a client has failed");
    }
    Ok(table_of_steps(options, &looks))
}

fn table_of_steps(options: &Options, looks: &[Value]) -> Table {
    let mut rows = Vec::new();
    let last = looks.len().saturating_sub(1);
    for (index, look) in looks.iter().enumerate() {
        if look["verdict"] != "move" && index != last {
            continue;
        }
        let servers = look["servers"].as_array().cloned().unwrap_or_default();
        let of = |server: &Value, name: &str| server[name].as_f64().unwrap_or(0.0);
        let mut cells: Vec<Cell> = servers.iter().map(|server| Cell::of(vec![of(server, "load") / 1e6])).collect();
        let off = servers.iter().map(|server| of(server, "off").abs()).fold(0.0, f64::max);
        let moves = look["moves"].as_array().map_or(0, Vec::len);
        cells.push(Cell::of(vec![off * 100.0]));
        cells.push(Cell::of(vec![f64::from(u32::try_from(moves).unwrap_or(u32::MAX))]));
        let step = look["step"].as_u64().unwrap_or(1).saturating_sub(1);
        rows.push(Row::new(format!("after {step} steps"), cells));
    }
    Table {
        title: format!(
            "{} clients of uneven load that came to the first of three servers, tolerance 20 %",
            options.clients
        ),
        columns: vec!["first MB/s", "second MB/s", "third MB/s", "furthest off %", "moves then"],
        rows,
        details: looks.to_vec(),
        ..Table::default()
    }
}

/// Starts a machine: `replay` with a trace of so many requests.
#[expect(clippy::too_many_arguments, reason = "a machine is all of this")]
fn play(
    lab: &Lab,
    host: Option<&Host>,
    uri: &str,
    image: &Path,
    machine: Machine,
    requests: usize,
    name: &str,
    words: &[&str],
) -> anyhow::Result<(Guard, PathBuf)> {
    let trace = lab.scratch().join(format!("{name}.csv"));
    std::fs::write(&trace, machine.trace(requests))?;
    let program = beside("replay")?;
    let mut command = host.map_or_else(|| children::command(Cpus::Free, &program), |host| host.command(&program));
    command.arg(&trace).arg(uri).arg("--image").arg(image).arg("--json").args(words);
    let log = trace.with_extension("log");
    std::fs::write(&log, "")?;
    Ok((Guard::spawn(command, &log)?, log))
}

/// What machines do.
#[derive(Debug, Clone, Copy)]
struct Work {
    pattern: Pattern,
    rate: u32,
    disk: Rate,
}

impl Work {
    fn name(self) -> String {
        let pattern = if self.pattern == Pattern::Random { "random" } else { "sequential" };
        format!("{pattern}, {}/s", self.rate)
    }
}

#[derive(Debug, Deserialize)]
struct Replayed {
    latency: Latency,
}

#[derive(Debug, Deserialize)]
struct Latency {
    mean: f64,
}

/// Where the second part happens.
struct Ground<'a> {
    lab: &'a Lab,
    options: &'a Options,
    image: &'a Path,
    bed: &'a Bed,
    origin: &'a Origin,
    standbys: &'a [Mirror],
}

fn standby(lab: &Lab, options: &Options, image: &Path) -> anyhow::Result<Table> {
    let spare = options.images - 1;
    let bed = bed(lab, spare + options.hosts)?;
    let origin = Origin::start(lab, &bed, image)?;
    let standbys: Vec<Mirror> = bed.mirrors[..usize::from(spare)]
        .iter()
        .map(|host| Mirror::start(lab, host, &origin.uri, &["--fill=none"]))
        .collect::<Result<_, _>>()?;
    for standby in &standbys {
        standby.order(&["prefetch", IMAGE, "--all", "--wait"])?;
    }
    let ground = Ground { lab, options, image, bed: &bed, origin: &origin, standbys: &standbys };
    let works = works(options);
    let images: Vec<u8> = (1..=options.images).collect();
    let runs = lab.in_turns(&images, |images| format!("{images} images"), |images| ground.trial(images, &works))?;
    let rows: Vec<Row> = works
        .iter()
        .enumerate()
        .map(|(at, work)| {
            let cell = |trials: &Vec<Vec<f64>>| Cell::of(trials.iter().map(|trial| trial[at]).collect());
            Row::new(work.name(), runs.iter().map(cell).collect())
        })
        .collect();
    if let Some(path) = &options.svg {
        std::fs::write(path, chart::draw(&rows)).with_context(|| path.display().to_string())?;
    }
    Ok(Table {
        title: format!(
            "Mean delay of a read in ms by the number of images: {} machines on {} hosts, disks of {} (random) and {} \
             (sequential)",
            options.machines, options.hosts, options.random_disk, options.sequential_disk
        ),
        columns: COLUMNS[..usize::from(options.images)].to_vec(),
        remarks: rows.iter().map(remark).collect(),
        rows,
        ..Table::default()
    })
}

/// The heads of columns.
const COLUMNS: [&str; 8] = ["1 image", "2", "3", "4", "5", "6", "7", "8"];

fn works(options: &Options) -> Vec<Work> {
    let random = options.random.iter().map(|&rate| Work { pattern: Pattern::Random, rate, disk: options.random_disk });
    let sequential = options.sequential.iter().map(|&rate| Work {
        pattern: Pattern::Sequential,
        rate,
        disk: options.sequential_disk,
    });
    sequential.chain(random).collect()
}

/// By how much each image more shortens the delay.
fn remark(row: &Row) -> String {
    let medians: Vec<f64> = row.cells.iter().filter_map(|cell| Some(cell.figure.as_ref()?.median)).collect();
    let parts: Vec<String> = medians.windows(2).map(|pair| format!("{:.2}", pair[1] / pair[0])).collect();
    format!("{}: each image more takes the delay to {} of what it was", row.name, parts.join(", "))
}

impl Ground<'_> {
    /// Brings so many images in, and measures: milliseconds, for each work.
    fn trial(&self, images: u8, works: &[Work]) -> anyhow::Result<Vec<f64>> {
        let hosts = &self.bed.mirrors[self.standbys.len()..];
        let words = ["--fill=none", "--cache-size=16M"];
        let mirrors: Vec<Mirror> = hosts
            .iter()
            .map(|host| Mirror::start(self.lab, host, &self.origin.uri, &words))
            .collect::<Result<_, _>>()?;
        self.limit(self.options.random_disk)?;
        if images > 1 {
            self.bring_in(images - 1, &mirrors)?;
        }
        let mut delays = Vec::new();
        for work in works {
            self.limit(work.disk)?;
            let delay = self.measure(&mirrors, *work)?;
            tell(&format!("{images} images, {}: {delay:.1} ms", work.name()));
            delays.push(delay);
        }
        self.limit(self.bed.link.rate)?;
        Ok(delays)
    }

    fn limit(&self, rate: Rate) -> anyhow::Result<()> {
        let standbys = &self.bed.mirrors[..self.standbys.len()];
        std::iter::once(&self.bed.origin).chain(standbys).try_for_each(|host| host.limit(rate))
    }

    /// Has the manager bring in so many standbys, while machines read as often as they ever do.
    fn bring_in(&self, count: u8, mirrors: &[Mirror]) -> anyhow::Result<()> {
        let rate = self.options.random.iter().copied().max().unwrap_or(20);
        let work = Work { pattern: Pattern::Random, rate, disk: self.options.random_disk };
        let _readers = self.machines(mirrors, work, 100_000)?;
        let standbys = &self.standbys[..usize::from(count)];
        let mut servers = vec![(self.origin.admin().to_owned(), self.bed.origin.address.to_string())];
        let places = standbys.iter().zip(&self.bed.mirrors);
        servers.extend(places.map(|(mirror, host)| (mirror.admin(), host.address.to_string())));
        let list = standbys.iter().map(|mirror| mirror.admin().display().to_string()).collect::<Vec<_>>().join(",");
        let words = [
            "--interval=1s".to_owned(),
            // Servers that are all at their limit do the same, however many clients they have.
            "--by=clients".to_owned(),
            "--target-latency=1ms".to_owned(),
            format!("--servers={}", self.origin.admin().display()),
            format!("--standby={list}"),
        ];
        let balancer = Balancer::start(self.lab, &servers, &words)?;
        let (mut calls, mut has_moved) = (0, false);
        balancer.until(self.lab, |look| {
            if look["standbys"] == "bring in" {
                (calls, has_moved) = (calls + 1, false);
            }
            has_moved |= look["verdict"] == "moved";
            let is_still = look["verdict"] == "within" || look["verdict"] == "stuck";
            calls == u32::from(count) && has_moved && is_still
        })?;
        Ok(())
    }

    fn machines(&self, mirrors: &[Mirror], work: Work, requests: usize) -> anyhow::Result<Vec<(Guard, PathBuf)>> {
        let size = std::fs::metadata(self.image)?.len();
        let start = |number: u16| {
            let machine = Machine::new(number.into(), work.rate.into(), work.pattern, size);
            let uri = mirrors[usize::from(number) % mirrors.len()].uri();
            let words = ["--pace=1", "--think"];
            play(self.lab, None, &uri, self.image, machine, requests, &format!("machine{number}"), &words)
        };
        (0..self.options.machines).map(start).collect()
    }

    /// The mean of what all machines waited for a read, in milliseconds.
    fn measure(&self, mirrors: &[Mirror], work: Work) -> anyhow::Result<f64> {
        let machines = self.machines(mirrors, work, self.options.requests)?;
        let mut sum = 0.0;
        for (mut machine, log) in machines {
            let deadline = clock::now() + PATIENCE;
            let status = loop {
                self.lab.go_on()?;
                match machine.ended()? {
                    Some(status) => break status,
                    None => ensure!(clock::now() < deadline, "a machine does not end"),
                }
                std::thread::sleep(Duration::from_millis(20));
            };
            let text = std::fs::read_to_string(&log)?;
            ensure!(status.success(), "a machine ended with {status}: {text}");
            let replayed: Replayed = serde_json::from_str(&text).context(text)?;
            sum += replayed.latency.mean;
        }
        Ok(sum / f64::from(self.options.machines) * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_step_and_one_for_the_end() {
        let look = |verdict: &str, step: u32, off: f64| {
            let server = serde_json::json!({ "load": 2e6, "off": off });
            serde_json::json!({ "verdict": verdict, "step": step, "servers": [server], "moves": [1, 2] })
        };
        let looks = [look("waiting", 1, 2.0), look("move", 1, -2.0), look("settling", 2, 0.0), look("within", 2, 0.1)];
        let options = Options {
            part: Part::Steps,
            size: ByteSize(0),
            clients: 24,
            images: 1,
            hosts: 1,
            machines: 1,
            random: Vec::new(),
            sequential: Vec::new(),
            requests: 1,
            random_disk: Rate(0),
            sequential_disk: Rate(0),
            svg: None,
        };
        let table = table_of_steps(&options, &looks);
        let names: Vec<_> = table.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["after 0 steps", "after 1 steps"]);
        assert_eq!(table.rows[0].cells[1].samples, [200.0]);
    }
}
