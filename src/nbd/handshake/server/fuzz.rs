//! A negotiation that is fed arbitrary bytes.
//!
//! Owns: what must hold whatever comes. Does not own: who feeds it (`fuzz`, tests).

use bytes::{BufMut, BytesMut};

use super::{Directory, Id, MAX_OPTION_DATA, OPTION_HEADER, Progress, ServerHandshake, TlsPolicy, data_length};
use crate::nbd::wire::{self, TransmissionFlags};
use crate::nbd::{BlockSizes, Listing};

/// Feeds arbitrary bytes to a negotiation, in pieces whose sizes the bytes themselves decide.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    /// One that takes newcomers, and one that does not.
    struct Two;
    impl Directory for Two {
        type Export = ();
        fn find(&self, name: &str) -> Option<((), Listing)> {
            let name = if name.is_empty() { "a" } else { name };
            ["a", "b"].contains(&name).then(|| ((), Listing { name: name.into(), ..sample() }))
        }
        fn list(&self) -> Vec<(String, String)> {
            vec![("a".into(), "an image".into())]
        }
        fn is_draining(&self) -> bool {
            false
        }
        fn is_shut(&self, name: &str) -> bool {
            name == "b"
        }
        fn news(&self, _: &str, mirror: Id) -> Vec<String> {
            (mirror[0] == 0).then(|| "x-headwater:moved=nbd://b/a".into()).into_iter().collect()
        }
    }
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let policies = [TlsPolicy::Off, TlsPolicy::Allow, TlsPolicy::Require];
    let policy = policies[usize::from(data.last().copied().unwrap_or(0)) % policies.len()];
    let mut handshake = ServerHandshake::new(&mut output).with_tls(policy);
    for piece in data.chunks(usize::from(data.first().copied().unwrap_or(0)) + 1) {
        input.put_slice(piece);
        loop {
            output.clear();
            match handshake.advance(&mut input, &Two, &mut output) {
                Ok(Progress::Continue) => assert!(output.len() < 64 << 10, "a reply larger than its option allows"),
                Ok(Progress::NeedInput) => break,
                Ok(Progress::StartTls) => {
                    assert!(input.is_empty(), "something is left for TLS");
                    handshake = handshake.secured();
                }
                Ok(Progress::Finished(_) | Progress::Aborted) | Err(_) => return,
            }
        }
        assert!(input.len() <= OPTION_HEADER + data_length(MAX_OPTION_DATA) + 256, "input piles up");
    }
}

/// An export for tests and fuzzing.
pub(super) fn sample() -> Listing {
    Listing {
        name: "a".into(),
        description: "an image".into(),
        size: 1 << 20,
        flags: TransmissionFlags::READ_ONLY,
        block_sizes: BlockSizes::DEFAULT,
        contexts: vec![wire::BASE_ALLOCATION.into(), "x-headwater:residency".into()],
        facts: vec!["x-headwater:node=1".into()],
    }
}
