//! Multicast groups on the loopback interface: who else hears them, and who says what is not true.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use headwater::cast::form::{self, Announce, Datagram, Head, Key};
use headwater::cast::{ReceiverId, SessionId};
use headwater::manifest::ImageId;
use socket2::{Domain, Protocol, Socket, Type};

use super::SOON;

/// A group that only this process has.
pub(crate) fn own_group() -> SocketAddrV4 {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(239, 212, middle, low), 7000 + u16::from(high))
}

/// A socket that hears a group and can send to it.
pub(crate) struct Member {
    socket: UdpSocket,
    group: SocketAddrV4,
}

impl Member {
    pub(crate) fn join(group: SocketAddrV4) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::V4(group).into()).unwrap();
        socket.join_multicast_v4(group.ip(), &Ipv4Addr::LOCALHOST).unwrap();
        socket.set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
        socket.set_multicast_loop_v4(true).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        Self { socket: socket.into(), group }
    }

    pub(crate) fn send(&self, bytes: &[u8]) {
        // What does not fit a queue is lost, as on any way.
        let _ = self.socket.send_to(bytes, self.group);
    }

    /// The next datagram; `None`: there is none for a tenth of a second, and nobody is patient.
    pub(crate) fn try_hear(&self) -> Option<Vec<u8>> {
        self.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut bytes = vec![0; 65_536];
        let count = self.socket.recv(&mut bytes).ok()?;
        bytes.truncate(count);
        Some(bytes)
    }

    /// Waits for an announcement, and gives back what opens its session.
    pub(crate) fn hear_announcement(&self, image: ImageId) -> (Key, SessionId, Announce) {
        let mut bytes = vec![0; 65_536];
        loop {
            let count = self.socket.recv(&mut bytes).expect("somebody sends to the group");
            let Ok((Head { session, .. }, Some(of))) = form::peek(&bytes[..count]) else { continue };
            let key = Key::new(image, session);
            if let (true, Ok((_, Datagram::Announce(announce)))) = (of == image, form::decode(&bytes[..count], &key)) {
                return (key, session, announce);
            }
        }
    }
}

/// A datagram with a tag that is right.
pub(crate) fn tagged(session: SessionId, number: u32, datagram: &Datagram<'_>, key: &Key) -> Vec<u8> {
    let mut bytes = Vec::new();
    form::encode(Head { session, number }, datagram, key, &mut bytes);
    bytes
}

/// A receiver that there is not.
pub(crate) const NOBODY: ReceiverId = ReceiverId([0xee; 16]);
