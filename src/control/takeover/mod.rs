//! A server is replaced while its clients stay connected.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Belongings`]: what goes from one process to the other |
//! | `estate` | how it is written down |
//! | `talk` | old and new one talk to each other, and only one of them touches a client |
//! | `manager` | the service manager keeps it while there is no process |
//!
//! The old one holds its connections, makes them into what can go on elsewhere, and closes its images. Then the new one
//! opens them. Only when it has is it told to go on; if it fails before, the old one opens its images again and goes on
//! itself. Sockets stay open in the old one until then, and nobody reads from them.
//!
//! Owns: the way from process to process. Does not own: how a connection is frozen (`server`), and what a server does
//! before and after (`cli`).

mod estate;
pub mod manager;
pub mod talk;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub use estate::{Estate, EstateError, Shutters, fuzz};

use crate::net::{Detached, Listener, inode};
use crate::server::Steering;
use crate::server::frozen::Frozen;

/// What a server leaves behind: an account of it, and the sockets that it is about.
#[derive(Debug)]
pub struct Belongings {
    estate: Estate,
    sockets: Vec<OwnedFd>,
}

/// What a server begins with that another one has left.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Sockets that listen.
    pub listeners: Vec<Listener>,
    /// Clients.
    pub clients: Vec<(Detached, Frozen)>,
    /// What took no newcomers.
    pub shutters: Shutters,
}

impl Belongings {
    /// Of a server whose connections are frozen.
    pub fn of(listeners: Vec<Listener>, clients: Vec<(OwnedFd, Frozen)>, steering: &Steering) -> io::Result<Self> {
        let (all, exports) = steering.gate.shuttered();
        let mut estate = Estate::new(Shutters { all, exports });
        let mut sockets = Vec::with_capacity(listeners.len() + clients.len());
        for listener in listeners {
            let (socket, listening) = listener.into_fd()?;
            estate.listeners.push((inode(&socket), listening));
            sockets.push(socket);
        }
        for (socket, frozen) in clients {
            sockets.push(socket);
            estate.clients.push(frozen);
        }
        Ok(Self { estate, sockets })
    }

    /// From an account and sockets, in any order. Sockets that it does not name are closed.
    pub fn from_parts(estate: Estate, sockets: Vec<OwnedFd>) -> Self {
        Self { estate, sockets }
    }

    /// The account.
    pub fn estate(&self) -> &Estate {
        &self.estate
    }

    /// All sockets; without those listening ones that the service manager has itself, if they are not `wanted`.
    fn sockets(&self, managers_are_wanted: bool) -> Vec<BorrowedFd<'_>> {
        let of_manager = |socket: &OwnedFd| {
            let number = inode(socket);
            self.estate.listeners.iter().any(|(inode, listening)| *inode == number && listening.asked.is_none())
        };
        self.sockets.iter().filter(|socket| managers_are_wanted || !of_manager(socket)).map(AsFd::as_fd).collect()
    }

    /// What is to be gone on with, in this thread's runtime. What is named in the account and was not found is left out: a
    /// client whose socket is gone has left.
    pub fn unpack(self) -> io::Result<Inherited> {
        let Estate { listeners, mut clients, shutters, .. } = self.estate;
        let mut inherited = Inherited { shutters, ..Inherited::default() };
        for socket in self.sockets {
            let number = inode(&socket);
            if let Some((_, listening)) = listeners.iter().find(|(inode, _)| *inode == number) {
                inherited.listeners.extend(Listener::from_fd(socket, Some(listening.clone()))?.ok());
            } else if let Some(position) = clients.iter().position(|client| client.socket == number) {
                inherited.clients.push((Detached::from_fd(socket)?, clients.swap_remove(position)));
            }
        }
        Ok(inherited)
    }
}
