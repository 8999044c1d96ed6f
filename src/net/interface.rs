//! Network interfaces: which there are, and what a program can know of them without asking netlink.
//!
//! Names come from `/proc/thread-self/net`, which is that of the caller's network namespace; addresses by what the system
//! would send from. `/sys` may be that of another namespace, so what it says counts only if the indexes agree.
//!
//! Owns: finding an interface that an operator named. Does not own: what is done with it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use rustix::net::netdevice::name_to_index;
use socket2::{Domain, Socket, Type};

/// Interfaces that are looked at; a host of containers may have thousands.
const MOST: usize = 64;

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    /// Its name.
    pub(super) name: String,
    /// Its number, from 1 on.
    pub(super) index: u32,
    /// The address from which it sends, if it has one.
    pub(super) v4: Option<Ipv4Addr>,
    /// All of these.
    pub(super) v6: Vec<Ipv6Addr>,
}

impl Interface {
    fn named(name: &str, probe: &Socket) -> io::Result<Self> {
        let index = name_to_index(probe, name)?;
        Ok(Self { name: name.to_owned(), index, v4: address_of(name), v6: v6_addresses(name) })
    }

    /// Whether it is the one that leads back to this host.
    pub(super) fn is_loopback(&self) -> bool {
        self.v4.is_some_and(|address| address.is_loopback()) || self.v6.iter().any(Ipv6Addr::is_loopback)
    }

    fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4 == Some(address),
            IpAddr::V6(address) => self.v6.contains(&address),
        }
    }

    /// Bytes of the longest packet that it takes, if that can be known.
    pub(super) fn mtu(&self) -> Option<u16> {
        let number =
            |what| fs::read_to_string(format!("/sys/class/net/{}/{what}", self.name)).ok()?.trim().parse().ok();
        let index: u32 = number("ifindex")?;
        let mtu: u32 = number("mtu")?;
        (index == self.index).then(|| u16::try_from(mtu).unwrap_or(u16::MAX))
    }
}

/// All interfaces, [`MOST`] at most.
pub(super) fn all() -> io::Result<Vec<Interface>> {
    let list = fs::read_to_string("/proc/thread-self/net/dev")?;
    let probe = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let names = list.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    // One that goes away meanwhile is left out.
    Ok(names.take(MOST).filter_map(|name| Interface::named(name, &probe).ok()).collect())
}

/// The interface with this name, or with this address.
pub(super) fn find(text: &str) -> io::Result<Interface> {
    let none = || io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {text:?}"));
    match text.parse::<IpAddr>() {
        Ok(address) => all()?.into_iter().find(|interface| interface.has(address)).ok_or_else(none),
        Err(_) => {
            let probe = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            Interface::named(text, &probe).map_err(|_| none())
        }
    }
}

/// The interface by which the route to `target` leads; `None`: there is no route.
pub(super) fn towards(target: SocketAddr) -> io::Result<Option<Interface>> {
    let socket = Socket::new(Domain::for_address(target), Type::DGRAM, None)?;
    if socket.connect(&target.into()).is_err() {
        return Ok(None);
    }
    let from = socket.local_addr()?.as_socket().map(|address| address.ip());
    Ok(all()?.into_iter().find(|interface| from.is_some_and(|from| interface.has(from))))
}

/// The address from which datagrams to a group would leave by an interface. A connection of a datagram socket sends
/// nothing.
fn address_of(name: &str) -> Option<Ipv4Addr> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).ok()?;
    socket.bind_device(Some(name.as_bytes())).ok()?;
    socket.connect(&SocketAddrV4::new(Ipv4Addr::new(224, 0, 0, 1), 9).into()).ok()?;
    let address = *socket.local_addr().ok()?.as_socket_ipv4()?.ip();
    (!address.is_unspecified()).then_some(address)
}

fn v6_addresses(name: &str) -> Vec<Ipv6Addr> {
    // Absent where IPv6 is switched off.
    let list = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    list.lines().filter_map(|line| parse_v6(line, name)).collect()
}

/// Reads a line of `if_inet6`: address, index, prefix length, scope, flags, name.
fn parse_v6(line: &str, name: &str) -> Option<Ipv6Addr> {
    let mut words = line.split_whitespace();
    let address = u128::from_str_radix(words.next()?, 16).ok()?;
    (words.nth(4)? == name).then(|| Ipv6Addr::from_bits(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_found_by_name_and_by_address() {
        let by_name = find("lo").unwrap();
        assert_eq!(by_name.v4, Some(Ipv4Addr::LOCALHOST));
        assert!(by_name.is_loopback() && by_name.index > 0);
        assert_eq!(find("127.0.0.1").unwrap(), by_name);
        assert!(all().unwrap().contains(&by_name));
        for text in ["", "no-such-one", "192.0.2.1", "2001:db8::1"] {
            assert_eq!(find(text).unwrap_err().kind(), io::ErrorKind::NotFound, "{text}");
        }
        let route = towards(SocketAddr::from((Ipv4Addr::LOCALHOST, 9))).unwrap();
        assert_eq!(route, Some(by_name));
    }

    #[test]
    fn addresses_of_the_sixth_version_are_read() {
        let line = "fe8000000000000000000000000000ab 02 40 20 80     eth0";
        assert_eq!(parse_v6(line, "eth0"), Some("fe80::ab".parse().unwrap()));
        assert_eq!(parse_v6(line, "eth1"), None);
        assert_eq!(parse_v6("zz 02", "eth0"), None);
    }
}
