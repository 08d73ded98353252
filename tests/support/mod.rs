//! What the tests of operations share: finding a GPU, random numbers, references.

pub(crate) mod gpu;
pub(crate) mod linear;
pub(crate) mod operand;
pub(crate) mod random;
