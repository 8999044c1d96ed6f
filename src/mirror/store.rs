//! A mirror's directory: `data`, `map` and `lock`.
//!
//! `data` has each chunk at its own offset, so a complete mirror is a raw image. Owns: these files, who may use them,
//! the order of writing within the map. Does not own: what is in flight, and when to write (the flusher).

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use thiserror::Error;

use super::chunks::{Geometry, States};
use super::map::{self, BLOCK, Found, Header, HeaderError};
use crate::disk::{Access, File};
use crate::export::ImageId;
use crate::units::{ByteSize, to_usize};

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
}

impl Cache {
    /// Takes the directory of the image `name` below `root`, making it if there is none. Blocks.
    pub fn open(root: &Path, name: &str) -> Result<Self, CacheError> {
        let directory = root.join(directory_name(name)?);
        fs::create_dir_all(&directory).map_err(failed("make the directory", &directory))?;
        let lock_path = directory.join("lock");
        let lock = File::open(&lock_path, Access::Create).map_err(failed("open", &lock_path))?;
        if !lock.try_lock().map_err(failed("lock", &lock_path))? {
            let pid = fs::read_to_string(&lock_path).unwrap_or_default().trim().to_owned();
            return Err(CacheError::InUse { path: directory, pid });
        }
        // For people; the lock itself is the kernel's.
        let _ = fs::write(&lock_path, format!("process {}\n", std::process::id()));
        let header = read_header(&directory.join("map"))?;
        Ok(Self { directory, lock, header })
    }

    /// Whether the image `name` has a directory below `root` that a mirror has used.
    pub fn exists(root: &Path, name: &str) -> bool {
        directory_name(name).is_ok_and(|name| root.join(name).join("map").exists())
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

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CacheError + 'a {
    move |source| CacheError::System { what, path: path.to_owned(), source }
}

fn read_header(path: &Path) -> Result<Option<Header>, CacheError> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(failed("open", path))?,
    };
    let mut block = vec![0; BLOCK];
    let length = file.read_at(&mut block, 0).map_err(failed("read", path))?;
    block.truncate(length);
    Header::decode(&block).map(Some).map_err(|source| CacheError::Map { path: path.to_owned(), source })
}

/// The files of a mirror in use.
#[derive(Debug)]
pub(super) struct Store {
    geometry: Geometry,
    data: Arc<File>,
    map: File,
    /// The sequence of each page's newest version. Locked for a moment only.
    sequences: Mutex<Vec<u64>>,
    /// Dropped last: until then nobody else may touch the files.
    _lock: File,
}

/// What was found in a cache.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Pages of the map that could not be read; what they named is fetched again.
    pub(super) damaged_pages: u64,
}

impl Store {
    /// Makes the files of a new cache, or reads those of an old one. `header` is the cache's own, or that of the new
    /// one. Blocks.
    pub(super) fn attach(cache: Cache, header: &Header) -> Result<(Self, States, Loaded), CacheError> {
        let Cache { directory, lock, header: existing } = cache;
        let geometry = header.geometry();
        let (data_path, map_path) = (directory.join("data"), directory.join("map"));
        let mut data = File::open(&data_path, Access::Create).map_err(failed("open", &data_path))?;
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
        let store = Self { geometry, data: Arc::new(data), map, sequences: Mutex::new(sequences), _lock: lock };
        Ok((store, states, loaded))
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
            self.map.write_all_at(Bytes::copy_from_slice(&block), map::slot_at(*page, sequence), false).await?;
            self.sequences.lock().unwrap_or_else(PoisonError::into_inner)[to_usize(*page)] = sequence;
        }
        self.map.sync_data().await
    }
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
    use crate::mirror::chunks::State;
    use crate::ranges::ByteRange;

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
    fn a_damaged_map_is_refused_and_a_damaged_page_is_counted() {
        let root = tempfile::tempdir().unwrap();
        drop(Store::attach(Cache::open(root.path(), "x").unwrap(), &HEADER).unwrap());
        let path = root.path().join("x/map");
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"noise", map::slot_at(1, 0)).unwrap();
        let (_, _, loaded) = Store::attach(Cache::open(root.path(), "x").unwrap(), &HEADER).unwrap();
        assert_eq!(loaded.damaged_pages, 1);
        file.write_all_at(b"noise", 30).unwrap();
        let error = Cache::open(root.path(), "x").unwrap_err().to_string();
        assert!(error.contains("its header is damaged: remove its directory"), "{error}");
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
