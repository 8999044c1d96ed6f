//! `headwater top` in a real terminal (tmux), watching real servers under load.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use headwater::units::ByteSize;
use serde_json::{Value, json};

use crate::admin::{ask, socket_of};
use crate::support::cache::index;
use crate::support::client::Client;
use crate::support::readers::Readers;
use crate::support::{Daemon, Scratch, eventually, headwater, noise, run, run_failing};

const SIZE: usize = 4 << 20;

/// A terminal that belongs to nobody, of 120 by 30 characters. It ends with the test.
struct Terminal {
    socket: PathBuf,
    scratch: PathBuf,
}

impl Terminal {
    /// With `headwater top` in it; after its end, what became of it and how the terminal is set.
    fn top(scratch: &Scratch, arguments: &[&str]) -> Self {
        let this = Self { socket: scratch.path("tmux"), scratch: scratch.path("") };
        let top = format!("echo $$ >pid; exec {} top {}", env!("CARGO_BIN_EXE_headwater"), arguments.join(" "));
        let shell = format!("cd {}; sh -c '{top}'; echo \"ended with $?\"; stty -a; exec cat", this.scratch.display());
        this.tmux(&["-f", "/dev/null", "-u", "new-session", "-d", "-x", "120", "-y", "30", &shell]);
        this
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        run(Command::new("tmux").arg("-S").arg(&self.socket).args(arguments))
    }

    /// What is on the screen, line by line.
    fn screen(&self) -> Vec<String> {
        self.tmux(&["capture-pane", "-p"]).lines().map(str::to_owned).collect()
    }

    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// Waits until the screen has this somewhere, and gives it.
    #[track_caller]
    fn wait_for(&self, text: &str) -> Vec<String> {
        let mut screen = Vec::new();
        eventually(&format!("{text:?} on the screen"), || {
            screen = self.screen();
            screen.iter().any(|line| line.contains(text))
        });
        screen
    }

    /// The screen, when it shows the same sample of the chosen server as its API: that sample too.
    fn at_one_moment(&self, socket: &Path) -> (Vec<String>, Value) {
        let mut both = None;
        eventually("screen of the moment of an answer", || {
            // One whole frame, and not two halves.
            let (before, load, after) = (self.screen(), load(socket), self.screen());
            let shown = before[0].rsplit_once("sample ").and_then(|(_, number)| number.trim().parse::<u64>().ok());
            both = Some((before.clone(), load.clone()));
            before == after && shown == load["sample"].as_u64()
        });
        both.unwrap()
    }

    /// The program in it.
    fn pid(&self) -> String {
        std::fs::read_to_string(self.scratch.join("pid")).unwrap().trim().to_owned()
    }

    /// Waits for its end, and whether the terminal is as it was: with lines, with echo, and without what was drawn.
    #[track_caller]
    fn assert_given_back(&self, code: u32) {
        self.wait_for(&format!("ended with {code}"));
        let screen = self.wait_for("icanon").join("\n");
        assert!(!screen.contains("-icanon") && screen.contains(" echo ") && !screen.contains("P99"), "{screen}");
        assert_eq!(self.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]).trim(), "0 1");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = Command::new("tmux").arg("-S").arg(&self.socket).arg("kill-server").output();
    }
}

fn load(socket: &Path) -> Value {
    let (code, load) = ask(socket, "GET /v1/load?seconds=5", "");
    assert_eq!(code, 200, "{load}");
    load
}

fn get(socket: &Path, path: &str) -> Value {
    let (code, value) = ask(socket, &format!("GET {path}"), "");
    assert_eq!(code, 200, "{value}");
    value
}

/// Two servers of one image, of which the first has work.
struct Pair {
    scratch: Scratch,
    first: Daemon,
    second: Daemon,
    bytes: Arc<Vec<u8>>,
}

impl Pair {
    fn new() -> Self {
        let scratch = Scratch::new();
        let bytes = Arc::new(noise(SIZE, 7));
        let image = scratch.file("image.raw", &bytes);
        index(&scratch, &image, &[]);
        let serve = |name: &str| {
            let log = scratch.path(&format!("{name}.log"));
            let mut command = headwater(&log);
            command.args(["serve", &format!("image={}", image.display()), "--read-only"]);
            command.arg("--unix").arg(scratch.path(&format!("{name}.sock")));
            Daemon::start(command, 1, &log)
        };
        let (first, second) = (serve("first"), serve("second"));
        Self { scratch, first, second, bytes }
    }

    fn sockets(&self) -> [PathBuf; 2] {
        [&self.first, &self.second].map(|server| socket_of(&self.scratch, server))
    }

    fn readers(&self, count: usize) -> Readers {
        Readers::start(std::iter::repeat_n(self.first.uri(), count), &self.bytes)
    }

    fn top(&self) -> Terminal {
        let sockets = self.sockets().map(|socket| socket.display().to_string());
        let terminal = Terminal::top(&self.scratch, &["--servers", &sockets.join(",")]);
        // Keys that come before it has the terminal are a line for somebody else.
        terminal.wait_for("2 of 2 servers answer");
        terminal
    }
}

/// The cells of the chosen row.
fn chosen(screen: &[String]) -> Vec<&str> {
    let rows: Vec<_> = screen.iter().filter_map(|line| line.strip_prefix('>')).collect();
    assert_eq!(rows.len(), 1, "{screen:#?}");
    rows[0].split_whitespace().collect()
}

/// As the program writes figures.
fn bytes(rates: &Value) -> String {
    let sum = rates["read_bytes_per_second"].as_f64().unwrap() + rates["written_bytes_per_second"].as_f64().unwrap();
    ByteSize(format!("{:.0}", sum.round()).parse().unwrap()).to_string()
}

fn number(value: &Value) -> String {
    let number = value.as_f64().unwrap();
    match number {
        0.0 => "0".to_owned(),
        10.0.. => format!("{number:.0}"),
        _ => format!("{number:.1}"),
    }
}

fn milliseconds(value: &Value) -> String {
    let time = value.as_f64().unwrap();
    match time {
        100.0.. => format!("{time:.0}"),
        10.0.. => format!("{time:.1}"),
        _ => format!("{time:.2}"),
    }
}

#[test]
fn what_it_shows_is_what_the_servers_say() {
    let pair = Pair::new();
    let [socket, _] = pair.sockets();
    let readers = pair.readers(3);
    let terminal = pair.top();
    let name = format!("{}.sock", pair.first.pid());
    // Only the server that has clients is to be chosen, in all tables.
    terminal.press(&["/", &name, "Enter"]);
    eventually("three clients in the figures", || {
        let load = load(&socket);
        let clients = load["clients"].as_array().unwrap();
        clients.len() == 3 && clients.iter().all(|client| !client["mean_ms"].is_null())
    });
    let (screen, load) = terminal.at_one_moment(&socket);
    let (row, total) = (chosen(&screen), &load["total"]);
    let expected = [
        &*name,
        "serve",
        &bytes(total),
        &number(&total["requests_per_second"]),
        &milliseconds(&total["latency"]["p99_ms"]),
        "0",
        "3",
    ];
    assert_eq!(row[..7], expected, "{screen:#?}\n{load:#}");
    assert!(total["requests_per_second"].as_f64().unwrap() > 1.0 && screen[1].contains("2 of 2 servers answer"));

    terminal.press(&["2"]);
    terminal.wait_for("[2 exports]");
    let (screen, load) = terminal.at_one_moment(&socket);
    let (row, export) = (chosen(&screen), &load["exports"][0]);
    assert_eq!(export["export"], "image");
    let rates = &export["rates"];
    let expected = [
        "image",
        &*name,
        &bytes(rates),
        &number(&rates["requests_per_second"]),
        &milliseconds(&rates["latency"]["p99_ms"]),
        &milliseconds(&rates["latency"]["mean_ms"]),
        "0",
        "3",
    ];
    assert_eq!(row[..8], expected, "{screen:#?}\n{load:#}");

    terminal.press(&["3"]);
    terminal.wait_for("[3 clients]");
    let (screen, load) = terminal.at_one_moment(&socket);
    for client in load["clients"].as_array().unwrap() {
        let id = client["id"].to_string();
        let rows = screen.iter().map(|line| line.trim_start_matches('>').split_whitespace().collect::<Vec<_>>());
        let row = rows.into_iter().find(|row| row.get(1) == Some(&&*id)).unwrap_or_else(|| panic!("{id}: {screen:#?}"));
        let expected = [
            client["peer"].as_str().unwrap(),
            &id,
            "image",
            &name,
            &bytes(&client["rates"]),
            &number(&client["rates"]["requests_per_second"]),
            &milliseconds(&client["mean_ms"]),
        ];
        assert_eq!(row[..7], expected, "{screen:#?}\n{load:#}");
    }
    readers.stop();
    terminal.press(&["q"]);
    terminal.assert_given_back(0);
}

#[test]
fn a_client_is_redirected_after_a_yes_and_not_after_a_no() {
    let pair = Pair::new();
    let [socket, _] = pair.sockets();
    let readers = pair.readers(2);
    let terminal = pair.top();
    terminal.press(&["/", &format!("{}.sock", pair.first.pid()), "Enter", "3"]);
    // The target is known when the other server has said what it has.
    let has_all = || terminal.screen().iter().filter(|line| line.contains("image")).count() == 2;
    eventually("both clients on the screen", has_all);
    terminal.wait_for("2 of 2 servers answer");
    // By number, so that rows stay where they are.
    terminal.press(&["s", "s", "End"]);
    let screen = terminal.wait_for("s sort: ID");
    let id: u64 = chosen(&screen)[1].parse().unwrap();
    let begin = || {
        // Places are those that were known when the question was asked.
        eventually("a place to go to", || {
            terminal.press(&["r"]);
            let is_known = terminal.wait_for(" where to? ").join("\n").contains(pair.second.uri());
            if !is_known {
                terminal.press(&["Escape"]);
                let is_gone = || !terminal.screen().iter().any(|line| line.contains(" where to? "));
                eventually("no question any more", is_gone);
            }
            is_known
        });
        terminal.press(&["Enter"]);
        let screen = terminal.wait_for("Do this? y/N").join("\n");
        assert!(screen.contains(&format!("Move client {id} (")), "{screen}");
        assert!(screen.contains(&format!("headwater redirect image --to '{}'", pair.second.uri())), "{screen}");
    };
    begin();
    terminal.press(&["n"]);
    terminal.wait_for("nothing was changed");
    assert_eq!(get(&socket, "/v1/redirects"), json!({"redirects": []}));
    begin();
    terminal.press(&["y"]);
    terminal.wait_for("order 1: 1 of 1 clients of image moved");
    let status = get(&socket, "/v1/status");
    for client in status["clients"].as_array().unwrap() {
        let expected = if client["id"] == id { json!(pair.second.uri()) } else { Value::Null };
        assert_eq!(client["relayed_to"], expected, "{client:#}");
    }
    readers.go_on(20);
    readers.stop();
}

#[test]
fn a_drain_is_ordered_after_a_yes_and_not_after_a_no() {
    let pair = Pair::new();
    let [socket, _] = pair.sockets();
    let terminal = pair.top();
    terminal.press(&["/", &format!("{}.sock", pair.first.pid()), "Enter", "2"]);
    eventually("the export on the screen", || terminal.screen().iter().any(|line| line.starts_with(">image")));
    let begin = || {
        terminal.press(&["d"]);
        terminal.wait_for("only newcomers are sent away");
        terminal.press(&["Enter"]);
        let screen = terminal.wait_for("Do this? y/N").join("\n");
        assert!(screen.contains("headwater drain image --at"), "{screen}");
    };
    begin();
    terminal.press(&["n"]);
    terminal.wait_for("nothing was changed");
    assert_eq!(get(&socket, "/v1/drain")["exports"], json!([]));
    begin();
    terminal.press(&["y"]);
    terminal.wait_for("image is out of service");
    assert_eq!(get(&socket, "/v1/drain")["exports"], json!(["image"]));
    terminal.wait_for("draining");
    // And back, which asks too.
    terminal.press(&["d"]);
    terminal.wait_for("Do this? y/N");
    terminal.press(&["Escape"]);
    terminal.wait_for("nothing was changed");
    assert_eq!(get(&socket, "/v1/drain")["exports"], json!(["image"]));
    terminal.press(&["d"]);
    terminal.wait_for("Do this? y/N");
    terminal.press(&["y"]);
    terminal.wait_for("image is in service again");
    assert_eq!(get(&socket, "/v1/drain")["exports"], json!([]));
    drop(Client::open(pair.first.uri()));
}

#[test]
fn a_server_that_is_lost_stays_on_the_screen_and_the_terminal_is_given_back_on_a_signal() {
    let pair = Pair::new();
    let name = format!("{}.sock", pair.second.pid());
    let terminal = pair.top();
    terminal.wait_for("2 of 2 servers answer");
    let Pair { scratch: _scratch, first, second, .. } = pair;
    second.kill();
    let screen = terminal.wait_for("NO ANSWER");
    assert!(
        screen.iter().any(|line| line.contains(&name) && line.contains("NO ANSWER: cannot connect")),
        "{screen:#?}"
    );
    terminal.wait_for("1 of 2 servers answer");
    // One that is there and hangs holds nobody up.
    first.signal("STOP");
    terminal.wait_for("nothing within 3 s");
    terminal.tmux(&["resize-window", "-x", "50", "-y", "12"]);
    terminal.press(&["?"]);
    terminal.wait_for(" keys ");
    terminal.press(&["x"]);
    first.signal("CONT");
    terminal.wait_for("1 of 2 servers answer");
    terminal.tmux(&["resize-window", "-x", "120", "-y", "30"]);
    run(Command::new("kill").args(["-TERM", &terminal.pid()]));
    terminal.assert_given_back(0);
}

#[test]
fn without_a_terminal_it_says_what_is_for_programs() {
    let complaint = run_failing(Command::new(env!("CARGO_BIN_EXE_headwater")).arg("top"));
    assert!(complaint.contains("headwater status --json"), "{complaint}");
}
