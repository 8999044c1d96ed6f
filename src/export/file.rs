//! A file as a read-only export: for side exports, such as manifests.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{Export, Facts, LocalFuture, Piece, TryRead, push_piece};
use crate::disk::{File, Inline};
use crate::error::{Error, Result};
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// The bytes of a file that nobody changes, of which the first may be replaced.
#[derive(Debug)]
pub struct FileExport {
    file: Arc<File>,
    /// What stands in place of as many bytes of the file.
    head: Bytes,
    description: &'static str,
}

impl FileExport {
    /// The bytes of `file`, but for the first: those are `head`, which is not longer than the file.
    pub fn new(file: Arc<File>, head: Bytes, description: &'static str) -> Self {
        Self { file, head, description }
    }

    /// The part of `range` that the head has, and what of it the file has.
    fn split(&self, range: ByteRange) -> (Bytes, ByteRange) {
        let seam = to_u64(self.head.len());
        let head = to_usize(range.start().min(seam))..to_usize(range.end().min(seam));
        (self.head.slice(head), ByteRange::between(range.start().max(seam), range.end().max(seam)))
    }
}

impl Export for FileExport {
    fn facts(&self) -> Facts {
        Facts::read_only(self.file.size(), self.description)
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        if range.start() < to_u64(self.head.len()) {
            return TryRead::Wait;
        }
        match self.file.try_read_at(output, to_usize(range.length()), range.start()) {
            Inline::Done => TryRead::Data,
            Inline::WouldBlock => TryRead::Wait,
        }
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move {
            let (head, rest) = self.split(range);
            let mut pieces = Vec::new();
            push_piece(&mut pieces, Piece::Data(head));
            let length = to_usize(rest.length());
            let bytes = self.file.read_exact_at(BytesMut::with_capacity(length), length, rest.start()).await;
            let failed = |error| Error::from_io(format!("cannot read the {}", self.description), error);
            push_piece(&mut pieces, Piece::Data(bytes.map_err(failed)?.freeze()));
            Ok(pieces)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, Preference, attach};
    use crate::export::conformance;

    #[tokio::test(flavor = "local")]
    async fn a_file_with_another_head_conforms() {
        let _attached = attach(Preference::Auto).unwrap();
        let scratch = tempfile::NamedTempFile::new().unwrap();
        let mut contents = conformance::sample_contents(100_001, 5);
        std::fs::write(scratch.path(), &contents).unwrap();
        contents[..4096].fill(7);
        let file = Arc::new(File::open(scratch.path(), Access::ReadOnly).unwrap());
        let head = Bytes::copy_from_slice(&contents[..4096]);
        conformance::check(&FileExport::new(Arc::clone(&file), head, "test"), contents.clone()).await;
        contents[..4096].copy_from_slice(&std::fs::read(scratch.path()).unwrap()[..4096]);
        conformance::check(&FileExport::new(file, Bytes::new(), "test"), contents).await;
    }
}
