//! What is read from a certificate that has been verified: whom it names, and until when it holds.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Names of one certificate that are looked at.
const MAX_NAMES: usize = 64;

/// What a certificate says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its names: of the alternative ones those that are host names, URIs and mail addresses, then the common name; each
    /// once.
    pub names: Vec<String>,
    /// When it expires, in seconds since 1970.
    pub expires: i64,
}

/// What a certificate says; `None` if it is none.
pub fn certificate_facts(certificate: &CertificateDer<'_>) -> Option<Facts> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if names.len() < MAX_NAMES && !name.is_empty() && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    };
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        for name in &alternative.value.general_names {
            match name {
                GeneralName::DNSName(name) | GeneralName::URI(name) | GeneralName::RFC822Name(name) => add(name),
                _ => {}
            }
        }
    }
    for name in certificate.subject().iter_common_name() {
        if let Ok(name) = name.as_str() {
            add(name);
        }
    }
    Some(Facts { names, expires: certificate.validity().not_after.timestamp() })
}
