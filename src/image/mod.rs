//! Real images: every byte is on this server.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | opening a path as whatever it is |
//! | [`raw`] | raw files and block devices, read-write or read-only |
//! | `layout` | what is remembered of where a sparse file has its data |
//! | `qcow2` | qcow2 files as their contents, read-only (feature `qcow2`) |
//! | `seal` | whether the manifest beside an image fits it, and serving that manifest |
//! | [`index`] | making manifests |
//!
//! Owns: the bytes of real images and what makes them durable. Does not own: names (`export::Registry`), clients.

pub mod index;
mod layout;
#[cfg(feature = "qcow2")]
mod qcow2;
pub mod raw;
mod seal;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::disk::{Access, File};
use crate::export::SharedExport;
use crate::units::MIB;
pub use seal::{CannotSeal, Seal, Unfit, manifest_path};

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// qcow2 if it begins like one, else raw.
    #[default]
    Auto,
    /// The bytes of the image, one by one.
    Raw,
    /// qcow2.
    Qcow2,
}

/// How an image is to be opened.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Whether nobody may write to it.
    pub read_only: bool,
    /// What the file holds.
    pub format: Format,
    /// Directories that the backing files of a qcow2 file may lie in. Without one, backing files are refused: the
    /// name of the backing file is content of the image, and a guest that can write to it could name any file.
    pub backing_directories: Vec<PathBuf>,
}

/// Why an image cannot be served.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system refused to open it.
    #[error("cannot open {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It can be read but not written.
    #[error("cannot write to {}: serve it with --read-only, or change its permissions", path.display())]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A qcow2 file with a feature that cannot be served.
    #[error("cannot serve {} as qcow2: convert it (qemu-img convert -O raw), or serve it with qemu-nbd and mirror that", path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What is missing.
        source: io::Error,
    },
    /// This program was built without qcow2.
    #[error("{} is a qcow2 file, and this program was built without qcow2", .0.display())]
    Qcow2NotBuilt(PathBuf),
}

/// A line that describes the image at `path` to clients, whom the directories of this host do not concern.
fn description(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).display().to_string()
}

const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";

/// An image that was opened.
#[derive(Debug)]
pub struct Image {
    /// What is served.
    pub export: SharedExport,
    /// What gives it its identity; or why it cannot have one.
    pub seal: Result<Arc<Seal>, CannotSeal>,
    /// Whether the file is the image, byte by byte.
    is_raw: bool,
}

/// Decoded clusters of a qcow2 file kept in memory, in bytes. The page cache holds the file itself.
const DECODED_BYTES: u64 = 64 * MIB;
/// The same for whoever reads an image once, from its start to its end.
const FEW_DECODED_BYTES: u64 = 8 * MIB;

/// Opens the image at `path`. Blocks.
pub fn open(path: &Path, options: &Options) -> Result<SharedExport, OpenError> {
    open_image(path, options).map(|image| image.export)
}

/// Opens the image at `path`, with its manifest if it is read-only and has one that fits. Blocks.
pub fn open_image(path: &Path, options: &Options) -> Result<Image, OpenError> {
    let image = open_unsealed(path, options, DECODED_BYTES)?;
    match &image.seal {
        Ok(seal) => seal.load_and_tell(),
        Err(reason) if manifest_path(path).exists() => {
            tracing::info!(path = %path.display(), %reason, "the manifest of the image is not used");
        }
        Err(_) => {}
    }
    Ok(image)
}

fn open_unsealed(path: &Path, options: &Options, decoded_bytes: u64) -> Result<Image, OpenError> {
    let is_qcow2 = match options.format {
        Format::Raw => false,
        Format::Qcow2 => true,
        Format::Auto => begins_like_qcow2(path).map_err(|source| OpenError::Open { path: path.to_owned(), source })?,
    };
    if is_qcow2 {
        return open_qcow2(path, options, decoded_bytes);
    }
    let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let file = File::open(path, access).map_err(|source| {
        let path = path.to_owned();
        let refused = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
        if refused && !options.read_only && File::open(&path, Access::ReadOnly).is_ok() {
            OpenError::NotWritable { path, source }
        } else {
            OpenError::Open { path, source }
        }
    })?;
    let image = raw::RawImage::new(file, access);
    let seal = image.seal();
    Ok(Image { export: Arc::new(image), seal, is_raw: true })
}

fn begins_like_qcow2(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    // Opened as an image first: a FIFO or a directory is refused there, and does not keep us waiting.
    File::open(path, Access::ReadOnly)?;
    let mut magic = [0; 4];
    match std::fs::File::open(path)?.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(&magic == QCOW2_MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the header of the qcow2 file at `path` names a backing file, at whose name it has an offset.
fn has_backing_file(path: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut header = [0; 16];
    std::fs::File::open(path).and_then(|file| file.read_exact_at(&mut header, 0)).is_ok() && header[8..] != [0; 8]
}

#[cfg(feature = "qcow2")]
fn open_qcow2(path: &Path, options: &Options, decoded_bytes: u64) -> Result<Image, OpenError> {
    let image = qcow2::Qcow2Image::open(path, &options.backing_directories, decoded_bytes)
        .map_err(|source| OpenError::Qcow2 { path: path.to_owned(), source })?;
    let seal = image.seal();
    Ok(Image { export: Arc::new(image), seal, is_raw: false })
}

#[cfg(not(feature = "qcow2"))]
fn open_qcow2(path: &Path, _: &Options, _: u64) -> Result<Image, OpenError> {
    Err(OpenError::Qcow2NotBuilt(path.to_owned()))
}

#[cfg(test)]
mod tests;
