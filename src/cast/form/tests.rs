//! Everything reads back, and nothing else is read.

use proptest::prelude::*;

use super::*;

static NOISE: [u8; 9000] = {
    let mut noise = [0; 9000];
    let (mut index, mut state) = (0, 1u32);
    while index < noise.len() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise[index] = state.to_le_bytes()[3];
        index += 1;
    }
    noise
};

fn image() -> impl Strategy<Value = ImageId> {
    any::<[u8; 32]>().prop_map(ImageId)
}

fn terms() -> impl Strategy<Value = Terms> {
    let sizes =
        (0u32..=10).prop_flat_map(|power| (Just(4096 << power), 1..=MOST_BLOCK / (4096 << power), 1..=u32::MAX));
    let deadline = prop::option::of(1..=LAST_MOMENT);
    let deadline = deadline.prop_map(|since| since.map(|since| SystemTime::UNIX_EPOCH + Duration::from_millis(since)));
    (any::<u64>(), image(), sizes, 64u16..=4486, 1..=MOST_PARITY, 0..=MOST_PAGES, any::<(u64, bool)>(), deadline)
        .prop_map(|(session, image, (chunk_size, chunks, count), half, parity, pages, (plan, rest), deadline)| Terms {
            session: SessionId(session),
            image,
            shape: Shape { image_size: u64::from(count) * u64::from(chunk_size) - plan % 4096, chunk_size },
            block: chunks * chunk_size,
            symbol: half * 2,
            parity,
            pages,
            plan,
            rest: rest || pages == 0,
            deadline,
        })
}

fn announce() -> impl Strategy<Value = Announce> {
    let phases = [Phase::Waiting, Phase::Sending, Phase::Ending, Phase::Ended(true), Phase::Ended(false)];
    let time = || (1u64..=3_600_000).prop_map(Duration::from_millis);
    (terms(), prop::sample::select(phases.to_vec()), any::<u32>(), 1..=u64::MAX, time(), time()).prop_map(
        |(terms, phase, passed, rate, report_every, spread)| Announce {
            terms,
            phase,
            passed,
            rate,
            report_every,
            spread,
        },
    )
}

fn needs(of_none: bool, most: usize) -> impl Strategy<Value = Vec<Need>> {
    let need = (0..u32::MAX - 65535, 1..=u16::MAX, u16::from(!of_none)..=u16::MAX);
    prop::collection::vec(need.prop_map(|(first, count, symbols)| Need { first, count, symbols }), 0..=most)
}

fn ids() -> impl Strategy<Value = Vec<ReceiverId>> {
    prop::collection::vec(any::<[u8; 16]>().prop_map(ReceiverId), 0..20)
}

fn report() -> impl Strategy<Value = Report> {
    let standing = prop::sample::select(vec![Standing::Joined, Standing::Complete, Standing::Leaving]);
    (any::<[u8; 16]>(), standing, any::<[u32; 5]>(), needs(false, most_needs(1472))).prop_map(
        |(receiver, standing, [done, seen, lost, overflowed, heard], needs)| Report {
            receiver: ReceiverId(receiver),
            standing,
            done,
            seen,
            lost,
            overflowed,
            heard,
            needs,
        },
    )
}

fn page() -> impl Strategy<Value = Page> {
    let run = (0..=u32::MAX / 2, 1..=u32::MAX / 2).prop_map(|(first, count)| Run { first, count });
    (any::<u16>(), prop::collection::vec(run, 1..=most_runs(1472))).prop_map(|(page, runs)| Page { page, runs })
}

fn datagram() -> impl Strategy<Value = Datagram<'static>> {
    let word = (needs(false, 50), needs(true, 50), ids());
    let symbol = (any::<(u32, u16)>(), 32usize..=4486);
    prop_oneof![
        announce().prop_map(Datagram::Announce),
        page().prop_map(Datagram::Page),
        symbol.prop_map(|((block, index), half)| Datagram::Symbol { block, index, bytes: &NOISE[..half * 2] }),
        word.prop_map(|(coming, unicast, dropped)| Datagram::Word(Word { coming, unicast, dropped })),
        report().prop_map(Datagram::Report),
    ]
}

/// The session of a datagram is that of its head; an announcement has none of its own.
fn session(datagram: &Datagram<'_>) -> SessionId {
    match datagram {
        Datagram::Announce(said) => said.terms.session,
        _ => SessionId(0x0123_4567_89AB_CDEF),
    }
}

fn written(number: u32, datagram: &Datagram<'_>) -> (Key, Vec<u8>) {
    let key = Key::new(ImageId([1; 32]), session(datagram));
    let mut bytes = Vec::new();
    encode(Head { session: session(datagram), number }, datagram, &key, &mut bytes);
    (key, bytes)
}

fn example() -> Announce {
    let terms = Terms {
        session: SessionId(2),
        image: ImageId([1; 32]),
        shape: Shape { image_size: 1 << 30, chunk_size: 65536 },
        block: 1 << 20,
        symbol: 1444,
        parity: 256,
        pages: 0,
        plan: 0,
        rest: true,
        deadline: None,
    };
    let (report_every, spread) = (Duration::from_secs(1), Duration::from_millis(500));
    Announce { terms, phase: Phase::Sending, passed: 3, rate: 1 << 20, report_every, spread }
}

proptest! {
    #[test]
    fn everything_reads_back(datagram in datagram(), number: u32) {
        let (key, bytes) = written(number, &datagram);
        let head = Head { session: session(&datagram), number };
        let image = if let Datagram::Announce(said) = &datagram { Some(said.terms.image) } else { None };
        prop_assert!(bytes.len() <= MOST_BYTES);
        prop_assert_eq!(peek(&bytes), Ok((head, image)));
        prop_assert_eq!(decode(&bytes, &key), Ok((head, datagram)));
    }

    #[test]
    fn each_flipped_bit_is_refused(datagram in datagram(), at: prop::sample::Index, bit in 0u8..8) {
        let (key, mut bytes) = written(1, &datagram);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decode(&bytes, &key).is_err());
    }

    #[test]
    fn each_truncation_is_refused(datagram in datagram(), at: prop::sample::Index) {
        let (key, bytes) = written(1, &datagram);
        let at = at.index(bytes.len());
        prop_assert!(decode(&bytes[..at], &key).is_err());
        // Also one that whoever knows the key made: whatever is cut off, nothing but another right datagram is left.
        fuzz(&bytes[..at]);
    }

    #[test]
    fn another_key_is_refused(datagram in datagram(), image in image(), other: u64) {
        let (_, bytes) = written(1, &datagram);
        prop_assert_eq!(decode(&bytes, &Key::new(image, session(&datagram))), Err(Malformed::Forged));
        let another = SessionId(session(&datagram).0 ^ other.max(1));
        prop_assert_eq!(decode(&bytes, &Key::new(ImageId([1; 32]), another)), Err(Malformed::Forged));
    }

    #[test]
    fn no_bytes_panic(kind in 0u8..8, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz(&bytes);
        fuzz(&[&[MAGIC, VERSION << 4 | kind], &bytes[..]].concat());
    }

    #[test]
    fn what_is_made_of_terms_is_sound(said in announce(), runs in prop::collection::vec((0u32..20, 1u32..20), 0..40)) {
        let (_, mut told) = written(1, &Datagram::Announce(said));
        told.truncate(TOLD);
        // Of this many chunks; the fuzz target does not look at more than 65536.
        told[HEAD + 32..HEAD + 40].copy_from_slice(&(39 * u64::from(said.terms.shape.chunk_size) + 1).to_le_bytes());
        told.extend(runs.iter().flat_map(|(first, count)| [first.to_be_bytes(), count.to_be_bytes()]).flatten());
        prop_assert!(terms_of(&told[..TOLD]).is_some());
        crate::cast::layout::fuzz(&told);
    }

    #[test]
    fn what_is_said_to_fit_does(datagram in 100usize..9000, needs_of in 0usize..4) {
        let fits = |said: &Datagram<'_>| written(1, said).1.len() <= datagram;
        let need = Need { first: 1, count: 1, symbols: 1 };
        let runs = |more| Datagram::Page(Page { page: 0, runs: vec![Run { first: 0, count: 1 }; most_runs(datagram) + more] });
        prop_assert!(fits(&runs(0)) && !fits(&runs(1)));
        let receiver = ReceiverId([0; 16]);
        let report = |more| {
            let needs = vec![need; most_needs(datagram) + more];
            let standing = Standing::Joined;
            Datagram::Report(Report { receiver, standing, done: 0, seen: 0, lost: 0, overflowed: 0, heard: 0, needs })
        };
        prop_assert!(fits(&report(0)) && !fits(&report(1)));
        let dropped = most_needs(datagram) / 2 * needs_of / 3;
        let coming = (most_needs(datagram) - 2 * dropped) / 2;
        let unicast = most_needs(datagram) - 2 * dropped - coming;
        let (coming, unicast) = (vec![need; coming], vec![need; unicast]);
        let word = Datagram::Word(Word { coming, unicast, dropped: vec![receiver; dropped] });
        prop_assert!(fits(&word));
        let symbol = |length: u16| Datagram::Symbol { block: 0, index: 0, bytes: &NOISE[..usize::from(length)] };
        prop_assert!(fits(&symbol(symbol_for(datagram))));
        prop_assert!(!fits(&symbol(symbol_for(datagram) + 2)));
    }
}

#[test]
fn no_bit_of_an_announcement_can_be_flipped() {
    let (key, mut bytes) = written(1, &Datagram::Announce(example()));
    for at in 0..bytes.len() * 8 {
        bytes[at / 8] ^= 1 << (at % 8);
        assert!(decode(&bytes, &key).is_err(), "bit {at}");
        bytes[at / 8] ^= 1 << (at % 8);
    }
    assert!(decode(&bytes, &key).is_ok());
}

#[test]
fn symbols_fill_the_frames_of_ethernet() {
    assert_eq!((symbol_for(1472), symbol_for(1452), symbol_for(8972)), (1444, 1424, 8944));
    assert_eq!((symbol_for(0), symbol_for(28), symbol_for(29), symbol_for(31)), (0, 0, 0, 2));
    assert_eq!(symbol_for(1 << 20), 8972);
}

#[test]
fn a_symbol_is_written_as_the_table_says() {
    let symbol = Datagram::Symbol { block: 0x0A0B_0C0D, index: 0x0102, bytes: &[9; 64] };
    let (_, bytes) = written(0x1122_3344, &symbol);
    let head = [0xCA, 0x13, 0xEF, 0xCD, 0xAB, 0x89, 0x67, 0x45, 0x23, 0x01, 0x44, 0x33, 0x22, 0x11];
    assert_eq!(bytes[..14], head);
    assert_eq!(bytes[14..20], [0x0D, 0x0C, 0x0B, 0x0A, 0x02, 0x01]);
    assert_eq!(bytes[20..84], [9; 64]);
    assert_eq!(bytes.len(), 92);
}

#[test]
fn terms_that_make_no_sense_are_refused_behind_a_right_tag() {
    let refused = |change: fn(&mut Announce)| {
        let mut said = example();
        change(&mut said);
        let (key, bytes) = written(1, &Datagram::Announce(said));
        assert_eq!(decode(&bytes, &key), Err(Malformed::Broken), "{said:?}");
    };
    refused(|said| said.terms.shape.image_size = 0);
    refused(|said| said.terms.shape.image_size = 1 << 63);
    refused(|said| said.terms.shape.image_size = u64::MAX);
    refused(|said| said.terms.shape.chunk_size = 0);
    refused(|said| said.terms.shape.chunk_size = 2048);
    refused(|said| said.terms.shape.chunk_size = 65535);
    refused(|said| said.terms.shape.chunk_size = 8 << 20);
    refused(|said| said.terms.block = 0);
    refused(|said| said.terms.block = 65537);
    refused(|said| said.terms.block = 4096);
    refused(|said| said.terms.block = 8 << 20);
    refused(|said| said.terms.symbol = 0);
    refused(|said| said.terms.symbol = 62);
    refused(|said| said.terms.symbol = 1443);
    refused(|said| said.terms.symbol = 8974);
    refused(|said| (said.terms.block, said.terms.symbol) = (MOST_BLOCK, 64));
    refused(|said| said.terms.parity = 0);
    refused(|said| said.terms.parity = 257);
    refused(|said| said.terms.pages = 65);
    refused(|said| said.terms.rest = false);
    refused(|said| said.rate = 0);
}

#[test]
fn times_are_kept_within_what_is_read() {
    let mut said = example();
    (said.report_every, said.spread) = (Duration::ZERO, Duration::MAX);
    said.terms.deadline = Some(SystemTime::UNIX_EPOCH - Duration::from_secs(9));
    let (key, bytes) = written(1, &Datagram::Announce(said));
    let Ok((_, Datagram::Announce(read))) = decode(&bytes, &key) else { panic!("it is refused") };
    assert_eq!((read.report_every, read.spread), (Duration::from_millis(1), LONGEST));
    assert_eq!(read.terms.deadline, Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1)));
}

#[test]
fn lists_that_make_no_sense_are_refused_behind_a_right_tag() {
    let refused = |datagram: Datagram<'_>| {
        let (key, bytes) = written(1, &datagram);
        assert_eq!(decode(&bytes, &key), Err(Malformed::Broken), "{datagram:?}");
    };
    let need = |first, count, symbols| vec![Need { first, count, symbols }];
    let word = |coming, unicast| Datagram::Word(Word { coming, unicast, dropped: Vec::new() });
    refused(word(need(0, 0, 1), Vec::new()));
    refused(word(need(0, 1, 0), Vec::new()));
    refused(word(need(u32::MAX, 1, 1), Vec::new()));
    refused(word(Vec::new(), need(0, 0, 1)));
    refused(Datagram::Page(Page { page: 0, runs: Vec::new() }));
    refused(Datagram::Page(Page { page: 0, runs: vec![Run { first: 0, count: 0 }] }));
    refused(Datagram::Page(Page { page: 0, runs: vec![Run { first: 2, count: u32::MAX - 1 }] }));
    refused(Datagram::Symbol { block: 0, index: 0, bytes: &[0; 62] });
    refused(Datagram::Symbol { block: 0, index: 0, bytes: &[0; 65] });
    refused(Datagram::Symbol { block: 0, index: 0, bytes: &[0; 9000] });
}

#[test]
fn what_begins_otherwise_is_foreign() {
    let key = Key::new(ImageId([1; 32]), SessionId(1));
    for bytes in [&[][..], &[0xCA], &[0; 100], &[0xCA, 0x23, 0, 0], &[0xCA, 0x10, 0, 0], &[0xCA, 0x16, 0, 0]] {
        assert_eq!(decode(bytes, &key), Err(Malformed::Foreign), "{bytes:?}");
        assert_eq!(peek(bytes), Err(Malformed::Foreign), "{bytes:?}");
    }
    assert_eq!(decode(&[0xCA, 0x13, 0, 0], &key), Err(Malformed::Broken));
}
