//! A recorded boot over a cold mirror.
//!
//! A first mirror, with an empty cache and no profile, is booted from once; it learns the profile. Then mirrors with empty
//! caches take turns: one that fetches what it is asked for, one that fills ahead and has the profile. Beside the stall
//! stands what was fetched: what the first fetches is what the boot needs, so whatever the other fetches on top of it was
//! in vain, whatever the mirror says itself.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use replay::trace::Trace;
use serde_json::{Value, json};

use crate::bed::{Bed, Host};
use crate::servers::{IMAGE, Mirror, Origin, demand_only, fetched, idle, knows, replay};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image, tell};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The recorded boot, as replay reads it.
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// The image. [default: one with random bytes wherever the trace reads]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Whether a late read delays those after it.
    #[arg(long, value_enum, default_value = "think")]
    pace: Paced,
    /// How a new mirror comes by the profile.
    #[arg(long, value_enum, default_value = "upstream")]
    profile: Travel,
    /// Also a mirror that fills ahead and has no profile.
    #[arg(long)]
    readahead: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Paced {
    /// As for a machine that waits: its next read comes as long after the answer as in the recording.
    Think,
    /// By the clock of the recording, whatever was late.
    Clock,
}

impl Paced {
    const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Think => &["--pace=1", "--think"],
            Self::Clock => &["--pace=1", "--depth=16"],
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Travel {
    /// The first mirror hands it to the origin, the next one takes it from there.
    Upstream,
    /// `headwater profile export` and `import`.
    File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Demand,
    Readahead,
    Profile,
}

impl Variant {
    const fn name(self) -> &'static str {
        match self {
            Self::Demand => "cold, on demand",
            Self::Readahead => "cold, readahead without a profile",
            Self::Profile => "cold, with the profile",
        }
    }
}

/// What one boot came to.
struct Boot {
    stall: f64,
    sum: f64,
    slow: f64,
    fetched: f64,
    /// Bytes fetched ahead that nobody read, by the mirror's own account.
    idle: f64,
    detail: Value,
}

/// What all boots share.
struct Scene<'a> {
    lab: &'a Lab,
    bed: &'a Bed,
    origin: &'a Origin,
    options: &'a Options,
    image: &'a Path,
    profile: PathBuf,
}

impl Scene<'_> {
    fn host(&self) -> &Host {
        &self.bed.mirrors[0]
    }

    fn profile(&self) -> anyhow::Result<&str> {
        self.profile.to_str().context("the scratch directory has a plain name")
    }

    fn replay(&self, mirror: &Mirror, name: &str) -> anyhow::Result<Boot> {
        let done = replay(&self.options.trace, self.image, &mirror.uri(), self.options.pace.words())?;
        let status = mirror.status()?;
        let stall = done.stall;
        Ok(Boot {
            stall: stall.seconds,
            sum: stall.sum_seconds,
            // At most some thousands.
            slow: f64::from(u32::try_from(stall.slow_reads).unwrap_or(u32::MAX)),
            fetched: fetched(&status),
            idle: idle(&status),
            detail: json!({ "variant": name, "stall": stall, "mirror": status }),
        })
    }

    /// The boot that the profile is learnt from, and then one of a mirror that has everything.
    fn learn(&self) -> anyhow::Result<(Boot, Boot)> {
        let mirror = Mirror::start(self.lab, self.host(), &self.origin.uri, &[])?;
        let first = self.replay(&mirror, "first")?;
        let resident = self.replay(&mirror, "resident")?;
        if knows(self.lab, "--fill")? && self.options.profile == Travel::File {
            mirror.order(&["profile", "export", IMAGE, "-o", self.profile()?])?;
        }
        mirror.stop()?;
        if knows(self.lab, "--fill")? && self.options.profile == Travel::Upstream {
            self.origin.wait_for_profile()?;
        }
        Ok((first, resident))
    }

    fn boot(&self, variant: Variant) -> anyhow::Result<Boot> {
        let words = match variant {
            Variant::Demand => demand_only(self.lab)?,
            // It may not take the profile from above, and has none of its own.
            Variant::Readahead => vec!["--profile-window=0"],
            Variant::Profile => Vec::new(),
        };
        let mirror = Mirror::start(self.lab, self.host(), &self.origin.uri, &words)?;
        if variant == Variant::Profile && self.options.profile == Travel::File {
            mirror.order(&["profile", "import", IMAGE, self.profile()?])?;
        }
        self.replay(&mirror, variant.name())
    }
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let text = std::fs::read_to_string(&options.trace).with_context(|| options.trace.display().to_string())?;
    let trace = Trace::parse(&text).with_context(|| options.trace.display().to_string())?;
    ensure!(!trace.reads.is_empty(), "the trace has no reads");
    let image = options.image.clone().map_or_else(|| image::for_trace(lab, &trace), Ok)?;
    image::index(lab, &image)?;
    let bed = lab.bed(1)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let profile = lab.scratch().join("profile");
    let scene = Scene { lab, bed: &bed, origin: &origin, options, image: &image, profile };
    tell("the boot that the profile is learnt from");
    let (first, resident) = scene.learn()?;
    let mut variants = vec![Variant::Demand];
    if knows(lab, "--fill")? {
        variants.extend(options.readahead.then_some(Variant::Readahead));
        variants.push(Variant::Profile);
    }
    let boots = lab.in_turns(&variants, |variant| variant.name().into(), |variant| scene.boot(variant))?;
    Ok(table(&bed, options, &variants, &boots, (&first, &resident)))
}

fn table(
    bed: &Bed,
    options: &Options,
    variants: &[Variant],
    boots: &[Vec<Boot>],
    (first, resident): (&Boot, &Boot),
) -> Table {
    let all = |boots: &[Boot], value: fn(&Boot) -> f64| boots.iter().map(value).collect::<Vec<_>>();
    let demand = &boots[0];
    let row = |name: &str, boots: &[Boot], compared: bool| {
        let ratio = |value: fn(&Boot) -> f64| {
            if compared { Cell::ratio(&all(boots, value), &all(demand, value)) } else { Cell::none() }
        };
        let excess = |value: fn(&Boot) -> f64| {
            let ours = all(boots, value).into_iter();
            let excess = ours.zip(all(demand, value)).map(|(ours, needed)| (ours - needed).max(0.0) / ours * 100.0);
            if compared { Cell::of(excess.collect()) } else { Cell::none() }
        };
        let cells = vec![
            Cell::of(all(boots, |boot| boot.stall)),
            ratio(|boot| boot.stall),
            Cell::of(all(boots, |boot| boot.sum)),
            Cell::of(all(boots, |boot| boot.slow)),
            Cell::of(all(boots, |boot| boot.fetched / 1e6)),
            excess(|boot| boot.fetched),
            Cell::of(boots.iter().map(|boot| boot.idle / boot.fetched.max(1.0) * 100.0).collect()),
        ];
        Row::new(name, cells)
    };
    let mut rows = vec![row("resident", std::slice::from_ref(resident), false)];
    rows.push(row("first boot, which is learnt from", std::slice::from_ref(first), false));
    rows.extend(
        variants.iter().zip(boots).map(|(variant, boots)| row(variant.name(), boots, *variant != Variant::Demand)),
    );
    let details = [resident, first].into_iter().chain(boots.iter().flatten()).map(|boot| boot.detail.clone());
    Table {
        title: format!("{}, {}, paced by {:?}", options.trace.display(), bed.link, options.pace),
        columns: vec![
            "total stall s",
            "of on demand",
            "sum of latencies s",
            "reads over 1 ms",
            "fetched MB",
            "in vain %",
        ],
        rows,
        details: details.collect(),
        ..Table::default()
    }
}
