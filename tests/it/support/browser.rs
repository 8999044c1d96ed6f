//! A real browser without a screen: Chromium, driven by chromedriver, which speaks JSON over HTTP (W3C WebDriver), and by
//! its own protocol for what that lacks.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{SOON, Scratch, eventually};

/// A browser with one page. Its processes end with it, and its profile goes away.
pub(crate) struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: Scratch,
}

impl Browser {
    pub(crate) fn start() -> Self {
        let profile = Scratch::new();
        let mut command = Command::new("chromedriver");
        // A group of its own, which can be ended as a whole.
        command.arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut driver =
            command.spawn().unwrap_or_else(|error| panic!("chromedriver: {error}: tools/test installs it"));
        let port = port_of(&mut driver);
        let mut browser = Self { driver, port, session: String::new(), _profile: profile };
        let arguments = [
            "--headless=new".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-background-networking".to_owned(),
            "--window-size=1280,1000".to_owned(),
            format!("--user-data-dir={}", browser._profile.path("chromium").display()),
        ];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:loggingPrefs": { "browser": "ALL" },
            "goog:chromeOptions": { "args": arguments },
        }}});
        let session = browser.call("POST", "/session", &wanted);
        browser.session = session["sessionId"].as_str().unwrap().to_owned();
        browser
    }

    pub(crate) fn open(&self, url: &str) {
        self.command("url", &json!({ "url": url }));
    }

    /// What a script, which is the body of a function, returns.
    pub(crate) fn script(&self, script: &str) -> Value {
        self.command("execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until a script returns something true, and gives that back.
    pub(crate) fn wait_for(&self, script: &str) -> Value {
        let mut found = Value::Null;
        let what = format!("success of {script}");
        eventually(&what, || {
            found = self.script(script);
            !matches!(found, Value::Null | Value::Bool(false))
        });
        found
    }

    /// Types into the element that a selector names.
    pub(crate) fn type_into(&self, selector: &str, text: &str) {
        let found = self.command("element", &json!({ "using": "css selector", "value": selector }));
        let element = found.as_object().unwrap().values().next().unwrap().as_str().unwrap();
        self.command(&format!("element/{element}/value"), &json!({ "text": text }));
    }

    /// A command of the browser's own protocol.
    pub(crate) fn native(&self, command: &str, parameters: &Value) -> Value {
        self.command("goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    /// Shows the page as a screen of this width would, light or dark.
    pub(crate) fn look_like(&self, width: u64, scheme: &str) {
        let metrics = json!({ "width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": false });
        self.native("Emulation.setDeviceMetricsOverride", &metrics);
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.native("Emulation.setEmulatedMedia", &features);
    }

    /// What the page has complained of since this was asked last.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let entries = self.command("se/log", &json!({ "type": "browser" }));
        let bad = |entry: &&Value| entry["level"] == "SEVERE" || entry["level"] == "WARNING";
        entries.as_array().unwrap().iter().filter(bad).map(|entry| entry["message"].to_string()).collect()
    }

    fn command(&self, what: &str, body: &Value) -> Value {
        self.call("POST", &format!("/session/{}/{what}", self.session), body)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.try_call(method, path, body).unwrap();
        assert!(answer["error"].is_null(), "{method} {path} {body}: {answer}");
        answer
    }

    fn try_call(&self, method: &str, path: &str, body: &Value) -> std::io::Result<Value> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port))?;
        socket.set_read_timeout(Some(SOON))?;
        let (body, port) = (body.to_string(), self.port);
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(format!("{head}{body}").as_bytes())?;
        let mut answer: Value = serde_json::from_slice(&body_of(BufReader::new(socket))?)?;
        Ok(answer["value"].take())
    }
}

/// The body of an answer, as long as its head says: the driver does not close connections.
fn body_of(mut answer: impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        answer.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else {
            if line.trim().is_empty() {
                break;
            }
            continue;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(std::io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    answer.read_exact(&mut body)?;
    Ok(body)
}

/// The port that the driver has taken.
fn port_of(driver: &mut Child) -> u16 {
    let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
    let told = lines.map_while(Result::ok).find_map(|line| {
        let (_, port) = line.split_once("started successfully on port ")?;
        port.trim_end_matches('.').parse().ok()
    });
    told.expect("chromedriver says its port")
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser first: it does not belong to the driver's group. A session that is gone is as good.
        let _ = self.try_call("DELETE", &format!("/session/{}", self.session), &json!({}));
        let _ = Command::new("kill")
            .args(["-KILL", "--", &format!("-{}", self.driver.id())])
            .stderr(Stdio::null())
            .status();
        let _ = self.driver.wait();
    }
}
