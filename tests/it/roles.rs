//! Our client against our server: the suite of all exports, over a socket, in every form of the protocol.

use std::sync::Arc;
use std::time::Duration;

use headwater::disk::{Preference, attach};
use headwater::export::conformance::{self, sample_contents};
use headwater::export::memory::Memory;
use headwater::export::{Export, Registry, assemble};
use headwater::nbd::Uri;
use headwater::net::{ListenAddress, Listener};
use headwater::server::{Server, Settings};
use headwater::upstream::{self, Expectation, Remote};
use headwater::worker::Workers;
use tokio::runtime::{Builder, LocalOptions};

use crate::support::Scratch;

/// Serves an export within this process, and hands a remote of it to the test.
fn with_remote<F: Future<Output = ()>>(export: Arc<dyn Export>, test: impl FnOnce(Remote) -> F) {
    let scratch = Scratch::new();
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        let _attached = attach(Preference::Auto).unwrap();
        let listeners = Listener::bind(&ListenAddress::Unix(scratch.path("s"))).unwrap();
        let uri: Uri = listeners[0].uri("x").unwrap();
        let registry = Arc::new(Registry::new());
        registry.insert("x", export).unwrap();
        let workers = Arc::new(Workers::start(2, Preference::Auto).unwrap());
        let server = Server::start(registry, listeners, Arc::clone(&workers), Settings::default());
        let settings = upstream::Settings { patience: Duration::from_secs(10), ..upstream::Settings::default() };
        test(Remote::open(vec![uri], Expectation::default(), settings).await.unwrap()).await;
        assert!(server.drain().await, "a connection was left over");
    });
}

#[test]
fn a_remote_export_conforms() {
    let contents = sample_contents(1_234_567, 40);
    with_remote(Arc::new(Memory::holding(contents.clone())), async |remote| {
        conformance::check(&remote, contents).await;
    });
    with_remote(Arc::new(Memory::zeroed(3_000_000)), async |remote| {
        conformance::check(&remote, vec![0; 3_000_000]).await;
    });
    let contents = sample_contents(99_999, 41);
    with_remote(Arc::new(Memory::holding(contents.clone()).read_only()), async |remote| {
        conformance::check(&remote, contents).await;
    });
}

#[test]
fn what_an_export_says_of_itself_arrives() {
    use headwater::export::{Context, ImageId, NodeId};
    let memory = Memory::holding(vec![1; 5000]).read_only().with_facts(|facts| {
        facts.identity = Some(ImageId([5; 32]));
        facts.path = vec![NodeId([6; 16]), NodeId([7; 16])];
        facts.description = "an image of a test".into();
    });
    let facts = memory.facts();
    with_remote(Arc::new(memory), async |remote| {
        assert_eq!(remote.facts(), facts);
        assert_eq!(remote.facts().contexts, [Context::Allocation]);
    });
}

#[test]
fn a_large_image_goes_through_in_both_directions() {
    use bytes::Bytes;
    use headwater::nbd::request::Durability;
    use headwater::ranges::ByteRange;
    with_remote(Arc::new(Memory::zeroed(100 << 20)), async |remote| {
        let data = Bytes::from(crate::support::noise(80 << 20, 1));
        remote.write(3, data.clone(), Durability::Stable).await.unwrap();
        let pieces = remote.read(ByteRange::between(3, 3 + (80 << 20))).await.unwrap();
        assert!(assemble(&pieces) == data);
        assert!(remote.stats().received_bytes.value() >= 80 << 20);
    });
}
