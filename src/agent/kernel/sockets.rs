//! The sockets of this system, as `/proc/net` tells of them (`proc(5)`): which of them are the kernel's own.
//!
//! A socket that was handed to the kernel's NBD client and closed here keeps its inode, which no process has open. One
//! that the kernel did not take is gone by then.
//!
//! Limits: [`MAX_LINES`] lines of a table are read. Only the sockets of this network namespace are seen, and only the
//! processes of this PID namespace.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Lines of one table that are read.
const MAX_LINES: usize = 1 << 20;
const ESTABLISHED: u8 = 1;

/// A TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tcp {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) inode: u64,
}

/// All established TCP connections.
pub(super) fn established() -> io::Result<Vec<Tcp>> {
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        found.extend(lines(table)?.filter_map(|line| parse_tcp(&line)));
    }
    Ok(found)
}

/// Those of them that no process has open.
pub(super) fn of_kernel() -> io::Result<Vec<Tcp>> {
    let mut found = established()?;
    let of_processes = inodes_of_processes()?;
    found.retain(|socket| !of_processes.contains(&socket.inode));
    Ok(found)
}

/// Whether the socket with this inode is there: a TCP connection that is established, or a unix socket.
pub(super) fn is_there(inode: u64) -> io::Result<bool> {
    if lines("/proc/net/unix")?.any(|line| parse_unix(&line) == Some(inode)) {
        return Ok(true);
    }
    Ok(established()?.iter().any(|socket| socket.inode == inode))
}

/// The lines of a table but its first. A table that is missing has none (there is no IPv6, or no unix sockets).
fn lines(path: &str) -> io::Result<impl Iterator<Item = String>> {
    let file = match File::open(path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let lines = file.into_iter().flat_map(|file| BufReader::new(file).lines().map_while(Result::ok));
    Ok(lines.skip(1).take(MAX_LINES))
}

/// A line of `/proc/net/tcp` or `tcp6`, if it is of an established connection that somebody has.
fn parse_tcp(line: &str) -> Option<Tcp> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (parse_address(fields.next()?)?, parse_address(fields.next()?)?);
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let inode = fields.nth(5)?.parse().ok()?;
    (state == ESTABLISHED && inode != 0).then_some(Tcp { local, remote, inode })
}

/// An address as the kernel prints it: words of network order as numbers of this machine, and the port.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = [0; 16];
    let length = address.len() / 2;
    if !address.is_ascii() || !matches!(address.len(), 8 | 32) {
        return None;
    }
    for (word, digits) in bytes.chunks_exact_mut(4).zip(address.as_bytes().chunks_exact(8)) {
        let digits = std::str::from_utf8(digits).ok()?;
        word.copy_from_slice(&u32::from_str_radix(digits, 16).ok()?.to_ne_bytes());
    }
    let address: IpAddr = match length {
        4 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        _ => Ipv6Addr::from(bytes).into(),
    };
    Some(SocketAddr::new(address, port))
}

/// The inode in a line of `/proc/net/unix`.
fn parse_unix(line: &str) -> Option<u64> {
    line.split_ascii_whitespace().nth(6)?.parse().ok()
}

fn inodes_of_processes() -> io::Result<HashSet<u64>> {
    let mut inodes = HashSet::new();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        if !process.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        // It may have ended meanwhile.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(target) = fs::read_link(descriptor.path()) else { continue };
            inodes.extend(target.to_str().and_then(parse_link));
        }
    }
    Ok(inodes)
}

/// What `/proc/PID/fd` says of a socket: `socket:[INODE]`.
fn parse_link(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    #[cfg(target_endian = "little")]
    #[test]
    fn addresses_are_words_of_this_machine() {
        assert_eq!(parse_address("0100007F:2A39"), Some("127.0.0.1:10809".parse().unwrap()));
        let loopback = "00000000000000000000000001000000:0016";
        assert_eq!(parse_address(loopback), Some("[::1]:22".parse().unwrap()));
        for text in ["", "0100007F", "0100007:1", "0100007F:", "0100007F:10000", "0100007é:1", "+100007F:1G"] {
            assert_eq!(parse_address(text), None, "{text}");
        }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn only_established_connections_that_somebody_has_count() {
        let line = |state, inode| {
            format!(
                "   2: 0100007F:0FA0 0100007F:2A39 {state} 00000000:00000000 02:00000123 00000000     0        0 {inode} 2 0000"
            )
        };
        assert_eq!(parse_tcp(&line("01", 77)).unwrap().inode, 77);
        for (state, inode) in [("08", 77), ("06", 77), ("01", 0)] {
            assert_eq!(parse_tcp(&line(state, inode)), None);
        }
        assert_eq!(parse_tcp("  sl  local_address rem_address"), None);
    }

    #[test]
    fn sockets_of_this_process_are_there_until_they_are_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (unix, _other) = UnixStream::pair().unwrap();
        let inode =
            |fd: &dyn std::os::fd::AsRawFd| fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino();
        let (tcp_inode, unix_inode) = (inode(&stream), inode(&unix));
        assert!(is_there(tcp_inode).unwrap() && is_there(unix_inode).unwrap());
        assert!(of_kernel().unwrap().iter().all(|socket| socket.inode != tcp_inode), "a process has it");
        drop((stream, unix));
        assert!(!is_there(tcp_inode).unwrap() && !is_there(unix_inode).unwrap());
    }
}
