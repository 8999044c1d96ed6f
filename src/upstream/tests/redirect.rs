//! Other servers while requests are under way.

use std::cell::Cell;
use std::rc::Rc;

use super::*;

const SIZE: usize = 200_000;

fn start() -> Rc<Fake> {
    Fake::start(sample_contents(SIZE, 1))
}

/// One that says what it has, and where its bytes come from.
fn start_saying(size: usize, facts: &[String]) -> Rc<Fake> {
    Fake::start_with(sample_contents(size, 1), |listing| listing.facts = facts.to_vec())
}

async fn redirect(remote: &Remote, to: &[&Rc<Fake>], reserve: &[&Rc<Fake>]) -> std::result::Result<(), OpenError> {
    let uris = |fakes: &[&Rc<Fake>]| -> Vec<Uri> { fakes.iter().map(|fake| fake.uri()).collect() };
    remote.redirect(Route { to: &uris(to), reserve: &uris(reserve) }).await
}

/// Whether it comes true before anybody would have waited for a time-out.
async fn soon(mut is_true: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_true() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    is_true()
}

fn reads(fakes: &[&Rc<Fake>]) -> Vec<usize> {
    fakes.iter().map(|fake| fake.reads.borrow().len()).collect()
}

#[test]
fn readers_do_not_notice_that_servers_are_exchanged() {
    run(async {
        let (first, second) = (start(), start());
        let settings = Settings { connections: 3, stall_timeout: Duration::from_secs(10), ..quick() };
        let remote = Remote::open(vec![first.uri()], Expectation::default(), settings).await.unwrap();
        let (remote, is_done) = (&remote, &Cell::new(false));
        let reader = |seed: u64| {
            let contents = &first.contents;
            async move {
                let (mut random, mut count) = (crate::export::conformance::Random::new(seed), 0);
                while !is_done.get() {
                    let start = random.below(to_u64(SIZE) - 5000);
                    let end = start + 1 + random.below(4999);
                    assert!(read(remote, start, end).await.unwrap() == contents[to_usize(start)..to_usize(end)]);
                    count += 1;
                }
                count
            }
        };
        let director = async {
            for turn in 0..20 {
                let (to, from) = if turn % 2 == 0 { (&second, &first) } else { (&first, &second) };
                redirect(remote, &[to], &[]).await.unwrap();
                assert_eq!(remote.current(), to.uri());
                // Whatever was under way when it was left is answered; then nothing comes any more.
                assert!(soon(|| from.open.get() == 0).await, "connections to the old server are left open");
                let (before, other) = (from.reads.borrow().len(), to.reads.borrow().len());
                assert!(soon(|| to.reads.borrow().len() > other + 20).await, "nobody reads from the new server");
                assert_eq!(from.reads.borrow().len(), before, "the old server is still read from");
            }
            is_done.set(true);
        };
        let (counts, ()) = tokio::join!(join_all((0..8).map(reader)), director);
        assert!(counts.iter().all(|count| *count > 10), "{counts:?}");
        assert_eq!(remote.stats().retries.value(), 0, "nothing was asked twice");
        assert_eq!(second.farewells.get(), second.connections.get(), "each old connection ends with a goodbye");
    });
}

#[test]
fn what_is_under_way_is_answered_where_it_is_or_asked_again() {
    run(async {
        for act in [Act::Answer, Act::Fail(ErrorKind::Io), Act::HangUp, Act::Ignore, Act::Babble, Act::Truncate] {
            let (first, second) = (start(), start());
            let settings = Settings { stall_timeout: Duration::from_secs(60), ..quick() };
            let remote = Remote::open(vec![first.uri()], Expectation::default(), settings).await.unwrap();
            first.held_from.set(1);
            first.plan([act]);
            let (reading, directing) = (read(&remote, 10, 9000), async {
                assert!(soon(|| first.reads.borrow().len() == 1).await);
                redirect(&remote, &[&second], &[]).await.unwrap();
                first.release();
            });
            let (result, ()) = tokio::join!(reading, directing);
            assert!(result.unwrap() == first.contents[10..9000], "{act:?}");
            assert_eq!(reads(&[&first, &second]), [1, usize::from(act != Act::Answer)], "{act:?}");
        }
    });
}

#[test]
fn a_read_that_waits_for_a_dead_server_is_asked_of_the_new_one() {
    run(async {
        let (first, second) = (start(), start());
        let remote = open(&[&first]).await;
        first.is_down.set(true);
        first.plan([Act::HangUp]);
        let began = Instant::now();
        let (result, ()) = tokio::join!(read(&remote, 0, 999), async {
            // It has been lost, and is being connected to again, in vain.
            assert!(soon(|| first.connections.get() >= 4).await);
            redirect(&remote, &[&second], &[]).await.unwrap();
        });
        assert!(result.unwrap() == second.contents[..999]);
        assert!(began.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn nothing_changes_if_the_new_servers_cannot_be_used() {
    run(async {
        let identity = ImageId([0x11; 32]);
        let says = |byte: &str| format!("x-headwater:image=blake3-{}", byte.repeat(32));
        let (own, node) = (start_saying(SIZE, &[says("11")]), NodeId([0x22; 16]));
        let remote = open(&[&own]).await;
        remote.expect(Some(identity), node);
        let mut changed = remote.changed();
        let through = |path: &str| format!("x-headwater:path={path}");
        let cases = [
            (start_saying(SIZE - 1, &[says("11")]), "199999 bytes"),
            (start_saying(SIZE, &[says("33")]), "blake3-33"),
            (start_saying(SIZE, &[says("11"), through(&"22".repeat(16))]), "a loop"),
            (start_saying(SIZE, &[says("11"), through(&format!("{},{}", "44".repeat(16), "22".repeat(16)))]), "a loop"),
        ];
        for (other, text) in &cases {
            let error = redirect(&remote, &[other], &[&own]).await.unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
            assert_eq!((remote.current(), remote.uris()), (own.uri(), vec![own.uri()]));
        }
        let nowhere: Uri = "nbd+unix:///x?socket=/nonexistent/socket".parse().unwrap();
        let route = Route { to: &[nowhere], reserve: &[own.uri()] };
        assert!(!remote.redirect(route).await.unwrap_err().is_final(), "a reserve is no place to be sent to");
        assert!(remote.redirect(Route { to: &[], reserve: &[own.uri()] }).await.is_err());
        assert!(!changed.has_changed().unwrap(), "nobody is told of what others have");
        assert!(read(&remote, 0, 999).await.unwrap() == own.contents[..999]);
        assert_eq!(own.connections.get(), 1);
        changed.mark_unchanged();
        // The right one is found behind them.
        let right = start_saying(SIZE, &[says("11")]);
        redirect(&remote, &[&cases[0].0, &right], &[&own]).await.unwrap();
        assert_eq!((remote.current(), remote.uris().len()), (right.uri(), 3));
    });
}

#[test]
fn the_reserve_is_there_when_the_new_server_dies() {
    run(async {
        let (first, second) = (start(), start());
        let remote = open(&[&first]).await;
        redirect(&remote, &[&second], &[&first]).await.unwrap();
        assert!(read(&remote, 0, 999).await.is_ok());
        second.plan([Act::HangUp]);
        second.is_down.set(true);
        assert!(read(&remote, 0, 999).await.unwrap() == first.contents[..999]);
        assert_eq!(remote.current(), first.uri());
    });
}

#[test]
fn a_server_in_both_lists_stays_what_it_is() {
    run(async {
        let (first, second, third) = (start(), start(), start());
        let remote = open(&[&first, &second]).await;
        assert!(read(&remote, 0, 999).await.is_ok());
        let place = remote.place();
        assert_eq!(place.borrow().uri, Some(first.uri()));
        // One is there already: only the list changes.
        redirect(&remote, &[&first], &[&third]).await.unwrap();
        let (to, reserve) = ([second.uri(), first.uri()], [third.uri()]);
        remote.replace_servers(Route { to: &to, reserve: &reserve }).await.unwrap();
        assert!(!place.has_changed().unwrap());
        assert!(read(&remote, 0, 999).await.is_ok());
        let servers = remote.servers();
        let seen: Vec<_> = servers.iter().map(|server| (server.uri.clone(), server.is_current)).collect();
        assert_eq!(seen, [(second.uri(), false), (first.uri(), true), (third.uri(), false)]);
        assert_eq!((servers[1].requests, servers[1].connections), (2, 1), "it is the same connection still");
        assert_eq!((first.connections.get(), second.connections.get(), third.connections.get()), (1, 0, 0));
        // The first in the order is gone to, also from one further behind.
        redirect(&remote, &[&second, &first], &[]).await.unwrap();
        assert_eq!(place.borrow().uri, Some(second.uri()));
        assert_eq!(remote.servers()[1].requests, 2, "what was counted of it stays");
        assert!(soon(|| first.open.get() == 0).await);
    });
}

#[test]
fn a_liar_stays_one_in_another_list() {
    run(async {
        let (liar, honest, third) = (start(), start(), start());
        liar.habit.set((1, Act::Flip));
        let remote = open(&[&liar, &honest]).await;
        let right = sample_contents(SIZE, 1);
        let check = |pieces: &[Piece]| assemble(pieces) == right[..512];
        let range = ByteRange::between(0, 512);
        for _ in 0..3 {
            assert!(remote.read_verified(range, &check).await.is_ok());
        }
        assert!(remote.servers()[0].set_aside_for.is_some());
        redirect(&remote, &[&third], &[&liar, &honest]).await.unwrap();
        let servers = remote.servers();
        assert!(servers[1].set_aside_for.is_some() && servers[1].wrong_replies == 3, "{servers:?}");
        // Whoever fails is followed by one that is trusted.
        third.plan([Act::HangUp]);
        third.is_down.set(true);
        assert!(remote.read_verified(range, &check).await.is_ok());
        assert_eq!((remote.current(), liar.reads.borrow().len()), (honest.uri(), 3));
    });
}

#[test]
fn a_lie_of_a_server_that_was_left_is_held_against_no_other() {
    run(async {
        let (liar, second, third) = (start(), start(), start());
        let remote = open(&[&liar]).await;
        liar.held_from.set(1);
        liar.plan([Act::Flip]);
        let right = sample_contents(SIZE, 1);
        let check = |pieces: &[Piece]| assemble(pieces) == right[..512];
        let (result, ()) = tokio::join!(remote.read_verified(ByteRange::between(0, 512), &check), async {
            assert!(soon(|| liar.reads.borrow().len() == 1).await);
            redirect(&remote, &[&second, &third], &[]).await.unwrap();
            liar.release();
        });
        assert!(assemble(&result.unwrap()) == right[..512]);
        assert!(remote.servers().iter().all(|server| server.wrong_replies == 0));
        assert_eq!(reads(&[&liar, &second, &third]), [1, 1, 0]);
    });
}

#[test]
fn a_checked_read_goes_on_with_the_new_servers() {
    run(async {
        let (liar, honest) = (start(), start());
        liar.habit.set((1, Act::Flip));
        liar.held_from.set(3);
        let remote = open(&[&liar]).await;
        let right = sample_contents(SIZE, 1);
        let check = |pieces: &[Piece]| assemble(pieces) == right[..512];
        let (result, ()) = tokio::join!(remote.read_verified(ByteRange::between(0, 512), &check), async {
            // It has lied twice, and may twice more.
            assert!(soon(|| liar.reads.borrow().len() == 3).await);
            redirect(&remote, &[&honest], &[&liar]).await.unwrap();
            liar.release();
        });
        assert!(assemble(&result.unwrap()) == right[..512]);
        assert_eq!(reads(&[&liar, &honest]), [3, 1]);
    });
}

#[test]
fn connections_are_introduced_by_name_where_that_is_of_use() {
    run(async {
        for tells in [true, false] {
            let fake = Fake::start_with(sample_contents(SIZE, 1), |listing| {
                listing.contexts.extend(tells.then(|| "x-headwater:notice".to_owned()));
            });
            let settings = Settings { role: Role::Mirror, ..quick() };
            let remote = Remote::open(vec![fake.uri()], Expectation::default(), settings).await.unwrap();
            assert_eq!((remote.node(), remote.place().borrow().tells_news), (None, tells));
            remote.introduce().await;
            assert_eq!(fake.connections.get(), 1, "there is no name to be told");
            remote.expect(None, NodeId([7; 16]));
            remote.introduce().await;
            remote.introduce().await;
            assert_eq!(remote.node(), Some(NodeId([7; 16])));
            assert_eq!(fake.connections.get(), 1 + usize::from(tells));
            assert!(read(&remote, 0, 999).await.is_ok());
            assert!(soon(|| fake.open.get() == 1).await);
        }
    });
}
