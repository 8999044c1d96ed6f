//! STUB (part B). Which clients should be moved where, so that servers share their load (pure).
