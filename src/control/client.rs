//! The other side: requests to a running server.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::http::request::Builder;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::access::Token;
use super::casts::order::{CastList, CastOrder, CastStatus, CastTaken};
use super::load::{History, Load};
use super::place::AdminAddress;
use super::prefetch::{OrderList, OrderStatus, PrefetchOrder, PrefetchReport};
use super::redirect::order::{DrainOrder, DrainStatus, RedirectList, RedirectOrder, RedirectStatus, RedirectTaken};
use super::status::{
    ClientStatus, Complaint, JobStarted, JobStatus, PinOrder, PinReport, ProfileReport, Status, VerifyOrder,
};
use crate::fill::profile::Tag;

/// How long a server may take to say something about itself. Longer than it lets others keep a place of a connection
/// without saying anything.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long it may take to carry out an order: as long as it lets a connection live.
const ORDER_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the longest answer that is taken: some hundred thousand clients.
const LONGEST_ANSWER: usize = 64 << 20;

/// Speaks to the server at one address. Each request has a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    address: AdminAddress,
    token: Option<Token>,
}

/// Why a request has no answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// Nobody listens there, or not to us.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where.
        address: AdminAddress,
        /// The reason of the system.
        source: io::Error,
    },
    /// The server hung up, or does not speak HTTP.
    #[error("lost the server at {address}")]
    Lost {
        /// Where.
        address: AdminAddress,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server hangs.
    #[error("the server at {0} does not answer")]
    TimedOut(AdminAddress),
    /// The server understood, and does not do it.
    #[error("{reason}")]
    Refused {
        /// The status code of HTTP.
        status: u16,
        /// Why.
        reason: String,
    },
    /// Something else listens there, or a very different version.
    #[error("the server at {address} answers with something else than was asked for: {reason}")]
    Misunderstood {
        /// Where.
        address: AdminAddress,
        /// What is wrong with it.
        reason: String,
    },
}

impl CallError {
    /// Whether nobody listens on a socket that is there.
    pub(super) fn is_refused_connection(&self) -> bool {
        matches!(self, Self::Connect { source, .. }
            if matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
    }

    /// Whether the same request may succeed later: the server may be on its way back.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Lost { .. } | Self::TimedOut(_))
    }

    /// The message and those of all causes, as one line.
    pub(super) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(&format!(": {cause}"));
            next = cause.source();
        }
        text
    }
}

impl Client {
    /// For the server at `address`, which is not asked anything yet.
    pub const fn new(address: AdminAddress) -> Self {
        Self { address, token: None }
    }

    /// Shows this token to the server. It is sent by TCP only: a unix socket asks for none.
    #[must_use]
    pub fn with_token(self, token: Option<Token>) -> Self {
        Self { token, ..self }
    }

    /// Where the server is.
    pub const fn address(&self) -> &AdminAddress {
        &self.address
    }

    /// All that is to be known of the server: the JSON as it came, and what it means.
    pub async fn status(&self) -> Result<(String, Status), CallError> {
        let json = self.send(Method::GET, "/v1/status", Bytes::new(), PATIENCE).await?;
        let status = self.decode(&json)?;
        Ok((String::from_utf8_lossy(&json).into_owned(), status))
    }

    /// What it did in the last `seconds`, 1 to 60.
    pub async fn load(&self, seconds: u32) -> Result<Load, CallError> {
        self.get(&format!("/v1/load?seconds={seconds}")).await
    }

    /// Its last minutes.
    pub async fn history(&self) -> Result<History, CallError> {
        self.get("/v1/history").await
    }

    /// What may be changed while it runs, by name.
    pub async fn settings(&self) -> Result<Map<String, Value>, CallError> {
        self.get("/v1/settings").await
    }

    /// Changes what is named, all of it or nothing; gives all settings as they are then.
    pub async fn change_settings(&self, order: &Map<String, Value>) -> Result<Map<String, Value>, CallError> {
        self.order(Method::PATCH, "/v1/settings", order).await
    }

    /// Closes the connection of a client when all is answered; gives what it had done.
    pub async fn close_client(&self, id: u64) -> Result<ClientStatus, CallError> {
        self.delete(&format!("/v1/clients/{id}")).await
    }

    /// Pins ranges of an image, or all of it.
    pub async fn pin(&self, image: &str, order: &PinOrder) -> Result<PinReport, CallError> {
        self.post(&of_image(image, "pin"), order).await
    }

    /// Ends that.
    pub async fn unpin(&self, image: &str, order: &PinOrder) -> Result<PinReport, CallError> {
        self.post(&of_image(image, "unpin"), order).await
    }

    /// Has an image checked; gives the number of the job.
    pub async fn verify(&self, image: &str, order: &VerifyOrder) -> Result<u64, CallError> {
        let JobStarted { job } = self.post(&of_image(image, "verify"), order).await?;
        Ok(job)
    }

    /// The profiles of an image, as they lie in files.
    pub async fn profile(&self, image: &str) -> Result<Bytes, CallError> {
        self.send(Method::GET, &of_image(image, "profile"), Bytes::new(), PATIENCE).await
    }

    /// Puts profiles in the place of those that an image has; `force`: also those of an image of another identity.
    pub async fn import_profile(&self, image: &str, profile: Bytes, force: bool) -> Result<ProfileReport, CallError> {
        let path = format!("{}?force={force}", of_image(image, "profile"));
        let json = self.send(Method::PUT, &path, profile, ORDER_PATIENCE).await?;
        self.decode(&json)
    }

    /// Has the profile of a workload forgotten, or all of an image.
    pub async fn forget_profile(&self, image: &str, tag: Option<&Tag>) -> Result<ProfileReport, CallError> {
        let query = tag.map_or_else(String::new, |tag| format!("?tag={tag}"));
        let path = format!("{}{query}", of_image(image, "profile"));
        self.delete(&path).await
    }

    /// How far a job has come.
    pub async fn job(&self, id: u64) -> Result<JobStatus, CallError> {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    /// Calls a job off. It ends soon after.
    pub async fn cancel(&self, id: u64) -> Result<JobStatus, CallError> {
        self.delete(&format!("/v1/jobs/{id}")).await
    }

    /// Orders parts of an image to be fetched.
    pub async fn prefetch(&self, image: &str, order: &PrefetchOrder) -> Result<PrefetchReport, CallError> {
        self.post(&of_image(image, "prefetch"), order).await
    }

    /// The orders to prefetch: the active ones and the last that ended.
    pub async fn prefetches(&self) -> Result<OrderList, CallError> {
        self.get("/v1/orders").await
    }

    /// How far one of them has come.
    pub async fn prefetched(&self, id: u64) -> Result<OrderStatus, CallError> {
        self.get(&format!("/v1/orders/{id}")).await
    }

    /// Calls one of them off.
    pub async fn cancel_prefetch(&self, id: u64) -> Result<OrderStatus, CallError> {
        self.delete(&format!("/v1/orders/{id}")).await
    }

    /// Orders clients of an export to be moved.
    pub async fn redirect(&self, export: &str, order: &RedirectOrder) -> Result<RedirectTaken, CallError> {
        self.post(&of_export(export, "redirect"), order).await
    }

    /// The orders to move clients: the active ones and the last that ended.
    pub async fn redirects(&self) -> Result<RedirectList, CallError> {
        self.get("/v1/redirects").await
    }

    /// How far one of them has come.
    pub async fn redirected(&self, id: u64) -> Result<RedirectStatus, CallError> {
        self.get(&format!("/v1/redirects/{id}")).await
    }

    /// Calls one of them off.
    pub async fn cancel_redirect(&self, id: u64) -> Result<RedirectStatus, CallError> {
        self.delete(&format!("/v1/redirects/{id}")).await
    }

    /// Has an image sent to a group.
    pub async fn cast(&self, image: &str, order: &CastOrder) -> Result<CastTaken, CallError> {
        self.post(&of_image(image, "cast"), order).await
    }

    /// The casts of a server: those at work and the last that ended.
    pub async fn casts(&self) -> Result<CastList, CallError> {
        self.get("/v1/casts").await
    }

    /// How far one of them is.
    pub async fn cast_status(&self, id: u64) -> Result<CastStatus, CallError> {
        self.get(&format!("/v1/casts/{id}")).await
    }

    /// Calls one of them off.
    pub async fn cancel_cast(&self, id: u64) -> Result<CastStatus, CallError> {
        self.delete(&format!("/v1/casts/{id}")).await
    }

    /// Takes an export, or the whole server, out of service.
    pub async fn drain(&self, export: Option<&str>, order: &DrainOrder) -> Result<DrainStatus, CallError> {
        self.post(&of_drain(export), order).await
    }

    /// What is out of service, and who is still there.
    pub async fn draining(&self) -> Result<DrainStatus, CallError> {
        self.get("/v1/drain").await
    }

    /// Lets newcomers in again.
    pub async fn undrain(&self, export: Option<&str>) -> Result<DrainStatus, CallError> {
        self.delete(&of_drain(export)).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.decode(&self.send(Method::GET, path, Bytes::new(), PATIENCE).await?)
    }

    async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.decode(&self.send(Method::DELETE, path, Bytes::new(), ORDER_PATIENCE).await?)
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, order: &impl Serialize) -> Result<T, CallError> {
        self.order(Method::POST, path, order).await
    }

    async fn order<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        order: &impl Serialize,
    ) -> Result<T, CallError> {
        let body = serde_json::to_vec(order).map_err(|error| self.misunderstood(&error))?;
        self.decode(&self.send(method, path, body.into(), ORDER_PATIENCE).await?)
    }

    fn decode<T: DeserializeOwned>(&self, json: &[u8]) -> Result<T, CallError> {
        serde_json::from_slice(json).map_err(|error| self.misunderstood(&error))
    }

    fn misunderstood(&self, reason: &impl ToString) -> CallError {
        CallError::Misunderstood { address: self.address.clone(), reason: reason.to_string() }
    }

    async fn send(&self, method: Method, path: &str, body: Bytes, limit: Duration) -> Result<Bytes, CallError> {
        let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
        let exchange = async {
            let failed = |source| CallError::Connect { address: self.address.clone(), source };
            match &self.address {
                AdminAddress::Unix(socket) => {
                    let socket = UnixStream::connect(socket).await.map_err(failed)?;
                    self.exchange(socket, request.header(header::HOST, "localhost"), body).await
                }
                AdminAddress::Tcp(address) => {
                    let socket = TcpStream::connect(address).await.map_err(failed)?;
                    let mut request = request.header(header::HOST, address);
                    if let Some(token) = self.token.as_ref().and_then(Token::header) {
                        request = request.header(header::AUTHORIZATION, token);
                    }
                    self.exchange(socket, request, body).await
                }
            }
        };
        let answer = tokio::time::timeout(limit, exchange).await;
        let (status, bytes) = answer.unwrap_or_else(|_| Err(CallError::TimedOut(self.address.clone())))?;
        if status.is_success() {
            return Ok(bytes);
        }
        let Complaint { error } = self.decode(&bytes)?;
        Err(CallError::Refused { status: status.as_u16(), reason: error })
    }

    async fn exchange(
        &self,
        socket: impl AsyncRead + AsyncWrite + Unpin,
        request: Builder,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), CallError> {
        let lost = |source| CallError::Lost { address: self.address.clone(), source };
        let request = request.body(Full::new(body)).map_err(|error| lost(error.into()))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(socket)).await.map_err(|error| lost(error.into()))?;
        let asking = async move {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), LONGEST_ANSWER).collect().await?;
            Ok((status, body.to_bytes()))
        };
        // The connection does the work; whatever fails on it fails the request too.
        let (answer, _) = join(asking, connection).await;
        answer.map_err(lost)
    }
}

/// The path of an order for an image.
fn of_image(image: &str, verb: &str) -> String {
    format!("/v1/images/{}/{verb}", utf8_percent_encode(image, NON_ALPHANUMERIC))
}

/// The path of an order for an export.
fn of_export(export: &str, verb: &str) -> String {
    format!("/v1/exports/{}/{verb}", utf8_percent_encode(export, NON_ALPHANUMERIC))
}

fn of_drain(export: Option<&str>) -> String {
    export.map_or_else(|| "/v1/drain".to_owned(), |export| of_export(export, "drain"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_one_segment_of_a_path() {
        assert_eq!(of_image("debian12", "pin"), "/v1/images/debian12/pin");
        assert_eq!(of_image("a b/é?#%", "pin"), "/v1/images/a%20b%2F%C3%A9%3F%23%25/pin");
        assert_eq!(of_image("..", "pin"), "/v1/images/%2E%2E/pin");
        assert_eq!(of_image("", "pin"), "/v1/images//pin");
    }
}
