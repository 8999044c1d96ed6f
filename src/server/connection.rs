//! One connection from its first byte to its last.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use thiserror::Error;

use super::answered::Ledger;
use super::clients::{Counts, Entry, Newcomer};
use super::directory::{Exports, Offered};
use super::figures::Parting;
use super::limits::ConnectionBudget;
use super::notices::Ears;
use super::requests::Session;
use super::seat::Seat;
use super::steering::Steering;
use super::transmission::{End, Transmission};
use super::{Protection, Shared};
use crate::clock;
use crate::export::{Client, NodeId, SharedExport, TlsPeer, Visitor};
use crate::nbd::handshake::server::{Negotiated, Progress, ServerHandshake, TlsPolicy, Violation, context_id};
use crate::nbd::request::Rules;
use crate::nbd::wire::{MAX_PAYLOAD_BYTES, MAX_PAYLOAD_UNTOLD, TransmissionFlags};
use crate::net::{SecureError, Stream};

/// How long a client that was told of the end may take to close its side. Closing first would make TCP throw away
/// replies that it has not read yet.
const LINGER: Duration = Duration::from_secs(1);

/// What a negotiation needs to hold of its input: the longest option that is kept, with its header.
const HANDSHAKE_INPUT: usize = 4096;

type Chosen = Box<Negotiated<(SharedExport, Vec<Offered>)>>;

/// Why a connection never came to its transmission phase.
#[derive(Debug, Error)]
enum Failure {
    #[error("the client said goodbye")]
    Aborted,
    #[error("the client closed the connection")]
    Closed,
    #[error("the negotiation took too long")]
    TimedOut,
    #[error("the server is shutting down")]
    Draining,
    #[error("the client broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error(transparent)]
    Secure(#[from] SecureError),
    #[error("the connection was lost: {0}")]
    Lost(#[from] std::io::Error),
}

/// Serves one client.
pub(super) async fn serve(mut stream: Stream, peer: String, mut visitor: Visitor, shared: &Shared) {
    let mut input = BytesMut::new();
    let limit = shared.settings.handshake_timeout;
    let mut draining = shared.draining.clone();
    let drain = async move {
        // It fails only when the server is gone, which is the same to us.
        let _ = draining.wait_for(|draining| *draining).await;
    };
    let mut drain = Box::pin(drain);
    let negotiated = tokio::select! {
        // What has arrived is answered first.
        biased;
        negotiated = tokio::time::timeout(limit, negotiate(&mut stream, &mut input, &mut visitor, shared)) => {
            negotiated.unwrap_or(Err(Failure::TimedOut))
        }
        () = &mut drain => Err(Failure::Draining),
    };
    let chosen = match negotiated {
        Ok(chosen) => chosen,
        // Port scanners and monitors do this all day.
        Err(reason) => {
            shared.steering.figures.connections().note_ended(Parting::NotNegotiated);
            return tracing::debug!(peer, %reason, "no client");
        }
    };
    let export = chosen.listing.name.clone();
    let (mirror, connection, is_relay) = (chosen.mirror.map(NodeId), chosen.connection, chosen.is_relay);
    let tls = visitor.tls.map(|peer| peer.names);
    let newcomer = Newcomer { peer: peer.clone(), export: export.clone(), mirror, connection, is_relay, tls };
    let entry = shared.steering.clients.enter(newcomer);
    let session = Rc::new(session(*chosen, &entry, &shared.steering));
    tracing::info!(peer, export, replies = ?session.rules.mode, "client connected");
    let began = clock::now();
    let budget = ConnectionBudget::new(Arc::clone(&shared.budget));
    let (stream, end) = Transmission::new(stream, Rc::clone(&session), budget, input, drain).run().await;
    let Counts { requests, read_bytes, written_bytes, errors, .. } = &**entry.counts();
    tracing::info!(
        peer,
        export,
        requests = requests.get(),
        read_bytes = read_bytes.get(),
        written_bytes = written_bytes.get(),
        errors = errors.get(),
        seconds = began.elapsed().as_secs_f64(),
        reason = %end,
        "client left"
    );
    shared.steering.figures.connections().note_ended(parting(&end));
    drop(entry);
    match end {
        End::Drained | End::Dismissed => part_from(&stream).await,
        End::Disconnected | End::Closed => stream.end_tls(),
        // What was sent last is not all.
        End::Violation(_) | End::Broken | End::Lost(_) => {}
    }
}

const fn parting(end: &End) -> Parting {
    match end {
        End::Disconnected => Parting::Disconnected,
        End::Closed => Parting::Closed,
        End::Drained | End::Dismissed => Parting::Drained,
        End::Violation(_) => Parting::Violation,
        End::Broken => Parting::Broken,
        End::Lost(_) => Parting::Lost,
    }
}

fn session(chosen: Negotiated<(SharedExport, Vec<Offered>)>, entry: &Entry, steering: &Steering) -> Session {
    let Negotiated { export: (export, offered), listing, replies, contexts, knows_block_sizes, is_mirror, .. } = chosen;
    let export = export.connect(Client { is_mirror }).unwrap_or(export);
    let contexts: Vec<_> = contexts.into_iter().map(|position| (context_id(position), offered[position])).collect();
    let told = contexts.iter().filter_map(|(_, context)| match context {
        Offered::Export(context) => Some(*context),
        Offered::Notice => None,
    });
    let is_read_only = listing.flags.contains(TransmissionFlags::READ_ONLY);
    let (client, counts) = (entry.client(), Arc::clone(entry.counts()));
    Session {
        seat: Seat::new(export, told.collect(), is_read_only, Arc::clone(&counts)),
        rules: Rules {
            size: listing.size,
            flags: listing.flags,
            minimum_block: listing.block_sizes.minimum,
            maximum_payload: if knows_block_sizes { MAX_PAYLOAD_BYTES } else { MAX_PAYLOAD_UNTOLD },
            mode: replies,
            has_contexts: !contexts.is_empty(),
        },
        has_notice: contexts.iter().any(|(_, context)| *context == Offered::Notice),
        contexts,
        ledger: Ledger::new(steering.figures.of(&listing.name), Arc::clone(&counts)),
        ears: Ears::new(steering.notices.clone(), listing.name, client.mirror),
        outbox: Rc::default(),
        executing: Cell::new(0),
        is_broken: Cell::new(false),
        client: Arc::clone(client),
        counts,
    }
}

async fn negotiate(
    stream: &mut Stream,
    input: &mut BytesMut,
    visitor: &mut Visitor,
    shared: &Shared,
) -> Result<Chosen, Failure> {
    let mut output = BytesMut::new();
    let Shared { registry, steering, draining, settings, .. } = shared;
    let policy = match &settings.protection {
        None => TlsPolicy::Off,
        Some(Protection { is_required: false, .. }) => TlsPolicy::Allow,
        Some(_) => TlsPolicy::Require,
    };
    let mut handshake = ServerHandshake::new(&mut output).with_tls(policy);
    loop {
        let exports = Exports { registry, steering, draining: *draining.borrow(), visitor: &*visitor };
        let progress = handshake.advance(input, &exports, &mut output)?;
        // A client waits for the answer to STARTTLS: what is here already is from somebody else.
        if matches!(progress, Progress::StartTls) && stream.queued()? > 0 {
            return Err(Violation::BytesBeforeTls.into());
        }
        stream.write_all(&mut output).await?;
        match progress {
            Progress::Continue => {}
            Progress::Finished(negotiated) => return Ok(negotiated),
            Progress::Aborted => return Err(Failure::Aborted),
            Progress::StartTls => {
                let Some(Protection { clients, .. }) = &settings.protection else { return Err(Failure::Aborted) };
                stream.secure(clients.handshake().map_err(SecureError::from)?).await?;
                visitor.tls = stream.peer_names().map(|names| TlsPeer { names });
                handshake = handshake.secured();
            }
            Progress::NeedInput => {
                input.reserve(HANDSHAKE_INPUT);
                if stream.read_buf(input).await? == 0 {
                    return Err(Failure::Closed);
                }
            }
        }
    }
}

/// Says that nothing more will come and waits, for a short while, until the client has closed too.
async fn part_from(stream: &Stream) {
    if stream.shutdown_write().is_err() {
        return;
    }
    let rest = async {
        let mut ignored = BytesMut::with_capacity(HANDSHAKE_INPUT);
        while stream.read_buf(&mut ignored).await.is_ok_and(|received| received > 0) {
            ignored.clear();
        }
    };
    // Whether the client was quick enough is its own affair.
    let _ = tokio::time::timeout(LINGER, rest).await;
}
