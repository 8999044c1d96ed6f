//! Exports as the negotiation presents them.

use super::steering::Steering;
use crate::export::{Context, Facts, NodeId, Registry, SharedExport, Visitor};
use crate::nbd::Listing;
use crate::nbd::handshake::server::{Directory, Id, Verdict};
use crate::nbd::wire::{NOTICE, TransmissionFlags};
use crate::telemetry::{foreign, seldom};

/// A metadata context that clients may select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offered {
    /// The export answers.
    Export(Context),
    /// The server answers, when there is something new: [`NOTICE`].
    Notice,
}

impl Offered {
    /// The one with this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        let all = [Self::Export(Context::Allocation), Self::Export(Context::Residency), Self::Notice];
        all.into_iter().find(|offered| offered.name() == name)
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Export(context) => context.name(),
            Self::Notice => NOTICE,
        }
    }
}

/// A registry, as seen by one negotiation.
#[derive(Debug)]
pub(super) struct Exports<'a> {
    pub(super) registry: &'a Registry,
    pub(super) steering: &'a Steering,
    pub(super) draining: bool,
    pub(super) visitor: &'a Visitor,
}

impl Directory for Exports<'_> {
    type Export = (SharedExport, Vec<Offered>);

    fn find(&self, name: &str) -> Option<(Self::Export, Listing)> {
        let (name, export) = self.registry.find(name)?;
        let mut facts = export.facts();
        if facts.path.is_empty() {
            facts.origin = Some(self.steering.node);
        }
        let offered: Vec<_> = facts.contexts.iter().copied().map(Offered::Export).chain([Offered::Notice]).collect();
        let listing = listing(name, &facts, &offered);
        Some(((export, offered), listing))
    }

    fn list(&self) -> Vec<(String, String)> {
        let open = self.registry.all().into_iter();
        let open = open.filter(|(name, _)| !self.steering.gate.is_shut(name) && self.may_have(name));
        open.map(|(name, export)| (name, export.facts().description)).collect()
    }

    fn is_draining(&self) -> bool {
        self.draining
    }

    fn is_shut(&self, name: &str) -> bool {
        self.steering.gate.is_shut(name)
    }

    fn verdict(&self, name: &str) -> Verdict {
        let Err(why) = self.steering.access.judge(name, self.visitor) else { return Verdict::Admitted };
        let (address, reason) = (self.visitor.address, why);
        seldom!(info, %address, export = foreign(name), %reason, "an export was denied to a client");
        why.into()
    }

    fn news(&self, name: &str, mirror: Id) -> Vec<String> {
        self.steering.notices.strings(name, NodeId(mirror))
    }

    fn close(&self, name: &str, connection: Id) {
        // Of another content of the image there may be rules of its own.
        self.steering.clients.close(name, connection, |export| self.may_have(export));
    }
}

impl Exports<'_> {
    fn may_have(&self, name: &str) -> bool {
        self.steering.access.judge(name, self.visitor).is_ok()
    }
}

fn listing(name: String, facts: &Facts, offered: &[Offered]) -> Listing {
    Listing {
        name,
        description: facts.description.clone(),
        size: facts.size,
        flags: flags(facts),
        block_sizes: facts.block_sizes,
        contexts: offered.iter().map(|context| context.name().to_owned()).collect(),
        facts: facts.to_strings(),
    }
}

/// The flags of an export, as clients are told. They depend on nothing but its capabilities, so that the same image has the same flags on
/// every tier: the kernel's client cannot take new ones when it is redirected.
pub fn flags(facts: &Facts) -> TransmissionFlags {
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE;
    flags.set(TransmissionFlags::READ_ONLY, !facts.writable);
    flags.set(TransmissionFlags::CAN_MULTI_CONN, facts.is_shared);
    if facts.writable {
        flags |= TransmissionFlags::SEND_WRITE_ZEROES;
        flags.set(TransmissionFlags::SEND_TRIM, facts.can_trim);
        flags.set(TransmissionFlags::SEND_FAST_ZERO, facts.can_zero_fast);
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::access::{Lists, Network, Rules};
    use crate::export::memory::Memory;
    use crate::export::{ImageId, Origin, TlsPeer};
    use crate::nbd::handshake::server::{Progress, ServerHandshake};
    use crate::nbd::wire::{self, option};
    use crate::server::clients::Newcomer;
    use bytes::BytesMut;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    #[test]
    fn flags_follow_capabilities() {
        let mut facts = Facts::read_only(1, "");
        let names = |facts: &Facts| flags(facts).iter_names().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&facts), ["HAS_FLAGS", "READ_ONLY", "SEND_FLUSH", "SEND_FUA", "CAN_MULTI_CONN", "SEND_CACHE"]);
        // Without effect on a read-only export.
        facts.can_trim = true;
        assert!(!names(&facts).contains(&"SEND_TRIM"));
        (facts.writable, facts.is_shared) = (true, false);
        assert_eq!(
            names(&facts),
            ["HAS_FLAGS", "SEND_FLUSH", "SEND_FUA", "SEND_TRIM", "SEND_WRITE_ZEROES", "SEND_CACHE"]
        );
    }

    /// Exports that nobody may have, that all may have, and what is beside them; each with a size and a description that no
    /// other has.
    fn registry() -> Registry {
        let registry = Registry::new();
        for (index, name) in NAMES.into_iter().enumerate() {
            let size = SIZE + u64::try_from(index).unwrap();
            let export = Memory::zeroed(1).with_facts(|facts| {
                facts.size = size;
                facts.description = secret(name);
                facts.identity = Some(ImageId([0x10 + u8::try_from(index).unwrap(); 32]));
            });
            registry.insert(name, Arc::new(export)).unwrap();
        }
        registry
    }

    const NAMES: [&str; 4] = ["", "a", "a@manifest", "b"];
    const SIZE: u64 = 0x5ec2_e700_0000_0000;

    fn secret(name: &str) -> String {
        format!("secret of <{name}>")
    }

    fn id(index: usize) -> String {
        ImageId([0x10 + u8::try_from(index).unwrap(); 32]).to_string()
    }

    /// All that a client could call an export.
    fn spellings() -> Vec<String> {
        let names = NAMES.iter().map(|name| (*name).to_owned());
        let contents = NAMES.iter().flat_map(|name| (0..NAMES.len()).map(move |index| format!("{name}@{}", id(index))));
        let plain: Vec<_> = names.chain(contents).collect();
        let sides = ["", "@manifest", "@profile", "@profile-inbox", "@manifest@profile"];
        plain.iter().flat_map(|name| sides.map(|side| format!("{name}{side}"))).collect()
    }

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn string(text: &str) -> Vec<u8> {
        [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
    }

    /// Everything that a client can be told in answer to options that name `name`.
    fn told(exports: &Exports<'_>, name: &str) -> Vec<u8> {
        let queries = |name: &str| [string(name), 1_u32.to_be_bytes().to_vec(), string("x-headwater:")].concat();
        let info = [string(name), 3_u16.to_be_bytes().to_vec(), vec![0, 1, 0, 2, 0, 3]].concat();
        let options = [
            vec![option(option::STRUCTURED_REPLY, b""), option(option::LIST, b"")],
            vec![option(option::INFO, &info)],
            vec![option(option::LIST_META_CONTEXT, &queries(name))],
            vec![option(option::STRUCTURED_REPLY, b""), option(option::SET_META_CONTEXT, &queries(name))],
            vec![option(option::GO, &info)],
            vec![option(option::EXPORT_NAME, name.as_bytes())],
        ];
        let mut all = Vec::new();
        for options in options {
            let mut output = BytesMut::new();
            let mut handshake = ServerHandshake::new(&mut output);
            let mut input = BytesMut::from(&[&[0, 0, 0, 3][..], &options.concat()].concat()[..]);
            loop {
                match handshake.advance(&mut input, exports, &mut output) {
                    Ok(Progress::Continue) => {}
                    Ok(Progress::Finished(chosen)) => {
                        output.extend_from_slice(chosen.export.0.facts().description.as_bytes());
                        break;
                    }
                    Ok(Progress::NeedInput | Progress::Aborted | Progress::StartTls) | Err(_) => break,
                }
            }
            all.extend_from_slice(&output);
        }
        all
    }

    fn has(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    fn rules() -> impl Strategy<Value = Rules> {
        let networks = ["10.0.0.0/8", "192.0.2.1", "::/0"].map(|text| text.parse::<Network>().unwrap());
        let networks = proptest::sample::subsequence(networks.to_vec(), 1..=2);
        let names = proptest::sample::subsequence(vec!["x".to_owned(), "y".to_owned()], 1..=2);
        let keys = || proptest::sample::select(NAMES.to_vec()).prop_map(str::to_owned);
        use proptest::collection::{btree_map, btree_set};
        (
            proptest::option::of(networks.clone()),
            btree_map(keys(), networks, 0..3),
            proptest::option::of(names.clone()),
            btree_map(keys(), names, 0..3),
            btree_set(keys(), 0..3),
        )
            .prop_map(|(all, of, all_names, of_names, tls)| Rules {
                addresses: Lists { all: all.unwrap_or_default(), of },
                names: Lists { all: all_names.unwrap_or_default(), of: of_names },
                tls,
            })
    }

    fn visitors() -> impl Strategy<Value = Visitor> {
        let origins =
            ["10.1.1.1", "192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|text| Origin::Ip(text.parse().unwrap()));
        let origins = [&origins[..], &[Origin::Unix, Origin::Unknown]].concat();
        let tls = proptest::option::of(proptest::sample::subsequence(vec!["x".to_owned(), "y".to_owned()], 0..=1));
        (proptest::sample::select(origins), tls)
            .prop_map(|(address, tls)| Visitor { address, tls: tls.map(|names| TlsPeer { names }) })
    }

    /// Whether a visitor may have one of [`NAMES`], as an operator would find out by looking at the rules.
    fn may(rules: &Rules, name: &str, visitor: &Visitor) -> bool {
        let own: &[&str] = if name == "a@manifest" { &["a@manifest", "a"] } else { &[name] };
        let has_addresses = own.iter().any(|name| rules.addresses.of.contains_key(*name));
        let in_list = |list: &Vec<Network>| match visitor.address {
            Origin::Unix => true,
            Origin::Unknown => list.is_empty(),
            Origin::Ip(ip) => list.is_empty() || list.iter().any(|network| network.contains(ip)),
        };
        let addresses = match has_addresses {
            true => own.iter().filter_map(|name| rules.addresses.of.get(*name)).all(in_list),
            false => in_list(&rules.addresses.all),
        };
        let has_names = own.iter().any(|name| rules.names.of.contains_key(*name));
        let shown = |list: &Vec<String>| {
            list.is_empty()
                || visitor.tls.as_ref().is_some_and(|peer| peer.names.iter().any(|name| list.contains(name)))
        };
        let names = match has_names {
            true => own.iter().filter_map(|name| rules.names.of.get(*name)).all(shown),
            false => shown(&rules.names.all),
        };
        addresses && names && (visitor.tls.is_some() || !own.iter().any(|name| rules.tls.contains(*name)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// No option gives anything of an export that the client may not have, whatever it calls it; and of those that it
        /// may have, each has a name by which it is told all.
        #[test]
        fn nothing_is_told_of_what_a_visitor_may_not_have(rules in rules(), visitor in visitors()) {
            let registry = registry();
            let steering = Steering::default();
            steering.access.set(rules.clone());
            let exports = Exports { registry: &registry, steering: &steering, draining: false, visitor: &visitor };
            let mut answers = BTreeMap::new();
            for spelling in spellings() {
                let told = told(&exports, &spelling);
                for (index, name) in NAMES.into_iter().enumerate() {
                    let size = (SIZE + u64::try_from(index).unwrap()).to_be_bytes();
                    let (secret, id) = (secret(name), id(index));
                    let hints: [&[u8]; 3] = [&size, secret.as_bytes(), id.as_bytes()];
                    let spelled = spelling.contains(&id);
                    let is_told = hints.iter().enumerate().any(|(kind, hint)| {
                        // What the client said itself may come back in a message.
                        (kind < 2 || !spelled) && has(&told, hint)
                    });
                    prop_assert!(!is_told || may(&rules, name, &visitor), "{spelling:?} tells of {name:?}");
                    if spelling == name {
                        answers.insert(name, has(&told, &size));
                    }
                }
            }
            for name in NAMES {
                prop_assert_eq!(answers[name], may(&rules, name, &visitor), "{:?}", name);
            }
        }
    }

    /// A client that may have an export only in one content must not close connections to another.
    #[test]
    fn connections_are_closed_by_those_who_could_have_them() {
        let registry = Registry::new();
        let older = format!("a@{}", id(0));
        for name in ["a", &older] {
            registry.insert(name, Arc::new(Memory::zeroed(1))).unwrap();
        }
        let steering = Steering::default();
        let mut rules = Rules::default();
        rules.addresses.add(None, vec!["10.0.0.0/8".parse().unwrap()]);
        rules.addresses.add(Some(&older), vec!["192.0.2.1".parse().unwrap()]);
        steering.access.set(rules);
        let connection = Some([7; 16]);
        let enter = |export: &str| {
            steering.clients.enter(Newcomer { export: export.to_owned(), connection, ..Newcomer::default() })
        };
        let entries = [enter("a"), enter(&older)];
        let is_closing = || entries.each_ref().map(|entry| entry.client().desk.is_closing());
        let close = |address: &str| {
            let visitor = Visitor { address: Origin::Ip(address.parse().unwrap()), tls: None };
            Exports { registry: &registry, steering: &steering, draining: false, visitor: &visitor }
                .close(&older, [7; 16]);
        };
        close("192.0.2.1");
        assert_eq!(is_closing(), [false, true]);
        close("10.1.1.1");
        assert_eq!(is_closing(), [true, true]);
    }
}
