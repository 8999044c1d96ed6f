//! Pictures of the status page: a tree of three tiers under load, in a real browser.
//!
//! An origin with two images, a mirror of it for the site, and three mirrors of that one on hosts whose machines read. The page
//! is the site's. What is shown is what is measured: nothing is made up for the picture.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use headwater::clock;
use load::children::{self, Cpus, Guard};
use serde_json::Value;

use crate::bed::{Host, output};
use crate::browser::{Browser, forward, from_base64};
use crate::servers::wait_for_line;
use crate::{Lab, beside, image, tell};

/// How long the page may take to have what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Until everything stands after the look of the page has changed.
const STEADY: Duration = Duration::from_millis(2500);

/// What is shown.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Where the picture goes; -dark and -narrow are put behind its name for the two others.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// How long there is load before the pictures are taken.
    #[arg(long, default_value = "200s", value_parser = load::arguments::duration)]
    time: Duration,
}

/// The images: name, size in MiB of each half that has data, parts of it.
const IMAGES: [(&str, u64); 2] = [("debian12", 384), ("windows11", 640)];

struct Place {
    name: &'static str,
    directory: PathBuf,
}

impl Place {
    fn new(lab: &Lab, name: &'static str) -> anyhow::Result<Self> {
        let directory = lab.scratch().join(name);
        std::fs::create_dir(&directory)?;
        Ok(Self { name, directory })
    }

    fn at(&self, what: &str) -> PathBuf {
        self.directory.join(what)
    }

    fn uri(&self, image: &str) -> String {
        format!("nbd+unix:///{image}?socket={}", self.at("socket").display())
    }

    /// A command on a machine of this name, which belongs to a host of the bed.
    fn command(&self, lab: &Lab, host: &Host, words: &[String]) -> Command {
        let mut command = host.command(Path::new("unshare"));
        command.args(["--uts", "sh", "-c", "hostname \"$0\" && exec \"$@\"", self.name]).arg(&lab.headwater);
        command.args(["--log-format=json"]).args(words);
        command.arg("--listen=0.0.0.0:10809").arg(format!("--unix={}", self.at("socket").display()));
        command.arg(format!("--admin={}", self.at("admin").display()));
        command
    }

    fn start(&self, lab: &Lab, host: &Host, words: &[String]) -> anyhow::Result<Guard> {
        let log = self.at("log");
        let mut server = Guard::spawn(self.command(lab, host, words), &log)?;
        wait_for_line(&mut server, &log, |line| line.starts_with("nbd"))?;
        Ok(server)
    }

    fn order(&self, lab: &Lab, words: &[&str]) -> anyhow::Result<String> {
        output(Command::new(&lab.headwater).args(words).arg("--at").arg(self.at("admin")))
    }
}

/// What a group of machines reads.
struct Reads {
    uri: String,
    connections: u32,
    rate: u32,
    size: &'static str,
    region: &'static str,
}

impl Reads {
    fn start(&self, lab: &Lab, number: usize, time: Duration) -> anyhow::Result<Guard> {
        let mut command = children::command(Cpus::Free, beside("load")?);
        command.arg(&self.uri).args(["--size", self.size, "--region", self.region, "--depth=16"]);
        command.arg(format!("--connections={}", self.connections)).arg(format!("--rate={}", self.rate));
        command.arg(format!("--time={}s", time.as_secs())).arg(format!("--seed={number}"));
        Guard::spawn(command, &lab.scratch().join(format!("load-{number}.log")))
    }
}

pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<()> {
    let bed = lab.bed(4)?;
    tell("making the images");
    let mut words = vec!["serve".to_owned(), "--read-only".to_owned()];
    for (name, mib) in IMAGES {
        let path = image::named(lab, name, mib << 20)?;
        output(Command::new(&lab.headwater).arg("index").arg(&path))?;
        words.push(format!("{name}={}", path.display()));
    }
    let [origin, site, one, two, three] =
        ["origin", "site", "host-1", "host-2", "host-3"].map(|name| Place::new(lab, name));
    let (origin, site, hosts) = (origin?, site?, [one?, two?, three?]);
    let _origin = origin.start(lab, &bed.origin, &words)?;
    let mut words = mirror(&site, &IMAGES.map(|(name, _)| name), bed.origin.address.to_string());
    let neighbours: Vec<_> =
        [&origin].into_iter().chain(&hosts).map(|place| place.at("admin").display().to_string()).collect();
    words.push(format!("--neighbours={}", neighbours.join(",")));
    let _site = site.start(lab, &bed.mirrors[0], &words)?;
    let site_address = bed.mirrors[0].address.to_string();
    let mut servers = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let images: &[&str] = if index == 1 { &["debian12", "windows11"] } else { &["debian12"] };
        servers.push(host.start(lab, &bed.mirrors[index + 1], &mirror(host, images, site_address.clone()))?);
    }
    let browser = Browser::start(lab.scratch())?;
    let port = forward(site.at("admin"))?;
    browser.look_like(1280, 1000, "light")?;
    browser.open(&format!("http://localhost:{port}/"))?;

    tell("machines read");
    let time = options.time + PATIENCE * 4;
    let loads = [
        Reads { uri: hosts[0].uri("debian12"), connections: 6, rate: 1800, size: "16K", region: "0+300M" },
        Reads { uri: hosts[1].uri("debian12"), connections: 4, rate: 500, size: "32K", region: "0+220M" },
        Reads { uri: hosts[1].uri("windows11"), connections: 2, rate: 120, size: "64K", region: "0+640M" },
        Reads { uri: hosts[2].uri("debian12"), connections: 3, rate: 260, size: "16K", region: "100M+250M" },
        Reads { uri: site.uri("windows11"), connections: 2, rate: 150, size: "32K", region: "64M+512M" },
    ];
    site.order(lab, &["pin", "debian12", "--range", "..64M"])?;
    let mut running = Vec::new();
    for (number, reads) in loads.iter().enumerate() {
        running.push(reads.start(lab, number + 1, time)?);
        wait(lab, options.time / 8)?;
    }
    site.order(lab, &["prefetch", "windows11", "--range", "900M..", "--rate", "1M"])?;
    wait(lab, options.time.saturating_sub(options.time / 8 * 5))?;
    wait_for(&browser, "return document.querySelectorAll('#links tbody tr').length >= 6")?;
    for (name, width, scheme, end) in
        [("", 1280, "light", "images"), ("-dark", 1280, "dark", "images"), ("-narrow", 400, "light", "latency")]
    {
        shoot(&browser, &behind(&options.to, name)?, width, scheme, end)?;
    }
    ensure!(
        running.iter_mut().all(|load| load.ended().is_ok_and(|end| end.is_none())),
        "a load has ended before its time"
    );
    Ok(())
}

/// The words for a mirror of images that another machine has.
fn mirror(place: &Place, images: &[&str], from: String) -> Vec<String> {
    let mut words = vec!["mirror".to_owned()];
    words.extend(images.iter().map(|image| format!("{image}=nbd://{from}/{image}")));
    words.push(format!("--cache={}", place.at("cache").display()));
    words
}

fn wait(lab: &Lab, time: Duration) -> anyhow::Result<()> {
    let end = clock::now() + time;
    while clock::now() < end {
        lab.go_on()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn wait_for(browser: &Browser, script: &str) -> anyhow::Result<()> {
    let deadline = clock::now() + PATIENCE;
    while browser.script(script)? != Value::Bool(true) {
        ensure!(clock::now() < deadline, "the page has not what is waited for: {script}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Takes a picture of the page from its top to the end of a part of it.
fn shoot(browser: &Browser, to: &Path, width: u32, scheme: &str, end: &str) -> anyhow::Result<()> {
    let script = format!(
        "return Math.ceil(document.getElementById('{end}').closest('section').getBoundingClientRect().bottom + scrollY) + 16"
    );
    browser.look_like(width, 1000, scheme)?;
    std::thread::sleep(STEADY);
    let height = browser.script(&script)?.as_u64().context("a height is a number")?;
    browser.look_like(width, height, scheme)?;
    std::thread::sleep(STEADY);
    std::fs::write(to, from_base64(&browser.picture()?)).with_context(|| to.display().to_string())?;
    tell(&format!("{}: {width} x {height}", to.display()));
    Ok(())
}

/// A path with something put behind its name.
fn behind(path: &Path, what: &str) -> anyhow::Result<PathBuf> {
    let name = path.file_stem().context("--to names a file")?.to_string_lossy();
    Ok(path.with_file_name(format!("{name}{what}.png")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_picture_has_a_name_of_its_own() {
        let path = |what| behind(Path::new("docs/page.png"), what).unwrap();
        assert_eq!((path(""), path("-dark")), ("docs/page.png".into(), "docs/page-dark.png".into()));
    }
}
