//! Where one client's reads lead to.
