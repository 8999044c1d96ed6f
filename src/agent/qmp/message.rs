//! What a monitor sends: JSON objects, one in each line, after qemu's `docs/interop/qmp-spec.rst`.
//!
//! Owns: cutting the stream into lines, within a bound, and telling replies, events and the greeting apart. Does not
//! own: the socket, and what the replies mean.

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

/// The longest line that is taken. A machine with a thousand block nodes describes them in about a megabyte.
pub const MAX_LINE: usize = 16 << 20;

/// One line of a monitor.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first one; it comes when the monitor begins to serve us.
    Greeting,
    /// A command was carried out.
    Returned {
        /// The number that the command was sent with.
        id: Option<u64>,
        /// What it gives back.
        value: Value,
    },
    /// A command was not carried out.
    Failed {
        /// The number that the command was sent with; none when it could not be read.
        id: Option<u64>,
        /// The kind of error, as `CommandNotFound`.
        class: String,
        /// What a human is told.
        description: String,
    },
    /// Something happened in the machine.
    Event,
}

/// What came is no monitor's line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Malformed {
    /// More than [`MAX_LINE`] bytes without an end.
    #[error("a line of more than {MAX_LINE} bytes")]
    TooLong,
    /// Not JSON, or JSON of another form.
    #[error("a line that is no reply, event or greeting")]
    Unknown,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    id: Option<Value>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Failure>,
}

#[derive(Deserialize)]
struct Failure {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// Takes one line apart.
///
/// # Errors
///
/// [`Malformed::Unknown`] for what is nothing that a monitor says.
pub fn decode(line: &[u8]) -> Result<Message, Malformed> {
    let line: Line = serde_json::from_slice(line).map_err(|_| Malformed::Unknown)?;
    let id = line.id.as_ref().and_then(Value::as_u64);
    match line {
        Line { error: Some(Failure { class, desc }), .. } => Ok(Message::Failed { id, class, description: desc }),
        Line { returned: Some(value), .. } => Ok(Message::Returned { id, value }),
        Line { event: Some(_), .. } => Ok(Message::Event),
        Line { greeting: Some(_), .. } => Ok(Message::Greeting),
        _ => Err(Malformed::Unknown),
    }
}

/// What was received and is not a whole line yet.
#[derive(Debug, Default)]
pub struct Lines {
    received: Vec<u8>,
    /// So many bytes at the front hold no line end.
    searched: usize,
}

impl Lines {
    /// Takes in what was received. It is to be emptied with [`Lines::next_message`] before more is given.
    pub fn push(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// Whether nothing is left of what was received.
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// The next whole line, if there is one.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the peer is no monitor; nothing that comes later can be understood then.
    pub fn next_message(&mut self) -> Result<Option<Message>, Malformed> {
        while let Some(end) = self.received[self.searched..].iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=self.searched + end).collect();
            self.searched = 0;
            if line.len() > MAX_LINE {
                return Err(Malformed::TooLong);
            }
            if !line.trim_ascii().is_empty() {
                return decode(line.trim_ascii()).map(Some);
            }
        }
        self.searched = self.received.len();
        if self.searched > MAX_LINE { Err(Malformed::TooLong) } else { Ok(None) }
    }
}

/// Takes arbitrary bytes as what a monitor sends, at once and byte by byte, and as what it says of its block devices.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let read = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let (mut lines, mut messages) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.push(piece);
            loop {
                match lines.next_message() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(_) => return (messages, false),
                }
            }
        }
        (messages, true)
    };
    let whole = read(&mut std::iter::once(data));
    assert_eq!(whole, read(&mut data.chunks(1)));
    let mut values = whole.0.into_iter().filter_map(|message| match message {
        Message::Returned { value, .. } => Some(value),
        _ => None,
    });
    if let (Some(nodes), Some(graph), Some(disks)) = (values.next(), values.next(), values.next()) {
        super::graph::fuzz(nodes, graph, disks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_are_told_apart() {
        let mut lines = Lines::default();
        lines.push(b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n\r\n");
        lines.push(b"{\"return\": {}, \"id\": 7}\r\n{\"timestamp\": {}, \"event\": \"RESET\"}\r\n");
        lines.push(b"{\"id\": 8, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n{\"ret");
        let failed = Message::Failed { id: Some(8), class: "GenericError".into(), description: "no".into() };
        let returned = Message::Returned { id: Some(7), value: json!({}) };
        for expected in [Message::Greeting, returned, Message::Event, failed] {
            assert_eq!(lines.next_message(), Ok(Some(expected)));
        }
        assert_eq!(lines.next_message(), Ok(None));
        lines.push(b"urn\": [1]}\n");
        assert_eq!(lines.next_message(), Ok(Some(Message::Returned { id: None, value: json!([1]) })));
        assert_eq!(lines.next_message(), Ok(None));
    }

    #[test]
    fn what_is_no_monitor_is_an_error() {
        for line in ["hello", "[]", "{}", "{\"event\": 1}", "{\"error\": \"x\"}", "NBDMAGIC", &"[".repeat(100_000)] {
            assert_eq!(decode(line.as_bytes()), Err(Malformed::Unknown), "{line:.20}");
        }
    }

    #[test]
    fn a_line_has_an_end() {
        let mut lines = Lines::default();
        lines.push(&vec![b' '; MAX_LINE]);
        assert_eq!(lines.next_message(), Ok(None));
        lines.push(b" ");
        assert_eq!(lines.next_message(), Err(Malformed::TooLong));
        let mut lines = Lines::default();
        lines.push(&vec![b' '; MAX_LINE]);
        lines.push(b"\n");
        assert_eq!(lines.next_message(), Err(Malformed::TooLong));
    }

    #[test]
    fn pieces_do_not_matter() {
        fuzz(b"{\"return\": []}\n{\"return\": {\"nodes\": [], \"edges\": []}}\n\n{\"return\": []}\nx\n");
    }
}
