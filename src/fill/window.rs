//! How many bytes may be under way without being felt.
