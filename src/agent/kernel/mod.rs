//! The kernel's `/dev/nbdN`: attached, moved to another server, detached, by generic netlink.
