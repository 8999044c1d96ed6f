//! A handshake, of either role: bytes that arrived go in, bytes to send come out.
//!
//! `rustls` is given one record at a time, so that it never sees what comes behind the handshake: those records are for
//! the session. The traffic secrets come by its key log; the keys that follow from them are held against those that it
//! has derived itself.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, BytesMut};
use rustls::client::UnbufferedClientConnection;
use rustls::crypto::tls13::OkmBlock;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ExtractedSecrets, KeyLog, ServerConfig};
use thiserror::Error;

use super::keys::{Keys, Suite};
use super::names::certificate_facts;
use super::records::{MAX_SEALED, RecordError, Session};

/// Bytes that a peer may send in a handshake: a chain of certificates of the longest kind.
pub const MAX_HANDSHAKE: usize = 128 << 10;

/// Why a handshake failed.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Failure {
    /// What came is no TLS.
    #[error("what came is not TLS")]
    NotTls,
    /// One side refused the other.
    #[error("{}", explain(.0))]
    Refused(rustls::Error),
    /// More than [`MAX_HANDSHAKE`].
    #[error("a handshake of more than {MAX_HANDSHAKE} bytes")]
    TooLong,
    /// The keys cannot be taken over.
    #[error(transparent)]
    Keys(#[from] RecordError),
}

/// What an operator can do something with comes first.
fn explain(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, Error, PeerIncompatible};
    match error {
        Error::NoCertificatesPresented => "it shows no certificate, and one is required".into(),
        Error::AlertReceived(Alert::CertificateRequired) => "it requires a client certificate".into(),
        Error::AlertReceived(Alert::UnknownCA) => "it does not know who has signed our certificate".into(),
        Error::AlertReceived(Alert::BadCertificate) => "it does not accept our certificate".into(),
        Error::AlertReceived(Alert::CertificateExpired) => "our certificate has expired".into(),
        Error::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired) => "it speaks no TLS 1.3".into(),
        other => other.to_string(),
    }
}

/// What one step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Send the output, then call again once more bytes have arrived.
    NeedInput,
    /// Send the output and call [`Handshake::finish`]. What is left of the input belongs to the session.
    Finished,
}

enum Role {
    Server(Box<UnbufferedServerConnection>),
    Client(Box<UnbufferedClientConnection>),
}

/// A handshake in progress.
pub struct Handshake {
    role: Role,
    secrets: Arc<Secrets>,
    /// Bytes at the front of the input that have been looked at.
    given: usize,
    /// Bytes of whole records so far.
    taken: usize,
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshake").field("taken", &self.taken).finish_non_exhaustive()
    }
}

/// The traffic secrets of one session, as soon as they are known: the client's, the server's.
#[derive(Default)]
struct Secrets(Mutex<[Option<OkmBlock>; 2]>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}

impl KeyLog for Secrets {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        let position = usize::from(label == SERVER_SECRET);
        if secret.len() <= OkmBlock::MAX_LEN {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)[position] = Some(OkmBlock::new(secret));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        label == SERVER_SECRET || label == CLIENT_SECRET
    }
}

const CLIENT_SECRET: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER_SECRET: &str = "SERVER_TRAFFIC_SECRET_0";

impl Handshake {
    pub(super) fn server(config: &ServerConfig) -> Result<Self, Failure> {
        let secrets = Arc::<Secrets>::default();
        let mut config = config.clone();
        config.key_log = Arc::<Secrets>::clone(&secrets);
        let connection = UnbufferedServerConnection::new(Arc::new(config)).map_err(Failure::Refused)?;
        Ok(Self { role: Role::Server(Box::new(connection)), secrets, given: 0, taken: 0 })
    }

    pub(super) fn client(config: &ClientConfig, name: ServerName<'static>) -> Result<Self, Failure> {
        let secrets = Arc::<Secrets>::default();
        let mut config = config.clone();
        config.key_log = Arc::<Secrets>::clone(&secrets);
        let connection = UnbufferedClientConnection::new(Arc::new(config), name).map_err(Failure::Refused)?;
        Ok(Self { role: Role::Client(Box::new(connection)), secrets, given: 0, taken: 0 })
    }

    /// Takes all whole records that belong to the handshake from `input`, appending what the peer must be told to
    /// `output`, also when it fails: then that is the reason.
    pub fn advance(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Progress, Failure> {
        loop {
            let (discard, step) = self.step(&mut input[..self.given], output);
            input.advance(discard);
            self.given -= discard;
            match step {
                Ok(Step::More) => continue,
                Ok(Step::Blocked) if !self.state().is_handshaking() => return Ok(Progress::Finished),
                Ok(Step::Blocked) => {}
                Err(error) => {
                    self.say_why(input, output);
                    return Err(error);
                }
            }
            let Some(length) = whole_record(&input[self.given..])? else { return Ok(Progress::NeedInput) };
            self.given += length;
            self.taken += length;
            if self.taken > MAX_HANDSHAKE {
                return Err(Failure::TooLong);
            }
        }
    }

    fn state(&self) -> &CommonState {
        match &self.role {
            Role::Server(connection) => connection,
            Role::Client(connection) => connection,
        }
    }

    fn step(&mut self, input: &mut [u8], output: &mut BytesMut) -> (usize, Result<Step, Failure>) {
        match &mut self.role {
            Role::Server(connection) => take_status(connection.process_tls_records(input), output),
            Role::Client(connection) => take_status(connection.process_tls_records(input), output),
        }
    }

    /// After a failure: the alert that says why. The library remembers places in the input, so it is shown the same.
    fn say_why(&mut self, input: &mut BytesMut, output: &mut BytesMut) {
        while let (discard, Ok(Step::More)) = self.step(&mut input[..self.given], output) {
            input.advance(discard);
            self.given -= discard;
        }
    }

    /// The session that was agreed on.
    pub fn finish(self) -> Result<Session, Failure> {
        let is_server = matches!(self.role, Role::Server(_));
        let suite = self.state().negotiated_cipher_suite().and_then(|suite| Suite::of(suite.suite()));
        let suite = suite.ok_or(RecordError::Keys)?;
        let shown = self.state().peer_certificates().and_then(|chain| chain.first());
        let names = shown.and_then(certificate_facts).map(|facts| facts.names).unwrap_or_default();
        let secrets = std::mem::take(&mut *self.secrets.0.lock().unwrap_or_else(PoisonError::into_inner));
        let [Some(client), Some(server)] = secrets else { return Err(RecordError::Keys.into()) };
        let extracted = match self.role {
            Role::Server(connection) => connection.dangerous_into_kernel_connection().map(|(secrets, _)| secrets),
            Role::Client(connection) => connection.dangerous_into_kernel_connection().map(|(secrets, _)| secrets),
        };
        let ExtractedSecrets { tx, rx } = extracted.map_err(Failure::Refused)?;
        let (read, write) = if is_server { (client, server) } else { (server, client) };
        let reads = Keys::new(suite, read.as_ref(), rx.0)?;
        let writes = Keys::new(suite, write.as_ref(), tx.0)?;
        if !reads.are(&rx.1) || !writes.are(&tx.1) {
            return Err(RecordError::Keys.into());
        }
        Ok(Session::new(reads, writes, names))
    }
}

enum Step {
    /// Something happened: look again.
    More,
    /// Nothing can be done without more input.
    Blocked,
}

fn take_status<D>(status: UnbufferedStatus<'_, '_, D>, output: &mut BytesMut) -> (usize, Result<Step, Failure>) {
    let UnbufferedStatus { discard, state } = status;
    let step = match state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let size = match data.encode(&mut []) {
                Err(EncodeError::InsufficientSize(needed)) => needed.required_size,
                _ => 0,
            };
            let start = output.len();
            output.resize(start + size, 0);
            match data.encode(&mut output[start..]) {
                Ok(_) => Ok(Step::More),
                Err(_) => Err(RecordError::Keys.into()),
            }
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::More)
        }
        Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => Ok(Step::Blocked),
        // Data or the end before the handshake is over.
        Ok(_) => Err(Failure::NotTls),
        Err(error) => Err(Failure::Refused(error)),
    };
    (discard, step)
}

/// The length of the record at the front of `input`, if it is whole.
fn whole_record(input: &[u8]) -> Result<Option<usize>, Failure> {
    // Change cipher spec, alert, handshake, application data.
    if input.first().is_some_and(|kind| !(20..=23).contains(kind)) {
        return Err(Failure::NotTls);
    }
    let Some(header) = input.first_chunk::<5>() else { return Ok(None) };
    let length = 5 + usize::from(u16::from_be_bytes([header[3], header[4]]));
    if header[1] != 3 || length > MAX_SEALED {
        return Err(Failure::NotTls);
    }
    Ok((input.len() >= length).then_some(length))
}

/// Feeds arbitrary bytes to a server's handshake, in pieces whose sizes the bytes themselves decide.
#[doc(hidden)]
pub fn fuzz(config: &super::Clients, data: &[u8]) {
    let Ok(mut handshake) = config.handshake() else { return };
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    for piece in data.chunks(usize::from(data.first().copied().unwrap_or(0)) + 1) {
        input.extend_from_slice(piece);
        match handshake.advance(&mut input, &mut output) {
            Ok(Progress::NeedInput) => {}
            Ok(Progress::Finished) => panic!("a handshake without a client"),
            Err(_) => return,
        }
        assert!(input.len() <= MAX_HANDSHAKE + MAX_SEALED && output.len() <= MAX_HANDSHAKE, "bytes pile up");
    }
}
