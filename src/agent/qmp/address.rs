//! Servers as qemu writes them.
//!
//! Owns: reading the `filename` of a block node of driver `nbd`, and the options that make qemu open a server. Does
//! not own: NBD URIs, which look the same and are something else: qemu percent-encodes nothing and has no brackets
//! around IPv6 addresses (`nbd_refresh_filename` in qemu's `block/nbd.c`).

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::nbd::Uri;
use crate::nbd::uri::Address;
use crate::nbd::wire::DEFAULT_PORT;

/// The server and export that a `filename` of qemu tells of; nothing if it is none that we could reach.
pub(super) fn read(filename: &str) -> Option<Uri> {
    if let Some(text) = filename.strip_prefix("json:") {
        return read_json(text);
    }
    if let Some(rest) = filename.strip_prefix("nbd+unix://") {
        let (export, socket) = rest.rsplit_once("?socket=")?;
        let export = export.strip_prefix('/').unwrap_or(export);
        return Some(unix(socket, false, export));
    }
    let rest = filename.strip_prefix("nbd://")?;
    let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = server.rsplit_once(':')?;
    tcp(host, port, export)
}

/// Options of the driver, where `server` may be an object or be taken apart as in `server.path`.
fn read_json(text: &str) -> Option<Uri> {
    let options: Map<String, Value> = serde_json::from_str(text).ok()?;
    if options.get("driver")?.as_str()? != "nbd" || options.contains_key("tls-creds") {
        return None;
    }
    let server = options.get("server").and_then(Value::as_object);
    let of_server = |name: &str| match server {
        Some(server) => server.get(name),
        None => options.get(&format!("server.{name}")),
    };
    let text = |name: &str| of_server(name).and_then(Value::as_str);
    let export = options.get("export").and_then(Value::as_str).unwrap_or("");
    match text("type")? {
        "inet" => tcp(text("host")?, text("port")?, export),
        "unix" => {
            let is_abstract = of_server("abstract").is_some_and(|value| value == true || value == "on");
            Some(unix(text("path")?, is_abstract, export))
        }
        _ => None,
    }
}

fn tcp(host: &str, port: &str, export: &str) -> Option<Uri> {
    let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().ok()? };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Some(Uri::plain(Address::Tcp { host: host.to_owned(), port }, export.to_owned()))
}

fn unix(path: &str, is_abstract: bool, export: &str) -> Uri {
    let path = if is_abstract { format!("\0{path}") } else { path.to_owned() };
    Uri::plain(Address::Unix(path.into()), export.to_owned())
}

/// The member `server` of the options of an nbd node; nothing for a path that JSON has no form for.
pub(super) fn server_option(address: &Address) -> Option<Value> {
    Some(match address {
        Address::Tcp { host, port } => json!({ "type": "inet", "host": host, "port": port.to_string() }),
        Address::Unix(path) => unix_option(path)?,
    })
}

fn unix_option(path: &Path) -> Option<Value> {
    let path = path.to_str()?;
    Some(match path.strip_prefix('\0') {
        Some(name) => json!({ "type": "unix", "path": name, "abstract": true }),
        None => json!({ "type": "unix", "path": path }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uri(text: &str) -> Option<Uri> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn names_that_qemu_gave() {
        // Copied from query-named-block-nodes of qemu 10.0.2.
        for (filename, expected) in [
            ("nbd://127.0.0.1:20998", "nbd://127.0.0.1:20998"),
            ("nbd://::1:20999/a/b", "nbd://[::1]:20999/a/b"),
            ("nbd+unix:///img?socket=/tmp/a.sock", "nbd+unix:///img?socket=/tmp/a.sock"),
            ("nbd+unix:///i m%20g?x?socket=/tmp/qx/c d.sock", "nbd+unix:///i%20m%2520g%3Fx?socket=/tmp/qx/c%20d.sock"),
            ("nbd+unix://?socket=/tmp/a.sock", "nbd+unix:///?socket=/tmp/a.sock"),
            (
                "json:{\"server.port\": \"20998\", \"server.host\": \"127.0.0.1\", \"driver\": \"nbd\", \
                 \"server.type\": \"inet\", \"server.ipv4\": true}",
                "nbd://127.0.0.1:20998/",
            ),
            (
                "json:{\"driver\": \"nbd\", \"server\": {\"type\": \"unix\", \"path\": \"/a\"}, \"export\": \"x\"}",
                "nbd+unix:///x?socket=/a",
            ),
        ] {
            assert_eq!(read(filename), uri(expected), "{filename}");
        }
    }

    #[test]
    fn what_we_could_not_reach_is_nothing() {
        for filename in [
            "",
            "disk.qcow2",
            "nbd://host",
            "nbd://host:http/x",
            "json:{",
            "json:{\"driver\": \"raw\"}",
            "json:{\"driver\": \"nbd\", \"server.type\": \"vsock\", \"server.cid\": \"2\", \"server.port\": \"1\"}",
            "json:{\"driver\": \"nbd\", \"tls-creds\": \"t\", \"server.type\": \"unix\", \"server.path\": \"/a\"}",
        ] {
            assert_eq!(read(filename), None, "{filename}");
        }
    }

    proptest! {
        #[test]
        fn options_say_what_was_meant(host in "[a-z0-9.:]{1,9}", port in 1_u16.., path in "\0?/[ -~é]{1,9}", tcp: bool) {
            let address = if tcp { Address::Tcp { host, port } } else { Address::Unix(path.into()) };
            let options = json!({ "driver": "nbd", "server": server_option(&address), "export": "é x" });
            prop_assert_eq!(read(&format!("json:{options}")), Some(Uri::plain(address, "é x".into())));
        }
    }
}
