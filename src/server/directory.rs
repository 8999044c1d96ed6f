//! Exports as the negotiation presents them.

use super::steering::Steering;
use crate::export::{Context, Facts, NodeId, Registry, SharedExport, Visitor};
use crate::nbd::Listing;
use crate::nbd::handshake::server::{Directory, Id, Verdict};
use crate::nbd::wire::{NOTICE, TransmissionFlags};

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
        let is_open = |name: &str| !self.steering.gate.is_shut(name) && self.verdict(name) == Verdict::Admitted;
        let open = self.registry.all().into_iter().filter(|(name, _)| is_open(name));
        open.map(|(name, export)| (name, export.facts().description)).collect()
    }

    fn is_draining(&self) -> bool {
        self.draining
    }

    fn is_shut(&self, name: &str) -> bool {
        self.steering.gate.is_shut(name)
    }

    fn verdict(&self, name: &str) -> Verdict {
        self.steering.access.verdict(name, self.visitor)
    }

    fn news(&self, name: &str, mirror: Id) -> Vec<String> {
        self.steering.notices.strings(name, NodeId(mirror))
    }

    fn close(&self, name: &str, connection: Id) {
        self.steering.clients.close(name, connection);
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
}
