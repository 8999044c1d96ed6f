//! From a file to what could have been typed.
//!
//! The keys of a table are the flags of its command, as clap knows them, and its positional argument. Each becomes the
//! arguments that say the same, in front of what was typed; keys that were typed too are left out. So flags and keys are the
//! same by construction, and clap checks the values of both.

use std::collections::BTreeMap;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::file::{ConfigFile, Entry, Fault, Value};

/// Keys that no file has.
const TYPED_ONLY: [&str; 4] = ["config", "help", "takeover", "version"];

/// What a file adds to a command line: for each key, its arguments.
pub(super) type Added = BTreeMap<String, Vec<OsString>>;

/// The whole command line with nothing required: what is missing may be in a file.
pub(super) fn relaxed(command: Command) -> Command {
    let mut command = command.mut_subcommands(|each| each.mut_args(|arg| arg.required(false)));
    command.build();
    command
}

/// What `file` adds to `typed` for the command `name`, all that is wrong with it, or else. The table of the command may be
/// missing. `typed` is what `command`, which is [`relaxed`], has made of the command line, if there is one.
pub(super) fn added(
    file: &ConfigFile,
    command: &Command,
    name: &str,
    typed: Option<&ArgMatches>,
) -> Result<Added, Vec<Fault>> {
    let mut added = Added::new();
    let mut faults = Vec::new();
    let own = command.find_subcommand(name);
    let is_global = |arg: &&Arg| arg.is_global_set();
    let is_own = |arg: &&Arg| !arg.is_global_set();
    let top: Vec<_> = command.get_arguments().filter(is_global).collect();
    let args: Vec<_> = own.into_iter().flat_map(Command::get_arguments).filter(is_own).collect();
    let table = file.table(name);
    let of_top = file.top.iter().map(|entry| (None, &top, entry));
    let of_table = table.into_iter().flat_map(|table| &table.entries).map(|entry| (Some(name), &args, entry));
    for (table, known, entry) in of_top.chain(of_table) {
        let place = table.map_or_else(String::new, |table| format!("[{table}] "));
        let fault = |why: String| file.fault(entry.line, format!("{place}{}: {why}", entry.key));
        let Some(arg) = find(known, &entry.key) else {
            faults.push(fault(unknown(known, &entry.key)));
            continue;
        };
        match arguments(arg, entry).and_then(|arguments| check(command, name, arg, arguments)) {
            Ok(_) if typed.is_some_and(|typed| is_typed(typed, arg)) => {}
            Ok(arguments) => drop(added.insert(entry.key.clone(), arguments)),
            Err(why) => faults.push(fault(why)),
        }
    }
    let is_command = |table: &str| matches!(table, "serve" | "mirror");
    for table in file.tables.iter().filter(|table| !is_command(&table.name)) {
        let why =
            format!("[{}]: there are the tables [serve] and [mirror], and what belongs to one of them", table.name);
        faults.push(file.fault(table.line, why));
    }
    if faults.is_empty() { Ok(added) } else { Err(faults) }
}

/// The command line with what was added: flags behind the command's name, in front of what was typed there, and the
/// positional arguments last.
pub(super) fn join(typed: &[OsString], name: &str, added: &Added) -> Vec<OsString> {
    let is_flag = |argument: &&OsString| argument.to_string_lossy().starts_with("--");
    let (flags, images): (Vec<_>, Vec<_>) = added.values().flatten().partition(is_flag);
    // What may stand in front of it takes no value of that name.
    let (before, behind) = match typed.iter().position(|word| word == name) {
        Some(place) => typed.split_at(place + 1),
        None => (typed, &[][..]),
    };
    let mut line = before.to_vec();
    line.extend(flags.into_iter().cloned());
    line.extend(behind.iter().cloned());
    if !images.is_empty() {
        // Nothing positional was typed: else the images of the file were left out.
        line.push("--".into());
        line.extend(images.into_iter().cloned());
    }
    line
}

/// The name of the key of an argument.
pub(in crate::cli) fn key(arg: &Arg) -> Option<&str> {
    let key = arg.get_long().or_else(|| arg.is_positional().then(|| arg.get_id().as_str()))?;
    (!TYPED_ONLY.contains(&key)).then_some(key)
}

fn find<'a>(known: &[&'a Arg], wanted: &str) -> Option<&'a Arg> {
    known.iter().copied().find(|arg| key(arg) == Some(wanted))
}

fn is_typed(typed: &ArgMatches, arg: &Arg) -> bool {
    typed.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
}

/// The arguments that say the same as a key.
fn arguments(arg: &Arg, entry: &Entry) -> Result<Vec<OsString>, String> {
    let say = |value: &str| -> OsString {
        if arg.is_positional() { value.into() } else { format!("--{}={value}", entry.key).into() }
    };
    let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
    let is_list = matches!(arg.get_action(), ArgAction::Append);
    match &entry.value {
        Value::Flag(on) if is_flag => Ok(on.then(|| format!("--{}", entry.key).into()).into_iter().collect()),
        Value::Flag(_) => Err("a text or a number is wanted".to_owned()),
        _ if is_flag => Err("true or false is wanted".to_owned()),
        Value::One(one) => Ok(vec![say(one)]),
        Value::Many(many) if is_list => Ok(many.iter().map(|one| say(one)).collect()),
        Value::Many(_) => Err("one value is wanted, not a list".to_owned()),
        Value::Named(named) if is_list && takes_names(arg) => {
            let each = named.iter().map(|(name, values)| {
                // Such a name would be read as something else.
                let is_odd = name.starts_with(['/', '.']) || name.contains('=') || name.contains("://");
                if is_odd || values.is_empty() {
                    let why =
                        if is_odd { "such a name is written in a list, as it is typed" } else { "nothing is named" };
                    return Err(format!("{name:?}: {why}"));
                }
                Ok(say(&format!("{name}={}", values.join(","))))
            });
            each.collect()
        }
        Value::Named(_) => Err("no table is wanted here".to_owned()),
    }
}

/// Whether `NAME=VALUE` is what it takes.
fn takes_names(arg: &Arg) -> bool {
    arg.get_value_names().is_some_and(|names| names.iter().any(|name| name.contains('=')))
}

/// Has clap look at the arguments of one key.
fn check(command: &Command, name: &str, arg: &Arg, arguments: Vec<OsString>) -> Result<Vec<OsString>, String> {
    let mut line: Vec<OsString> = vec!["headwater".into(), name.into()];
    line.extend(arg.is_positional().then(|| "--".into()));
    line.extend(arguments.iter().cloned());
    match command.clone().try_get_matches_from(line) {
        Ok(_) => Ok(arguments),
        // That it needs others, or excludes them, is looked at with all of them.
        Err(error) if matches!(error.kind(), ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict) => {
            Ok(arguments)
        }
        Err(error) => Err(reason(&error)),
    }
}

/// What clap says, without what is of use on a command line only.
fn reason(error: &clap::Error) -> String {
    use std::error::Error;
    let value = match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) => value.as_str(),
        _ => "",
    };
    if let Some(source) = error.source() {
        return format!("{value:?}: {source}");
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) => format!("{value:?}: one of {} is wanted", valid.join(", ")),
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            first.strip_prefix("error: ").unwrap_or(first).to_owned()
        }
    }
}

fn unknown(known: &[&Arg], wanted: &str) -> String {
    let keys = known.iter().filter_map(|arg| key(arg));
    let nearest = keys.map(|key| (distance(key, wanted), key)).min();
    match nearest {
        Some((distance, key)) if distance <= 1 + key.len() / 3 => format!("there is no such key; {key}?"),
        _ => "there is no such key".to_owned(),
    }
}

/// How many letters must be put in, left out or replaced to make one of the other (Wagner and Fischer, 1974).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<_> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (above, letter) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = above + 1;
        for (column, candidate) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *candidate);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::Arguments;
    use clap::CommandFactory;
    use std::path::Path;

    fn command() -> Command {
        relaxed(Arguments::command())
    }

    /// The command line that a file makes of one that was typed.
    fn joined(text: &str, typed: &[&str]) -> Result<String, String> {
        let file = ConfigFile::parse(Path::new("c"), text).map_err(|fault| fault.to_string())?;
        let command = command();
        let matches = command.clone().try_get_matches_from(["headwater"].iter().chain(typed)).unwrap();
        let (name, own) = matches.subcommand().unwrap();
        let added = added(&file, &command, name, Some(own)).map_err(|faults| faults[0].to_string())?;
        let typed: Vec<OsString> = ["headwater"].iter().chain(typed).map(OsString::from).collect();
        let line = join(&typed, name, &added);
        Ok(line.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn keys_become_what_could_have_been_typed() {
        let text = "log-level = 'warn'\n[serve]\nimages = ['a=/a', '/b']\nread-only = true\nindex = false\nworkers = 2\n\
            listen = ['127.0.0.1:1', '[::1]:1']\n[serve.allow]\na = ['::1', '10.0.0.0/8']\n[mirror]\ncache = '/c'\n";
        assert_eq!(
            joined(text, &["serve"]).unwrap(),
            "headwater serve --allow=a=::1,10.0.0.0/8 --listen=127.0.0.1:1 --listen=[::1]:1 --log-level=warn --read-only \
             --workers=2 -- a=/a /b"
        );
        assert_eq!(
            joined(text, &["mirror", "nbd://h/x"]).unwrap(),
            "headwater mirror --cache=/c --log-level=warn nbd://h/x"
        );
    }

    #[test]
    fn what_was_typed_takes_the_place_of_its_key() {
        let text =
            "log-level = 'warn'\n[serve]\nimages = ['/a']\nlisten = '127.0.0.1:1'\nworkers = 2\nread-only = true";
        assert_eq!(
            joined(text, &["serve", "/b", "--listen", "[::1]:1", "-r", "--log-level=debug"]).unwrap(),
            "headwater serve --workers=2 /b --listen [::1]:1 -r --log-level=debug"
        );
        let typed = &["--log-level", "debug", "serve", "/b", "--listen=[::1]:1"];
        assert_eq!(
            joined(text, typed).unwrap(),
            "headwater --log-level debug serve --read-only --workers=2 /b --listen=[::1]:1"
        );
    }

    #[test]
    fn images_may_be_a_table() {
        let text = "[mirror.images]\nd = ['nbd://a/x', 'nbd://b/x']\n";
        assert_eq!(joined(text, &["mirror"]).unwrap(), "headwater mirror -- d=nbd://a/x,nbd://b/x");
        for name in ["./a", "/a", "a=b"] {
            let error = joined(&format!("[serve.images]\n'{name}' = '/x'"), &["serve"]).unwrap_err();
            assert!(error.contains("written in a list"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_file_line_and_key() {
        for (text, why) in [
            ("[serve]\nlisten = 'a b'", "c:2: [serve] listen: \"a b\": \"a b\" is not an address"),
            ("[serve]\nlissten = 'a'", "c:2: [serve] lissten: there is no such key; listen?"),
            ("[serve]\nqwertyuiop = 'a'", "c:2: [serve] qwertyuiop: there is no such key"),
            ("[serve]\ncache = 'a'", "c:2: [serve] cache: there is no such key"),
            ("[serve]\nconfig = 'a'", "c:2: [serve] config: there is no such key"),
            ("[serve]\nlog-level = 'info'", "c:2: [serve] log-level: there is no such key"),
            ("log-level = 'loud'", "c:1: log-level: \"loud\": one of off, error, warn, info, debug is wanted"),
            ("listen = 'a'", "c:1: listen: there is no such key"),
            ("[server]\nlisten = 'a'", "c:1: [server]: there are the tables"),
            ("[serve]\nread-only = 'yes'", "c:2: [serve] read-only: true or false"),
            ("[serve]\nindex-rate = true", "c:2: [serve] index-rate: a text or a number"),
            ("[serve]\nindex-rate = [1]", "c:2: [serve] index-rate: one value"),
            ("[serve]\nindex-rate = 0", "c:2: [serve] index-rate: \"0\": more than nothing"),
            ("[serve]\nworkers = 5000", "c:2: [serve] workers: \"5000\": 5000 is not in 1..=1024"),
            ("[serve.listen]\na = 'b'", "c:2: [serve] listen: no table"),
            ("[serve]\nallow = '10.1.1.1/8'", "c:2: [serve] allow: \"10.1.1.1/8\": "),
        ] {
            let error = joined(text, &["serve"]).unwrap_err();
            assert!(error.starts_with(why), "{error}\nis not\n{why}");
        }
    }

    #[test]
    fn names_that_are_near_are_found() {
        for (one, other, wanted) in [("", "", 0), ("a", "", 1), ("listen", "lissten", 1), ("kitten", "sitting", 3)] {
            assert_eq!((distance(one, other), distance(other, one)), (wanted, wanted));
        }
    }

    /// Each flag of `serve` and `mirror` can be a key, but for those that say which file.
    #[test]
    fn all_flags_are_keys() {
        let command = command();
        for name in ["serve", "mirror"] {
            let own = command.find_subcommand(name).unwrap();
            let mut without = own.get_arguments().filter(|arg| key(arg).is_none()).map(|arg| arg.get_id().as_str());
            assert!(without.all(|id| TYPED_ONLY.contains(&id)), "{name}");
            let other = own.get_arguments().find(|arg| {
                let action = arg.get_action();
                key(arg).is_some() && !matches!(action, ArgAction::SetTrue | ArgAction::Append | ArgAction::Set)
            });
            assert!(other.is_none(), "{other:?} is of a kind that no key can say");
        }
    }
}
