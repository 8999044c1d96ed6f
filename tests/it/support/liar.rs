//! A server that is wrong now and then, in well-formed replies or in the middle of one.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use bytes::{Buf, BytesMut};
use headwater::nbd::handshake::server::{Directory, Progress, ServerHandshake};
use headwater::nbd::reply::{self, Last, ReplyTo};
use headwater::nbd::wire::{TransmissionFlags, command};
use headwater::nbd::{BlockSizes, Listing, request};

use super::{Scratch, noise};

/// What it does instead of answering rightly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// One bit is wrong.
    Flip,
    /// Zeroes in place of data.
    Zeros,
    /// A hole in place of data.
    Hole,
    /// The bytes of another image.
    Other,
    /// The connection ends in the middle of the reply.
    Truncate,
}

/// An image, and what a liar does to it.
struct Plan {
    contents: Vec<u8>,
    /// What it says of its identity, and the manifest that it has.
    known: Option<(String, Vec<u8>)>,
    /// Each so many-th read of the image is answered with a lie.
    every: u64,
    lie: Lie,
    reads: AtomicU64,
    lies: AtomicU64,
}

/// A server on a unix socket with one export, `image`. It ends with the test.
pub(crate) struct Liar {
    plan: Arc<Plan>,
    uri: String,
}

impl Liar {
    /// `known`: the identity that it announces, and the manifest that it passes through.
    pub(crate) fn start(
        scratch: &Scratch,
        name: &str,
        contents: &[u8],
        known: Option<(String, Vec<u8>)>,
        (every, lie): (u64, Lie),
    ) -> Self {
        let path = scratch.path(name);
        let listener = UnixListener::bind(&path).unwrap();
        let (reads, lies) = (AtomicU64::new(0), AtomicU64::new(0));
        let plan = Arc::new(Plan { contents: contents.to_vec(), known, every, lie, reads, lies });
        let serving = Arc::clone(&plan);
        thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let plan = Arc::clone(&serving);
                thread::spawn(move || plan.serve(socket));
            }
        });
        Self { plan, uri: format!("nbd+unix:///image?socket={}", path.display()) }
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// How often it has lied.
    pub(crate) fn lies(&self) -> u64 {
        self.plan.lies.load(Ordering::SeqCst)
    }
}

impl Directory for Plan {
    /// Whether it is the manifest.
    type Export = bool;

    fn find(&self, name: &str) -> Option<(bool, Listing)> {
        let is_manifest = name == "image@manifest";
        let length = if is_manifest { self.known.as_ref()?.1.len() } else { self.contents.len() };
        let fact = |(identity, _): &(String, Vec<u8>)| format!("x-headwater:image={identity}");
        let listing = Listing {
            name: name.to_owned(),
            description: String::new(),
            size: length as u64,
            flags: TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN,
            block_sizes: BlockSizes::DEFAULT,
            contexts: Vec::new(),
            facts: self.known.iter().filter(|_| !is_manifest).map(fact).collect(),
        };
        (is_manifest || name == "image").then_some((is_manifest, listing))
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![("image".to_owned(), String::new())]
    }

    fn is_draining(&self) -> bool {
        false
    }
}

impl Plan {
    /// Serves one client until either hangs up.
    fn serve(&self, mut socket: UnixStream) -> Option<()> {
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        let mut handshake = ServerHandshake::new(&mut output);
        let negotiated = loop {
            let progress = handshake.advance(&mut input, self, &mut output).ok()?;
            send(&mut socket, &mut output)?;
            match progress {
                Progress::Continue => {}
                Progress::Finished(negotiated) => break negotiated,
                Progress::Aborted | Progress::StartTls => return None,
                Progress::NeedInput => receive(&mut socket, &mut input)?,
            }
        };
        let (mode, is_manifest) = (negotiated.replies, negotiated.export);
        loop {
            while let Some(header) = request::decode(&input, mode).ok()? {
                input.advance(request::header_length(mode));
                if header.command != command::READ {
                    return None;
                }
                let to = ReplyTo { cookie: header.cookie, offset: header.offset };
                let (start, length) = (header.offset as usize, header.length as usize);
                let source = if is_manifest { &self.known.as_ref()?.1 } else { &self.contents };
                let mut data = source.get(start..start + length)?.to_vec();
                let lie = if is_manifest { None } else { self.next_lie() };
                match lie {
                    None | Some(Lie::Truncate) => {}
                    Some(Lie::Flip) => data[length / 2] ^= 0x10,
                    Some(Lie::Zeros) => data.fill(0),
                    Some(Lie::Other) => data = noise(length, 0x0711),
                    Some(Lie::Hole) => {
                        let length = u32::try_from(length).unwrap();
                        reply::put_hole(&mut output, mode, to, header.offset, length, Last::Yes);
                        continue;
                    }
                }
                reply::put_data_header(&mut output, mode, to, header.offset, header.length, Last::Yes);
                if lie == Some(Lie::Truncate) {
                    output.extend_from_slice(&data[..length / 2]);
                    send(&mut socket, &mut output);
                    return None;
                }
                output.extend_from_slice(&data);
            }
            send(&mut socket, &mut output)?;
            receive(&mut socket, &mut input)?;
        }
    }

    fn next_lie(&self) -> Option<Lie> {
        let number = self.reads.fetch_add(1, Ordering::SeqCst) + 1;
        number.is_multiple_of(self.every).then(|| {
            self.lies.fetch_add(1, Ordering::SeqCst);
            self.lie
        })
    }
}

fn send(socket: &mut UnixStream, output: &mut BytesMut) -> Option<()> {
    let result = socket.write_all(output);
    output.clear();
    result.ok()
}

fn receive(socket: &mut UnixStream, input: &mut BytesMut) -> Option<()> {
    let mut buffer = [0; 16 << 10];
    let count = socket.read(&mut buffer).ok()?;
    input.extend_from_slice(&buffer[..count]);
    (count > 0).then_some(())
}
