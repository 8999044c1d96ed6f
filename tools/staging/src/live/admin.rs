//! Orders to a server, and what it says of its images: one request of HTTP for each, over its admin socket.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use headwater::control::status::Status;
use headwater::fill::deadline::Strategy;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of the longest one.
const LONGEST: u64 = 16 << 20;

/// Orders all of an image, by then.
pub(super) fn order(socket: &Path, image: &str, deadline: Option<Duration>, strategy: Strategy) -> anyhow::Result<()> {
    let order = serde_json::json!({
        "all": true,
        "deadline_seconds": deadline.map(|left| left.as_secs_f64()),
        "strategy": strategy,
    });
    call(socket, "POST", &format!("/v1/images/{image}/prefetch"), &order.to_string()).map(drop)
}

/// Bytes that have come of each image.
pub(super) fn received(socket: &Path) -> anyhow::Result<HashMap<String, u64>> {
    let status: Status =
        serde_json::from_str(&call(socket, "GET", "/v1/status", "")?).context("the server's status")?;
    let of = |image: headwater::control::status::ImageStatus| Some((image.name, image.mirror?.upstream_bytes));
    Ok(status.images.into_iter().filter_map(of).collect())
}

/// Gives the body of the answer.
fn call(socket: &Path, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // 1.0, so that the answer ends with the connection and is not cut into chunks.
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status.starts_with('2'), "{method} {path}: {status} {body}");
    Ok(body.to_owned())
}
