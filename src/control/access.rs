//! Who may ask: whoever has the token, and no page of a stranger.
//!
//! A unix socket needs no token: the permissions of its file decide who opens it. On TCP anybody could come, so each
//! request has to carry the token that the server was given (RFC 6750, section 2.1).
//!
//! What a browser sends on behalf of a page is another matter: the page may be anybody's, and the socket may be the
//! operator's own (`ssh -L`). Such a request is answered only if the page came from this very server:
//!
//! | header | must be |
//! | --- | --- |
//! | `Sec-Fetch-Site`, which current browsers send always | `same-origin`, or `none`: typed or bookmarked |
//! | `Origin` | the one of the `Host` |
//! | `Host`, on a unix socket | a name of this machine: else somebody's name server leads here (DNS rebinding) |
//!
//! On TCP any `Host` will do: a page of any other name does not have the token.

use std::fmt;
use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use constant_time_eq::constant_time_eq_32;
use thiserror::Error;

use super::api::Problem;
use crate::telemetry::seldom;

/// Bytes of the shortest token, and of the longest file with one.
const SHORTEST: usize = 16;
const LONGEST: u64 = 4096;

/// How to make a token.
pub(super) const HOW: &str = "(umask 077; head -c 24 /dev/urandom | base64 > FILE)";

/// What shows that whoever asks may ask.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// The token of a server that runs, which may be replaced. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct TokenCell(Arc<RwLock<Token>>);

impl TokenCell {
    /// Begins with this token.
    pub fn new(token: Token) -> Self {
        Self(Arc::new(RwLock::new(token)))
    }

    /// Replaces it: the old one is of no use any more.
    pub fn set(&self, token: Token) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = token;
    }

    /// Whether a request carries it.
    fn is_in(&self, headers: &HeaderMap) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_in(headers)
    }
}

/// Why a file has no token.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The system refused.
    #[error("cannot read the token {path}")]
    System {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Not its owner alone can read it.
    #[error("others may read the token {path} (its mode is {mode:03o}): chmod 600 {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It could be guessed.
    #[error("the token {0} has less than {SHORTEST} bytes: {HOW} makes a good one")]
    Short(PathBuf),
    /// It does not fit into a header.
    #[error("the token {0} may have letters, digits and -._~+/= in it, and {LONGEST} bytes: {HOW} makes a good one")]
    Form(PathBuf),
}

impl Token {
    /// Reads a file that only its owner can read. White space around the token is no part of it.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let system = |source| TokenError::System { path: path.to_owned(), source };
        let file = fs::File::open(path).map_err(system)?;
        let mode = file.metadata().map_err(system)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Open { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        file.take(LONGEST + 1).read_to_string(&mut text).map_err(system)?;
        let token = text.trim();
        if token.len() < SHORTEST {
            return Err(TokenError::Short(path.to_owned()));
        }
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
        if crate::units::to_u64(text.len()) > LONGEST || !token.bytes().all(fits) {
            return Err(TokenError::Form(path.to_owned()));
        }
        Ok(Self(token.to_owned()))
    }

    /// What a request carries.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Whether `other` is the same. How long it takes tells nothing of where they differ, nor of how long either is.
    fn is(&self, other: &[u8]) -> bool {
        constant_time_eq_32(blake3::hash(self.0.as_bytes()).as_bytes(), blake3::hash(other).as_bytes())
    }

    /// Whether a request carries it.
    fn is_in(&self, headers: &HeaderMap) -> bool {
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (given.next(), given.next()) else { return false };
        let Some((scheme, token)) = value.as_bytes().split_at_checked(b"Bearer ".len()) else { return false };
        scheme.eq_ignore_ascii_case(b"Bearer ") && self.is(token.trim_ascii())
    }
}

/// Lets requests pass that carry the token.
pub(super) async fn ask_for_token(State(token): State<TokenCell>, request: Request, next: Next) -> Response {
    if token.is_in(request.headers()) {
        return next.run(request).await;
    }
    let is_wrong = request.headers().contains_key(header::AUTHORIZATION);
    if is_wrong {
        seldom!(warn, "a request to the admin API had a wrong token");
    }
    let (challenge, why) = if is_wrong {
        ("Bearer error=\"invalid_token\"", "this is not the token of this server")
    } else {
        ("Bearer", "this server wants its token: Authorization: Bearer TOKEN, or --token FILE with headwater")
    };
    ([(header::WWW_AUTHENTICATE, challenge)], Problem::new(StatusCode::UNAUTHORIZED, why)).into_response()
}

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By a unix socket.
    Unix,
    /// By TCP.
    Tcp,
}

/// Refuses what the page of a stranger may have sent.
pub(super) async fn refuse_strangers(State(way): State<Way>, request: Request, next: Next) -> Response {
    match complaint(way, request.headers(), request.uri()) {
        Some(why) => Problem::new(StatusCode::FORBIDDEN, why).into_response(),
        None => next.run(request).await,
    }
}

/// Why a request is refused, if it is.
fn complaint(way: Way, headers: &HeaderMap, uri: &Uri) -> Option<&'static str> {
    let Some(host) = host_of(headers, uri) else { return Some("a request says once, in its Host, whom it is for") };
    if way == Way::Unix && !is_loopback(host) {
        return Some("the Host of a request by this socket must be localhost or a loopback address");
    }
    let is_ours = |site: &HeaderValue| site == "same-origin" || site == "none";
    if !headers.get_all("sec-fetch-site").iter().all(is_ours) {
        return Some("pages of other sites are not served here");
    }
    let of_host = |origin: &HeaderValue| {
        let rest = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
        rest.is_some_and(|(scheme, rest)| matches!(scheme, "http" | "https") && rest.eq_ignore_ascii_case(host))
    };
    let has_others = !headers.get_all(header::ORIGIN).iter().all(of_host);
    has_others.then_some("pages of other origins are not served here")
}

/// Whom a request is for, if it says that once only.
fn host_of<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Option<&'a str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return None };
    let host = host.to_str().ok()?;
    let is_said_twice = uri.authority().is_some_and(|authority| authority.as_str() != host);
    (!is_said_twice).then_some(host)
}

/// Whether `HOST[:PORT]` names this machine by itself.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(name, _)| name),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn with(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn file(scratch: &tempfile::TempDir, text: &str, mode: u32) -> PathBuf {
        let path = scratch.path().join("token");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_token_is_its_owners_long_enough_and_fits_into_a_header() {
        let scratch = tempfile::tempdir().unwrap();
        let token = Token::read(&file(&scratch, " 0123456789abcde+\n", 0o600)).unwrap();
        assert_eq!(token.header().unwrap(), "Bearer 0123456789abcde+");
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert!(Token::read(&file(&scratch, "0123456789abcdef", 0o400)).is_ok());
        let refused = |text: &str, mode| Token::read(&file(&scratch, text, mode)).unwrap_err();
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
            assert!(matches!(refused("0123456789abcdef", mode), TokenError::Open { .. }), "{mode:o}");
        }
        assert!(matches!(refused("0123456789abcde \n", 0o600), TokenError::Short(_)));
        assert!(matches!(refused("", 0o600), TokenError::Short(_)));
        assert!(matches!(refused("0123456789 abcdefgh", 0o600), TokenError::Form(_)));
        assert!(matches!(refused(&"x".repeat(5000), 0o600), TokenError::Form(_)));
        assert!(matches!(Token::read(&scratch.path().join("none")), Err(TokenError::System { .. })));
    }

    #[test]
    fn a_request_carries_the_token_once_and_whole() {
        let token = Token("0123456789abcdef".to_owned());
        let is_in = |lines: &[(&'static str, &'static str)]| token.is_in(&with(lines));
        for value in ["Bearer 0123456789abcdef", "bearer 0123456789abcdef", "BEARER   0123456789abcdef"] {
            assert!(is_in(&[("authorization", value)]), "{value}");
        }
        for value in [
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdeF",
            "Bearer 0123456789abcdef0",
            "Bearer",
            "Bearer ",
            "",
            "Basic 0123456789abcdef",
            "0123456789abcdef",
            "Bearer0123456789abcdef",
        ] {
            assert!(!is_in(&[("authorization", value)]), "{value}");
        }
        assert!(!is_in(&[]));
        let right = ("authorization", "Bearer 0123456789abcdef");
        assert!(!is_in(&[right, right]), "one of two may be somebody else's");
    }

    #[test]
    fn loopback_has_few_names() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:9", "[::1]", "[::1]:9"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::2]", "0.0.0.0", "[", "::1"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn only_pages_from_here_are_served() {
        let path = Uri::from_static("/v1/status");
        let is_served = |way, lines: &[(&'static str, &'static str)]| complaint(way, &with(lines), &path).is_none();
        let host = ("host", "localhost:9000");
        for way in [Way::Unix, Way::Tcp] {
            assert!(is_served(way, &[host]));
            assert!(!is_served(way, &[]) && !is_served(way, &[host, host]));
            assert!(is_served(way, &[host, ("origin", "http://localhost:9000"), ("sec-fetch-site", "same-origin")]));
            assert!(is_served(way, &[host, ("sec-fetch-site", "none")]));
            for (name, value) in [
                ("origin", "http://evil.example"),
                ("origin", "null"),
                ("origin", "http://localhost"),
                ("origin", "http://localhost:9001"),
                ("origin", "file://localhost:9000"),
                ("sec-fetch-site", "cross-site"),
                // Another port of this machine is the same site.
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-site", ""),
            ] {
                assert!(!is_served(way, &[host, (name, value)]), "{name}: {value}");
            }
        }
        assert!(!is_served(Way::Unix, &[("host", "evil.example")]));
        assert!(is_served(Way::Tcp, &[("host", "server2:9000")]));
    }

    #[test]
    fn a_request_says_one_thing_of_whom_it_is_for() {
        let says = |target| host_of(&with(&[("host", "localhost")]), &Uri::from_static(target)).is_some();
        assert!(says("/v1/status") && says("http://localhost/v1/status"));
        assert!(!says("http://evil.example/v1/status"));
    }
}
