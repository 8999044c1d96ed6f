//! The exports of one server, by name.
//!
//! Beside the names that were given there are others, which are understood and not listed:
//!
//! | name | means |
//! | --- | --- |
//! | `NAME@blake3-HEX` | NAME, if its identity is just that |
//! | `NAME@manifest` | the manifest of NAME, if it has one |
//! | `NAME@profile` | what clients read of NAME, if anything is known |
//! | `NAME@profile-inbox` | takes what clients of mirrors read of NAME, if NAME has a place for it |
//! | `NAME@blake3-HEX@manifest`, `...@profile`, `...@profile-inbox` | both at once |
//!
//! A name that was given is itself, whatever it looks like.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use thiserror::Error;

use super::{Export, ImageId, SharedExport};

/// How an export gives one that is beside it.
type Beside = fn(&dyn Export) -> Option<SharedExport>;

/// What is behind the name of an image to name what is beside it.
const SIDES: [(&str, Beside); 3] = [
    ("@manifest", |export| export.manifest()),
    ("@profile", |export| export.profile()),
    ("@profile-inbox", |export| export.profile_inbox()),
];

/// Splits `NAME@blake3-HEX` into the name and the identity that it asks for; any other name is given back whole.
pub fn split_content_name(name: &str) -> (&str, Option<ImageId>) {
    match name.rsplit_once('@').map(|(name, id)| (name, id.parse())) {
        Some((name, Ok(id))) => (name, Some(id)),
        _ => (name, None),
    }
}

/// The image that a full name is about: the name without what asks for something beside it, and without an identity.
pub fn image_name(name: &str) -> &str {
    let image = SIDES.iter().find_map(|(suffix, _)| name.strip_suffix(suffix));
    split_content_name(image.unwrap_or(name)).0
}

/// What a full name is beside, or a content of, one step in; `None`: of nothing, it is a name only.
pub(super) fn inner_name(name: &str) -> Option<&str> {
    let beside = SIDES.iter().find_map(|(suffix, _)| name.strip_suffix(suffix));
    beside.or_else(|| Some(split_content_name(name)).filter(|(_, id)| id.is_some()).map(|(name, _)| name))
}

/// Names and what they stand for. Read at each handshake, changed rarely.
#[derive(Debug, Default)]
pub struct Registry {
    exports: RwLock<BTreeMap<String, SharedExport>>,
}

/// Two exports with one name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("two exports are called {0:?}: give one of them another name, as in NAME=...")]
pub struct DuplicateName(pub String);

impl Registry {
    /// No exports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export.
    pub fn insert(&self, name: impl Into<String>, export: SharedExport) -> Result<(), DuplicateName> {
        let name = name.into();
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        if exports.contains_key(&name) {
            return Err(DuplicateName(name));
        }
        exports.insert(name, export);
        Ok(())
    }

    /// Puts another export in the place of the one with this name, for all who connect from now on.
    pub fn replace(&self, name: &str, export: SharedExport) {
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        exports.insert(name.to_owned(), export);
    }

    /// What `name` stands for (see the head of this file), with its full name. Without the part before the first `@` it
    /// stands for the only export, if there is just one.
    pub fn find(&self, name: &str) -> Option<(String, SharedExport)> {
        if let Some(found) = self.find_given(name) {
            return Some(found);
        }
        let side = SIDES.iter().find_map(|(suffix, beside)| Some((name.strip_suffix(suffix)?, *suffix, beside)));
        let rest = side.map_or(name, |(rest, ..)| rest);
        let (given, id) = split_content_name(rest);
        // With an identity asked for the name is not over at the suffix alone; without either it was looked up above.
        let (mut found, export) = match self.find_given(rest) {
            Some(found) if side.is_some() => found,
            _ => {
                let (found, export) = self.find_given(given)?;
                let id = id.filter(|id| export.facts().identity == Some(*id))?;
                (format!("{found}@{id}"), export)
            }
        };
        let Some((_, suffix, beside)) = side else { return Some((found, export)) };
        found.push_str(suffix);
        beside(&*export).map(|beside| (found, beside))
    }

    /// The export with this name, or the only one if the name is empty. What has the name of another and a content, as
    /// older generations of a mirror have, does not count.
    fn find_given(&self, name: &str) -> Option<(String, SharedExport)> {
        let exports = self.exports.read().unwrap_or_else(PoisonError::into_inner);
        let is_own =
            |name: &str| matches!(split_content_name(name), (base, id) if id.is_none() || !exports.contains_key(base));
        let found = match exports.get_key_value(name) {
            None if name.is_empty() => {
                let mut own = exports.iter().filter(|(name, _)| is_own(name));
                own.next().filter(|_| own.next().is_none())
            }
            found => found,
        };
        found.map(|(name, export)| (name.clone(), SharedExport::clone(export)))
    }

    /// All exports, sorted by name.
    pub fn all(&self) -> Vec<(String, SharedExport)> {
        let exports = self.exports.read().unwrap_or_else(PoisonError::into_inner);
        exports.iter().map(|(name, export)| (name.clone(), SharedExport::clone(export))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::export::memory::Memory;
    use crate::export::{Facts, LocalFuture, Piece};
    use crate::ranges::ByteRange;
    use std::sync::Arc;

    #[test]
    fn the_empty_name_is_the_only_export_as_long_as_there_is_one() {
        let registry = Registry::new();
        assert!(registry.find("").is_none());
        registry.insert("a", Arc::new(Memory::zeroed(1))).unwrap();
        assert_eq!(registry.find("").unwrap().0, "a");
        let older = format!("a@{}", ImageId([0xab; 32]));
        registry.insert(older, Arc::new(Memory::zeroed(1))).unwrap();
        assert_eq!(registry.find("").unwrap().0, "a", "what it was before is no second one");
        registry.insert("b", Arc::new(Memory::zeroed(2))).unwrap();
        assert!(registry.find("").is_none());
        registry.insert("", Arc::new(Memory::zeroed(3))).unwrap();
        assert_eq!(registry.find("").unwrap().1.facts().size, 3);
        assert_eq!(registry.all().len(), 4);
        let alone = Registry::new();
        let name = format!("b@{}", ImageId([0xab; 32]));
        alone.insert(&name, Arc::new(Memory::zeroed(1))).unwrap();
        assert_eq!(alone.find("").unwrap().0, name);
    }

    /// An image with an identity and a manifest of so many bytes.
    #[derive(Debug)]
    struct Known(ImageId, u64);

    impl Export for Known {
        fn facts(&self) -> Facts {
            Facts { identity: Some(self.0), ..Facts::read_only(10, "") }
        }

        fn read(&self, _: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
            unreachable!("nobody reads here")
        }

        fn manifest(&self) -> Option<SharedExport> {
            Some(Arc::new(Memory::zeroed(self.1)))
        }

        fn profile_inbox(&self) -> Option<SharedExport> {
            Some(Arc::new(Memory::zeroed(self.1 + 1)))
        }
    }

    #[test]
    fn contents_and_what_is_beside_have_names_that_are_not_listed() {
        let (id, other) = (ImageId([0xab; 32]), ImageId([0xcd; 32]));
        let registry = Registry::new();
        registry.insert("a", Arc::new(Known(id, 5000))).unwrap();
        let found = |name: &str| registry.find(name).map(|(name, export)| (name, export.facts().size));
        let by_id = format!("a@{id}");
        // With and without the name, of which there is one only.
        for name in ["a", ""] {
            assert_eq!(found(&format!("{name}@{id}")), Some((by_id.clone(), 10)));
            assert_eq!(found(&format!("{name}@manifest")), Some(("a@manifest".into(), 5000)));
            assert_eq!(found(&format!("{name}@{id}@manifest")), Some((format!("{by_id}@manifest"), 5000)));
            assert_eq!(found(&format!("{name}@profile-inbox")), Some(("a@profile-inbox".into(), 5001)));
            assert_eq!(found(&format!("{name}@{id}@profile-inbox")), Some((format!("{by_id}@profile-inbox"), 5001)));
            assert_eq!(found(&format!("{name}@profile")), None, "nothing is known");
            assert_eq!(found(&format!("{name}@manifest@profile-inbox")), None);
            assert_eq!(found(&format!("{name}@{other}")), None);
            assert_eq!(found(&format!("{name}@{other}@manifest")), None);
            assert_eq!(found(&format!("{name}@manifest@manifest")), None);
            assert_eq!(found(&format!("{name}@manifest@{id}")), None);
            assert_eq!(found(&format!("{name}@")), None);
        }
        registry.insert("plain", Arc::new(Memory::zeroed(7))).unwrap();
        assert_eq!(found("plain@manifest"), None, "it has none");
        assert_eq!(found(&format!("plain@{id}")), None);
        assert_eq!(found(&format!("@{id}")), None, "there are two");
        assert_eq!(registry.all().len(), 2);
        // Names that were given look as they like.
        registry.insert("a@manifest", Arc::new(Memory::zeroed(1))).unwrap();
        registry.insert("b@c", Arc::new(Known(other, 3))).unwrap();
        assert_eq!(found("a@manifest"), Some(("a@manifest".into(), 1)));
        assert_eq!(found(&format!("b@c@{other}")).unwrap().1, 10);
        assert_eq!(found("b@c@manifest").unwrap().1, 3);
    }

    #[test]
    fn content_names_are_split() {
        let id = ImageId([0xab; 32]);
        assert_eq!(split_content_name(&format!("a/b@c@{id}")), ("a/b@c", Some(id)));
        assert_eq!(split_content_name(&format!("@{id}")), ("", Some(id)));
        for name in ["", "a", "a@b", "a@manifest", "a@blake3-00", &id.to_string()] {
            assert_eq!(split_content_name(name), (name, None), "{name}");
        }
    }

    #[test]
    fn one_name_is_given_once() {
        let registry = Registry::new();
        registry.insert("a", Arc::new(Memory::zeroed(1))).unwrap();
        assert_eq!(registry.insert("a", Arc::new(Memory::zeroed(2))), Err(DuplicateName("a".into())));
        assert_eq!(registry.find("a").unwrap().1.facts().size, 1);
    }

    #[test]
    fn full_names_lead_to_their_image() {
        let id = ImageId([0xab; 32]);
        for name in ["a".into(), "a@manifest".into(), format!("a@{id}"), format!("a@{id}@profile-inbox")] {
            assert_eq!(image_name(&name), "a");
        }
        assert_eq!(image_name("a@b"), "a@b");
    }
}
