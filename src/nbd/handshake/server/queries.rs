//! Queries of LIST_META_CONTEXT and SET_META_CONTEXT: taken apart, and what a client says with them.
//!
//! Owns: what is said in queries that name no context. Does not own: the contexts, and what is done about it.

use bytes::Buf;

use super::super::take_string;
use crate::nbd::wire;

/// Names something that only those know who have been told: a mirror, a connection. 32 hexadecimal digits on the wire.
pub type Id = [u8; 16];

/// The name and the queries in the data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) fn parse_queries(mut data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let name = take_string(&mut data)?;
    let count = data.try_get_u32().ok()?;
    // No allocation by a number that the client made up: each query takes at least four bytes.
    let queries: Option<Vec<_>> = (0..count).map(|_| take_string(&mut data)).collect();
    data.is_empty().then_some((name, queries?))
}

/// Whether `query` is the bare namespace (`base:`) of `context`.
pub(super) fn is_namespace_of(query: &str, context: &str) -> bool {
    query.ends_with(':') && context.split_inclusive(':').next() == Some(query)
}

/// What a client says of itself, and asks for, in the queries of LIST_META_CONTEXT. No context has such a name.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) is_mirror: bool,
    pub(super) mirror: Option<Id>,
    pub(super) is_relay: bool,
    pub(super) connection: Option<Id>,
    pub(super) close: Option<Id>,
}

impl Said {
    pub(super) fn by(queries: &[&str]) -> Self {
        let id = |prefix: &str| queries.iter().find_map(|query| parse_id(query.strip_prefix(prefix)?));
        let mirror = id(wire::MIRROR_NODE);
        Self {
            is_mirror: mirror.is_some() || queries.contains(&wire::MIRROR),
            mirror,
            is_relay: queries.contains(&wire::RELAY),
            connection: id(wire::CONNECTION),
            close: id(wire::CLOSE),
        }
    }

    /// Whether it may look at an export that takes no newcomers: mirrors ask where to go, and those who move a
    /// connection end the old one.
    pub(super) const fn is_let_in(&self) -> bool {
        self.mirror.is_some() || self.close.is_some()
    }
}

/// Reads an [`Id`] from its hexadecimal digits.
fn parse_id(digits: &str) -> Option<Id> {
    let is_id = digits.len() == 2 * size_of::<Id>() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_id.then(|| u128::from_str_radix(digits, 16).ok()).flatten().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood_and_nothing_else() {
        let digits = "00ff".repeat(8);
        let id = [0, 0xff].repeat(8);
        let whole = |prefix: &str| format!("{prefix}{digits}");
        let said = Said::by(&[&whole(wire::MIRROR_NODE), &whole(wire::CONNECTION), &whole(wire::CLOSE)]);
        assert!(said.is_mirror && said.is_let_in());
        assert_eq!(
            [said.mirror, said.connection, said.close].map(|id| id.unwrap().to_vec()),
            [(); 3].map(|()| id.clone())
        );
        let said = Said::by(&[wire::MIRROR]);
        assert!(said.is_mirror && said.mirror.is_none() && !said.is_let_in());
        for wrong in ["", "00", "+f", "é", &digits[1..], &format!("{digits}0"), &format!("+{}", &digits[1..])] {
            let said = Said::by(&[&format!("{}{wrong}", wire::MIRROR_NODE), &format!("{}{wrong}", wire::CLOSE)]);
            assert!(!said.is_mirror && !said.is_let_in(), "{wrong:?}");
        }
        assert!(Said::by(&["base:allocation", &digits]).mirror.is_none());
        let said = Said::by(&[wire::RELAY]);
        assert!(said.is_relay && !said.is_mirror && !Said::by(&["x-headwater:"]).is_relay);
    }
}
