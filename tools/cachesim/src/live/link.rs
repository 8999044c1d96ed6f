//! A link of limited rate: a relay between unix sockets that all connections share.
//!
//! What comes from the server leaves when a link of that rate would have brought it. Requests are not held up.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use headwater::clock;

/// What may leave at once after a pause: what a real link's queue would have taken meanwhile.
const BURST: Duration = Duration::from_millis(2);
/// Bytes that are passed on at once.
const PIECE: usize = 64 << 10;

/// The sending side of a link.
#[derive(Debug)]
struct Line {
    bytes_per_second: f64,
    /// When all that was sent so far has left.
    free_at: Mutex<Instant>,
}

impl Line {
    /// Waits until so many bytes have left.
    fn send(&self, bytes: usize) {
        let now = clock::now();
        let leaves_at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
            *free_at = (*free_at).max(now - BURST) + takes;
            *free_at
        };
        std::thread::sleep(leaves_at.saturating_duration_since(now));
    }
}

/// Listens at `at` and passes on to `server`, until this process ends.
pub(super) fn open(at: &Path, server: &Path, bytes_per_second: f64) -> anyhow::Result<()> {
    let listener = UnixListener::bind(at).with_context(|| at.display().to_string())?;
    let line = Arc::new(Line { bytes_per_second, free_at: Mutex::new(clock::now()) });
    let server = server.to_owned();
    thread(move || {
        for client in listener.incoming().flatten() {
            // Whoever cannot be connected finds out when its socket is closed.
            let _ = relay(client, server.clone(), &line);
        }
    })
}

fn thread(body: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new().name("link".into()).spawn(body).map(drop).context("starting a thread")
}

fn relay(client: UnixStream, server: PathBuf, line: &Arc<Line>) -> anyhow::Result<()> {
    let server = UnixStream::connect(server)?;
    let (to_server, to_client) = (server.try_clone()?, client.try_clone()?);
    let line = Arc::clone(line);
    thread(move || pass(client, to_server, |_| {}))?;
    thread(move || pass(server, to_client, |bytes| line.send(bytes)))
}

/// Either side may close; then both are closed.
fn pass(mut from: UnixStream, mut to: UnixStream, wait: impl Fn(usize)) {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        wait(length);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
