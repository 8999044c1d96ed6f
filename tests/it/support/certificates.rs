//! Certificates as operators make them, in directories as qemu, libnbd and nbdkit know them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};

use super::Scratch;

/// Somebody who signs.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What is special about a directory.
#[derive(Default, Clone, Copy)]
pub(crate) struct Kind {
    /// The server's certificate is for another host.
    pub(crate) other_host: bool,
    /// Both certificates have expired.
    pub(crate) expired: bool,
    /// There is no certificate for clients.
    pub(crate) no_client: bool,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = rcgen::DistinguishedName::new();
        // Two are two.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        params.distinguished_name.push(DnType::CommonName, format!("authority {number}"));
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A directory in `scratch` with a server's certificate for `localhost` and a client's for `host7.example`.
    pub(crate) fn directory(&self, scratch: &Scratch, name: &str, kind: Kind) -> PathBuf {
        let directory = scratch.path(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("ca-cert.pem"), self.0.pem()).unwrap();
        let server = if kind.other_host { "other.example" } else { "localhost" };
        self.sign(&directory, "server", server, ExtendedKeyUsagePurpose::ServerAuth, kind);
        if !kind.no_client {
            self.sign(&directory, "client", "host7.example", ExtendedKeyUsagePurpose::ClientAuth, kind);
        }
        directory
    }

    fn sign(&self, directory: &Path, role: &str, host: &str, usage: ExtendedKeyUsagePurpose, kind: Kind) {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        if host == "localhost" {
            params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        }
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("the {role}"));
        params.extended_key_usages = vec![usage];
        if kind.expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(directory.join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
        fs::write(directory.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
    }
}

/// The same place by TLS, with these certificates.
pub(crate) fn secured(uri: &str, directory: &Path) -> String {
    let uri = uri.replacen("nbds", "nbd", 1).replacen("nbd", "nbds", 1);
    let separator = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{separator}tls-certificates={}&tls-hostname=localhost", directory.display())
}
