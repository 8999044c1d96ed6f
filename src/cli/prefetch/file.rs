//! Many orders in a file: each line has the arguments of one `headwater prefetch`.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use clap::Parser;

use super::args::Prefetch;

/// Bytes of the longest file that is taken.
const LONGEST: u64 = 1 << 20;

/// One line.
#[derive(Debug, Parser)]
#[command(name = "headwater prefetch", no_binary_name = true, disable_help_flag = true)]
struct Line {
    #[command(flatten)]
    order: Prefetch,
}

/// Reads all lines of a file, `-` being the standard input.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Prefetch>> {
    let mut text = String::new();
    let file: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(std::io::stdin().lock()),
        _ => Box::new(std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?),
    };
    file.take(LONGEST + 1).read_to_string(&mut text).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(text.len() <= crate::units::to_usize(LONGEST), "{} has more than 1 MiB", path.display());
    parse(&text, &path.display().to_string())
}

/// The orders of a text that is called `name`.
fn parse(text: &str, name: &str) -> anyhow::Result<Vec<Prefetch>> {
    let mut orders = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let words = words(line).with_context(|| format!("{name}, line {number}"))?;
        if words.is_empty() {
            continue;
        }
        let Line { order } = match Line::try_parse_from(words) {
            Ok(line) => line,
            Err(error) => {
                let text = error.to_string();
                let reason = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
                bail!("{name}, line {number}: {reason}");
            }
        };
        ensure!(
            order.from.is_none() && !order.list && order.cancel.is_none() && !order.json,
            "{name}, line {number}: a line orders something; --from, --list, --cancel and --json have no place in it"
        );
        orders.push(order);
    }
    ensure!(!orders.is_empty(), "{name} has no orders");
    Ok(orders)
}

/// The words of a line, as a shell has them: quotes keep blanks together, a backslash takes the next character as it
/// is, and a # at the beginning of a word begins a comment.
fn words(line: &str) -> anyhow::Result<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '\\') => word.get_or_insert_default().push(rest.next().context("it ends with a backslash")?),
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                word.get_or_insert_default();
                quote = Some(c);
            }
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    ensure!(quote.is_none(), "a quote is not closed");
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_a_shell() {
        for (line, parts) in [
            ("", &[][..]),
            ("  # nothing", &[]),
            ("a b\t c # d", &["a", "b", "c"]),
            ("'a b' \"c d\"e f\\ g", &["a b", "c de", "f g"]),
            ("a#b '#c' ''", &["a#b", "#c", ""]),
            ("'it'\\''s' \"a\\\"b\" 'a\\b'", &["it's", "a\"b", "a\\b"]),
        ] {
            assert_eq!(words(line).unwrap(), parts, "{line}");
        }
        for line in ["'a", "\"a", "a\\"] {
            assert!(words(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_file_has_an_order_on_each_line_or_says_which_line_is_wrong() {
        let orders = parse("# tonight\n\na --profile --at /run/a\n'b c' --range ..1M --in 5m\n", "x").unwrap();
        assert_eq!(orders[0].image.as_deref(), Some("a"));
        assert_eq!(orders[0].profile.as_deref(), Some("boot"));
        assert_eq!((orders[1].image.as_deref(), orders[1].range.len()), (Some("b c"), 1));
        for (text, reason) in [
            ("a\nb --whatever\n", "x, line 2: unexpected argument '--whatever'"),
            ("a 'b\n", "x, line 1: a quote"),
            ("--list\n", "x, line 1: a line orders something"),
            ("a --all --range ..1M\n", "x, line 1: the argument '--all' cannot be used with"),
            ("--rate 1M\n", "x, line 1: the following required arguments"),
            ("# nothing\n", "x has no orders"),
        ] {
            let error = format!("{:#}", parse(text, "x").unwrap_err());
            assert!(error.starts_with(reason), "{error}");
        }
    }
}
