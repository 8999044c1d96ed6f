//! A configuration file: which keys it has, on which lines, and what stands behind them.
//!
//! Owns: what may stand behind a key at all. Does not own: which keys there are (`arguments`).

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Bytes of the longest file.
const LONGEST: u64 = 1 << 20;

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) file: PathBuf,
    /// From 1; `None`: with all of it.
    pub(super) line: Option<usize>,
    pub(super) why: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        write!(f, " {}", self.why)
    }
}

/// What a file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ConfigFile {
    pub(super) path: PathBuf,
    /// What stands before the first table.
    pub(super) top: Vec<Entry>,
    pub(super) tables: Vec<ConfigTable>,
}

/// A table, as `[serve]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConfigTable {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) entries: Vec<Entry>,
}

/// A key and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: usize,
    pub(super) value: Value,
}

/// What may be behind a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// `true` or `false`.
    Flag(bool),
    /// A text or a number.
    One(String),
    /// A list of those.
    Many(Vec<String>),
    /// Texts, numbers, or lists of them, by names.
    Named(Vec<(String, Vec<String>)>),
}

impl ConfigFile {
    /// Reads a file.
    pub(super) fn read(path: &Path) -> Result<Self, Fault> {
        let whole = |why: String| Fault { file: path.to_owned(), line: None, why };
        let file = std::fs::File::open(path).map_err(|error| whole(format!("cannot be read: {error}")))?;
        let mut text = String::new();
        file.take(LONGEST + 1).read_to_string(&mut text).map_err(|error| whole(format!("cannot be read: {error}")))?;
        if crate::units::to_u64(text.len()) > LONGEST {
            return Err(whole(format!("is longer than {LONGEST} bytes")));
        }
        Self::parse(path, &text)
    }

    /// Reads a text.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, Fault> {
        let line_of = |offset: usize| 1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count();
        let fault = |line, why: String| Fault { file: path.to_owned(), line, why };
        let parsed = DeTable::parse(text)
            .map_err(|error| fault(error.span().map(|span| line_of(span.start)), error.message().to_owned()))?;
        let mut file = Self { path: path.to_owned(), ..Self::default() };
        for (key, value) in parsed.get_ref() {
            let line = line_of(key.span().start);
            match value.get_ref() {
                DeValue::Table(table) => {
                    let name = key.get_ref().to_string();
                    let entries = table.iter().map(|(key, value)| {
                        let entry = entry(key.get_ref(), line_of(key.span().start), value.get_ref());
                        entry.map_err(|(line, why)| fault(Some(line), format!("[{name}] {}: {why}", key.get_ref())))
                    });
                    let entries = entries.collect::<Result<_, _>>()?;
                    file.tables.push(ConfigTable { name, line, entries });
                }
                value => {
                    let entry = entry(key.get_ref(), line, value);
                    let entry = entry.map_err(|(line, why)| fault(Some(line), format!("{}: {why}", key.get_ref())))?;
                    file.top.push(entry);
                }
            }
        }
        Ok(file)
    }

    /// The table of this name.
    pub(super) fn table(&self, name: &str) -> Option<&ConfigTable> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// What is wrong at a line of it.
    pub(super) fn fault(&self, line: usize, why: impl Into<String>) -> Fault {
        Fault { file: self.path.clone(), line: Some(line), why: why.into() }
    }
}

fn entry(key: &str, line: usize, value: &DeValue<'_>) -> Result<Entry, (usize, String)> {
    let wrong = |why: &str| (line, why.to_owned());
    let texts = |values: &mut dyn Iterator<Item = &Spanned<DeValue<'_>>>| {
        values.map(|value| text(value.get_ref())).collect::<Option<Vec<_>>>()
    };
    let value = match value {
        DeValue::Boolean(flag) => Value::Flag(*flag),
        DeValue::Array(array) => {
            Value::Many(texts(&mut array.iter()).ok_or_else(|| wrong("a list has texts and numbers in it"))?)
        }
        DeValue::Table(table) => {
            let named = table.iter().map(|(name, value)| {
                let values = match value.get_ref() {
                    DeValue::Array(array) => texts(&mut array.iter()),
                    value => text(value).map(|text| vec![text]),
                };
                let name = name.get_ref().to_string();
                let values = values.ok_or_else(|| wrong(&format!("{name}: a text or a list of texts is wanted")))?;
                Ok((name, values))
            });
            Value::Named(named.collect::<Result<_, _>>()?)
        }
        value => Value::One(text(value).ok_or_else(|| wrong("a text in quotes is wanted"))?),
    };
    Ok(Entry { key: key.to_owned(), line, value })
}

/// A text, or a number as it was written.
fn text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(Path::new("c.toml"), text).map_err(|fault| fault.to_string())
    }

    #[test]
    fn keys_have_lines_and_values() {
        let file = parse(
            "log-level = 'warn'\n\n[serve]\nread-only = true\nlisten = [\n  'a', 'b']\nworkers = 4\n[serve.allow]\nx = '::1'\n",
        )
        .unwrap();
        assert_eq!(file.top, [Entry { key: "log-level".into(), line: 1, value: Value::One("warn".into()) }]);
        let serve = file.table("serve").unwrap();
        let entry = |key: &str| serve.entries.iter().find(|entry| entry.key == key).unwrap();
        assert_eq!((entry("read-only").line, &entry("read-only").value), (4, &Value::Flag(true)));
        assert_eq!((entry("listen").line, &entry("listen").value), (5, &Value::Many(vec!["a".into(), "b".into()])));
        assert_eq!(entry("workers").value, Value::One("4".into()));
        assert_eq!(entry("allow").value, Value::Named(vec![("x".into(), vec!["::1".into()])]));
        assert!(file.table("mirror").is_none());
    }

    #[test]
    fn what_cannot_be_is_told_with_its_line() {
        for (text, why) in [
            ("a = 1\nb = \n", "c.toml:2: "),
            ("[serve]\n\nlisten = [['a']]", "c.toml:3: [serve] listen: a list"),
            ("x = 2020-01-01", "c.toml:1: x: a text in quotes"),
            ("[serve]\nallow = { a = { b = 1 } }", "c.toml:2: [serve] allow: a: a text"),
            ("a = 1\na = 2", "c.toml:2: "),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(why), "{error}");
        }
    }
}
