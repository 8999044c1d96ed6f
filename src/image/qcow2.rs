//! qcow2 files as their contents, read-only.
//!
//! The format is `imago`'s business. It looks up where bytes are (on a thread that may wait); plain clusters are then
//! read by our own disk operations, compressed ones are decoded by it. Two caches in memory, both bounded: the
//! layout of each window of the image, which never changes because nobody writes, and decoded clusters.
//!
//! Not served, with a clear error: zstd-compressed clusters, extended L2 entries, encryption, dirty, corrupt or
//! truncated images, and backing files outside the directories that the operator named. `imago` reads zeroes behind
//! the end of a file and serves what is encrypted as it is, so the header and the places of all tables are held
//! against the file here before it is asked.

use std::fs;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use imago::file::File as Storage;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, Mapping, Storage as _, StorageOpenOptions};
use moka::sync::Cache;
use tokio::task::coop::consume_budget;

use super::seal::{CannotSeal, Seal};
use crate::disk::{Access, File, Inline};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Context, Export, Facts, LocalFuture, Piece, SharedExport, TryRead, push_extent, push_piece};
use crate::nbd::Extent;
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::telemetry::seldom;
use crate::units::{KIB, MIB, to_u64, to_usize};

/// The unit of looking up: all mappings within it are remembered together.
const WINDOW: u64 = MIB;
/// Windows that one question for extents looks at; whoever wants to know more asks again.
const WINDOWS_AT_ONCE: usize = 1024;
/// Windows remembered: 64 GiB of image, some 100 bytes each for an image that is not fragmented.
const WINDOWS: u64 = 64 * KIB;

/// A qcow2 file.
#[derive(Debug)]
pub(super) struct Qcow2Image {
    path: PathBuf,
    seal: std::result::Result<Arc<Seal>, CannotSeal>,
    /// Shared with the threads that look things up and decode.
    lookup: Arc<Lookup>,
}

#[derive(Debug)]
struct Lookup {
    format: FormatAccess<Storage>,
    /// The file and its backing files, as imago names them.
    files: Vec<(PathBuf, Arc<File>)>,
    cluster: u64,
    /// Of all files, backing files included.
    largest_cluster: u64,
    windows: Cache<u64, Arc<[Mapped]>>,
    decoded: Cache<u64, Bytes>,
}

/// Where a stretch of the image is.
#[derive(Debug, Clone)]
struct Mapped {
    range: ByteRange,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    /// In a file, from this offset on.
    File(Arc<File>, u64),
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In compressed clusters.
    Compressed,
}

impl Qcow2Image {
    /// Opens the file at `path`; its backing files must lie in one of `directories`. So many bytes of decoded clusters
    /// are kept in memory. Blocks.
    pub(super) fn open(path: &Path, directories: &[PathBuf], decoded_bytes: u64) -> io::Result<Self> {
        let cluster = check(path)?;
        let gate = Gate { directories: directories.iter().map(fs::canonicalize).collect::<io::Result<_>>()? };
        let storage = Storage::open(StorageOpenOptions::new().filename(path))?;
        let qcow2 = Qcow2::<Storage>::builder(storage).write(false).open(gate)?;
        let lookup = Lookup {
            format: FormatAccess::new(qcow2),
            files: Vec::new(),
            cluster,
            largest_cluster: cluster,
            windows: Cache::new(WINDOWS),
            decoded: Cache::builder()
                .weigher(|_, cluster: &Bytes| u32::try_from(cluster.len()).unwrap_or(u32::MAX))
                .max_capacity(decoded_bytes)
                .build(),
        };
        let lookup = lookup.with_files()?;
        let seal = match &lookup.files[..] {
            [(_, file)] => Seal::new(Arc::clone(file), lookup.format.size()).map(Arc::new),
            _ => Err(CannotSeal::SeveralFiles),
        };
        Ok(Self { path: path.to_owned(), seal, lookup: Arc::new(lookup) })
    }

    /// What gives it its identity; or why it cannot have one.
    pub(super) fn seal(&self) -> std::result::Result<Arc<Seal>, CannotSeal> {
        self.seal.clone()
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Lookup) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let lookup = Arc::clone(&self.lookup);
        let task = tokio::task::spawn_blocking(move || work(&lookup));
        task.await.map_err(|_| io::Error::other("reading the image's tables went wrong"))?
    }

    async fn window(&self, window: u64) -> io::Result<Arc<[Mapped]>> {
        match self.lookup.windows.get(&window) {
            Some(mapped) => Ok(mapped),
            None => self.blocking(move |lookup| lookup.window(window)).await,
        }
    }

    /// The mappings of `range`, cut to it.
    async fn mapped(&self, range: ByteRange) -> io::Result<Vec<Mapped>> {
        let mut all = Vec::new();
        for window in range.start() / WINDOW..range.end().div_ceil(WINDOW) {
            all.extend(cut(&self.window(window).await?, range));
        }
        Ok(all)
    }

    async fn read_pieces(&self, range: ByteRange) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for Mapped { range, place } in self.mapped(range).await? {
            let length = to_usize(range.length());
            match place {
                Place::Zero => push_piece(&mut pieces, Piece::Hole(range.length())),
                Place::File(file, offset) => {
                    let bytes = file.read_exact_at(BytesMut::with_capacity(length), length, offset).await?;
                    push_piece(&mut pieces, Piece::Data(bytes.freeze()));
                }
                Place::Compressed => {
                    for part in range.pieces(self.lookup.cluster) {
                        self.read_compressed(part, &mut pieces).await?;
                    }
                }
            }
        }
        Ok(pieces)
    }

    /// Reads `range`, which is no longer than a cluster.
    async fn read_compressed(&self, range: ByteRange, pieces: &mut Vec<Piece>) -> io::Result<()> {
        let cluster = self.lookup.cluster;
        for number in range.start() / cluster..range.end().div_ceil(cluster) {
            let bytes = match self.lookup.decoded.get(&number) {
                Some(bytes) => bytes,
                None => self.blocking(move |lookup| lookup.decode(number)).await?,
            };
            let start = number * cluster;
            let part = ByteRange::between(start, start + to_u64(bytes.len())).intersect(range);
            let bytes = bytes.slice(to_usize(part.start() - start)..to_usize(part.end() - start));
            push_piece(pieces, Piece::Data(bytes));
        }
        Ok(())
    }

    fn failed(&self, what: &str, range: ByteRange, error: io::Error) -> Error {
        let error = Error::from_io(format!("cannot {what} {} bytes at {}", range.length(), range.start()), error);
        seldom!(error, path = %self.path.display(), error = %error.chain(), "disk error");
        error
    }
}

impl Lookup {
    /// Opens for ourselves the files that imago has opened.
    fn with_files(mut self) -> io::Result<Self> {
        let mut paths = Vec::new();
        collect_paths(&self.format, &mut paths);
        for path in paths {
            // Backing files are what imago takes them for, which is qcow2 if they begin like it.
            if super::begins_like_qcow2(&path)? {
                self.largest_cluster = self.largest_cluster.max(check(&path)?);
            }
            let file = Arc::new(File::open(&path, Access::ReadOnly)?);
            self.files.push((path, file));
        }
        Ok(self)
    }

    /// Behind the end of a file that was cut short since it was opened, tables would read as zeroes.
    fn check_lengths(&self) -> io::Result<()> {
        for (path, file) in &self.files {
            if fs::metadata(path).is_ok_and(|now| now.is_file() && now.len() < file.size()) {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file was cut short"));
            }
        }
        Ok(())
    }

    /// The mappings of one window, in order and without gaps.
    fn window(&self, window: u64) -> io::Result<Arc<[Mapped]>> {
        self.windows
            .try_get_with(window, || {
                self.check_lengths()?;
                let end = self.format.size().min((window + 1) * WINDOW);
                let mut mapped = Vec::new();
                let mut start = window * WINDOW;
                while start < end {
                    let (mapping, length) = self.format.get_mapping(start, end - start)?;
                    let range = ByteRange::between(start, start + if length == 0 { end - start } else { length });
                    push_mapped(&mut mapped, range, self.place(&mapping)?, self.largest_cluster)?;
                    start = range.end();
                }
                Ok(mapped.into())
            })
            .map_err(shared)
    }

    fn place(&self, mapping: &Mapping<'_, Storage>) -> io::Result<Place> {
        match mapping {
            Mapping::Raw { storage, offset, .. } => {
                let name = storage.get_filename();
                let file = self.files.iter().find(|(path, _)| Some(path) == name.as_ref());
                let (_, file) = file.ok_or_else(|| io::Error::other(format!("data in an unknown file, {storage}")))?;
                Ok(Place::File(Arc::clone(file), *offset))
            }
            Mapping::Zero { .. } | Mapping::Eof { .. } => Ok(Place::Zero),
            // Whatever else there is can only be read by imago itself.
            _ => Ok(Place::Compressed),
        }
    }

    /// The bytes of one cluster; threads that want the same one wait for the first.
    fn decode(&self, number: u64) -> io::Result<Bytes> {
        let start = number * self.cluster;
        let length = self.cluster.min(self.format.size() - start);
        self.decoded
            .try_get_with(number, || {
                self.check_lengths()?;
                let mut bytes = vec![0; to_usize(length)];
                self.format.read(&mut bytes[..], start)?;
                Ok(Bytes::from(bytes))
            })
            .map_err(shared)
    }
}

/// Appends a mapping. The last cluster of a file need not be there in full: then its rest is zero.
fn push_mapped(mapped: &mut Vec<Mapped>, range: ByteRange, place: Place, cluster: u64) -> io::Result<()> {
    let inside = match &place {
        Place::File(file, offset) => {
            if offset.saturating_add(range.length()) > file.size().next_multiple_of(cluster) {
                return Err(truncated());
            }
            range.length().min(file.size().saturating_sub(*offset))
        }
        Place::Zero | Place::Compressed => range.length(),
    };
    let edge = range.start() + inside;
    let parts =
        [(ByteRange::between(range.start(), edge), place), (ByteRange::between(edge, range.end()), Place::Zero)];
    mapped
        .extend(parts.into_iter().filter(|(range, _)| !range.is_empty()).map(|(range, place)| Mapped { range, place }));
    Ok(())
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the file is truncated: it refers to data behind its end")
}

/// An error that several threads waited for.
fn shared(error: Arc<io::Error>) -> io::Error {
    io::Error::new(error.kind(), error)
}

/// The parts of `mapped` within `range`.
fn cut(mapped: &[Mapped], range: ByteRange) -> impl Iterator<Item = Mapped> + '_ {
    mapped.iter().filter_map(move |mapped| {
        let part = mapped.range.intersect(range);
        let place = match &mapped.place {
            Place::File(file, offset) => {
                Place::File(Arc::clone(file), offset + part.start().saturating_sub(mapped.range.start()))
            }
            place => place.clone(),
        };
        (!part.is_empty()).then_some(Mapped { range: part, place })
    })
}

fn collect_paths(format: &FormatAccess<Storage>, paths: &mut Vec<PathBuf>) {
    for storage in format.inner().collect_storage_dependencies() {
        paths.extend(storage.get_filename().filter(|path| !paths.contains(path)));
    }
}

/// Holds a header and its first table against the file and gives back the size of a cluster. Offsets are those of
/// QEMU's `docs/interop/qcow2.rst`, "Header" and "L1 table".
fn check(path: &Path) -> io::Result<u64> {
    /// What QEMU allows as well.
    const LONGEST_L1: u32 = 4 << 20;
    const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let mut file = fs::File::open(path)?;
    // A device's metadata have no length.
    let length = file.seek(io::SeekFrom::End(0))?;
    let mut header = [0; 48];
    file.read_exact_at(&mut header, 0)?;
    let cluster = match (&header[20..]).get_u32() {
        bits @ 9..=21 => 1u64 << bits,
        _ => return bad("the cluster size is out of range"),
    };
    if (&header[32..]).get_u32() != 0 {
        return bad("the image is encrypted");
    }
    let (size, entries) = ((&header[24..]).get_u64(), (&header[36..]).get_u32());
    let covered = u128::from(entries) * u128::from(cluster / 8) * u128::from(cluster);
    if entries > LONGEST_L1 || u128::from(size) > covered {
        return bad("the size of the image and of its first table do not go together");
    }
    let mut table = vec![0; to_usize(8 * u64::from(entries))];
    file.read_exact_at(&mut table, (&header[40..]).get_u64()).map_err(|_| truncated())?;
    let is_inside = |mut entry: &[u8]| match entry.get_u64() {
        0 => true,
        entry => (entry & L2_OFFSET) + cluster <= length,
    };
    if table.chunks_exact(8).all(is_inside) { Ok(cluster) } else { Err(truncated()) }
}

/// Lets imago open what the image refers to if it lies in one of the directories, which are canonical.
#[derive(Debug, Clone)]
struct Gate {
    directories: Vec<PathBuf>,
}

impl Gate {
    fn check(&self, path: Option<&Path>) -> io::Result<()> {
        let path = path.ok_or_else(|| io::Error::other("the image refers to a file without a name"))?;
        // Canonical, so that neither `..` nor a link leads out of the directory.
        let real = fs::canonicalize(path)?;
        if self.directories.iter().any(|directory| real.starts_with(directory)) {
            return Ok(());
        }
        let message = format!("it refers to {}: allow that with --format qcow2 --backing DIRECTORY", path.display());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
    }
}

impl ImplicitOpenGate<Storage> for Gate {
    fn open_format<F: FormatDriverBuilder<Storage>>(&mut self, builder: F) -> io::Result<FormatAccess<Storage>> {
        self.check(builder.get_image_path().as_deref())?;
        Ok(FormatAccess::new(builder.open(self.clone())?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        self.check(options.get_filename())?;
        Storage::open(options.write(false))
    }
}

impl Export for Qcow2Image {
    fn facts(&self) -> Facts {
        Facts {
            identity: self.seal.as_ref().ok().and_then(|seal| seal.identity()),
            ..Facts::read_only(self.lookup.format.size(), format!("{} (qcow2)", super::description(&self.path)))
        }
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let number = range.start() / WINDOW;
        let Some(window) = self.lookup.windows.get(&number) else { return TryRead::Wait };
        let mut parts = cut(&window, range);
        let (Some(Mapped { range: part, place }), None) = (parts.next(), parts.next()) else { return TryRead::Wait };
        if part != range {
            return TryRead::Wait;
        }
        match place {
            Place::Zero => TryRead::Hole,
            Place::File(file, offset) => match file.try_read_at(output, to_usize(range.length()), offset) {
                Inline::Done => TryRead::Data,
                Inline::WouldBlock => TryRead::Wait,
            },
            Place::Compressed => TryRead::Wait,
        }
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move { self.read_pieces(range).await.map_err(|error| self.failed("read", range, error)) })
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.seal.as_ref().ok()?.manifest()
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            if context != Context::Allocation {
                return Err(Error::new(ErrorKind::Invalid, "a real image has no such context"));
            }
            let mut extents = Vec::new();
            let windows = range.start() / WINDOW..range.end().div_ceil(WINDOW);
            for window in windows.take(WINDOWS_AT_ONCE) {
                consume_budget().await;
                let mapped = self.window(window).await.map_err(|error| self.failed("look at", range, error))?;
                for part in cut(&mapped, range) {
                    let zero = matches!(part.place, Place::Zero);
                    let state = if zero { Allocation::all() } else { Allocation::empty() };
                    push_extent(&mut extents, part.range.length(), u64::from(state.bits()));
                }
                if extents.len() > limit {
                    break;
                }
            }
            extents.truncate(limit);
            Ok(extents)
        })
    }
}
