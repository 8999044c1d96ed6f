//! A mirror's directory: `data`, `map`, `lock` and `heat`.
//!
//! `data` has each chunk at its own offset, so a complete mirror is a raw image. Owns: these files, who may use them,
//! the order of writing within the map. Does not own: what is in flight, when to write (the flusher), and the other
//! files of the directory (`truth`, `pins`).

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use thiserror::Error;

use super::Truth;
use super::chunks::{Geometry, State, States};
use super::map::{self, BLOCK, Found, Header, HeaderError};
use super::{pins, truth};
use crate::disk::{Access, File};
use crate::export::ImageId;
use crate::ranges::ByteRange;
use crate::telemetry::{crash_point, is_crash_point};
use crate::units::{ByteSize, to_u64, to_usize};

/// Why a cache cannot be used.
#[derive(Debug, Error)]
pub enum CacheError {
    /// The system refused.
    #[error("cannot {what} {}", path.display())]
    System {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{} is in use by another process{}: two mirrors cannot share a cache", path.display(), owner(.pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process, as it wrote its number.
        pid: String,
    },
    /// The map cannot be read.
    #[error("{} cannot be used, {source}: remove its directory to start anew", path.display())]
    Map {
        /// The map.
        path: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// The name cannot be a directory.
    #[error("the name {0:?} is too long for a directory: give the mirror another one, as in NAME=URI")]
    NameTooLong(String),
    /// It belongs to an image of another size.
    #[error(
        "{} holds another image, of {} bytes ({}) where the upstream has {} ({}): remove it, or give this mirror another name, as in NAME=URI",
        path.display(), cached, ByteSize(*cached), upstream, ByteSize(*upstream)
    )]
    OtherSize {
        /// The directory.
        path: PathBuf,
        /// Bytes of the image there.
        cached: u64,
        /// Bytes of the upstream's image.
        upstream: u64,
    },
    /// It belongs to another image.
    #[error(
        "{} holds another image, {cached} where the upstream has {upstream}: remove it, or give this mirror another name, as in NAME=URI",
        path.display()
    )]
    OtherIdentity {
        /// The directory.
        path: PathBuf,
        /// The image there.
        cached: ImageId,
        /// The upstream's.
        upstream: ImageId,
    },
    /// It was made with another chunk size.
    #[error(
        "{} was made with chunks of {}, not {}: leave --chunk-size out, or remove the directory to start anew",
        path.display(), ByteSize(u64::from(*cached)), ByteSize(u64::from(*wanted))
    )]
    OtherChunkSize {
        /// The directory.
        path: PathBuf,
        /// There.
        cached: u32,
        /// What was asked for.
        wanted: u32,
    },
}

fn owner(pid: &str) -> String {
    if pid.is_empty() { String::new() } else { format!(" ({pid})") }
}

/// The directory of one image, locked for us. What it was made for is known; its contents are not read yet.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    lock: File,
    header: Option<Header>,
    is_damaged: bool,
}

impl Cache {
    /// Takes the directory of the image `name` below `root`, making it if there is none. Blocks.
    pub fn open(root: &Path, name: &str) -> Result<Self, CacheError> {
        Self::open_at(root.join(directory_name(name)?))
    }

    /// Takes the directory of one version of the image `name`, making it if there is none. Blocks.
    pub fn open_version(root: &Path, name: &str, version: ImageId) -> Result<Self, CacheError> {
        Self::open_at(root.join(version_name(name, version)?))
    }

    fn open_at(directory: PathBuf) -> Result<Self, CacheError> {
        fs::create_dir_all(&directory).map_err(failed("make the directory", &directory))?;
        let lock_path = directory.join("lock");
        let lock = File::open(&lock_path, Access::Create).map_err(failed("open", &lock_path))?;
        if !lock.try_lock().map_err(failed("lock", &lock_path))? {
            let pid = fs::read_to_string(&lock_path).unwrap_or_default().trim().to_owned();
            return Err(CacheError::InUse { path: directory, pid });
        }
        // For people; the lock itself is the kernel's.
        let _ = fs::write(&lock_path, format!("process {}\n", std::process::id()));
        // What was being made when a process ended counts for nothing, and nobody has charged it.
        for name in ["map.new", "heat.new", pins::NEW_NAME, truth::NEW_NAME] {
            let _ = fs::remove_file(directory.join(name));
        }
        let (header, is_damaged) = read_header(&directory.join("map"))?;
        if is_damaged {
            let path = directory.display();
            tracing::warn!(%path, "the header of the map is damaged: this cache starts anew, and all is fetched again");
        }
        Ok(Self { directory, lock, header, is_damaged })
    }

    /// The versions of the image `name` that have a directory of their own below `root`, the latest used first.
    pub fn versions(root: &Path, name: &str) -> Vec<PathBuf> {
        let Ok(prefix) = directory_name(name).map(|name| name + VERSION_MARK) else { return Vec::new() };
        let entries = fs::read_dir(root).into_iter().flatten().filter_map(io::Result::ok);
        let is_version = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(&prefix);
        let mut paths: Vec<_> = entries.filter(is_version).map(|entry| entry.path()).collect();
        paths.sort_by_key(|path| std::cmp::Reverse(Self::last_used(path)));
        paths
    }

    /// Takes a directory that [`Cache::versions`] gave. Blocks.
    pub fn reopen(directory: &Path) -> Result<Self, CacheError> {
        Self::open_at(directory.to_owned())
    }

    /// Removes the directory with all that is in it. Blocks.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(&self.directory)
    }

    /// Whether something was there that could not be read, and is not used.
    pub const fn is_damaged(&self) -> bool {
        self.is_damaged
    }

    /// Where the first cache of the image `name` is, or would be.
    pub fn path(root: &Path, name: &str) -> Result<PathBuf, CacheError> {
        Ok(root.join(directory_name(name)?))
    }

    /// When the cache in this directory was used last.
    pub fn last_used(directory: &Path) -> Option<std::time::SystemTime> {
        fs::metadata(directory.join("lock")).and_then(|lock| lock.modified()).ok()
    }

    /// Whether the image `name` has a directory below `root` that a mirror has used.
    pub fn exists(root: &Path, name: &str) -> bool {
        directory_name(name).is_ok_and(|name| root.join(name).join("map").exists())
    }

    /// What the cache says its image is: what it was made for, or what its manifest is of. Blocks.
    pub fn identity(&self) -> Option<ImageId> {
        self.header.and_then(|header| header.identity).or_else(|| Truth::claimed(&self.directory))
    }

    /// The manifest that the cache has, if it can be read. Blocks.
    pub fn manifest(&self, name: &str) -> Option<Truth> {
        Truth::load(&self.directory).unwrap_or_else(|error| {
            tracing::warn!(image = name, %error, "the manifest of the cache cannot be used: it is fetched again");
            None
        })
    }

    /// What the cache was made for, if it is not new.
    pub const fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// The name of an image as the name of a directory. Reversible: what is not a letter, a digit or `-_.` is written as
/// `%XX`, and so is a dot in front. The empty name is `%`.
fn directory_name(name: &str) -> Result<String, CacheError> {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');
    let encoded = utf8_percent_encode(name, KEPT).to_string();
    let encoded = match encoded.strip_prefix('.') {
        _ if encoded.is_empty() => "%".to_owned(),
        Some(rest) => format!("%2E{rest}"),
        None => encoded,
    };
    if encoded.len() > 255 { Err(CacheError::NameTooLong(name.to_owned())) } else { Ok(encoded) }
}

/// Between the name of an image and that of a version; not in any [`directory_name`].
const VERSION_MARK: &str = "@";

fn version_name(name: &str, version: ImageId) -> Result<String, CacheError> {
    let id = version.to_string();
    let version = id.split_once('-').map_or(&*id, |(_, digits)| &digits[..16]);
    let encoded = format!("{}{VERSION_MARK}{version}", directory_name(name)?);
    if encoded.len() > 255 { Err(CacheError::NameTooLong(name.to_owned())) } else { Ok(encoded) }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CacheError + 'a {
    move |source| CacheError::System { what, path: path.to_owned(), source }
}

/// What the map says, if there is one that can be read, and whether there is one that is damaged.
fn read_header(path: &Path) -> Result<(Option<Header>, bool), CacheError> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((None, false)),
        result => result.map_err(failed("open", path))?,
    };
    let mut block = vec![0; BLOCK];
    let length = file.read_at(&mut block, 0).map_err(failed("read", path))?;
    block.truncate(length);
    match Header::decode(&block) {
        Ok(header) => Ok((Some(header), false)),
        Err(HeaderError::Damaged) => Ok((None, true)),
        Err(source @ HeaderError::Version(_)) => Err(CacheError::Map { path: path.to_owned(), source }),
    }
}

/// The files of a mirror in use.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    geometry: Geometry,
    data: Arc<File>,
    map: File,
    /// The sequence of each page's newest version. Locked for a moment only.
    sequences: Mutex<Vec<u64>>,
    /// Dropped last: until then nobody else may touch the files.
    lock: File,
}

/// What was found in a cache.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Pages of the map that could not be read; what they named is fetched again.
    pub(super) damaged_pages: u64,
    /// Bytes that were on the disk without being named by the map, and have been given back.
    pub(super) unnamed_bytes: u64,
}

impl Loaded {
    /// Says what was not as it should be.
    pub(super) fn tell(&self, image: &str) {
        if self.damaged_pages > 0 {
            let pages = self.damaged_pages;
            tracing::warn!(image, pages, "parts of the map are damaged: what they named is fetched again");
        }
        if self.unnamed_bytes > 0 {
            tracing::debug!(image, bytes = self.unnamed_bytes, "gave back what was not marked before the last end");
        }
    }
}

/// Bytes of the disk that the files of a cache take beside its chunks and its manifest: map, what is hot (twice while it
/// is replaced), pins, the lock, the directory, and the first blocks of each file's own index.
pub(super) fn fixed_bytes(geometry: Geometry, segments: u32) -> u64 {
    const SMALL_FILES: u64 = 64 << 10;
    let block = to_u64(BLOCK);
    let heat = (64 + 5 * u64::from(segments)).next_multiple_of(block);
    map::file_length(geometry) + 2 * heat + SMALL_FILES
}

impl Store {
    /// Makes the files of a new cache, or reads those of an old one. `header` is the cache's own, or that of the new
    /// one. Blocks.
    pub(super) fn attach(cache: Cache, header: &Header) -> Result<(Self, States, Loaded), CacheError> {
        let Cache { directory, lock, header: existing, .. } = cache;
        let geometry = header.geometry();
        let (data_path, map_path) = (directory.join("data"), directory.join("map"));
        let mut data = File::open(&data_path, Access::Create).map_err(failed("open", &data_path))?;
        data.forgo_pages_that_stay();
        if existing.is_none() {
            // Whatever an interrupted start left is not named by any map.
            data.set_size(0).map_err(failed("empty", &data_path))?;
            create_map(&directory, header)?;
        }
        if data.size() != header.image_size {
            if existing.is_some() {
                tracing::warn!(path = %data_path.display(), "the data file has another size: what it lacks is fetched again");
            }
            data.set_size(header.image_size).map_err(failed("resize", &data_path))?;
        }
        let map = File::open(&map_path, Access::ReadWrite).map_err(failed("open", &map_path))?;
        let states = States::new(geometry);
        let (sequences, loaded) = load_map(&map_path, geometry, &states).map_err(failed("read", &map_path))?;
        let loaded =
            Loaded { unnamed_bytes: reclaim(&data, geometry, &states).map_err(failed("tidy", &data_path))?, ..loaded };
        let sequences = Mutex::new(sequences);
        let store = Self { directory, geometry, data: Arc::new(data), map, sequences, lock };
        Ok((store, states, loaded))
    }

    /// Lets another process have the directory.
    pub(super) fn release(&self) {
        self.lock.unlock();
    }

    /// Refuses a file system that cannot take back a part of a file: a limit could not be kept there. Blocks.
    pub(super) fn try_punching(&self) -> Result<(), CacheError> {
        let beyond = self.geometry.size().next_multiple_of(to_u64(BLOCK));
        let range = ByteRange::between(beyond, beyond + to_u64(BLOCK));
        self.data
            .punch_now(range)
            .map_err(failed("give back a part of (fallocate) with a limit of the cache", self.data.path()))
    }

    /// Where it is.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What was saved of what is hot, if anything.
    pub(super) fn load_heat(&self) -> Option<Vec<u8>> {
        fs::read(self.directory.join("heat")).ok()
    }

    /// Saves what is hot. It is no loss if a crash spoils it.
    pub(super) async fn save_heat(&self, bytes: Vec<u8>) -> io::Result<()> {
        let (path, new_path) = (self.directory.join("heat"), self.directory.join("heat.new"));
        let write = move || {
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).open(&new_path)?.write_all_at(&bytes, 0)?;
            fs::rename(&new_path, &path)
        };
        tokio::task::spawn_blocking(write).await.unwrap_or_else(|_| Err(io::Error::other("the thread died")))
    }

    /// The chunks' bytes.
    pub(super) const fn data(&self) -> &Arc<File> {
        &self.data
    }

    /// Writes pages with what is durable now, then makes them durable. A page that was not written, or not durably,
    /// keeps its version before.
    pub(super) async fn write_pages(&self, states: &States, pages: &[u64]) -> io::Result<()> {
        for page in pages {
            let sequence = self.sequences.lock().unwrap_or_else(PoisonError::into_inner)[to_usize(*page)] + 1;
            let block = map::encode_page(self.geometry, states, *page, sequence);
            let at = map::slot_at(*page, sequence);
            if is_crash_point("mark half written") {
                self.map.write_all_at(Bytes::copy_from_slice(&block[..BLOCK / 2]), at, true).await?;
                crash_point("mark half written");
            }
            self.map.write_all_at(Bytes::copy_from_slice(&block), at, false).await?;
            self.sequences.lock().unwrap_or_else(PoisonError::into_inner)[to_usize(*page)] = sequence;
        }
        self.map.sync_data().await
    }
}

/// Punches out what the map does not name: a crash may have left it, and nothing would ever give it back. Gives the
/// number of bytes.
fn reclaim(data: &File, geometry: Geometry, states: &States) -> io::Result<u64> {
    const SPANS: usize = 1024;
    let mut reclaimed = 0;
    let mut start = 0;
    while start < geometry.size() {
        let spans = data.spans(ByteRange::between(start, geometry.size()), SPANS)?;
        for span in &spans {
            start = span.range.end();
            if span.is_hole {
                continue;
            }
            for chunk in geometry.chunks(span.range) {
                let part = geometry.range(chunk).intersect(span.range);
                if states.get(chunk) != State::Unverified {
                    // A file system without holes keeps what it has, and is written over.
                    match data.punch_now(part) {
                        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(reclaimed),
                        result => result?,
                    }
                    reclaimed += part.length();
                }
            }
        }
        if spans.is_empty() {
            break;
        }
    }
    Ok(reclaimed)
}

/// Makes a map without any chunk, under its name only when it is whole. Its space is allocated at once, so that
/// marking a chunk never fails for want of it.
fn create_map(directory: &Path, header: &Header) -> Result<(), CacheError> {
    let (path, new_path) = (directory.join("map"), directory.join("map.new"));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let new = options.open(&new_path).map_err(failed("make", &new_path))?;
    let length = map::file_length(header.geometry());
    match rustix::fs::fallocate(&new, rustix::fs::FallocateFlags::empty(), 0, length) {
        Ok(()) => {}
        Err(rustix::io::Errno::OPNOTSUPP) => new.set_len(length).map_err(failed("resize", &new_path))?,
        Err(error) => return Err(failed("allocate", &new_path)(error.into())),
    }
    new.write_all_at(&header.encode(), 0).map_err(failed("write", &new_path))?;
    new.sync_all().map_err(failed("sync", &new_path))?;
    fs::rename(&new_path, &path).map_err(failed("rename", &new_path))?;
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("sync", directory))
}

/// Reads all pages, some at a time.
fn load_map(path: &Path, geometry: Geometry, states: &States) -> io::Result<(Vec<u64>, Loaded)> {
    const AT_ONCE: usize = 128;
    let file = fs::File::open(path)?;
    let mut sequences = Vec::with_capacity(to_usize(map::pages(geometry)));
    let mut loaded = Loaded::default();
    let mut buffer = vec![0; 2 * BLOCK * AT_ONCE];
    for first in (0..map::pages(geometry)).step_by(AT_ONCE) {
        let length = read_up_to(&file, &mut buffer, map::slot_at(first, 0))?;
        let last = map::pages(geometry).min(first + AT_ONCE as u64);
        let mut slots = buffer[..length].chunks(2 * BLOCK);
        for page in first..last {
            match map::decode_page(geometry, states, page, slots.next().unwrap_or_default()) {
                Found::Version(sequence) => sequences.push(sequence),
                Found::Nothing => sequences.push(0),
                Found::Damaged => {
                    loaded.damaged_pages += 1;
                    sequences.push(0);
                }
            }
        }
    }
    Ok((sequences, loaded))
}

/// Fills `buffer` from `offset` on, as far as the file goes.
fn read_up_to(file: &fs::File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::NodeId;

    const HEADER: Header = Header { image_size: 10_000_000, chunk_size: 4096, node: NodeId([1; 16]), identity: None };

    #[test]
    fn names_become_directories_that_differ_when_the_names_do() {
        for (name, directory) in [
            ("debian12", "debian12"),
            ("a/b c", "a%2Fb%20c"),
            ("", "%"),
            ("%", "%25"),
            ("..", "%2E."),
            (".hidden", "%2Ehidden"),
            ("v1.2-x_y", "v1.2-x_y"),
            ("é", "%C3%A9"),
        ] {
            assert_eq!(directory_name(name).unwrap(), directory);
        }
        assert!(matches!(directory_name(&"x".repeat(256)), Err(CacheError::NameTooLong(_))));
    }

    #[test]
    fn a_cache_is_for_one_process() {
        let root = tempfile::tempdir().unwrap();
        let first = Cache::open(root.path(), "x").unwrap();
        let error = Cache::open(root.path(), "x").unwrap_err().to_string();
        assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
        Cache::open(root.path(), "y").unwrap();
        drop(first);
        Cache::open(root.path(), "x").unwrap();
    }

    #[test]
    fn a_new_cache_is_whole_or_not_there() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path(), "x").unwrap();
        assert_eq!(cache.header(), None);
        let directory = cache.directory().to_owned();
        // A start that was cut off before the map had its name.
        fs::write(directory.join("data"), vec![1; 5000]).unwrap();
        fs::write(directory.join("map.new"), b"half").unwrap();
        let (store, states, _) = Store::attach(cache, &HEADER).unwrap();
        assert_eq!(states.get(HEADER.geometry().chunk(0).unwrap()), State::Absent);
        assert_eq!(fs::read(directory.join("data")).unwrap(), vec![0; 10_000_000]);
        drop(store);
        assert_eq!(Cache::open(root.path(), "x").unwrap().header(), Some(&HEADER));
    }

    #[test]
    fn a_damaged_map_starts_anew_and_a_damaged_page_is_counted() {
        let root = tempfile::tempdir().unwrap();
        drop(Store::attach(Cache::open(root.path(), "x").unwrap(), &HEADER).unwrap());
        let path = root.path().join("x/map");
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"noise", map::slot_at(1, 0)).unwrap();
        let (_, _, loaded) = Store::attach(Cache::open(root.path(), "x").unwrap(), &HEADER).unwrap();
        assert_eq!(loaded.damaged_pages, 1);
        file.write_all_at(b"noise", 30).unwrap();
        let cache = Cache::open(root.path(), "x").unwrap();
        assert!(cache.is_damaged() && cache.header().is_none());
    }

    #[test]
    fn pages_that_were_written_are_read() {
        let root = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let geometry = HEADER.geometry();
        for round in 1..5 {
            let (store, states, loaded) = Store::attach(Cache::open(root.path(), "x").unwrap(), &HEADER).unwrap();
            assert_eq!(loaded.damaged_pages, 0);
            let resident = |states: &States| {
                let chunks = geometry.chunks(ByteRange::between(0, geometry.size()));
                chunks.filter(|chunk| states.get(*chunk) == State::Unverified).count()
            };
            assert_eq!(resident(&states), round - 1);
            states.set(geometry.chunk(round as u64 * 500).unwrap(), State::Resident);
            let all: Vec<_> = (0..map::pages(geometry)).collect();
            runtime.block_on(store.write_pages(&states, &all)).unwrap();
        }
    }
}
