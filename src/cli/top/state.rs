//! What `headwater top` shows, and what keys do to it.
//!
//! Pure: answers and keys come in, orders come out. Owns: what is chosen, sorted and typed. Does not own: how it looks
//! (`draw`), asking servers and giving orders (`watch`).

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::dialog::{Dialog, Order, Step};
use super::rows::{Condition, Row, Seen, Server, Subject, View, arrange, is_drained};
use crate::units::to_usize;

/// Rows that PgUp and PgDn move by.
const PAGE: usize = 10;
/// Characters of the longest text that is typed.
const LONGEST_TEXT: usize = 4096;

/// All that there is to be shown.
#[derive(Debug)]
pub(super) struct State {
    pub(super) servers: Vec<Server>,
    pub(super) view: View,
    /// By which column each table is sorted; by what hurts without one.
    sort: [Option<usize>; 3],
    pub(super) filter: String,
    /// What is chosen in each table; the first row if that is gone.
    chosen: [Option<Subject>; 3],
    pub(super) mode: Mode,
    pub(super) message: Option<Message>,
}

/// What keys are for.
#[derive(Debug)]
pub(super) enum Mode {
    /// Looking around.
    Look,
    /// Typing what rows must have in them.
    Filter,
    /// Reading what the keys are.
    Help,
    /// An order is being made.
    Ask(Box<Dialog>),
}

/// What came of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) text: String,
    pub(super) is_bad: bool,
}

/// What is to be done because of a key.
#[derive(Debug, PartialEq)]
pub(super) enum Deed {
    Nothing,
    Quit,
    Carry(Order),
}

/// What a server answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// What it said. A status that was not asked for is the one that is known.
    Seen(Box<Seen>),
    /// Why it does not answer.
    Silent(String),
}

impl State {
    /// For servers at these addresses, which were not asked yet.
    pub(super) fn new(addresses: Vec<String>) -> Self {
        let names = names(&addresses);
        let server = |(address, name)| Server { address, name, condition: Condition::Asked };
        Self {
            servers: addresses.into_iter().zip(names).map(server).collect(),
            view: View::Servers,
            sort: [None; 3],
            filter: String::new(),
            chosen: [const { None }; 3],
            mode: Mode::Look,
            message: None,
        }
    }

    /// Takes what a server answered.
    pub(super) fn handle_answer(&mut self, server: usize, answer: Answer) {
        let Some(server) = self.servers.get_mut(server) else { return };
        server.condition = match answer {
            Answer::Silent(why) => Condition::Silent(why),
            Answer::Seen(mut seen) => {
                if seen.status.is_none() {
                    seen.hangs |= server.seen().is_some_and(|before| before.hangs);
                    seen.status = server.seen().and_then(|before| before.status.clone());
                }
                Condition::Answers(seen)
            }
        };
    }

    /// The rows of the table that is shown, in order, and which of them is chosen.
    pub(super) fn rows(&self) -> (Vec<Row>, Option<usize>) {
        let rows = arrange(self.view.rows(&self.servers), &self.filter, self.sorted_by());
        let chosen = self.chosen[self.table()].as_ref();
        let place = chosen.and_then(|subject| rows.iter().position(|row| row.subject == *subject));
        let place = (!rows.is_empty()).then(|| place.unwrap_or(0));
        (rows, place)
    }

    /// The column by which rows are sorted; by what hurts without one.
    pub(super) const fn sorted_by(&self) -> Option<usize> {
        self.sort[self.table()]
    }

    /// The server of the chosen row.
    pub(super) fn chosen_server(&self) -> Option<&Server> {
        self.servers.get(self.chosen_subject()?.server())
    }

    const fn table(&self) -> usize {
        match self.view {
            View::Servers => 0,
            View::Exports => 1,
            View::Clients => 2,
        }
    }

    fn chosen_subject(&self) -> Option<Subject> {
        let (rows, place) = self.rows();
        Some(rows.get(place?)?.subject.clone())
    }

    /// Does what a key is for.
    pub(super) fn handle_key(&mut self, key: KeyEvent) -> Deed {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Deed::Quit;
        }
        match &mut self.mode {
            Mode::Look => return self.handle_look(key.code),
            Mode::Help => self.mode = Mode::Look,
            Mode::Filter => self.handle_filter(key),
            Mode::Ask(_) => return self.handle_dialog(key),
        }
        Deed::Nothing
    }

    fn handle_look(&mut self, key: KeyCode) -> Deed {
        match key {
            KeyCode::Char('q') => return Deed::Quit,
            KeyCode::Char('1') => self.view = View::Servers,
            KeyCode::Char('2') => self.view = View::Exports,
            KeyCode::Char('3') => self.view = View::Clients,
            KeyCode::Tab => self.view = View::ALL[(self.table() + 1) % View::ALL.len()],
            KeyCode::BackTab => self.view = View::ALL[(self.table() + View::ALL.len() - 1) % View::ALL.len()],
            KeyCode::Char('s') => {
                let next = self.sorted_by().map_or(0, |column| column + 1);
                self.sort[self.table()] = (next < self.view.columns().len()).then_some(next);
            }
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Char('?' | 'h') => self.mode = Mode::Help,
            KeyCode::Char('d') => self.begin_drain(),
            KeyCode::Char('r') => self.begin_redirect(),
            KeyCode::Esc => {
                self.filter.clear();
                self.message = None;
            }
            key => self.choose(key),
        }
        Deed::Nothing
    }

    fn choose(&mut self, key: KeyCode) {
        let (rows, Some(place)) = self.rows() else { return };
        let last = rows.len() - 1;
        let place = match key {
            KeyCode::Up | KeyCode::Char('k') => place.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => place + 1,
            KeyCode::PageUp => place.saturating_sub(PAGE),
            KeyCode::PageDown => place + PAGE,
            KeyCode::Home => 0,
            KeyCode::End => last,
            _ => return,
        };
        self.chosen[self.table()] = Some(rows[place.min(last)].subject.clone());
    }

    fn handle_filter(&mut self, key: KeyEvent) {
        match key.code {
            KeyCode::Enter => self.mode = Mode::Look,
            KeyCode::Esc => {
                self.filter.clear();
                self.mode = Mode::Look;
            }
            _ => edit(&mut self.filter, key),
        }
    }

    fn handle_dialog(&mut self, key: KeyEvent) -> Deed {
        let Mode::Ask(mut dialog) = std::mem::replace(&mut self.mode, Mode::Look) else { return Deed::Nothing };
        match dialog.handle_key(key, &self.servers) {
            Step::Stay => self.mode = Mode::Ask(dialog),
            Step::Leave => self.tell("nothing was changed", false),
            Step::Carry(order) => {
                self.tell(&format!("{}...", order.short()), false);
                return Deed::Carry(order);
            }
        }
        Deed::Nothing
    }

    fn begin_drain(&mut self) {
        let (server, export) = match self.chosen_subject() {
            Some(Subject::Server(server)) => (server, None),
            Some(Subject::Export(server, export)) => (server, Some(export)),
            Some(Subject::Client(..)) => return self.tell("d drains a server or an export: Tab shows them", true),
            None => return,
        };
        let Some(seen) = self.servers[server].seen() else {
            return self.tell("the server does not answer", true);
        };
        let is_out = match &export {
            None => seen.drain.is_draining(),
            Some(export) => is_drained(&seen.drain, export),
        };
        self.ask(if is_out { Dialog::undrain(server, export) } else { Dialog::drain(server, export, &self.servers) });
    }

    fn begin_redirect(&mut self) {
        match self.chosen_subject() {
            Some(Subject::Server(_)) => {
                self.tell("r redirects a client, or clients of an export: Tab shows them", true)
            }
            Some(Subject::Export(server, export)) => self.ask(Dialog::redirect_some(server, export)),
            Some(Subject::Client(server, id)) => {
                let seen = self.servers[server].seen();
                let client = seen.and_then(|seen| seen.load.clients.iter().find(|client| client.id == id));
                let Some(client) = client.cloned() else { return };
                self.ask(Dialog::redirect_one(server, &client, &self.servers));
            }
            None => {}
        }
    }

    fn ask(&mut self, dialog: Dialog) {
        self.message = None;
        self.mode = Mode::Ask(Box::new(dialog));
    }

    /// Says what came of an order, in the place of what was said before.
    pub(super) fn tell(&mut self, text: &str, is_bad: bool) {
        self.message = Some(Message { text: text.to_owned(), is_bad });
    }

    /// The number of the last sample of the chosen server.
    pub(super) fn sample(&self) -> Option<usize> {
        Some(to_usize(self.chosen_server()?.seen()?.load.sample))
    }
}

/// Puts what a key stands for behind a text, or takes something off it.
pub(super) fn edit(text: &mut String, key: KeyEvent) {
    match key.code {
        KeyCode::Backspace => drop(text.pop()),
        KeyCode::Char('u') if key.modifiers.contains(KeyModifiers::CONTROL) => text.clear(),
        KeyCode::Char(character)
            if !key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT)
                && text.chars().count() < LONGEST_TEXT =>
        {
            text.push(character);
        }
        _ => {}
    }
}

/// Short names for addresses: without the directory that they have in common.
fn names(addresses: &[String]) -> Vec<String> {
    let directory = |address: &String| address.rfind('/').map_or(0, |slash| slash + 1);
    let first = addresses.first().map_or("", |first| &first[..directory(first)]);
    let common = |address: &String| &address[..directory(address)] == first;
    if addresses.iter().all(common) {
        addresses.iter().map(|address| address[first.len()..].to_owned()).collect()
    } else {
        addresses.to_vec()
    }
}
