//! Servers that have another image than they had.

use std::rc::Rc;
use std::time::Duration;

use super::*;

const OLD: ImageId = ImageId([0x11; 32]);
const NEW: ImageId = ImageId([0x22; 32]);

fn says(fake: &Fake, identity: Option<ImageId>) {
    let facts = identity.map(|identity| format!("x-headwater:image={identity}"));
    fake.listing.borrow_mut().facts = facts.into_iter().collect();
}

fn start(identity: Option<ImageId>) -> Rc<Fake> {
    let fake = Fake::start(sample_contents(10_000, 1));
    says(&fake, identity);
    fake
}

async fn open_old(fakes: &[&Rc<Fake>]) -> Remote {
    let uris = fakes.iter().map(|fake| fake.uri()).collect();
    let expectation = Expectation { identity: Some(OLD), ..Expectation::default() };
    Remote::open(uris, expectation, quick()).await.unwrap()
}

#[test]
fn requests_fail_at_once_when_all_servers_have_another_image() {
    run(async {
        let (first, second) = (start(Some(OLD)), start(Some(OLD)));
        let remote = open_old(&[&first, &second]).await;
        let mut changed = remote.changed();
        assert!(changed.borrow_and_update().is_empty());

        for fake in [&first, &second] {
            says(fake, Some(NEW));
            fake.habit.set((1, Act::HangUp));
        }
        let before = Instant::now();
        for _ in 0..500 {
            let error = read(&remote, 0, 10).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert_eq!(error.to_string(), format!("the upstream has another image now: {NEW}, not {OLD}"));
        }
        assert!(before.elapsed() < Duration::from_secs(2), "500 failures took {:?}", before.elapsed());
        // They are asked again now and then, not for every request.
        assert!(first.connections.get() + second.connections.get() < 30);

        changed.changed().await.unwrap();
        let told: Vec<_> =
            changed.borrow_and_update().iter().map(|other| (other.uri.clone(), other.facts.identity)).collect();
        let mut expected = vec![(second.uri(), Some(NEW)), (first.uri(), Some(NEW))];
        if told[0].0 == first.uri() {
            expected.reverse();
        }
        assert_eq!(told, expected);
        assert_eq!(changed.borrow().last().unwrap().facts.size, 10_000);

        says(&second, Some(OLD));
        second.habit.set((1, Act::Answer));
        // After the pause, which is 2 s at most.
        let before = Instant::now();
        while read(&remote, 0, 10).await.is_err() {
            assert!(before.elapsed() < Duration::from_secs(5));
            tokio::task::yield_now().await;
        }
        changed.changed().await.unwrap();
        assert_eq!(changed.borrow().iter().map(|other| other.uri.clone()).collect::<Vec<_>>(), [first.uri()]);
    });
}

#[test]
fn another_size_is_another_image() {
    run(async {
        let fake = Fake::start(sample_contents(10_000, 1));
        let remote = open(&[&fake]).await;
        fake.listing.borrow_mut().size = 9_999;
        fake.plan([Act::HangUp]);
        let error = read(&remote, 0, 10).await.unwrap_err();
        assert_eq!(error.to_string(), "the upstream has another image now: 9999 bytes, not 10000");
        assert_eq!(remote.changed().borrow()[0].facts.size, 9_999);
        // Whoever is content with it may have it.
        remote.expect(None, NodeId([1; 16]));
        assert!(remote.changed().borrow().is_empty());
    });
}

#[test]
fn a_server_that_is_away_may_have_the_image_still() {
    run(async {
        let (first, second) = (start(Some(OLD)), start(Some(OLD)));
        let remote = Remote { patience: Duration::from_millis(400), ..open_old(&[&first, &second]).await };
        says(&first, Some(NEW));
        first.plan([Act::HangUp]);
        second.is_down.set(true);
        let before = Instant::now();
        let error = read(&remote, 0, 10).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(before.elapsed() >= Duration::from_millis(350), "it was not waited for");
        second.is_down.set(false);
        assert!(read(&remote, 0, 10).await.is_ok());
    });
}

#[test]
fn a_server_that_does_not_say_what_it_has_is_used() {
    run(async {
        let fake = start(None);
        let remote = open_old(&[&fake]).await;
        assert!(read(&remote, 0, 10).await.is_ok());
        assert!(remote.changed().borrow().is_empty());
    });
}

#[test]
fn a_server_with_another_image_is_not_asked_when_the_first_one_lies() {
    run(async {
        let (liar, other) = (start(Some(OLD)), start(Some(NEW)));
        liar.habit.set((1, Act::Flip));
        let remote = open_old(&[&liar, &other]).await;
        let right = sample_contents(10_000, 1);
        let check = |pieces: &[Piece]| assemble(pieces) == right[..512];
        let error = remote.read_verified(ByteRange::between(0, 512), &check).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains(&format!("its export holds {NEW}")), "{error}");
        assert!(other.reads.borrow().is_empty());
    });
}

#[test]
fn an_inspection_sees_what_the_old_connections_cannot() {
    run(async {
        let (first, second) = (start(None), start(Some(OLD)));
        let remote = open_old(&[&first, &second]).await;
        let mut changed = remote.changed();
        assert!(read(&remote, 0, 10).await.is_ok());
        says(&first, Some(NEW));
        second.is_down.set(true);

        let seen = remote.inspect().await;
        let uris: Vec<_> = seen.iter().map(|(uri, _)| uri.clone()).collect();
        assert_eq!(uris, [first.uri(), second.uri()]);
        let facts = seen[0].1.as_ref().unwrap();
        assert_eq!((facts.identity, facts.size), (Some(NEW), 10_000));
        assert!(!seen[1].1.as_ref().unwrap_err().is_final());

        changed.changed().await.unwrap();
        assert_eq!(changed.borrow_and_update().len(), 1);
        // The pool knows nothing of it: its connection is there still, and is the only one.
        assert!(read(&remote, 0, 10).await.is_ok());
        assert_eq!((first.connections.get(), remote.servers()[0].connections), (2, 1));
        assert_eq!(remote.facts().identity, None);

        remote.inspect().await;
        assert!(!changed.has_changed().unwrap(), "nothing new");
        says(&first, Some(OLD));
        remote.inspect().await;
        assert!(changed.borrow_and_update().is_empty());
    });
}

#[test]
fn the_manifest_is_beside_the_image() {
    run(async {
        let (first, second) = (start(Some(OLD)), start(Some(OLD)));
        let remote = open(&[&first, &second]).await;
        assert!(remote.manifests().await.is_empty());
        *second.manifest.borrow_mut() = Some(b"what the image holds".to_vec());
        let [manifest] = &remote.manifests().await[..] else { panic!("one server has it") };
        assert_eq!(manifest.facts().size, 20);
        assert_eq!(read(manifest, 0, 20).await.unwrap(), b"what the image holds");
        assert_eq!(manifest.current(), Uri { export: "x@manifest".into(), ..second.uri() });
    });
}
