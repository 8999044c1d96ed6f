//! Says wrong things in a group, fast: garbage, and what was heard, cut off, changed and said again; and, with tags that
//! are right, symbols that are wrong, needs of nobody, and words that the sender never said.
//!
//! It runs on a host of its own (`lab forge` starts it there) and says at the end what it sent.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use headwater::cast::form::{self, Announce, Datagram, Head, Key, Need, Phase, Report, Run, Standing, Word};
use headwater::cast::{ReceiverId, SessionId};
use headwater::clock;
use headwater::export::conformance::Random;
use headwater::manifest::ImageId;
use headwater::units::{to_u64, to_usize};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The group.
    #[arg(long)]
    group: SocketAddrV4,
    /// The address of the interface.
    #[arg(long)]
    interface: Ipv4Addr,
    /// The image that tags are made with.
    #[arg(long)]
    image: ImageId,
    /// Datagrams.
    #[arg(long)]
    count: u64,
    /// Datagrams per second.
    #[arg(long)]
    pace: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Datagrams that are heard first, to have something to change.
const HEARD: usize = 512;
/// Datagrams that are sent at once before others have a turn.
const BURST: u64 = 32;
/// How long nothing may be heard.
const PATIENCE: Duration = Duration::from_secs(60);
/// Indexes of symbols and blocks that are lied about; some are outside of any session.
const MOST_BLOCKS: u64 = 300;
const MOST_SYMBOLS: u64 = 1000;
const NOBODY: ReceiverId = ReceiverId([0xee; 16]);

/// Sends what it is told to.
#[expect(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, options.group.port()))?;
    socket.join_multicast_v4(options.group.ip(), &options.interface)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut liar = hear(&socket, options)?;
    let start = clock::now();
    for count in 0..options.count {
        let bytes = liar.say(count);
        // What does not fit a queue is lost, as on any way.
        let _ = socket.send_to(&bytes, options.group);
        if count % BURST == 0 {
            let due = start
                + Duration::from_secs(1).mul_f64(load::process::to_f64(count) / load::process::to_f64(options.pace));
            std::thread::sleep(due.saturating_duration_since(clock::now()));
        }
    }
    println!("sent {} in {:.1} s", options.count, clock::now().duration_since(start).as_secs_f64());
    Ok(())
}

/// What it knows.
struct Liar {
    random: Random,
    heard: Vec<Vec<u8>>,
    key: Key,
    session: SessionId,
    announce: Announce,
}

/// Listens until an announcement and enough else was heard.
fn hear(socket: &UdpSocket, options: &Options) -> anyhow::Result<Liar> {
    let (mut heard, mut opened) = (Vec::new(), None);
    loop {
        let mut bytes = vec![0; 65_536];
        let length = socket.recv(&mut bytes).context("nobody sends to the group")?;
        bytes.truncate(length);
        if let Ok((Head { session, .. }, Some(image))) = form::peek(&bytes)
            && image == options.image
        {
            let key = Key::new(image, session);
            if let Ok((_, Datagram::Announce(announce))) = form::decode(&bytes, &key) {
                opened = Some((key.clone(), session, announce));
            }
        }
        heard.push(bytes);
        if heard.len() >= HEARD
            && let Some((key, session, announce)) = opened
        {
            return Ok(Liar { random: Random::new(options.seed), heard, key, session, announce });
        }
        heard.truncate(HEARD);
    }
}

impl Liar {
    /// The next lie: one of five kinds in turn.
    fn say(&mut self, count: u64) -> Vec<u8> {
        let heard = to_usize(self.random.below(to_u64(self.heard.len())));
        let mut bytes = self.heard[heard].clone();
        let length = to_u64(bytes.len());
        match count % 5 {
            0 => self.noise(count % 1500),
            1 => {
                bytes.truncate(to_usize(self.random.below(length + 1)));
                bytes
            }
            2 => {
                let bit = self.random.below(length * 8);
                bytes[to_usize(bit / 8)] ^= 1 << (bit % 8);
                bytes
            }
            3 => bytes,
            _ => self.tagged(count),
        }
    }

    fn noise(&mut self, length: u64) -> Vec<u8> {
        let words = length.div_ceil(8);
        let mut bytes: Vec<u8> = (0..words).flat_map(|_| self.random.number().to_le_bytes()).collect();
        bytes.truncate(to_usize(length));
        bytes
    }

    /// With a tag that is right.
    fn tagged(&mut self, count: u64) -> Vec<u8> {
        let wrong = self.noise(self.announce.terms.symbol.into());
        let small = |random: &mut Random, bound| u32::try_from(random.below(bound)).unwrap_or(0);
        let block = small(&mut self.random, MOST_BLOCKS);
        let need = Need { first: block, count: 9, symbols: 200 };
        let datagram = match count / 5 % 500 {
            0 => Datagram::Word(Word { coming: vec![need], unicast: vec![need], dropped: vec![NOBODY] }),
            1 => Datagram::Report(Report {
                receiver: NOBODY,
                standing: Standing::Joined,
                done: 0,
                seen: 1,
                lost: 9,
                overflowed: 0,
                heard: 0,
                needs: vec![need],
            }),
            2 => Datagram::Page(form::Page { page: 0, runs: vec![Run { first: 3, count: 1 }] }),
            3 => Datagram::Announce(Announce { phase: Phase::Waiting, ..self.announce }),
            _ => {
                let index = u16::try_from(self.random.below(MOST_SYMBOLS)).unwrap_or(0);
                Datagram::Symbol { block, index, bytes: &wrong }
            }
        };
        let (session, number) = (self.session, small(&mut self.random, u64::from(u32::MAX)));
        let mut bytes = Vec::new();
        form::encode(Head { session, number }, &datagram, &self.key, &mut bytes);
        bytes
    }
}
