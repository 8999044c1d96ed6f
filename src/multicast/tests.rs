//! Senders and hearers in one process, on the loopback interface. What mirrors hold in the end is what counts, and that
//! nobody asked their upstreams for it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use super::receive::{Audience, Hearing};
use super::send::{Sending, Sent, Session};
use super::terms::Zeroes;
use crate::cast::form::{self, Datagram, Head, Key, Phase, Run, Terms, symbol_for};
use crate::cast::layout::{Layout, pages};
use crate::cast::receiver::State;
use crate::cast::sender::{Repair, Settings};
use crate::cast::{BLOCK, MOST_PARITY, SessionId};
use crate::disk::Preference;
use crate::error::{Error, ErrorKind};
use crate::export::conformance::Random;
use crate::export::memory::Memory;
use crate::export::wrappers::{Fault, Record};
use crate::export::{Export, NodeId, SharedExport, assemble};
use crate::manifest::{ImageId, of_bytes};
use crate::mirror::{Cache, Cause, Mirror, Settings as MirrorSettings, Space, SpaceSettings, Truth};
use crate::net::multicast::{Group, Leaving, Outlet};
use crate::ranges::ByteRange;
use crate::server::ClientTable;
use crate::units::{to_u64, to_usize};
use crate::worker::Workers;

const CHUNK: u32 = 16 << 10;
const SIZE: usize = (5 << 20) + 777;
const LONG: Duration = Duration::from_secs(60);

/// Tests may run at the same time, in one process or several.
fn group() -> Group {
    static NUMBER: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id().to_le_bytes();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let port = 20_000 + u16::from(process[0]) + (u16::from(process[1] & 63) << 8);
    SocketAddr::from((Ipv4Addr::new(239, 255, 80, number), port)).to_string().parse().unwrap()
}

fn leaving() -> Leaving {
    Leaving { interface: Some("lo".to_owned()), hops: 0, mtu: None }
}

/// Bytes of an image, some chunks of which are zero.
fn contents(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed * 2);
    let mut bytes: Vec<u8> = (0..SIZE).map(|_| random.number().to_le_bytes()[3]).collect();
    bytes[100_000..400_000].fill(0);
    bytes
}

/// The mirrors of one host, and what it is told.
#[derive(Debug)]
struct Host {
    mirrors: Vec<Mirror>,
    began: mpsc::Sender<Vec<ByteRange>>,
    ended: mpsc::Sender<State>,
}

impl Audience for Host {
    fn mirror(&self, image: ImageId) -> Option<Mirror> {
        self.mirrors.iter().find(|mirror| mirror.has_manifest() && mirror.image() == Some(image)).cloned()
    }

    fn began(&self, _: &Mirror, _: &Terms, covers: Vec<ByteRange>) {
        self.began.try_send(covers).unwrap();
    }

    fn ended(&self, _: &Mirror, _: &Terms, state: State) {
        self.ended.try_send(state).unwrap();
    }
}

/// A host with one mirror that hears a group.
struct Receiver {
    hearing: Hearing,
    mirror: Mirror,
    lower: Arc<Record>,
    began: mpsc::Receiver<Vec<ByteRange>>,
    ended: mpsc::Receiver<State>,
    _cache: tempfile::TempDir,
}

impl Receiver {
    /// Hears `group`, and loses one datagram of `lose`.
    async fn start(group: Group, contents: &[u8], workers: &Arc<Workers>, lose: Option<u64>) -> Self {
        let cache = tempfile::tempdir().unwrap();
        let lower = Arc::new(Record::new(Arc::new(Memory::holding(contents).read_only())));
        let mirror = open(cache.path().to_owned(), lower.clone(), contents.to_vec(), workers).await;
        let (began, of_began) = mpsc::channel(16);
        let (ended, of_ended) = mpsc::channel(16);
        let host = Arc::new(Host { mirrors: vec![mirror.clone()], began, ended });
        let mut draw = Random::new(77);
        let lose = lose.map(|one_of| Box::new(move |_: &[u8]| draw.below(one_of) == 0) as Box<_>);
        let hearing = Hearing::start_losing(group, Some("lo".to_owned()), host, workers, lose).unwrap();
        Self { hearing, mirror, lower, began: of_began, ended: of_ended, _cache: cache }
    }

    async fn ended(&mut self) -> State {
        tokio::time::timeout(LONG, self.ended.recv()).await.expect("it does not end").unwrap()
    }

    async fn began(&mut self) -> Vec<ByteRange> {
        tokio::time::timeout(LONG, self.began.recv()).await.expect("it does not begin").unwrap()
    }

    /// Everything is here, and right, and nobody was asked.
    async fn check(&self, contents: &[u8], workers: &Workers) {
        assert!(self.mirror.is_complete());
        assert_eq!(self.lower.take_reads(), []);
        assert!(read(&self.mirror, ByteRange::between(0, to_u64(SIZE)), workers).await == contents);
        assert_eq!(self.lower.take_reads(), []);
    }
}

async fn open(root: std::path::PathBuf, lower: SharedExport, contents: Vec<u8>, workers: &Workers) -> Mirror {
    let open = move || async move {
        let cache = Cache::open(&root, "x").unwrap();
        let (header, bytes) = of_bytes(&contents, CHUNK);
        let truth = Truth::fetch(&Memory::holding(bytes).read_only(), header.id, cache.directory()).await.unwrap();
        let space = Space::new(&root, SpaceSettings::default());
        let settings = MirrorSettings { chunk_size: Some(CHUNK), ..MirrorSettings::default() };
        Mirror::open("x", cache, lower, Some(truth), &space, &settings).unwrap()
    };
    workers.ask(open).await.unwrap()
}

async fn read(mirror: &Mirror, range: ByteRange, workers: &Workers) -> Vec<u8> {
    let mirror = mirror.clone();
    workers.ask(move || async move { assemble(&mirror.read(range).await.unwrap()) }).await.unwrap()
}

fn workers() -> Arc<Workers> {
    Arc::new(Workers::start(2, Preference::Auto).unwrap())
}

fn settings(wait_for: u32) -> Settings {
    Settings { rate: 20_000_000, min_rate: 500_000, repair: Repair::Auto, wait_for, patience: LONG, carousel: false }
}

/// A session of an image. Its end comes first, then all the rest.
fn session(contents: &[u8], export: SharedExport, settings: Settings) -> Session {
    let (header, _) = of_bytes(contents, CHUNK);
    let plan = vec![Run { first: 200, count: 100 }, Run { first: 3, count: 10 }];
    let longest = 1472;
    let (plan_pages, digest) = pages(&plan, longest);
    let terms = Terms {
        session: SessionId(u64::from_le_bytes(*NodeId::random().0.first_chunk().unwrap())),
        image: header.id,
        shape: header.shape,
        block: u32::try_from(BLOCK).unwrap(),
        symbol: symbol_for(longest),
        parity: MOST_PARITY,
        pages: u16::try_from(plan_pages.len()).unwrap(),
        plan: digest,
        rest: true,
        deadline: None,
    };
    let is_zero = |chunk: u64| {
        let range = header.shape.range(chunk);
        contents[to_usize(range.start())..to_usize(range.end())].iter().all(|byte| *byte == 0)
    };
    let layout = Arc::new(Layout::new(&terms, plan.clone(), is_zero).unwrap());
    Session { export, terms, plan, layout, settings, clients: ClientTable::default() }
}

fn start(group: Group, session: Session, workers: &Arc<Workers>) -> Sending {
    Sending::start(session, move || Outlet::open(group, &leaving()), workers).unwrap()
}

fn memory(contents: &[u8]) -> SharedExport {
    Arc::new(Memory::holding(contents).read_only())
}

async fn over(sending: &Sending) -> Sent {
    tokio::time::timeout(LONG, sending.over()).await.expect("it does not end");
    sending.status()
}

#[tokio::test]
async fn one_sending_fills_three_mirrors_whatever_is_lost() {
    let (workers, group, contents) = (workers(), group(), contents(1));
    let mut receivers = Vec::new();
    for lose in [None, Some(50), Some(20)] {
        receivers.push(Receiver::start(group, &contents, &workers, lose).await);
    }
    let session = session(&contents, memory(&contents), settings(3));
    let (covers, data) = (session.layout.covers(), session.layout.bytes());
    let sending = start(group, session, &workers);
    for receiver in &mut receivers {
        assert_eq!(receiver.began().await, covers);
        assert_eq!(receiver.ended().await, State::Complete);
        receiver.check(&contents, &workers).await;
    }
    let sent = over(&sending).await;
    assert_eq!((sent.phase, sent.error), (Phase::Ended(true), None));
    assert!(sent.progress.is_complete);
    assert_eq!((sent.progress.listeners.len(), sent.addresses.len()), (3, 3));
    assert!(sent.bytes > data && sent.bytes < data * 2, "{} bytes for {data}", sent.bytes);
    let mended: Vec<_> = receivers.iter().map(|receiver| receiver.hearing.status().sessions[0].mended).collect();
    assert!(mended[1] > 0 && mended[2] > 0, "{mended:?}");
    let brought = receivers[2].mirror.tally(Cause::Multicast).brought_bytes.value();
    assert_eq!(brought, data, "each byte once");
}

#[tokio::test]
async fn forged_datagrams_cost_counters_and_are_mended() {
    let (workers, group, contents) = (workers(), group(), contents(2));
    let mut victim = Receiver::start(group, &contents, &workers, None).await;
    let session = session(&contents, memory(&contents), settings(2));
    let (terms, symbol) = (session.terms, usize::from(session.terms.symbol));
    let attacked = session.layout.ranges(1);
    let sending = start(group, session, &workers);
    victim.began().await;
    // Somebody who knows the image, and so can make right tags.
    let forger = Outlet::open(group, &leaving()).unwrap();
    let key = Key::new(terms.image, terms.session);
    let mut forged = Vec::new();
    for index in 0..20 {
        let datagram = Datagram::Symbol { block: 1, index, bytes: &vec![0xEE; symbol] };
        form::encode(Head { session: terms.session, number: 1 }, &datagram, &key, &mut forged);
    }
    let length = forged.len() / 20;
    forger.send(&forged, length).await.unwrap();
    // Somebody who does not, and somebody who talks of something else.
    let mut tampered = forged[..length].to_vec();
    tampered[length / 2] ^= 1;
    forger.send(&tampered, length).await.unwrap();
    forger.send(b"GET / HTTP/1.1", 14).await.unwrap();
    let mut other = Receiver::start(group, &contents, &workers, None).await;
    assert_eq!(other.ended().await, State::Complete);
    other.check(&contents, &workers).await;
    // The sender may leave to the upstream what one of two lacks: no more than what was attacked.
    assert!(matches!(victim.ended().await, State::Complete | State::Lacking));
    assert!(read(&victim.mirror, ByteRange::between(0, to_u64(SIZE)), &workers).await == contents);
    let is_attacked = |read: &ByteRange| attacked.iter().any(|range| range.intersect(*read) == *read);
    let reads = victim.lower.take_reads();
    assert!(reads.iter().all(is_attacked), "{reads:?}");
    assert_eq!(over(&sending).await.phase, Phase::Ended(true));
    drop(other);
    let heard = victim.hearing.status();
    assert!(heard.forged >= 1 && heard.foreign >= 1, "{heard:?}");
    assert_eq!(heard.sessions[0].wrong, 1, "{heard:?}");
}

#[tokio::test]
async fn a_session_of_another_image_is_nobodys() {
    let (workers, group) = (workers(), group());
    let mut receiver = Receiver::start(group, &contents(3), &workers, None).await;
    let others = contents(4);
    let settings = Settings { patience: Duration::from_millis(300), ..settings(1) };
    let sending = start(group, session(&others, memory(&others), settings), &workers);
    let sent = over(&sending).await;
    assert_eq!(sent.progress.listeners, []);
    assert_eq!(sent.progress.data, 0, "nobody came, nothing was sent");
    // The session that comes after it is heard after it.
    let own = contents(3);
    let sending = start(group, session(&own, memory(&own), self::settings(1)), &workers);
    assert_eq!(receiver.ended().await, State::Complete);
    assert!(over(&sending).await.progress.is_complete);
    let heard = receiver.hearing.status();
    assert!(heard.foreign > 0 && heard.sessions.len() == 1, "{heard:?}");
}

#[tokio::test]
async fn two_senders_of_one_image_do_not_disturb_each_other() {
    let (workers, group, contents) = (workers(), group(), contents(5));
    let mut receiver = Receiver::start(group, &contents, &workers, Some(30)).await;
    let sendings: Vec<_> =
        (0..2).map(|_| start(group, session(&contents, memory(&contents), settings(1)), &workers)).collect();
    assert_eq!([receiver.ended().await, receiver.ended().await], [State::Complete; 2]);
    receiver.check(&contents, &workers).await;
    for sending in &sendings {
        assert_eq!(over(sending).await.phase, Phase::Ended(true));
    }
    assert_eq!(receiver.mirror.tally(Cause::Multicast).brought_bytes.value(), to_u64(SIZE) - zero_bytes(&contents));
}

/// Bytes of chunks that are all zero.
fn zero_bytes(contents: &[u8]) -> u64 {
    let zero = contents.chunks(to_usize(u64::from(CHUNK))).filter(|chunk| chunk.iter().all(|byte| *byte == 0));
    zero.map(|chunk| to_u64(chunk.len())).sum()
}

#[tokio::test]
async fn clients_read_right_bytes_while_it_goes_on() {
    let (workers, group, contents) = (workers(), group(), contents(6));
    let mut receiver = Receiver::start(group, &contents, &workers, Some(40)).await;
    let settings = Settings { rate: 5_000_000, ..settings(1) };
    let sending = start(group, session(&contents, memory(&contents), settings), &workers);
    receiver.began().await;
    let mut draw = Random::new(9);
    let mut reads = 0;
    let state = loop {
        let start = draw.below(to_u64(SIZE - 70_000));
        let range = ByteRange::between(start, start + 1 + draw.below(70_000));
        let wanted = &contents[to_usize(range.start())..to_usize(range.end())];
        assert!(read(&receiver.mirror, range, &workers).await == wanted, "{range:?}");
        reads += 1;
        if let Ok(state) = receiver.ended.try_recv() {
            break state;
        }
    };
    assert_eq!(state, State::Complete);
    assert!(reads > 5 && receiver.mirror.is_complete());
    over(&sending).await;
}

#[tokio::test]
async fn a_session_that_is_called_off_leaves_nobody_waiting() {
    let (workers, group, contents) = (workers(), group(), contents(7));
    let mut receiver = Receiver::start(group, &contents, &workers, None).await;
    let settings = Settings { rate: 100_000, min_rate: 10_000, ..settings(1) };
    let sending = start(group, session(&contents, memory(&contents), settings), &workers);
    receiver.began().await;
    sending.cancel();
    let sent = over(&sending).await;
    assert_eq!((sent.phase, sent.error), (Phase::Ended(false), None));
    assert_eq!(receiver.ended().await, State::Lacking);
    assert!(!receiver.mirror.is_complete());
}

#[tokio::test]
async fn who_leaves_a_group_says_so() {
    let (workers, group, contents) = (workers(), group(), contents(8));
    let mut receiver = Receiver::start(group, &contents, &workers, None).await;
    let settings = Settings { rate: 100_000, min_rate: 10_000, ..settings(1) };
    let sending = start(group, session(&contents, memory(&contents), settings), &workers);
    receiver.began().await;
    drop(receiver.hearing);
    let state = tokio::time::timeout(LONG, receiver.ended.recv()).await.unwrap().unwrap();
    assert_eq!(state, State::Lacking);
    sending.cancel();
    over(&sending).await;
}

#[tokio::test]
async fn an_image_that_cannot_be_read_ends_its_session_with_a_reason() {
    let (workers, group, contents) = (workers(), group(), contents(9));
    let bad = |range: ByteRange| (range.start() > 1_000_000).then(|| Error::new(ErrorKind::Io, "a bad sector"));
    let export = Arc::new(Fault::new(memory(&contents), bad));
    let sending = start(group, session(&contents, export, settings(0)), &workers);
    let sent = over(&sending).await;
    assert_eq!(sent.phase, Phase::Ended(false));
    assert_eq!(sent.error.unwrap(), "cannot read the image: a bad sector");
}

#[tokio::test]
async fn what_is_zero_is_read_from_the_manifest() {
    let (workers, contents) = (workers(), contents(10));
    let cache = tempfile::tempdir().unwrap();
    let mirror = open(cache.path().to_owned(), memory(&contents), contents.clone(), &workers).await;
    let of_mirror = mirror.clone();
    let zeroes = workers.ask(move || async move { Zeroes::of(&of_mirror).await.unwrap() }).await.unwrap();
    assert_eq!((Some(zeroes.image), Some(zeroes.shape)), (mirror.image(), mirror.manifest_shape()));
    for chunk in 0..zeroes.shape.count() + 70 {
        assert_eq!(zeroes.is_zero(chunk), mirror.is_known_zero(chunk), "{chunk}");
    }
    assert_eq!((0..400).filter(|chunk| zeroes.is_zero(*chunk)).count(), 17);
    let memory = memory(&contents);
    let none = workers.ask(move || async move { Zeroes::of(&*memory).await.map(drop) }).await.unwrap();
    assert_eq!(none.unwrap_err().kind(), ErrorKind::Unsupported);
}
