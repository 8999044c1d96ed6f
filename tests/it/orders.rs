//! Connections under orders: another export under them, notices, closing, and newcomers that are sent away.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc;

use headwater::disk::{Preference, attach};
use headwater::error::{Error, ErrorKind};
use headwater::export::memory::Memory;
use headwater::export::wrappers::{Fault, Gate, Record, Recorded};
use headwater::export::{Context, Export, NodeId, Registry, SharedExport};
use headwater::nbd::Uri;
use headwater::nbd::reply::decode_block_status;
use headwater::nbd::wire::{self, CommandFlags, command, option, option_reply};
use headwater::net::{ListenAddress, Listener};
use headwater::ranges::ByteRange;
use headwater::server::{ClientHandle, News, Server, Settings, Steering, SwitchError};
use headwater::worker::Workers;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::oneshot;

use crate::support::client::{Client, Reply, Socket};
use crate::support::{Scratch, eventually, noise};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 3 * MIB;

/// Serves `exports` on a thread of its own; in the end nothing may keep the server from ending well, also not the clients
/// that the test gives back.
fn served<T>(exports: Vec<(&str, SharedExport)>, test: impl FnOnce(&str, &Steering) -> T) -> T {
    let scratch = Scratch::new();
    let socket = scratch.path("s");
    let registry = Arc::new(Registry::new());
    exports.into_iter().for_each(|(name, export)| registry.insert(name, export).unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let (report, started) = mpsc::channel();
    let server = std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let _attached = attach(Preference::Auto).unwrap();
            let listeners = Listener::bind(&ListenAddress::Unix(socket)).unwrap();
            let uri = listeners[0].uri("x").unwrap().to_string();
            let workers = Arc::new(Workers::start(2, Preference::Auto).unwrap());
            let server = Server::start(registry, listeners, workers, Settings::default());
            report.send((uri, server.steering())).unwrap();
            let _ = stopped.await;
            server.drain().await
        })
    });
    let (uri, steering) = started.recv().unwrap();
    let kept = test(&uri, &steering);
    drop(stop);
    assert!(server.join().unwrap(), "a connection kept the server from ending");
    kept
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(crate::support::SOON, work).await.expect("it takes too long") })
}

/// The one client of the export, who may know before the server that it is let in.
fn only(steering: &Steering) -> ClientHandle {
    let clients = || steering.clients.of_export("x");
    eventually("single client", || clients().len() == 1);
    clients().remove(0)
}

fn bytes() -> Vec<u8> {
    noise(SIZE as usize, 9)
}

fn image() -> Arc<dyn Export> {
    Arc::new(Memory::holding(bytes()).read_only())
}

/// An image that reads fail on.
fn broken() -> Arc<dyn Export> {
    Arc::new(Fault::new(image(), |_| Some(Error::new(ErrorKind::Io, "a fault of a test"))))
}

fn status(reply: &Reply) -> Vec<(u64, u64)> {
    assert_eq!(reply.error, None);
    let of = |(kind, payload): &(u16, Vec<u8>)| decode_block_status(*kind, payload).unwrap().1;
    reply.other.iter().flat_map(of).map(|extent| (extent.length, extent.status)).collect()
}

fn ask_notice(client: &mut Client, cookie: u64) {
    client.send(command::BLOCK_STATUS, CommandFlags::empty(), cookie, 0, 4096, &[]);
}

#[test]
fn a_reader_is_switched_back_and_forth_between_its_requests() {
    let [here, there] = [0; 2].map(|_| Arc::new(Record::new(image())));
    served(vec![("x", Arc::clone(&here) as _)], |uri, steering| {
        for open in [Client::open, Client::open_structured, Client::open_simple] {
            let mut client = open(uri);
            let handle = only(steering);
            for turn in 0..20 {
                let relay = (turn % 2 == 0).then(|| (Arc::clone(&there) as SharedExport, "nbd://there/x".to_owned()));
                let (to, from) = if relay.is_some() { (&there, &here) } else { (&here, &there) };
                let label = relay.as_ref().map(|(_, label)| label.clone());
                let switched = wait(handle.switch(relay)).unwrap();
                assert_eq!(switched.in_flight, 0);
                assert_eq!(handle.status().unwrap().relayed_to, label);
                from.take();
                for (offset, length) in [(turn * 1001, 10), (5, 200_000), (0, SIZE)] {
                    assert!(client.read(offset, length) == bytes()[offset as usize..][..length as usize]);
                }
                assert!(!to.take().is_empty() && from.take().is_empty(), "turn {turn}");
            }
            assert_eq!(handle.replayed(), 0);
            drop(client);
            wait(handle.gone());
            assert!(handle.status().is_none());
            assert!(matches!(wait(handle.switch(None)), Err(SwitchError::Gone)));
        }
    });
}

/// Reads of every form wait at a gate, then there is another export. What becomes of them?
fn replayed(first: fn(&Gate), below: fn() -> Arc<dyn Export>) {
    for open in [Client::open, Client::open_structured, Client::open_simple] {
        let gate = Arc::new(Gate::new(below()));
        served(vec![("x", Arc::clone(&gate) as _)], |uri, steering| {
            let mut client = open(uri);
            client.send(command::READ, CommandFlags::empty(), 1, 7, 100, &[]);
            client.send(command::READ, CommandFlags::empty(), 2, 1, SIZE - 1, &[]);
            // The short one, and at least the first segment of the long one.
            wait(gate.arrived(2));
            let handle = only(steering);
            let switched = wait(handle.switch(Some((image(), "nbd://there/x".into())))).unwrap();
            assert_eq!(switched.in_flight, 2);
            first(&gate);
            for reply in client.receive_mixed(2) {
                let start = if reply.cookie == 1 { 7 } else { 1 };
                let read = reply.bytes();
                assert!(read == bytes()[start..][..read.len()]);
                assert_eq!(read.len() as u64, if reply.cookie == 1 { 100 } else { SIZE - 1 });
            }
            assert!(handle.replayed() >= 2);
            assert_eq!(handle.status().unwrap().errors, 0);
        });
    }
}

#[test]
fn what_fails_on_the_old_export_is_asked_of_the_new_one() {
    replayed(Gate::open, broken);
}

#[test]
fn what_hangs_on_the_old_export_is_asked_of_the_new_one_too() {
    replayed(|_| {}, image);
}

#[test]
fn what_fails_on_the_only_export_fails() {
    served(vec![("x", broken())], |uri, steering| {
        let mut client = Client::open(uri);
        assert_eq!(client.ask(command::READ, 0, 10).error, Some(ErrorKind::Io));
        let handle = only(steering);
        wait(handle.switch(Some((broken(), "nbd://there/x".into())))).unwrap();
        assert_eq!(client.ask(command::READ, 0, 10).error, Some(ErrorKind::Io));
        assert_eq!(handle.replayed(), 0);
    });
}

#[test]
fn a_writer_is_switched_when_all_is_done_and_durable() {
    let here = Arc::new(Record::new(Arc::new(Memory::holding(bytes()))));
    let gate = Arc::new(Gate::new(Arc::clone(&here) as _));
    let there = Arc::new(Record::new(Arc::new(Memory::holding(bytes()))));
    served(vec![("x", Arc::clone(&gate) as _)], |uri, steering| {
        let mut client = Client::open(uri);
        assert_eq!(client.write(10, b"before"), None);
        client.send(command::READ, CommandFlags::empty(), 7, 0, 100, &[]);
        wait(gate.arrived(1));
        let handle = only(steering);
        let switched = wait(async {
            let switch = handle.switch(Some((Arc::clone(&there) as _, "nbd://there/x".into())));
            let mut switch = std::pin::pin!(switch);
            // The order is given; it waits for the read.
            assert!(futures_util::poll!(switch.as_mut()).is_pending());
            gate.admit(1);
            switch.await
        });
        assert!(switched.unwrap().in_flight <= 1);
        assert!(client.receive().bytes()[10..16] == *b"before");
        assert_eq!(client.write(20, b"after"), None);
        let calls = here.take();
        assert_eq!(calls.last(), Some(&Recorded::Flush), "{calls:?}");
        let written = |calls: &[Recorded]| calls.iter().any(|call| matches!(call, Recorded::Write(_)));
        assert!(written(&calls) && written(&there.take()));
        gate.open();
        wait(handle.switch(None)).unwrap();
        assert!(client.read(10, 20)[..6] == *b"before", "its own export again");
        assert!(here.take().iter().any(|call| matches!(call, Recorded::Read(_))));
    });
}

#[test]
fn a_writer_stays_where_its_writes_cannot_be_made_durable() {
    let is_flush = |range: ByteRange| range.is_empty().then(|| Error::new(ErrorKind::Io, "a fault of a test"));
    let here = Arc::new(Record::new(Arc::new(Fault::new(Arc::new(Memory::holding(bytes())), is_flush))));
    let there = Arc::new(Record::new(Arc::new(Memory::holding(bytes()))));
    served(vec![("x", Arc::clone(&here) as _)], |uri, steering| {
        let mut client = Client::open(uri);
        assert_eq!(client.write(0, b"before"), None);
        let handle = only(steering);
        let result = wait(handle.switch(Some((Arc::clone(&there) as _, "nbd://there/x".into()))));
        assert!(matches!(result, Err(SwitchError::Flush(_))), "{result:?}");
        assert_eq!(handle.status().unwrap().relayed_to, None);
        assert_eq!(client.write(6, b"after"), None);
        assert_eq!(client.read(0, 11), b"beforeafter");
        assert!(there.take().is_empty());
    });
}

#[test]
fn an_order_that_is_taken_back_leaves_the_writer_as_it_was() {
    let gate = Arc::new(Gate::new(Arc::new(Memory::holding(bytes()))));
    let there = Arc::new(Record::new(Arc::new(Memory::holding(bytes()))));
    served(vec![("x", Arc::clone(&gate) as _)], |uri, steering| {
        let mut client = Client::open(uri);
        client.send(command::READ, CommandFlags::empty(), 7, 0, 100, &[]);
        wait(gate.arrived(1));
        let handle = only(steering);
        wait(async {
            let mut switch = Box::pin(handle.switch(Some((Arc::clone(&there) as _, "nbd://there/x".into()))));
            assert!(futures_util::poll!(&mut switch).is_pending());
        });
        // A read is in flight, and yet requests are taken.
        assert_eq!(client.write(0, b"on"), None);
        gate.open();
        client.receive().bytes();
        assert!(there.take().is_empty());
    });
}

#[test]
fn a_writer_that_leaves_while_it_is_switched_ends_the_order() {
    let gate = Arc::new(Gate::new(Arc::new(Memory::holding(bytes()))));
    served(vec![("x", Arc::clone(&gate) as _)], |uri, steering| {
        let mut client = Client::open(uri);
        client.send(command::READ, CommandFlags::empty(), 7, 0, 100, &[]);
        wait(gate.arrived(1));
        let handle = only(steering);
        wait(async {
            let mut switch = Box::pin(handle.switch(Some((image(), "nbd://there/x".into()))));
            assert!(futures_util::poll!(&mut switch).is_pending());
            drop(client);
            gate.open();
            // Either it was done just before the client was missed, or the client was missed first.
            let result = switch.await;
            assert!(matches!(result, Ok(_) | Err(SwitchError::Gone)), "{result:?}");
            handle.gone().await;
        });
    });
}

#[test]
fn a_switch_that_waits_does_not_stand_in_the_way_of_the_end() {
    let gate = Arc::new(Gate::new(Arc::new(Memory::holding(bytes()))));
    served(vec![("x", Arc::clone(&gate) as _)], |uri, steering| {
        let mut client = Client::open(uri);
        client.send(command::READ, CommandFlags::empty(), 7, 50, 100, &[]);
        wait(gate.arrived(1));
        let handle = only(steering);
        let result = wait(async {
            let mut switch = Box::pin(handle.switch(Some((image(), "nbd://there/x".into()))));
            assert!(futures_util::poll!(&mut switch).is_pending());
            handle.close();
            // It has no time for a switch any more, but it takes what has been asked.
            assert_eq!(client.write(0, b"last words"), None);
            switch.await
        });
        assert!(matches!(result, Err(SwitchError::Gone)), "{result:?}");
        gate.open();
        assert!(client.receive().bytes() == bytes()[50..150]);
        assert!(client.socket.is_closed_by_peer());
        wait(handle.gone());
    });
}

#[test]
fn contexts_that_were_promised_are_answered_also_where_there_are_none() {
    let here = Memory::holding(bytes()).read_only().with_facts(|facts| facts.contexts.push(Context::Residency));
    served(vec![("x", Arc::new(here))], |uri, steering| {
        let mut client = Client::open_asking(uri, &[Context::Residency.name()], &["x-headwater:"]);
        assert!(client.agreed.listed.contains(&format!("x-headwater:origin={}", steering.node)));
        assert_eq!(client.ask(command::BLOCK_STATUS, 0, 4096).error, Some(ErrorKind::Invalid), "as memory has it");
        wait(only(steering).switch(Some((image(), "nbd://there/x".into())))).unwrap();
        assert_eq!(status(&client.ask(command::BLOCK_STATUS, 0, 4096)), [(4096, 0)]);
    });
}

#[test]
fn a_close_waits_for_what_is_under_way_and_takes_requests_meanwhile() {
    let gate = Arc::new(Gate::new(image()));
    served(vec![("x", Arc::clone(&gate) as _)], |uri, steering| {
        let mut client = Client::open(uri);
        client.send(command::READ, CommandFlags::empty(), 7, 0, 100, &[]);
        wait(gate.arrived(1));
        let handle = only(steering);
        handle.close();
        assert_eq!(status(&client.ask(command::BLOCK_STATUS, 0, 4096)), [(4096, 0)]);
        gate.open();
        assert!(client.receive().bytes() == bytes()[..100]);
        assert!(client.socket.is_closed_by_peer());
        wait(handle.gone());
    });
}

#[test]
fn idle_and_unfinished_clients_are_closed() {
    served(vec![("x", Arc::new(Memory::holding(bytes())))], |uri, steering| {
        let mut idle = Client::open(uri);
        only(steering).close();
        assert!(idle.socket.is_closed_by_peer());
        // Half a request, and the rest never comes: then the time is up at last.
        let mut lazy = Client::open_simple(uri);
        lazy.socket.write_all(&wire::REQUEST_MAGIC.to_be_bytes()).unwrap();
        only(steering).close();
        assert!(lazy.socket.is_closed_by_peer());
    });
}

/// A negotiation without structured replies: the flags, and one query of LIST_META_CONTEXT.
fn told(uri: &str, export: &str, query: &str) -> Socket {
    let mut socket = Socket::connect(uri);
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&[0, 0, 0, 3]).unwrap();
    let mut data = Vec::new();
    let put = |data: &mut Vec<u8>, text: &str| {
        data.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
        data.extend(text.as_bytes());
    };
    put(&mut data, export);
    data.extend(1u32.to_be_bytes());
    put(&mut data, query);
    socket.write_all(&wire::OPTION_MAGIC.to_be_bytes()).unwrap();
    socket.write_all(&option::LIST_META_CONTEXT.to_be_bytes()).unwrap();
    socket.write_all(&u32::try_from(data.len()).unwrap().to_be_bytes()).unwrap();
    socket.write_all(&data).unwrap();
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..16], option_reply::ACK.to_be_bytes(), "{query}");
    socket
}

#[test]
fn a_connection_is_closed_by_its_name() {
    served(vec![("x", image()), ("y", image())], |uri, steering| {
        let token = "c0ffee00".repeat(4);
        let mut named = told(uri, "x", &format!("x-headwater:connection={token}"));
        let mut choice = wire::OPTION_MAGIC.to_be_bytes().to_vec();
        choice.extend(option::EXPORT_NAME.to_be_bytes());
        choice.extend(1u32.to_be_bytes());
        choice.push(b'x');
        named.write_all(&choice).unwrap();
        named.read_exact(&mut [0; 10]).unwrap();
        let handle = only(steering);
        // Neither by another name nor as another export's.
        told(uri, "x", &format!("x-headwater:close={}", "c0ffee01".repeat(4)));
        told(uri, "y", &format!("x-headwater:close={token}"));
        let mut other = Client::open(uri);
        assert!(other.read(5, 5) == bytes()[5..10]);
        assert!(handle.status().is_some());
        steering.gate.shut(None);
        told(uri, "x", &format!("x-headwater:close={token}"));
        assert!(named.is_closed_by_peer());
        wait(handle.gone());
        assert!(other.read(5, 5) == bytes()[5..10]);
    });
}

#[test]
fn a_mirror_is_told_its_news_once_and_at_once() {
    let uris: Vec<Uri> = ["nbd://there/x", "nbd://else,where/x"].map(|uri| uri.parse().unwrap()).into();
    let nodes = [NodeId([1; 16]), NodeId([2; 16])];
    let named = nodes.map(|node| format!("{}{node}", wire::MIRROR_NODE));
    let mut left = served(vec![("x", image())], |uri, steering| {
        let open = |name: &str| Client::open_asking(uri, &[wire::NOTICE], &["x-headwater:", name]);
        let mut client = open(&named[0]);
        let handle = only(steering);
        assert!(!handle.hears_notices());
        assert_eq!(handle.node(), Some(nodes[0]));
        assert!(client.agreed.listed.contains(&wire::NOTICE.to_owned()));
        assert!(!client.agreed.listed.iter().any(|text| text.contains("moved=")));

        ask_notice(&mut client, 1);
        ask_notice(&mut client, 2);
        let refused = client.receive();
        assert_eq!((refused.cookie, refused.error), (2, Some(ErrorKind::Invalid)), "one at a time");
        assert!(handle.hears_notices());
        steering.notices.tell("x", nodes[1], News::Upstreams(uris.clone()));
        steering.notices.tell("x", nodes[0], News::Moved(uris.clone()));
        let reply = client.receive();
        assert_eq!((reply.cookie, status(&reply)), (1, vec![(4096, 1)]));
        // The same news are no news; the connection does its other work meanwhile.
        ask_notice(&mut client, 3);
        assert!(client.read(0, 10) == bytes()[..10]);
        // What came before it asked is told at once.
        let mut second = open(&named[1]);
        assert!(second.agreed.listed.contains(&"x-headwater:upstreams=nbd://there/x,nbd://else%2Cwhere/x".to_owned()));
        assert_eq!(status(&second.ask(command::BLOCK_STATUS, 0, 4096)), [(4096, 1)]);
        ask_notice(&mut second, 4);

        // A close does not wait for it, and there were no news for either.
        steering.notices.forget("x", nodes[0]);
        steering.clients.of_export("x").iter().for_each(ClientHandle::close);
        assert_eq!(status(&client.receive()), [(4096, 0)]);
        assert_eq!(status(&second.receive()), [(4096, 0)]);
        assert!(client.socket.is_closed_by_peer() && second.socket.is_closed_by_peer());
        let mut third = open(&named[0]);
        assert!(!third.agreed.listed.iter().any(|text| text.contains("moved=")));
        // Nor does the end of the server.
        ask_notice(&mut third, 5);
        third
    });
    assert_eq!(status(&left.receive()), [(4096, 0)]);
}

#[test]
fn newcomers_are_sent_away_and_the_others_stay() {
    served(vec![("x", image()), ("y", image())], |uri, steering| {
        let mut client = Client::open(uri);
        let other = uri.replace("/x?", "/y?");
        for export in [Some("x"), None] {
            steering.gate.shut(export);
            assert!(Client::try_open(uri, &[]).is_err_and(|error| error.to_string().contains("shutting down")));
            assert_eq!(Client::try_open(&other, &[]).is_ok(), export.is_some());
            assert!(client.read(0, 10) == bytes()[..10]);
            steering.gate.open(export);
            assert!(Client::open(uri).read(0, 10) == bytes()[..10]);
        }
    });
}
