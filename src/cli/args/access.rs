//! Who may have which export, as typed.

use std::str::FromStr;

use clap::Args;

use crate::export::access::{Network, Rules};

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Who may come")]
pub(in crate::cli) struct AccessRules {
    /// Addresses that may have an export (repeatable), or, without EXPORT, all exports that have no list of their own. Unix
    /// sockets are open to whoever may open their file. [default: everybody]
    #[arg(long, value_name = "[EXPORT=]CIDR,...")]
    allow: Vec<Listed<Network>>,
    /// Names in client certificates that may have it (repeatable); such an export is served through TLS only.
    /// [default: everybody]
    #[arg(long, value_name = "[EXPORT=]NAME,...")]
    allow_client: Vec<Listed<Name>>,
    /// Serve this export through TLS only, where others are served without it too (repeatable).
    #[arg(long, value_name = "EXPORT")]
    require_tls: Vec<String>,
}

impl AccessRules {
    pub(in crate::cli) fn rules(&self) -> Rules {
        let mut rules = Rules { tls: self.require_tls.iter().cloned().collect(), ..Rules::default() };
        for Listed { export, who } in &self.allow {
            rules.addresses.add(export.as_deref(), who.clone());
        }
        for Listed { export, who } in &self.allow_client {
            rules.names.add(export.as_deref(), who.iter().map(|name| name.0.clone()).collect());
        }
        rules
    }
}

/// Some who may have an export, or all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed<T> {
    export: Option<String>,
    who: Vec<T>,
}

impl<T: FromStr<Err: ToString>> FromStr for Listed<T> {
    type Err = String;

    /// What comes behind the last `=` has none in it.
    fn from_str(text: &str) -> Result<Self, String> {
        let (export, who) = text.rsplit_once('=').map_or((None, text), |(export, who)| (Some(export.to_owned()), who));
        let who = who.split(',').map(|one| one.trim().parse().map_err(|error: T::Err| error.to_string()));
        Ok(Self { export, who: who.collect::<Result<_, _>>()? })
    }
}

/// A name in a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name(String);

impl FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Err("a name is missing"),
            text if text.contains('*') => {
                Err("names are compared as they are: * stands for itself, and no name has it")
            }
            text => Ok(Self(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_for_one_export_or_for_all() {
        let parsed: Listed<Network> = "a=b=10.0.0.0/8, ::1".parse().unwrap();
        assert_eq!(parsed.export.as_deref(), Some("a=b"));
        assert_eq!(parsed.who, ["10.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()]);
        assert_eq!("=10.0.0.1".parse::<Listed<Network>>().unwrap().export.as_deref(), Some(""));
        assert_eq!("10.0.0.1".parse::<Listed<Network>>().unwrap().export, None);
        for text in ["", "a=", "a", "10.0.0.1,", "a=10.0.0.1/8"] {
            assert!(text.parse::<Listed<Network>>().is_err(), "{text}");
        }
        for text in ["", "a=", "x,", "*.example"] {
            assert!(text.parse::<Listed<Name>>().is_err(), "{text}");
        }
    }

    #[test]
    fn flags_become_rules() {
        let typed = AccessRules {
            allow: vec!["10.0.0.0/8".parse().unwrap(), "a=::1".parse().unwrap(), "a=::2".parse().unwrap()],
            allow_client: vec!["b=host1".parse().unwrap()],
            require_tls: vec!["c".to_owned()],
        };
        let rules = typed.rules();
        assert_eq!((rules.addresses.all.len(), rules.addresses.of["a"].len()), (1, 2));
        assert_eq!(rules.names.of["b"], ["host1"]);
        assert_eq!(rules.exports().into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
    }
}
