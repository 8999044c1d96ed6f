//! What ties a served image to the manifest beside its file.
//!
//! An image is sealed as long as nobody changes it: its manifest names the state of the file (length, time of
//! modification, inode) that its digests were read from. The state is looked at when the manifest is loaded and whenever
//! somebody asks for the identity, which is at each negotiation and never on the way of a request. A manifest of another
//! state is refused; one whose file changes later is withdrawn, for good unless it is loaded anew.
//!
//! Owns: whether the manifest fits, and its bytes as an export. Does not own: making it (`index`).

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use crate::disk::{Access, File, Inline, Kind};
use crate::error::{Error, Result};
use crate::export::{Export, Facts, ImageId, LocalFuture, Piece, SharedExport, TryRead, push_piece};
use crate::manifest::{BLOCK, FormatError, Header, IdHasher, Source, digest_at};
use crate::ranges::ByteRange;
use crate::units::{KIB, to_u64, to_usize};

/// Digests read at once to be hashed.
const PIECE: u64 = 256 * KIB;

/// Where the manifest of the image at `path` lies: beside it, with `.manifest` behind its name.
pub fn manifest_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".manifest");
    name.into()
}

/// Why an image cannot have an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CannotSeal {
    /// Clients may write to it.
    #[error("it is writable, and an identity is for what does not change: serve it with --read-only")]
    Writable,
    /// It is a block device.
    #[error("it is a block device, which has no time of modification that would tell of changes")]
    BlockDevice,
    /// It is a qcow2 file with a backing file.
    #[error(
        "its contents lie in several files, and a change of one would not be noticed: convert it (qemu-img convert)"
    )]
    SeveralFiles,
}

/// Why a manifest is not used.
#[derive(Debug, Error)]
pub enum Unfit {
    /// The system refused to give it or to look at the image.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// It is none, or damaged.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It tells of an image of another size.
    #[error("it is of an image of {manifest} bytes, and this one has {image}")]
    OtherSize {
        /// What the manifest says.
        manifest: u64,
        /// Bytes of the image.
        image: u64,
    },
    /// It does not say which file it was made from.
    #[error("it does not say which file it was made from")]
    NoSource,
    /// The image has changed.
    #[error("the image has changed since: other {}", .0.join(", "))]
    Changed(Vec<&'static str>),
    /// Its digests are not those that its header names.
    #[error("it is damaged")]
    Damaged,
}

/// The identity of one image, while it has one. For any thread.
#[derive(Debug)]
pub struct Seal {
    /// The file of the image, as it is served.
    file: Arc<File>,
    image_size: u64,
    sealed: RwLock<Option<Sealed>>,
}

#[derive(Debug)]
struct Sealed {
    header: Header,
    source: Source,
    manifest: SharedExport,
}

impl Seal {
    /// No identity yet, for an image of `image_size` bytes whose contents are all in `file`.
    pub(super) fn new(file: Arc<File>, image_size: u64) -> std::result::Result<Self, CannotSeal> {
        match file.kind() {
            Kind::Regular => Ok(Self { file, image_size, sealed: RwLock::default() }),
            Kind::BlockDevice => Err(CannotSeal::BlockDevice),
        }
    }

    /// The file of the image.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The path of the image.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Takes over the manifest beside the image, if it fits; `None` if there is none. It is read and hashed as a whole,
    /// 32 bytes for each chunk. Blocks.
    pub fn load(&self) -> std::result::Result<Option<Header>, Unfit> {
        let (sealed, result) = match self.check() {
            Ok(Some(sealed)) => {
                let header = sealed.header;
                (Some(sealed), Ok(Some(header)))
            }
            Ok(None) => (None, Ok(None)),
            Err(unfit) => (None, Err(unfit)),
        };
        *self.sealed.write().unwrap_or_else(PoisonError::into_inner) = sealed;
        result
    }

    /// Loads the manifest and logs what came of it. Blocks.
    pub(super) fn load_and_tell(&self) {
        let path = self.path().display();
        match self.load() {
            Ok(Some(Header { id: identity, .. })) => tracing::info!(%path, %identity, "the image has a manifest"),
            Ok(None) => tracing::debug!(%path, "the image has no manifest"),
            Err(unfit) => warn_of(self.path(), &unfit),
        }
    }

    /// The manifest beside the image, if it fits.
    fn check(&self) -> std::result::Result<Option<Sealed>, Unfit> {
        let Some(written) = Written::open(self.path())? else { return Ok(None) };
        let Written { header, source, .. } = written;
        let (manifest, image) = (header.shape.image_size, self.image_size);
        let differences = differences(source, state_of(&self.file)?);
        if !differences.is_empty() {
            return Err(Unfit::Changed(differences));
        }
        if manifest != image {
            return Err(Unfit::OtherSize { manifest, image });
        }
        written.check()?;
        let description = format!("manifest of {}", super::description(self.path()));
        let manifest = ManifestFile {
            header: Bytes::copy_from_slice(&Header { source: None, ..header }.encode()),
            facts: Facts::read_only(header.shape.manifest_length(), description),
            digests: written.file,
        };
        Ok(Some(Sealed { header, source, manifest: Arc::new(manifest) }))
    }

    /// What the image holds, as long as its file is as it was.
    pub fn identity(&self) -> Option<ImageId> {
        self.while_unchanged(|sealed| sealed.header.id)
    }

    /// What the manifest says of itself, as long as the file is as it was.
    pub fn header(&self) -> Option<Header> {
        self.while_unchanged(|sealed| sealed.header)
    }

    /// The manifest for clients, as long as the file of the image is as it was.
    pub fn manifest(&self) -> Option<SharedExport> {
        self.while_unchanged(|sealed| SharedExport::clone(&sealed.manifest))
    }

    fn while_unchanged<T>(&self, take: impl FnOnce(&Sealed) -> T) -> Option<T> {
        let sealed = self.sealed.read().unwrap_or_else(PoisonError::into_inner);
        let current = sealed.as_ref()?;
        let differences = match state_of(&self.file) {
            Ok(now) => differences(current.source, now),
            Err(_) => vec!["state, which cannot be asked"],
        };
        if differences.is_empty() {
            return Some(take(current));
        }
        let identity = current.header.id;
        drop(sealed);
        // Whoever takes it away is the one who tells.
        let mut sealed = self.sealed.write().unwrap_or_else(PoisonError::into_inner);
        if sealed.take_if(|sealed| sealed.header.id == identity).is_some() {
            let (path, other) = (self.path().display(), differences.join(", "));
            tracing::warn!(%path, %identity, other, "the image was changed while it is served: it has no identity any more");
        }
        None
    }
}

/// A manifest beside an image, whether it fits or not.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) header: Header,
    /// The file that it was made from, as it was then.
    pub(super) source: Source,
    /// It is never changed in place.
    file: File,
}

impl Written {
    /// The manifest of the image at `path`; `None` if there is none. Its digests are not looked at. Blocks.
    pub(super) fn open(path: &Path) -> std::result::Result<Option<Self>, Unfit> {
        let file = match File::open(&manifest_path(path), Access::ReadOnly) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut block = [0; BLOCK];
        read_exact_at(&file, &mut block, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Unfit::Damaged,
            _ => Unfit::Read(error),
        })?;
        let header = Header::decode(&block)?;
        let source = header.source.ok_or(Unfit::NoSource)?;
        Ok(Some(Self { header, source, file }))
    }

    /// Holds all digests against the identity in the header. Blocks.
    pub(super) fn check(&self) -> std::result::Result<(), Unfit> {
        let is_whole = self.file.size() == self.header.shape.manifest_length();
        if is_whole && hash_digests(&self.file, self.header)? == self.header.id { Ok(()) } else { Err(Unfit::Damaged) }
    }

    /// The digests of the chunks that `range` of the image is made of. Blocks.
    pub(super) fn digests(&self, range: ByteRange) -> io::Result<Vec<u8>> {
        let chunk_size = u64::from(self.header.shape.chunk_size);
        let (first, end) = (range.start() / chunk_size, range.end().div_ceil(chunk_size));
        let mut digests = vec![0; to_usize(digest_at(end) - digest_at(first))];
        read_exact_at(&self.file, &mut digests, digest_at(first))?;
        Ok(digests)
    }
}

/// Warns of a manifest that is not used.
pub(super) fn warn_of(path: &Path, unfit: &Unfit) {
    let advice = "make it anew with: headwater index";
    let path = path.display();
    match unfit {
        Unfit::Read(error) => tracing::warn!(%path, %unfit, %error, advice, "the manifest is not used"),
        unfit => tracing::warn!(%path, %unfit, advice, "the manifest is not used"),
    }
}

/// The state of an open file. A file system answers from memory.
pub(super) fn state_of(file: impl AsFd) -> io::Result<Source> {
    Ok(source_of(&rustix::fs::fstat(file)?))
}

/// The state of whatever has this path now.
pub(super) fn state_at(path: &Path) -> io::Result<Source> {
    Ok(source_of(&rustix::fs::stat(path)?))
}

fn source_of(status: &rustix::fs::Stat) -> Source {
    Source {
        length: u64::try_from(status.st_size).unwrap_or(0),
        modified_seconds: status.st_mtime,
        modified_nanoseconds: u32::try_from(status.st_mtime_nsec).unwrap_or(0),
        inode: status.st_ino,
    }
}

/// What of a file's state is not as it was.
pub(super) fn differences(was: Source, is: Source) -> Vec<&'static str> {
    let modified = |source: Source| (source.modified_seconds, source.modified_nanoseconds);
    let all = [
        ("size", was.length != is.length),
        ("time of modification", modified(was) != modified(is)),
        ("inode", was.inode != is.inode),
    ];
    all.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| what).collect()
}

/// Computes the identity from the digests behind the header of `file`.
pub(super) fn hash_digests(file: impl AsFd, header: Header) -> io::Result<ImageId> {
    let mut hasher = IdHasher::new(header.shape);
    let mut buffer = vec![0; to_usize(PIECE)];
    for piece in ByteRange::between(digest_at(0), header.shape.manifest_length()).pieces(PIECE) {
        let part = &mut buffer[..to_usize(piece.length())];
        read_exact_at(&file, part, piece.start())?;
        hasher.update(part);
    }
    Ok(hasher.finish())
}

/// Fills `buffer` from `offset` on. A file that ends before is an error. Blocks.
pub(super) fn read_exact_at(file: impl AsFd, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match rustix::io::pread(&file, &mut *buffer, offset) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before its size")),
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset += to_u64(count);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A manifest as clients see it: without its source, and with the digests where they lie in the file, which is never
/// changed in place.
struct ManifestFile {
    header: Bytes,
    digests: File,
    facts: Facts,
}

impl fmt::Debug for ManifestFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ManifestFile").field(&self.digests).finish()
    }
}

impl Export for ManifestFile {
    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        if range.start() < digest_at(0) {
            return TryRead::Wait;
        }
        match self.digests.try_read_at(output, to_usize(range.length()), range.start()) {
            Inline::Done => TryRead::Data,
            Inline::WouldBlock => TryRead::Wait,
        }
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move {
            let mut pieces = Vec::new();
            let header = range.intersect(ByteRange::between(0, digest_at(0)));
            let digests = range.intersect(ByteRange::between(digest_at(0), self.facts.size));
            if !header.is_empty() {
                let bytes = self.header.slice(to_usize(header.start())..to_usize(header.end()));
                push_piece(&mut pieces, Piece::Data(bytes));
            }
            if !digests.is_empty() {
                let length = to_usize(digests.length());
                let bytes = self.digests.read_exact_at(BytesMut::with_capacity(length), length, digests.start()).await;
                let bytes = bytes.map_err(|error| Error::from_io("cannot read the manifest", error))?;
                push_piece(&mut pieces, Piece::Data(bytes.freeze()));
            }
            Ok(pieces)
        })
    }
}
