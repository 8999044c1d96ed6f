//! What operators ordered to be fetched; durable.
