//! NBD URIs: `nbd://host:port/export`, `nbd+unix:///export?socket=PATH` and their TLS forms, after
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>.
//!
//! The generic syntax (RFC 3986) is left to `fluent-uri`; what the parts mean for NBD is decided here. Where that
//! document leaves a choice: without a host, `localhost` is meant; unknown query parameters are errors.

use std::borrow::Cow;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use thiserror::Error;

use super::wire::{DEFAULT_PORT, MAX_STRING};

/// Where an export is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// The export's name; empty for the default one.
    pub export: String,
    /// Whether the connection must be encrypted (`nbds`).
    pub security: Security,
    /// How the server is known, if it must be.
    pub tls: TlsQuery,
}

/// What the query of an `nbds` URI says of TLS. Nothing in other URIs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct TlsQuery {
    /// `tls-certificates`: the directory of the authorities that are believed, and of what we show.
    pub certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must have; without it, the host of the URI.
    pub hostname: Option<String>,
}

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// By TCP.
    Tcp {
        /// A host name or an address; IPv6 addresses without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// By a unix socket; a path that starts with a NUL is in the abstract namespace.
    Unix(PathBuf),
}

/// What protects a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// Nothing.
    Plain,
    /// TLS, or no connection at all.
    Tls,
}

/// Why a text is not an NBD URI.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseUriError {
    /// Not a URI at all.
    #[error("{0:?} is not a URI: write nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH")]
    Syntax(String),
    /// Another scheme.
    #[error("unknown scheme {0:?}: use nbd, nbds, nbd+unix or nbds+unix")]
    Scheme(String),
    /// The port is not a number from 1 to 65535.
    #[error("{0:?} is not a port")]
    Port(String),
    /// The host is not UTF-8.
    #[error("the host is not a name or an address")]
    Host,
    /// A unix URI without its socket.
    #[error("a nbd+unix URI needs its socket: nbd+unix:///EXPORT?socket=PATH")]
    NoSocket,
    /// The export name is not what the protocol allows.
    #[error("the export name must be UTF-8 without NUL and at most {MAX_STRING} bytes")]
    Export,
    /// An element of a list is empty.
    #[error("a URI is missing before or behind a comma; a comma at the end of an export name is written %2C")]
    Missing,
    /// NBD URIs have no fragments.
    #[error("{0:?} has a #: one that belongs to a name is written %23")]
    Fragment(String),
    /// A query parameter that means nothing here.
    #[error("unknown parameter {0:?}")]
    Parameter(String),
    /// Something that would weaken TLS, or that we have not.
    #[error("{0} is not possible: TLS is by certificates here, and servers are always verified")]
    Tls(String),
}

impl Uri {
    /// The export `export` at `address`, in plain text.
    pub const fn plain(address: Address, export: String) -> Self {
        Self { address, export, security: Security::Plain, tls: TlsQuery { certificates: None, hostname: None } }
    }

    /// The name that the server's certificate must have. On this host, where no host is named, that is `localhost`.
    pub fn tls_name(&self) -> &str {
        match (&self.tls.hostname, &self.address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            (None, Address::Unix(_)) => "localhost",
        }
    }

    /// The same without paths of files of whoever wrote it: for URIs that come from other hosts.
    #[must_use]
    pub fn without_files(mut self) -> Self {
        self.tls.certificates = None;
        self
    }

    /// Splits `URI,URI,…` before each comma that a scheme follows; commas within a URI are left alone.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, ParseUriError> {
        let mut uris = Vec::new();
        let mut start = 0;
        for (comma, _) in text.match_indices(',') {
            if starts_with_scheme(&text[comma + 1..]) {
                uris.push(parse_element(&text[start..comma])?);
                start = comma + 1;
            }
        }
        uris.push(parse_element(&text[start..])?);
        Ok(uris)
    }
}

/// One URI of a list, behind which another comma can only be a mistake.
fn parse_element(text: &str) -> Result<Uri, ParseUriError> {
    if text.ends_with(',') { Err(ParseUriError::Missing) } else { text.parse() }
}

fn starts_with_scheme(text: &str) -> bool {
    ["nbd:", "nbds:", "nbd+unix:", "nbds+unix:"].iter().any(|scheme| text.starts_with(scheme))
}

impl FromStr for Uri {
    type Err = ParseUriError;

    fn from_str(text: &str) -> Result<Self, ParseUriError> {
        let uri = fluent_uri::Uri::parse(text).map_err(|_| ParseUriError::Syntax(text.to_owned()))?;
        let scheme = uri.scheme().as_str().to_ascii_lowercase();
        let (unix, security) = match scheme.as_str() {
            "nbd" => (false, Security::Plain),
            "nbds" => (false, Security::Tls),
            "nbd+unix" => (true, Security::Plain),
            "nbds+unix" => (true, Security::Tls),
            _ => return Err(ParseUriError::Scheme(scheme)),
        };
        if uri.fragment().is_some() {
            return Err(ParseUriError::Fragment(text.to_owned()));
        }
        let path = uri.path().as_str();
        let export = percent_decode_str(path.strip_prefix('/').unwrap_or(path))
            .decode_utf8()
            .ok()
            .filter(|name| name.len() <= MAX_STRING && !name.contains('\0'))
            .ok_or(ParseUriError::Export)?
            .into_owned();
        let Query { socket, tls } = parse_query(uri.query().map_or("", |query| query.as_str()))?;
        let address = if unix {
            Address::Unix(socket.ok_or(ParseUriError::NoSocket)?)
        } else if socket.is_some() {
            return Err(ParseUriError::Parameter("socket".into()));
        } else {
            let (host, port) = match uri.authority() {
                Some(authority) => (parse_host(authority.host())?, authority.port().map_or("", |port| port.as_str())),
                None => (String::new(), ""),
            };
            let host = if host.is_empty() { "localhost".to_owned() } else { host };
            Address::Tcp { host, port: parse_port(port)? }
        };
        let tls = if security == Security::Tls { tls } else { TlsQuery::default() };
        Ok(Self { address, export, security, tls })
    }
}

fn parse_host(host: &str) -> Result<String, ParseUriError> {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = percent_decode_str(host).decode_utf8().map(Cow::into_owned).map_err(|_| ParseUriError::Host)?;
    if host.contains('\0') { Err(ParseUriError::Host) } else { Ok(host) }
}

fn parse_port(port: &str) -> Result<u16, ParseUriError> {
    match port.parse() {
        _ if port.is_empty() => Ok(DEFAULT_PORT),
        Ok(0) | Err(_) => Err(ParseUriError::Port(port.to_owned())),
        Ok(port) => Ok(port),
    }
}

/// The parameters that we know.
#[derive(Default)]
struct Query {
    socket: Option<PathBuf>,
    tls: TlsQuery,
}

fn parse_query(query: &str) -> Result<Query, ParseUriError> {
    let mut found = Query::default();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let bytes: Vec<u8> = percent_decode_str(value).collect();
        let path = || PathBuf::from(std::ffi::OsString::from_vec(bytes.clone()));
        let refused = || ParseUriError::Tls(parameter.to_owned());
        match key {
            "socket" if !value.is_empty() => found.socket = Some(path()),
            "socket" => return Err(ParseUriError::NoSocket),
            "tls-certificates" if !value.is_empty() => found.tls.certificates = Some(path()),
            "tls-hostname" if !value.is_empty() => {
                found.tls.hostname = Some(String::from_utf8(bytes).map_err(|_| refused())?);
            }
            "tls-type" if value == "x509" => {}
            "tls-verify-peer" if ["1", "true", "yes", "on"].contains(&value) => {}
            "tls-certificates" | "tls-hostname" | "tls-type" | "tls-verify-peer" => return Err(refused()),
            _ => return Err(ParseUriError::Parameter(key.to_owned())),
        }
    }
    Ok(found)
}

/// Everything but what may stand in a path segment or a query value as it is.
const ENCODED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/').remove(b':').remove(b'@');

impl fmt::Display for Uri {
    /// The shortest form: no default port, nothing encoded that need not be.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = if self.security == Security::Tls { "s" } else { "" };
        let export = percent_encode(self.export.as_bytes(), ENCODED);
        match &self.address {
            Address::Tcp { host, port } => {
                write!(f, "nbd{tls}://{}", HostDisplay(host))?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")?;
            }
            Address::Unix(path) => write!(f, "nbd{tls}+unix:///{export}?socket={}", PathDisplay(path))?,
        }
        let mut separator = if matches!(self.address, Address::Unix(_)) { '&' } else { '?' };
        if let Some(directory) = &self.tls.certificates {
            write!(f, "{separator}tls-certificates={}", PathDisplay(directory))?;
            separator = '&';
        }
        if let Some(name) = &self.tls.hostname {
            write!(f, "{separator}tls-hostname={}", percent_encode(name.as_bytes(), ENCODED))?;
        }
        Ok(())
    }
}

struct HostDisplay<'a>(&'a str);

impl fmt::Display for HostDisplay<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const REG_NAME: &AsciiSet = &ENCODED.add(b'/').add(b':').add(b'@');
        if self.0.parse::<std::net::Ipv6Addr>().is_ok() {
            write!(f, "[{}]", self.0)
        } else {
            percent_encode(self.0.as_bytes(), REG_NAME).fmt(f)
        }
    }
}

struct PathDisplay<'a>(&'a Path);

impl fmt::Display for PathDisplay<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        percent_encode(self.0.as_os_str().as_bytes(), ENCODED).fmt(f)
    }
}

/// Parses arbitrary text; what parses must print and parse to the same.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<Uri>() {
        assert_eq!(uri.to_string().parse().as_ref(), Ok(&uri), "{uri} reads back as another");
    }
    let _ = Uri::parse_list(text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16, export: &str) -> Uri {
        Uri::plain(Address::Tcp { host: host.into(), port }, export.into())
    }

    fn unix(path: &str, export: &str) -> Uri {
        Uri::plain(Address::Unix(path.into()), export.into())
    }

    #[test]
    fn uris_of_the_standard_are_understood() {
        for (text, uri) in [
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
            ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
            ("nbd://example.com/hello%20world", tcp("example.com", 10809, "hello world")),
            ("nbd://example.com:10810/a/b", tcp("example.com", 10810, "a/b")),
            ("nbd://user@192.0.2.7:/x", tcp("192.0.2.7", 10809, "x")),
            ("nbd://[2001:db8::1]:7/x", tcp("2001:db8::1", 7, "x")),
            ("NBD://h/x", tcp("h", 10809, "x")),
            ("nbd:///x", tcp("localhost", 10809, "x")),
            ("nbd+unix:///disk?socket=/run/a.sock", unix("/run/a.sock", "disk")),
            ("nbd+unix:///?socket=%2Frun%2Fa%20b", unix("/run/a b", "")),
            ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract", "")),
        ] {
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
        assert_eq!("nbds://h/x".parse::<Uri>().map(|uri| uri.security), Ok(Security::Tls));
        let query =
            "nbds+unix:///x?socket=/s&tls-certificates=/etc/a%20b&tls-hostname=h&tls-verify-peer=true&tls-type=x509";
        let uri: Uri = query.parse().unwrap();
        assert_eq!((uri.tls.certificates.as_deref(), uri.tls_name()), (Some(Path::new("/etc/a b")), "h"));
        assert_eq!(uri.to_string(), "nbds+unix:///x?socket=/s&tls-certificates=/etc/a%20b&tls-hostname=h");
        assert_eq!(uri.without_files().to_string(), "nbds+unix:///x?socket=/s&tls-hostname=h");
        assert_eq!("nbds://h/x?tls-hostname=g".parse::<Uri>().unwrap().to_string(), "nbds://h/x?tls-hostname=g");
        assert_eq!("nbds://[::1]/x".parse::<Uri>().unwrap().tls_name(), "::1");
        assert_eq!("nbd://h/x?tls-hostname=g".parse(), Ok(tcp("h", 10809, "x")), "without TLS it means nothing");
    }

    #[test]
    fn what_is_not_an_nbd_uri_is_refused_with_its_reason() {
        for (text, error) in [
            ("debian12.raw", ParseUriError::Syntax("debian12.raw".into())),
            ("nbd://h/a b", ParseUriError::Syntax("nbd://h/a b".into())),
            ("http://h/x", ParseUriError::Scheme("http".into())),
            ("nbd://h:0/x", ParseUriError::Port("0".into())),
            ("nbd://h:65536/x", ParseUriError::Port("65536".into())),
            ("nbd+unix:///x", ParseUriError::NoSocket),
            ("nbd+unix:///x?socket=", ParseUriError::NoSocket),
            ("nbd://h/%00", ParseUriError::Export),
            ("nbd://h/%ff", ParseUriError::Export),
            ("nbd://h/x#y", ParseUriError::Fragment("nbd://h/x#y".into())),
            ("nbd://h/x?colour=red", ParseUriError::Parameter("colour".into())),
            ("nbd://h/x?socket=/a", ParseUriError::Parameter("socket".into())),
            ("nbds://h/x?tls-verify-peer=false", ParseUriError::Tls("tls-verify-peer=false".into())),
            ("nbds://h/x?tls-type=psk", ParseUriError::Tls("tls-type=psk".into())),
            ("nbds://h/x?tls-hostname=%ff", ParseUriError::Tls("tls-hostname=%ff".into())),
        ] {
            assert_eq!(text.parse::<Uri>(), Err(error), "{text}");
        }
    }

    #[test]
    fn uris_print_in_their_shortest_form() {
        for (uri, text) in [
            (tcp("h", 10809, "a b"), "nbd://h/a%20b"),
            (tcp("::1", 7, ""), "nbd://[::1]:7/"),
            (unix("/run/a b", "é"), "nbd+unix:///%C3%A9?socket=/run/a%20b"),
        ] {
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn lists_split_where_a_scheme_follows_a_comma() {
        assert_eq!(
            Uri::parse_list("nbd://a/x,nbd+unix:///y?socket=/s,nbd://b/z"),
            Ok(vec![tcp("a", 10809, "x"), unix("/s", "y"), tcp("b", 10809, "z")])
        );
        assert_eq!(Uri::parse_list("nbd://a/x,y"), Ok(vec![tcp("a", 10809, "x,y")]));
        for text in ["nbd://a/x,", "nbd://a/x,,nbd://b/x"] {
            assert_eq!(Uri::parse_list(text), Err(ParseUriError::Missing), "{text}");
        }
        assert!(Uri::parse_list("").is_err());
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in ".{0,80}", tail in "[a-z0-9/:%?=&@\\[\\].,+]{0,60}") {
            fuzz(text.as_bytes());
            fuzz(format!("nbd:{tail}").as_bytes());
            fuzz(format!("nbd+unix:{tail}").as_bytes());
            fuzz(format!("nbds://h/?tls-{tail}").as_bytes());
        }

        #[test]
        fn any_export_at_any_address_reads_back(export in "[^\0]{0,30}", host in "[a-z0-9.-]{1,20}", port in 1u16..) {
            let uri = tcp(&host, port, &export);
            prop_assert_eq!(uri.to_string().parse(), Ok(uri));
            let uri = unix(&format!("/{export}"), &export);
            prop_assert_eq!(uri.to_string().parse(), Ok(uri));
        }
    }
}
