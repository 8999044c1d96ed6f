//! What the system says of a device, in `/sys/block/nbdN`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Error;
use crate::nbd::wire::TransmissionFlags;

/// Where the system tells of its block devices.
pub(super) const SYSTEM: &str = "/sys/block";

/// A device that is bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// Bytes.
    pub(super) size: u64,
    /// Bytes of a logical block.
    pub(super) block_size: u64,
    /// What the kernel believes that the server can do, as far as it shows.
    pub(super) flags: TransmissionFlags,
    /// Its queues: one for each connection, dead ones too, but not more than there can be processors.
    pub(super) connections: usize,
    /// After this a request is sent again.
    pub(super) timeout: Duration,
    /// What it was said to hold when it was bound.
    pub(super) backend: Option<String>,
    /// The process that bound it. By netlink, that need not live any more.
    pub(super) bound_by: u32,
}

/// The number in the path of a device: `/dev/nbd7`.
pub fn index_of(path: &Path) -> Option<u32> {
    let digits = path.to_str()?.strip_prefix("/dev/nbd")?;
    // No sign, and not two names for one device.
    let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if is_plain { digits.parse().ok() } else { None }
}

impl Device {
    /// What the system says of it now; `None` if nothing is bound.
    pub(super) fn read(system: &Path, index: u32) -> Result<Option<Self>, Error> {
        let folder = folder(system, index);
        match Self::read_from(&folder) {
            Ok(device) => Ok(Some(device)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::system(folder.display().to_string())(error)),
        }
    }

    fn read_from(folder: &Path) -> io::Result<Self> {
        // The file is there only while the device is bound.
        let bound_by = number(&folder.join("pid"))?;
        let queue = |name: &str| number(&folder.join("queue").join(name));
        // Not all kernels have all of these; none of them then means that it cannot.
        let has = |name: &str| queue(name).is_ok_and(|value| value > 0);
        let backend = match fs::read_to_string(folder.join("backend")) {
            Ok(text) => Some(text.trim_end_matches('\n').to_owned()).filter(|text| !text.is_empty()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let mut flags = TransmissionFlags::HAS_FLAGS;
        let connections = fs::read_dir(folder.join("mq"))?.count();
        flags.set(TransmissionFlags::READ_ONLY, number(&folder.join("ro"))? != 0);
        let cache = fs::read_to_string(folder.join("queue/write_cache"))?;
        flags.set(TransmissionFlags::SEND_FLUSH, cache.trim() == "write back");
        flags.set(TransmissionFlags::SEND_FUA, has("fua"));
        flags.set(TransmissionFlags::SEND_TRIM, has("discard_max_bytes"));
        flags.set(TransmissionFlags::SEND_WRITE_ZEROES, has("write_zeroes_max_bytes"));
        flags.set(TransmissionFlags::CAN_MULTI_CONN, connections > 1);
        Ok(Self {
            size: number(&folder.join("size"))?.saturating_mul(512),
            block_size: queue("logical_block_size")?,
            flags,
            connections,
            timeout: Duration::from_millis(queue("io_timeout")?),
            backend,
            bound_by: u32::try_from(bound_by).map_err(io::Error::other)?,
        })
    }
}

/// Processors that this system may have.
pub(super) fn possible_processors() -> io::Result<usize> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    // The ranges go up, as in `0-3`: the last number is what counts.
    let last = text.trim().rsplit(['-', ',']).next().and_then(|number| number.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no processors"))
}

/// Requests of the device that are under way.
pub(super) fn in_flight(system: &Path, index: u32) -> io::Result<u64> {
    let text = fs::read_to_string(folder(system, index).join("inflight"))?;
    Ok(text.split_ascii_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
}

fn folder(system: &Path, index: u32) -> PathBuf {
    system.join(format!("nbd{index}"))
}

fn number(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_one_name() {
        assert_eq!(index_of(Path::new("/dev/nbd0")), Some(0));
        assert_eq!(index_of(Path::new("/dev/nbd15")), Some(15));
        for path in ["nbd0", "/dev/nbd", "/dev/nbd01", "/dev/nbd+1", "/dev/nbd0p1", "/dev/sda", "/dev/nbd99999999999"] {
            assert_eq!(index_of(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn what_the_system_says_is_read() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("nbd3");
        for connection in ["mq/0", "mq/1", "queue"] {
            fs::create_dir_all(folder.join(connection)).unwrap();
        }
        let files = [
            ("size", "131072\n"),
            ("ro", "0\n"),
            ("inflight", "       2        1\n"),
            ("queue/logical_block_size", "512\n"),
            ("queue/write_cache", "write back\n"),
            ("queue/fua", "0\n"),
            ("queue/discard_max_bytes", "4294966784\n"),
            ("queue/io_timeout", "30000\n"),
        ];
        files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap());
        assert_eq!(Device::read(scratch.path(), 3).unwrap(), None, "it is not bound");
        fs::write(folder.join("pid"), "77\n").unwrap();
        let device = Device::read(scratch.path(), 3).unwrap().unwrap();
        let expected = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::CAN_MULTI_CONN;
        assert_eq!((device.size, device.block_size, device.flags), (64 << 20, 512, expected));
        assert_eq!((device.connections, device.backend, device.bound_by), (2, None, 77));
        assert_eq!(in_flight(scratch.path(), 3).unwrap(), 3);
        fs::write(folder.join("backend"), "blake3-ab\n").unwrap();
        assert_eq!(Device::read(scratch.path(), 3).unwrap().unwrap().backend.as_deref(), Some("blake3-ab"));
    }
}
