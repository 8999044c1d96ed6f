//! Whether a server may take a device over. The kernel asks nothing of this.

use thiserror::Error;

use super::dial::Offer;
use crate::export::facts::ImageId;
use crate::nbd::wire::TransmissionFlags;

/// What the kernel's driver makes use of. All else that a server can do does not matter to it.
pub(super) const USED: TransmissionFlags = TransmissionFlags::READ_ONLY
    .union(TransmissionFlags::SEND_FLUSH)
    .union(TransmissionFlags::SEND_FUA)
    .union(TransmissionFlags::SEND_TRIM)
    .union(TransmissionFlags::SEND_WRITE_ZEROES)
    .union(TransmissionFlags::CAN_MULTI_CONN);

/// What a device is.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Bytes.
    pub(super) size: u64,
    /// Bytes of a logical block: the kernel asks for nothing smaller.
    pub(super) block_size: u64,
    /// What the kernel believes that the server can do.
    pub(super) flags: TransmissionFlags,
    /// What it holds, if that is known.
    pub(super) identity: Option<ImageId>,
    /// What it was said to hold when it was bound.
    pub(super) backend: Option<String>,
}

/// What is let pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strictness {
    /// A server that does not say what it holds is refused, and so is any for a device that can be written to.
    Sure,
    /// What cannot be known is believed: an operator said so.
    Forced,
    /// Connecting anew to the servers that the device had already.
    Again,
}

/// Why a server must not take the device over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unfit {
    /// Another size.
    #[error("its export has {there} bytes, and the device has {here}")]
    Size {
        /// Bytes of the device.
        here: u64,
        /// Bytes there.
        there: u64,
    },
    /// Larger blocks.
    #[error("it takes requests of {there} bytes at least, and the blocks of the device have {here}")]
    BlockSize {
        /// Bytes of a block of the device.
        here: u64,
        /// Bytes of the smallest request there.
        there: u32,
    },
    /// Nothing can be written there.
    #[error("it is read-only, and the device can be written to")]
    ReadOnly,
    /// A flag is missing there.
    #[error("it cannot do what the kernel will go on asking for: {0}")]
    Lacks(String),
    /// It wants to be told to flush.
    #[error("it keeps writes back until it is told to flush, which the kernel will not do for this device")]
    Flush,
    /// Another image.
    #[error("it holds {there}, and the device is {here}")]
    Identity {
        /// What the device holds.
        here: String,
        /// What is there.
        there: ImageId,
    },
    /// One of them does not say what it holds.
    #[error("it is not known whether both hold the same{}: --force if you know that they do", told(.device, .server))]
    Unknown {
        /// The device's is known.
        device: bool,
        /// The server's is.
        server: bool,
    },
    /// The device can be written to.
    #[error(
        "the device can be written to, and while it is moved both servers are written to: --force if both write to \
         the same storage; else what was written at the old one is lost"
    )]
    Writable,
}

fn told(device: &bool, server: &bool) -> &'static str {
    match (device, server) {
        (true, false) => " (the new server does not say what it holds; headwater index makes the manifest that tells)",
        (false, true) => " (the device was bound without saying what it holds)",
        _ => "",
    }
}

/// Whether a server with this offer may have the device.
pub(super) fn check(wanted: &Wanted, offer: &Offer, strictness: Strictness) -> Result<(), Unfit> {
    if offer.size != wanted.size {
        return Err(Unfit::Size { here: wanted.size, there: offer.size });
    }
    if u64::from(offer.block_sizes.minimum) > wanted.block_size {
        return Err(Unfit::BlockSize { here: wanted.block_size, there: offer.block_sizes.minimum });
    }
    check_flags(wanted.flags, offer.flags)?;
    let known = wanted.identity.map(|identity| identity.to_string());
    // A string that is no identity of ours says nothing that could be compared.
    let known = known.or_else(|| wanted.backend.clone().filter(|text| text.parse::<ImageId>().is_ok()));
    match (known, offer.identity) {
        (Some(here), Some(there)) if here != there.to_string() => return Err(Unfit::Identity { here, there }),
        (Some(_), Some(_)) => {}
        // What can be written to has no identity.
        (known, offered) if strictness == Strictness::Sure && wanted.flags.contains(TransmissionFlags::READ_ONLY) => {
            return Err(Unfit::Unknown { device: known.is_some(), server: offered.is_some() });
        }
        (Some(_), None) if strictness == Strictness::Again => {
            return Err(Unfit::Unknown { device: true, server: false });
        }
        _ => {}
    }
    if strictness == Strictness::Sure && !wanted.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Unfit::Writable);
    }
    Ok(())
}

fn check_flags(device: TransmissionFlags, offered: TransmissionFlags) -> Result<(), Unfit> {
    let is_written = !device.contains(TransmissionFlags::READ_ONLY);
    if is_written && offered.contains(TransmissionFlags::READ_ONLY) {
        return Err(Unfit::ReadOnly);
    }
    let lacking = (device & USED) - offered - TransmissionFlags::READ_ONLY;
    if !lacking.is_empty() {
        let names: Vec<_> = lacking.iter_names().map(|(name, _)| name.trim_start_matches("SEND_")).collect();
        return Err(Unfit::Lacks(names.join(", ")));
    }
    let flush = TransmissionFlags::SEND_FLUSH;
    if is_written && offered.contains(flush) && !device.contains(flush) {
        return Err(Unfit::Flush);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::BlockSizes;
    use Strictness::{Again, Forced, Sure};

    fn image(byte: u8) -> ImageId {
        ImageId([byte; 32])
    }

    fn device() -> Wanted {
        let flags = TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_FLUSH | TransmissionFlags::CAN_MULTI_CONN;
        Wanted { size: 1 << 20, block_size: 512, flags, identity: Some(image(1)), backend: None }
    }

    fn offer() -> Offer {
        let flags = device().flags | TransmissionFlags::SEND_FUA;
        let block_sizes = BlockSizes::DEFAULT;
        Offer { size: 1 << 20, flags, block_sizes, identity: Some(image(1)), is_ours: true }
    }

    #[test]
    fn the_same_image_may_always() {
        for strictness in [Sure, Forced, Again] {
            assert_eq!(check(&device(), &offer(), strictness), Ok(()));
        }
    }

    #[test]
    fn another_size_or_image_may_never() {
        for strictness in [Sure, Forced, Again] {
            let smaller = Offer { size: 1 << 19, ..offer() };
            assert_eq!(check(&device(), &smaller, strictness), Err(Unfit::Size { here: 1 << 20, there: 1 << 19 }));
            let other = Offer { identity: Some(image(2)), ..offer() };
            let expected = Unfit::Identity { here: image(1).to_string(), there: image(2) };
            assert_eq!(check(&device(), &other, strictness), Err(expected.clone()));
            let named = Wanted { identity: None, backend: Some(image(1).to_string()), ..device() };
            assert_eq!(check(&named, &other, strictness), Err(expected), "the backend tells it too");
        }
    }

    #[test]
    fn what_is_not_known_needs_a_word_of_the_operator() {
        let (silent, unnamed) = (Offer { identity: None, ..offer() }, Wanted { identity: None, ..device() });
        assert_eq!(check(&device(), &silent, Sure), Err(Unfit::Unknown { device: true, server: false }));
        assert_eq!(check(&unnamed, &offer(), Sure), Err(Unfit::Unknown { device: false, server: true }));
        assert_eq!(check(&device(), &silent, Forced), Ok(()));
        assert_eq!(check(&unnamed, &offer(), Forced), Ok(()));
        // The same server, which has lost what it knew: it may be another image now.
        assert_eq!(check(&device(), &silent, Again), Err(Unfit::Unknown { device: true, server: false }));
        assert_eq!(check(&unnamed, &silent, Again), Ok(()));
        let foreign = Wanted { backend: Some("volume 7".into()), ..unnamed };
        assert_eq!(check(&foreign, &silent, Again), Ok(()));
    }

    #[test]
    fn what_the_kernel_goes_on_asking_for_must_be_there() {
        let without = |flag| Offer { flags: offer().flags - flag, ..offer() };
        let lacks = |text: &str| Err(Unfit::Lacks(text.into()));
        for strictness in [Sure, Forced, Again] {
            assert_eq!(check(&device(), &without(TransmissionFlags::SEND_FLUSH), strictness), lacks("FLUSH"));
            assert_eq!(
                check(&device(), &without(TransmissionFlags::CAN_MULTI_CONN), strictness),
                lacks("CAN_MULTI_CONN")
            );
            // Nobody writes to it from here.
            assert_eq!(check(&device(), &without(TransmissionFlags::READ_ONLY), strictness), Ok(()));
        }
        let coarse = Offer { block_sizes: BlockSizes { minimum: 4096, ..BlockSizes::DEFAULT }, ..offer() };
        assert_eq!(check(&device(), &coarse, Forced), Err(Unfit::BlockSize { here: 512, there: 4096 }));
    }

    #[test]
    fn what_can_be_written_to_is_not_moved_unasked() {
        let flags = device().flags - TransmissionFlags::READ_ONLY;
        let written = Wanted { flags, identity: None, ..device() };
        let writable = Offer { flags, identity: None, ..offer() };
        assert_eq!(check(&written, &writable, Sure), Err(Unfit::Writable));
        assert_eq!(check(&written, &writable, Forced), Ok(()));
        assert_eq!(check(&written, &offer(), Forced), Err(Unfit::ReadOnly));
        let through = Wanted { flags: flags - TransmissionFlags::SEND_FLUSH, ..written };
        assert_eq!(check(&through, &writable, Forced), Err(Unfit::Flush));
    }
}
