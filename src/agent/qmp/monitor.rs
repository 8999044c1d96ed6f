//! A client of a monitor: one command at a time, over the unix socket of a running qemu.
//!
//! Owns: the connection, the numbers that commands and replies have in common, and how long is waited. Does not own:
//! what is asked, and what it means.
//!
//! A monitor serves one client at a time. A second one can connect, but gets no greeting until the first has left: so
//! that is what is told to whoever waits in vain.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::message::{Lines, Malformed, Message};

/// How long a monitor may take to greet.
const GREETING: Duration = Duration::from_secs(5);
/// How long a command may take. What changes the block nodes waits for the guest's requests in flight, and those may
/// wait for a server that is gone as long as qemu's own `reconnect-delay` says.
const COMMAND: Duration = Duration::from_secs(90);
/// Events, and replies to nothing that was asked, that may come before the reply.
const MAX_STRAY: usize = 100_000;
/// Bytes read at once.
const READ: usize = 64 << 10;

/// Why a monitor did not do what it was told.
#[derive(Debug, Error)]
pub enum MonitorError {
    /// Nobody listens there.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// It takes the connection and says nothing.
    #[error("the monitor says nothing: it serves one client at a time, and seems to have one already")]
    Busy,
    /// The connection broke.
    #[error("the monitor was lost: {0}")]
    Lost(io::Error),
    /// Whoever listens there is no monitor.
    #[error("this is no monitor of qemu: {0}")]
    Malformed(#[from] Malformed),
    /// Only events came.
    #[error("the monitor sends everything but the reply to {command}")]
    NoReply {
        /// What was asked.
        command: &'static str,
    },
    /// The reply did not come in time. Whether the command is carried out is not known.
    #[error("no reply to {command} within {} seconds", COMMAND.as_secs())]
    Late {
        /// What was asked.
        command: &'static str,
    },
    /// It says no.
    #[error("{command}: {description}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// The kind of error.
        class: String,
        /// What it says.
        description: String,
    },
}

impl MonitorError {
    /// Whether the monitor is fine, and has said no: it has changed nothing, and can be asked something else.
    pub(super) const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// A monitor that listens to us, and to nobody else.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: UnixStream,
    lines: Lines,
    last: u64,
}

impl Monitor {
    /// Connects to a monitor and waits until it greets.
    ///
    /// # Errors
    ///
    /// [`MonitorError::Busy`] when another client is served; [`MonitorError::Malformed`] when it is no monitor.
    pub(super) async fn open(socket: &Path) -> Result<Self, MonitorError> {
        match timeout(GREETING, UnixStream::connect(socket)).await {
            Ok(stream) => Self::greeted(stream.map_err(MonitorError::Connect)?, GREETING).await,
            Err(_) => Err(MonitorError::Busy),
        }
    }

    async fn greeted(stream: UnixStream, limit: Duration) -> Result<Self, MonitorError> {
        let mut monitor = Self { stream, lines: Lines::default(), last: 0 };
        match timeout(limit, monitor.receive()).await {
            Ok(Ok(Message::Greeting)) => {}
            Ok(Ok(_)) => return Err(Malformed::Unknown.into()),
            Ok(Err(error)) => return Err(error),
            // Who says something else, as the greeting of an NBD server, which has no line end, is no monitor.
            Err(_) if monitor.lines.is_empty() => return Err(MonitorError::Busy),
            Err(_) => return Err(Malformed::Unknown.into()),
        }
        monitor.call("qmp_capabilities", json!({})).await?;
        Ok(monitor)
    }

    /// Has a command carried out, and gives back what it returns.
    ///
    /// # Errors
    ///
    /// [`MonitorError::Refused`] leaves the monitor usable; after any other one it is to be opened again.
    pub(super) async fn call(&mut self, command: &'static str, arguments: Value) -> Result<Value, MonitorError> {
        self.last += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": self.last }).to_string();
        line.push('\n');
        match timeout(COMMAND, self.exchange(command, &line)).await {
            Ok(result) => result,
            Err(_) => Err(MonitorError::Late { command }),
        }
    }

    async fn exchange(&mut self, command: &'static str, line: &str) -> Result<Value, MonitorError> {
        self.stream.write_all(line.as_bytes()).await.map_err(MonitorError::Lost)?;
        for _ in 0..MAX_STRAY {
            match self.receive().await? {
                Message::Returned { id, value } if id == Some(self.last) => return Ok(value),
                // An error without a number is about what we sent last.
                Message::Failed { id, class, description } if id.is_none_or(|id| id == self.last) => {
                    return Err(MonitorError::Refused { command, class, description });
                }
                _ => {}
            }
        }
        Err(MonitorError::NoReply { command })
    }

    async fn receive(&mut self) -> Result<Message, MonitorError> {
        let mut bytes = vec![0; READ];
        loop {
            if let Some(message) = self.lines.next_message()? {
                return Ok(message);
            }
            match self.stream.read(&mut bytes).await.map_err(MonitorError::Lost)? {
                0 => return Err(MonitorError::Lost(io::ErrorKind::UnexpectedEof.into())),
                length => self.lines.push(&bytes[..length]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has `work` talk to a monitor that says `first`, and one of `answers` to each line that it is sent.
    async fn played<T>(first: &str, answers: &[&str], work: impl AsyncFnOnce(UnixStream) -> T) -> T {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let player = async move {
            theirs.write_all(first.as_bytes()).await.unwrap();
            for answer in answers {
                while theirs.read_u8().await.unwrap() != b'\n' {}
                theirs.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        tokio::join!(player, work(ours)).1
    }

    const HELLO: &str = "{\"QMP\": {}}\n";
    const READY: &str = "{\"return\": {}, \"id\": 1}\n";

    #[tokio::test]
    async fn replies_are_found_among_events() {
        let answer = "{\"event\": \"STOP\"}\n{\"return\": 1, \"id\": 1}\n{\"return\": 2, \"id\": 2}\n";
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"why\"}, \"id\": 3}\n";
        played(HELLO, &[READY, answer, refusal], async |stream| {
            let mut monitor = Monitor::greeted(stream, GREETING).await.unwrap();
            assert_eq!(monitor.call("one", json!({})).await.unwrap(), json!(2));
            let error = monitor.call("two", json!({})).await.unwrap_err();
            assert!(error.is_refusal() && error.to_string() == "two: why", "{error}");
            // It hangs up after its part.
            assert!(matches!(monitor.call("three", json!({})).await, Err(MonitorError::Lost(_))));
        })
        .await;
    }

    #[tokio::test]
    async fn a_flood_of_events_has_an_end() {
        let flood = "{\"event\": \"X\"}\n".repeat(MAX_STRAY);
        played(HELLO, &[READY, &flood], async |stream| {
            let mut monitor = Monitor::greeted(stream, GREETING).await.unwrap();
            assert!(matches!(monitor.call("x", json!({})).await, Err(MonitorError::NoReply { command: "x" })));
        })
        .await;
    }

    #[tokio::test]
    async fn a_monitor_that_does_not_greet_serves_somebody_else() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let result = Monitor::greeted(ours, Duration::from_millis(1)).await;
        assert!(matches!(result, Err(MonitorError::Busy)));
        let none = tempfile::tempdir().unwrap().path().join("none");
        assert!(matches!(Monitor::open(&none).await, Err(MonitorError::Connect(_))));
    }

    #[tokio::test]
    async fn an_nbd_server_is_no_monitor() {
        let result = played(READY, &[], async |stream| Monitor::greeted(stream, GREETING).await).await;
        assert!(matches!(result, Err(MonitorError::Malformed(_))));
        // Its greeting has no line end, and it waits for ours.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"NBDMAGICIHAVEOPT\0\x03").await.unwrap();
        let result = Monitor::greeted(ours, Duration::from_millis(1)).await;
        assert!(matches!(result, Err(MonitorError::Malformed(_))));
    }
}
