//! The client's end of a redirect, on the client's own host.
//!
//! | module | moves |
//! | --- | --- |
//! | [`qmp`] | the disks of a virtual machine of qemu, by its monitor |
//! | [`kernel`] | the kernel's `/dev/nbdN`, by generic netlink |
//!
//! Owns: telling qemu and the kernel to use another server. Does not own: the servers, and whom they move.

pub mod kernel;
pub mod qmp;
