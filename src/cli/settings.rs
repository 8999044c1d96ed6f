//! `headwater settings`: what may be changed while a server runs.

use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use serde_json::{Map, Value, json};

use super::args::RunningServer;
use super::output;
use super::running::{block_on, reach};
use super::table::Table;
use crate::units::ByteSize;

const EXAMPLES: &str = "\
Examples:
  headwater settings
  headwater settings fill-rate=20M log-level=debug
  headwater settings cache-size=none reserve=10G --at /run/headwater/4711.sock

A change holds until the server ends: what it begins with is what its command line says.";

/// Show the settings of a running server, or change some of them.
///
/// Names and values are those of the flags of headwater serve and headwater mirror: log-level, fill-rate,
/// image-fill-rate, cache-size, reserve, index-rate. All that is named is changed, or nothing.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Settings {
    /// What to change. A rate or a size of none is no limit.
    #[arg(value_name = "NAME=VALUE")]
    changes: Vec<Change>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: RunningServer,
}

/// One setting, as it is sent.
#[derive(Debug, Clone, PartialEq)]
struct Change {
    name: String,
    value: Value,
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("write NAME=VALUE, as in fill-rate=20M")?;
        let value = match (name, value) {
            ("log-level", level) => json!(level),
            (_, "none") => Value::Null,
            (_, size) => match size.parse() {
                Ok(ByteSize(bytes)) => json!(bytes),
                Err(error) => return Err(format!("{name}: {error}")),
            },
        };
        Ok(Self { name: name.replace('-', "_"), value })
    }
}

/// Shows and changes them.
pub(super) fn run(arguments: Settings) -> anyhow::Result<ExitCode> {
    let Settings { changes, json, server } = arguments;
    let settings = block_on(async {
        let client = reach(server).await?;
        if changes.is_empty() {
            return Ok(client.settings().await?);
        }
        let order = changes.into_iter().map(|Change { name, value }| (name, value)).collect();
        Ok(client.change_settings(&order).await?)
    })?;
    output::print(&if json { format!("{}\n", serde_json::to_string_pretty(&settings)?) } else { describe(&settings) })?;
    Ok(ExitCode::SUCCESS)
}

fn describe(settings: &Map<String, Value>) -> String {
    let mut table = Table::new(&["SETTING", ">VALUE"]);
    for (name, value) in settings {
        let text = match (value.as_u64(), value.as_str()) {
            (Some(bytes), _) => ByteSize(bytes).to_string(),
            (_, Some(text)) => text.to_owned(),
            _ if value.is_null() => "none".to_owned(),
            _ => value.to_string(),
        };
        table.row(vec![name.replace('_', "-"), text]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_flags() {
        let change = |name: &str, value| Ok(Change { name: name.to_owned(), value });
        for (text, parsed) in [
            ("fill-rate=20M", change("fill_rate", json!(20 << 20))),
            ("cache-size=none", change("cache_size", Value::Null)),
            ("reserve=0", change("reserve", json!(0))),
            ("log-level=debug", change("log_level", json!("debug"))),
            // Whether there is such a thing is the server's to say.
            ("log-level=none", change("log_level", json!("none"))),
            ("new-thing=1K", change("new_thing", json!(1024))),
        ] {
            assert_eq!(text.parse(), parsed, "{text}");
        }
        for text in ["", "fill-rate", "fill-rate=", "fill-rate=fast"] {
            assert!(text.parse::<Change>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_shown_can_be_typed() {
        let settings = json!({"log_level": "info", "fill_rate": 20 << 20, "cache_size": null});
        let text = describe(settings.as_object().unwrap());
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines, [["SETTING", "VALUE"], ["cache-size", "none"], ["fill-rate", "20M"], ["log-level", "info"]]);
    }
}
