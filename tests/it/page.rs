//! The status page in a real browser: what it shows is what the API says, under change; it asks for the token; everybody
//! can read it.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use headwater::units::ByteSize;
use serde_json::{Value, json};

use crate::admin::{connect, raw};
use crate::support::browser::Browser;
use crate::support::client::Client;
use crate::support::readers::Readers;
use crate::support::{Daemon, ON_DEMAND, SOON, Scratch, eventually, headwater, mirror_command, noise, run};

const MIB: u64 = 1 << 20;
const TOKEN: &str = "a-token-that-nobody-guesses";
/// A name that would be a picture and a script, were it taken for markup.
const HOSTILE: &str = "<i>\"&'</i><svg onload";

/// A real image server, a mirror of it that shows the page, and two mirrors of that one.
struct Tree {
    origin: Daemon,
    site: Daemon,
    hosts: Vec<Daemon>,
    scratch: Scratch,
    /// The bytes that clients read.
    bytes: Arc<Vec<u8>>,
}

/// Where an admin API is.
#[derive(Clone)]
enum Place {
    Unix(PathBuf),
    Tcp(String),
}

impl Place {
    fn ask(&self, path: &str) -> (u16, Value) {
        let head = |host: &str, more: &str| format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n");
        match self {
            Self::Unix(socket) => raw(connect(socket), head("localhost", "").as_bytes()),
            Self::Tcp(address) => {
                let socket = TcpStream::connect(address).unwrap();
                socket.set_read_timeout(Some(SOON)).unwrap();
                raw(socket, head(address, &format!("Authorization: Bearer {TOKEN}\r\n")).as_bytes())
            }
        }
    }

    fn get(&self, path: &str) -> Value {
        let (code, answer) = self.ask(path);
        assert_eq!(code, 200, "{path}: {answer}");
        answer
    }
}

impl Tree {
    fn start() -> Self {
        let scratch = Scratch::new();
        let bytes = noise((8 * MIB) as usize, 1);
        let disk = scratch.sparse("disk.raw", 12 * MIB, &[(0, &bytes)]);
        let other = scratch.sparse("other.raw", 6 * MIB, &[(0, &bytes[..(4 * MIB) as usize])]);
        let token = scratch.file("token", TOKEN.as_bytes());
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
        let admin = |name: &str| format!("{}", scratch.path(&format!("{name}.admin")).display());

        let log = scratch.path("origin.log");
        let mut command = headwater(&log);
        command.arg("serve").arg(format!("disk={}", disk.display())).arg(format!("{HOSTILE}={}", other.display()));
        command.args(["--read-only", "--unix"]).arg(scratch.path("origin.sock")).args(["--admin", &admin("origin")]);
        let origin = Daemon::start(command, 2, &log);

        let upstreams: Vec<_> = origin.uris().to_vec();
        let (log, mut command) = mirror_command(&scratch, "site", &upstreams[0]);
        let neighbours = ["origin", "a", "b"].map(admin).join(",");
        command.arg(&upstreams[1]).args([ON_DEMAND, "--admin=127.0.0.1:0", "--neighbours", &neighbours]);
        command.arg("--admin-token").arg(&token);
        let site = Daemon::start(command, 2, &log);

        let disk_uri = site.uris().iter().find(|uri| uri.contains("/disk")).unwrap();
        let host = |name| {
            let (log, mut command) = mirror_command(&scratch, name, disk_uri);
            command.args([ON_DEMAND, "--admin", &admin(name)]);
            Daemon::start(command, 1, &log)
        };
        let hosts = vec![host("a"), host("b")];
        Self { origin, site, hosts, scratch, bytes: Arc::new(bytes) }
    }

    fn disk(&self) -> &str {
        self.site.uris().iter().find(|uri| uri.contains("/disk")).unwrap()
    }

    /// Where the page is.
    fn address(&self) -> String {
        let log = self.site.log_text();
        let line = log.lines().find(|line| line.contains("\"admin API\"")).unwrap();
        serde_json::from_str::<Value>(line).unwrap()["address"].as_str().unwrap().to_owned()
    }

    fn place(&self, name: &str) -> Place {
        match name {
            "site" => Place::Tcp(self.address()),
            _ => Place::Unix(self.scratch.path(&format!("{name}.admin"))),
        }
    }

    /// Runs a command for the server with the page.
    fn order(&self, words: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.args(words).args(["--at", &self.address(), "--token"]).arg(self.scratch.path("token"));
        run(&mut command)
    }

    /// Opens the page and shows the token to it.
    fn show(&self) -> Browser {
        let browser = Browser::start();
        browser.open(&format!("http://{}/", self.address()));
        browser.wait_for("return document.getElementById('ask').open");
        browser.type_into("#token", &format!("{TOKEN}\u{e007}"));
        browser.wait_for("return document.body.dataset.sample");
        browser
    }
}

/// Notes what servers say of each second, while a test looks at the page.
struct Notes {
    stop: Arc<AtomicBool>,
    said: Arc<Mutex<BTreeMap<(String, u64), Value>>>,
    thread: Option<JoinHandle<()>>,
}

impl Notes {
    fn start(tree: &Tree, names: &[&str]) -> Self {
        let places: Vec<_> = names.iter().map(|name| ((*name).to_owned(), tree.place(name))).collect();
        let (stop, said) = (Arc::<AtomicBool>::default(), Arc::<Mutex<BTreeMap<_, _>>>::default());
        let (halt, notes) = (Arc::clone(&stop), Arc::clone(&said));
        let thread = std::thread::spawn(move || {
            while !halt.load(Ordering::Relaxed) {
                for (name, place) in &places {
                    let load = place.get("/v1/load?seconds=5");
                    let sample = load["sample"].as_u64().unwrap();
                    notes.lock().unwrap().entry((name.clone(), sample)).or_insert(load);
                }
                std::thread::park_timeout(std::time::Duration::from_millis(100));
            }
        });
        Self { stop, said, thread: Some(thread) }
    }

    /// What a server said of a second; `None` if it has not been heard.
    fn of(&self, name: &str, sample: u64) -> Option<Value> {
        self.said.lock().unwrap().get(&(name.to_owned(), sample)).cloned()
    }

    /// Holds what the page shows against what was said of the same second, for a second of which all was heard.
    fn check(&self, browser: &Browser) -> Value {
        let mut shown = Value::Null;
        eventually("a second that the page shows and that was noted", || {
            shown = browser.script(SHOWN);
            let sample = shown["sample"].as_u64().unwrap();
            let Some(load) = self.of("site", sample) else { return false };
            compare_now(&shown["now"], &load);
            compare_rows(&shown["exports"], &load["exports"], "export");
            compare_rows(&shown["clients"], &load["clients"], "id");
            true
        });
        for server in shown["servers"].as_array().unwrap() {
            let name = server["name"].as_str().unwrap();
            // Of a server that is no neighbour nothing is known.
            let sample = server["sample"].as_str().and_then(|sample| sample.parse().ok());
            if let Some(load) = sample.and_then(|sample| self.of(name, sample)) {
                compare_rates(&server["figures"], &load["total"], name);
            }
        }
        shown
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok(), "a server could not be asked");
    }
}

/// All that the page shows just now, as it stands there: of each figure its value and its text.
const SHOWN: &str = r"
    const figures = (line) => Object.fromEntries([...line.children].map((cell) =>
        [cell.dataset.figure, { value: cell.dataset.value ?? null, text: cell.firstElementChild.innerText }]));
    const rows = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].map((line) => ({ ...line.dataset, figures: figures(line) }));
    const now = Object.fromEntries([...document.querySelectorAll('#now > div')].map((pair) =>
        [pair.dataset.figure, { value: pair.dataset.value, text: pair.lastElementChild.innerText }]));
    return { sample: Number(document.body.dataset.sample), now, servers: rows('servers'), links: rows('links'),
        exports: rows('exports'), clients: rows('clients') };
";

/// The number behind a figure; nothing where the API has `null`.
fn value(figure: &Value) -> Option<f64> {
    let text = figure["value"].as_str().unwrap_or_else(|| panic!("no value: {figure}"));
    (!text.is_empty()).then(|| text.parse().unwrap())
}

/// Bytes per second as they are written: cut off after three digits.
fn rate(bytes: f64) -> String {
    let units = [('E', 60), ('P', 50), ('T', 40), ('G', 30), ('M', 20), ('K', 10)];
    for (name, shift) in units {
        let number = bytes / f64::from(shift).exp2();
        if number >= 1.0 {
            let (digits, scale) = if number < 10.0 {
                (2, 100.0)
            } else if number < 100.0 {
                (1, 10.0)
            } else {
                (0, 1.0)
            };
            return format!("{:.digits$}{name}/s", (number * scale).floor() / scale);
        }
    }
    format!("{}/s", bytes.round())
}

fn ms(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value >= 9995.0 => format!("{:.0} s", value / 1000.0),
        Some(value) if value >= 999.5 => format!("{:.1} s", value / 1000.0),
        Some(value) if value >= 9.95 => format!("{value:.0} ms"),
        Some(value) if value >= 0.995 => format!("{value:.1} ms"),
        Some(value) => format!("{value:.2} ms"),
    }
}

fn figure(shown: &Value, name: &str, said: Option<f64>, of: &str) {
    // The last bit of a number is lost when JSON is read here.
    let is_same = match (value(&shown[name]), said) {
        (Some(shown), Some(said)) => (shown - said).abs() <= said.abs() * 1e-12,
        (shown, said) => shown == said,
    };
    assert!(is_same, "{name} of {of} should be {said:?}: {shown}");
}

fn compare_rates(shown: &Value, rates: &Value, of: &str) {
    for (name, field) in [
        ("requests", "requests_per_second"),
        ("read", "read_bytes_per_second"),
        ("written", "written_bytes_per_second"),
        ("errors", "errors_per_second"),
        ("waiting", "in_flight"),
    ] {
        figure(shown, name, rates[field].as_f64(), of);
    }
    assert_eq!(shown["read"]["text"], rate(rates["read_bytes_per_second"].as_f64().unwrap()), "{of}");
    for name in ["p50", "p99"] {
        if shown[name].is_null() {
            continue;
        }
        let said = rates["latency"][format!("{name}_ms")].as_f64();
        figure(shown, name, said, of);
        // Half a hundredth may be rounded either way.
        let near = |delta: f64| ms(said.map(|value| value + delta));
        let texts = [near(0.0), near(1e-9), near(-1e-9)];
        assert!(
            texts.iter().any(|text| shown[name]["text"] == **text),
            "{name} of {of}: {} is not {texts:?}",
            shown[name]
        );
    }
}

fn compare_now(shown: &Value, load: &Value) {
    compare_rates(shown, &load["total"], "the server");
    assert_eq!(shown["clients"]["text"], load["clients"].as_array().unwrap().len().to_string());
}

fn compare_rows(shown: &Value, said: &Value, key: &str) {
    let name = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let said: BTreeMap<_, _> = said.as_array().unwrap().iter().map(|one| (name(&one[key]), one)).collect();
    let attribute = if key == "id" { "client" } else { key };
    let shown: BTreeMap<_, _> = shown.as_array().unwrap().iter().map(|row| (name(&row[attribute]), row)).collect();
    assert_eq!(shown.keys().collect::<Vec<_>>(), said.keys().collect::<Vec<_>>());
    for (key, row) in shown {
        compare_rates(&row["figures"], &said[&key]["rates"], &key);
    }
}

/// Rows of a table, by one of their words.
fn row<'a>(shown: &'a Value, table: &str, key: &str, word: &str) -> &'a Value {
    let rows = shown[table].as_array().unwrap();
    rows.iter().find(|row| row[key] == word).unwrap_or_else(|| panic!("no {word} in {rows:?}"))
}

/// The sums of a picture, in words, as the page must have them.
fn sums(residency: &Value) -> String {
    let sum = |name: &str| residency[name].as_array().unwrap().iter().map(|cell| cell.as_u64().unwrap()).sum::<u64>();
    let size = residency["size"].as_u64().unwrap();
    let (resident, zero) = (sum("resident_bytes"), sum("zero_bytes"));
    let tenths = resident * 1000 / size;
    let mut words = format!("{} resident ({}.{} %)", ByteSize(resident), tenths / 10, tenths % 10);
    for (name, word) in [
        ("zero_bytes", "zero"),
        ("unread_bytes", "unread"),
        ("pinned_bytes", "pinned"),
        ("fetching_bytes", "under way"),
    ] {
        if sum(name) > 0 {
            words.push_str(&format!(", {} {word}", ByteSize(sum(name))));
        }
    }
    format!("{words}, {} absent", ByteSize(size - resident - zero))
}

#[test]
fn the_page_shows_what_the_api_says_while_that_changes() {
    let mut tree = Tree::start();
    let uris = [tree.hosts[0].uri(), tree.hosts[0].uri(), tree.hosts[1].uri(), tree.disk()].map(str::to_owned);
    let readers = Readers::start(uris.iter().map(String::as_str), &tree.bytes);
    let browser = tree.show();
    let notes = Notes::start(&tree, &["site", "origin", "a"]);

    // Who there is, and who reads from whom.
    browser.wait_for("return document.querySelectorAll('#links tbody tr').length === 4");
    let shown = notes.check(&browser);
    for (name, state) in [("site", "● answers"), ("origin", "● answers"), ("a", "● answers"), ("b", "● answers")]
    {
        assert_eq!(row(&shown, "servers", "name", name)["figures"]["state"]["text"], state);
    }
    let links: Vec<_> =
        shown["links"].as_array().unwrap().iter().map(|link| (&link["from"], &link["to"], &link["image"])).collect();
    for (from, to, image) in
        [("origin", "site", "disk"), ("origin", "site", HOSTILE), ("site", "a", "disk"), ("site", "b", "disk")]
    {
        assert!(links.contains(&(&json!(from), &json!(to), &json!(image))), "{links:?}");
    }

    // Client by client, export by export, second by second.
    readers.go_on(50);
    for _ in 0..3 {
        let shown = notes.check(&browser);
        let next = format!("return Number(document.body.dataset.sample) > {}", shown["sample"]);
        browser.wait_for(&next);
    }
    let clients = browser.script("return document.querySelectorAll('#clients tbody tr').length");

    // One more comes and leaves.
    let idle = Client::open(tree.disk());
    browser.wait_for(&format!("return document.querySelectorAll('#clients tbody tr').length > {clients}"));
    notes.check(&browser);
    idle.disconnect();
    browser.wait_for(&format!("return document.querySelectorAll('#clients tbody tr').length == {clients}"));
    notes.check(&browser);

    // A picture is what the API says, and so are pins.
    readers.stop();
    let picture =
        |browser: &Browser| browser.script("return document.querySelector('[data-image=disk] .sums').innerText");
    let residency = || tree.place("site").get("/v1/images/disk/residency?cells=256");
    eventually("the same picture", || picture(&browser) == sums(&residency()));
    let status = tree.place("site").get("/v1/status");
    let image = status["images"].as_array().unwrap().iter().find(|image| image["name"] == "disk").unwrap();
    let total =
        |name: &str| residency()[name].as_array().unwrap().iter().map(|cell| cell.as_u64().unwrap()).sum::<u64>();
    for name in ["resident_bytes", "zero_bytes", "pinned_bytes"] {
        assert_eq!(json!(total(name)), image["mirror"][name], "{name}");
    }
    tree.order(&["pin", "disk", "--range", "..1M"]);
    browser.wait_for(&format!("return document.querySelector('[data-image=disk]').dataset.pinnedBytes == {MIB}"));
    eventually("a picture with pins", || picture(&browser) == sums(&residency()));
    assert!(picture(&browser).as_str().unwrap().contains("1M pinned"));
    let pinned = browser.script("return [...document.querySelectorAll('[data-image=disk] [data-cell]')].filter((cell) => cell.querySelector('.pinned')).length");
    assert_eq!(pinned, json!(MIB / residency()["cell_bytes"].as_u64().unwrap()));

    // An order at work has its progress.
    tree.order(&["prefetch", HOSTILE, "--rate", "16K"]);
    let order = browser.wait_for("const line = document.querySelector('[data-order]'); return line && { ...line.dataset, bar: line.querySelector('progress').max }");
    assert_eq!(
        (&order["order"], &order["all"], &order["bar"]),
        (&json!("prefetch 1"), &json!((6 * MIB).to_string()), &json!(6 * MIB))
    );
    assert!(
        browser.script("return document.querySelector('[data-order]').innerText").as_str().unwrap().contains(HOSTILE)
    );

    // A mirror dies: its place stays, and says so.
    drop(notes);
    tree.hosts.pop().unwrap().kill();
    browser.wait_for("return document.querySelector('#servers [data-name=b]').dataset.reachable == 'false'");
    let shown = browser.script(SHOWN);
    assert_eq!(row(&shown, "servers", "name", "b")["figures"]["state"]["text"], "✕ away");
    assert_eq!(row(&shown, "links", "to", "b")["figures"]["state"]["text"], "✕ fails");
    assert_eq!(row(&shown, "servers", "name", "a")["figures"]["state"]["text"], "● answers");
    assert_eq!(
        browser.script("return document.querySelectorAll('#tiers .server.lost, #tiers path.edge.lost').length"),
        2
    );

    // All of it was text, came from this server, and a few requests at a time.
    assert_eq!(browser.script("return document.querySelectorAll('i').length"), 0);
    assert!(browser.script("return document.getElementById('images').innerText").as_str().unwrap().contains(HOSTILE));
    let strangers = browser.script("return performance.getEntriesByType('resource').map((one) => one.name).filter((name) => !name.startsWith(location.origin + '/'))");
    assert_eq!(strangers, json!([]));
    let at_once = browser.script("const all = performance.getEntriesByType('resource'); return Math.max(...all.map((one) => all.filter((other) => other.startTime <= one.startTime && other.responseEnd > one.startTime).length))");
    assert!(at_once.as_u64().unwrap() <= 10, "{at_once} requests at once");
    // The question without a token, which the browser tells of by itself.
    let complaints: Vec<_> =
        browser.complaints().into_iter().filter(|line| !line.contains("401 (Unauthorized)")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    drop(tree.origin);
}

#[test]
fn the_page_asks_for_the_token_and_says_when_its_server_is_away() {
    let tree = Tree::start();
    let browser = Browser::start();
    browser.open(&format!("http://{}/", tree.address()));
    browser.wait_for("return document.getElementById('ask').open");
    assert_eq!(browser.script("return document.activeElement.id"), "token", "one can type at once");
    browser.type_into("#token", "another-token-that-is-wrong\u{e007}");
    browser.wait_for("return document.getElementById('ask-error').innerText === 'The server refuses this token.'");
    assert_eq!(browser.script("return document.body.dataset.sample ?? null"), Value::Null);
    browser.type_into("#token", &format!("{TOKEN}\u{e007}"));
    browser.wait_for("return document.body.dataset.sample");
    assert_eq!(
        browser.script(
            "return [location.search + location.hash, document.cookie, localStorage.length, sessionStorage.length]"
        ),
        json!(["", "", 0, 1])
    );
    assert_eq!(browser.script("return document.getElementById('ask').open"), false);
    browser.wait_for("return document.getElementById('state').dataset.state === 'live'");

    // Kept for this tab.
    browser.open(&format!("http://{}/", tree.address()));
    browser.wait_for("return document.body.dataset.sample");
    assert_eq!(browser.script("return document.getElementById('ask').open"), false);

    // Stopped, not ended: it still takes connections, and says nothing.
    tree.site.kill();
    browser.wait_for("return document.getElementById('state').dataset.state === 'away'");
    let said = browser.script("return document.getElementById('state').innerText");
    assert!(said.as_str().unwrap().starts_with("The server does not answer: last seen "), "{said}");
    // It asks again, less and less often.
    browser.wait_for("return Number(document.body.dataset.failures) >= 3");
    assert_eq!(
        browser.script("return document.querySelectorAll('#servers tbody tr').length"),
        4,
        "what was known stays"
    );
}

#[test]
fn everybody_can_read_the_page() {
    let tree = Tree::start();
    let readers = Readers::start([tree.disk()], &tree.bytes);
    let browser = tree.show();
    readers.go_on(50);
    tree.order(&["pin", "disk", "--range", "..1M"]);
    tree.order(&["prefetch", HOSTILE, "--rate", "16K"]);
    browser.wait_for("return document.querySelector('[data-order]') && document.querySelector('.charts figure')");
    for (width, scheme) in [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark"), (320, "light")] {
        browser.look_like(width, scheme);
        let dark = browser.script("return matchMedia('(prefers-color-scheme: dark)').matches");
        assert_eq!(dark, scheme == "dark");
        browser.wait_for(&format!("const picture = document.querySelector('#tiers svg'); return innerWidth === {width} && picture.clientWidth <= {width}"));
        let wide = browser.script("return document.documentElement.scrollWidth");
        assert!(wide.as_u64().unwrap() <= width, "{wide} at {width}");
        let beyond = browser.script(BEYOND);
        assert_eq!(beyond, json!([]), "at {width}");
        assert_eq!(browser.script(PALE), json!([]), "{scheme} at {width}");
    }
    browser.look_like(1280, "light");

    // What a screen reader is told, as the browser itself computes it.
    let nodes = browser.native("Accessibility.getFullAXTree", &json!({}));
    let named = [
        "button",
        "link",
        "textbox",
        "slider",
        "progressbar",
        "ProgressIndicator",
        "image",
        "img",
        "table",
        "region",
        "dialog",
        "columnheader",
        "rowheader",
        "heading",
    ];
    let mut seen = BTreeMap::<String, u64>::new();
    for node in nodes["nodes"].as_array().unwrap().iter().filter(|node| node["ignored"] == false) {
        let role = node["role"]["value"].as_str().unwrap_or_default();
        if named.contains(&role) {
            assert!(
                !node["name"]["value"].as_str().unwrap_or_default().trim().is_empty(),
                "a {role} has no name: {node}"
            );
            *seen.entry(role.to_owned()).or_default() += 1;
        }
        *seen.entry(format!("any {role}")).or_default() += 1;
    }
    for role in ["link", "slider", "table", "columnheader", "rowheader", "heading"] {
        assert!(seen.contains_key(role), "there is no {role}: {seen:?}");
    }
    for role in ["any main", "any banner", "any contentinfo", "any status"] {
        assert_eq!(seen.get(role), Some(&1), "{role}: {seen:?}");
    }
    assert_eq!(browser.script("return [...document.querySelectorAll('table')].filter((table) => !table.caption || table.querySelectorAll('thead th:not([scope=col])').length).length"), 0);
    assert_eq!(
        browser.script("return document.querySelectorAll('h1').length + ' ' + document.documentElement.lang"),
        "1 en"
    );
    // Numbers that change every second are not read aloud.
    assert_eq!(browser.script("return [...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((each) => each.id).sort()"), json!(["ask-error", "news"]));

    // Cell by cell with the keys.
    browser.script("document.querySelector('[data-image=disk] .cells').focus()");
    let said = |browser: &Browser| {
        browser.script("const cells = document.activeElement; return [cells.getAttribute('aria-valuenow'), cells.getAttribute('aria-valuetext')]")
    };
    browser.wait_for("return document.activeElement.getAttribute('aria-valuetext').startsWith('0 to 64K: ')");
    browser.type_into("[data-image=disk] .cells", "\u{e014}\u{e014}");
    assert_eq!(said(&browser)[0], "2");
    assert!(
        said(&browser)[1].as_str().unwrap().starts_with("128K to 192K: 64K resident (100.0 %)"),
        "{}",
        said(&browser)
    );
    browser.type_into("[data-image=disk] .cells", "\u{e010}");
    assert!(said(&browser)[1].as_str().unwrap().starts_with("11.9M to 12M: "), "{}", said(&browser));
    readers.stop();
}

/// Elements that stick out of the window on its right.
const BEYOND: &str = r"
    return [...document.querySelectorAll('main *, header *, footer *')].filter((each) => each.getBoundingClientRect().right > innerWidth + 1
        && !each.closest('.unseen, thead') && getComputedStyle(each).display !== 'none').slice(0, 5).map((each) => each.outerHTML.slice(0, 200));
";

/// Texts that differ too little in brightness from what they stand on (WCAG 2.2, 1.4.3: 4.5 to 1).
const PALE: &str = r"
    const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number); return { r, g, b, a }; };
    const light = ({ r, g, b }) => [r, g, b].map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = (element) => {
        const box = element.closest('g.server, g.clients')?.querySelector('.box');
        if (box && element !== box) return parse(getComputedStyle(box).fill);
        for (let at = element; at; at = at.parentElement) { const color = parse(getComputedStyle(at).backgroundColor); if (color.a === 1) return color; }
        return parse('rgb(255, 255, 255)');
    };
    const texts = [...document.querySelectorAll('body *')].filter((each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
        && !each.closest('script, noscript, dialog, .unseen, .skip, thead') && each.getClientRects().length);
    return texts.map((each) => {
        const style = getComputedStyle(each);
        const ink = parse(each instanceof SVGElement ? style.fill : style.color);
        const [one, other] = [light(ink), light(ground(each))].sort((a, b) => b - a);
        return { text: each.textContent.slice(0, 40), ratio: (one + 0.05) / (other + 0.05) };
    }).filter(({ ratio }) => ratio < 4.5).slice(0, 5);
";
