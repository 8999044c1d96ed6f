//! The standard output stream, and the one line that says why a command failed.

use std::io::{self, Write};

/// Writes lines to the standard output. Nobody reading them any more is no failure.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// As [`print`], for what is not meant for people.
pub(super) fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Says why the command failed: the failure and its causes, in one line.
pub(super) fn complain(error: &anyhow::Error) {
    // There is nowhere left to say that this failed.
    let _ = writeln!(io::stderr().lock(), "headwater: {error:#}");
}
