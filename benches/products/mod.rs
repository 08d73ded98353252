//! Matrix products: what is computed, and what a measurement of it leaves behind.

pub(crate) mod gradients;
pub(crate) mod operands;
pub(crate) mod record;
