//! SIGHUP: the file is read again, and what may change while the server runs is changed.
//!
//! | changes | how |
//! | --- | --- |
//! | `allow`, `allow-client`, `require-tls` | at once; connections that may not be there any more are closed |
//! | what `headwater settings` knows | as by that command |
//! | `admin-token`, `tls-certificates` | the files are read again, also if the key did not change |
//! | everything else | not at all: the log names the keys that wait for a restart |
//!
//! A file with anything wrong in it changes nothing. What did not change in the file stays as it is, also if an operator has
//! changed it since.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{anyhow, ensure};
use clap::Parser;
use tokio::signal::unix::Signal;

use super::arguments::Added;
use super::{Origin, daemon_of, tell, whole_line};
use crate::cli::args::{Arguments, Command};
use crate::control::casts::Casts;
use crate::control::settings::{Settings, change};
use crate::control::{Operated, Token, TokenCell};
use crate::export::Registry;
use crate::export::access::Rules;
use crate::server::Steering;
use crate::tls::Clients;

/// Keys of files that are read again whether the key has changed or not.
#[cfg(test)]
const FILES: [&str; 2] = ["admin-token", "tls-certificates"];
/// Keys of rules.
const RULES: [&str; 3] = ["allow", "allow-client", "require-tls"];
/// Keys of settings, which have the same names there but for the dashes.
const SETTINGS: [&str; 6] = ["log-level", "fill-rate", "image-fill-rate", "cache-size", "reserve", "index-rate"];

/// Whether SIGHUP changes what is behind a key.
#[cfg(test)]
pub(in crate::cli) fn is_live(key: &str) -> bool {
    RULES.contains(&key) || SETTINGS.contains(&key) || FILES.contains(&key)
}

/// Reads a configuration again. Without one, only what is in files of its own.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Reloader(Option<Origin>);

/// A running server, as far as it can be changed.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Live {
    pub(in crate::cli) steering: Steering,
    pub(in crate::cli) registry: Arc<Registry>,
    pub(in crate::cli) operated: Option<Arc<dyn Operated>>,
    pub(in crate::cli) casts: Option<Casts>,
    /// What operators must show by TCP, and where it was read from.
    pub(in crate::cli) token: Option<(TokenCell, PathBuf)>,
    /// What clients by TLS are shown.
    pub(in crate::cli) certificates: Option<Clients>,
}

/// What is to be done, once all of it is known to be sound.
struct Change {
    rules: Option<Rules>,
    settings: Settings,
    token: Option<Token>,
    waiting: Vec<String>,
}

impl Reloader {
    pub(super) const fn new(origin: Option<Origin>) -> Self {
        Self(origin)
    }

    /// Reads again whenever the signal comes. It does not end.
    ///
    /// Cancel safety: a change is made whole or not at all, but for the settings, which may have been changed already.
    pub(in crate::cli) async fn run(mut self, mut hangup: Signal, live: Live) {
        while hangup.recv().await.is_some() {
            tell_manager(true);
            tracing::info!("SIGHUP: reading the configuration again");
            if let Err(error) = self.reload(&live).await {
                tracing::error!(error = format!("{error:#}"), "nothing is changed");
            }
            tell_manager(false);
        }
        std::future::pending().await
    }

    async fn reload(&mut self, live: &Live) -> anyhow::Result<()> {
        let read = self.0.as_ref().map(|origin| origin.read().map_err(|faults| anyhow!(tell(&faults)))).transpose()?;
        let mut change = Change { rules: None, settings: Settings::default(), token: None, waiting: Vec::new() };
        if let (Some((added, line)), Some(origin)) = (&read, &self.0) {
            let arguments = Arguments::try_parse_from(line).map_err(|error| anyhow!(whole_line(&error)))?;
            change.plan(&changed(&origin.added, added), &arguments, live)?;
        }
        if let Some((_, path)) = &live.token {
            change.token = Some(Token::read(path)?);
        }
        if let Some(certificates) = &live.certificates {
            certificates.reload()?;
        }
        change.make(live).await?;
        if let (Some((added, _)), Some(origin)) = (read, &mut self.0) {
            origin.added = added;
        }
        Ok(())
    }
}

impl Change {
    fn plan(&mut self, keys: &BTreeSet<String>, arguments: &Arguments, live: &Live) -> anyhow::Result<()> {
        let is_rule = |key: &String| RULES.contains(&key.as_str());
        if keys.iter().any(is_rule)
            && let Some(daemon) = daemon_of(&arguments.command)
        {
            let rules = daemon.access.rules();
            let is_known = |name: &str| live.registry.find(name).is_some_and(|(full, _)| full == name);
            strangers(&rules, is_known).map_err(anyhow::Error::msg)?;
            warn_of_lockout(&rules, live.certificates.is_some());
            self.rules = Some(rules);
        }
        let has = live.operated.as_ref().map_or_else(Settings::default, |operated| operated.settings());
        let wanted: BTreeSet<_> =
            keys.iter().filter(|key| SETTINGS.contains(&key.as_str())).map(|key| key.replace('-', "_")).collect();
        self.settings = said(arguments).only(|name| wanted.contains(name) && (name == "log_level" || has.has(name)));
        let is_done = |key: &String| is_rule(key) || self.settings.has(&key.replace('-', "_"));
        self.waiting = keys.iter().filter(|key| !is_done(key)).cloned().collect();
        Ok(())
    }

    async fn make(self, live: &Live) -> anyhow::Result<()> {
        let Self { rules, settings, token, waiting } = self;
        if settings != Settings::default()
            && let Some(operated) = live.operated.clone()
        {
            // What can be refused comes first.
            tokio::task::spawn_blocking(move || change(&*operated, &settings)).await??;
        }
        if let Some(rules) = rules {
            let closed = live.steering.change_access(rules);
            if let Some(casts) = &live.casts {
                casts.call_off_restricted().await;
            }
            tracing::info!(closed, "there are new rules of who may come");
        }
        if let (Some(token), Some((cell, _))) = (token, &live.token) {
            cell.set(token);
        }
        if !waiting.is_empty() {
            let keys = waiting.join(", ");
            tracing::warn!(keys, "this has changed in the configuration and needs a restart, which keeps clients");
        }
        Ok(())
    }
}

/// Complains of rules for exports that there are not.
pub(in crate::cli) fn strangers(rules: &Rules, is_known: impl Fn(&str) -> bool) -> Result<(), String> {
    let unknown: Vec<_> = rules.exports().into_iter().filter(|name| !is_known(name)).collect();
    if unknown.is_empty() { Ok(()) } else { Err(format!("there is a rule for {unknown:?}, and no such export")) }
}

/// Complains of rules that nobody could ever meet.
pub(in crate::cli) fn without_tls(rules: &Rules, has_tls: bool) -> Result<(), String> {
    let names_nobody = rules.names.all.is_empty() && rules.names.of.is_empty();
    if has_tls || rules.tls.is_empty() && names_nobody {
        return Ok(());
    }
    Err("--require-tls and --allow-client keep everybody out where there is no TLS: see --tls-certificates".to_owned())
}

/// Nobody is let in who should not be, so it is no error of a server.
fn warn_of_lockout(rules: &Rules, has_tls: bool) {
    if let Err(why) = without_tls(rules, has_tls) {
        tracing::warn!("{why}");
    }
}

/// Complains of what rules say that makes no sense at a server that starts.
pub(in crate::cli) fn refuse_strangers(rules: &Rules, registry: &Registry, has_tls: bool) -> anyhow::Result<()> {
    let is_known = |name: &str| registry.find(name).is_some_and(|(full, _)| full == name);
    let known = strangers(rules, is_known);
    ensure!(known.is_ok(), known.err().unwrap_or_default());
    warn_of_lockout(rules, has_tls);
    Ok(())
}

/// The keys that say something else than before.
fn changed(before: &Added, now: &Added) -> BTreeSet<String> {
    let keys: BTreeSet<_> = before.keys().chain(now.keys()).cloned().collect();
    keys.into_iter().filter(|key| before.get(key) != now.get(key)).collect()
}

/// What a command line says of the settings.
fn said(arguments: &Arguments) -> Settings {
    let settings = Settings { log_level: Some(arguments.logging.level().into()), ..Settings::default() };
    match &arguments.command {
        Command::Serve(serve) => Settings { index_rate: Some(Some(serve.index_rate)), ..settings },
        Command::Mirror(mirror) => {
            let rates = mirror.fill.settings().rates;
            Settings {
                fill_rate: Some(rates.server),
                image_fill_rate: Some(rates.image),
                cache_size: Some(mirror.cache_size),
                reserve: Some(mirror.reserve),
                ..settings
            }
        }
        _ => settings,
    }
}

/// Says to the service manager that a reload has begun, or is over (`sd_notify(3)`).
fn tell_manager(begins: bool) {
    use sd_notify::NotifyState::{self, Ready, Reloading};
    let told = match NotifyState::monotonic_usec_now() {
        Ok(now) if begins => sd_notify::notify(&[Reloading, now]),
        Err(error) if begins => Err(error),
        _ => sd_notify::notify(&[Ready]),
    };
    if let Err(error) = told {
        tracing::debug!(%error, "cannot tell the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Arguments {
        Arguments::try_parse_from(["headwater"].iter().chain(line)).unwrap()
    }

    #[test]
    fn keys_that_come_go_or_say_something_else_have_changed() {
        let added = |pairs: &[(&str, &str)]| -> Added {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), vec![value.into()])).collect()
        };
        let before = added(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let now = added(&[("b", "1"), ("c", "2"), ("d", "1")]);
        assert_eq!(changed(&before, &now).into_iter().collect::<Vec<_>>(), ["a", "c", "d"]);
        assert!(changed(&now, &now).is_empty());
    }

    /// A setting that `headwater settings` changes is one that a reload changes too, and is said by a command line.
    #[test]
    fn all_settings_can_be_said_in_a_file() {
        let serve = said(&parsed(&["serve", "/x"]));
        let mirror = said(&parsed(&["mirror", "nbd://h/x", "--cache", "/c"]));
        for key in SETTINGS {
            let name = key.replace('-', "_");
            assert!(serve.has(&name) || mirror.has(&name), "{key}");
        }
        assert_eq!(Settings::NAMES.map(|name| name.replace('_', "-")), SETTINGS);
    }

    #[test]
    fn rules_are_for_exports_that_there_are() {
        let mut rules = Rules::default();
        rules.addresses.add(Some("a"), Vec::new());
        rules.tls.insert("b".to_owned());
        assert!(strangers(&rules, |_| true).is_ok());
        assert!(strangers(&rules, |name| name == "a").unwrap_err().contains("[\"b\"]"));
    }
}
