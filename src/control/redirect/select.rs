//! Who is moved: the clients of an export, of which all connections of one mirror are one, and the choice among them.
//!
//! Pure. Owns: grouping and choosing. Does not own: who is connected (`server`), how they are moved (`runner`).

use std::collections::BTreeMap;

use super::order::RedirectOrder;
use crate::control::operated::Refusal;
use crate::export::NodeId;
use crate::units::{to_u64, to_usize};

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) id: u64,
    /// The mirror that it belongs to.
    pub(super) node: Option<NodeId>,
    /// Whether news reach the mirror over it.
    pub(super) hears: bool,
    /// Whether it is served from elsewhere already.
    pub(super) is_relayed: bool,
}

/// One client: a connection, or all those of a mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// Its connections, oldest first; never empty.
    pub(super) ids: Vec<u64>,
    pub(super) node: Option<NodeId>,
    /// Whether it hears notices.
    pub(super) hears: bool,
}

/// Which clients an order is for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Choice {
    /// These, and nobody else.
    Ids(Vec<u64>),
    /// This part of them, rounded half up, at least one.
    Fraction(f64),
    /// So many.
    Count(u64),
    /// All.
    All,
}

impl Choice {
    /// What an order says.
    pub(super) fn of(order: &RedirectOrder) -> Result<Self, Refusal> {
        let invalid = |why: &str| Err(Refusal::Invalid(why.to_owned()));
        match (&order.clients, order.fraction, order.count, order.all) {
            (Some(ids), None, None, false) if ids.is_empty() => invalid("no client is named"),
            (Some(ids), None, None, false) => Ok(Self::Ids(ids.clone())),
            (None, Some(part), None, false) if part > 0.0 && part <= 1.0 => Ok(Self::Fraction(part)),
            (None, Some(_), None, false) => invalid("a fraction is above 0 and at most 1"),
            (None, None, Some(0), false) => invalid("a count of 0 moves nobody"),
            (None, None, Some(count), false) => Ok(Self::Count(count)),
            (None, None, None, _) => Ok(Self::All),
            _ => invalid("of clients, fraction, count and all only one can be given"),
        }
    }
}

/// The clients that these connections belong to, oldest first.
pub(super) fn group(candidates: &[Candidate]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut mirrors = BTreeMap::new();
    let mut sorted: Vec<_> = candidates.iter().collect();
    sorted.sort_by_key(|candidate| candidate.id);
    for candidate in sorted {
        let known = candidate.node.and_then(|node| mirrors.get(&node.0).copied());
        match known {
            Some(index) => {
                let group: &mut Group = &mut groups[index];
                group.ids.push(candidate.id);
                group.hears |= candidate.hears;
            }
            None => {
                if let Some(node) = candidate.node {
                    mirrors.insert(node.0, groups.len());
                }
                let Candidate { id, node, hears, .. } = *candidate;
                groups.push(Group { ids: vec![id], node, hears });
            }
        }
    }
    groups
}

/// Chooses among clients, oldest first.
pub(super) fn choose(groups: Vec<Group>, choice: &Choice) -> Result<Vec<Group>, Refusal> {
    let most = match choice {
        Choice::Ids(ids) => return choose_ids(groups, ids),
        Choice::All => groups.len(),
        Choice::Count(count) => to_usize((*count).min(to_u64(groups.len()))),
        Choice::Fraction(part) => part_of(groups.len(), *part),
    };
    Ok(groups.into_iter().take(most).collect())
}

fn choose_ids(groups: Vec<Group>, ids: &[u64]) -> Result<Vec<Group>, Refusal> {
    if let Some(unknown) = ids.iter().find(|id| !groups.iter().any(|group| group.ids.contains(id))) {
        return Err(Refusal::Invalid(format!(
            "the export has no client {unknown}: headwater status has their numbers"
        )));
    }
    Ok(groups.into_iter().filter(|group| group.ids.iter().any(|id| ids.contains(id))).collect())
}

/// A part of so many, rounded half up, at least one of them and at most all.
fn part_of(count: usize, part: f64) -> usize {
    // The least number whose share is not below the part by more than half a client: exact, without casts of floats.
    let wanted = |number: u64| part * to_f64(count) < to_f64(to_usize(number)) + 0.5;
    let rounded = (0..=to_u64(count)).find(|number| wanted(*number)).map_or(count, to_usize);
    rounded.clamp(count.min(1), count)
}

fn to_f64(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(id: u64, node: Option<u8>) -> Candidate {
        Candidate { id, node: node.map(|byte| NodeId([byte; 16])), hears: false, is_relayed: false }
    }

    #[test]
    fn all_connections_of_a_mirror_are_one_client() {
        let mut list = vec![candidate(9, Some(1)), candidate(3, None), candidate(5, Some(2)), candidate(2, Some(1))];
        list[0].hears = true;
        let groups = group(&list);
        let ids: Vec<_> = groups.iter().map(|group| group.ids.clone()).collect();
        assert_eq!(ids, [vec![2, 9], vec![3], vec![5]]);
        assert_eq!(groups.iter().map(|group| group.hears).collect::<Vec<_>>(), [true, false, false]);
        let chosen = choose(groups.clone(), &Choice::Ids(vec![9])).unwrap();
        assert_eq!(chosen[0].ids, [2, 9], "any connection stands for the mirror");
        let refusal = choose(groups.clone(), &Choice::Ids(vec![3, 77])).unwrap_err();
        assert!(refusal.to_string().contains("no client 77"), "{refusal}");
        assert_eq!(choose(groups, &Choice::Count(2)).unwrap().len(), 2);
    }

    #[test]
    fn parts_are_rounded_half_up_and_never_to_nobody() {
        for (count, part, wanted) in
            [(0, 0.5, 0), (1, 0.01, 1), (2, 0.5, 1), (3, 0.5, 2), (4, 0.5, 2), (5, 0.29, 1), (5, 0.3, 2), (7, 1.0, 7)]
        {
            assert_eq!(part_of(count, part), wanted, "{part} of {count}");
        }
    }

    #[test]
    fn an_order_chooses_in_one_way() {
        let order = RedirectOrder::default();
        assert_eq!(Choice::of(&order).unwrap(), Choice::All);
        assert_eq!(Choice::of(&RedirectOrder { all: true, ..order.clone() }).unwrap(), Choice::All);
        assert_eq!(Choice::of(&RedirectOrder { count: Some(3), ..order.clone() }).unwrap(), Choice::Count(3));
        for wrong in [
            RedirectOrder { clients: Some(Vec::new()), ..order.clone() },
            RedirectOrder { count: Some(0), ..order.clone() },
            RedirectOrder { fraction: Some(0.0), ..order.clone() },
            RedirectOrder { fraction: Some(1.01), ..order.clone() },
            RedirectOrder { fraction: Some(f64::NAN), ..order.clone() },
            RedirectOrder { fraction: Some(0.5), all: true, ..order.clone() },
            RedirectOrder { fraction: Some(0.5), count: Some(1), ..order },
        ] {
            assert!(matches!(Choice::of(&wrong), Err(Refusal::Invalid(_))), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn groups_hold_each_connection_once_and_mirrors_whole(
            nodes in prop::collection::vec(prop::option::of(0u8..4), 0..20),
            part in 0.001f64..1.0,
        ) {
            let list: Vec<_> = (0u64..).zip(&nodes).map(|(id, node)| candidate(id, *node)).collect();
            let groups = group(&list);
            let mut ids: Vec<_> = groups.iter().flat_map(|group| group.ids.clone()).collect();
            ids.sort_unstable();
            prop_assert_eq!(ids, (0..to_u64(list.len())).collect::<Vec<_>>());
            for node in 0..4 {
                let of_node = groups.iter().filter(|group| group.node == Some(NodeId([node; 16]))).count();
                prop_assert_eq!(of_node, usize::from(nodes.contains(&Some(node))));
            }
            let chosen = choose(groups.clone(), &Choice::Fraction(part)).unwrap();
            let exact = part * to_f64(groups.len());
            prop_assert!((to_f64(chosen.len()) - exact).abs() <= 0.5 || (chosen.len() == 1 && exact < 0.5));
            prop_assert_eq!(&groups[..chosen.len()], &chosen[..]);
        }
    }
}
