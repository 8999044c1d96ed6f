//! Who asks for an export, and whether it may have it.
//!
//! Owns: what is known of whoever asks, and the rules. Does not own: how it is found out (`net`, `tls`), and how a
//! refusal is told (`server`).

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use super::registry::image_name;
use crate::nbd::handshake::server::Verdict;

/// Whoever asks for an export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Visitor {
    /// Its address; `None` on a unix socket, whose file mode says who may come.
    pub address: Option<IpAddr>,
    /// Whether and as whom it speaks TLS.
    pub tls: Option<TlsPeer>,
}

/// Whom the other end of a TLS connection has shown itself to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsPeer {
    /// The names in its certificate, which somebody we trust has signed; empty if it showed none.
    pub names: Vec<String>,
}

/// The rules of all exports of a server, which may change. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Access(Arc<RwLock<Rules>>);

/// Who may have which export.
#[derive(Debug, Clone, Default)]
pub struct Rules {}

impl Access {
    /// Replaces the rules.
    pub fn set(&self, rules: Rules) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// Whether `visitor` may have the export of this full name. What is beside an image (`NAME@manifest`) has the rules
    /// of the image.
    pub fn verdict(&self, export: &str, visitor: &Visitor) -> Verdict {
        let _ = (image_name(export), visitor, &*self.0.read().unwrap_or_else(PoisonError::into_inner));
        Verdict::Admitted
    }

    /// Whether not everybody may have the export.
    pub fn is_restricted(&self, export: &str) -> bool {
        let _ = (image_name(export), &*self.0.read().unwrap_or_else(PoisonError::into_inner));
        false
    }
}
