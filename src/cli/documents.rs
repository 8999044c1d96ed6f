//! Documents that say what `--help` says, held against it.
//!
//! | document | must have |
//! | --- | --- |
//! | `docs/commands.md` | every command with every flag, as here: it is made from the same (`HEADWATER_WRITE_DOCS=1 cargo test documents`) |
//! | `docs/configuration.md` | every key, and whether SIGHUP changes it; an example that is sound |
//! | what operators read | no flag and no metric that there is not |
//!
//! `control::metrics::names` holds `docs/metrics.md` and the dashboard against the metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command, CommandFactory};

use super::args::Arguments;
use super::config;

/// What operators read.
const READ: [&str; 12] = [
    "README.md",
    "docs/api.md",
    "docs/balancing.md",
    "docs/commands.md",
    "docs/configuration.md",
    "docs/metrics.md",
    "docs/operations.md",
    "docs/protocol.md",
    "docs/runbook.md",
    "docs/security.md",
    "docs/sizing.md",
    "docs/status-page.md",
];

/// Flags of other programs that documents name.
const FOREIGN: [(&str, &[&str]); 12] = [
    ("apt", &["allow-downgrades"]),
    ("blockdev", &["setra"]),
    ("cargo", &["path", "release", "workspace"]),
    (
        "certtool",
        &[
            "bits",
            "generate-certificate",
            "generate-privkey",
            "generate-self-signed",
            "key-type",
            "load-ca-certificate",
            "load-ca-privkey",
            "load-privkey",
            "outfile",
            "template",
        ],
    ),
    ("curl", &["unix-socket"]),
    ("cp and lvcreate", &["preserve", "reflink", "snapshot"]),
    ("podman", &["file", "publish", "rm", "security-opt", "volume"]),
    ("qemu-img", &["image-opts", "object"]),
    ("systemctl", &["kill-whom", "now", "signal"]),
    ("lab", &["latency", "part", "rounds", "svg"]),
    ("nbdinfo", &["map"]),
    ("nbdkit and qemu-nbd", &["mask-handshake", "no-sr", "shared"]),
];

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn program() -> Command {
    let mut command = Arguments::command();
    command.build();
    command
}

/// All commands that are shown, with their whole names, in the order of the help.
fn commands() -> Vec<(String, Command)> {
    fn walk(name: String, command: &Command, all: &mut Vec<(String, Command)>) {
        for each in command.get_subcommands().filter(|each| !each.is_hide_set() && each.get_name() != "help") {
            walk(format!("{name} {}", each.get_name()), each, all);
        }
        all.push((name, command.clone()));
    }
    let mut all = Vec::new();
    walk("headwater".to_owned(), &program(), &mut all);
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

fn is_shown(arg: &&Arg) -> bool {
    !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version")
}

/// How an argument is typed.
fn typed(arg: &Arg) -> String {
    let takes = !matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::Count);
    let value = arg.get_value_names().filter(|_| takes).map(|names| names.join(" "));
    let value = value.unwrap_or_default();
    match (arg.get_short(), arg.get_long()) {
        (_, None) if arg.is_positional() => value,
        (Some(short), Some(long)) => format!("-{short}, --{long} {value}"),
        (_, Some(long)) => format!("--{long} {value}"),
        (short, None) => short.map_or_else(String::new, |short| format!("-{short} {value}")),
    }
}

fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or_else(|| arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut said = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let values = arg.get_possible_values();
    let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
    if !values.is_empty() && !is_flag {
        let names: Vec<_> = values.iter().map(|value| format!("`{}`", value.get_name())).collect();
        let _ = write!(said, " One of {}.", names.join(", "));
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if !defaults.is_empty() && !is_flag {
        let _ = write!(said, " Default: `{}`.", defaults.join(","));
    }
    said
}

/// `docs/commands.md`.
fn reference() -> String {
    let mut text = "# Commands\n\n\
        All commands and flags, as `--help` has them. This page is made from the program, and a test holds one against the\n\
        other. [Operations](operations.md) says what they are good for. Flags of `serve` and `mirror` are also the keys of the\n\
        [configuration](configuration.md).\n"
        .to_owned();
    for (name, command) in commands() {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = write!(text, "\n## {name}\n\n{about}.\n");
        let args: Vec<_> = command
            .get_arguments()
            .filter(is_shown)
            .filter(|arg| name == "headwater" || !arg.is_global_set())
            .collect();
        if !args.is_empty() {
            text.push_str("\n| argument | meaning |\n| --- | --- |\n");
        }
        for arg in args {
            let cell = |text: String| text.trim().replace('|', "\\|");
            let _ = writeln!(text, "| `{}` | {} |", cell(typed(arg)), cell(meaning(arg)));
        }
    }
    text
}

#[test]
fn the_reference_is_what_the_program_says() {
    let made = reference();
    if std::env::var_os("HEADWATER_WRITE_DOCS").is_some() {
        std::fs::write(path("docs/commands.md"), &made).unwrap();
    }
    let kept = text("docs/commands.md");
    let differs = made.lines().zip(kept.lines()).find(|(made, kept)| made != kept);
    assert_eq!(differs, None, "docs/commands.md is old: HEADWATER_WRITE_DOCS=1 cargo test documents");
    assert_eq!(made.lines().count(), kept.lines().count());
}

/// Words of a text that look like flags, without their dashes.
fn flags(text: &str) -> BTreeSet<String> {
    let is_part = |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-';
    let mut found = BTreeSet::new();
    for (place, _) in text.match_indices("--") {
        let before = text[..place].chars().next_back();
        let word: String = text[place + 2..].chars().take_while(|character| is_part(*character)).collect();
        let begins = before.is_none_or(|before| !before.is_alphanumeric() && before != '-' && before != '_');
        if begins && word.starts_with(|first: char| first.is_ascii_lowercase()) {
            found.insert(word.trim_end_matches('-').to_owned());
        }
    }
    found
}

#[test]
fn documents_name_no_flag_that_there_is_not() {
    let ours: BTreeSet<String> = commands()
        .iter()
        .flat_map(|(_, command)| {
            command.get_arguments().filter_map(Arg::get_long).map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    let mut unknown = BTreeMap::new();
    for name in READ {
        let is_foreign = |flag: &String| FOREIGN.iter().any(|(_, flags)| flags.contains(&flag.as_str()));
        let strange = |flag: &String| !ours.contains(flag) && !is_foreign(flag);
        let strange: Vec<_> = flags(&text(name)).into_iter().filter(strange).collect();
        if !strange.is_empty() {
            unknown.insert(name, strange);
        }
    }
    assert_eq!(unknown, BTreeMap::new());
    assert!(flags("`--map=x` a--b --- | --- | x_--y (--at)").into_iter().eq(["at".to_owned(), "map".to_owned()]));
}

#[test]
fn documents_name_no_metric_that_there_is_not() {
    let words = |text: &str| -> BTreeSet<String> {
        let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
        words
            .filter(|word| word.starts_with("headwater_") && !word.starts_with("headwater_0"))
            .map(str::to_owned)
            .collect()
    };
    let known = words(&text("docs/metrics.md"));
    assert!(known.len() > 50, "{known:?}");
    for name in READ {
        let strange: Vec<_> = words(&text(name)).difference(&known).cloned().collect();
        assert_eq!(strange, Vec::<String>::new(), "{name}");
    }
}

/// The rows `` | `key` | tables | SIGHUP | `` of `docs/configuration.md`.
fn documented_keys() -> BTreeMap<String, (String, bool)> {
    let document = text("docs/configuration.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let cells = rows.filter_map(|(key, rest)| {
        let mut cells = rest.split(" | ");
        let (tables, change) = (cells.next()?, cells.next()?);
        let is_live = match change {
            "at once" => true,
            "restart" => false,
            _ => return None,
        };
        Some((key.to_owned(), (tables.to_owned(), is_live)))
    });
    cells.collect()
}

#[test]
fn the_configuration_has_each_key_and_no_other() {
    let program = program();
    let mut keys = BTreeMap::<String, Vec<&str>>::new();
    let global = program.get_arguments().filter(|arg| arg.is_global_set()).filter_map(config::key);
    global.for_each(|key| keys.entry(key.to_owned()).or_default().push("top"));
    for name in ["serve", "mirror"] {
        let own = program.find_subcommand(name).unwrap().get_arguments().filter(|arg| !arg.is_global_set());
        own.filter_map(config::key).for_each(|key| keys.entry(key.to_owned()).or_default().push(name));
    }
    let wanted: BTreeMap<_, _> =
        keys.into_iter().map(|(key, tables)| (key.clone(), (tables.join(", "), config::is_live(&key)))).collect();
    assert_eq!(documented_keys(), wanted);
}

#[test]
fn the_example_is_sound() {
    let document = text("docs/configuration.md");
    let example = document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let added = config::read_example(example);
    assert_eq!(added, Ok(()), "{example}");
    // Every line that is commented out can be had by taking the mark away.
    for line in example.lines().filter(|line| line.starts_with("# ") && line.contains(" = ")) {
        let table = example[..example.find(line).unwrap()].rsplit("\n[").next().unwrap();
        let table = table.split(']').next().unwrap().split('.').next().unwrap();
        let head = if example.find(line) < example.find("\n[") { String::new() } else { format!("[{table}]\n") };
        let alone = format!("{head}{}\n", &line[2..]);
        assert_eq!(config::read_example(&alone), Ok(()), "{alone}");
    }
}
