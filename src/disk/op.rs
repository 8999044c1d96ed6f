//! One operation on a file, with all memory that it needs.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use io_uring::{opcode, squeue, types};

/// How far one read or write system call goes: the kernel caps both at a little under 2 GiB.
pub(super) const MAX_TRANSFER: usize = 1 << 30;

/// An operation. Owns its file and its buffer, so that it can outlive whoever asked for it.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) file: Arc<OwnedFd>,
    pub(super) task: Task,
}

/// What to do.
#[derive(Debug)]
pub(super) enum Task {
    /// Read up to `length` bytes behind the bytes that `buffer` holds; its spare capacity is at least `length`.
    Read { buffer: BytesMut, length: usize, offset: u64 },
    /// Write the bytes; with `stable`, they are on stable storage when it is done.
    Write { data: Bytes, offset: u64, stable: bool },
    /// Make all completed writes durable.
    SyncData,
    /// `fallocate(2)`.
    Allocate { mode: i32, offset: u64, length: u64 },
}

impl Op {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The submission queue entry for this operation.
    ///
    /// It holds pointers into the operation's buffer, which stay valid while the operation is not dropped and its
    /// buffer is not touched: both buffer types keep their bytes on the heap, so moving `self` does not move them.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.fd());
        match &mut self.task {
            Task::Read { buffer, length, offset } => {
                let spare = buffer.spare_capacity_mut();
                let length = transfer(*length, spare.len());
                opcode::Read::new(fd, spare.as_mut_ptr().cast(), length).offset(*offset).build()
            }
            Task::Write { data, offset, stable } => {
                let length = transfer(data.len(), data.len());
                opcode::Write::new(fd, data.as_ptr(), length).offset(*offset).rw_flags(write_flags(*stable)).build()
            }
            Task::SyncData => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Task::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(fd, *length).offset(*offset).mode(*mode).build()
            }
        }
    }

    /// Does the operation now, on this thread, with blocking system calls.
    pub(super) fn perform(&mut self) -> io::Result<usize> {
        let fd = self.fd();
        match &mut self.task {
            Task::Read { buffer, length, offset } => {
                let spare = buffer.spare_capacity_mut();
                let length = transfer(*length, spare.len()) as usize;
                // SAFETY: the pointer and length denote spare capacity of a buffer that we borrow exclusively.
                check(unsafe { libc::pread(fd, spare.as_mut_ptr().cast(), length, signed(*offset)?) })
            }
            Task::Write { data, offset, stable } => {
                let length = transfer(data.len(), data.len()) as usize;
                let vector = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: length };
                // SAFETY: the vector denotes bytes that `data` keeps alive; the kernel only reads them.
                check(unsafe { libc::pwritev2(fd, &raw const vector, 1, signed(*offset)?, write_flags(*stable)) })
            }
            // SAFETY: no memory is passed.
            Task::SyncData => check(unsafe { libc::fdatasync(fd) } as isize),
            Task::Allocate { mode, offset, length } => {
                // SAFETY: no memory is passed.
                check(unsafe { libc::fallocate(fd, *mode, signed(*offset)?, signed(*length)?) } as isize)
            }
        }
    }

    /// Notes that the kernel has filled `bytes` of a read's spare capacity.
    pub(super) fn filled(&mut self, bytes: usize) {
        if let Task::Read { buffer, length, .. } = &mut self.task {
            assert!(bytes <= *length, "the kernel filled more than it was given");
            // SAFETY: `entry` and `perform` give the kernel the bytes behind `len()`, at most `length` of them and
            // at most the spare capacity; it reported that the first `bytes` of them are written.
            unsafe { buffer.set_len(buffer.len() + bytes) };
        }
    }
}

/// The length of one transfer as the kernel takes it.
fn transfer(wanted: usize, available: usize) -> u32 {
    u32::try_from(wanted.min(available).min(MAX_TRANSFER)).expect("bounded by MAX_TRANSFER")
}

const fn write_flags(stable: bool) -> i32 {
    if stable { libc::RWF_DSYNC } else { 0 }
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

pub(super) fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
