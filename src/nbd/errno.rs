//! The table between our kinds of error and the numbers on the wire ("Error values").

use crate::error::ErrorKind;

/// The number that stands for `kind` in a reply.
pub const fn to_wire(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::Permission => 1,
        // NBD has no word for "not reachable": for a client both are errors of the disk.
        ErrorKind::Io | ErrorKind::Unavailable => 5,
        ErrorKind::NoMemory => 12,
        ErrorKind::Invalid => 22,
        ErrorKind::NoSpace => 28,
        ErrorKind::TooLarge => 75,
        ErrorKind::Unsupported => 95,
        ErrorKind::Shutdown => 108,
    }
}

/// The kind that a number in a reply stands for. An unknown number counts as EINVAL, as the protocol asks.
/// Zero, which is success, is `None`.
pub const fn from_wire(number: u32) -> Option<ErrorKind> {
    Some(match number {
        0 => return None,
        1 => ErrorKind::Permission,
        5 => ErrorKind::Io,
        12 => ErrorKind::NoMemory,
        28 => ErrorKind::NoSpace,
        75 => ErrorKind::TooLarge,
        95 => ErrorKind::Unsupported,
        108 => ErrorKind::Shutdown,
        _ => ErrorKind::Invalid,
    })
}

/// The name of a kind as `errno(3)` has it, for logs.
pub const fn name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Permission => "EPERM",
        ErrorKind::Io | ErrorKind::Unavailable => "EIO",
        ErrorKind::NoMemory => "ENOMEM",
        ErrorKind::Invalid => "EINVAL",
        ErrorKind::NoSpace => "ENOSPC",
        ErrorKind::TooLarge => "EOVERFLOW",
        ErrorKind::Unsupported => "ENOTSUP",
        ErrorKind::Shutdown => "ESHUTDOWN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_the_number_and_the_name_of_the_protocol() {
        for (kind, number, text) in [
            (ErrorKind::Permission, 1, "EPERM"),
            (ErrorKind::Io, 5, "EIO"),
            (ErrorKind::NoMemory, 12, "ENOMEM"),
            (ErrorKind::Invalid, 22, "EINVAL"),
            (ErrorKind::NoSpace, 28, "ENOSPC"),
            (ErrorKind::TooLarge, 75, "EOVERFLOW"),
            (ErrorKind::Unsupported, 95, "ENOTSUP"),
            (ErrorKind::Shutdown, 108, "ESHUTDOWN"),
        ] {
            assert_eq!(to_wire(kind), number);
            assert_eq!(from_wire(number), Some(kind));
            assert_eq!(name(kind), text);
        }
    }

    #[test]
    fn what_cannot_be_reached_is_an_error_of_the_disk() {
        assert_eq!((to_wire(ErrorKind::Unavailable), name(ErrorKind::Unavailable)), (5, "EIO"));
    }

    #[test]
    fn zero_is_success_and_the_unknown_is_invalid() {
        assert_eq!(from_wire(0), None);
        assert_eq!(from_wire(4711), Some(ErrorKind::Invalid));
    }
}
