//! Convolutions that are timed: what on, and what a measurement leaves behind.

pub(crate) mod operands;
pub(crate) mod record;
