//! What can go wrong with a request, by what the caller must do about it.
//!
//! Owns: the error that travels down and up the stack of exports. Does not own: how a kind is written on the
//! wire (`nbd::errno`) and errors of set-up (each room has its own small enums for those).

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::sync::Arc;

/// The kinds of failure, each with what the caller should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is not allowed here, now or later: do not repeat it.
    Permission,
    /// Bytes could not be moved: another try, or another source, may help.
    Io,
    /// Nobody who has the bytes could be reached in time: try again later.
    Unavailable,
    /// Memory was short: try again later.
    NoMemory,
    /// The request makes no sense: fix the caller.
    Invalid,
    /// The disk is full, or the request lies beyond the end of a device that is written to.
    NoSpace,
    /// The request is larger than can be answered: ask for less.
    TooLarge,
    /// The request makes sense, but this export cannot do it: use another request.
    Unsupported,
    /// The server is going away: connect elsewhere.
    Shutdown,
}

/// A failed request: its kind, a sentence for a human, and the cause if there is one.
///
/// Cheap to clone, because all who wait for one fetch share its failure.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: Cow<'static, str>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// The result of a request.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; `message` says what happened to what, in lower case and without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// An I/O error of the operating system, with what was attempted.
    pub fn from_io(message: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        Self { kind: Self::kind_of(&source), message: message.into(), source: Some(Arc::new(source)) }
    }

    /// The kind of an error of the operating system. `EDQUOT` and `EFBIG` count as a full disk (NBD protocol, "Error
    /// values").
    pub fn kind_of(error: &io::Error) -> ErrorKind {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => ErrorKind::Permission,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::ENOMEM) => ErrorKind::NoMemory,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
            _ if error.kind() == io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        }
    }

    /// What the caller should do.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message and those of all causes, as one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_os_error_has_its_kind() {
        for (code, kind) in [
            (libc::EPERM, ErrorKind::Permission),
            (libc::EACCES, ErrorKind::Permission),
            (libc::EROFS, ErrorKind::Permission),
            (libc::ENOSPC, ErrorKind::NoSpace),
            (libc::EDQUOT, ErrorKind::NoSpace),
            (libc::EFBIG, ErrorKind::NoSpace),
            (libc::ENOMEM, ErrorKind::NoMemory),
            (libc::EOPNOTSUPP, ErrorKind::Unsupported),
            (libc::ENOSYS, ErrorKind::Unsupported),
            (libc::EIO, ErrorKind::Io),
            (libc::ECONNRESET, ErrorKind::Io),
            // A request that reaches the kernel was checked by us: the kernel's EINVAL is not the client's fault.
            (libc::EINVAL, ErrorKind::Io),
        ] {
            assert_eq!(Error::from_io("x", io::Error::from_raw_os_error(code)).kind(), kind, "{code}");
        }
    }

    #[test]
    fn the_chain_names_message_and_cause() {
        let error = Error::from_io("debian12: read at 4096", io::Error::other("the disk is on fire"));
        assert_eq!(error.chain(), "debian12: read at 4096: the disk is on fire");
    }
}
