//! How fast, for receivers of different strength.
//!
//! STUB
