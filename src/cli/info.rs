//! `headwater info`.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use tokio::runtime::{Builder, LocalOptions};

use super::args;
use super::output;
use crate::export::{Context, Export, Facts, Residency};
use crate::nbd::Uri;
use crate::nbd::handshake::ReplyMode;
use crate::nbd::handshake::client::{Agreed, Refusal};
use crate::ranges::ByteRange;
use crate::tls::set_default_certificates;
use crate::units::{ByteSize, to_u64};
use crate::upstream::{self, Expectation, OpenFailure, Remote, Settings};

pub(super) fn run(arguments: &args::Info) -> anyhow::Result<()> {
    if let Some(directory) = &arguments.tls_certificates {
        set_default_certificates(directory.clone());
    }
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let info = runtime.block_on(Info::of(&arguments.uri, arguments.timeout))?;
    if arguments.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&info)?));
    }
    output::print(&info.to_text()?)
}

/// What a server says of an export. The field names are those of the JSON.
#[derive(Debug, Serialize)]
struct Info {
    uri: String,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    size: u64,
    read_only: bool,
    flags: Vec<String>,
    block_sizes: BlockSizes,
    replies: &'static str,
    contexts: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mirror: Option<MirrorInfo>,
}

#[derive(Debug, Serialize)]
struct BlockSizes {
    minimum: u32,
    preferred: u32,
    maximum: u32,
}

/// How much of a mirror is there, in bytes.
#[derive(Debug, Default, Serialize)]
struct MirrorInfo {
    resident: u64,
    zero: u64,
    absent: u64,
    /// Mirrors that the bytes pass through.
    tiers: u64,
    /// What is resident, of what is not zero: 0 to 1.
    resident_share: f64,
}

impl Info {
    async fn of(uri: &Uri, limit: Duration) -> anyhow::Result<Self> {
        let agreed = match upstream::inspect(uri, limit).await {
            Ok(agreed) => agreed,
            Err(failure) => return Err(explain(uri, failure, limit).await),
        };
        let settings = Settings {
            connections: 1,
            connect_timeout: limit,
            stall_timeout: limit,
            patience: limit,
            ..Settings::default()
        };
        let remote = Remote::open(vec![uri.clone()], Expectation::default(), settings).await?;
        let facts = remote.facts();
        let mirror =
            if facts.contexts.contains(&Context::Residency) { Some(residency(&remote, &facts).await?) } else { None };
        Ok(Self::new(uri, agreed, &facts, mirror))
    }

    fn new(uri: &Uri, agreed: Agreed, facts: &Facts, mirror: Option<MirrorInfo>) -> Self {
        let flags = agreed.flags.iter_names().map(|(name, _)| name.trim_start_matches("SEND_").to_lowercase());
        Self {
            uri: uri.to_string(),
            name: agreed.name.unwrap_or_else(|| uri.export.clone()),
            description: agreed.description,
            size: agreed.size,
            read_only: agreed.flags.contains(crate::nbd::wire::TransmissionFlags::READ_ONLY),
            flags: flags.map(|name| name.replace('_', "-")).collect(),
            block_sizes: BlockSizes {
                minimum: agreed.block_sizes.minimum,
                preferred: agreed.block_sizes.preferred,
                maximum: agreed.block_sizes.maximum,
            },
            replies: match agreed.replies {
                ReplyMode::Simple => "simple",
                ReplyMode::Structured => "structured",
                ReplyMode::Extended => "extended",
            },
            contexts: agreed.listed,
            image: facts.identity.map(|identity| identity.to_string()),
            mirror,
        }
    }

    fn to_text(&self) -> anyhow::Result<String> {
        let mut text = format!("{}\n", self.uri);
        let mut line = |label: &str, value: String| writeln!(text, "  {label:<12} {value}");
        line("name", self.name.clone())?;
        if let Some(description) = &self.description {
            line("description", description.clone())?;
        }
        line("size", format!("{} ({} bytes)", ByteSize(self.size), self.size))?;
        line("access", if self.read_only { "read-only" } else { "read-write" }.to_owned())?;
        line("flags", self.flags.join(", "))?;
        let size = |bytes: u32| ByteSize(u64::from(bytes));
        let BlockSizes { minimum, preferred, maximum } = self.block_sizes;
        line(
            "block sizes",
            format!("minimum {}, preferred {}, maximum {}", size(minimum), size(preferred), size(maximum)),
        )?;
        line("replies", self.replies.to_owned())?;
        line("contexts", if self.contexts.is_empty() { "none".to_owned() } else { self.contexts.join(", ") })?;
        if let Some(image) = &self.image {
            line("image", image.clone())?;
        }
        if let Some(MirrorInfo { resident, zero, absent, resident_share, tiers }) = &self.mirror {
            let data = resident + absent;
            let percent = resident_share * 100.0;
            line(
                "resident",
                format!("{} of {} ({percent:.1} %), {} zero", ByteSize(*resident), ByteSize(data), ByteSize(*zero)),
            )?;
            line("tiers", format!("{tiers} between here and the real image, this one included"))?;
        }
        Ok(text)
    }
}

/// Adds what the server does have to a refusal of what it has not.
async fn explain(uri: &Uri, failure: OpenFailure, limit: Duration) -> anyhow::Error {
    let names = match &failure {
        OpenFailure::Refused(Refusal::UnknownExport { .. }) => upstream::list(uri, limit).await.unwrap_or_default(),
        _ => Vec::new(),
    };
    let error = anyhow::Error::new(failure);
    if names.is_empty() {
        return error.context(uri.to_string());
    }
    let names: Vec<_> = names.iter().map(|(name, _)| format!("{name:?}")).collect();
    error.context(format!("{uri}: try one of {}", names.join(", ")))
}

/// Asks a mirror for the state of all of its chunks.
async fn residency(remote: &Remote, facts: &Facts) -> anyhow::Result<MirrorInfo> {
    let mut info = MirrorInfo { tiers: to_u64(facts.path.len()), ..MirrorInfo::default() };
    let mut start = 0;
    while start < facts.size {
        let rest = ByteRange::between(start, facts.size);
        let extents = remote.extents(rest, Context::Residency, usize::MAX).await;
        for extent in extents.map_err(|error| anyhow::anyhow!(error.chain())).context("cannot ask what is resident")? {
            let state = Residency::from_bits_truncate(u32::try_from(extent.status).unwrap_or(0));
            if state.contains(Residency::ZERO) {
                info.zero += extent.length;
            } else if state.contains(Residency::RESIDENT) {
                info.resident += extent.length;
            } else {
                info.absent += extent.length;
            }
            start += extent.length;
        }
    }
    let data = info.resident + info.absent;
    #[expect(clippy::cast_precision_loss, reason = "a share of more than 2^53 bytes may be off in its 16th digit")]
    let share = if data == 0 { 1.0 } else { info.resident as f64 / data as f64 };
    info.resident_share = share;
    Ok(info)
}
