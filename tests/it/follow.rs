//! Mirrors that go where they are told.
