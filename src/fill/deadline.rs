//! Which of several orders goes first, and which will be late.
