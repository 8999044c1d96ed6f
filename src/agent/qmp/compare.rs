//! Whether a server can take the place of another one under a running machine.
//!
//! Owns: the rules. Does not own: asking the servers.

use thiserror::Error;

use crate::export::ImageId;
use crate::nbd::handshake::client::Agreed;
use crate::nbd::wire::TransmissionFlags;
use crate::units::ByteSize;

/// What a server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
    /// The smallest request that it takes, in bytes.
    pub minimum_block: u32,
    /// What the image holds, if the server knows.
    pub image: Option<ImageId>,
}

impl Offer {
    /// What a server said, and what its image holds if that was found out.
    pub(super) fn of(agreed: &Agreed, image: Option<ImageId>) -> Self {
        Self { size: agreed.size, flags: agreed.flags, minimum_block: agreed.block_sizes.minimum, image }
    }
}

/// How a disk is used now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    /// Bytes, as qemu has it.
    pub size: u64,
    /// Whether the machine writes to it.
    pub is_writable: bool,
    /// What its server says now; nothing if it cannot be asked.
    pub server: Option<Offer>,
}

/// Why a server cannot take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Unfit {
    /// Never: another size.
    #[error("it has {there} bytes, and this disk has {here}")]
    Size {
        /// Bytes of the new server.
        there: u64,
        /// Bytes of the disk.
        here: u64,
    },
    /// Never: other bytes.
    #[error("it holds another image: {there}, and this disk is {here}")]
    Image {
        /// What the new server says.
        there: ImageId,
        /// What the old one says.
        here: ImageId,
    },
    /// Never: the machine writes.
    #[error("it is read-only, and this disk is written to")]
    ReadOnly,
    /// Never: what the guest was promised cannot be kept.
    #[error("it cannot flush, as the server of this disk can")]
    NoFlush,
    /// Never: the guest may send smaller requests.
    #[error("it takes no requests under {}, as this disk's server does", ByteSize(u64::from(*.there)))]
    Blocks {
        /// Bytes of the smallest request that the new server takes.
        there: u32,
    },
    /// Only by force: nobody says what the server holds.
    #[error("it does not say what it holds: only --force believes that it is the same image")]
    TargetUnknown,
    /// Only by force: nobody says what the disk is.
    #[error("the server of this disk does not say what it holds: only --force believes that it is the same image")]
    DiskUnknown,
    /// Only by force: the old server cannot be asked.
    #[error("the server of this disk cannot be asked what it holds: only --force believes that it is the same image")]
    Unreachable,
    /// Only by force: nobody knows who has the writes.
    #[error(
        "this disk is written to: what it has written is lost unless {}",
        "the other server has all of it; only --force believes so"
    )]
    Written,
}

impl Unfit {
    /// Whether this is certainly another image.
    pub const fn is_other_image(self) -> bool {
        matches!(self, Self::Size { .. } | Self::Image { .. })
    }
}

/// What qemu takes for the smallest request where nobody says it.
const SECTOR: u32 = 512;

/// Holds a server against a disk.
///
/// # Errors
///
/// The first reason against it. With `force` only those that nothing can make right.
pub fn compare(disk: &InUse, target: &Offer, force: bool) -> Result<(), Unfit> {
    // qemu counts sectors, servers count bytes.
    let in_sectors = |bytes: u64| bytes.div_ceil(u64::from(SECTOR));
    let exact = disk.server.map(|server| server.size).filter(|size| in_sectors(*size) == in_sectors(disk.size));
    if exact.map_or_else(|| in_sectors(target.size) != in_sectors(disk.size), |exact| exact != target.size) {
        return Err(Unfit::Size { there: target.size, here: exact.unwrap_or(disk.size) });
    }
    let here = disk.server.and_then(|server| server.image);
    if let (Some(here), Some(there)) = (here, target.image)
        && here != there
    {
        return Err(Unfit::Image { there, here });
    }
    if disk.is_writable && target.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Unfit::ReadOnly);
    }
    let could_flush = disk.server.is_none_or(|server| server.flags.contains(TransmissionFlags::SEND_FLUSH));
    if disk.is_writable && could_flush && !target.flags.contains(TransmissionFlags::SEND_FLUSH) {
        return Err(Unfit::NoFlush);
    }
    if target.minimum_block > disk.server.map_or(SECTOR, |server| server.minimum_block.max(SECTOR)) {
        return Err(Unfit::Blocks { there: target.minimum_block });
    }
    if force { Ok(()) } else { doubts(disk, target) }
}

fn doubts(disk: &InUse, target: &Offer) -> Result<(), Unfit> {
    if disk.is_writable {
        return Err(Unfit::Written);
    }
    match disk.server {
        None => Err(Unfit::Unreachable),
        Some(Offer { image: None, .. }) => Err(Unfit::DiskUnknown),
        Some(_) if target.image.is_none() => Err(Unfit::TargetUnknown),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Option<ImageId> = Some(ImageId([1; 32]));
    const TWO: Option<ImageId> = Some(ImageId([2; 32]));

    fn offer(image: Option<ImageId>) -> Offer {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
        Offer { size: 1 << 20, flags, minimum_block: 1, image }
    }

    fn disk(image: Option<ImageId>) -> InUse {
        InUse { size: 1 << 20, is_writable: false, server: Some(offer(image)) }
    }

    #[test]
    fn the_same_image_is_taken() {
        for force in [false, true] {
            assert_eq!(compare(&disk(ONE), &offer(ONE), force), Ok(()));
        }
    }

    #[test]
    fn what_is_certainly_wrong_is_never_taken() {
        let small = Offer { size: 1, ..offer(ONE) };
        let read_only = Offer { flags: TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_FLUSH, ..offer(ONE) };
        let no_flush = Offer { flags: TransmissionFlags::empty(), ..offer(ONE) };
        let blocks = Offer { minimum_block: 4096, ..offer(ONE) };
        let written = InUse { is_writable: true, ..disk(ONE) };
        let here = ImageId([1; 32]);
        for force in [false, true] {
            assert_eq!(compare(&disk(ONE), &small, force), Err(Unfit::Size { there: 1, here: 1 << 20 }));
            let other = Err(Unfit::Image { there: ImageId([2; 32]), here });
            assert_eq!(compare(&disk(ONE), &offer(TWO), force), other);
            assert_eq!(compare(&written, &read_only, force), Err(Unfit::ReadOnly));
            assert_eq!(compare(&written, &no_flush, force), Err(Unfit::NoFlush));
            assert_eq!(compare(&disk(ONE), &blocks, force), Err(Unfit::Blocks { there: 4096 }));
            // Who only reads has no use for flushes.
            assert_eq!(compare(&disk(ONE), &no_flush, force), Ok(()));
            assert_eq!(compare(&disk(ONE), &read_only, force), Ok(()));
        }
    }

    #[test]
    fn sizes_are_those_of_servers_where_they_are_known() {
        let odd = |size| Offer { size, ..offer(ONE) };
        let disk = |server: Option<u64>| InUse { size: 1024, is_writable: false, server: server.map(odd) };
        for (server, target, fits) in [
            (Some(1000), 1000, true),
            (Some(1000), 1024, false),
            (None, 1000, true),
            (None, 512, false),
            // The server has another image by now than the one that qemu has open.
            (Some(4096), 4096, false),
            (Some(4096), 1024, true),
        ] {
            let verdict = compare(&disk(server), &odd(target), true);
            assert_eq!(!matches!(verdict, Err(Unfit::Size { .. })), fits, "{server:?} {target}");
        }
    }

    #[test]
    fn what_nobody_knows_needs_force() {
        let dead = InUse { server: None, ..disk(ONE) };
        let written = InUse { is_writable: true, ..disk(ONE) };
        for (disk, target, doubt) in [
            (disk(None), offer(ONE), Unfit::DiskUnknown),
            (disk(None), offer(None), Unfit::DiskUnknown),
            (disk(ONE), offer(None), Unfit::TargetUnknown),
            (dead, offer(ONE), Unfit::Unreachable),
            (written, offer(ONE), Unfit::Written),
        ] {
            assert_eq!(compare(&disk, &target, false), Err(doubt));
            assert_eq!(compare(&disk, &target, true), Ok(()));
            assert!(!doubt.is_other_image());
        }
    }
}
