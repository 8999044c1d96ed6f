//! The keys of one direction: derived from its traffic secret, used for one record after the other.
//!
//! RFC 8446, 5.2 and 5.3 (records and nonces), 7.1 to 7.3 (the key schedule from the traffic secrets on).

use std::fmt;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::crypto::tls13::{HkdfExpander, OkmBlock};
use rustls::{CipherSuite, ConnectionTrafficSecrets, SupportedCipherSuite, Tls13CipherSuite};
use serde::{Deserialize, Serialize};

use super::records::RecordError;

/// The bytes of an authentication tag, the same in all suites.
pub(super) const TAG: usize = 16;

/// A cipher suite of TLS 1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Suite {
    /// `TLS_AES_128_GCM_SHA256`.
    Aes128,
    /// `TLS_AES_256_GCM_SHA384`.
    Aes256,
    /// `TLS_CHACHA20_POLY1305_SHA256`.
    Chacha20,
}

impl Suite {
    pub(super) const fn of(suite: CipherSuite) -> Option<Self> {
        match suite {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => Some(Self::Aes128),
            CipherSuite::TLS13_AES_256_GCM_SHA384 => Some(Self::Aes256),
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Some(Self::Chacha20),
            _ => None,
        }
    }

    fn parts(self) -> (&'static Tls13CipherSuite, &'static aead::Algorithm) {
        let (suite, algorithm) = match self {
            Self::Aes128 => (&cipher_suite::TLS13_AES_128_GCM_SHA256, &aead::AES_128_GCM),
            Self::Aes256 => (&cipher_suite::TLS13_AES_256_GCM_SHA384, &aead::AES_256_GCM),
            Self::Chacha20 => (&cipher_suite::TLS13_CHACHA20_POLY1305_SHA256, &aead::CHACHA20_POLY1305),
        };
        match suite {
            SupportedCipherSuite::Tls13(suite) => (suite, algorithm),
            #[expect(unreachable_patterns, reason = "another crate may turn TLS 1.2 on")]
            _ => unreachable!("these suites are those of TLS 1.3"),
        }
    }

    /// Bytes of a traffic secret.
    const fn secret_length(self) -> usize {
        match self {
            Self::Aes128 | Self::Chacha20 => 32,
            Self::Aes256 => 48,
        }
    }
}

/// The keys of one direction.
pub(super) struct Keys {
    suite: Suite,
    secret: OkmBlock,
    key: LessSafeKey,
    iv: [u8; aead::NONCE_LEN],
    /// The number of the next record.
    sequence: u64,
}

impl fmt::Debug for Keys {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("suite", &self.suite).field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Keys {
    /// The keys that follow from a traffic secret, at the record of this number.
    pub(super) fn new(suite: Suite, secret: &[u8], sequence: u64) -> Result<Self, RecordError> {
        if secret.len() != suite.secret_length() {
            return Err(RecordError::Keys);
        }
        let secret = OkmBlock::new(secret);
        let (parts, algorithm) = suite.parts();
        let expander = parts.hkdf_provider.expander_for_okm(&secret);
        let (mut key, mut iv) = ([0; 32], [0; aead::NONCE_LEN]);
        let key = &mut key[..algorithm.key_len()];
        expand(&*expander, b"key", key)?;
        expand(&*expander, b"iv", &mut iv)?;
        let key = UnboundKey::new(algorithm, key).map_err(|_| RecordError::Keys)?;
        Ok(Self { suite, secret, key: LessSafeKey::new(key), iv, sequence })
    }

    /// Turns to the next generation ("Updating Traffic Secrets").
    pub(super) fn advance(&mut self) -> Result<(), RecordError> {
        let (parts, _) = self.suite.parts();
        let mut next = [0; OkmBlock::MAX_LEN];
        let next = &mut next[..self.suite.secret_length()];
        expand(&*parts.hkdf_provider.expander_for_okm(&self.secret), b"traffic upd", next)?;
        *self = Self::new(self.suite, next, 0)?;
        Ok(())
    }

    pub(super) const fn suite(&self) -> Suite {
        self.suite
    }

    pub(super) fn secret(&self) -> &[u8] {
        self.secret.as_ref()
    }

    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether these are the keys that rustls has derived.
    pub(super) fn are(&self, secrets: &ConnectionTrafficSecrets) -> bool {
        let (suite, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { iv, .. } => (Suite::Aes128, iv),
            ConnectionTrafficSecrets::Aes256Gcm { iv, .. } => (Suite::Aes256, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { iv, .. } => (Suite::Chacha20, iv),
            _ => return false,
        };
        suite == self.suite && iv.as_ref() == self.iv
    }

    /// The nonce of the next record ("Per-Record Nonce"), which thereby is used.
    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Keys)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Encrypts `plain` and `kind` into `out`, which is [`TAG`] and a byte longer.
    pub(super) fn seal(&mut self, header: [u8; 5], plain: &[u8], kind: u8, out: &mut [u8]) -> Result<(), RecordError> {
        let nonce = self.nonce()?;
        let (cipher, rest) = out.split_at_mut(plain.len());
        self.key
            .seal_out_of_place_scatter(nonce, Aad::from(header), plain, cipher, &[kind], rest)
            .map_err(|_| RecordError::Keys)
    }

    /// Encrypts what `out` begins with, and `kind`, in place.
    pub(super) fn seal_in_place(
        &mut self,
        header: [u8; 5],
        length: usize,
        kind: u8,
        out: &mut [u8],
    ) -> Result<(), RecordError> {
        let nonce = self.nonce()?;
        let (plain, rest) = out.split_at_mut(length);
        self.key.seal_in_place_scatter(nonce, Aad::from(header), plain, &[kind], rest).map_err(|_| RecordError::Keys)
    }

    /// Decrypts a record in place. Gives the length of what is in it, with its kind and padding.
    pub(super) fn open(&mut self, header: [u8; 5], cipher: &mut [u8]) -> Result<usize, RecordError> {
        let nonce = self.nonce()?;
        let plain = self.key.open_in_place(nonce, Aad::from(header), cipher).map_err(|_| RecordError::Forged)?;
        Ok(plain.len())
    }
}

/// `HKDF-Expand-Label` without a context.
fn expand(expander: &dyn HkdfExpander, label: &[u8], output: &mut [u8]) -> Result<(), RecordError> {
    const PREFIX: &[u8] = b"tls13 ";
    let length = u16::try_from(output.len()).map_err(|_| RecordError::Keys)?.to_be_bytes();
    let label_length = u8::try_from(PREFIX.len() + label.len()).map_err(|_| RecordError::Keys)?;
    expander.expand_slice(&[&length, &[label_length], PREFIX, label, &[0]], output).map_err(|_| RecordError::Keys)
}
