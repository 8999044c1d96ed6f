//! Moves the disks of a virtual machine of qemu to another server, by its monitor (QMP).
