//! Who asks for an export, and whether it may have it.
//!
//! | rule | lets in |
//! | --- | --- |
//! | addresses of an export, else those of all | whoever comes from one of them, or by a unix socket |
//! | names of an export, else those of all | whoever shows one of them in a certificate |
//! | TLS wanted | whoever speaks TLS |
//!
//! An export without a rule is everybody's. All rules that an export has must let a visitor in. What is beside an image
//! (`NAME@manifest`) and an older content of it (`NAME@blake3-HEX`) have its rules; if such a name has rules of its own,
//! both hold.
//!
//! Owns: what is known of whoever asks, and the rules. Does not own: how it is found out (`net`, `tls`), and how a
//! refusal is told (`server`).

mod network;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::registry::inner_name;
use crate::nbd::handshake::server::Verdict;
pub use network::{Network, ParseNetworkError};

/// Whoever asks for an export.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visitor {
    /// Where it comes from.
    pub address: Origin,
    /// Whether and as whom it speaks TLS.
    pub tls: Option<TlsPeer>,
}

/// Where a visitor comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// Nobody knows: it has left, or the system does not say. No list of addresses has it.
    #[default]
    Unknown,
    /// A unix socket, whose file mode says who may come.
    Unix,
    /// An address. One of IPv4 in the form of IPv6 is the former.
    Ip(IpAddr),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown"),
            Self::Unix => f.write_str("unix"),
            Self::Ip(address) => address.to_canonical().fmt(f),
        }
    }
}

/// Whom the other end of a TLS connection has shown itself to be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsPeer {
    /// The names in its certificate, which somebody we trust has signed; empty if it showed none.
    pub names: Vec<String>,
}

/// Why a visitor may not have an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Its address is on no list.
    Address,
    /// It does not speak TLS.
    Tls,
    /// None of the names in its certificate is on a list.
    Name,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address => "its address is not one of --allow",
            Self::Tls => "it does not speak TLS",
            Self::Name => "its certificate has no name of --allow-client",
        })
    }
}

impl From<Refused> for Verdict {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Tls => Self::NeedsTls,
            Refused::Address | Refused::Name => Self::Denied,
        }
    }
}

/// The rules of all exports of a server, which may change. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Access(Arc<RwLock<Rules>>);

/// Who may have which export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// The addresses that may come.
    pub addresses: Lists<Network>,
    /// The names in certificates that may come.
    pub names: Lists<String>,
    /// Exports that are served through TLS only.
    pub tls: BTreeSet<String>,
}

/// Lists of those who may come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lists<T> {
    /// For exports that have no list of their own; empty: everybody.
    pub all: Vec<T>,
    /// By the names of exports.
    pub of: BTreeMap<String, Vec<T>>,
}

impl<T> Default for Lists<T> {
    fn default() -> Self {
        Self { all: Vec::new(), of: BTreeMap::new() }
    }
}

impl<T> Lists<T> {
    /// Adds some to the list of an export, or of all that have none of their own. A list that there is, and that nobody is
    /// on, lets nobody in.
    pub fn add(&mut self, export: Option<&str>, more: Vec<T>) {
        match export {
            Some(export) => self.of.entry(export.to_owned()).or_default().extend(more),
            None => self.all.extend(more),
        }
    }

    /// The lists that hold for an export of this full name; none of them: everybody.
    fn holding(&self, export: &str) -> Vec<&[T]> {
        let own: Vec<_> = within(export).filter_map(|name| Some(&**self.of.get(name)?)).collect();
        if own.is_empty() && !self.all.is_empty() { vec![&*self.all] } else { own }
    }
}

impl Rules {
    /// Whether `visitor` may have the export of this full name; if not, why.
    pub fn judge(&self, export: &str, visitor: &Visitor) -> Result<(), Refused> {
        let is_on = |list: &[Network]| match visitor.address {
            Origin::Unix => true,
            Origin::Ip(address) => list.iter().any(|network| network.contains(address)),
            Origin::Unknown => false,
        };
        if !self.addresses.holding(export).into_iter().all(is_on) {
            return Err(Refused::Address);
        }
        let Some(peer) = &visitor.tls else {
            return if self.needs_tls(export) { Err(Refused::Tls) } else { Ok(()) };
        };
        let shows = |list: &[String]| list.iter().any(|wanted| peer.names.iter().any(|name| is_name(wanted, name)));
        if self.names.holding(export).into_iter().all(shows) { Ok(()) } else { Err(Refused::Name) }
    }

    /// Whether the export of this full name is served through TLS only.
    pub fn needs_tls(&self, export: &str) -> bool {
        within(export).any(|name| self.tls.contains(name)) || !self.names.holding(export).is_empty()
    }

    /// Whether not everybody may have the export of this full name.
    pub fn is_restricted(&self, export: &str) -> bool {
        self.needs_tls(export) || !self.addresses.holding(export).is_empty()
    }

    /// The exports that have rules of their own.
    pub fn exports(&self) -> BTreeSet<&str> {
        let named = self.addresses.of.keys().chain(self.names.of.keys()).chain(&self.tls);
        named.map(String::as_str).collect()
    }

    /// Whether there is any rule.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Access {
    /// Begins with these rules.
    pub fn new(rules: Rules) -> Self {
        Self(Arc::new(RwLock::new(rules)))
    }

    /// Replaces the rules.
    pub fn set(&self, rules: Rules) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// The rules as they are now.
    pub fn rules(&self) -> Rules {
        self.look(Rules::clone)
    }

    /// Whether `visitor` may have the export of this full name; if not, why.
    pub fn judge(&self, export: &str, visitor: &Visitor) -> Result<(), Refused> {
        self.look(|rules| rules.judge(export, visitor))
    }

    /// The same, as a client is told.
    pub fn verdict(&self, export: &str, visitor: &Visitor) -> Verdict {
        self.judge(export, visitor).map_or_else(Verdict::from, |()| Verdict::Admitted)
    }

    /// Whether not everybody may have the export of this full name.
    pub fn is_restricted(&self, export: &str) -> bool {
        self.look(|rules| rules.is_restricted(export))
    }

    /// Whether the export of this full name is served through TLS only.
    pub fn needs_tls(&self, export: &str) -> bool {
        self.look(|rules| rules.needs_tls(export))
    }

    fn look<T>(&self, look: impl FnOnce(&Rules) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A full name, and what it is beside or a content of, to the innermost.
fn within(export: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(export), |name| inner_name(name))
}

/// Whether a name in a certificate is the one of a rule. Host names have no case (RFC 4343); anything else is taken as it is.
fn is_name(wanted: &str, name: &str) -> bool {
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    wanted == name || wanted.bytes().all(is_host) && wanted.eq_ignore_ascii_case(name)
}

#[cfg(test)]
mod tests;
