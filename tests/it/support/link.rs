//! A link between two servers that counts, stops and breaks on command.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use headwater::nbd::Uri;
use headwater::nbd::uri::Address;

/// A TCP port that leads to a unix socket.
pub(crate) struct Link {
    shared: Arc<Shared>,
    port: u16,
    export: String,
}

struct Shared {
    target: PathBuf,
    /// Bytes that came from the target.
    received: AtomicU64,
    /// Whether bytes from the target are held back.
    held: Mutex<bool>,
    released: Condvar,
    /// Whether new connections are refused.
    is_down: AtomicBool,
    open: Mutex<Vec<(TcpStream, UnixStream)>>,
}

impl Link {
    /// A link to the server of `uri`, which has a unix socket.
    pub(crate) fn to(uri: &str) -> Self {
        let uri: Uri = uri.parse().unwrap();
        let Address::Unix(target) = uri.address else { panic!("{uri} is not on a unix socket") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            target,
            received: AtomicU64::new(0),
            held: Mutex::new(false),
            released: Condvar::new(),
            is_down: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        thread::Builder::new().spawn(move || accepting.accept(&listener)).unwrap();
        Self { shared, port, export: uri.export }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd://127.0.0.1:{}/{}", self.port, self.export)
    }

    /// Bytes that came over, protocol included.
    pub(crate) fn received(&self) -> u64 {
        self.shared.received.load(Ordering::SeqCst)
    }

    /// Holds back what comes from the target: the peer looks alive and says nothing.
    pub(crate) fn hold(&self) {
        *self.shared.held.lock().unwrap() = true;
    }

    /// Lets go what was held back.
    pub(crate) fn release(&self) {
        *self.shared.held.lock().unwrap() = false;
        self.shared.released.notify_all();
    }

    /// Breaks all connections and refuses new ones.
    pub(crate) fn cut(&self) {
        self.shared.is_down.store(true, Ordering::SeqCst);
        for (client, server) in self.shared.open.lock().unwrap().drain(..) {
            // They may be closed already.
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
        }
    }

    /// Takes connections again.
    pub(crate) fn mend(&self) {
        self.shared.is_down.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming() {
            let Ok(client) = client else { return };
            if self.is_down.load(Ordering::SeqCst) {
                continue;
            }
            let Ok(server) = UnixStream::connect(&self.target) else { continue };
            let mut open = self.open.lock().unwrap();
            open.push((client.try_clone().unwrap(), server.try_clone().unwrap()));
            drop(open);
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::Builder::new()
                .spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                })
                .unwrap();
            let shared = Arc::clone(&self);
            thread::Builder::new().spawn(move || shared.bring(server, client)).unwrap();
        }
    }

    /// Carries bytes from the target to the peer.
    fn bring(&self, mut from: UnixStream, mut to: TcpStream) {
        let mut buffer = [0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            self.received.fetch_add(count as u64, Ordering::SeqCst);
            let held = self.released.wait_while(self.held.lock().unwrap(), |held| *held);
            drop(held.unwrap());
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}
