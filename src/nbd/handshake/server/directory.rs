//! What a negotiation asks of the server that it is for: its exports, and who may have them.
//!
//! Owns: the questions. Does not own: any answer.

use super::Id;
use crate::nbd::Listing;

/// The exports that a client may choose from.
pub trait Directory {
    /// What stands behind a name, for the caller of the state machine.
    type Export;

    /// The export called `name`; the empty name asks for the default one.
    fn find(&self, name: &str) -> Option<(Self::Export, Listing)>;

    /// Name and description of every export.
    fn list(&self) -> Vec<(String, String)>;

    /// Whether newcomers are sent away because the server is going down.
    fn is_draining(&self) -> bool;

    /// Whether newcomers to the export of this full name are sent away.
    fn is_shut(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Whether this client may have the export of this full name.
    fn verdict(&self, name: &str) -> Verdict {
        let _ = name;
        Verdict::Admitted
    }

    /// What a mirror is told of the export of this full name, as names of contexts.
    fn news(&self, name: &str, mirror: Id) -> Vec<String> {
        let _ = (name, mirror);
        Vec::new()
    }

    /// A client wants the connection that called itself `connection`, if it uses the export of this full name, to be
    /// closed when all that it asked is answered.
    fn close(&self, name: &str, connection: Id) {
        let _ = (name, connection);
    }
}

/// Whether a client may have an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Admitted,
    /// It may when it speaks TLS.
    NeedsTls,
    /// It is told that there is no such export.
    Denied,
}

/// Whether connections are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// TLS is not offered.
    #[default]
    Off,
    /// Clients that ask for TLS get it.
    Allow,
    /// Nothing can be had without TLS, not even a list of exports ("FORCEDTLS mode").
    Require,
}
