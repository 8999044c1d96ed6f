//! The questions that an order of `headwater top` is made of, of which the last one is whether it is meant.
//!
//! Pure. Owns: what is asked, what is suggested, and what an order will do, in words. Does not own: giving it (`watch`).

use ratatui::crossterm::event::{KeyCode, KeyEvent};

use super::rows::{Server, bytes_per_second, is_drained};
use super::state::edit;
use crate::control::load::ClientLoad;
use crate::control::status::{DrainOrder, ImageStatus, RedirectOrder};
use crate::nbd::Uri;

/// What an operator has asked for, and said yes to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Order {
    /// The server, by its place among them.
    pub(super) server: usize,
    pub(super) what: What,
}

/// What is to be done at it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    /// An export, or all, is taken out of service.
    Drain(Option<String>, DrainOrder),
    /// Newcomers are let in again.
    Undrain(Option<String>),
    /// Clients of an export are moved.
    Redirect(String, RedirectOrder),
}

/// What comes after a key.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    Stay,
    Leave,
    Carry(Order),
}

/// An order in the making.
#[derive(Debug)]
pub(super) struct Dialog {
    order: Order,
    pub(super) question: Question,
    /// What is wrong with the last answer.
    pub(super) complaint: Option<String>,
}

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// How many clients.
    Amount(String),
    /// Where to: what is typed, what may be meant, and which of that is taken.
    Target { typed: String, suggestions: Vec<String>, taken: usize },
    /// Whether that is meant.
    Sure,
}

impl Dialog {
    pub(super) const fn undrain(server: usize, export: Option<String>) -> Self {
        let order = Order { server, what: What::Undrain(export) };
        Self { order, question: Question::Sure, complaint: None }
    }

    pub(super) fn drain(server: usize, export: Option<String>, servers: &[Server]) -> Self {
        let mut suggestions = targets(servers, server, export.as_deref());
        // Moving nobody is what a drain is without more.
        suggestions.insert(0, String::new());
        let order = Order { server, what: What::Drain(export, DrainOrder::default()) };
        Self { order, question: Question::target(suggestions), complaint: None }
    }

    /// For clients of an export: how many is asked.
    pub(super) fn redirect_some(server: usize, export: String) -> Self {
        let order = Order { server, what: What::Redirect(export, RedirectOrder::default()) };
        Self { order, question: Question::Amount("all".to_owned()), complaint: None }
    }

    /// For one client.
    pub(super) fn redirect_one(server: usize, client: &ClientLoad, servers: &[Server]) -> Self {
        let chosen = RedirectOrder { clients: Some(vec![client.id]), ..RedirectOrder::default() };
        let suggestions = targets(servers, server, Some(&client.export));
        let order = Order { server, what: What::Redirect(client.export.clone(), chosen) };
        Self { order, question: Question::target(suggestions), complaint: None }
    }

    /// What a key says to the question that stands.
    pub(super) fn handle_key(&mut self, key: KeyEvent, servers: &[Server]) -> Step {
        self.complaint = None;
        if key.code == KeyCode::Esc {
            return Step::Leave;
        }
        match &mut self.question {
            Question::Sure if matches!(key.code, KeyCode::Char('y' | 'Y')) => Step::Carry(self.order.clone()),
            // No key is a yes but that.
            Question::Sure => Step::Leave,
            Question::Amount(typed) if key.code == KeyCode::Enter => {
                let typed = std::mem::take(typed);
                self.take_amount(typed, servers);
                Step::Stay
            }
            Question::Target { typed, .. } if key.code == KeyCode::Enter => {
                let typed = std::mem::take(typed);
                self.take_target(typed, servers);
                Step::Stay
            }
            Question::Amount(typed) => {
                edit(typed, key);
                Step::Stay
            }
            Question::Target { typed, suggestions, taken } => {
                let next = match key.code {
                    KeyCode::Down => Some(*taken + 1),
                    KeyCode::Up => Some((*taken + suggestions.len()).saturating_sub(1)),
                    _ => None,
                };
                match next.filter(|_| !suggestions.is_empty()) {
                    Some(next) => {
                        *taken = next % suggestions.len();
                        typed.clone_from(&suggestions[*taken]);
                    }
                    None => edit(typed, key),
                }
                Step::Stay
            }
        }
    }

    fn take_amount(&mut self, typed: String, servers: &[Server]) {
        let What::Redirect(export, order) = &mut self.order.what else { return };
        match amount(&typed) {
            Some(amount) => {
                *order = amount;
                self.question = Question::target(targets(servers, self.order.server, Some(export)));
            }
            None => {
                self.complaint = Some("write all, a number as in 3, or a part as in 50%".to_owned());
                self.question = Question::Amount(typed);
            }
        }
    }

    fn take_target(&mut self, typed: String, servers: &[Server]) {
        let text = typed.trim();
        let complaint = match (&mut self.order.what, text.parse::<Uri>()) {
            (What::Drain(_, order), _) if text.is_empty() => {
                order.to.clear();
                None
            }
            (What::Drain(_, order), Ok(uri)) => {
                order.to = vec![uri.to_string()];
                None
            }
            (What::Redirect(export, order), Ok(mut uri)) => {
                if uri.export.is_empty() {
                    uri.export.clone_from(export);
                }
                order.to = vec![uri.to_string()];
                None
            }
            (_, Err(error)) => Some(error.to_string()),
            (What::Undrain(_), _) => None,
        };
        self.question = match complaint {
            None => Question::Sure,
            Some(complaint) => {
                self.complaint = Some(complaint);
                let suggestions = targets(servers, self.order.server, self.order.what.export());
                Question::Target { typed, suggestions, taken: 0 }
            }
        };
    }

    /// What the order as it is will do, for the box with the question.
    pub(super) fn words(&self, servers: &[Server]) -> Vec<String> {
        self.order.words(servers)
    }
}

impl Question {
    fn target(suggestions: Vec<String>) -> Self {
        Self::Target { typed: suggestions.first().cloned().unwrap_or_default(), suggestions, taken: 0 }
    }
}

/// Whom an order is for.
fn amount(typed: &str) -> Option<RedirectOrder> {
    let order = RedirectOrder::default();
    let typed = typed.trim();
    if typed.is_empty() || typed.eq_ignore_ascii_case("all") {
        return Some(RedirectOrder { all: true, ..order });
    }
    if let Ok(count) = typed.parse() {
        return (count > 0).then_some(RedirectOrder { count: Some(count), ..order });
    }
    let fraction = match typed.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().ok()? / 100.0,
        None => typed.parse().ok()?,
    };
    (fraction > 0.0 && fraction <= 1.0).then_some(RedirectOrder { fraction: Some(fraction), ..order })
}

impl What {
    fn export(&self) -> Option<&str> {
        match self {
            Self::Drain(export, _) | Self::Undrain(export) => export.as_deref(),
            Self::Redirect(export, _) => Some(export),
        }
    }
}

impl Order {
    /// A few words for it.
    pub(super) fn short(&self) -> String {
        let whole = |export: &Option<String>| export.clone().unwrap_or_else(|| "the server".to_owned());
        match &self.what {
            What::Drain(export, _) => format!("draining {}", whole(export)),
            What::Undrain(export) => format!("taking {} into service again", whole(export)),
            What::Redirect(export, _) => format!("redirecting clients of {export}"),
        }
    }

    /// What exactly it will do, and the command that does the same.
    fn words(&self, servers: &[Server]) -> Vec<String> {
        let Some(server) = servers.get(self.server) else { return Vec::new() };
        let clients = self.clients(server);
        let at = &server.address;
        let whole = |export: &Option<String>| match export {
            Some(export) => format!("{export:?} at {at}"),
            None => format!("the whole server at {at}"),
        };
        let (mut words, command) = match &self.what {
            What::Drain(export, order) => (
                vec![
                    format!("Take {} out of service: newcomers are sent away.", whole(export)),
                    match order.to.first() {
                        None => format!("Its clients ({clients}) stay until they leave by themselves."),
                        Some(to) => format!("Of its clients ({clients}), mirrors go to {to}; the others stay."),
                    },
                ],
                words_of("drain", export.as_deref(), &order.to, None),
            ),
            What::Undrain(export) => (
                vec![
                    format!("Take {} into service again: newcomers are let in.", whole(export)),
                    "Clients that were moved stay where they are.".to_owned(),
                ],
                words_of("drain", export.as_deref(), &[], Some("--cancel".to_owned())),
            ),
            What::Redirect(export, order) => {
                let whom = self.whom(server, order);
                let to = order.to.join(", ");
                let to = if to.is_empty() { "another server".to_owned() } else { to };
                (
                    vec![
                        format!("Move {whom} of {export:?} at {at} to {to}."),
                        "Mirrors are told and leave; others stay connected here and are served from there.".to_owned(),
                    ],
                    words_of("redirect", Some(export), &order.to, Some(choice(order))),
                )
            }
        };
        words.push(format!("As: headwater {command} --at {}", quoted(at)));
        words
    }

    /// The clients that it may be about.
    fn clients(&self, server: &Server) -> usize {
        let Some(seen) = server.seen() else { return 0 };
        let is_meant = |client: &&ClientLoad| self.what.export().is_none_or(|export| client.export == export);
        seen.load.clients.iter().filter(is_meant).count()
    }

    fn whom(&self, server: &Server, order: &RedirectOrder) -> String {
        let all = self.clients(server);
        match (&order.clients, order.fraction, order.count) {
            (Some(ids), ..) => {
                let known = server.seen().map_or(&[][..], |seen| &seen.load.clients);
                let named = known.iter().filter(|client| ids.contains(&client.id));
                let words = named.map(|client| match &client.mirror {
                    Some(node) => format!("the mirror {node:.8} (client {}, {})", client.id, client.peer),
                    None => format!("client {} ({})", client.id, client.peer),
                });
                words.collect::<Vec<_>>().join(", ")
            }
            (None, Some(part), _) => format!("{} % of the {all} connections", part * 100.0),
            (None, None, Some(count)) => format!("{count} of the {all} connections"),
            (None, None, None) => format!("all {all} connections"),
        }
    }
}

fn choice(order: &RedirectOrder) -> String {
    match (&order.clients, order.fraction, order.count) {
        (Some(ids), ..) => format!("--clients {}", ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",")),
        (None, Some(part), _) => format!("--fraction {part}"),
        (None, None, Some(count)) => format!("--count {count}"),
        (None, None, None) => "--all".to_owned(),
    }
}

fn words_of(command: &str, export: Option<&str>, to: &[String], more: Option<String>) -> String {
    let export = export.map(quoted);
    let to = (!to.is_empty()).then(|| format!("--to {}", quoted(&to.join(","))));
    [Some(command.to_owned()), export, to, more].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// As a shell understands it.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Other servers that have the same image, or one of the same images, by the URIs that they listen on, those first that
/// send least.
pub(super) fn targets(servers: &[Server], from: usize, export: Option<&str>) -> Vec<String> {
    let images = |index: usize| -> &[ImageStatus] {
        let status = servers.get(index).and_then(Server::seen).and_then(|seen| seen.status.as_ref());
        status.map_or(&[], |status| &status.images)
    };
    let own: Vec<_> = images(from).iter().filter(|image| export.is_none_or(|name| image.name == name)).collect();
    let is_same = |one: &ImageStatus, other: &ImageStatus| {
        let fits = one.identity.is_none() || other.identity.is_none() || one.identity == other.identity;
        one.name == other.name && one.size == other.size && fits
    };
    let mut found = Vec::new();
    for (index, server) in servers.iter().enumerate().filter(|(index, _)| *index != from) {
        let Some(seen) = server.seen() else { continue };
        let has_it = images(index).iter().any(|image| own.iter().any(|own| is_same(own, image)));
        let is_shut = seen.drain.all || export.is_some_and(|export| is_drained(&seen.drain, export));
        if !has_it || is_shut {
            continue;
        }
        let listen = seen.status.iter().flat_map(|status| &status.listen);
        for mut uri in listen.filter_map(|uri| uri.parse::<Uri>().ok()) {
            uri.export = export.unwrap_or_default().to_owned();
            found.push((bytes_per_second(&seen.load.total), uri.to_string()));
        }
    }
    found.sort_by(|one, other| one.0.total_cmp(&other.0));
    found.into_iter().map(|(_, uri)| uri).collect()
}
