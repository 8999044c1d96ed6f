//! `headwater top` without a terminal and without servers.

use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::{Color, Modifier};

use super::dialog::{Order, What};
use super::draw::{Looks, draw};
use super::rows::{Cell, Seen, Subject, View, milliseconds, number};
use super::state::{Answer, Deed, Mode, State};
use crate::control::load::{ClientLoad, ExportLoad, Latency, Load, Rates, UpstreamLoad};
use crate::control::status::{CacheStatus, DrainOrder, DrainStatus, ImageStatus, Kind, RedirectOrder, Status};

fn key(code: KeyCode) -> KeyEvent {
    KeyEvent::new(code, KeyModifiers::NONE)
}

fn press(state: &mut State, code: KeyCode) -> Deed {
    state.handle_key(key(code))
}

fn type_text(state: &mut State, text: &str) {
    for character in text.chars() {
        assert_eq!(press(state, KeyCode::Char(character)), Deed::Nothing);
    }
}

fn rates(bytes: f64, p99_ms: f64) -> Rates {
    let latency = Latency { mean_ms: p99_ms / 2.0, p50_ms: p99_ms / 2.0, p99_ms, longest_ms: p99_ms };
    Rates { requests_per_second: 100.0, read_bytes_per_second: bytes, latency: Some(latency), ..Rates::default() }
}

fn image(name: &str, identity: Option<&str>) -> ImageStatus {
    ImageStatus {
        name: name.into(),
        kind: Kind::Real,
        size: 1 << 30,
        writable: false,
        chunk_size: None,
        identity: identity.map(Into::into),
        path: "/x".into(),
        clients: 0,
        mirror: None,
    }
}

fn client(id: u64, export: &str) -> ClientLoad {
    ClientLoad {
        id,
        peer: format!("10.0.0.{id}:7"),
        export: export.into(),
        rates: Rates { read_bytes_per_second: 1e6, ..Rates::default() },
        mean_ms: Some(0.5),
        ..ClientLoad::default()
    }
}

/// A server with one export, `debian12`, and two clients of it.
fn seen(listen: &str, total: Rates) -> Seen {
    let load = Load {
        sample: 17,
        total,
        exports: vec![ExportLoad { export: "debian12".into(), clients: 2, rates: total, ..ExportLoad::default() }],
        clients: vec![client(1, "debian12"), client(2, "debian12")],
        ..Load::default()
    };
    let status =
        Status { images: vec![image("debian12", Some("blake3-aa"))], listen: vec![listen.into()], ..Status::default() };
    Seen { load, drain: DrainStatus::default(), status: Some(status), hangs: false }
}

/// Three servers: a fast one, a slow one, and one that does not answer.
fn three() -> State {
    let mut state = State::new(["/run/a.sock", "/run/b.sock", "/run/c.sock"].map(str::to_owned).into());
    state.handle_answer(0, Answer::Seen(Box::new(seen("nbd://a:7", rates(1e9, 0.2)))));
    state.handle_answer(1, Answer::Seen(Box::new(seen("nbd://b:7", rates(1e6, 40.0)))));
    state.handle_answer(2, Answer::Silent("cannot connect: refused".into()));
    state
}

fn drawn(state: &State, width: u16, height: u16, has_colours: bool) -> TestBackend {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, state, Looks { has_colours })).unwrap();
    terminal.backend().clone()
}

/// The lines of the screen.
fn lines(state: &State, width: u16, height: u16) -> Vec<String> {
    let backend = drawn(state, width, height, false);
    let buffer = backend.buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

fn names(state: &State) -> Vec<String> {
    state.rows().0.iter().map(|row| row.cells[0].written().to_owned()).collect()
}

#[test]
fn those_come_first_that_hurt() {
    let mut state = three();
    assert_eq!(names(&state), ["c.sock", "b.sock", "a.sock"]);
    let failing = Rates { errors_per_second: 0.5, ..rates(1.0, 0.1) };
    state.handle_answer(0, Answer::Seen(Box::new(seen("nbd://a:7", failing))));
    assert_eq!(names(&state), ["c.sock", "a.sock", "b.sock"], "errors are worse than waiting");
    let mut away = seen("nbd://b:7", rates(1.0, 0.1));
    let upstream = UpstreamLoad { node: "n".into(), current: true, reachable: Some(false), ..UpstreamLoad::default() };
    away.load.upstreams = vec![upstream];
    state.handle_answer(1, Answer::Seen(Box::new(away)));
    assert_eq!(names(&state), ["c.sock", "b.sock", "a.sock"], "out of order is worst");
    assert!(lines(&state, 140, 10)[4].contains("AWAY"), "{:?}", lines(&state, 140, 10));
}

#[test]
fn small_changes_do_not_move_rows() {
    let mut state = three();
    for (first, second) in [(1.5, 1.6), (1.6, 1.5)] {
        state.handle_answer(0, Answer::Seen(Box::new(seen("nbd://a:7", rates(2e6, first)))));
        state.handle_answer(1, Answer::Seen(Box::new(seen("nbd://b:7", rates(1e6, second)))));
        assert_eq!(names(&state), ["c.sock", "a.sock", "b.sock"]);
    }
}

#[test]
fn columns_sort_from_the_largest_and_names_from_a() {
    let mut state = three();
    press(&mut state, KeyCode::Char('s'));
    assert_eq!(names(&state), ["a.sock", "b.sock", "c.sock"]);
    (0..2).for_each(|_| drop(press(&mut state, KeyCode::Char('s'))));
    assert_eq!(View::Servers.columns()[state.sorted_by().unwrap()].title, "BYTES/S");
    assert_eq!(names(&state), ["a.sock", "b.sock", "c.sock"], "who has no figure comes last");
    (2..View::Servers.columns().len()).for_each(|_| drop(press(&mut state, KeyCode::Char('s'))));
    assert_eq!(state.sorted_by(), None);
}

#[test]
fn what_is_chosen_stays_chosen() {
    let mut state = three();
    press(&mut state, KeyCode::End);
    assert_eq!(state.chosen_server().unwrap().name, "a.sock");
    press(&mut state, KeyCode::Char('s'));
    assert_eq!(state.rows().1, Some(0));
    assert_eq!(state.chosen_server().unwrap().name, "a.sock");
    press(&mut state, KeyCode::Tab);
    press(&mut state, KeyCode::Down);
    press(&mut state, KeyCode::BackTab);
    assert_eq!(state.chosen_server().unwrap().name, "a.sock");
}

#[test]
fn filters_leave_what_has_the_text_in_it() {
    let mut state = three();
    press(&mut state, KeyCode::Char('/'));
    type_text(&mut state, "REFUSED");
    assert_eq!(names(&state), ["c.sock"], "also in what is said of it");
    press(&mut state, KeyCode::Enter);
    assert!(matches!(state.mode, Mode::Look) && names(&state).len() == 1);
    assert!(lines(&state, 100, 10)[9].contains("REFUSED"));
    press(&mut state, KeyCode::Esc);
    assert_eq!(names(&state).len(), 3);
    press(&mut state, KeyCode::Char('3'));
    press(&mut state, KeyCode::Char('/'));
    type_text(&mut state, "0.2:");
    assert_eq!(names(&state), ["10.0.0.2:7", "10.0.0.2:7"]);
}

#[test]
fn a_server_that_does_not_answer_stays_and_says_why() {
    let mut state = three();
    state.handle_answer(0, Answer::Silent("nothing within 3 s".into()));
    assert_eq!(names(&state).len(), 3);
    let screen = lines(&state, 80, 24);
    let line = screen.iter().find(|line| line.contains("a.sock")).unwrap();
    assert!(line.contains("NO ANSWER: nothing within 3 s"), "{screen:#?}");
    assert!(screen[1].contains("1 of 3 servers answer"), "{screen:#?}");
    press(&mut state, KeyCode::Char('2'));
    assert_eq!(names(&state), ["debian12"], "what it said before is not shown as if it were so now");
    let asked = seen("nbd://a:7", rates(1.0, 1.0));
    let unasked = Seen { status: None, ..asked };
    state.handle_answer(1, Answer::Seen(Box::new(unasked)));
    assert!(state.servers[1].seen().unwrap().status.is_some(), "a status is kept until the next one");
}

#[test]
fn wrong_things_are_red_and_told_without_colours_too() {
    let state = three();
    for has_colours in [true, false] {
        let backend = drawn(&state, 80, 24, has_colours);
        let buffer = backend.buffer();
        let cells: Vec<_> = buffer.content().iter().filter(|cell| cell.fg == Color::Red).collect();
        assert_eq!(!cells.is_empty(), has_colours);
        let coloured = buffer.content().iter().any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset);
        assert_eq!(coloured, has_colours);
        assert_eq!((buffer[(0, 3)].symbol(), buffer[(0, 4)].symbol()), (">", " "));
        assert!(buffer[(1, 3)].modifier.contains(Modifier::REVERSED | Modifier::BOLD));
    }
}

#[test]
fn a_screen_of_80_by_24_has_what_matters() {
    let mut state = three();
    let screen = lines(&state, 80, 24);
    assert!(screen[0].starts_with("headwater top [1 servers]"), "{screen:#?}");
    assert!(!screen[0].contains("sample"), "the chosen one does not answer");
    for title in ["SERVER", "BYTES/S", "P99 ms", "CLIENTS", "REQ/S", "ERR/S"] {
        assert!(screen[2].contains(title), "{screen:#?}");
    }
    assert!(screen[4].starts_with(" b.sock") && screen[4].contains("40.0"), "{screen:#?}");
    press(&mut state, KeyCode::End);
    assert!(lines(&state, 80, 24)[0].ends_with("sample 17"));
    press(&mut state, KeyCode::Char('3'));
    let screen = lines(&state, 40, 12);
    for title in ["CLIENT", "EXPORT", "BYTES/S", "MEAN ms"] {
        assert!(screen[2].contains(title), "{screen:#?}");
    }
    assert!(!screen[2].contains("WAITING"), "{screen:#?}");
}

#[test]
fn long_lists_scroll_with_what_is_chosen() {
    let mut state = three();
    let mut many = seen("nbd://a:7", rates(1.0, 1.0));
    many.load.clients = (1..=200).map(|id| client(id, "debian12")).collect();
    state.handle_answer(0, Answer::Seen(Box::new(many)));
    press(&mut state, KeyCode::Char('3'));
    for (code, has) in
        [(KeyCode::End, "> 10.0.0.200:7"), (KeyCode::Up, ">10.0.0.199:7"), (KeyCode::Home, ">10.0.0.1:7")]
    {
        press(&mut state, code);
        let screen = lines(&state, 80, 24);
        let marked: Vec<_> = screen.iter().filter(|line| line.starts_with('>')).collect();
        assert!(marked.len() == 1, "{has}: {screen:#?}");
    }
}

#[test]
fn a_drain_asks_first() {
    let order = |what| Order { server: 1, what };
    let begin = || {
        let mut state = three();
        press(&mut state, KeyCode::Down);
        assert_eq!(press(&mut state, KeyCode::Char('d')), Deed::Nothing);
        state
    };
    let mut state = begin();
    assert!(lines(&state, 80, 24).iter().any(|line| line.contains("nbd://a:7")), "{:#?}", lines(&state, 80, 24));
    assert_eq!(press(&mut state, KeyCode::Enter), Deed::Nothing);
    let screen = lines(&state, 80, 24).join("\n");
    assert!(screen.contains("Do this? y/N") && screen.contains("the whole server at /run/b.sock"), "{screen}");
    assert!(screen.contains("headwater drain --at /run/b.sock"), "{screen}");
    let deed = press(&mut state, KeyCode::Char('y'));
    assert_eq!(deed, Deed::Carry(order(What::Drain(None, DrainOrder::default()))));
    let mut state = begin();
    press(&mut state, KeyCode::Down);
    press(&mut state, KeyCode::Enter);
    let to = vec!["nbd://a:7/".to_owned()];
    let deed = press(&mut state, KeyCode::Char('Y'));
    assert_eq!(deed, Deed::Carry(order(What::Drain(None, DrainOrder { to, ..DrainOrder::default() }))));
}

#[test]
fn what_is_drained_is_taken_into_service() {
    let mut state = three();
    let mut drained = seen("nbd://a:7", rates(1.0, 1.0));
    drained.drain.exports = vec!["debian12".into()];
    state.handle_answer(0, Answer::Seen(Box::new(drained)));
    state.handle_answer(1, Answer::Silent("gone".into()));
    press(&mut state, KeyCode::Char('2'));
    assert!(lines(&state, 100, 9)[3].contains("draining"));
    press(&mut state, KeyCode::Char('d'));
    let screen = lines(&state, 100, 24).join("\n");
    assert!(screen.contains("headwater drain debian12 --cancel --at /run/a.sock"), "{screen}");
    let undrain = Order { server: 0, what: What::Undrain(Some("debian12".into())) };
    assert_eq!(press(&mut state, KeyCode::Char('y')), Deed::Carry(undrain));
}

#[test]
fn a_client_is_redirected_to_where_its_image_is() {
    let mut state = three();
    // The same name with other contents is no place for it.
    let mut other = seen("nbd://c:7", rates(0.0, 0.1));
    other.status.as_mut().unwrap().images = vec![image("debian12", Some("blake3-bb"))];
    state.handle_answer(2, Answer::Seen(Box::new(other)));
    press(&mut state, KeyCode::Char('3'));
    type_filter(&mut state, "a.sock");
    press(&mut state, KeyCode::End);
    press(&mut state, KeyCode::Char('r'));
    let screen = lines(&state, 100, 24).join("\n");
    assert!(screen.contains("nbd://b:7/debian12") && !screen.contains("nbd://c"), "{screen}");
    press(&mut state, KeyCode::Enter);
    let screen = lines(&state, 100, 24).join("\n");
    assert!(screen.contains("client 2 (10.0.0.2:7)") && screen.contains("--clients 2"), "{screen}");
    let chosen =
        RedirectOrder { to: vec!["nbd://b:7/debian12".into()], clients: Some(vec![2]), ..RedirectOrder::default() };
    let order = Order { server: 0, what: What::Redirect("debian12".into(), chosen) };
    assert_eq!(press(&mut state, KeyCode::Char('y')), Deed::Carry(order));
}

fn type_filter(state: &mut State, text: &str) {
    press(state, KeyCode::Char('/'));
    type_text(state, text);
    press(state, KeyCode::Enter);
}

#[test]
fn of_the_clients_of_an_export_some_are_redirected() {
    let all = RedirectOrder { all: true, ..RedirectOrder::default() };
    let part = |part| Some(RedirectOrder { fraction: Some(part), ..RedirectOrder::default() });
    let count = |count| Some(RedirectOrder { count: Some(count), ..RedirectOrder::default() });
    for (typed, expected) in [
        ("all", Some(all.clone())),
        ("", Some(all)),
        ("50%", part(0.5)),
        ("0.25", part(0.25)),
        ("1", count(1)),
        ("0", None),
        ("101%", None),
        ("-1", None),
        ("nan", None),
        ("some", None),
    ] {
        let mut state = three();
        press(&mut state, KeyCode::Char('2'));
        type_filter(&mut state, "a.sock");
        press(&mut state, KeyCode::Char('r'));
        state.handle_key(KeyEvent::new(KeyCode::Char('u'), KeyModifiers::CONTROL));
        type_text(&mut state, typed);
        press(&mut state, KeyCode::Enter);
        let Some(expected) = expected else {
            assert!(lines(&state, 100, 24).join("\n").contains("write all"), "{typed}");
            continue;
        };
        press(&mut state, KeyCode::Enter);
        let to = vec!["nbd://b:7/debian12".to_owned()];
        let what = What::Redirect("debian12".into(), RedirectOrder { to, ..expected });
        assert_eq!(press(&mut state, KeyCode::Char('y')), Deed::Carry(Order { server: 0, what }), "{typed}");
    }
}

#[test]
fn a_place_that_is_none_is_asked_for_again() {
    let mut state = three();
    press(&mut state, KeyCode::Char('3'));
    press(&mut state, KeyCode::Char('r'));
    state.handle_key(KeyEvent::new(KeyCode::Char('u'), KeyModifiers::CONTROL));
    type_text(&mut state, "http://x");
    press(&mut state, KeyCode::Enter);
    assert!(matches!(&state.mode, Mode::Ask(dialog) if dialog.complaint.is_some()));
    assert_eq!(press(&mut state, KeyCode::Esc), Deed::Nothing);
    assert_eq!(state.message.as_ref().unwrap().text, "nothing was changed");
}

#[test]
fn keys_that_do_not_fit_say_which_do() {
    let mut state = three();
    press(&mut state, KeyCode::Char('r'));
    assert!(state.message.as_ref().unwrap().text.contains("redirects a client"));
    press(&mut state, KeyCode::Char('d'));
    assert!(state.message.as_ref().unwrap().text.contains("does not answer"));
    press(&mut state, KeyCode::Char('3'));
    press(&mut state, KeyCode::Char('d'));
    assert!(state.message.as_ref().unwrap().text.contains("drains a server"));
    assert!(matches!(state.mode, Mode::Look));
}

#[test]
fn servers_without_a_figure_have_none() {
    let mut state = State::new(vec!["127.0.0.1:9".into()]);
    assert!(lines(&state, 80, 24)[3].contains("asking..."));
    let mut failed = seen("nbd://a:1", Rates::default());
    let cache = CacheStatus { failed: true, limit_bytes: Some(100), allocated_bytes: 25, ..CacheStatus::default() };
    failed.status.as_mut().unwrap().cache = Some(cache);
    state.handle_answer(0, Answer::Seen(Box::new(failed)));
    let rows = state.rows().0;
    let at = |title: &str| {
        let place = View::Servers.columns().iter().position(|column| column.title == title).unwrap();
        rows[0].cells[place].clone()
    };
    assert_eq!(at("P99 ms"), Cell::Figure(None, "-".into()));
    assert_eq!(at("CACHE %"), Cell::Figure(Some(25.0), "25".into()));
    assert_eq!(at("STATE"), Cell::Text("DISK FAILED".into()));
    assert_eq!(rows[0].subject, Subject::Server(0));
    let hanging = Seen { status: None, hangs: true, ..seen("nbd://a:1", Rates::default()) };
    state.handle_answer(0, Answer::Seen(Box::new(hanging)));
    let unasked = Seen { status: None, ..seen("nbd://a:1", Rates::default()) };
    state.handle_answer(0, Answer::Seen(Box::new(unasked)));
    assert!(lines(&state, 140, 24)[3].contains("DISK HANGS"), "it is not known to be over");
}

#[test]
fn figures_are_short() {
    for (figure, text) in [(0.0, "0"), (0.25, "0.2"), (3.0, "3"), (9.96, "10.0"), (1234.4, "1234"), (2.5e6, "2.5M")] {
        assert_eq!(number(figure).written(), text);
    }
    for (time, text) in [(0.034, "0.03"), (9.99, "9.99"), (12.34, "12.3"), (1234.5, "1234")] {
        assert_eq!(milliseconds(Some(time)).written(), text);
    }
}

fn any_key() -> impl Strategy<Value = KeyEvent> {
    let codes = vec![
        KeyCode::Tab,
        KeyCode::BackTab,
        KeyCode::Up,
        KeyCode::Down,
        KeyCode::PageUp,
        KeyCode::PageDown,
        KeyCode::Home,
        KeyCode::End,
        KeyCode::Enter,
        KeyCode::Esc,
        KeyCode::Backspace,
    ];
    let letters = prop::sample::select("123sdr/?yn05%alqx".chars().map(KeyCode::Char).collect::<Vec<_>>());
    prop_oneof![prop::sample::select(codes), letters].prop_map(key)
}

proptest! {
    /// Nothing is done that was not asked about, whatever is typed, and everything fits into every screen.
    #[test]
    fn only_a_yes_to_the_question_gives_an_order(
        keys in prop::collection::vec(any_key(), 0..40), width in 1..120u16, height in 1..30u16,
    ) {
        let mut state = three();
        for key in keys {
            let screen = lines(&state, 90, 40).join("\n");
            let deed = state.handle_key(key);
            if let Deed::Carry(_) = deed {
                prop_assert!(screen.contains("Do this? y/N") && matches!(key.code, KeyCode::Char('y')));
            }
            drawn(&state, width, height, true);
        }
    }
}
