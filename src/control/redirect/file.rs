//! The file of orders: a line of JSON, and one with its CRC-32C as 8 hexadecimal digits, replaced as a whole.
//!
//! The new one is written beside it, made durable, and renamed; so after a crash there is the old one or the new one.
//! One that cannot be understood is put aside. An empty file beside it is locked by the server whose orders they are. Until
//! there is an order nothing is made.
//!
//! Owns: the form, its bounds, the order of writing. Does not own: what orders mean (`table`).

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::order::{RedirectState, RedirectStatus, Way};
use crate::mirror::Space;
use crate::nbd::Uri;
use crate::sealed::{checksum, seal, unseal};
use crate::telemetry::crash_point;
use crate::units::{to_u64, to_usize};

/// Orders that may be active.
pub const MOST_ACTIVE: usize = 64;
/// Ended orders that are remembered.
pub const MOST_ENDED: usize = 64;
/// Clients of one order that are written down: those that may be told after a restart, then those that were not moved.
pub const MOST_CLIENTS: usize = 1000;
/// URIs in one order.
pub const MOST_URIS: usize = 16;
/// Bytes of the file.
pub const MOST_BYTES: usize = 4 << 20;

/// Where a server keeps its orders.
#[derive(Debug, Clone)]
pub struct StatePlace {
    /// The directory, which is made if it is missing.
    pub directory: PathBuf,
    /// The file in it.
    pub name: String,
    /// What its bytes count in, if it lies in a cache.
    pub space: Option<Arc<Space>>,
}

/// Why orders are not written down.
#[derive(Debug, Error)]
pub(super) enum FileError {
    #[error("{0}: {1}")]
    Disk(PathBuf, io::Error),
    #[error("another server keeps its orders in {0}")]
    Elsewhere(PathBuf),
    #[error("the cache is full up to the last byte")]
    NoRoom,
    #[error("they would take more than 4 MiB")]
    TooLong,
    #[error("there is no place for them")]
    NoPlace,
}

/// What is in the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    version: u32,
    /// The number of the last order that there was.
    pub(super) last: u64,
    /// By their numbers.
    pub(super) orders: Vec<RedirectStatus>,
}

const VERSION: u32 = 1;

impl Kept {
    pub(super) const fn new(last: u64, orders: Vec<RedirectStatus>) -> Self {
        Self { version: VERSION, last, orders }
    }
}

/// The file, or why there is none. All of it blocks.
#[derive(Debug)]
pub(super) struct File {
    place: StatePlace,
    /// Locked, once there is anything to be locked.
    lock: Option<fs::File>,
    /// Bytes that are charged for the old file and the new one.
    charge: u64,
}

impl File {
    /// Takes the file over, and gives what is in it.
    pub(super) fn open(place: StatePlace) -> Result<(Self, Kept), FileError> {
        let lock = if place.path("").exists() { Some(lock(&place)?) } else { None };
        let mut file = Self { place, lock, charge: 0 };
        if file.lock.is_none() {
            return Ok((file, Kept::default()));
        }
        // What was being made when a process ended counts for nothing.
        let _ = fs::remove_file(file.place.path(".new"));
        let kept = file.load();
        if let (Some(space), Ok(damaged)) = (&file.place.space, fs::metadata(file.place.path(".damaged"))) {
            space.take_anyway(damaged.len().next_multiple_of(BLOCK));
        }
        Ok((file, kept))
    }

    fn load(&mut self) -> Kept {
        let path = self.place.path("");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Kept::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read the orders to redirect: beginning without");
                return Kept::default();
            }
        };
        if let Some(space) = &self.place.space {
            self.charge = cost(bytes.len());
            space.take_anyway(self.charge);
        }
        decode(&bytes).unwrap_or_else(|| {
            let aside = self.place.path(".damaged");
            let kept =
                fs::rename(&path, &aside).map_or_else(|error| error.to_string(), |()| aside.display().to_string());
            tracing::warn!(kept, "the table of orders to redirect is damaged: beginning without any");
            Kept::default()
        })
    }

    /// Replaces what is there. On an error the old file is there still.
    pub(super) fn replace(&mut self, kept: &Kept) -> Result<(), FileError> {
        if self.lock.is_none() {
            self.lock = Some(lock(&self.place)?);
        }
        let bytes = encode_bounded(kept).ok_or(FileError::TooLong)?;
        let (before, after) = (self.charge, cost(bytes.len()));
        if let Some(space) = &self.place.space
            && after > before
        {
            if !space.take(after - before) {
                return Err(FileError::NoRoom);
            }
            self.charge = after;
        }
        self.place.write(&bytes).map_err(|error| FileError::Disk(self.place.path(""), error))?;
        if let Some(space) = &self.place.space
            && after < before
        {
            space.give_back(before - after);
            self.charge = after;
        }
        Ok(())
    }
}

/// What a file takes at least.
const BLOCK: u64 = 4096;

/// Bytes of the disk that a file of this length takes while it is replaced.
fn cost(length: usize) -> u64 {
    2 * to_u64(length).next_multiple_of(BLOCK)
}

fn lock(place: &StatePlace) -> Result<fs::File, FileError> {
    let path = place.path(".lock");
    let opened = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&place.directory)?;
        fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&path)
    };
    let file = opened().map_err(|error| FileError::Disk(path.clone(), error))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(FileError::Elsewhere(place.directory.clone())),
        Err(error) => Err(FileError::Disk(path, error.into())),
    }
}

impl StatePlace {
    fn path(&self, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}{suffix}", self.name))
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let (path, new_path) = (self.path(""), self.path(".new"));
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new_path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        crash_point("redirects written");
        fs::rename(&new_path, &path)?;
        fs::File::open(&self.directory)?.sync_all()
    }
}

/// The name of the file of a server that listens at `address`, in a directory that servers may share.
pub fn name_of(address: &str) -> String {
    let name: String = address.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect();
    // Long paths of sockets that differ at their ends only must not become one.
    let sum = checksum(address.as_bytes());
    let length = name.len().min(100);
    format!("redirects-{}-{sum:08x}", &name[..length])
}

/// As much of it as fits: rather fewer clients of each order than no order.
fn encode_bounded(kept: &Kept) -> Option<Vec<u8>> {
    let mut kept = kept.clone();
    let ended = |kept: &Kept| kept.orders.iter().filter(|order| order.state != RedirectState::Active).count();
    for most in [MOST_CLIENTS, 100, 10] {
        kept.orders.iter_mut().for_each(|order| shorten(order, most));
        let bytes = encode(&kept);
        if bytes.len() <= MOST_BYTES {
            return Some(bytes);
        }
    }
    while ended(&kept) > 0 {
        let oldest = kept.orders.iter().position(|order| order.state != RedirectState::Active)?;
        kept.orders.remove(oldest);
        let bytes = encode(&kept);
        if bytes.len() <= MOST_BYTES {
            return Some(bytes);
        }
    }
    None
}

/// Keeps those clients of a report that matter most.
pub(super) fn shorten(order: &mut RedirectStatus, most: usize) {
    if order.clients.len() <= most {
        return;
    }
    order.clients.sort_by_key(|client| {
        let may_be_told = client.way == Way::Notice && !client.state.is_final();
        (!may_be_told, client.state == super::order::ClientState::Moved)
    });
    order.clients.truncate(most);
    order.clients.sort_by_key(|client| client.id);
}

fn encode(kept: &Kept) -> Vec<u8> {
    let kept = Kept { version: VERSION, ..kept.clone() };
    seal(serde_json::to_string(&kept).expect("texts and numbers can be written"))
}

fn decode(bytes: &[u8]) -> Option<Kept> {
    if bytes.len() > MOST_BYTES {
        return None;
    }
    let json = unseal(bytes)?;
    let kept: Kept = serde_json::from_str(json).ok().filter(|kept: &Kept| kept.version == VERSION)?;
    let numbers = kept.orders.windows(2).all(|pair| pair[0].order < pair[1].order);
    let is_sound = numbers && kept.orders.iter().all(|order| order.order <= kept.last && is_sound(order));
    let active = kept.orders.iter().filter(|order| order.state == RedirectState::Active).count();
    let is_bounded = active <= MOST_ACTIVE && kept.orders.len() - active <= MOST_ENDED;
    (is_sound && is_bounded).then_some(kept)
}

fn is_sound(order: &RedirectStatus) -> bool {
    order.clients.len() <= MOST_CLIENTS
        && order.to.len() <= MOST_URIS
        && order.to.iter().all(|uri| uri.parse::<Uri>().is_ok())
        && order
            .clients
            .iter()
            .all(|client| client.mirror.as_ref().is_none_or(|node| node.parse::<crate::export::NodeId>().is_ok()))
        && to_usize(order.counts.total) >= order.clients.len()
}

/// Takes arbitrary bytes as a file of orders: as they are, and as the JSON of one whose checksum is right.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let sealed = seal(data);
    for bytes in [data, &sealed] {
        if let Some(kept) = decode(bytes) {
            let again = encode(&kept);
            // Escapes may be longer than what they stand for.
            assert!(again.len() > MOST_BYTES || decode(&again) == Some(kept));
        }
    }
}

/// Where real images' servers keep their state: what was said, or what is usual.
pub fn default_directory(variable: impl Fn(&str) -> Option<std::ffi::OsString>, is_root: bool) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(directories) = variable("STATE_DIRECTORY") {
        // The service manager lists several with colons between them (systemd.exec(5)).
        let first = std::env::split_paths(&directories).next().filter(|path| path.is_absolute());
        if first.is_some() {
            return first;
        }
    }
    if is_root {
        return Some(Path::new("/var/lib/headwater").to_owned());
    }
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")));
    state.map(|state| state.join("headwater"))
}

#[cfg(test)]
mod tests {
    use super::super::order::{ClientReport, ClientState, Counts};
    use super::*;
    use crate::mirror::SpaceSettings;
    use proptest::prelude::*;

    fn order(id: u64, state: RedirectState, clients: u64) -> RedirectStatus {
        let client = |id| ClientReport {
            id,
            peer: format!("[::1]:{id}"),
            mirror: Some("ab".repeat(16)),
            way: if id % 2 == 0 { Way::Notice } else { Way::Relay },
            state: if id % 3 == 0 { ClientState::Waiting } else { ClientState::Moved },
            pause_ms: Some(0.1),
            ..ClientReport::default()
        };
        let clients: Vec<_> = (0..clients).map(client).collect();
        RedirectStatus {
            order: id,
            export: "debian \"12\"\n\u{e9}".into(),
            to: vec!["nbd://second/debian12".into()],
            state,
            ordered: 1_795_000_000.25,
            counts: Counts::of(&clients),
            clients,
            ..RedirectStatus::default()
        }
    }

    fn kept() -> Kept {
        let ended = order(7, RedirectState::Cancelled, 2);
        Kept::new(9, vec![order(1, RedirectState::Done, 3), order(3, RedirectState::Active, 4), ended])
    }

    fn place(directory: &Path) -> StatePlace {
        StatePlace { directory: directory.join("a/b"), name: "@redirects".into(), space: None }
    }

    #[test]
    fn what_was_written_is_there_after_a_restart() {
        let scratch = tempfile::tempdir().unwrap();
        let (mut file, empty) = File::open(place(scratch.path())).unwrap();
        assert_eq!(empty.orders, []);
        file.replace(&kept()).unwrap();
        assert!(matches!(File::open(place(scratch.path())), Err(FileError::Elsewhere(_))), "two servers");
        drop(file);
        assert_eq!(File::open(place(scratch.path())).unwrap().1, kept());
        fuzz(&encode(&kept()));
    }

    #[test]
    fn a_damaged_file_is_put_aside() {
        let scratch = tempfile::tempdir().unwrap();
        let (mut file, _) = File::open(place(scratch.path())).unwrap();
        file.replace(&kept()).unwrap();
        let path = file.place.path("");
        drop(file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[30] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let (mut file, empty) = File::open(place(scratch.path())).unwrap();
        assert_eq!(empty.orders, []);
        assert_eq!(fs::read(file.place.path(".damaged")).unwrap(), bytes);
        file.replace(&kept()).unwrap();
    }

    #[test]
    fn the_file_counts_in_the_space_of_the_cache() {
        let scratch = tempfile::tempdir().unwrap();
        let settings = SpaceSettings { limit: Some(4096 + 2 * 4096), ..SpaceSettings::default() };
        let space = Space::new(scratch.path(), settings);
        let place = StatePlace { space: Some(Arc::clone(&space)), ..place(scratch.path()) };
        let (mut file, _) = File::open(place).unwrap();
        file.replace(&kept()).unwrap();
        assert_eq!(space.usage().used, 3 * 4096);
        let long = Kept::new(1, vec![order(1, RedirectState::Done, 500)]);
        assert!(matches!(file.replace(&long), Err(FileError::NoRoom)));
        assert_eq!(space.usage().used, 3 * 4096);
    }

    #[test]
    fn reports_that_are_too_long_keep_what_matters() {
        let mut long = order(1, RedirectState::Active, 3000);
        shorten(&mut long, 600);
        assert_eq!(long.left_out(), 2400);
        assert_eq!(
            long.clients.iter().filter(|client| client.way == Way::Notice && !client.state.is_final()).count(),
            500
        );
        let orders =
            (1..100).map(|id| order(id, if id < 50 { RedirectState::Active } else { RedirectState::Done }, 900));
        let bytes = encode_bounded(&Kept::new(99, orders.collect())).unwrap();
        let read = decode(&bytes).unwrap();
        assert_eq!(read.orders.len(), 99);
        assert_eq!(read.orders[0].counts.total, 900);
    }

    #[test]
    fn names_of_files_are_those_of_addresses() {
        assert!(name_of("127.0.0.1:10809").starts_with("redirects-127.0.0.1_10809-"));
        let long = |end: &str| name_of(&format!("/run/{}/{end}", "x".repeat(300)));
        assert_ne!(long("a"), long("b"));
        assert!(long("a").len() < 200 && !long("a").contains('/'));
    }

    #[test]
    fn state_has_its_usual_places() {
        let with = |set: &[(&str, &str)], is_root| {
            let find = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            default_directory(find, is_root).map(|path| path.display().to_string())
        };
        let home = ("HOME", "/home/a");
        assert_eq!(with(&[("STATE_DIRECTORY", "/x:/y"), home], true).as_deref(), Some("/x"));
        assert_eq!(with(&[("STATE_DIRECTORY", "x"), home], true).as_deref(), Some("/var/lib/headwater"));
        assert_eq!(with(&[home], false).as_deref(), Some("/home/a/.local/state/headwater"));
        assert_eq!(with(&[home, ("XDG_STATE_HOME", "/s")], false).as_deref(), Some("/s/headwater"));
        assert_eq!(with(&[("HOME", "relative")], false), None);
    }

    proptest! {
        #[test]
        fn no_flipped_bit_is_believed(bit in 0usize..100_000) {
            let mut file = encode(&kept());
            let bit = bit % (8 * file.len());
            file[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode(&file), None);
        }
    }
}
