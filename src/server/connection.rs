//! One connection from its first byte to its last.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use thiserror::Error;

use super::answered::Ledger;
use super::clients::{Counts, Entry, Newcomer};
use super::directory::flags as transmission_flags;
use super::directory::{Exports, Offered};
use super::figures::Parting;
use super::frozen::{Agreed, Blob, Frozen};
use super::limits::ConnectionBudget;
use super::notices::Ears;
use super::requests::Session;
use super::seat::Seat;
use super::stage::{Negotiating, Stage, Stages};
use super::steering::Steering;
use super::transmission::{End, Left, Rest, Transmission};
use super::{Protection, Shared};
use crate::clock;
use crate::export::{Client, NodeId, SharedExport, TlsPeer, Visitor, split_content_name};
use crate::nbd::handshake::server::{Id, Negotiated, Progress, ServerHandshake, TlsPolicy, Violation, context_id};
use crate::nbd::request::Rules;
use crate::nbd::wire::{MAX_PAYLOAD_BYTES, MAX_PAYLOAD_UNTOLD, TransmissionFlags};
use crate::net::{Dismantled, SecureError, Stream, inode};
use crate::telemetry::seldom;

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
    #[error("too many negotiate at a time, and it is the one that has for the longest")]
    Crowded,
    #[error("the client broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error(transparent)]
    Secure(#[from] SecureError),
    #[error("the connection was lost: {0}")]
    Lost(#[from] std::io::Error),
}

/// Why a successor cannot go on with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Homeless {
    /// It does not serve the image.
    #[error("there is no such export here")]
    NoExport,
    /// Other bytes under the same name.
    #[error("the export has another content now")]
    OtherContent,
    /// The client was promised more than there is.
    #[error("the export can do less than the client was promised")]
    LessCapable,
    /// What it wrote is elsewhere.
    #[error("what it writes goes to another server, to which only its own one knows the way")]
    Relayed,
    /// The rules have changed.
    #[error("it may not have the export any more")]
    Denied,
}

/// Serves one client, who is among those that negotiate until it has.
pub(super) async fn serve(
    mut stream: Stream,
    peer: String,
    mut visitor: Visitor,
    negotiating: Negotiating,
    shared: &Shared,
) {
    let mut input = BytesMut::new();
    let limit = shared.settings.handshake_timeout;
    let mut stages = shared.stages.clone();
    let is_over = |stage: &Stage| matches!(stage, Stage::Freezing | Stage::Draining);
    let guest = shared.lobby.enter(clock::now());
    let negotiated = tokio::select! {
        // What has arrived is answered first.
        biased;
        negotiated = tokio::time::timeout(limit, negotiate(&mut stream, &mut input, &mut visitor, shared)) => {
            negotiated.unwrap_or(Err(Failure::TimedOut))
        }
        // It fails only when the server is gone, which is the same to us.
        _ = stages.wait_for(is_over) => Err(Failure::Draining),
        () = guest.dismissed() => Err(Failure::Crowded),
    };
    drop(guest);
    let chosen = match negotiated {
        Ok(chosen) => chosen,
        // Port scanners and monitors do this all day.
        Err(reason) => {
            shared.steering.figures.connections().note_ended(Parting::NotNegotiated);
            if matches!(reason, Failure::Violation(_) | Failure::Crowded) {
                seldom!(info, peer, %reason, "a connection was refused");
            } else {
                tracing::debug!(peer, %reason, "no client");
            }
            return;
        }
    };
    let export = chosen.listing.name.clone();
    let (mirror, connection, is_relay) = (chosen.mirror.map(NodeId), chosen.connection, chosen.is_relay);
    let is_mirror = chosen.is_mirror;
    let newcomer = Newcomer { peer: peer.clone(), export: export.clone(), mirror, connection, is_relay, visitor };
    let entry = shared.steering.clients.enter(newcomer);
    // The rules may have changed since it was let in, and whoever changed them has not seen it then.
    if let Err(reason) = shared.steering.access.judge(&export, &entry.client().visitor) {
        shared.steering.figures.connections().note_ended(Parting::NotNegotiated);
        seldom!(info, peer, export, %reason, "a client was let in by rules that have changed");
        return;
    }
    let session = Rc::new(session(*chosen, &entry, &shared.steering));
    seldom!(info, peer, export, replies = ?session.rules.mode, "client connected");
    let (budget, stages) = (ConnectionBudget::new(Arc::clone(&shared.budget)), Stages::of(shared.stages.clone()));
    let place = shared.muster.serves();
    drop(negotiating);
    let transmission = Transmission::new(stream, Rc::clone(&session), budget, input, stages, place);
    let client = Known { peer, is_mirror, is_relay, connection };
    transmit(transmission, &session, entry, client, shared).await;
}

/// What is known of a client, beside its place in the table.
struct Known {
    peer: String,
    is_mirror: bool,
    is_relay: bool,
    connection: Option<Id>,
}

/// Serves a client from the end of its negotiation on.
async fn transmit(transmission: Transmission, session: &Session, entry: Entry, client: Known, shared: &Shared) {
    let Left { stream, end, rest } = transmission.run().await;
    if let (End::Frozen, Some(rest)) = (&end, rest) {
        // There is room for all. Nobody takes it if the server has given up waiting.
        let _ = shared.frozen.try_send(freeze(stream, session, &client, &entry, rest));
        return;
    }
    let Counts { requests, read_bytes, written_bytes, errors, .. } = &**entry.counts();
    seldom!(
        info,
        peer = client.peer,
        export = entry.client().export,
        requests = requests.get(),
        read_bytes = read_bytes.get(),
        written_bytes = written_bytes.get(),
        errors = errors.get(),
        seconds = entry.client().connected().as_secs_f64(),
        reason = %end,
        "client left"
    );
    shared.steering.figures.connections().note_ended(parting(&end));
    drop(entry);
    match end {
        End::Drained | End::Dismissed => part_from(&stream).await,
        End::Disconnected | End::Closed => stream.end_tls(),
        // What was sent last is not all.
        End::Violation(_) | End::Broken | End::Lost(_) | End::Frozen => {}
    }
}

/// A frozen connection, and the socket that goes with it.
fn freeze(stream: Stream, session: &Session, client: &Known, entry: &Entry, rest: Rest) -> (OwnedFd, Frozen) {
    let Dismantled { socket, tls: saved, .. } = stream.dismantle();
    let own = session.seat.own();
    let frozen = Frozen {
        socket: inode(&socket),
        peer: client.peer.clone(),
        visitor: entry.client().visitor.clone(),
        tls: saved,
        export: entry.client().export.clone(),
        identity: own.facts().identity.map(|identity| identity.to_string()),
        file: own.file_id(),
        is_mirror: client.is_mirror,
        mirror: entry.client().mirror.map(|mirror| mirror.to_string()),
        connection: client.connection.map(|id| NodeId(id).to_string()),
        is_relay: client.is_relay,
        relayed_to: entry.client().relayed_to(),
        agreed: Agreed::of(&session.rules, &session.contexts),
        done: entry.client().done(entry.id()),
        input: Blob(rest.input),
        output: Blob(rest.output),
        held: Blob(rest.held),
        payload: rest.payload,
        asks: rest.asks,
    };
    (socket, frozen)
}

/// Whether a successor with this registry could go on with a frozen connection, and with which export.
pub(super) fn home_of(frozen: &Frozen, shared: &Shared) -> Result<SharedExport, Homeless> {
    let wanted = match &frozen.identity {
        // The name may stand for another content by now.
        Some(identity) => format!("{}@{identity}", split_content_name(&frozen.export).0),
        None => frozen.export.clone(),
    };
    let found = shared.registry.find(&wanted).or_else(|| shared.registry.find(&frozen.export));
    let (_, export) = found.ok_or(Homeless::NoExport)?;
    let (facts, size) = (export.facts(), frozen.agreed.size);
    let is_another =
        facts.identity.is_some_and(|identity| frozen.identity.as_ref().is_some_and(|old| *old != identity.to_string()));
    let is_other_file = frozen.file.zip(export.file_id()).is_some_and(|(old, new)| old != new);
    if facts.size != size || is_another || is_other_file {
        return Err(Homeless::OtherContent);
    }
    let promised = frozen.agreed.flags() - TransmissionFlags::SEND_DF;
    if !transmission_flags(&facts).union(TransmissionFlags::READ_ONLY).contains(promised) {
        return Err(Homeless::LessCapable);
    }
    if frozen.relayed_to.is_some() && !frozen.agreed.flags().contains(TransmissionFlags::READ_ONLY) {
        return Err(Homeless::Relayed);
    }
    if shared.steering.access.judge(&frozen.export, &frozen.visitor).is_err() {
        return Err(Homeless::Denied);
    }
    Ok(export)
}

/// Goes on with a connection of the predecessor.
pub(super) async fn resume(stream: Stream, frozen: Frozen, export: SharedExport, shared: &Shared) {
    let newcomer = Newcomer {
        peer: frozen.peer.clone(),
        export: frozen.export.clone(),
        mirror: frozen.mirror.as_ref().and_then(|mirror| mirror.parse().ok()),
        connection: frozen.connection.as_ref().and_then(|id| Some(id.parse::<NodeId>().ok()?.0)),
        is_relay: frozen.is_relay,
        visitor: frozen.visitor.clone(),
    };
    let client = Known {
        peer: frozen.peer.clone(),
        is_mirror: frozen.is_mirror,
        is_relay: frozen.is_relay,
        connection: newcomer.connection,
    };
    let entry = shared.steering.clients.enter_again(newcomer, &frozen.done);
    let export = export.connect(Client { is_mirror: frozen.is_mirror }).unwrap_or(export);
    let terms = Terms { rules: frozen.agreed.rules(), contexts: frozen.agreed.contexts(), export };
    let session = Rc::new(terms.session(&entry, &shared.steering));
    let (budget, stages) = (ConnectionBudget::new(Arc::clone(&shared.budget)), Stages::of(shared.stages.clone()));
    let (place, input) = (shared.muster.serves(), BytesMut::from(&*frozen.input.0));
    let mut transmission = Transmission::new(stream, Rc::clone(&session), budget, input, stages, place);
    if transmission.resume(&frozen).is_none() {
        return tracing::error!(peer = client.peer, "the predecessor's account of a client makes no sense: closing it");
    }
    transmit(transmission, &session, entry, client, shared).await;
}

const fn parting(end: &End) -> Parting {
    match end {
        End::Disconnected => Parting::Disconnected,
        End::Closed => Parting::Closed,
        End::Drained | End::Dismissed => Parting::Drained,
        End::Violation(_) => Parting::Violation,
        End::Broken => Parting::Broken,
        End::Lost(_) | End::Frozen => Parting::Lost,
    }
}

fn session(chosen: Negotiated<(SharedExport, Vec<Offered>)>, entry: &Entry, steering: &Steering) -> Session {
    let Negotiated { export: (export, offered), listing, replies, contexts, knows_block_sizes, is_mirror, .. } = chosen;
    let export = export.connect(Client { is_mirror }).unwrap_or(export);
    let contexts: Vec<_> = contexts.into_iter().map(|position| (context_id(position), offered[position])).collect();
    let rules = Rules {
        size: listing.size,
        flags: listing.flags,
        minimum_block: listing.block_sizes.minimum,
        maximum_payload: if knows_block_sizes { MAX_PAYLOAD_BYTES } else { MAX_PAYLOAD_UNTOLD },
        mode: replies,
        has_contexts: !contexts.is_empty(),
    };
    Terms { rules, contexts, export }.session(entry, steering)
}

/// What a connection was promised, and by which export.
struct Terms {
    rules: Rules,
    contexts: Vec<(u32, Offered)>,
    export: SharedExport,
}

impl Terms {
    fn session(self, entry: &Entry, steering: &Steering) -> Session {
        let Self { rules, contexts, export } = self;
        let told = contexts.iter().filter_map(|(_, context)| match context {
            Offered::Export(context) => Some(*context),
            Offered::Notice => None,
        });
        let is_read_only = rules.flags.contains(TransmissionFlags::READ_ONLY);
        let (client, counts) = (entry.client(), Arc::clone(entry.counts()));
        Session {
            seat: Seat::new(export, told.collect(), is_read_only, Arc::clone(&counts)),
            rules,
            has_notice: contexts.iter().any(|(_, context)| *context == Offered::Notice),
            contexts,
            ledger: Ledger::new(steering.figures.of(&client.export), Arc::clone(&counts)),
            ears: Ears::new(steering.notices.clone(), client.export.clone(), client.mirror),
            outbox: Rc::default(),
            executing: Cell::new(0),
            is_broken: Cell::new(false),
            client: Arc::clone(client),
            counts,
            running: RefCell::default(),
        }
    }
}

async fn negotiate(
    stream: &mut Stream,
    input: &mut BytesMut,
    visitor: &mut Visitor,
    shared: &Shared,
) -> Result<Chosen, Failure> {
    let mut output = BytesMut::new();
    let Shared { registry, steering, stages, settings, .. } = shared;
    let policy = match &settings.protection {
        None => TlsPolicy::Off,
        Some(Protection { is_required: false, .. }) => TlsPolicy::Allow,
        Some(_) => TlsPolicy::Require,
    };
    let mut handshake = ServerHandshake::new(&mut output).with_tls(policy);
    loop {
        let draining = *stages.borrow() == Stage::Draining;
        let exports = Exports { registry, steering, draining, visitor: &*visitor };
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
