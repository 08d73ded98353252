//! The CPU tier: one file per operation, each on host slices.

pub(crate) mod backward;
pub(crate) mod conv1d;
pub(crate) mod gemm;
pub(crate) mod reduce;
