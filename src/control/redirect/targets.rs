//! Asking other servers what they have, and making relays over them.
//!
//! All of it runs on a worker, which the connections belong to.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use super::compare::{Fit, Ours, Theirs, Wanted, compare};
use super::file::MOST_URIS;
use super::relay::{PATIENCE, Relay, SILENCE};
use crate::control::operated::Refusal;
use crate::export::{Export, Facts, SharedExport};
use crate::nbd::Uri;
use crate::nbd::wire::TransmissionFlags;
use crate::ranges::ByteRange;
use crate::upstream::{self, Expectation, OpenFailure, Remote};

/// How long a server may take to say what it has.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a probe of an export of ours may take.
const PROBE: Duration = Duration::from_secs(1);
/// Bytes of each probe.
const PROBE_BYTES: u64 = 4096;

/// Servers that can take the clients of an export.
#[derive(Debug, Clone)]
pub(super) struct Targets {
    pub(super) uris: Vec<Uri>,
    /// They are this server itself: relayed clients come back.
    pub(super) is_here: bool,
    pub(super) warnings: Vec<String>,
    /// The mirrors that the bytes of these servers pass through: they are never sent there.
    pub(super) path: Vec<crate::export::NodeId>,
    /// Whether all of them take hints about what will be read.
    pub(super) takes_hints: bool,
}

/// Reads URIs as they were sent.
pub(super) fn parse(to: &[String]) -> Result<Vec<Uri>, Refusal> {
    if to.len() > MOST_URIS {
        return Err(Refusal::Invalid(format!("an order names {MOST_URIS} servers at most")));
    }
    let parse = |text: &String| text.parse::<Uri>().map_err(|error| Refusal::Invalid(format!("{text}: {error}")));
    to.iter().map(parse).collect()
}

/// Asks all servers, and holds them against our export. Each that answers must fit; one that does not answer is only
/// warned of as long as another one does.
pub(super) async fn survey(
    uris: Vec<Uri>,
    ours: &Ours,
    wanted: Wanted,
    has_our_name: impl Fn(&Uri) -> bool,
) -> Result<Targets, Refusal> {
    let asked = join_all(uris.iter().map(async |uri| (uri, ask(uri).await))).await;
    let mut targets =
        Targets { uris: uris.clone(), is_here: false, warnings: Vec::new(), path: Vec::new(), takes_hints: true };
    let (mut found, mut here) = (0, 0);
    for (uri, answer) in asked {
        let (flags, block_sizes, facts) = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                targets.warnings.push(format!("{uri}: {failure}"));
                continue;
            }
        };
        let path = facts.path.clone();
        let theirs = Theirs { uri: uri.clone(), flags, block_sizes, facts, has_our_name: has_our_name(uri) };
        found += 1;
        match compare(ours, &theirs, wanted)? {
            Fit::Here => here += 1,
            Fit::Elsewhere(warnings) => targets.warnings.extend(warnings),
        }
        targets.path.extend(path);
        targets.takes_hints &= flags.contains(TransmissionFlags::SEND_CACHE);
    }
    if found == 0 {
        return Err(Refusal::Conflict(targets.warnings.join("; ")));
    }
    if here > 0 && (here < found || uris.len() > 1) {
        return Err(Refusal::Conflict(
            "one of the servers is this very server: to move clients back, name it alone".into(),
        ));
    }
    targets.is_here = here > 0;
    Ok(targets)
}

type Said = (TransmissionFlags, crate::nbd::BlockSizes, Facts);

async fn ask(uri: &Uri) -> Result<Said, String> {
    let agreed = upstream::inspect(uri, LIMIT).await.map_err(|failure: OpenFailure| failure.to_string())?;
    let settings = upstream::Settings {
        connections: 1,
        connect_timeout: LIMIT,
        stall_timeout: LIMIT,
        patience: LIMIT,
        ..upstream::Settings::default()
    };
    let opened = Remote::open(vec![uri.clone()], Expectation::default(), settings).await;
    let remote = opened.map_err(|error| error.failures.first().map_or_else(String::new, |(_, why)| why.to_string()))?;
    Ok((agreed.flags, agreed.block_sizes, remote.facts()))
}

/// A relay to these servers, connected to the first that can be used.
pub(super) async fn open_relay(targets: &Targets, old: &SharedExport) -> Result<Arc<Relay>, String> {
    let facts = old.facts();
    let expectation = Expectation { size: Some(facts.size), identity: facts.identity, ..Expectation::default() };
    let defaults = upstream::Settings { role: upstream::Role::Relay, ..upstream::Settings::default() };
    let settings = if facts.writable {
        upstream::Settings { patience: PATIENCE, ..defaults }
    } else if targets.uris.len() > 1 {
        // The next server must have its turn before the relay goes back.
        upstream::Settings {
            connect_timeout: SILENCE / 2,
            stall_timeout: SILENCE / 2,
            patience: SILENCE * 5,
            ..defaults
        }
    } else {
        upstream::Settings { connect_timeout: SILENCE, patience: SILENCE * 5, ..defaults }
    };
    let remote = Remote::open(targets.uris.clone(), expectation, settings).await.map_err(|error| error.to_string())?;
    Ok(Arc::new(Relay::new(Arc::new(remote), Arc::clone(old), targets.takes_hints)))
}

/// Whether an export of ours can be read: its beginning, its middle and its end are tried.
pub(super) async fn can_serve(export: &SharedExport) -> bool {
    let size = export.facts().size;
    let length = PROBE_BYTES.min(size);
    let starts = [0, (size - length) / 2 / PROBE_BYTES * PROBE_BYTES, size - length];
    let probes = starts.map(|start| export.read(ByteRange::between(start, start + length)));
    tokio::time::timeout(PROBE, join_all(probes)).await.is_ok_and(|results| results.iter().all(Result::is_ok))
}
