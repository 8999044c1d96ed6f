//! `headwater profile`, and what other commands are told about profiles.
//!
//! Its arguments are here and not in `args`, beside what is done with them.

use std::fs;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::args::RunningServer;
use super::output;
use super::running::{block_on, find_image, reach};
use super::table::{Table, printable};
use crate::fill::profile::{self, LARGEST, Profiles, Tag, Tally, fetch_profile};
use crate::nbd::Uri;
use crate::units::ByteSize;
use crate::upstream::{Expectation, Remote, Settings};

const EXAMPLES: &str = "\
Examples:
  headwater profile show debian12
  headwater profile show nbd://first/debian12
  headwater profile export debian12 -o debian12.profile
  headwater profile import debian12 debian12.profile --at /run/headwater/4711.sock
  headwater profile forget debian12 --tag boot";

/// How long a server may take to tell its profile.
const PATIENCE: Duration = Duration::from_secs(10);

/// Show and move what is known of the reads of an image's clients.
///
/// A mirror records what clients read in their first minute (--profile-window) and learns from it what the next ones will
/// read. Mirrors take profiles from their upstream and hand it what they recorded; these commands are for looking at
/// them, and for carrying them where no server does.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Profile {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show the profiles of an image.
    Show(Show),
    /// Write the profiles of an image to a file.
    Export(Export),
    /// Put the profiles in a file in the place of those that an image has.
    Import(Import),
    /// Forget profiles of an image.
    Forget(Forget),
}

#[derive(Debug, Args)]
struct Show {
    /// The name of an image of a running server; or a file that was exported, unless there is --at; or the image on any
    /// Headwater server, as nbd://HOST[:PORT]/NAME.
    #[arg(value_name = "IMAGE|FILE|URI")]
    image: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: RunningServer,
}

#[derive(Debug, Args)]
struct Export {
    /// The name of the image, as `headwater status` has it.
    image: String,
    /// Where to write them. [default: the standard output, if it is no terminal]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    server: RunningServer,
}

#[derive(Debug, Args)]
struct Import {
    /// The name of the image, as `headwater status` has it.
    image: String,
    /// What was exported.
    file: PathBuf,
    /// Take it also if it was learnt from an image with another identity, or if that is not known: a newer build of the
    /// same image, say. The size must be the same.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    server: RunningServer,
}

#[derive(Debug, Args)]
struct Forget {
    /// The name of the image, as `headwater status` has it.
    image: String,
    /// The profile that is to be forgotten. [default: all of the image]
    #[arg(long)]
    tag: Option<Tag>,
    #[command(flatten)]
    server: RunningServer,
}

/// What mirrors are told about recording.
#[derive(Debug, Args)]
pub(super) struct Recorded {
    /// How long after it has connected what a client reads is recorded in the profile of the image; 0 for never.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = window)]
    profile_window: Duration,
    /// What the profile is called that is recorded and fetched ahead: one name for each kind of clients.
    #[arg(long, value_name = "TAG", default_value = "boot")]
    profile_tag: Tag,
}

impl From<Recorded> for profile::Settings {
    fn from(recorded: Recorded) -> Self {
        Self { window: recorded.profile_window, tag: recorded.profile_tag, ..Self::default() }
    }
}

fn window(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    let window = Duration::try_from_secs_f64(seconds).ok().filter(|window| window.as_secs() <= 60 * 60);
    window.ok_or_else(|| "at most an hour".to_owned())
}

pub(super) fn run(arguments: Profile) -> anyhow::Result<()> {
    match arguments.action {
        Action::Show(arguments) => show(arguments),
        Action::Export(arguments) => export(arguments),
        Action::Import(arguments) => import(&arguments.file, arguments.force, arguments.image, arguments.server),
        Action::Forget(arguments) => forget(arguments),
    }
}

fn show(arguments: Show) -> anyhow::Result<()> {
    let Show { image, json, server } = arguments;
    let profiles = if server.at.is_none() && image.contains("://") {
        block_on(of_uri(image.parse()?))?
    } else if server.at.is_none() && Path::new(&image).is_file() {
        of_file(Path::new(&image))?.1
    } else {
        Profiles::decode(&block_on(of_server(&image, server))?)?
    };
    let report = Report::of(&profiles);
    if json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&report)?));
    }
    output::print(&report.to_text())
}

fn export(arguments: Export) -> anyhow::Result<()> {
    let Export { image, output, server } = arguments;
    if output.is_none() {
        ensure!(!std::io::stdout().is_terminal(), "a profile is nothing to look at: give a FILE with -o, or use show");
    }
    let bytes = block_on(of_server(&image, server))?;
    match output {
        Some(path) => fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display())),
        None => output::print_bytes(&bytes),
    }
}

fn import(file: &Path, force: bool, image: String, server: RunningServer) -> anyhow::Result<()> {
    let (bytes, profiles) = of_file(file)?;
    ensure!(!profiles.is_empty(), "{}: there is no profile in it", file.display());
    block_on(async {
        let client = reach(server).await?;
        find_image(&client, &image).await?;
        let imported = client.import_profile(&image, bytes.into(), force).await;
        imported.with_context(|| format!("cannot import {}", file.display()))
    })?;
    let tags: Vec<_> = profiles.iter().map(|(tag, _)| tag.as_str()).collect();
    output::print(&format!("{}: imported {}\n", printable(&image), tags.join(", ")))
}

fn forget(arguments: Forget) -> anyhow::Result<()> {
    let Forget { image, tag, server } = arguments;
    let report = block_on(async {
        let client = reach(server).await?;
        find_image(&client, &image).await?;
        Ok(client.forget_profile(&image, tag.as_ref()).await?)
    })?;
    let what = match (tag, report.tags) {
        (_, 0) => "there was nothing to forget".to_owned(),
        (Some(tag), _) => format!("forgot {tag}"),
        (None, 1) => "forgot 1 profile".to_owned(),
        (None, count) => format!("forgot {count} profiles"),
    };
    output::print(&format!("{}: {what}\n", printable(&image)))
}

async fn of_server(image: &str, server: RunningServer) -> anyhow::Result<Vec<u8>> {
    let client = reach(server).await?;
    find_image(&client, image).await?;
    Ok(client.profile(image).await?.into())
}

async fn of_uri(uri: Uri) -> anyhow::Result<Profiles> {
    let settings = Settings { connections: 1, patience: PATIENCE, ..Settings::default() };
    let remote = Remote::open(vec![uri.clone()], Expectation::default(), settings).await?;
    match fetch_profile(&remote).await {
        Some(profiles) => Ok(profiles),
        None => bail!("{uri} has no profile yet, or is no Headwater server that keeps some"),
    }
}

/// The bytes of a file, and what they mean.
fn of_file(path: &Path) -> anyhow::Result<(Vec<u8>, Profiles)> {
    let told = || path.display().to_string();
    let mut bytes = Vec::new();
    fs::File::open(path).with_context(told)?.take(LARGEST + 1).read_to_end(&mut bytes).with_context(told)?;
    let profiles = Profiles::decode(&bytes).with_context(told)?;
    Ok((bytes, profiles))
}

/// Profiles in figures. The field names are those of the JSON.
#[derive(Debug, Serialize)]
struct Report {
    image_size: u64,
    identity: Option<String>,
    tags: Vec<TagReport>,
}

#[derive(Debug, Serialize)]
struct TagReport {
    tag: String,
    runs: u32,
    spans: u64,
    /// With a weight of 3/4 and more.
    sure_bytes: u64,
    /// From 1/2 to 3/4.
    likely_bytes: u64,
    /// Under 1/2: not fetched.
    unlikely_bytes: u64,
    /// The last first touch of what is fetched.
    last_ms: u32,
}

impl Report {
    fn of(profiles: &Profiles) -> Self {
        let of_tag = |(tag, profile): (&Tag, &std::sync::Arc<profile::Profile>)| {
            let Tally { runs, spans, sure_bytes, likely_bytes, unlikely_bytes, last_ms } = profile.tally();
            TagReport { tag: tag.to_string(), runs, spans, sure_bytes, likely_bytes, unlikely_bytes, last_ms }
        };
        Self {
            image_size: profiles.image_size(),
            identity: profiles.identity().map(|identity| identity.to_string()),
            tags: profiles.iter().map(of_tag).collect(),
        }
    }

    fn to_text(&self) -> String {
        let identity = self.identity.as_deref().unwrap_or("of unknown identity");
        let mut table = Table::new(&["TAG", ">RUNS", ">SURE", ">LIKELY", ">UNLIKELY", ">WITHIN"]);
        for tag in &self.tags {
            let size = |bytes| ByteSize(bytes).to_string();
            let seconds = format!("{:.1} s", f64::from(tag.last_ms) / 1000.0);
            let [sure, likely, unlikely] = [tag.sure_bytes, tag.likely_bytes, tag.unlikely_bytes].map(size);
            table.row(vec![tag.tag.clone(), tag.runs.to_string(), sure, likely, unlikely, seconds]);
        }
        format!("image of {}, {identity}\n{table}", ByteSize(self.image_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_may_be_nothing_but_not_endless() {
        assert_eq!(window("0"), Ok(Duration::ZERO));
        assert_eq!(window("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["-1", "x", "NaN", "3601", "inf"] {
            assert!(window(text).is_err(), "{text}");
        }
    }

    #[test]
    fn figures_are_a_table() {
        let tag = TagReport {
            tag: "boot".into(),
            runs: 2,
            spans: 9,
            sure_bytes: 3 << 20,
            likely_bytes: 0,
            unlikely_bytes: 4096,
            last_ms: 12_340,
        };
        let report = Report { image_size: 2 << 30, identity: None, tags: vec![tag] };
        let text = "image of 2G, of unknown identity\n  TAG   RUNS  SURE  LIKELY  UNLIKELY  WITHIN\n  boot     2    3M       0        4K  12.3 s\n";
        assert_eq!(report.to_text(), text);
    }
}
