//! Network interfaces: which there are, and their addresses, as the kernel tells by `rtnetlink(7)`.
//!
//! Owns: finding an interface that an operator named. Does not own: what is done with it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddress};
use socket2::{Domain, Socket, Type};

use crate::units::to_usize;

/// Interfaces that are looked at; a host of containers may have thousands.
const MOST: usize = 4096;

// From `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_link.h`, `linux/if_addr.h` and `linux/if.h`.
const DONE: u16 = 3;
const FAILED: u16 = 2;
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
const REQUEST_DUMP: u16 = 0x301;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const UP: u32 = 1;
const LOOPBACK: u32 = 8;
/// Bytes before the attributes of a message about a link, and about an address.
const LINK_HEAD: usize = 16;
const ADDRESS_HEAD: usize = 8;

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    /// Its name.
    pub(super) name: String,
    /// Its number, from 1 on.
    pub(super) index: u32,
    /// Bytes of the longest packet that it takes.
    pub(super) mtu: u32,
    /// Whether it leads back to this host.
    pub(super) is_loopback: bool,
    /// Whether it is up.
    pub(super) is_up: bool,
    /// Its addresses, the one from which it sends first.
    pub(super) addresses: Vec<IpAddr>,
}

impl Interface {
    /// The IPv4 address from which it sends.
    pub(super) fn v4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }
}

/// All interfaces of this network namespace, [`MOST`] at most.
pub(super) fn all() -> io::Result<Vec<Interface>> {
    let mut interfaces = Vec::new();
    dump(GET_LINK, |kind, message| {
        if kind == NEW_LINK && interfaces.len() < MOST {
            interfaces.extend(read_link(message));
        }
    })?;
    dump(GET_ADDRESS, |kind, message| {
        if kind == NEW_ADDRESS
            && let Some((index, address)) = read_address(message)
            && let Some(interface) = interfaces.iter_mut().find(|interface| interface.index == index)
        {
            interface.addresses.push(address);
        }
    })?;
    Ok(interfaces)
}

/// The interface with this name, or with this address.
pub(super) fn find(text: &str) -> io::Result<Interface> {
    let address = text.parse::<IpAddr>().ok();
    let is_it = |interface: &Interface| {
        interface.name == text || address.is_some_and(|address| interface.addresses.contains(&address))
    };
    let none = || io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {text:?}"));
    all()?.into_iter().find(is_it).ok_or_else(none)
}

/// The interface by which the route to `target` leads; `None`: there is no route. A datagram socket that is connected
/// sends nothing.
pub(super) fn towards(target: SocketAddr) -> io::Result<Option<Interface>> {
    let socket = Socket::new(Domain::for_address(target), Type::DGRAM, None)?;
    if socket.connect(&target.into()).is_err() {
        return Ok(None);
    }
    let Some(from) = socket.local_addr()?.as_socket() else { return Ok(None) };
    Ok(all()?.into_iter().find(|interface| interface.addresses.contains(&from.ip())))
}

/// Asks the kernel for all there is of one thing, and hands each message to `each` with its type.
fn dump(what: u16, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let mut socket = Netlink::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    // The header, and one byte for any address family, filled up to the smallest request.
    let length = 16 + 4u32;
    let words = [&what.to_ne_bytes()[..], &REQUEST_DUMP.to_ne_bytes(), &1u32.to_ne_bytes(), &[0; 8]];
    socket.send(&[&length.to_ne_bytes()[..], &words.concat()].concat(), 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while let Some(length) = word32(rest, 0).map(|length| to_usize(u64::from(length)))
            && let Some(message) = rest.get(16..length)
            && let Some(kind) = word16(rest, 4)
        {
            match kind {
                DONE => return Ok(()),
                FAILED => return Err(io::Error::other("the kernel does not tell its interfaces")),
                _ => each(kind, message),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn read_link(message: &[u8]) -> Option<Interface> {
    let (index, flags) = (word32(message, 4)?, word32(message, 8)?);
    let attributes = || attributes(message.get(LINK_HEAD..).unwrap_or_default());
    let name = attributes().find(|(kind, _)| *kind == LINK_NAME)?.1;
    let name = String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned();
    let mtu = attributes().find(|(kind, _)| *kind == LINK_MTU).and_then(|(_, value)| word32(value, 0))?;
    let (is_loopback, is_up) = (flags & LOOPBACK != 0, flags & UP != 0);
    Some(Interface { name, index, mtu, is_loopback, is_up, addresses: Vec::new() })
}

fn read_address(message: &[u8]) -> Option<(u32, IpAddr)> {
    let index = word32(message, 4)?;
    let attributes = || attributes(message.get(ADDRESS_HEAD..).unwrap_or_default());
    // On a line with two ends, the other one is that of the neighbour.
    let own = attributes().find(|(kind, _)| *kind == LOCAL).or_else(|| attributes().find(|(kind, _)| *kind == ADDRESS));
    let value = own?.1;
    let v4 = || value.try_into().ok().map(|bytes: [u8; 4]| Ipv4Addr::from(bytes).into());
    let v6 = || value.try_into().ok().map(|bytes: [u8; 16]| Ipv6Addr::from(bytes).into());
    Some((index, v4().or_else(v6)?))
}

/// The attributes that a message ends with: their types and values.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(word16(rest, 0)?);
        let (kind, value) = (word16(rest, 2)?, rest.get(4..length)?);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_found_by_name_and_by_address() {
        let by_name = find("lo").unwrap();
        assert_eq!(by_name.v4(), Some(Ipv4Addr::LOCALHOST));
        assert!(by_name.is_loopback && by_name.is_up && by_name.index > 0 && by_name.mtu >= 1500);
        assert_eq!(find("127.0.0.1").unwrap(), by_name);
        assert!(all().unwrap().contains(&by_name));
        for text in ["", "no-such-one", "192.0.2.199", "2001:db8::1"] {
            assert_eq!(find(text).unwrap_err().kind(), io::ErrorKind::NotFound, "{text}");
        }
        let route = towards(SocketAddr::from((Ipv4Addr::LOCALHOST, 9))).unwrap();
        assert_eq!(route, Some(by_name));
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let mut message = vec![0; LINK_HEAD];
        message[4..8].copy_from_slice(&7u32.to_ne_bytes());
        message[8..12].copy_from_slice(&(UP | LOOPBACK).to_ne_bytes());
        for (kind, value) in [(LINK_NAME, &b"eth0\0"[..]), (LINK_MTU, &9000u32.to_ne_bytes())] {
            message.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        let interface = read_link(&message).unwrap();
        assert_eq!((interface.name.as_str(), interface.index, interface.mtu), ("eth0", 7, 9000));
        for length in 0..message.len() {
            assert_eq!(read_link(&message[..length]), None, "{length}");
        }
        assert_eq!(read_address(&message[..LINK_HEAD]), None);
    }
}
