//! The file of one image's profiles, and what it takes of the disk.
//!
//! In a cache directory it counts in the space that all caches share, as long as it is now and as its successor will be:
//! while it is replaced, both are there. Space is taken before anything is written; where there is none nothing is.
//!
//! Owns: the file, the one that is being made, their charge. Does not own: what stands in them (`form`), and what is done
//! when it cannot be written (`store`).

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::form::{LARGEST, Profiles};
use crate::mirror::Space;
use crate::units::to_u64;

/// What files are allocated in.
const BLOCK: u64 = 4096;

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A file that is replaced as a whole. Its charge is given back when this is dropped.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    /// `None`: it lies beside an image, where nothing is counted.
    space: Option<Arc<Space>>,
    charge: u64,
}

impl File {
    /// The file at `path`, which counts in `space`. There, what exists already counts from now on, whatever the limit, and
    /// one that was being made when a process ended is removed: no other process uses a cache. Blocks.
    pub(super) fn open(path: PathBuf, space: Option<Arc<Space>>) -> Self {
        let mut charge = 0;
        if let Some(space) = &space {
            // Where it cannot be removed nothing can be written either.
            let _ = fs::remove_file(with_suffix(&path, ".new"));
            charge = cost(fs::metadata(&path).map_or(0, |metadata| metadata.len()));
            space.take_anyway(charge);
        }
        Self { path, space, charge }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// At most one byte more than profiles can have. Blocks.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(fs::File::open(&self.path)?, LARGEST + 1), &mut bytes)?;
        Ok(bytes)
    }

    /// Puts `profiles` there, durably; removes the file if there are none. On an error the old one is there still. Blocks.
    pub(super) fn replace(&mut self, profiles: &Profiles) -> io::Result<()> {
        if profiles.is_empty() {
            self.remove()?;
            self.give_back_all_but(0);
            return Ok(());
        }
        let bytes = profiles.encode();
        let after = cost(to_u64(bytes.len()));
        if after > self.charge {
            let lacking = after - self.charge;
            if self.space.as_ref().is_some_and(|space| !space.take(lacking)) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "--cache-size has no room for it"));
            }
            self.charge = after;
        }
        self.write(&bytes)?;
        self.give_back_all_but(after);
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let new_path = with_suffix(&self.path, ".new");
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new_path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        crate::telemetry::crash_point("profile written");
        fs::rename(&new_path, &self.path)?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        fs::File::open(directory.unwrap_or_else(|| Path::new(".")))?.sync_all()
    }

    fn give_back_all_but(&mut self, kept: u64) {
        let free = self.charge.saturating_sub(kept);
        self.charge -= free;
        self.space.iter().for_each(|space| space.give_back(free));
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.give_back_all_but(0);
    }
}

/// Bytes of the disk that a file of this length takes while it is replaced.
fn cost(length: u64) -> u64 {
    2 * length.next_multiple_of(BLOCK)
}

#[cfg(test)]
mod tests {
    use super::super::form::tests::{SIZE, tag};
    use super::super::recording::Run;
    use super::super::spans::tests::of_naive;
    use super::*;
    use crate::mirror::SpaceSettings;
    use std::os::unix::fs::MetadataExt;

    fn space(root: &Path, limit: Option<u64>) -> Arc<Space> {
        Space::new(root, SpaceSettings { limit, ..SpaceSettings::default() })
    }

    /// What was learnt from one run that touched so many pages, none of them neighbours.
    fn profiles(pages: u64) -> Profiles {
        let run = Run::of(of_naive(&(0..pages).map(|page| (page * 10, 3)).collect()));
        Profiles::of_run(SIZE, None, tag("boot"), &run)
    }

    fn on_disk(directory: &Path) -> u64 {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
    }

    #[test]
    fn old_and_new_count_before_anything_is_written() {
        let scratch = tempfile::tempdir().unwrap();
        let space = space(scratch.path(), None);
        let used = || space.usage().used - 4096;
        let mut file = File::open(scratch.path().join("profile"), Some(Arc::clone(&space)));
        assert_eq!(used(), 0);
        for (pages, blocks) in [(100, 1), (10_000, 10), (2000, 2), (0, 0), (1, 1)] {
            let profiles = if pages == 0 { Profiles::new(SIZE, None) } else { profiles(pages) };
            file.replace(&profiles).unwrap();
            let length = fs::metadata(file.path()).map_or(0, |metadata| metadata.len());
            assert_eq!(length.div_ceil(4096), blocks);
            assert_eq!(used(), 2 * blocks * 4096);
            assert!(on_disk(scratch.path()) <= used());
        }
        drop(file);
        assert_eq!(used(), 0, "nothing is charged for what is closed");
    }

    #[test]
    fn what_is_there_counts_and_what_was_being_made_goes() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("profile");
        fs::write(&path, vec![1; 10_000]).unwrap();
        fs::write(scratch.path().join("profile.new"), vec![1; 10_000]).unwrap();
        let space = space(scratch.path(), Some(4096 * 3));
        let file = File::open(path, Some(Arc::clone(&space)));
        assert_eq!(space.usage().used, 4096 + 2 * 12_288, "also beyond the limit");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
        assert_eq!(file.read().unwrap().len(), 10_000);
    }

    #[test]
    fn without_room_nothing_is_written_and_nothing_charged() {
        let scratch = tempfile::tempdir().unwrap();
        let space = space(scratch.path(), Some(4096 * 2));
        let mut file = File::open(scratch.path().join("profile"), Some(Arc::clone(&space)));
        let error = file.replace(&profiles(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!((space.usage().used, fs::read_dir(scratch.path()).unwrap().count()), (4096, 0));
    }
}
