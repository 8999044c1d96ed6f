//! The exports of one server, by name.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use thiserror::Error;

use super::SharedExport;

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

    /// The export called `name`, with its name. The empty name stands for the only export, if there is just one.
    pub fn find(&self, name: &str) -> Option<(String, SharedExport)> {
        let exports = self.exports.read().unwrap_or_else(PoisonError::into_inner);
        let found = match exports.get_key_value(name) {
            None if name.is_empty() && exports.len() == 1 => exports.first_key_value(),
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
    use crate::export::memory::Memory;
    use std::sync::Arc;

    #[test]
    fn the_empty_name_is_the_only_export_as_long_as_there_is_one() {
        let registry = Registry::new();
        assert!(registry.find("").is_none());
        registry.insert("a", Arc::new(Memory::zeroed(1))).unwrap();
        assert_eq!(registry.find("").unwrap().0, "a");
        registry.insert("b", Arc::new(Memory::zeroed(2))).unwrap();
        assert!(registry.find("").is_none());
        registry.insert("", Arc::new(Memory::zeroed(3))).unwrap();
        assert_eq!(registry.find("").unwrap().1.facts().size, 3);
        assert_eq!(registry.all().len(), 3);
    }

    #[test]
    fn one_name_is_given_once() {
        let registry = Registry::new();
        registry.insert("a", Arc::new(Memory::zeroed(1))).unwrap();
        assert_eq!(registry.insert("a", Arc::new(Memory::zeroed(2))), Err(DuplicateName("a".into())));
        assert_eq!(registry.find("a").unwrap().1.facts().size, 1);
    }
}
