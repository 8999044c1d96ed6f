//! Whether another server can take the clients of an export: held against it before any client is touched.
//!
//! Pure. Owns: what is compared, what can be forced, and the sentences that say so. Does not own: asking the server
//! (`targets`).
//!
//! | what | if it is not so |
//! | --- | --- |
//! | the size is the same | refused |
//! | it is read-only or writable as ours is | refused; clients of a read-only export go to a writable one by force |
//! | the identity is the same | refused; by force if one of the two does not tell it |
//! | its bytes do not come from here | this very export: that means back. Any other of ours: refused. Further back: by force |
//! | it can do all that clients were told | refused, or by force, where clients will talk to it; a relay makes up for CACHE and FAST_ZERO |
//! | it takes requests as small as ours | refused, where clients will talk to it or write |
//! | nobody writes | by force: that it holds the same writes cannot be known |

use crate::control::operated::Refusal;
use crate::export::{Facts, NodeId};
use crate::nbd::wire::TransmissionFlags;
use crate::nbd::{BlockSizes, Uri};
use crate::units::ByteSize;

/// Our side of the comparison.
#[derive(Debug, Clone)]
pub(super) struct Ours {
    pub(super) export: String,
    pub(super) facts: Facts,
    /// What clients were told.
    pub(super) flags: TransmissionFlags,
    /// What the path of this export begins with, as others see it.
    pub(super) node: NodeId,
    /// Those of all exports of this server.
    pub(super) nodes: Vec<NodeId>,
    /// Bytes that the clients that are connected now have written.
    pub(super) written: u64,
}

/// What another server says of its export.
#[derive(Debug, Clone)]
pub(super) struct Theirs {
    pub(super) uri: Uri,
    pub(super) flags: TransmissionFlags,
    pub(super) block_sizes: BlockSizes,
    /// Size, identity and path.
    pub(super) facts: Facts,
    /// Whether its name means our export, if it is on this server.
    pub(super) has_our_name: bool,
}

/// What is wanted of the other server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Clients will talk to it themselves.
    pub(super) directly: bool,
    pub(super) force: bool,
}

/// A server that can take the clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fit {
    /// It is another one. What whoever orders it should know.
    Elsewhere(Vec<String>),
    /// It is this very export: clients that are served from elsewhere come back.
    Here,
}

/// What a relay does itself for servers that cannot.
const MADE_UP: TransmissionFlags = TransmissionFlags::SEND_CACHE
    .union(TransmissionFlags::SEND_FAST_ZERO)
    .union(TransmissionFlags::CAN_MULTI_CONN)
    .union(TransmissionFlags::SEND_DF);

/// Holds a server against our export.
pub(super) fn compare(ours: &Ours, theirs: &Theirs, wanted: Wanted) -> Result<Fit, Refusal> {
    let uri = &theirs.uri;
    let mut judge = Judge { uri, force: wanted.force, warnings: Vec::new() };
    if let Some(first) = theirs.facts.way().next()
        && ours.nodes.contains(&first)
    {
        // Mirrors have a name for each image; the names of real images are those of the server.
        if first == ours.node && theirs.has_our_name {
            return Ok(Fit::Here);
        }
        return judge.refuse("it is this very server, with another image");
    }
    let (our_size, their_size) = (ours.facts.size, theirs.facts.size);
    if our_size != their_size {
        return judge.refuse(&format!("it has {their_size} bytes, and {:?} has {our_size}", ours.export));
    }
    compare_identity(&mut judge, ours, theirs)?;
    compare_access(&mut judge, ours, theirs)?;
    compare_abilities(&mut judge, ours, theirs, wanted.directly)?;
    if theirs.facts.way().any(|node| ours.nodes.contains(&node)) {
        judge.only_by_force(
            "it gets its bytes from this server: clients that it takes would still cost this server all that it lacks",
        )?;
    }
    Ok(Fit::Elsewhere(judge.warnings))
}

/// What is said of one server.
struct Judge<'a> {
    uri: &'a Uri,
    force: bool,
    warnings: Vec<String>,
}

impl Judge<'_> {
    fn refuse<T>(&self, why: &str) -> Result<T, Refusal> {
        Err(Refusal::Conflict(format!("{}: {why}", self.uri)))
    }

    fn warn(&mut self, what: &str) {
        self.warnings.push(format!("{}: {what}", self.uri));
    }

    fn only_by_force(&mut self, why: &str) -> Result<(), Refusal> {
        if !self.force {
            return self.refuse(&format!("{why} (--force orders it all the same)"));
        }
        self.warn(why);
        Ok(())
    }
}

fn compare_identity(judge: &mut Judge<'_>, ours: &Ours, theirs: &Theirs) -> Result<(), Refusal> {
    match (ours.facts.identity, theirs.facts.identity) {
        (Some(here), Some(there)) if here == there => Ok(()),
        (Some(here), Some(there)) => judge.refuse(&format!("it holds {there}, and {:?} is {here}", ours.export)),
        (here, there) => {
            let who = match (here, there) {
                (None, Some(_)) => "this server does not know what its image holds",
                (Some(_), None) => "it does not say what it holds",
                _ => "neither server says what its image holds",
            };
            judge.only_by_force(&format!(
                "{who}: if it is another image, clients get wrong bytes (headwater index gives images an identity)"
            ))
        }
    }
}

fn compare_access(judge: &mut Judge<'_>, ours: &Ours, theirs: &Theirs) -> Result<(), Refusal> {
    let is_read_only = theirs.flags.contains(TransmissionFlags::READ_ONLY);
    match (ours.facts.writable, is_read_only) {
        (true, true) => judge.refuse(&format!("it is read-only, and clients write to {:?}", ours.export)),
        (false, false) => {
            judge.only_by_force("it can be written to: its bytes may change under clients that only read")
        }
        (false, true) => Ok(()),
        (true, false) => judge.only_by_force(&format!(
            "{:?} is writable, and it cannot be known whether the other server holds the same writes. What would be \
             lost: every write here that it lacks ({} by the clients that are connected now, more before). What is \
             done: requests under way are finished and flushed here first; later writes go to the other server only",
            ours.export,
            ByteSize(ours.written)
        )),
    }
}

fn compare_abilities(judge: &mut Judge<'_>, ours: &Ours, theirs: &Theirs, directly: bool) -> Result<(), Refusal> {
    let missing = ours.flags.difference(theirs.flags | TransmissionFlags::READ_ONLY);
    if directly && !missing.is_empty() {
        judge.only_by_force(&format!("it cannot do what clients were told ({})", names(missing)))?;
    }
    // Nobody writes to a read-only export, so nobody misses its flushes.
    let needed = if ours.facts.writable { missing.difference(MADE_UP) } else { TransmissionFlags::empty() };
    if !directly && !needed.is_empty() {
        return judge.refuse(&format!("it cannot do what clients need ({})", names(needed)));
    }
    let felt = missing.intersection(TransmissionFlags::SEND_CACHE | TransmissionFlags::SEND_FAST_ZERO);
    if !directly && !felt.is_empty() {
        judge.warn(&format!("it cannot do {}: clients do without", names(felt)));
    }
    let (here, there) = (ours.facts.block_sizes.minimum, theirs.block_sizes.minimum);
    if there > here && (directly || ours.facts.writable) {
        return judge.refuse(&format!("it takes requests of whole {there} bytes only, and clients were told {here}"));
    }
    Ok(())
}

fn names(flags: TransmissionFlags) -> String {
    let names: Vec<_> = flags.iter_names().map(|(name, _)| name.trim_start_matches("SEND_")).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::ImageId;

    const NODE: NodeId = NodeId([1; 16]);
    const OTHER: NodeId = NodeId([9; 16]);

    fn read_only() -> TransmissionFlags {
        TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::READ_ONLY
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::CAN_MULTI_CONN
    }

    fn ours() -> Ours {
        let facts = Facts { identity: Some(ImageId([5; 32])), ..Facts::read_only(1000, "") };
        let nodes = vec![NODE, NodeId([2; 16])];
        Ours { export: "a".into(), facts, flags: read_only(), node: NODE, nodes, written: 0 }
    }

    fn theirs() -> Theirs {
        let facts = Facts { path: vec![OTHER], ..ours().facts };
        let uri = "nbd://second/a".parse().unwrap();
        Theirs { uri, flags: read_only(), block_sizes: BlockSizes::DEFAULT, facts, has_our_name: true }
    }

    fn judged(ours: &Ours, theirs: &Theirs, directly: bool, force: bool) -> Result<Fit, String> {
        compare(ours, theirs, Wanted { directly, force }).map_err(|refusal| refusal.to_string())
    }

    /// Whether it is refused for this reason, and also by force or not.
    #[track_caller]
    fn assert_refused(ours: &Ours, theirs: &Theirs, directly: bool, reason: &str, also_by_force: bool) {
        let refusal = judged(ours, theirs, directly, false).unwrap_err();
        assert!(refusal.contains(reason) && refusal.starts_with("nbd://second/a: "), "{refusal}");
        match judged(ours, theirs, directly, true) {
            Err(_) => assert!(also_by_force, "it cannot be forced"),
            Ok(Fit::Elsewhere(warnings)) => {
                assert!(!also_by_force && warnings.iter().any(|warning| warning.contains(reason)), "{warnings:?}");
            }
            Ok(Fit::Here) => panic!("it is taken for this server"),
        }
    }

    #[test]
    fn the_same_image_fits() {
        assert_eq!(judged(&ours(), &theirs(), true, false), Ok(Fit::Elsewhere(Vec::new())));
    }

    #[test]
    fn another_image_never_fits() {
        let mut wrong = theirs();
        wrong.facts.size = 1001;
        assert_refused(&ours(), &wrong, false, "1001 bytes", true);
        let mut wrong = theirs();
        wrong.facts.identity = Some(ImageId([6; 32]));
        assert_refused(&ours(), &wrong, false, "it holds blake3-06", true);
    }

    #[test]
    fn what_is_not_known_is_by_force() {
        let (mut silent, mut here) = (theirs(), ours());
        silent.facts.identity = None;
        assert_refused(&here, &silent, false, "it does not say what it holds", false);
        here.facts.identity = None;
        assert_refused(&here, &silent, false, "neither server", false);
        assert_refused(&here, &theirs(), false, "this server does not know", false);
    }

    #[test]
    fn servers_that_lead_here_are_recognised() {
        let mut target = theirs();
        target.facts.path = vec![NODE];
        assert_eq!(judged(&ours(), &target, false, false), Ok(Fit::Here));
        target.has_our_name = false;
        assert_refused(&ours(), &target, false, "this very server", true);
        target.facts.path = vec![NodeId([2; 16])];
        assert_refused(&ours(), &target, false, "this very server", true);
        target.facts.path = vec![OTHER, NODE];
        assert_refused(&ours(), &target, false, "still cost this server", false);
    }

    #[test]
    fn writable_exports_move_by_force_and_say_what_is_lost() {
        let writable = |flags: TransmissionFlags| flags.difference(TransmissionFlags::READ_ONLY);
        let (mut here, mut there) = (ours(), theirs());
        there.flags = writable(there.flags);
        assert_refused(&here, &there, false, "may change under clients", false);
        here.flags = writable(here.flags) | TransmissionFlags::SEND_TRIM;
        (here.facts.writable, here.written) = (true, 3 << 20);
        assert_refused(&here, &theirs(), false, "it is read-only", true);
        there.flags |= TransmissionFlags::SEND_TRIM;
        assert_refused(&here, &there, false, "3M by the clients", false);
        there.flags.remove(TransmissionFlags::SEND_TRIM);
        let refusal = judged(&here, &there, false, true).unwrap_err();
        assert!(refusal.contains("clients need (TRIM)"), "{refusal}");
    }

    #[test]
    fn who_talks_to_it_needs_all_that_was_told() {
        let mut poor = theirs();
        poor.flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY;
        assert_refused(&ours(), &poor, true, "FLUSH, ", false);
        let Ok(Fit::Elsewhere(warnings)) = judged(&ours(), &poor, false, false) else { panic!("a relay does without") };
        assert_eq!(warnings, ["nbd://second/a: it cannot do CACHE: clients do without"]);
        let mut coarse = theirs();
        coarse.block_sizes.minimum = 512;
        assert_refused(&ours(), &coarse, true, "whole 512 bytes", true);
        assert!(judged(&ours(), &coarse, false, false).is_ok());
    }
}
