//! House rules that the compiler does not know. `docs/architecture.md` has their reasons.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The rooms and their levels. A room may import rooms of lower levels only.
const LEVELS: [(&str, u32); 23] = [
    ("units", 0),
    ("ranges", 0),
    ("clock", 0),
    ("error", 0),
    ("nbd", 1),
    ("disk", 1),
    ("manifest", 1),
    ("sealed", 1),
    ("telemetry", 1),
    ("tls", 1),
    ("net", 2),
    ("worker", 2),
    ("export", 2),
    ("cast", 2),
    ("image", 3),
    ("upstream", 3),
    ("mirror", 3),
    ("server", 3),
    ("agent", 4),
    ("fill", 4),
    ("multicast", 4),
    ("control", 5),
    ("cli", 6),
];

/// Level 0 is one floor without walls: `units`, `ranges` and `error` are words that belong together.
const LOWEST: u32 = 0;

/// Lines before the tests above which a file surely holds more than one thing.
const LONGEST_FILE: usize = 600;

struct Source {
    path: PathBuf,
    room: String,
    /// Without unit tests and comments.
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// All files of the library but its root and those that are tests as a whole.
fn sources() -> Vec<Source> {
    let folder = root().join("src");
    let files = rust_files(&folder).into_iter().filter(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        !["lib.rs", "main.rs", "tests.rs"].contains(&name)
    });
    files
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            let inside = path.strip_prefix(&folder).unwrap();
            let room = inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
            Source { room: room.to_owned(), code, path }
        })
        .collect()
}

/// The rooms that code names as `crate::room`, also within braces.
fn imports(code: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    for rest in code.split("crate::").skip(1) {
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut word = String::new();
            for character in list.chars() {
                match character {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if character.is_alphanumeric() || character == '_' {
                    word.push(character);
                } else {
                    rooms.extend((depth <= 1 && !word.is_empty()).then(|| word.clone()));
                    word.clear();
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            rooms.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    rooms
}

#[test]
fn rooms_import_lower_rooms_only() {
    let levels: BTreeMap<_, _> = LEVELS.into_iter().collect();
    let mut seen = 0;
    for source in sources() {
        let own = *levels.get(&*source.room).unwrap_or_else(|| panic!("{} has no level", source.room));
        for import in imports(&source.code).into_iter().filter(|import| *import != source.room) {
            let level = *levels.get(&*import).unwrap_or_else(|| panic!("{import} has no level"));
            let fine = level < own || (level == LOWEST && own == LOWEST);
            assert!(fine, "{} (level {own}) imports {import} (level {level})", source.path.display());
            seen += 1;
        }
    }
    assert!(seen > 100, "the rule was held against {seen} imports only: is it still looking?");
}

#[test]
fn every_room_has_a_level_and_every_level_a_room() {
    let mut rooms: Vec<_> = sources().into_iter().map(|source| source.room).collect();
    rooms.dedup();
    let mut known: Vec<_> = LEVELS.iter().map(|(room, _)| (*room).to_owned()).collect();
    known.sort();
    rooms.sort();
    rooms.dedup();
    assert_eq!(rooms, known);
}

#[test]
fn the_protocol_knows_no_io() {
    for source in sources().into_iter().filter(|source| source.room == "nbd") {
        for word in ["tokio", "std::fs", "std::net::Tcp", "std::io", "Instant", "async ", "std::time"] {
            assert!(!source.code.contains(word), "{} names {word}", source.path.display());
        }
    }
}

#[test]
fn unsafe_code_is_where_the_system_calls_are() {
    let allowed = |source: &Source| source.room == "disk" || source.path.ends_with("net/socket.rs");
    for source in sources().into_iter().filter(|source| !allowed(source)) {
        assert!(!source.code.contains("unsafe"), "{}", source.path.display());
    }
}

#[test]
fn untyped_errors_are_for_the_command_line_only() {
    for source in sources().into_iter().filter(|source| source.room != "cli") {
        assert!(!source.code.contains("anyhow"), "{}", source.path.display());
    }
}

#[test]
fn every_file_says_what_it_is_for_and_holds_one_thing() {
    for source in sources() {
        let text = fs::read_to_string(&source.path).unwrap();
        assert!(text.starts_with("//! "), "{} does not say what it is", source.path.display());
        let lines = text.split("#[cfg(test)]\nmod tests {").next().unwrap().lines().count();
        assert!(lines <= LONGEST_FILE, "{} has {lines} lines", source.path.display());
    }
}

#[test]
fn nothing_is_left_unfinished() {
    // In two parts, so that this file is not its own finding.
    let words = [("todo", "!("), ("unimplemented", "!("), ("dbg", "!("), ("#[ig", "nore]"), ("FIX", "ME")];
    for folder in ["src", "tests", "tools", "fuzz"] {
        for path in
            rust_files(&root().join(folder)).into_iter().filter(|path| !path.starts_with(root().join("fuzz/target")))
        {
            let text = fs::read_to_string(&path).unwrap();
            for (head, tail) in words {
                assert!(!text.contains(&format!("{head}{tail}")), "{} has {head}", path.display());
            }
        }
    }
}

#[test]
fn every_licence_is_one_that_we_may_ship() {
    const ALLOWED: [&str; 10] = [
        "MIT",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "Zlib",
        "Unicode-3.0",
        "CC0-1.0",
        "BSL-1.0",
        "Unlicense",
    ];
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50);
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none");
        // One of the alternatives must be allowed in all of its parts.
        let fine = licence.replace(" OR ", "/").split('/').any(|alternative| {
            let mut parts = alternative.trim_matches(['(', ')']).split(" AND ");
            parts.all(|part| ALLOWED.iter().any(|allowed| part.trim_matches(['(', ')']).starts_with(allowed)))
        });
        assert!(fine, "{} has licence {licence}", package["name"]);
    }
}
