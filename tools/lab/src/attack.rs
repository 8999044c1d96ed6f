//! Hostile connections of every kind, for tests and measurements: what comes in at an open port.
//!
//! | kind | does |
//! | --- | --- |
//! | noise | sends random bytes instead of a negotiation |
//! | half | negotiates half, and says nothing any more |
//! | long | announces an option of 64 KiB and sends half of it |
//! | tls | begins with a TLS handshake where none is |
//! | guess | asks the admin API with a token that is none |
//! | slow | asks for 32 MiB again and again, and reads nothing |
//! | gone | negotiates well and vanishes with requests under way |
//! | denied | asks for exports that it may not have, or that there are not |
//!
//! Bytes only: nothing of the library, so that it stays wrong where the library becomes right.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Whom to attack.
#[derive(Debug, Clone)]
pub(crate) struct Victim {
    /// The port of the NBD server.
    pub(crate) nbd: SocketAddr,
    /// That of its admin API, if it has one.
    pub(crate) admin: Option<SocketAddr>,
    /// An export that everybody may have, of 32 MiB at least.
    pub(crate) open: String,
    /// One that the attacker may not have.
    pub(crate) shut: String,
}

/// Kinds of connections.
pub(crate) const KINDS: [&str; 8] = ["noise", "half", "long", "tls", "guess", "slow", "gone", "denied"];

/// What came of an attack.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Connections that were made, by kind.
    pub(crate) made: [AtomicU64; KINDS.len()],
    /// Connections that the system or the server refused.
    pub(crate) refused: AtomicU64,
    /// Bytes that came back on connections of the kind `denied` and that were no refusal.
    pub(crate) leaks: AtomicU64,
    /// Guesses that were answered otherwise than with 401.
    pub(crate) guessed: AtomicU64,
}

impl Outcome {
    pub(crate) fn total(&self) -> u64 {
        self.made.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// How long an attacker waits for a byte.
const PATIENCE: Duration = Duration::from_millis(500);
/// Connections that each attacker keeps open, newest last.
const KEPT: usize = 1;

/// Makes `count` connections of all kinds in turns, `at_once` at a time, unless it is told to stop before.
pub(crate) fn run(victim: &Victim, count: u64, at_once: u64, stop: &AtomicBool, outcome: &Outcome) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                let mut kept = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if kept.len() >= KEPT {
                        kept.remove(0);
                    }
                    kept.extend(one(victim, number, outcome));
                }
            });
        }
    });
}

/// One connection; given back if it is to be kept for a while.
fn one(victim: &Victim, number: u64, outcome: &Outcome) -> Option<TcpStream> {
    let kind = usize::try_from(number).unwrap_or(0) % KINDS.len();
    let admin = victim.admin.filter(|_| KINDS[kind] == "guess");
    let connect = || -> io::Result<TcpStream> {
        let socket = TcpStream::connect_timeout(&admin.unwrap_or(victim.nbd), Duration::from_secs(10))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket)
    };
    let Ok(mut socket) = connect() else {
        outcome.refused.fetch_add(1, Ordering::Relaxed);
        return None;
    };
    outcome.made[kind].fetch_add(1, Ordering::Relaxed);
    // Whether the server goes on listening is its own affair.
    match KINDS[kind] {
        "noise" => send_and_read(&mut socket, &noise(number, 300)).ok().and(None),
        "half" => {
            let _ = socket.write_all(&[&[0, 0, 0, 3][..], &option(7, &[0; 6])[..9]].concat());
            Some(socket)
        }
        "long" => {
            let bytes = [&[0, 0, 0, 3][..], &header(7, 65_536), &vec![b'x'; 32_768]].concat();
            let _ = socket.write_all(&bytes);
            Some(socket)
        }
        "tls" => {
            let hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &noise(number, 501)].concat();
            send_and_read(&mut socket, &hello).ok().and(None)
        }
        "guess" => {
            let token = format!("{:032x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let request =
                format!("GET /v1/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n");
            if victim.admin.is_some()
                && let Ok(answer) = send_and_read(&mut socket, request.as_bytes())
                && !answer.is_empty()
                && !answer.starts_with(b"HTTP/1.1 401 ")
            {
                outcome.guessed.fetch_add(1, Ordering::Relaxed);
            }
            None
        }
        "slow" => {
            let _ = enter(&mut socket, &victim.open);
            let reads: Vec<u8> = (0..16).flat_map(|cookie| request(cookie, 0, 32 << 20)).collect();
            let _ = socket.write_all(&reads);
            Some(socket)
        }
        "gone" => {
            let _ = enter(&mut socket, &victim.open);
            let _ = socket.write_all(&request(1, 4096, 65_536));
            let _ = socket.shutdown(Shutdown::Both);
            None
        }
        _ => {
            let names = [victim.shut.clone(), format!("{}@profile", victim.shut), "\u{1b}[31m\nno such".repeat(20)];
            let asks = names.iter().flat_map(|name| option(6, &info(name)));
            let bytes: Vec<u8> = [0, 0, 0, 3].into_iter().chain(asks).chain(option(2, b"")).collect();
            if let Ok(answer) = send_and_read(&mut socket, &bytes) {
                let names_it = answer.windows(victim.shut.len()).any(|part| part == victim.shut.as_bytes());
                outcome.leaks.fetch_add(u64::from(names_it), Ordering::Relaxed);
                let told = answer.windows(4).filter(|word| *word == 3_u32.to_be_bytes()).count();
                outcome.leaks.fetch_add(u64::try_from(told).unwrap_or(u64::MAX), Ordering::Relaxed);
            }
            None
        }
    }
}

/// Negotiates well: EXPORT_NAME, which has no answer but the size.
fn enter(socket: &mut TcpStream, export: &str) -> io::Result<()> {
    socket.write_all(&[&[0, 0, 0, 3][..], &option(1, export.as_bytes())].concat())?;
    socket.read_exact(&mut [0; 18 + 10])
}

/// Sends, says that this is all, and reads what comes within a while.
fn send_and_read(socket: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    socket.write_all(bytes)?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    let _ = socket.take(1 << 20).read_to_end(&mut answer);
    Ok(answer)
}

fn header(number: u32, length: u32) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &length.to_be_bytes()].concat()
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [header(number, u32::try_from(data.len()).unwrap_or(0)), data.to_vec()].concat()
}

/// The data of `NBD_OPT_INFO` for an export.
fn info(name: &str) -> Vec<u8> {
    [&u32::try_from(name.len()).unwrap_or(0).to_be_bytes(), name.as_bytes(), &[0, 0]].concat()
}

/// A read.
fn request(cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Bytes that look like nothing (xorshift).
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}
