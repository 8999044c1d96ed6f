//! The admin API as it is described: who may ask, its parts, settings, its OpenAPI, and requests that a tool makes of that.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::admin::{ask, connect, ends_with, image, operator, raw, socket_of, status};
use crate::support::cables::Cables;
use crate::support::client::Client;
use crate::support::{Daemon, ON_DEMAND, SOON, Scratch, eventually, headwater, mirror_command, noise, run};

const MIB: u64 = 1 << 20;
const TOKEN: &str = "a-token-that-nobody-guesses";

fn token(scratch: &Scratch, name: &str, text: &str, mode: u32) -> PathBuf {
    let path = scratch.file(name, text.as_bytes());
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// Where a server that was told port 0 has its admin API.
fn admin_of(server: &Daemon) -> String {
    let log = server.log_text();
    let line = log.lines().find(|line| line.contains("\"admin API\"")).unwrap();
    serde_json::from_str::<Value>(line).unwrap()["address"].as_str().unwrap().to_owned()
}

/// A server whose admin API is on TCP.
fn on_tcp(scratch: &Scratch) -> (Daemon, String) {
    let token = token(scratch, "token", &format!("{TOKEN}\n"), 0o600);
    let arguments = ["--admin=127.0.0.1:0", "--admin-token", token.to_str().unwrap()];
    let server = Daemon::serve(scratch, &image(scratch), &arguments);
    let address = admin_of(&server);
    (server, address)
}

/// Sends a request by TCP; gives the head and the code of its answer.
fn by_tcp(address: &str, path: &str, headers: &str) -> (u16, Value) {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    raw(socket, format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n").as_bytes())
}

#[test]
fn requests_by_tcp_carry_the_token() {
    let scratch = Scratch::new();
    let (server, address) = on_tcp(&scratch);
    for (headers, code) in [
        (String::new(), 401),
        ("Authorization: Bearer another-token-that-is-wrong\r\n".to_owned(), 401),
        (format!("Authorization: Bearer {TOKEN}x\r\n"), 401),
        (format!("Authorization: Basic {TOKEN}\r\n"), 401),
        (format!("Authorization: Bearer {TOKEN}\r\n"), 200),
    ] {
        for path in ["/v1/status", "/v1/settings", "/v1/clients", "/v1/images/image"] {
            let (answered, answer) = by_tcp(&address, path, &headers);
            assert_eq!(answered, code, "{path} with {headers:?}: {answer}");
            assert_eq!(answer["error"].is_string(), code == 401, "{answer}");
        }
    }
    assert_eq!(by_tcp(&address, "/openapi.json", "").0, 200, "what it can do is no secret");
    let challenge = run(Command::new("curl").args(["-sSi", &format!("http://{address}/v1/status")]));
    assert!(challenge.to_lowercase().contains("www-authenticate: bearer"), "{challenge}");
    // And so do commands.
    let complaint = ends_with(1, &mut operator(&scratch, &["status", "--at", &address]));
    assert!(complaint.contains("--token FILE"), "{complaint}");
    let file = scratch.path("token");
    let text = run(operator(&scratch, &["status", "--at", &address, "--token"]).arg(&file));
    assert!(text.contains(&format!("process {}", server.pid())), "{text}");
    let port = address.rsplit_once(':').unwrap().1;
    let by_name = format!("localhost:{port}");
    run(operator(&scratch, &["settings", "--at", &by_name]).env("HEADWATER_TOKEN_FILE", &file));
    let wrong = token(&scratch, "wrong", "another-token-that-is-wrong", 0o600);
    let complaint = ends_with(1, operator(&scratch, &["status", "--at", &address, "--token"]).arg(wrong));
    assert!(complaint.contains("not the token"), "{complaint}");
    // Nobody looks for ports.
    ends_with(1, &mut operator(&scratch, &["status"]));
}

#[test]
fn a_port_without_a_good_token_is_refused_with_the_way_to_make_one() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let started = |token: Option<&Path>| {
        let mut command = headwater(&scratch.path("refused.log"));
        command.arg("serve").arg(&image).arg("--unix").arg(scratch.path("refused.sock")).arg("--admin=127.0.0.1:0");
        command.args(token.map(|token| format!("--admin-token={}", token.display())));
        ends_with(1, command.stderr(Stdio::piped()))
    };
    assert!(started(None).contains("umask 077"));
    assert!(started(Some(&token(&scratch, "open", TOKEN, 0o644))).contains("others may read"));
    assert!(started(Some(&token(&scratch, "short", "secret", 0o600))).contains("umask 077"));
    assert!(started(Some(&scratch.path("none"))).contains("cannot read the token"));
    // On a unix socket nobody is asked for one.
    let server = Daemon::serve(&scratch, &image, &[]);
    assert_eq!(ask(&socket_of(&scratch, &server), "GET /v1/status", "").0, 200);
}

#[test]
fn the_page_of_a_stranger_is_refused_on_every_way() {
    let scratch = Scratch::new();
    let (_server, address) = on_tcp(&scratch);
    let other = Scratch::new();
    let local = Daemon::serve(&other, &image(&other), &[]);
    let socket = socket_of(&other, &local);
    let by_unix = |headers: &str| raw(connect(&socket), format!("GET /v1/status HTTP/1.1\r\n{headers}\r\n").as_bytes());
    let allowed = format!("Authorization: Bearer {TOKEN}\r\n");
    for headers in [
        "Origin: http://evil.example\r\n",
        "Origin: null\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "Sec-Fetch-Site: same-site\r\n",
        "Host: localhost\r\n",
    ] {
        let (code, answer) = by_tcp(&address, "/v1/status", &format!("{headers}{allowed}"));
        assert!(code == 403 && answer["error"].is_string() && answer["pid"].is_null(), "{headers}: {code} {answer}");
        let (code, answer) = by_unix(&format!("Host: localhost:9000\r\n{headers}"));
        assert!(code == 403 && answer["pid"].is_null(), "{headers}: {code} {answer}");
        assert_eq!(by_tcp(&address, "/openapi.json", headers).0, 403, "{headers}");
    }
    for host in ["", "Host: evil.example\r\n", "Host: localhost.evil.example\r\n"] {
        assert_eq!(by_unix(host).0, 403, "{host}");
    }
    // A page of its own: of the port itself, and of the end of ssh -L.
    let own = format!("Origin: http://{address}\r\nSec-Fetch-Site: same-origin\r\n{allowed}");
    assert_eq!(by_tcp(&address, "/v1/status", &own).0, 200);
    let own = "Host: localhost:9000\r\nOrigin: http://localhost:9000\r\nSec-Fetch-Site: same-origin\r\n";
    assert_eq!(by_unix(own).0, 200);
    for host in ["localhost", "127.0.0.1:7", "[::1]:7"] {
        assert_eq!(by_unix(&format!("Host: {host}\r\nSec-Fetch-Site: none\r\n")).0, 200, "{host}");
    }
}

#[test]
fn each_part_of_the_status_can_be_had_by_itself() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, &format!("os/é={}", server.uri()), &["--cache-size=8M", ON_DEMAND]);
    let mut client = Client::open(mirror.uri());
    client.read(0, 4096);
    let socket = socket_of(&scratch, &mirror);
    let get = |path: &str| {
        let (code, answer) = ask(&socket, &format!("GET {path}"), "");
        assert_eq!(code, 200, "{path}: {answer}");
        answer
    };
    eventually("a chunk here", || get("/v1/status")["images"][0]["mirror"]["resident_bytes"] == 65_536);
    let mut status = get("/v1/status");
    let export = get("/v1/exports/os%2F%C3%A9");
    assert_eq!((&export["name"], &export["size"], &export["clients"]), (&json!("os/é"), &json!(MIB), &json!(1)));
    assert_eq!((&export["writable"], &export["draining"]), (&json!(false), &json!(false)));
    let flags: Vec<_> = export["flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap()).collect();
    assert!(flags.contains(&"read-only") && flags.contains(&"can-multi-conn"), "{flags:?}");
    assert_eq!(get("/v1/exports")["exports"], json!([export]));
    assert_eq!(get("/v1/images")["images"], status["images"]);
    assert_eq!(get("/v1/images/os%2F%C3%A9"), status["images"][0]);
    let without_time = |mut client: Value| {
        client["connected_seconds"].take();
        client
    };
    let told = without_time(status["clients"][0].take());
    assert_eq!(without_time(get("/v1/clients")["clients"][0].take()), told);
    assert_eq!(without_time(get("/v1/clients/1")), told);
    let mut cache = get("/v1/cache");
    // Others write to this disk too.
    for each in [&mut cache, &mut status["cache"]] {
        each["free_bytes"].take();
    }
    assert_eq!(cache, status["cache"]);
    let mut upstream = get("/v1/upstreams")["upstreams"][0].take();
    assert_eq!(upstream.as_object_mut().unwrap().remove("image"), Some(json!("os/é")));
    assert_eq!(upstream, status["images"][0]["mirror"]["upstreams"][0]);
    let (code, job) = ask(&socket, "POST /v1/images/os%2F%C3%A9/verify", "");
    assert_eq!(code, 200, "{job}");
    assert_eq!(get("/v1/jobs")["jobs"][0]["job"], job["job"]);
    let real = socket_of(&scratch, &server);
    assert_eq!(ask(&real, "GET /v1/cache", "").0, 404);
    assert_eq!(ask(&real, "GET /v1/upstreams", "").1, json!({"upstreams": []}));
    ask(&real, "POST /v1/exports/image/drain", "");
    assert_eq!(ask(&real, "GET /v1/exports/image", "").1["draining"], true);
}

#[test]
fn a_client_can_be_sent_away() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let socket = socket_of(&scratch, &server);
    let (mut first, mut second) = (Client::open(server.uri()), Client::open(server.uri()));
    first.read(0, 4096);
    second.read(0, 4096);
    let (code, closed) = ask(&socket, "DELETE /v1/clients/1", "");
    assert_eq!((code, &closed["id"], &closed["read_bytes"]), (200, &json!(1), &json!(4096)));
    eventually("one client less", || status(&scratch)["clients"].as_array().unwrap().len() == 1);
    second.read(0, 4096);
    assert_eq!(ask(&socket, "DELETE /v1/clients/1", "").0, 404);
    assert_eq!(ask(&socket, "GET /v1/clients/1", "").0, 404);
}

#[test]
fn the_level_of_the_log_changes_what_is_logged() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let socket = socket_of(&scratch, &server);
    let _clients = [1, 2, 3].map(|_| Client::open(server.uri()));
    let close = |id: u64| assert_eq!(ask(&socket, &format!("DELETE /v1/clients/{id}"), "").0, 200);
    let told = || {
        let log = server.log_text();
        log.lines().filter(|line| line.contains("closing a client's connection")).count()
    };
    assert_eq!(ask(&socket, "GET /v1/settings", "").1, json!({"log_level": "debug"}));
    close(1);
    assert_eq!(told(), 1);
    run(&mut operator(&scratch, &["settings", "log-level=warn"]));
    close(2);
    assert_eq!(told(), 1);
    let text = run(&mut operator(&scratch, &["settings", "log-level=info"]));
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["SETTING", "VALUE", "log-level", "info"]);
    close(3);
    assert_eq!(told(), 2);
    assert_eq!(server.log_text().matches("a setting was changed").count(), 2, "{}", server.log_text());
}

#[test]
fn a_smaller_cache_evicts_what_is_too_much_and_a_larger_one_keeps_more() {
    let scratch = Scratch::new();
    let bytes = noise(12 << 20, 3);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[ON_DEMAND]);
    let socket = socket_of(&scratch, &mirror);
    let allocated = || ask(&socket, "GET /v1/cache", "").1["allocated_bytes"].as_u64().unwrap();
    let read = || {
        let mut client = Client::open(mirror.uri());
        (0..12)
            .for_each(|part| assert!(client.read(part * MIB, MIB) == bytes[(part * MIB) as usize..][..MIB as usize]));
    };
    read();
    eventually("all of it here", || allocated() > 12 * MIB);
    let at = format!("--at={}", socket.display());
    run(&mut operator(&scratch, &["settings", &at, "cache-size=4M"]));
    eventually("the rest gone", || allocated() <= 4 * MIB);
    assert_eq!(ask(&socket, "GET /v1/cache", "").1["limit_bytes"], 4 * MIB);
    read();
    assert!(allocated() <= 4 * MIB);
    run(&mut operator(&scratch, &["settings", &at, "cache-size=none"]));
    // What had to go was used once only: it comes back when it is read again.
    eventually("all of it here again", || {
        read();
        allocated() > 12 * MIB
    });
}

#[test]
fn fills_go_as_fast_as_they_may_now() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(8 << 20, 5)), &["--read-only"]);
    // At a byte a second it would take months, and by the image's own rate too.
    for slow in ["fill-rate", "image-fill-rate"] {
        let arguments = ["--fill=background", &format!("--{slow}=1")];
        let mirror = Daemon::mirror_named(&scratch, slow, server.uri(), &arguments);
        let socket = socket_of(&scratch, &mirror);
        let resident = || ask(&socket, "GET /v1/images/image", "").1["mirror"]["resident_bytes"].as_u64().unwrap();
        Client::open(mirror.uri()).read(0, 4096);
        let field = slow.replace('-', "_");
        let (code, settings) = ask(&socket, "PATCH /v1/settings", &json!({ &field: 2 }).to_string());
        assert_eq!((code, &settings[&field]), (200, &json!(2)), "{settings}");
        assert!(resident() < 8 * MIB, "it was to be slow");
        let text =
            run(&mut operator(&scratch, &["settings", &format!("--at={}", socket.display()), &format!("{slow}=none")]));
        assert!(text.lines().any(|line| line.split_whitespace().eq([slow, "none"])), "{text}");
        eventually("all of it here", || resident() == 8 * MIB);
    }
}

#[test]
fn settings_are_changed_all_or_not_at_all() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &["--read-only", "--index", "--index-rate=5M"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--cache-size=8M", "--fill-rate=3M"]);
    let (real, mirrored) = (socket_of(&scratch, &server), socket_of(&scratch, &mirror));
    let of_mirror = json!({
        "log_level": "debug", "fill_rate": 3 * MIB, "image_fill_rate": null, "cache_size": 8 * MIB, "reserve": 0
    });
    assert_eq!(ask(&mirrored, "GET /v1/settings", "").1, of_mirror);
    assert_eq!(ask(&real, "GET /v1/settings", "").1, json!({"log_level": "debug", "index_rate": 5 * MIB}));
    for (body, code, why) in [
        (json!({"fill_rate": 5, "log_level": "warn", "cache_size": 4096}), 409, "must be more than that"),
        (json!({"fill_rate": 5, "cache_size": 0}), 400, "cache_size"),
        (json!({"fill_rate": 5, "index_rate": 7}), 409, "no index_rate"),
        (json!({"fill_rate": 5, "speed": 7}), 400, "unknown field `speed`"),
        (json!({"fill_rate": 5, "log_level": "loud"}), 400, "unknown variant `loud`"),
        (json!({"fill_rate": 5, "reserve": null}), 400, ""),
        (json!([]), 400, ""),
    ] {
        let (answered, answer) = ask(&mirrored, "PATCH /v1/settings", &body.to_string());
        let error = answer["error"].as_str().unwrap();
        assert!(answered == code && error.contains(why), "{body}: {answered} {error}");
    }
    assert_eq!(ask(&mirrored, "GET /v1/settings", "").1, of_mirror);
    assert_eq!(ask(&mirrored, "PATCH /v1/settings", "").1, of_mirror, "an empty order changes nothing");
    let complaint =
        ends_with(1, &mut operator(&scratch, &["settings", "--at", real.to_str().unwrap(), "fill-rate=1M"]));
    assert!(complaint.contains("no fill_rate") && complaint.contains("index_rate"), "{complaint}");
    let (code, changed) = ask(&real, "PATCH /v1/settings", "{\"index_rate\": null}");
    assert_eq!((code, changed), (200, json!({"log_level": "debug", "index_rate": null})));
}

fn document(socket: &Path) -> Value {
    let (code, document) = ask(socket, "GET /openapi.json", "");
    assert_eq!(code, 200);
    document
}

/// Path, method, and what is said of each operation.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    let of_path = |(path, item): (&String, &Value)| {
        let path = path.clone();
        let item = item.as_object().unwrap().clone();
        item.into_iter().map(move |(method, operation)| (path.clone(), method.to_uppercase(), operation))
    };
    paths.flat_map(of_path).collect()
}

#[test]
fn what_is_described_is_there_and_what_is_there_is_described() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &["--read-only"]);
    let socket = socket_of(&scratch, &server);
    let document = document(&socket);
    let operations = operations(&document);
    assert!(operations.len() > 35, "{}", operations.len());
    let mut ids = BTreeSet::new();
    for (path, method, operation) in &operations {
        let id = operation["operationId"].as_str().unwrap();
        assert!(ids.insert(id.to_owned()), "two operations are called {id}");
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{method} {path} says nothing");
        for name in ["image", ""] {
            let line = format!("{method} {}", path.replace("{name}", name).replace("{id}", "1"));
            let answer = {
                let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
                run_raw(&socket, &request)
            };
            let code = answer.split(' ').nth(1).unwrap().to_owned();
            assert!(operation["responses"][&code].is_object(), "{line}: {code} is not described: {answer}");
            assert!(!answer.contains("no such thing in this API"), "{line}: {answer}");
        }
    }
    // Routes are made of what is described, and nowhere else.
    let mut files = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/control")];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        seen += text.matches("routes!(").count();
        assert!(path.ends_with("api.rs") || !text.contains(".route("), "{} has a route of its own", path.display());
        assert!(!text.contains("axum::routing"), "{} has a route of its own", path.display());
    }
    assert!(seen > 10, "{seen}");
}

/// The answer to a request, as it comes.
fn run_raw(socket: &Path, request: &str) -> String {
    use std::io::{Read, Write};
    let mut socket = connect(socket);
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// A program of the environment for Python that `tools/test` makes.
fn python_tool(name: &str) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin").join(name);
    assert!(path.exists(), "{} is missing: tools/python makes it", path.display());
    Command::new(path)
}

/// `HEADWATER_RENEW=1 cargo nextest run --workspace the_description` writes it anew.
#[test]
fn the_description_is_valid_and_the_one_in_the_documents() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let text = serde_json::to_string_pretty(&document(&socket_of(&scratch, &server))).unwrap() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    if std::env::var_os("HEADWATER_RENEW").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == text, "docs/openapi.json is not what the server says: HEADWATER_RENEW=1 makes it anew");
    run(python_tool("openapi-spec-validator").arg(&path));
}

/// Sends a server the requests that a tool makes of its description: for each field and parameter the values at its
/// bounds and beyond, with any names; then chosen at random, with the names of what there is, so that orders are carried
/// out. The same requests each time.
fn try_generated(scratch: &Scratch, host: &Cables, address: &str) {
    let names = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/schemathesis.toml");
    for (arguments, phase) in [(vec![], "coverage"), (vec!["--config-file", names.to_str().unwrap()], "fuzzing")] {
        let mut tool = python_tool("schemathesis");
        tool.args(arguments).args(["--no-color", "run", &format!("http://{address}/openapi.json"), "--phases", phase]);
        tool.args(["-H", &format!("Authorization: Bearer {TOKEN}"), "--checks", CHECKS, "--continue-on-failure"]);
        tool.args(["--seed=1", "--generation-database=none", "--max-examples=20"]);
        // It leaves notes where it runs.
        let report = run(host.on(0, &tool).current_dir(scratch.path("")));
        assert!(report.contains(" passed"), "nothing was tried: {report}");
    }
}

/// No 500, no answer that is not described, no nonsense that is taken.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
    response_headers_conformance,response_schema_conformance,negative_data_rejection,unsupported_method";

/// Starts a server on a host of its own, where nothing that is ordered reaches anybody.
fn on_host(host: &Cables, scratch: &Scratch, mut command: Command, log: &Path) -> (Daemon, String) {
    let token = token(scratch, "token", TOKEN, 0o600);
    command.args(["--admin=127.0.0.1:0", "--admin-token"]).arg(token);
    let mut command = host.on(0, &command);
    command.stdout(Stdio::piped()).stderr(fs::File::options().append(true).open(log).unwrap());
    let server = Daemon::start(command, 1, log);
    let address = admin_of(&server);
    (server, address)
}

#[test]
fn generated_requests_get_described_answers_of_servers_and_mirrors() {
    let (scratch, host) = (Scratch::new(), Cables::new());
    let path = image(&scratch);
    crate::support::cache::index(&scratch, &path, &[]);
    let log = scratch.path("serve.log");
    let mut command = headwater(&log);
    command.arg("serve").arg(path).arg("--read-only").arg("--unix").arg(scratch.path("serve.sock"));
    let (server, of_server) = on_host(&host, &scratch, command, &log);
    let (log, command) = mirror_command(&scratch, "mirror", server.uri());
    let (mirror, of_mirror) = on_host(&host, &scratch, command, &log);
    std::thread::scope(|scope| {
        scope.spawn(|| try_generated(&scratch, &host, &of_server));
        try_generated(&scratch, &host, &of_mirror);
    });
    // And they serve as before, but for newcomers that were ordered to be sent away.
    for (server, address) in [(&server, &of_server), (&mirror, &of_mirror)] {
        let mut curl = Command::new("curl");
        curl.args(["-sSf", "-X", "DELETE", "-H", &format!("Authorization: Bearer {TOKEN}")]);
        run(&mut host.on(0, curl.arg(format!("http://{address}/v1/drain"))));
        assert_eq!(Client::open(server.uri()).read(0, MIB), noise(1 << 20, 1));
    }
}
