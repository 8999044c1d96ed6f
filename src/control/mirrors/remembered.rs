//! The servers that a mirror was told to use, over a restart.
//!
//! The file `upstream` of a cache is one line of JSON and one with its CRC-32C. It is replaced as a whole, so what a
//! crash leaves is what was remembered before or what is remembered after. It holds for the servers that the operator
//! had named then: when others are named it is forgotten.
//!
//! Owns: the file, the one that is being made, what they take of the cache's space. Does not own: when servers change
//! (`notice`).

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::mirror::Space;
use crate::nbd::Uri;
use crate::sealed::{seal, unseal};
use crate::units::to_u64;

const NAME: &str = "upstream";
const NEW_NAME: &str = "upstream.new";
const DAMAGED_NAME: &str = "upstream.damaged";
/// The longest file: room for some thousand servers with long names.
const MOST_BYTES: u64 = 256 << 10;
/// What files are allocated in.
const BLOCK: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    version: u32,
    /// What the operator had named.
    configured: Vec<String>,
    /// What is used, in the order in which it is tried.
    servers: Vec<String>,
}

/// What is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Memory {
    configured: Vec<Uri>,
    servers: Vec<Uri>,
}

fn encode(memory: &Memory) -> Vec<u8> {
    let texts = |uris: &[Uri]| uris.iter().map(Uri::to_string).collect();
    let form = Form { version: 1, configured: texts(&memory.configured), servers: texts(&memory.servers) };
    seal(serde_json::to_string(&form).expect("texts can be written"))
}

fn decode(bytes: &[u8]) -> Option<Memory> {
    let json = Some(bytes).filter(|bytes| to_u64(bytes.len()) <= MOST_BYTES).and_then(unseal)?;
    let form: Form = serde_json::from_str(json).ok().filter(|form: &Form| form.version == 1)?;
    let uris = |texts: Vec<String>| texts.into_iter().map(|text| text.parse().ok()).collect::<Option<Vec<Uri>>>();
    let memory = Memory { configured: uris(form.configured)?, servers: uris(form.servers)? };
    Some(memory).filter(|memory| !memory.servers.is_empty())
}

/// At most one byte more than there may be.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The servers that the mirror in `directory` used last, if it was told to use others than `configured`. Blocks.
pub(super) fn servers(directory: &Path, configured: &[Uri]) -> Option<Vec<Uri>> {
    let memory = read(&directory.join(NAME)).ok().and_then(|bytes| decode(&bytes))?;
    (memory.configured == configured).then_some(memory.servers)
}

/// The file of one mirror. Its charge is given back when this is dropped.
#[derive(Debug)]
pub(super) struct Remembered {
    directory: PathBuf,
    space: Arc<Space>,
    configured: Vec<Uri>,
    /// What the file holds.
    servers: Option<Vec<Uri>>,
    charge: u64,
    /// What is put aside, which nobody changes.
    aside: u64,
}

impl Remembered {
    /// The file in `directory`, which counts in `space` from now on, whatever the limit. One that is damaged is put
    /// aside; one that was written when other servers were configured is removed. Blocks.
    pub(super) fn open(directory: &Path, space: &Arc<Space>, configured: Vec<Uri>) -> Self {
        let path = |name: &str| directory.join(name);
        // Where it cannot be removed nothing can be written either.
        let _ = fs::remove_file(path(NEW_NAME));
        let found = read(&path(NAME)).map(|bytes| decode(&bytes));
        let shown = path(NAME);
        let servers = match found {
            Ok(Some(memory)) if memory.configured == configured => Some(memory.servers),
            Ok(Some(_)) => {
                tracing::info!(path = %shown.display(), "other servers are configured now: forgetting those that were told");
                let _ = fs::remove_file(&shown);
                None
            }
            Ok(None) => {
                let aside = path(DAMAGED_NAME);
                let kept =
                    fs::rename(&shown, &aside).map_or_else(|error| error.to_string(), |()| aside.display().to_string());
                tracing::warn!(kept, "what was remembered of the upstream is damaged: using what is configured");
                None
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %shown.display(), %error, "cannot read what was remembered of the upstream");
                None
            }
        };
        let length = |name: &str| fs::metadata(path(name)).map_or(0, |metadata| metadata.len());
        let (charge, aside) = (cost(length(NAME)), length(DAMAGED_NAME).next_multiple_of(BLOCK));
        space.take_anyway(charge + aside);
        Self { directory: directory.to_owned(), space: Arc::clone(space), configured, servers, charge, aside }
    }

    /// What the operator has named.
    pub(super) fn configured(&self) -> &[Uri] {
        &self.configured
    }

    /// Remembers that these servers are used; if they are those that are configured there is nothing to be remembered.
    /// When this has returned without an error it is durable. Blocks.
    pub(super) fn keep(&mut self, servers: &[Uri]) -> io::Result<()> {
        let wanted = Some(servers.to_vec()).filter(|servers| *servers != self.configured);
        if wanted == self.servers {
            return Ok(());
        }
        match &wanted {
            Some(servers) => self.replace(servers)?,
            None => self.remove()?,
        }
        self.servers = wanted;
        Ok(())
    }

    fn replace(&mut self, servers: &[Uri]) -> io::Result<()> {
        let bytes = encode(&Memory { configured: self.configured.clone(), servers: servers.to_vec() });
        if to_u64(bytes.len()) > MOST_BYTES {
            return Err(io::Error::other("too many servers"));
        }
        let after = cost(to_u64(bytes.len()));
        if after > self.charge {
            if !self.space.take(after - self.charge) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "--cache-size has no room for it"));
            }
            self.charge = after;
        }
        let new_path = self.directory.join(NEW_NAME);
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new_path)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        crate::telemetry::crash_point("upstream written");
        fs::rename(&new_path, self.directory.join(NAME))?;
        self.sync_directory()?;
        self.give_back_all_but(after);
        Ok(())
    }

    fn remove(&mut self) -> io::Result<()> {
        match fs::remove_file(self.directory.join(NAME)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => self.sync_directory()?,
        }
        self.give_back_all_but(0);
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        fs::File::open(&self.directory)?.sync_all()
    }

    fn give_back_all_but(&mut self, kept: u64) {
        let free = self.charge.saturating_sub(kept);
        self.charge -= free;
        self.space.give_back(free);
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        self.give_back_all_but(0);
        self.space.give_back(self.aside);
    }
}

/// Bytes of the disk that a file of this length takes while it is replaced.
const fn cost(length: u64) -> u64 {
    2 * length.next_multiple_of(BLOCK)
}

/// Takes arbitrary bytes as a file of this kind: as they are, and as the JSON of one whose checksum is right.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let sealed = seal(data);
    for bytes in [data, &sealed] {
        if let Some(memory) = decode(bytes) {
            let again = encode(&memory);
            // What is written may be longer than what was read: some characters need not be encoded.
            assert!(to_u64(again.len()) > MOST_BYTES || decode(&again) == Some(memory), "it reads back as another");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::SpaceSettings;
    use std::os::unix::fs::MetadataExt;

    fn uris(texts: &[&str]) -> Vec<Uri> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn space(root: &Path, limit: Option<u64>) -> Arc<Space> {
        Space::new(root, SpaceSettings { limit, ..SpaceSettings::default() })
    }

    #[test]
    fn what_was_told_is_there_after_a_restart_while_the_same_is_configured() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, space) = (scratch.path(), space(scratch.path(), None));
        let (configured, told) = (uris(&["nbd://a/x"]), uris(&["nbd://b/y%2Cz", "nbd://a/x"]));
        let used = || space.usage().used - 4096;
        let open = |configured: &[Uri]| Remembered::open(path, &space, configured.to_vec());
        let mut remembered = open(&configured);
        assert_eq!((servers(path, &configured), used()), (None, 0));
        remembered.keep(&told).unwrap();
        assert_eq!((servers(path, &configured), used()), (Some(told.clone()), 8192));
        let on_disk: u64 =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum();
        assert!(on_disk <= used());
        drop(remembered);
        fs::write(path.join(NEW_NAME), "half").unwrap();
        let mut remembered = open(&configured);
        assert_eq!(
            (remembered.servers.clone(), used(), path.join(NEW_NAME).exists()),
            (Some(told.clone()), 8192, false)
        );

        remembered.keep(&configured).unwrap();
        assert_eq!((servers(path, &configured), used(), path.join(NAME).exists()), (None, 0, false));
        remembered.keep(&told).unwrap();
        drop(remembered);
        let others = uris(&["nbd://c/x"]);
        assert_eq!(servers(path, &others), None);
        drop(open(&others));
        assert_eq!((servers(path, &configured), used(), path.join(NAME).exists()), (None, 0, false));
    }

    #[test]
    fn what_is_damaged_is_put_aside_and_counts() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, space) = (scratch.path(), space(scratch.path(), Some(8192)));
        let (configured, told) = (uris(&["nbd://a/x"]), uris(&["nbd://b/x"]));
        let file = encode(&Memory { configured: configured.clone(), servers: told.clone() });
        for bit in 0..8 * file.len() {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged), None, "bit {bit}");
        }
        fs::write(path.join(NAME), &file[1..]).unwrap();
        let mut remembered = Remembered::open(path, &space, configured.clone());
        assert!(path.join(DAMAGED_NAME).exists() && !path.join(NAME).exists());
        assert_eq!((servers(path, &configured), space.usage().used), (None, 8192));
        let error = remembered.keep(&told).unwrap_err();
        assert_eq!((error.kind(), path.join(NAME).exists()), (io::ErrorKind::StorageFull, false));
        drop(remembered);
        assert_eq!(space.usage().used, 4096);
    }

    #[test]
    fn no_file_breaks_the_decoder() {
        fuzz(br#"{"version":1,"configured":["nbd://a/"],"servers":["NBD://b:10809/x"]}"#);
        for json in [
            r#"{"version":2,"configured":[],"servers":["nbd://a/"]}"#,
            r#"{"version":1,"configured":[],"servers":[]}"#,
            r#"{"version":1,"configured":[],"servers":["http://a/"]}"#,
            r#"{"version":1,"configured":[],"servers":["nbd://a/"],"more":1}"#,
        ] {
            let sealed = seal(json);
            assert_eq!(decode(&sealed), None, "{json}");
        }
    }
}
