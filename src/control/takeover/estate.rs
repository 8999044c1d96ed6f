//! What a server leaves to its successor, written down.
//!
//! JSON in a file that has no name (`memfd_create(2)`) and is sealed: its descriptor is given away with the sockets. The
//! two programs may be of different versions: what a program does not know it passes over, what is missing has a default,
//! and an account of another form is refused.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::net::ListeningAt;
use crate::server::frozen::Frozen;
use crate::units::ByteSize;

/// The form. Another number is another form, which this program does not know.
const FORM: u32 = 1;
/// Bytes of the longest account. Each client may leave some megabytes behind, and few do.
const LONGEST: u64 = 1 << 30;

/// The account.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estate {
    form: u32,
    /// The version of the program that wrote it.
    pub version: String,
    /// Listening sockets by their inodes.
    pub listeners: Vec<(u64, ListeningAt)>,
    /// Clients.
    pub clients: Vec<Frozen>,
    /// What takes no newcomers.
    #[serde(default)]
    pub shutters: Shutters,
}

/// What takes no newcomers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutters {
    /// Everything.
    pub all: bool,
    /// These exports.
    pub exports: Vec<String>,
}

/// Why an account cannot be used.
#[derive(Debug, Error)]
pub enum EstateError {
    /// The system refused.
    #[error("cannot read or write the account of the connections")]
    System(#[from] io::Error),
    /// It is not one.
    #[error("the account of the connections makes no sense")]
    Form(#[from] serde_json::Error),
    /// It is of another form.
    #[error("the account of the connections has form {0}, and this program knows form {FORM}")]
    OtherForm(u32),
    /// It is too long to be one.
    #[error("the account of the connections is longer than {}", ByteSize(LONGEST))]
    TooLong,
}

/// As much as says which form the rest has.
#[derive(Deserialize)]
struct Head {
    form: u32,
}

impl Estate {
    pub(super) fn new(shutters: Shutters) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { form: FORM, version, listeners: Vec::new(), clients: Vec::new(), shutters }
    }

    /// Reads an account from its bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, EstateError> {
        let Head { form } = serde_json::from_slice(bytes)?;
        if form != FORM {
            return Err(EstateError::OtherForm(form));
        }
        Ok(serde_json::from_slice(bytes)?)
    }

    /// Writes it into a file without a name. Does not wait for any disk.
    pub fn write(&self) -> Result<OwnedFd, EstateError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("headwater", flags).map_err(io::Error::from)?;
        let mut file = io::BufWriter::new(File::from(memory));
        serde_json::to_writer(&mut file, self)?;
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
        Ok(file.into())
    }

    /// Reads it from there.
    pub fn read(file: OwnedFd) -> Result<Self, EstateError> {
        let mut file = File::from(file);
        file.rewind()?;
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes)?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > LONGEST) {
            return Err(EstateError::TooLong);
        }
        Self::parse(&bytes)
    }
}

/// Reads arbitrary bytes as an account.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    if let Ok(estate) = Estate::parse(data) {
        let again = serde_json::to_vec(&estate).map(|bytes| Estate::parse(&bytes));
        assert!(matches!(again, Ok(Ok(again)) if again == estate), "it is not read as it was written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    use crate::export::{Origin, Visitor};
    use crate::server::frozen::{Agreed, Ask, Blob, Done, FrozenMode, FrozenPayload, FrozenRest, What};

    fn client() -> Frozen {
        Frozen {
            socket: 4711,
            peer: "192.0.2.1:1".into(),
            visitor: Visitor { address: Origin::Unix, tls: None },
            tls: None,
            export: "a".into(),
            identity: None,
            file: Some([1, 2]),
            is_mirror: false,
            mirror: None,
            connection: None,
            is_relay: false,
            relayed_to: None,
            agreed: Agreed {
                size: 1 << 40,
                flags: 1,
                minimum_block: 1,
                maximum_payload: 32 << 20,
                replies: FrozenMode::Structured,
                contexts: vec![(1, "base:allocation".into())],
            },
            done: Done::default(),
            input: Blob(vec![0, 255, 1]),
            output: Blob(Vec::new()),
            held: Blob(b"held".to_vec()),
            payload: Some(FrozenPayload {
                cookie: u64::MAX,
                offset: 0,
                rest: FrozenRest::Write { start: 0, end: 512, stable: true },
                error: 28,
                message: "no space".into(),
            }),
            asks: vec![Ask { cookie: 1, offset: 2, what: What::Read { whole: true, begun: true }, start: 3, end: 4 }],
        }
    }

    #[test]
    fn an_account_is_read_as_it_was_written_and_cannot_be_changed() {
        let mut estate = Estate::new(Shutters { all: false, exports: vec!["b".into()] });
        estate.listeners.push((1, ListeningAt { asked: Some(":1".into()), made: Some((1, 2)) }));
        estate.clients.push(client());
        let file = estate.write().unwrap();
        let mut again = File::from(file.try_clone().unwrap());
        assert!(again.write_all(b"x").is_err());
        assert_eq!(Estate::read(file).unwrap(), estate);
        assert!(!format!("{estate:?}").contains("255"), "bytes of images are not shown");
    }

    #[test]
    fn what_another_version_says_is_passed_over_or_refused() {
        let mut json = serde_json::to_value(Estate::new(Shutters::default())).unwrap();
        json["something"] = 1.into();
        json.as_object_mut().unwrap().remove("shutters");
        assert!(Estate::parse(json.to_string().as_bytes()).is_ok());
        json["form"] = 2.into();
        json["clients"] = "another".into();
        assert!(matches!(Estate::parse(json.to_string().as_bytes()), Err(EstateError::OtherForm(2))));
        assert!(Estate::parse(b"{}").is_err());
        fuzz(b"{}");
        fuzz(&serde_json::to_vec(&Estate::new(Shutters::default())).unwrap());
    }
}
