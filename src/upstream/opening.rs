//! Opening a connection: what we ask of a server, what it says of its export, and why it cannot be used.
//!
//! Owns: the negotiation over a socket, and the words by which we introduce ourselves. Does not own: its rules (`nbd`),
//! what is done with a connection that is open (`connection`), what a server must be (`expectation`).

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use thiserror::Error;

use super::Role;
use crate::export::facts::NAMESPACE;
use crate::export::{Context, Facts, ImageId};
use crate::nbd::handshake::ReplyMode;
use crate::nbd::handshake::client::{Agreed, Ask, ClientHandshake, Outcome, Refusal};
use crate::nbd::uri::Security;
use crate::nbd::wire::{MIRROR, MIRROR_NODE, NOTICE, RELAY, TransmissionFlags, command};
use crate::nbd::{Uri, request};
use crate::net::{SecureError, Stream, connect};
use crate::tls::{CertificateError, ClientIdentity, Handshake, default_certificates};

/// Input is taken in pieces of this size.
const INPUT: usize = 64 << 10;

/// The contexts that we ask for, in the order of their [`position`].
pub(super) const CONTEXTS: [Context; 2] = [Context::Allocation, Context::Residency];

/// The number that stands for a context in answers, whatever its id on the wire.
pub(super) fn position(context: Context) -> u32 {
    match context {
        Context::Allocation => 0,
        Context::Residency => 1,
    }
}

/// Why a server cannot be used.
#[derive(Debug, Error)]
pub enum OpenFailure {
    /// It cannot be reached, or was lost while negotiating.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// It took too long.
    #[error("no answer in time")]
    TimedOut,
    /// It closed the connection while negotiating.
    #[error("it closed the connection during the negotiation")]
    Closed,
    /// It would not.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The certificates for it cannot be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// It is named by `nbds://`, and there are no certificates to know it by.
    #[error(
        "TLS: no certificates to verify it with; give --tls-certificates, or tls-certificates=DIRECTORY in the URI"
    )]
    NoCertificates,
    /// The TLS handshake failed.
    #[error(transparent)]
    Secure(SecureError),
    /// Its export has another size.
    #[error("its export has {found} bytes, and this image has {expected}")]
    OtherSize {
        /// Bytes there.
        found: u64,
        /// Bytes here.
        expected: u64,
    },
    /// Its export is another image.
    #[error("its export holds {found}, and this image is {expected}")]
    OtherImage {
        /// The image there.
        found: ImageId,
        /// The image here.
        expected: ImageId,
    },
    /// Its bytes come from us.
    #[error("it gets its bytes from this very mirror: a loop")]
    Loop,
}

// By hand: the message has the reason already, and as a source it would be told twice.
impl From<io::Error> for OpenFailure {
    fn from(error: io::Error) -> Self {
        Self::Connect(error)
    }
}

impl OpenFailure {
    /// Whether the server answered, and is not what it should be.
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Connect(_) | Self::TimedOut | Self::Closed | Self::Refused(Refusal::Shutdown) => false,
            Self::Secure(error) => matches!(error, SecureError::Failed(_)),
            Self::Refused(_)
            | Self::Certificates(_)
            | Self::NoCertificates
            | Self::OtherSize { .. }
            | Self::OtherImage { .. }
            | Self::Loop => true,
        }
    }
}

/// What the agreement says of the export.
pub(super) fn facts(agreed: &Agreed) -> Facts {
    let has = |flag| agreed.flags.contains(flag);
    let writable = !has(TransmissionFlags::READ_ONLY);
    let selected = |context: &Context| agreed.contexts.iter().any(|(_, name)| name == context.name());
    let mut facts = Facts {
        writable,
        can_trim: writable && has(TransmissionFlags::SEND_TRIM),
        can_zero_fast: writable && has(TransmissionFlags::SEND_FAST_ZERO),
        is_shared: has(TransmissionFlags::CAN_MULTI_CONN),
        block_sizes: agreed.block_sizes,
        contexts: CONTEXTS.into_iter().filter(selected).collect(),
        ..Facts::read_only(agreed.size, agreed.description.clone().unwrap_or_default())
    };
    facts.learn(&agreed.listed);
    facts
}

/// Whether the server offers the context by which it tells news.
pub(super) fn tells_news(agreed: &Agreed) -> bool {
    agreed.listed.iter().any(|name| name == NOTICE)
}

/// Opens a connection and negotiates, within `limit`.
pub(super) async fn open(uri: &Uri, ask: Ask, limit: Duration) -> Result<(Stream, BytesMut, Outcome), OpenFailure> {
    let attempt = async {
        let tls = match uri.security {
            Security::Plain => None,
            Security::Tls => Some(tls_handshake(uri).await?),
        };
        let mut stream = connect(&uri.address, limit).await?;
        let mut handshake = ClientHandshake::new(ask);
        if tls.is_some() {
            handshake = handshake.with_tls();
        }
        let mut tls = tls;
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        loop {
            let outcome = handshake.advance(&mut input, &mut output);
            // Also what is said before a refusal: it may be the goodbye.
            if let Err(error) = stream.write_all(&mut output).await {
                return Err(said_before(&stream).await.unwrap_or(error).into());
            }
            match outcome? {
                Some(Outcome::StartTls) => {
                    let tls = tls.take().ok_or(OpenFailure::Closed)?;
                    stream.secure(tls).await.map_err(OpenFailure::Secure)?;
                    handshake.secured(&mut output)?;
                    continue;
                }
                Some(outcome) => return Ok((stream, input, outcome)),
                None => {}
            }
            input.reserve(INPUT);
            if stream.read_buf(&mut input).await? == 0 {
                return Err(OpenFailure::Closed);
            }
        }
    };
    tokio::time::timeout(limit, attempt).await.unwrap_or(Err(OpenFailure::TimedOut))
}

/// Why a server has hung up, if it has said so by TLS: it refuses a client's certificate when that client thinks that the
/// handshake is over.
async fn said_before(stream: &Stream) -> Option<io::Error> {
    let mut ignored = BytesMut::with_capacity(INPUT);
    loop {
        match stream.read_buf(&mut ignored).await {
            Ok(0) => return None,
            Ok(_) => ignored.clear(),
            Err(error) => return (error.kind() == io::ErrorKind::Other).then_some(error),
        }
    }
}

/// The beginning of TLS with the server that a URI names. Its own certificates win over those of this process.
async fn tls_handshake(uri: &Uri) -> Result<Handshake, OpenFailure> {
    let directory = uri.tls.certificates.clone().or_else(default_certificates).ok_or(OpenFailure::NoCertificates)?;
    // Small files, on a disk that may be slow.
    let identity = tokio::task::spawn_blocking(move || ClientIdentity::load(&directory)).await;
    let identity = identity.map_err(|error| OpenFailure::Connect(io::Error::other(error)))??;
    Ok(identity.handshake(uri.tls_name())?)
}

/// The names and descriptions of a server's exports.
pub async fn list(uri: &Uri, limit: Duration) -> Result<Vec<(String, String)>, OpenFailure> {
    match open(uri, Ask::List, limit).await?.2 {
        Outcome::Listed(exports) => Ok(exports),
        Outcome::Opened(_) | Outcome::Contexts(_) | Outcome::StartTls => Ok(Vec::new()),
    }
}

/// What a server says of an export, with the names of all its contexts listed and none selected.
pub async fn inspect(uri: &Uri, limit: Duration) -> Result<Agreed, OpenFailure> {
    let ask = Ask::Open { export: uri.export.clone(), contexts: Vec::new(), list: Some(Vec::new()) };
    match open(uri, ask, limit).await? {
        (stream, _, Outcome::Opened(agreed)) => {
            part(&stream, agreed.replies).await;
            Ok(agreed)
        }
        (_, _, Outcome::Listed(_) | Outcome::Contexts(_) | Outcome::StartTls) => Err(OpenFailure::Closed),
    }
}

/// The facts of an export, by a connection that asks for nothing else; and whether its server tells news.
pub(super) async fn look(uri: &Uri, limit: Duration) -> Result<(Facts, bool), OpenFailure> {
    let (stream, _, agreed) = open_export(uri, Introduction { role: Role::Plain, limit }, &CONTEXTS).await?;
    // The answer is there already; a server that takes no goodbye shall not keep it.
    let _ = tokio::time::timeout(limit, part(&stream, agreed.replies)).await;
    Ok((facts(&agreed), tells_news(&agreed)))
}

/// Says goodbye.
pub(super) async fn part(stream: &Stream, mode: ReplyMode) {
    let mut output = BytesMut::new();
    put_disconnect(&mut output, mode);
    // A server that hangs up first has been told what we wanted to tell it.
    let _ = stream.write_all(&mut output).await;
    stream.end_tls();
}

/// How a connection is opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Introduction {
    /// Who we say that we are.
    pub(super) role: Role,
    /// How long all of it may take.
    pub(super) limit: Duration,
}

/// What we ask to be listed: everything that only Headwater servers say, as whoever we are.
pub(super) fn queries(role: Role) -> Vec<String> {
    let mut list = vec![NAMESPACE.to_owned()];
    match role {
        Role::Plain => {}
        Role::Relay => list.push(RELAY.to_owned()),
        // Also without a name: servers that do not know names take this.
        Role::Mirror | Role::Named(_) => list.push(MIRROR.to_owned()),
    }
    list.extend(role.node().map(|node| format!("{MIRROR_NODE}{node}")));
    list
}

pub(super) async fn open_export(
    uri: &Uri,
    introduction: Introduction,
    contexts: &[Context],
) -> Result<(Stream, BytesMut, Agreed), OpenFailure> {
    let contexts = contexts.iter().map(|context| context.name().to_owned()).collect();
    open_contexts(uri, introduction, contexts).await
}

/// Opens an export with these contexts, those of them that the server has.
pub(super) async fn open_contexts(
    uri: &Uri,
    introduction: Introduction,
    contexts: Vec<String>,
) -> Result<(Stream, BytesMut, Agreed), OpenFailure> {
    let ask = Ask::Open { export: uri.export.clone(), contexts, list: Some(queries(introduction.role)) };
    match open(uri, ask, introduction.limit).await? {
        (stream, input, Outcome::Opened(agreed)) => Ok((stream, input, agreed)),
        (_, _, Outcome::Listed(_) | Outcome::Contexts(_) | Outcome::StartTls) => Err(OpenFailure::Closed),
    }
}

pub(super) fn put_disconnect(output: &mut BytesMut, mode: ReplyMode) {
    let header = request::Header { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
    request::encode(output, mode, header);
}
