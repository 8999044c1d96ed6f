//! Finding the running server that a command is for, and its images.

use std::path::PathBuf;

use anyhow::bail;
use tokio::runtime::{Builder, LocalOptions};

use super::args::{RunningServer, Servers, Span, TokenFile};
use crate::control::place::Surroundings;
use crate::control::status::{ImageStatus, Range};
use crate::control::{AdminAddress, Client, Token};
use crate::units::ByteSize;

/// Runs what a command does.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?.block_on(work)
}

/// The server that was named, or the only one there is.
pub(super) async fn reach(server: RunningServer) -> anyhow::Result<Client> {
    match server.at {
        Some(address) => {
            let token = read_token(&server.token, std::slice::from_ref(&address))?;
            Ok(Client::new(address).with_token(token))
        }
        None => Ok(Surroundings::of_process().find_server().await?),
    }
}

/// The servers that were named, or all there are.
pub(super) async fn reach_all(servers: Servers) -> anyhow::Result<Vec<Client>> {
    if servers.servers.is_empty() {
        return Ok(Surroundings::of_process().find_servers().await?);
    }
    clients(servers.servers, &servers.token)
}

/// Whom to speak to at these addresses.
pub(super) fn clients(addresses: Vec<AdminAddress>, token: &TokenFile) -> anyhow::Result<Vec<Client>> {
    let token = read_token(token, &addresses)?;
    Ok(addresses.into_iter().map(|address| Client::new(address).with_token(token.clone())).collect())
}

/// The token that was named, if any of these servers may ask for it.
fn read_token(token: &TokenFile, addresses: &[AdminAddress]) -> anyhow::Result<Option<Token>> {
    let is_wanted = addresses.iter().any(|address| matches!(address, AdminAddress::Tcp(_)));
    let file = token.file.clone().or_else(|| std::env::var_os("HEADWATER_TOKEN_FILE").map(PathBuf::from));
    Ok(file.filter(|_| is_wanted).map(|file| Token::read(&file)).transpose()?)
}

/// The image called `name`.
pub(super) async fn find_image(client: &Client, name: &str) -> anyhow::Result<ImageStatus> {
    let (_, status) = client.status().await?;
    let names: Vec<_> = status.images.iter().map(|image| format!("{:?}", image.name)).collect();
    match status.images.into_iter().find(|image| image.name == name) {
        Some(image) => Ok(image),
        None => bail!("the server has no image {name:?}: try one of {}", names.join(", ")),
    }
}

/// Parts of an image of `size` bytes; `None` is all of it.
pub(super) fn ranges(spans: &[Span], size: u64) -> anyhow::Result<Option<Vec<Range>>> {
    if spans.is_empty() {
        return Ok(None);
    }
    let within = |span: &Span| {
        let end = span.end.unwrap_or(size);
        if span.start >= size || end > size {
            bail!("the image ends at {} ({size} bytes), before the end of the range", ByteSize(size));
        }
        Ok(Range { start: span.start, length: end - span.start })
    };
    spans.iter().map(within).collect::<anyhow::Result<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_with_the_image() {
        let of = |texts: &[&str], size| {
            let spans: Vec<Span> = texts.iter().map(|text| text.parse().unwrap()).collect();
            ranges(&spans, size).map_err(|error| error.to_string())
        };
        let range = |start, length| Range { start, length };
        assert_eq!(of(&[], 100), Ok(None));
        assert_eq!(of(&["10..", "..20", "30..100"], 100), Ok(Some(vec![range(10, 90), range(0, 20), range(30, 70)])));
        for text in ["100..", "..101", "99..200"] {
            assert!(of(&[text], 100).unwrap_err().contains("ends at 100 (100 bytes)"), "{text}");
        }
    }
}
