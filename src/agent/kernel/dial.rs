//! Connections to servers, up to where the kernel takes over.
//!
//! The kernel knows simple replies only, so nothing more is asked for on its connections. What a server says of an image
//! comes with structured replies, and is asked on a connection of its own. A server that is one of ours is told a name
//! for each of the kernel's connections, by which it can be asked later to close it when all is answered; a stranger is
//! never asked anything that is not in the protocol document.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use super::DialError;
use crate::clock;
use crate::export::Facts;
use crate::export::facts::{ImageId, NAMESPACE};
use crate::nbd::handshake::ReplyMode;
use crate::nbd::handshake::client::{Agreed, Ask, ClientHandshake, Outcome, Refusal};
use crate::nbd::uri::{Address, Security};
use crate::nbd::wire::{CLOSE, CONNECTION, INIT_MAGIC, TransmissionFlags, command};
use crate::nbd::{BlockSizes, Uri, request};

/// How long a server may take to connect and negotiate.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Input is taken in pieces of this size; the negotiation bounds what it keeps of it.
const INPUT: usize = 16 << 10;

/// What a server offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) block_sizes: BlockSizes,
    pub(super) identity: Option<ImageId>,
    /// Whether it knows what only our servers know.
    pub(super) is_ours: bool,
}

/// A connection on which the transmission phase has begun, and nothing was asked yet.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) socket: Socket,
    pub(super) inode: u64,
    /// The name that the server knows it by.
    pub(super) token: Option<String>,
}

/// Asks what a server offers.
pub(super) fn look(uri: &Uri) -> Result<Offer, DialError> {
    let ask = Ask::Open { export: uri.export.clone(), contexts: Vec::new(), list: Some(vec![NAMESPACE.to_owned()]) };
    let (socket, agreed) = negotiate(uri, ClientHandshake::new(ask))?;
    part(&socket, agreed.replies);
    let mut facts = Facts::read_only(agreed.size, "");
    facts.learn(&agreed.listed);
    Ok(Offer {
        size: agreed.size,
        flags: agreed.flags - TransmissionFlags::SEND_DF,
        block_sizes: agreed.block_sizes,
        identity: facts.identity,
        is_ours: agreed.listed.iter().any(|name| name.starts_with(NAMESPACE)),
    })
}

/// Opens a connection for the kernel to a server that has made this offer.
pub(super) fn open(uri: &Uri, offer: &Offer) -> Result<Opened, DialError> {
    let token = if offer.is_ours { Some(random_token()?) } else { None };
    let list = token.as_ref().map(|token| vec![format!("{CONNECTION}{token}")]);
    let ask = Ask::Open { export: uri.export.clone(), contexts: Vec::new(), list };
    let handshake = ClientHandshake::new(ask).at_most(ReplyMode::Simple).listing_anyway();
    let (socket, agreed) = negotiate(uri, handshake)?;
    if (agreed.size, agreed.flags, agreed.block_sizes) != (offer.size, offer.flags, offer.block_sizes) {
        return Err(Refusal::Broken("it offers another image on each connection").into());
    }
    check_kind(&socket)?;
    // The kernel would go by them.
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    let inode = inode(&socket)?;
    Ok(Opened { socket, inode, token })
}

/// Asks a server of ours to close the connection with this name as soon as all that it received is answered. It does
/// not say whether it knows the name.
pub(super) fn ask_to_close(uri: &Uri, token: &str) -> Result<(), DialError> {
    let list = Some(vec![format!("{CLOSE}{token}")]);
    let ask = Ask::Open { export: uri.export.clone(), contexts: Vec::new(), list };
    let handshake = ClientHandshake::new(ask).at_most(ReplyMode::Simple).listing_anyway();
    let (socket, agreed) = negotiate(uri, handshake)?;
    part(&socket, agreed.replies);
    Ok(())
}

/// The addresses that a URI stands for; none if it is of a unix socket.
pub(super) fn addresses(uri: &Uri) -> io::Result<Vec<SocketAddr>> {
    match &uri.address {
        Address::Tcp { host, port } => Ok((host.as_str(), *port).to_socket_addrs()?.collect()),
        Address::Unix(_) => Ok(Vec::new()),
    }
}

/// Whether an NBD server listens there.
pub(super) fn is_nbd_server(address: SocketAddr) -> bool {
    let end = clock::now() + PATIENCE;
    let greeting = || -> io::Result<[u8; 8]> {
        let socket = connect_tcp(address, end)?;
        let mut greeting = [0; 8];
        socket.set_read_timeout(Some(left(end)?))?;
        (&socket).read_exact(&mut greeting)?;
        Ok(greeting)
    };
    greeting().is_ok_and(|greeting| u64::from_be_bytes(greeting) == INIT_MAGIC)
}

/// The kernel takes nothing but stream sockets of TCP and unix since 2025 (AF_VSOCK is refused); before, it took others
/// and got stuck on some. No URI of ours leads to one; this holds should that change.
pub(super) fn check_kind(socket: &Socket) -> Result<(), DialError> {
    let is_stream = socket.r#type()? == Type::STREAM;
    let is_tcp = || socket.protocol().is_ok_and(|protocol| protocol == Some(Protocol::TCP));
    match socket.domain()? {
        Domain::IPV4 | Domain::IPV6 if is_stream && is_tcp() => Ok(()),
        Domain::UNIX if is_stream => Ok(()),
        _ => Err(DialError::Socket),
    }
}

/// Connects and negotiates, within [`PATIENCE`].
fn negotiate(uri: &Uri, mut handshake: ClientHandshake) -> Result<(Socket, Agreed), DialError> {
    if uri.security == Security::Tls {
        return Err(DialError::Tls);
    }
    let end = clock::now() + PATIENCE;
    let socket = connect(&uri.address, end)?;
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut piece = vec![0; INPUT];
    loop {
        let outcome = handshake.advance(&mut input, &mut output);
        // Also what is said before a refusal: it may be the goodbye.
        socket.set_write_timeout(Some(left(end)?))?;
        (&socket).write_all(&output)?;
        output.clear();
        match outcome? {
            Some(Outcome::Opened(agreed)) if input.is_empty() => return Ok((socket, agreed)),
            Some(_) => return Err(Refusal::Broken("it spoke before it was asked").into()),
            None => {}
        }
        socket.set_read_timeout(Some(left(end)?))?;
        match (&socket).read(&mut piece)? {
            0 => return Err(DialError::Closed),
            length => input.extend_from_slice(&piece[..length]),
        }
    }
}

fn connect(address: &Address, end: Instant) -> io::Result<Socket> {
    match address {
        Address::Unix(path) => {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // On a unix socket this is how long it waits for room in the server's queue.
            socket.set_write_timeout(Some(left(end)?))?;
            socket.connect(&SockAddr::unix(path)?)?;
            Ok(socket)
        }
        Address::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match connect_tcp(address, end) {
                    Ok(socket) => return Ok(socket),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// With the options that connections of ours have: see `net::Stream`.
fn connect_tcp(address: SocketAddr, end: Instant) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.connect_timeout(&address.into(), left(end)?)?;
    socket.set_tcp_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10)).with_retries(6);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
    Ok(socket)
}

fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(clock::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Says goodbye.
fn part(socket: &Socket, mode: ReplyMode) {
    let mut output = BytesMut::new();
    let header = request::Header { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
    request::encode(&mut output, mode, header);
    let mut socket = socket;
    // A server that hangs up first has been told what we wanted to tell it.
    let _ = socket.write_all(&output);
}

fn inode(socket: &Socket) -> io::Result<u64> {
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(socket.try_clone()?));
    Ok(file.metadata()?.ino())
}

/// 32 hexadecimal digits that nobody can guess.
fn random_token() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn only_sockets_that_the_kernel_takes_are_handed_over() {
        let check = |domain, kind, protocol| match Socket::new(domain, kind, protocol) {
            Ok(socket) => check_kind(&socket).is_ok(),
            // AF_VSOCK without its module: there is nothing that could be handed over.
            Err(error) => panic!("{domain:?}: {error}"),
        };
        assert!(check(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)));
        assert!(check(Domain::UNIX, Type::STREAM, None));
        assert!(!check(Domain::UNIX, Type::DGRAM, None));
        assert!(!check(Domain::UNIX, Type::SEQPACKET, None));
        assert!(!check(Domain::IPV4, Type::DGRAM, None));
        // As for AF_VSOCK (which needs a module): no family but those is taken.
        assert!(!check(Domain::from(libc::AF_NETLINK), Type::DGRAM, None));
    }

    #[test]
    fn tokens_are_32_digits_and_never_the_same() {
        let (one, other) = (random_token().unwrap(), random_token().unwrap());
        assert!(one.len() == 32 && one.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()));
        assert_ne!(one, other);
    }

    #[test]
    fn what_is_no_nbd_server_is_told_from_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::Builder::new().spawn(move || {
            for greeting in [&b"NBDMAGICIHAVEOPT\0\x03"[..], b"SSH-2.0-OpenSSH_9.2"] {
                listener.accept().unwrap().0.write_all(greeting).unwrap();
            }
        });
        assert!(is_nbd_server(address));
        assert!(!is_nbd_server(address));
        server.unwrap().join().unwrap();
        assert!(!is_nbd_server(address), "nobody listens any more");
    }

    #[test]
    fn tls_is_refused_with_a_reason() {
        let failure = look(&"nbds://127.0.0.1/x".parse().unwrap()).unwrap_err();
        assert!(failure.to_string().contains("TLS"), "{failure}");
    }
}
