//! What was typed of TLS.

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::clock;
use crate::server::Protection;
use crate::tls::{Clients, set_default_certificates};

/// A certificate that expires sooner is warned of.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// How connections are protected.
#[derive(Debug, Args)]
pub(in crate::cli) struct Tls {
    /// Whether clients may or must speak TLS (1.3). [default: require with --tls-certificates, else off]
    #[arg(long, value_enum, value_name = "off|allow|require")]
    pub(in crate::cli) tls: Option<TlsChoice>,
    /// Certificates: server-cert.pem and server-key.pem for clients; ca-cert.pem (and ca-crl.pem) to know clients and
    /// upstreams by; client-cert.pem and client-key.pem for upstreams that want to know us.
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) tls_certificates: Option<PathBuf>,
    /// Refuse clients without a certificate that an authority in ca-cert.pem has signed.
    #[arg(long)]
    pub(in crate::cli) tls_verify_peer: bool,
}

/// A policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum TlsChoice {
    /// Clients that ask for TLS are told that there is none.
    Off,
    /// Clients that ask for TLS get it; others are served in clear.
    Allow,
    /// Clients without TLS get nothing.
    Require,
}

impl Tls {
    /// How clients are met. Also sets the certificates for upstreams.
    pub(in crate::cli) fn protection(&self) -> anyhow::Result<Option<Protection>> {
        if let Some(directory) = &self.tls_certificates {
            set_default_certificates(directory.clone());
        }
        let (choice, directory) = match (self.tls, &self.tls_certificates) {
            (None, None) | (Some(TlsChoice::Off), _) if self.tls_verify_peer => {
                bail!("--tls-verify-peer: there is no TLS to verify anybody by; --tls-certificates turns it on")
            }
            (None, None) | (Some(TlsChoice::Off), _) => return Ok(None),
            (Some(_), None) => bail!("--tls: there are no certificates; --tls-certificates names their directory"),
            // Who gives certificates and nothing else wants nobody to come without.
            (choice, Some(directory)) => (choice.unwrap_or(TlsChoice::Require), directory),
        };
        let clients = Clients::load(directory, self.tls_verify_peer)
            .context("TLS for clients (--tls off: the certificates are for upstreams only)")?;
        warn_of_expiry(&clients);
        Ok(Some(Protection { is_required: choice == TlsChoice::Require, clients }))
    }
}

fn warn_of_expiry(clients: &Clients) {
    let now = clock::moment().wall.duration_since(UNIX_EPOCH).unwrap_or_default();
    let left = Duration::from_secs(u64::try_from(clients.expires()).unwrap_or(0)).saturating_sub(now);
    if left.is_zero() {
        tracing::warn!("the server certificate has expired: clients will refuse it");
    } else if left < SOON {
        tracing::warn!(hours = left.as_secs() / 3600, "the server certificate expires soon");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(tls: Option<TlsChoice>, directory: Option<&str>, tls_verify_peer: bool) -> Tls {
        Tls { tls, tls_certificates: directory.map(PathBuf::from), tls_verify_peer }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        assert!(tls(None, None, false).protection().unwrap().is_none());
        for (arguments, reason) in [
            (tls(Some(TlsChoice::Allow), None, false), "no certificates"),
            (tls(Some(TlsChoice::Require), None, true), "no certificates"),
            (tls(None, None, true), "no TLS"),
            (tls(Some(TlsChoice::Off), None, true), "no TLS"),
            (tls(None, Some("/nowhere"), false), "server-cert.pem"),
        ] {
            let error = arguments.protection().map(drop).unwrap_err();
            assert!(format!("{error:#}").contains(reason), "{arguments:?}: {error:#}");
        }
    }
}
