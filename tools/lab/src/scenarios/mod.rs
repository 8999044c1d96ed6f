//! What is measured. Each file has one scenario, or two that are alike.

pub(crate) mod background;
pub(crate) mod balance;
pub(crate) mod boot;
pub(crate) mod cast;
mod cast_reader;
pub(crate) mod chain;
pub(crate) mod cloud;
pub(crate) mod forge;
pub(crate) mod hostile;
pub(crate) mod link;
pub(crate) mod page;
pub(crate) mod reads;
pub(crate) mod redirect;
pub(crate) mod vm;
