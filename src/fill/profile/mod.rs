//! What clients read in earlier runs.
