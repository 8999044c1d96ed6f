//! A browser without a screen, for pictures of the status page: Chromium, driven by chromedriver, which speaks JSON over
//! HTTP (W3C WebDriver).
//!
//! Owns: starting it, and what it is told. Does not own: what is shown in it.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use headwater::clock;
use load::children::{self, Cpus, Guard};
use serde_json::{Value, json};

/// How long the browser may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);
const GLANCE: Duration = Duration::from_millis(50);

/// A browser with one page. It ends with this.
#[derive(Debug)]
pub(crate) struct Browser {
    port: u16,
    session: String,
    _driver: Guard,
}

impl Browser {
    /// Starts it, with its profile and its messages in a directory.
    pub(crate) fn start(directory: &Path) -> anyhow::Result<Self> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = children::command(Cpus::Free, "chromedriver");
        command.arg(format!("--port={port}"));
        let driver = Guard::spawn(command, &directory.join("chromedriver.log"))?;
        let mut browser = Self { port, session: String::new(), _driver: driver };
        let deadline = clock::now() + PATIENCE;
        while browser.call("GET", "/status", None).is_err() {
            ensure!(clock::now() < deadline, "chromedriver does not answer: is chromium-driver installed?");
            std::thread::sleep(GLANCE);
        }
        let profile = format!("--user-data-dir={}", directory.join("chromium").display());
        let arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", &profile];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": { "args": arguments },
        }}});
        let session = browser.call("POST", "/session", Some(&wanted))?;
        browser.session = session["sessionId"].as_str().context("no session")?.to_owned();
        Ok(browser)
    }

    /// Opens a page.
    pub(crate) fn open(&self, url: &str) -> anyhow::Result<()> {
        self.command("url", &json!({ "url": url })).map(drop)
    }

    /// What a script, which is the body of a function, returns.
    pub(crate) fn script(&self, script: &str) -> anyhow::Result<Value> {
        self.command("execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Shows the page as a window of this size would, light or dark.
    pub(crate) fn look_like(&self, width: u32, height: u64, scheme: &str) -> anyhow::Result<()> {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.native("Emulation.setDeviceMetricsOverride", &metrics)?;
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.native("Emulation.setEmulatedMedia", &features).map(drop)
    }

    /// The picture of the window, as PNG in base 64.
    pub(crate) fn picture(&self) -> anyhow::Result<String> {
        let answer = self.native("Page.captureScreenshot", &json!({ "format": "png" }))?;
        Ok(answer["data"].as_str().context("no picture")?.to_owned())
    }

    fn native(&self, command: &str, parameters: &Value) -> anyhow::Result<Value> {
        self.command("goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    fn command(&self, what: &str, body: &Value) -> anyhow::Result<Value> {
        self.call("POST", &format!("/session/{}/{what}", self.session), Some(body))
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let (body, port) = (body.map_or_else(String::new, Value::to_string), self.port);
        let length = body.len();
        write!(
            socket,
            "{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer: Value = serde_json::from_slice(&body_of(BufReader::new(socket))?)?;
        let value = answer["value"].take();
        ensure!(value["error"].is_null(), "{path}: {value}");
        Ok(value)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends its browser by this; without it the guard kills both.
        let _ = self.call("DELETE", &format!("/session/{}", self.session), None);
    }
}

/// The body of an answer, as long as its head says: the driver does not close connections.
fn body_of(mut answer: impl BufRead) -> anyhow::Result<Vec<u8>> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        ensure!(answer.read_line(&mut line)? > 0, "an answer broke off");
        if line.trim().is_empty() {
            break;
        }
        if let Some((_, value)) = line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    answer.read_exact(&mut body)?;
    Ok(body)
}

/// Makes a unix socket reachable at a port of this machine, as `ssh -L` would, until this program ends. Gives the port.
pub(crate) fn forward(socket: PathBuf) -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let serve = move || {
        for client in listener.incoming().map_while(Result::ok) {
            // One that cannot be served sees its connection close.
            if let Ok(server) = UnixStream::connect(&socket) {
                let _ = relay(client, server);
            }
        }
    };
    std::thread::Builder::new().name("forward".into()).spawn(serve).context("starting a thread")?;
    Ok(port)
}

/// Each connection of the admin API carries one request: two threads that end with it.
fn relay(client: TcpStream, server: UnixStream) -> anyhow::Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let (mut from_server, mut to_client) = (server, client);
    let start = |copy: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name("relay".into()).spawn(copy).map(drop);
    start(Box::new(move || drop(std::io::copy(&mut from_client, &mut to_server))))?;
    start(Box::new(move || {
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    }))?;
    Ok(())
}

/// Decodes base 64 (RFC 4648, section 4); what is no letter of it is skipped.
pub(crate) fn from_base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut bytes, mut held, mut bits) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for sextet in text.bytes().filter_map(value) {
        held = held << 6 | u32::from(sextet);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits).to_be_bytes()[3]);
            held &= (1 << bits) - 1;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_64_is_that_of_the_rfc() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(from_base64(text), bytes.as_bytes());
        }
        assert_eq!(from_base64("+/+/"), [0xfb, 0xff, 0xbf]);
    }
}
