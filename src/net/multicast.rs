//! Multicast sockets: groups, interfaces, batches.
//!
//! An [`Outlet`] sends to a group and hears what is answered to it; an [`Inlet`] hears a group and answers. Both make few
//! system calls: a batch leaves as one packet that the system or the card cuts into datagrams (GSO), and arrives as one
//! that it has put together (GRO), where the system knows how.
//!
//! Datagrams may be lost anywhere, so whoever sends is not told of each. While the network is down they are lost here: a
//! cable that is out for some seconds ends nothing.
//!
//! An interface is named by its name or by its address. Without one, that of the route to the group is taken; without a
//! route, the only one that is not the loopback (to send), or all of these (to hear).
//!
//! Owns: the options of these sockets, batching, waiting for room. Does not own: pacing, what is said.

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, InterfaceIndexOrAddress, Socket, Type};
use thiserror::Error;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::interface::{self, Interface};
use crate::clock;

/// Datagrams that leave as one packet. More would be bursts that shallow queues on the way cannot take.
pub const BATCH: usize = 16;

/// What is taken of an interface that carries more, unless told: others on the way may not.
const LONGEST_MTU: u16 = 1500;
/// Bytes of the headers of IP and UDP.
const HEADERS_V4: u16 = 28;
const HEADERS_V6: u16 = 48;

/// Bytes that may wait to be sent. Little, so that what waits is a few milliseconds old; the sender paces itself.
const SEND_BUFFER: usize = 256 << 10;
/// Bytes that may wait to be heard: a fifth of a second at 300 Mbit/s. The system may allow less.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Bytes of one packet that was put together, at most.
const PACKET: usize = 64 << 10;
/// Packets that are taken by one system call.
const PACKETS: usize = 16;
/// System calls in one go, before others have their turn.
const CALLS: usize = 4;

/// How long one datagram that cannot leave is tried.
const PATIENCE: Duration = Duration::from_millis(200);
/// Between attempts while the network is down or has no memory.
const PAUSE: Duration = Duration::from_millis(20);
/// The network may be down for so long.
const LONGEST_OUTAGE: Duration = Duration::from_secs(60);
/// Between looks at what the system threw away.
const LOOK: Duration = Duration::from_secs(1);

/// A multicast group and its port, as in `239.1.2.3:7000` or `[ff15::7]:7000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(SocketAddr);

/// Why a text is no group.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no multicast group: they look like 239.1.2.3:7000 or [ff15::7]:7000")]
pub struct ParseGroupError(String);

impl FromStr for Group {
    type Err = ParseGroupError;

    fn from_str(text: &str) -> Result<Self, ParseGroupError> {
        let address = text.parse::<SocketAddr>().ok();
        let group = address.filter(|address| address.ip().is_multicast() && address.port() != 0);
        group.map(Self).ok_or_else(|| ParseGroupError(text.to_owned()))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Group {
    /// The group with the number of the interface, which groups of the sixth version within one link need.
    fn by(self, interface: Option<u32>) -> SocketAddr {
        match (self.0, interface) {
            (SocketAddr::V6(group), Some(index)) if group.scope_id() == 0 => {
                SocketAddrV6::new(*group.ip(), group.port(), group.flowinfo(), index).into()
            }
            (group, _) => group,
        }
    }
}

/// How datagrams leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaving {
    /// The interface, by its name or by an address of it. `None`: the route to the group decides.
    pub interface: Option<String>,
    /// Routers that may forward them.
    pub hops: u8,
    /// Bytes of the longest packet that the path takes, headers included; `None`: what the interface takes, 1500 at most.
    pub mtu: Option<u16>,
}

/// Sends to a group, and hears what is answered.
pub struct Outlet {
    socket: UdpSocket,
    state: UdpSocketState,
    target: SocketAddr,
    longest: usize,
    /// Since when nothing can leave.
    down_since: Cell<Option<Instant>>,
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet").field("target", &self.target).field("longest", &self.longest).finish_non_exhaustive()
    }
}

impl Outlet {
    /// A socket of its own. Call within a tokio runtime.
    pub fn open(group: Group, leaving: &Leaving) -> io::Result<Self> {
        let interface = match &leaving.interface {
            Some(text) => interface::find(text)?,
            None => default_interface(group)?,
        };
        let socket = Socket::new(Domain::for_address(group.0), Type::DGRAM.nonblocking().cloexec(), None)?;
        let own: IpAddr = if group.0.is_ipv4() {
            let address = interface.v4().ok_or_else(|| no_address(&interface))?;
            socket.set_multicast_if_v4(&address)?;
            socket.set_multicast_ttl_v4(u32::from(leaving.hops))?;
            socket.set_multicast_loop_v4(true)?;
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            socket.set_multicast_if_v6(interface.index)?;
            socket.set_multicast_hops_v6(u32::from(leaving.hops))?;
            socket.set_multicast_loop_v6(true)?;
            Ipv6Addr::UNSPECIFIED.into()
        };
        socket.bind(&SocketAddr::new(own, 0).into())?;
        socket.set_send_buffer_size(SEND_BUFFER)?;
        let socket = UdpSocket::from_std(socket.into())?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let mtu = leaving.mtu.unwrap_or_else(|| u16::try_from(interface.mtu).unwrap_or(u16::MAX).min(LONGEST_MTU));
        let headers = if group.0.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
        let longest = usize::from(mtu.saturating_sub(headers));
        Ok(Self { socket, state, target: group.by(Some(interface.index)), longest, down_since: Cell::new(None) })
    }

    /// Bytes of the longest datagram that fits the path.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Sends datagrams that lie one after the other in `bytes`, each of `size` bytes, the last perhaps shorter: by as few
    /// system calls as the system allows, [`BATCH`] datagrams at most by each. What cannot leave because the network is
    /// down or has no memory is lost, after a short wait; it fails once that has been so for a minute.
    ///
    /// Cancel safety: some may have been sent.
    pub async fn send(&self, bytes: &[u8], size: usize) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = self.state.max_gso_segments().clamp(1, BATCH);
            let (now, later) = rest.split_at((count * size).min(rest.len()));
            match self.send_packet(now, size, self.target).await {
                Ok(()) => rest = later,
                // The system cannot cut it: one by one from now on.
                Err(_) if count > 1 && self.state.max_gso_segments() == 1 => {}
                Err(error) => {
                    self.excuse(error)?;
                    rest = later;
                }
            }
        }
        Ok(())
    }

    async fn send_packet(&self, bytes: &[u8], size: usize, target: SocketAddr) -> io::Result<()> {
        let segment_size = (bytes.len() > size).then_some(size);
        let transmit = Transmit { destination: target, ecn: None, contents: bytes, segment_size, src_ip: None };
        let mut last = clock::now() + PATIENCE;
        loop {
            match send_now(&self.socket, &self.state, &transmit).await {
                Err(error) if is_transient(&error) && clock::now() < last => tokio::time::sleep(PAUSE).await,
                // One try in an outage, so that a long one delays nothing else.
                Err(error) if is_outage(&error) && self.down_since.get().is_none() && clock::now() < last => {
                    last = clock::now();
                    tokio::time::sleep(PAUSE).await;
                }
                Ok(()) => {
                    if let Some(since) = self.down_since.take() {
                        tracing::info!(target = %self.target, seconds = since.elapsed().as_secs(), "datagrams leave again");
                    }
                    return Ok(());
                }
                Err(error) => {
                    tokio::time::sleep(PAUSE).await;
                    return Err(error);
                }
            }
        }
    }

    /// Takes an error for a loss, if the network is down and has not been for long.
    fn excuse(&self, error: io::Error) -> io::Result<()> {
        if !is_outage(&error) && !is_transient(&error) {
            return Err(error);
        }
        let now = clock::now();
        let Some(since) = self.down_since.get() else {
            tracing::warn!(target = %self.target, %error, "datagrams cannot leave: they are lost");
            self.down_since.set(Some(now));
            return Ok(());
        };
        if now.saturating_duration_since(since) < LONGEST_OUTAGE { Ok(()) } else { Err(error) }
    }

    /// Waits for datagrams that were sent to this socket, and hands each to `each` with its sender.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn receive(&self, each: impl FnMut(&[u8], SocketAddr)) -> io::Result<()> {
        let mut each = each;
        loop {
            self.socket.readable().await?;
            if self.take(&mut each)? > 0 {
                return Ok(());
            }
        }
    }

    /// Hands over the datagrams that are there, up to a bound, without waiting. Gives how many.
    pub fn take(&self, each: &mut impl FnMut(&[u8], SocketAddr)) -> io::Result<usize> {
        let mut buffer = [0; 2048];
        let mut count = 0;
        while count < PACKETS * CALLS {
            match self.socket.try_recv_from(&mut buffer) {
                Ok((length, from)) => each(&buffer[..length], from),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An answer of the network to what was sent earlier, which is lost.
                Err(error) if is_outage(&error) => {}
                Err(error) => return Err(error),
            }
            count += 1;
        }
        Ok(count)
    }
}

/// Hears a group.
pub struct Inlet {
    socket: UdpSocket,
    state: UdpSocketState,
    buffer: Box<[u8]>,
    is_v4: bool,
    /// What the system has thrown away, and when that was looked up.
    overflowed: Cell<Option<(Instant, u32)>>,
}

impl fmt::Debug for Inlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inlet").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Inlet {
    /// Joins a group by one interface; `None`: the route to the group decides, and if there is none, all are joined that
    /// are not the loopback. Call within a tokio runtime.
    pub fn join(group: Group, interface: Option<&str>) -> io::Result<Self> {
        let interface = interface.map(interface::find).transpose()?;
        let socket = Socket::new(Domain::for_address(group.0), Type::DGRAM.nonblocking().cloexec(), None)?;
        socket.set_reuse_address(true)?;
        // By the address of the group, no other datagram for the port is heard.
        socket.bind(&group.by(interface.as_ref().map(|interface| interface.index)).into())?;
        let is_v4 = group.0.is_ipv4();
        // Nor what others on this host have joined by other interfaces.
        if is_v4 {
            socket.set_multicast_all_v4(false)?;
        } else {
            socket.set_multicast_all_v6(false)?;
        }
        let joined = match (interface, interface::towards(group.0)?) {
            (Some(interface), _) | (None, Some(interface)) => vec![interface],
            (None, None) => others()?,
        };
        join_by(&socket, group, &joined)?;
        if set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        }
        let socket = UdpSocket::from_std(socket.into())?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let buffer = vec![0; PACKET * PACKETS].into_boxed_slice();
        Ok(Self { socket, state, buffer, is_v4, overflowed: Cell::new(None) })
    }

    /// Waits for datagrams, takes all that are there (up to a bound), and hands each to `each` with its sender.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn receive(&mut self, mut each: impl FnMut(&[u8], SocketAddr)) -> io::Result<()> {
        let Self { socket, state, buffer, .. } = self;
        let mut taken = 0;
        loop {
            let mut metas = [RecvMeta::default(); PACKETS];
            let mut parts: [IoSliceMut<'_>; PACKETS] = split(buffer);
            if taken == 0 {
                socket.readable().await?;
            }
            let receive = || state.recv(UdpSockRef::from(&*socket), &mut parts, &mut metas);
            match socket.try_io(Interest::READABLE, receive) {
                Ok(count) => {
                    for (meta, part) in metas[..count].iter().zip(&parts) {
                        let packet = &part[..meta.len];
                        packet.chunks(meta.stride.max(1)).for_each(|datagram| each(datagram, meta.addr));
                    }
                    taken += 1;
                    if taken >= CALLS || count < PACKETS {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // An answer to what was sent from here, or the network went away: it may come back.
                Err(error) if is_outage(&error) => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a datagram to whoever sends to the group. It may be lost here too.
    ///
    /// Cancel safety: it is sent or not.
    pub async fn answer(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        let transmit = Transmit { destination: to, ecn: None, contents: bytes, segment_size: None, src_ip: None };
        match send_now(&self.socket, &self.state, &transmit).await {
            Err(error) if !is_outage(&error) && !is_transient(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Datagrams that the system threw away because this socket's queue was full, so far; as of a second ago at most.
    pub fn overflowed(&self) -> u32 {
        let now = clock::now();
        match self.overflowed.get() {
            Some((looked, count)) if now.saturating_duration_since(looked) < LOOK => count,
            last => {
                let count = self.drops().unwrap_or_else(|| last.map_or(0, |(_, count)| count));
                self.overflowed.set(Some((now, count)));
                count
            }
        }
    }

    fn drops(&self) -> Option<u32> {
        let inode = rustix::fs::fstat(self.socket.as_fd()).ok()?.st_ino;
        let table = if self.is_v4 { "udp" } else { "udp6" };
        let list = fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok()?;
        list.lines().find_map(|line| drops_of(line, inode))
    }
}

/// Cuts a buffer into equal parts.
fn split<const N: usize>(buffer: &mut [u8]) -> [IoSliceMut<'_>; N] {
    let mut parts = buffer.chunks_exact_mut(PACKET);
    std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()))
}

/// Reads a line of `/proc/net/udp`: the tenth word is the inode, the last one counts what was thrown away.
fn drops_of(line: &str, inode: u64) -> Option<u32> {
    let mut words = line.split_whitespace();
    let is_it = words.nth(9)?.parse() == Ok(inode);
    is_it.then(|| words.next_back()?.parse().ok()).flatten()
}

async fn send_now(socket: &UdpSocket, state: &UdpSocketState, transmit: &Transmit<'_>) -> io::Result<()> {
    loop {
        match socket.try_io(Interest::WRITABLE, || state.try_send(UdpSockRef::from(socket), transmit)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            result => return result,
        }
    }
}

/// The interface that is taken when none is named.
fn default_interface(group: Group) -> io::Result<Interface> {
    if let Some(interface) = interface::towards(group.0)? {
        return Ok(interface);
    }
    match others()?.as_slice() {
        [only] => Ok(only.clone()),
        _ => Err(io::Error::other(format!("there is no route to {group}: name an interface"))),
    }
}

/// All interfaces but the loopback.
fn others() -> io::Result<Vec<Interface>> {
    Ok(interface::all()?.into_iter().filter(|interface| interface.is_up && !interface.is_loopback).collect())
}

/// Joins by all of these that can; by one at least.
fn join_by(socket: &Socket, group: Group, interfaces: &[Interface]) -> io::Result<()> {
    let mut failure = io::Error::other(format!("there is no interface by which {group} can be heard"));
    let mut joined = 0;
    for interface in interfaces {
        let result = match group.0.ip() {
            IpAddr::V4(ip) => socket.join_multicast_v4_n(&ip, &InterfaceIndexOrAddress::Index(interface.index)),
            IpAddr::V6(ip) => socket.join_multicast_v6(&ip, interface.index),
        };
        match result {
            Ok(()) => joined += 1,
            Err(error) => failure = error,
        }
    }
    if joined > 0 { Ok(()) } else { Err(failure) }
}

fn no_address(interface: &Interface) -> io::Error {
    io::Error::new(io::ErrorKind::AddrNotAvailable, format!("the interface {:?} has no IPv4 address", interface.name))
}

/// Whether there is no memory for a datagram at the moment.
fn is_transient(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(code, Some(rustix::io::Errno::NOBUFS | rustix::io::Errno::NOMEM | rustix::io::Errno::AGAIN))
}

/// Whether the network is down, or a part of it, so that it may be up again later.
fn is_outage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    const OUTAGES: [Errno; 8] = [
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::NODEV,
        Errno::ADDRNOTAVAIL,
        Errno::CONNREFUSED,
        // A rule of the packet filter.
        Errno::PERM,
    ];
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|code| OUTAGES.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group of its own for each test, so that tests that run at the same time do not hear each other.
    fn group(number: u8) -> Group {
        let port = 20_000 + u16::try_from(std::process::id() % 20_000).unwrap();
        Group(SocketAddr::from((Ipv4Addr::new(239, 255, 77, number), port)))
    }

    fn leaving() -> Leaving {
        Leaving { interface: Some("lo".to_owned()), hops: 1, mtu: None }
    }

    #[test]
    fn groups_are_told_from_other_addresses() {
        for text in ["239.1.2.3:7000", "[ff15::7]:7000", "224.0.0.251:5353"] {
            assert_eq!(text.parse::<Group>().unwrap().to_string(), text);
        }
        for text in ["", "239.1.2.3", "239.1.2.3:0", "192.0.2.1:7000", "[fe80::1]:7", "ff15::7:7000", "host:7000"] {
            assert!(text.parse::<Group>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn batches_arrive_as_the_datagrams_they_were_and_answers_go_back() {
        let group = group(1);
        let mut inlet = Inlet::join(group, Some("lo")).unwrap();
        // Several may hear one group on one host.
        let mut other = Inlet::join(group, Some("127.0.0.1")).unwrap();
        let outlet = Outlet::open(group, &leaving()).unwrap();
        assert_eq!(outlet.longest(), 1472);
        let sent: Vec<Vec<u8>> = (0..50u8).map(|number| vec![number; if number == 49 { 10 } else { 1000 }]).collect();
        outlet.send(&sent.concat(), 1000).await.unwrap();
        let mut sender = None;
        for inlet in [&mut inlet, &mut other] {
            let mut heard = Vec::new();
            while heard.len() < sent.len() {
                inlet
                    .receive(|bytes, from| {
                        heard.push(bytes.to_vec());
                        sender = Some(from);
                    })
                    .await
                    .unwrap();
            }
            assert!(heard == sent);
        }
        inlet.answer(b"first", sender.unwrap()).await.unwrap();
        other.answer(b"second", sender.unwrap()).await.unwrap();
        let mut answers = Vec::new();
        while answers.len() < 2 {
            outlet.receive(|bytes, _| answers.push(bytes.to_vec())).await.unwrap();
        }
        answers.sort_unstable();
        assert_eq!(answers, [b"first".to_vec(), b"second".to_vec()]);
        assert_eq!(inlet.overflowed(), 0);
    }

    #[tokio::test]
    async fn what_a_full_queue_loses_is_counted() {
        let group = group(2);
        let inlet = Inlet::join(group, Some("lo")).unwrap();
        let outlet = Outlet::open(group, &leaving()).unwrap();
        let batch = vec![7; 1400 * BATCH];
        // More than the queue can hold, if the system allows all of it.
        for _ in 0..3 * RECEIVE_BUFFER / batch.len() {
            outlet.send(&batch, 1400).await.unwrap();
        }
        assert!(inlet.overflowed() > 0);
    }

    #[tokio::test]
    async fn what_fits_follows_from_the_path() {
        let open = |mtu| Outlet::open(group(3), &Leaving { mtu: Some(mtu), ..leaving() }).unwrap().longest();
        assert_eq!((open(9000), open(1280), open(1)), (8972, 1252, 0));
        let nowhere = Leaving { interface: Some("no-such-one".to_owned()), ..leaving() };
        assert_eq!(Outlet::open(group(3), &nowhere).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(Inlet::join(group(3), Some("192.0.2.1")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn losses_are_found_in_the_table_of_sockets() {
        let line = "  901: 014DFFEF:1B58 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 \
                    0000000000000000 42";
        assert_eq!(drops_of(line, 4711), Some(42));
        assert_eq!(drops_of(line, 4712), None);
        let head = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode \
                    ref pointer drops";
        assert_eq!(drops_of(head, 0), None);
    }
}
