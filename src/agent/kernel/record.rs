//! What we remember of a device, and who may change it.
//!
//! `/run/headwater/nbdN.json` is replaced as a whole, so a crash leaves the record before or the one after; a crash of
//! the system ends the device too. It is for root alone: who knows a token can have the connection closed. Whoever
//! changes a device locks `nbdN.lock` beside it, which is never removed. Both are at one fixed place, whatever the
//! environment says, as there is one `/dev/nbdN` for all.
//!
//! A record is of the binding during which it was written: [`Record::bound_by`] must be what the system says.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::Error;
use super::device::Device;
use super::rules::Wanted;
use crate::clock;
use crate::nbd::Uri;
use crate::nbd::wire::TransmissionFlags;

/// Where records are.
pub const DIRECTORY: &str = "/run/headwater";

/// What there may be in a record at most.
const LONGEST: u64 = 1 << 20;
const VERSION: u32 = 1;
/// How long another command of ours may have the device.
const PATIENCE: Duration = Duration::from_secs(60);
const GLANCE: Duration = Duration::from_millis(20);

/// What we remember of a device that is bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Of this format.
    pub version: u32,
    /// The device, as in `/dev/nbd0`.
    pub device: String,
    /// Where the image is; with several, the next is used when one fails.
    pub uris: Vec<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block.
    pub block_size: u64,
    /// NBD's transmission flags, as the kernel was told.
    pub flags: u16,
    /// What the image holds, if that is known.
    pub identity: Option<String>,
    /// What the kernel was told that it holds.
    pub backend: Option<String>,
    /// After this a request is sent again.
    pub timeout_seconds: u64,
    /// So long requests wait while no connection is alive.
    pub dead_timeout_seconds: u64,
    /// The connections, dead ones too until they are replaced.
    pub connections: Vec<Connection>,
    /// An operator said that its servers hold the same, where that cannot be known.
    #[serde(default)]
    pub forced: bool,
    /// The process that bound the device, as `/sys/block/nbdN/pid` has it.
    pub bound_by: u32,
    /// The process that connects anew what is lost.
    pub keeper: Option<u32>,
    /// Connections that it has replaced.
    #[serde(default)]
    pub reconnected: u64,
    /// Why it cannot, if it cannot.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// One connection of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The server.
    pub uri: String,
    /// The name that the server knows the connection by, if it is one of ours.
    pub token: Option<String>,
    /// The number of the socket.
    pub inode: u64,
}

/// Nobody else of ours changes the device while this is held.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
    path: PathBuf,
    name: String,
}

impl Record {
    /// An empty record of this device.
    pub(super) fn of(index: u32, device: &Device) -> Self {
        Self {
            version: VERSION,
            device: format!("/dev/nbd{index}"),
            uris: Vec::new(),
            size: device.size,
            block_size: device.block_size,
            flags: device.flags.bits(),
            identity: None,
            backend: device.backend.clone(),
            timeout_seconds: device.timeout.as_secs().max(1),
            dead_timeout_seconds: 0,
            connections: Vec::new(),
            forced: false,
            bound_by: device.bound_by,
            keeper: None,
            reconnected: 0,
            trouble: None,
        }
    }

    /// Whether it is of this binding, and understood.
    fn is_of(&self, device: &Device) -> bool {
        self.version == VERSION && self.bound_by == device.bound_by
    }

    /// What a server must be to take the device over.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted {
            size: self.size,
            block_size: self.block_size,
            flags: TransmissionFlags::from_bits_truncate(self.flags),
            identity: self.identity.as_ref().and_then(|text| text.parse().ok()),
            backend: self.backend.clone(),
        }
    }

    /// The servers. What cannot be read is left out.
    pub(super) fn servers(&self) -> Vec<Uri> {
        self.uris.iter().filter_map(|uri| uri.parse().ok()).collect()
    }
}

impl Lock {
    /// Waits until nobody else of ours changes the device.
    pub(super) fn take(directory: &Path, index: u32) -> Result<Self, Error> {
        let name = format!("nbd{index}");
        let failed = || Error::system(directory.join(&name).display().to_string());
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(failed())?;
        let lock = directory.join(format!("{name}.lock"));
        let options = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(lock);
        let file = options.map_err(failed())?;
        wait_for(&file, clock::now() + PATIENCE).map_err(failed())?;
        Ok(Self { _file: file, path: directory.join(format!("{name}.json")), name })
    }

    /// The record of the device, if there is one of this binding.
    pub(super) fn load(&self, device: &Device) -> Result<Option<Record>, Error> {
        let record = read(&self.path).map_err(Error::system(self.path.display().to_string()))?;
        Ok(record.filter(|record| record.is_of(device)))
    }

    pub(super) fn save(&self, record: &Record) -> Result<(), Error> {
        self.write(record).map_err(Error::system(self.path.display().to_string()))
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let new = self.path.with_file_name(format!("{}.new", self.name));
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        drop(file);
        fs::rename(new, &self.path)
    }

    pub(super) fn remove(&self) -> Result<(), Error> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::system(self.path.display().to_string())(error))
            }
            _ => Ok(()),
        }
    }
}

/// The record as it is, without waiting for whoever changes it.
pub(super) fn peek(directory: &Path, index: u32, device: &Device) -> Option<Record> {
    // One that cannot be read is as good as none.
    let record = read(&directory.join(format!("nbd{index}.json"))).ok()??;
    record.is_of(device).then_some(record)
}

/// Notes in the record who keeps the device.
pub fn name_keeper(directory: &Path, index: u32, pid: u32) -> Result<(), Error> {
    let lock = Lock::take(directory, index)?;
    let device = Device::read(Path::new(super::device::SYSTEM), index)?.ok_or(Error::NotAttached(index))?;
    let mut record = lock.load(&device)?.ok_or(Error::NotAttached(index))?;
    record.keeper = Some(pid);
    lock.save(&record)
}

/// The inodes of all connections in all records: what belongs to devices that we know.
pub(super) fn known_inodes(directory: &Path) -> io::Result<Vec<u64>> {
    let mut inodes = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            inodes.extend(read(&path)?.into_iter().flat_map(|record| record.connections).map(|one| one.inode));
        }
    }
    Ok(inodes)
}

fn wait_for(file: &File, end: Instant) -> io::Result<()> {
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if clock::now() < end => thread::sleep(GLANCE),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "another command changes the device"));
            }
            result => return Ok(result?),
        }
    }
}

/// `None` if there is none, or one that is not understood: it is as if we had never known the device.
fn read(path: &Path) -> io::Result<Option<Record>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn device(bound_by: u32) -> Device {
        Device {
            size: 1 << 20,
            block_size: 512,
            flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY,
            connections: 2,
            timeout: Duration::from_secs(30),
            backend: None,
            bound_by,
        }
    }

    #[test]
    fn a_record_is_private_and_of_one_binding() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("run");
        let lock = Lock::take(&directory, 3).unwrap();
        assert_eq!(lock.load(&device(7)).unwrap(), None);
        let mut record = Record::of(3, &device(7));
        record.uris = vec!["nbd://a/x".into(), "nonsense".into()];
        record.connections = vec![Connection { uri: "nbd://a/x".into(), token: None, inode: 9 }];
        lock.save(&record).unwrap();
        assert_eq!(lock.load(&device(7)).unwrap(), Some(record.clone()));
        assert_eq!(lock.load(&device(8)).unwrap(), None, "the device was bound again");
        assert_eq!(record.servers().len(), 1);
        assert_eq!(known_inodes(&directory).unwrap(), [9]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&directory.join("nbd3.json"))), (0o700, 0o600));
        fs::write(directory.join("nbd3.json"), "half a rec").unwrap();
        assert_eq!(lock.load(&device(7)).unwrap(), None);
        lock.remove().unwrap();
        lock.remove().unwrap();
        assert_eq!(known_inodes(&directory).unwrap(), [0; 0]);
    }

    #[test]
    fn only_one_may_change_a_device() {
        let scratch = tempfile::tempdir().unwrap();
        let lock = Lock::take(scratch.path(), 0).unwrap();
        let other = Lock::take(scratch.path(), 1).unwrap();
        let file = File::open(scratch.path().join("nbd0.lock")).unwrap();
        assert_eq!(wait_for(&file, clock::now()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop((lock, other));
        wait_for(&file, clock::now()).unwrap();
    }
}
