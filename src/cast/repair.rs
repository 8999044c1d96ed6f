//! The needs of all receivers together: what is sent again, and what is left to upstreams.
//!
//! STUB
