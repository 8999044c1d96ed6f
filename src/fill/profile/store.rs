//! The profiles of one image: in memory, and in one file.
//!
//! | stops here | what the next start finds |
//! | --- | --- |
//! | a run is merged in memory | the profiles before it |
//! | `.new` is being written | the same; what was being written is removed |
//! | `.new` is synced and renamed, the directory is not synced | the profiles before, or those with it |
//!
//! A file that is damaged, or of another image, counts as none, with a warning; the next saving replaces it. Where nothing
//! can be written, or the cache has no room, profiles are kept in memory, with one warning. A profile is a hint: losing
//! one costs a slow boot.
//!
//! Owns: who may change what, and runs on their way to the upstream. Does not own: the file itself (`file`), and when it
//! is saved: whoever changes something calls [`Store::save`], where it may block.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::file::{File, with_suffix};
use super::form::{Foreign, FormatError, LARGEST, Profiles, TooManyTags};
use super::inbox::{Inbox, Rate};
use super::recording::Run;
use super::{Merged, Profile, Tag};
use crate::export::memory::Memory;
use crate::export::{ImageId, SharedExport};
use crate::mirror::Space;
use crate::units::to_u64;

/// Runs that wait to be handed to the upstream, of mirrors below; then the oldest goes.
const MOST_OUTGOING: usize = 4;

/// Where the profiles of the real image at `path` lie: beside it, with `.profile` behind its name.
pub fn profile_path(path: &Path) -> PathBuf {
    with_suffix(path, ".profile")
}

/// The profiles of one image. For any thread.
#[derive(Debug)]
pub struct Store {
    /// Never held while something blocks.
    state: Mutex<State>,
    /// Held by whoever saves, while it blocks: of two savings the later one has the later profiles.
    saving: Mutex<Saving>,
    outgoing: Mutex<VecDeque<Profiles>>,
    /// Told when there is something outgoing.
    pub(super) has_outgoing: Notify,
    /// Whether somebody hands on what is outgoing.
    relays: AtomicBool,
    pub(super) rate: Mutex<Rate>,
    /// Messages that are being written at the moment, in all inboxes.
    pub(super) messages: AtomicUsize,
}

#[derive(Debug)]
struct State {
    profiles: Profiles,
    /// One more with each change.
    version: u64,
    /// What was encoded last, and of which version it is.
    exported: Option<(u64, Arc<Memory>)>,
}

#[derive(Debug)]
struct Saving {
    /// `None`: in memory alone.
    file: Option<File>,
    /// The version that is in the file.
    version: u64,
    has_warned: bool,
}

/// Why profiles of elsewhere are not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// They are not right.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// They are of something else.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// There are too many already.
    #[error(transparent)]
    TooManyTags(#[from] TooManyTags),
}

impl Store {
    /// The profiles in the file at `path`, of an image of `size` bytes; none if it is missing, damaged or of another
    /// image. Without a path they are kept in memory alone. Blocks.
    pub fn open(path: Option<PathBuf>, size: u64, identity: Option<ImageId>) -> Self {
        Self::with_file(path.map(|path| File::open(path, None)), size, identity)
    }

    /// As [`Self::open`], of a file in a cache, which counts in `space` until the store is dropped. Where that has no room
    /// for the file and its successor, profiles are kept in memory. Blocks.
    pub fn open_within(space: &Arc<Space>, path: PathBuf, size: u64, identity: Option<ImageId>) -> Self {
        Self::with_file(Some(File::open(path, Some(Arc::clone(space)))), size, identity)
    }

    fn with_file(file: Option<File>, size: u64, identity: Option<ImageId>) -> Self {
        let profiles = file.as_ref().and_then(|file| load(file, size, identity));
        let profiles = profiles.unwrap_or_else(|| Profiles::new(size, identity));
        Self {
            state: Mutex::new(State { profiles, version: 0, exported: None }),
            saving: Mutex::new(Saving { file, version: 0, has_warned: false }),
            outgoing: Mutex::default(),
            has_outgoing: Notify::new(),
            relays: AtomicBool::new(false),
            rate: Mutex::new(Rate::new()),
            messages: AtomicUsize::new(0),
        }
    }

    /// The profile of a workload.
    pub fn get(&self, tag: &Tag) -> Option<Arc<Profile>> {
        self.state().profiles.get(tag).cloned()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.state().profiles.is_empty()
    }

    /// All that is known now.
    pub fn profiles(&self) -> Profiles {
        self.state().profiles.clone()
    }

    /// Says what the image holds as far as is known now. What was learnt of it while nothing was known stays; what was
    /// learnt of another one is forgotten.
    pub fn identify(&self, identity: Option<ImageId>) {
        let mut state = self.state();
        let before = state.profiles.identity();
        if before == identity {
            return;
        }
        if !is_own(before, identity) {
            state.profiles.clear();
        }
        state.profiles.set_identity(identity);
        state.version += 1;
    }

    /// Learns from a run. In memory: save it.
    pub fn merge(&self, tag: &Tag, run: &Run) -> Result<Merged, TooManyTags> {
        let mut state = self.state();
        let merged = state.profiles.merge(tag, run)?;
        state.version += u64::from(merged == Merged::Learnt);
        Ok(merged)
    }

    /// Takes what the upstream knows of workloads that nothing, or that from fewer runs, is known of here. Says of how
    /// many. In memory: save it.
    pub fn adopt(&self, theirs: &Profiles) -> Result<usize, Foreign> {
        let mut state = self.state();
        theirs.check(state.profiles.image_size(), state.profiles.identity())?;
        let mut adopted = 0;
        for (tag, profile) in theirs.iter() {
            let runs_here = state.profiles.get(tag).map_or(0, |profile| profile.runs());
            // What there is no room for is a hint less.
            let is_taken = profile.runs() > runs_here && state.profiles.put(tag, profile).is_ok();
            adopted += usize::from(is_taken);
        }
        state.version += u64::from(adopted > 0);
        Ok(adopted)
    }

    /// Puts profiles in the place of those that workloads had, as an operator ordered; `force`: also if they are of an
    /// image of another identity, but not of another size. All of them or none. In memory: save it.
    pub fn import(&self, theirs: &Profiles, force: bool) -> Result<(), Refused> {
        let mut state = self.state();
        let identity = if force { theirs.identity() } else { state.profiles.identity() };
        theirs.check(state.profiles.image_size(), identity)?;
        let mut after = state.profiles.clone();
        for (tag, profile) in theirs.iter() {
            after.put(tag, profile)?;
        }
        state.profiles = after;
        state.version += 1;
        Ok(())
    }

    /// Forgets the profile of a workload, or all; says how many. In memory: save it.
    pub fn forget(&self, tag: Option<&Tag>) -> u64 {
        let mut state = self.state();
        let count = match tag {
            Some(tag) => usize::from(state.profiles.remove(tag)),
            None => state.profiles.clear(),
        };
        state.version += u64::from(count > 0);
        to_u64(count)
    }

    /// What is known now as a read-only export, which stays as it is; `None` if that is nothing.
    pub fn export(&self) -> Option<SharedExport> {
        let mut state = self.state();
        if state.profiles.is_empty() {
            return None;
        }
        let version = state.version;
        if let Some((_, export)) = state.exported.as_ref().filter(|(exported, _)| *exported == version) {
            return Some(Arc::<Memory>::clone(export));
        }
        let export = Memory::holding(state.profiles.encode()).read_only();
        let export = Arc::new(export.with_facts(|facts| facts.description = "profile".into()));
        state.exported = Some((version, Arc::clone(&export)));
        Some(export)
    }

    /// An export that takes runs from mirrors below; each connection has its own.
    pub fn inbox(self: &Arc<Self>) -> SharedExport {
        Arc::new(Inbox::new(Arc::clone(self)))
    }

    /// Takes what a mirror below has written: one run for each workload in it. In memory: save it.
    pub(super) fn take_message(&self, bytes: &[u8], now: Instant) -> Result<(), Rejected> {
        let profiles = Profiles::decode(bytes).map_err(Refused::from)?;
        {
            let state = self.state();
            profiles.check(state.profiles.image_size(), state.profiles.identity()).map_err(Refused::from)?;
        }
        if !self.rate.lock().unwrap_or_else(PoisonError::into_inner).admits(now) {
            return Err(Rejected::TooMany);
        }
        for (tag, profile) in profiles.iter() {
            self.merge(tag, &profile.to_run()).map_err(Refused::from)?;
        }
        self.relay(profiles);
        Ok(())
    }

    /// From now on, runs of mirrors below are kept for [`Self::take_outgoing`].
    pub(super) fn begin_to_relay(&self) {
        self.relays.store(true, Ordering::Relaxed);
    }

    fn relay(&self, profiles: Profiles) {
        if !self.relays.load(Ordering::Relaxed) {
            return;
        }
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        if outgoing.len() == MOST_OUTGOING {
            outgoing.pop_front();
        }
        outgoing.push_back(profiles);
        drop(outgoing);
        self.has_outgoing.notify_one();
    }

    /// The next run of a mirror below that the upstream has not got yet.
    pub(super) fn take_outgoing(&self) -> Option<Profiles> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Makes what is known durable, if anything has changed. Blocks.
    pub fn save(&self) {
        let mut saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let Saving { file: Some(file), version: saved, has_warned } = &mut *saving else { return };
        let (version, profiles) = {
            let state = self.state();
            (state.version, state.profiles.clone())
        };
        if version == *saved {
            return;
        }
        let written = file.replace(&profiles);
        let path = file.path().display();
        match written {
            Ok(()) => *saved = version,
            Err(error) if !std::mem::replace(has_warned, true) => {
                tracing::warn!(%path, %error, "cannot write the profile: it is kept in memory");
            }
            Err(error) => tracing::debug!(%path, %error, "cannot write the profile"),
        }
    }

    /// [`Self::save`] on a thread of its own. Cancel safety: it is carried out.
    pub async fn save_aside(self: &Arc<Self>) {
        let store = Arc::clone(self);
        if tokio::task::spawn_blocking(move || store.save()).await.is_err() {
            tracing::error!("cannot write a profile: the thread died");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a message is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejected {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("too many runs in a short time")]
    TooMany,
}

/// Whether what was learnt of an image is still of use: as far as is known it is the same.
fn is_own(before: Option<ImageId>, now: Option<ImageId>) -> bool {
    before.is_none() || now.is_none() || before == now
}

/// The profiles in a file of our own. Blocks.
fn load(file: &File, size: u64, identity: Option<ImageId>) -> Option<Profiles> {
    let told = file.path().display();
    let bytes = match file.read() {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %told, %error, "cannot read the profile: it begins anew");
            return None;
        }
    };
    match Profiles::decode(&bytes) {
        Ok(mut profiles) if profiles.image_size() == size && is_own(profiles.identity(), identity) => {
            profiles.set_identity(identity);
            Some(profiles)
        }
        Ok(_) => {
            tracing::warn!(path = %told, "the profile is of another image: it begins anew");
            None
        }
        Err(error) => {
            tracing::warn!(path = %told, %error, "the profile cannot be used: it begins anew");
            None
        }
    }
}

/// Bytes of an inbox.
pub(super) const INBOX: u64 = LARGEST;

impl From<Refused> for crate::error::Error {
    fn from(refused: Refused) -> Self {
        Self::new(crate::error::ErrorKind::Invalid, refused.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::super::form::tests::{SIZE, run, tag};
    use super::*;
    use crate::clock;
    use crate::mirror::SpaceSettings;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const ID: Option<ImageId> = Some(ImageId([7; 32]));

    #[test]
    fn what_is_saved_is_there_after_a_restart() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("image.profile");
        let open = |identity| Store::open(Some(path.clone()), SIZE, identity);
        let store = open(ID);
        assert!(store.is_empty() && store.export().is_none());
        store.save();
        assert!(!path.exists(), "there is nothing to be kept");
        assert_eq!(store.merge(&tag("boot"), &run(0, 100)), Ok(Merged::Learnt));
        store.save();
        assert_eq!(open(ID).profiles(), store.profiles());
        assert_eq!(open(None).profiles().iter().count(), 1, "the identity may not be known yet");
        assert!(open(Some(ImageId([8; 32]))).is_empty(), "another image");
        assert!(Store::open(Some(path.clone()), SIZE - 1, ID).is_empty());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, b"HEADPROF and then nothing that makes sense").unwrap();
        let store = open(ID);
        assert!(store.is_empty());
        store.merge(&tag("web"), &run(0, 100)).unwrap();
        store.save();
        assert!(open(ID).get(&tag("web")).is_some());
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
        assert_eq!((store.forget(Some(&tag("boot"))), store.forget(None)), (0, 1));
        store.save();
        assert!(!path.exists());
    }

    #[test]
    fn what_cannot_be_written_is_kept_in_memory() {
        for path in [None, Some("/proc/no/such/place.profile".into())] {
            let store = Store::open(path, SIZE, None);
            store.merge(&tag("boot"), &run(0, 100)).unwrap();
            store.save();
            store.save();
            assert!(store.get(&tag("boot")).is_some());
        }
    }

    #[test]
    fn what_has_no_room_is_kept_in_memory_until_it_has() {
        let scratch = tempfile::tempdir().unwrap();
        let space = Space::new(scratch.path(), SpaceSettings { limit: Some(6 * 4096), ..SpaceSettings::default() });
        let path = scratch.path().join("profile");
        let store = Store::open_within(&space, path.clone(), SIZE, ID);
        assert!(space.take(4 * 4096), "others have nearly all");
        store.merge(&tag("boot"), &run(0, 100)).unwrap();
        store.save();
        assert!(!path.exists() && store.get(&tag("boot")).is_some());
        space.give_back(4096);
        store.save();
        assert!(path.exists());
        assert_eq!(space.usage().used, 6 * 4096);
    }

    #[test]
    fn the_upstream_is_followed_where_it_knows_more() {
        let (here, upstream) = (Store::open(None, SIZE, ID), Store::open(None, SIZE, ID));
        here.merge(&tag("boot"), &run(0, 100)).unwrap();
        upstream.merge(&tag("boot"), &run(500, 100)).unwrap();
        upstream.merge(&tag("web"), &run(0, 100)).unwrap();
        assert_eq!(here.adopt(&upstream.profiles()), Ok(1), "as many runs are no reason");
        upstream.merge(&tag("boot"), &run(500, 100)).unwrap();
        assert_eq!(here.adopt(&upstream.profiles()), Ok(1));
        assert_eq!(here.profiles(), upstream.profiles());
        let foreign = Store::open(None, SIZE, None);
        assert!(foreign.adopt(&upstream.profiles()).is_err());
    }

    #[test]
    fn an_import_replaces_and_needs_force_for_another_image() {
        let (here, other) = (Store::open(None, SIZE, ID), Store::open(None, SIZE, None));
        here.merge(&tag("boot"), &run(0, 100)).unwrap();
        other.merge(&tag("boot"), &run(500, 100)).unwrap();
        assert!(matches!(here.import(&other.profiles(), false), Err(Refused::Foreign(Foreign::Identity { .. }))));
        here.import(&other.profiles(), true).unwrap();
        assert_eq!(here.get(&tag("boot")), other.get(&tag("boot")));
        assert_eq!(here.profiles().identity(), ID);
        let longer = Store::open(None, SIZE + 1, ID);
        assert!(matches!(longer.import(&other.profiles(), true), Err(Refused::Foreign(Foreign::Size { .. }))));
    }

    #[test]
    fn an_identity_that_becomes_known_changes_nothing_and_another_one_all() {
        let store = Store::open(None, SIZE, None);
        store.merge(&tag("boot"), &run(0, 100)).unwrap();
        store.identify(ID);
        assert!(!store.is_empty());
        store.identify(Some(ImageId([8; 32])));
        assert!(store.is_empty());
    }

    #[tokio::test]
    async fn the_export_is_that_of_its_time() {
        let store = Store::open(None, SIZE, ID);
        store.merge(&tag("boot"), &run(0, 100)).unwrap();
        let (first, again) = (store.export().unwrap(), store.export().unwrap());
        assert!(Arc::ptr_eq(&first, &again), "it is encoded once");
        store.merge(&tag("boot"), &run(0, 100)).unwrap();
        store.merge(&tag("web"), &run(0, 100)).unwrap();
        let later = store.export().unwrap();
        let decoded = |export: SharedExport| async move {
            let whole = crate::ranges::ByteRange::between(0, export.facts().size);
            Profiles::decode(&crate::export::assemble(&export.read(whole).await.unwrap())).unwrap()
        };
        assert_eq!(decoded(first).await.iter().count(), 1);
        assert_eq!(decoded(later).await, store.profiles());
    }

    #[test]
    fn runs_of_mirrors_below_are_learnt_and_handed_on() {
        let store = Store::open(None, SIZE, ID);
        let message = |start| Profiles::of_run(SIZE, ID, tag("boot"), &run(start, 100));
        store.take_message(&message(0).encode(), clock::now()).unwrap();
        assert!(store.take_outgoing().is_none(), "there is nobody above");
        store.begin_to_relay();
        for start in 0..=MOST_OUTGOING {
            store.take_message(&message(start as u64).encode(), clock::now()).unwrap();
        }
        let outgoing: Vec<_> = std::iter::from_fn(|| store.take_outgoing()).collect();
        assert_eq!(outgoing, (1..=MOST_OUTGOING).map(|start| message(start as u64)).collect::<Vec<_>>());
        assert_eq!(store.get(&tag("boot")).unwrap().runs(), 6);
        let foreign = Profiles::of_run(SIZE, None, tag("boot"), &run(0, 100));
        assert!(matches!(store.take_message(&foreign.encode(), clock::now()), Err(Rejected::Refused(_))));
    }
}
