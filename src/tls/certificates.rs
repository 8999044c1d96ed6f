//! Certificates, keys and authorities from a directory, and what follows from them for each role.
//!
//! The names of the files are those that libvirt began and qemu, libnbd and nbdkit know: `ca-cert.pem`, `ca-crl.pem`,
//! `server-cert.pem`, `server-key.pem`, `client-cert.pem`, `client-key.pem`. So one directory serves all of them.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;

use super::handshake::{Failure, Handshake};
use super::names::certificate_facts;

/// The longest file that is read.
const MAX_FILE: u64 = 1 << 20;

const AUTHORITIES: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";

/// The certificates by which this process knows servers, and shows itself to them, unless a URI names others. Set once,
/// before there are connections.
static DEFAULT: OnceLock<PathBuf> = OnceLock::new();

/// Sets the directory of certificates for connections of this process to servers. The first call counts.
pub fn set_default_certificates(directory: PathBuf) {
    let _ = DEFAULT.set(directory);
}

/// The directory of certificates for connections to servers, if there is one.
pub fn default_certificates() -> Option<PathBuf> {
    DEFAULT.get().cloned()
}

/// Why certificates cannot be used.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file is far too long.
    #[error("{} has more than {MAX_FILE} bytes", .0.display())]
    TooLong(PathBuf),
    /// A file does not hold what its name says.
    #[error("{} holds no usable {what}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// Each file is fine, and they do not belong together.
    #[error("the certificates in {} cannot be used: {reason}", directory.display())]
    Together {
        /// The directory.
        directory: PathBuf,
        /// Why.
        reason: String,
    },
    /// The name of a server is no name.
    #[error("{0:?} is neither a host name nor an address that a certificate could be for")]
    Name(String),
}

/// A directory of certificates.
struct Directory<'a>(&'a Path);

impl Directory<'_> {
    /// The contents of a file; `None` if there is none.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, CertificateError> {
        let path = self.0.join(name);
        let failed = |error| CertificateError::Read { path: path.clone(), error };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(metadata) if metadata.len() > MAX_FILE => return Err(CertificateError::TooLong(path)),
            Ok(_) => {}
        }
        fs::read(&path).map(Some).map_err(failed)
    }

    fn content(&self, name: &str, what: &'static str, reason: impl fmt::Display) -> CertificateError {
        CertificateError::Content { path: self.0.join(name), what, reason: reason.to_string() }
    }

    fn together(&self, reason: impl fmt::Display) -> CertificateError {
        CertificateError::Together { directory: self.0.to_owned(), reason: reason.to_string() }
    }

    /// The authorities, if there are any.
    fn authorities(&self) -> Result<Option<Arc<RootCertStore>>, CertificateError> {
        let Some(pem) = self.read(AUTHORITIES)? else { return Ok(None) };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| self.content(AUTHORITIES, "authority", error))?;
            roots.add(certificate).map_err(|error| self.content(AUTHORITIES, "authority", error))?;
        }
        if roots.is_empty() {
            return Err(self.content(AUTHORITIES, "authority", "it is empty"));
        }
        Ok(Some(Arc::new(roots)))
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, CertificateError> {
        let Some(pem) = self.read(REVOKED)? else { return Ok(Vec::new()) };
        let lists = CertificateRevocationListDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
        lists.map_err(|error| self.content(REVOKED, "list of what was revoked", error))
    }

    /// The chain and the key of `role`, if there is a chain.
    fn identity(&self, role: &str) -> Result<Option<Identity>, CertificateError> {
        let (name, key_name) = (format!("{role}-cert.pem"), format!("{role}-key.pem"));
        let Some(pem) = self.read(&name)? else { return Ok(None) };
        let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| self.content(&name, "certificate", error))?;
        let missing = CertificateError::Read {
            path: self.0.join(&key_name),
            error: io::Error::new(io::ErrorKind::NotFound, "there is no such file"),
        };
        let pem = self.read(&key_name)?.ok_or(missing)?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| self.content(&key_name, "key", error))?;
        let facts = chain.first().and_then(certificate_facts);
        let facts = facts.ok_or_else(|| self.content(&name, "certificate", "it is empty"))?;
        Ok(Some(Identity { chain, key, expires: facts.expires }))
    }

    /// The authorities, which somebody must have signed for.
    fn required_authorities(&self) -> Result<Arc<RootCertStore>, CertificateError> {
        self.authorities()?.ok_or_else(|| CertificateError::Read {
            path: self.0.join(AUTHORITIES),
            error: io::Error::new(io::ErrorKind::NotFound, "there is no such file"),
        })
    }
}

struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    expires: i64,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// What a server shows its clients, and whom of them it believes.
#[derive(Debug, Clone)]
pub struct ServerIdentity {
    config: Arc<ServerConfig>,
    /// When the certificate expires, in seconds since 1970.
    pub expires: i64,
}

impl ServerIdentity {
    /// Reads the files of a server. With `verify_peer`, clients without a certificate are refused; without it, those
    /// that show one must show a good one, if there is an authority to hold it against.
    pub fn load(directory: &Path, verify_peer: bool) -> Result<Self, CertificateError> {
        let files = Directory(directory);
        let identity = files.identity("server")?.ok_or_else(|| CertificateError::Read {
            path: directory.join("server-cert.pem"),
            error: io::Error::new(io::ErrorKind::NotFound, "there is no such file"),
        })?;
        let roots = if verify_peer { Some(files.required_authorities()?) } else { files.authorities()? };
        let verifier = match roots {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(roots) => {
                let crls = files.revoked()?;
                let mut builder = WebPkiClientVerifier::builder_with_provider(roots, provider());
                if !crls.is_empty() {
                    builder =
                        builder.with_crls(crls).only_check_end_entity_revocation().allow_unknown_revocation_status();
                }
                let builder = if verify_peer { builder } else { builder.allow_unauthenticated() };
                builder.build().map_err(|error| files.together(error))?
            }
        };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| files.together(error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(identity.chain, identity.key)
            .map_err(|error| files.together(error))?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.enable_secret_extraction = true;
        Ok(Self { config: Arc::new(config), expires: identity.expires })
    }
}

/// How clients of a server are met: its identity, which can be replaced. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Clients {
    directory: Arc<Path>,
    verify_peer: bool,
    current: Arc<RwLock<ServerIdentity>>,
}

impl Clients {
    /// Reads the files of a server.
    pub fn load(directory: &Path, verify_peer: bool) -> Result<Self, CertificateError> {
        let current = ServerIdentity::load(directory, verify_peer)?;
        Ok(Self { directory: directory.into(), verify_peer, current: Arc::new(RwLock::new(current)) })
    }

    /// Reads the files again, for connections to come. If they cannot be used, nothing changes.
    pub fn reload(&self) -> Result<(), CertificateError> {
        let identity = ServerIdentity::load(&self.directory, self.verify_peer)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// When the certificate expires, in seconds since 1970.
    pub fn expires(&self) -> i64 {
        self.current.read().unwrap_or_else(PoisonError::into_inner).expires
    }

    /// A handshake with a client.
    pub fn handshake(&self) -> Result<Handshake, Failure> {
        let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).config);
        Handshake::server(&config)
    }
}

/// What we show servers, and which of them we believe.
#[derive(Debug, Clone)]
pub struct ClientIdentity {
    config: Arc<ClientConfig>,
}

impl ClientIdentity {
    /// Reads the files of a client: the authorities, and a certificate of its own if there is one.
    pub fn load(directory: &Path) -> Result<Self, CertificateError> {
        let files = Directory(directory);
        let mut builder = WebPkiServerVerifier::builder_with_provider(files.required_authorities()?, provider());
        let crls = files.revoked()?;
        if !crls.is_empty() {
            builder = builder.with_crls(crls).only_check_end_entity_revocation().allow_unknown_revocation_status();
        }
        let verifier = builder.build().map_err(|error| files.together(error))?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| files.together(error))?
            .with_webpki_verifier(verifier);
        let mut config = match files.identity("client")? {
            Some(identity) => {
                builder.with_client_auth_cert(identity.chain, identity.key).map_err(|error| files.together(error))?
            }
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(Self { config: Arc::new(config) })
    }

    /// A handshake with the server that must be the one of this name: a host name or an address.
    pub fn handshake(&self, name: &str) -> Result<Handshake, CertificateError> {
        let server = ServerName::try_from(name.to_owned()).map_err(|_| CertificateError::Name(name.to_owned()))?;
        Handshake::client(&self.config, server).map_err(|_| CertificateError::Name(name.to_owned()))
    }
}
