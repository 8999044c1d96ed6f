//! How `headwater top` looks.
//!
//! Owns: places, widths, styles. Does not own: what there is to be seen (`state`, `rows`). Everything fits itself into whatever
//! room there is; what is chosen and what is wrong can be told without colours.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Wrap};

use super::dialog::{Dialog, Question};
use super::rows::{Cell, Column, Row, Server, Tone, View, bytes, bytes_per_second, milliseconds, number};
use super::state::{Mode, State};
use super::watch::SECONDS;
use crate::cli::table::printable;

/// The least room for the first column.
const NARROWEST: usize = 10;
/// Between two columns.
const GAP: usize = 1;

/// How things are emphasised.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looks {
    /// Whether the terminal may be given colours.
    pub(super) has_colours: bool,
}

impl Looks {
    fn of(self, tone: Tone) -> Style {
        let (colour, modifier) = match tone {
            Tone::Plain => return Style::new(),
            Tone::Warning => (Color::Yellow, Modifier::empty()),
            Tone::Bad => (Color::Red, Modifier::BOLD),
        };
        let style = Style::new().add_modifier(modifier);
        if self.has_colours { style.fg(colour) } else { style }
    }

    const fn heading() -> Style {
        Style::new().add_modifier(Modifier::BOLD).add_modifier(Modifier::UNDERLINED)
    }

    const fn quiet() -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }
}

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, state: &State, looks: Looks) {
    let area = frame.area();
    let message = u16::from(state.message.is_some()) * 2;
    let parts = [1, 1, 1].map(Constraint::Length).into_iter();
    let parts = parts.chain([Constraint::Fill(1), Constraint::Length(message), Constraint::Length(1)]);
    let [title, totals, heading, table, told, keys] = Layout::vertical(parts).areas(area);
    draw_title(frame, title, state);
    frame.render_widget(Paragraph::new(summary(&state.servers)), totals);
    draw_table(frame, heading, table, state, looks);
    if let Some(message) = &state.message {
        let style = looks.of(if message.is_bad { Tone::Bad } else { Tone::Plain }).add_modifier(Modifier::BOLD);
        frame.render_widget(Paragraph::new(printable(&message.text)).style(style).wrap(Wrap { trim: true }), told);
    }
    frame.render_widget(Paragraph::new(key_line(state)), keys);
    match &state.mode {
        Mode::Look | Mode::Filter => {}
        Mode::Help => draw_box(frame, area, " keys ", help()),
        Mode::Ask(dialog) => draw_dialog(frame, area, dialog, state, looks),
    }
}

fn draw_title(frame: &mut Frame<'_>, area: Rect, state: &State) {
    let mut spans = vec![Span::styled("headwater top ", Modifier::BOLD)];
    for (number, view) in View::ALL.into_iter().enumerate() {
        let name = format!("{} {}", number + 1, view.name());
        spans.push(if view == state.view {
            Span::styled(format!("[{name}]"), Modifier::BOLD)
        } else {
            Span::styled(format!(" {name} "), Looks::quiet())
        });
    }
    frame.render_widget(Paragraph::new(Line::from(spans)), area);
    let corner = state.sample().map_or_else(String::new, |sample| format!(" sample {sample}"));
    frame.render_widget(Paragraph::new(Line::raw(corner).right_aligned()), tail(area, 16));
}

/// The last so many characters of a line, if there is room for as many before them.
fn tail(area: Rect, width: u16) -> Rect {
    let width = if area.width >= 60 { width.min(area.width) } else { 0 };
    Rect { x: area.right() - width, width, ..area }
}

fn summary(servers: &[Server]) -> String {
    let seen: Vec<_> = servers.iter().filter_map(Server::seen).collect();
    let totals = || seen.iter().map(|seen| &seen.load.total);
    let written = |cell: Cell| cell.written().to_owned();
    let requests = totals().map(|rates| rates.requests_per_second).sum();
    let worst = totals().filter_map(|rates| Some(rates.latency?.p99_ms)).reduce(f64::max);
    let clients: usize = seen.iter().map(|seen| seen.load.clients.len()).sum();
    format!(
        "{} of {} servers answer  {} bytes/s  {} requests/s  {clients} clients  worst p99 {} ms  over {SECONDS} s",
        seen.len(),
        servers.len(),
        written(bytes(totals().map(bytes_per_second).sum())),
        written(number(requests)),
        written(milliseconds(worst)),
    )
}

fn draw_table(frame: &mut Frame<'_>, heading: Rect, area: Rect, state: &State, looks: Looks) {
    let (rows, chosen) = state.rows();
    let columns = state.view.columns();
    let widths = widths(columns, &rows, usize::from(heading.width));
    let titles = columns.iter().enumerate().zip(&widths).filter_map(|((index, column), width)| {
        let width = (*width)?;
        let style = Looks::heading();
        let style = if state.sorted_by() == Some(index) { style.add_modifier(Modifier::REVERSED) } else { style };
        Some(Span::styled(fitted(column.title, width, column.is_figure), style))
    });
    frame.render_widget(Paragraph::new(spaced(" ", titles)), heading);
    let height = usize::from(area.height);
    let place = chosen.unwrap_or(0);
    let first = place.saturating_sub(height / 2).min(rows.len().saturating_sub(height));
    let lines = rows.iter().enumerate().skip(first).take(height).map(|(index, row)| {
        let is_chosen = chosen == Some(index);
        let style = looks.of(row.tone);
        let style = if is_chosen { style.add_modifier(Modifier::REVERSED) } else { style };
        line(row, columns, &widths, usize::from(area.width), is_chosen).style(style)
    });
    let mut lines: Vec<_> = lines.collect();
    if rows.is_empty() {
        lines.push(Line::raw(if state.filter.is_empty() { " nothing yet" } else { " nothing has that in it" }));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn line<'a>(row: &Row, columns: &[Column], widths: &[Option<usize>], room: usize, is_chosen: bool) -> Line<'a> {
    let mark = if is_chosen { ">" } else { " " };
    let Some(remark) = &row.remark else {
        let cells = row.cells.iter().zip(columns).zip(widths);
        let cells = cells.filter_map(|((cell, column), width)| Some(fitted(cell.written(), (*width)?, column.is_figure)));
        return spaced(mark, cells.map(Span::raw));
    };
    let name = row.cells.first().map_or("", Cell::written);
    let width = widths.first().copied().flatten().unwrap_or(NARROWEST);
    let rest = room.saturating_sub(width + mark.len() + GAP);
    spaced(mark, [fitted(name, width, false), cut(remark, rest)].map(Span::raw).into_iter())
}

fn spaced<'a>(mark: &'static str, cells: impl Iterator<Item = Span<'a>>) -> Line<'a> {
    let mut spans = vec![Span::raw(mark)];
    for (index, cell) in cells.enumerate() {
        if index > 0 {
            spans.push(Span::raw(" ".repeat(GAP)));
        }
        spans.push(cell);
    }
    Line::from(spans)
}

/// How wide each column is; `None` where there is no room for it. The first one gets what the others leave.
fn widths(columns: &[Column], rows: &[Row], room: usize) -> Vec<Option<usize>> {
    let wanted = |index: usize, column: &Column| {
        if column.is_figure {
            return column.width;
        }
        let cells = rows.iter().filter_map(|row| row.cells.get(index)).map(|cell| Span::raw(cell.written()).width());
        cells.max().unwrap_or(0).clamp(column.title.len(), column.width.max(column.title.len()))
    };
    let mut widths: Vec<_> = columns.iter().enumerate().map(|(index, column)| Some(wanted(index, column))).collect();
    let first = widths.first().copied().flatten().unwrap_or(0);
    // In front of the rows is a mark.
    let room = room.saturating_sub(1);
    let of_others = |widths: &[Option<usize>]| widths.iter().skip(1).flatten().map(|width| width + GAP).sum::<usize>();
    while of_others(&widths) + NARROWEST.min(first) > room {
        let shown = columns.iter().enumerate().skip(1).filter(|(index, _)| widths[*index].is_some());
        let Some((last, _)) = shown.max_by_key(|(_, column)| column.rank) else { break };
        widths[last] = None;
    }
    let rest = room.saturating_sub(of_others(&widths));
    if let Some(width) = widths.first_mut() {
        *width = Some(first.min(rest));
    }
    widths
}

/// A text in just so much room.
fn fitted(text: &str, width: usize, is_to_right: bool) -> String {
    let text = cut(text, width);
    let blank = " ".repeat(width.saturating_sub(Span::raw(&text).width()));
    if is_to_right { blank + &text } else { text + &blank }
}

/// What of a text has room, with a mark where the rest is missing.
fn cut(text: &str, width: usize) -> String {
    if Span::raw(text).width() <= width {
        return text.to_owned();
    }
    let mut kept = String::new();
    for character in text.chars() {
        kept.push(character);
        if Span::raw(&kept).width() + 1 > width {
            kept.pop();
            break;
        }
    }
    if width > 0 {
        kept.push('~');
    }
    kept
}

fn key_line(state: &State) -> String {
    if let Mode::Filter = state.mode {
        return format!("filter: {}_   Enter keeps it, Esc clears it", state.filter);
    }
    let by = state.sorted_by().and_then(|column| state.view.columns().get(column)).map_or("what hurts", |of| of.title);
    let filter = if state.filter.is_empty() { String::new() } else { format!("  with {:?} (Esc)", state.filter) };
    format!("? help  q quit  s sort: {by}  / filter{filter}  d drain  r redirect  Tab next table")
}

fn help() -> Vec<Line<'static>> {
    let keys = [
        ("1 2 3, Tab", "servers, exports, clients"),
        ("Up Down", "choose a row (also j, k, PgUp, PgDn, Home, End)"),
        ("s", "sort by the next column; by what hurts again at the end"),
        ("/", "show only rows with a text in them; Esc shows all again"),
        ("d", "drain the chosen server or export; again: take it into service"),
        ("r", "redirect the chosen client, or clients of the chosen export"),
        ("q, Ctrl-C", "quit; orders go on"),
        ("", ""),
        ("What hurts", "servers out of order, then errors, then the slowest, then most bytes"),
        ("P99, MEAN", "of reads and writes, over the last seconds; by doublings in the order"),
    ];
    keys.map(|(key, what)| Line::raw(format!("{key:<11} {what}"))).into()
}

fn draw_dialog(frame: &mut Frame<'_>, area: Rect, dialog: &Dialog, state: &State, looks: Looks) {
    let mut lines = Vec::new();
    let title = match &dialog.question {
        Question::Amount(typed) => {
            lines.push(Line::raw("How many of its clients? all, a number, or a part as in 50%"));
            lines.push(Line::styled(format!("> {typed}_"), Modifier::BOLD));
            " redirect: how many? Enter, Esc "
        }
        Question::Target { typed, suggestions, taken } => {
            lines.push(Line::styled(format!("> {}_", printable(typed)), Modifier::BOLD));
            lines.extend(suggestions.iter().enumerate().map(|(index, uri)| {
                let uri = if uri.is_empty() { "(nowhere: only newcomers are sent away)" } else { uri };
                Line::raw(format!("{} {}", if index == *taken { "*" } else { " " }, printable(uri)))
            }));
            if suggestions.is_empty() {
                lines.push(Line::raw("No other server here has it: write a URI, as in nbd://second/debian12"));
            }
            " where to? Up, Down, Enter, Esc "
        }
        Question::Sure => {
            lines.extend(dialog.words(&state.servers).iter().map(|words| Line::raw(printable(words))));
            " Do this? y/N "
        }
    };
    lines.extend(dialog.complaint.as_deref().map(|complaint| Line::styled(printable(complaint), looks.of(Tone::Bad))));
    draw_box(frame, area, title, lines);
}

/// A box over everything else, at the bottom, where the eye is after typing.
fn draw_box(frame: &mut Frame<'_>, area: Rect, title: &'static str, lines: Vec<Line<'_>>) {
    let inside = usize::from(area.width.saturating_sub(2)).max(1);
    let height: usize = lines.iter().map(|line| line.width().div_ceil(inside).max(1) + usize::from(line.width() > inside)).sum();
    let height = u16::try_from(height + 2).unwrap_or(u16::MAX).min(area.height);
    let place = Rect { y: area.bottom() - height, height, ..area };
    frame.render_widget(Clear, place);
    let block = Block::bordered().title(Span::styled(title, Modifier::BOLD));
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).block(block), place);
}
