//! What the tests of operations share: finding a GPU, random numbers, references.

pub(crate) mod activation;
pub(crate) mod gpu;
pub(crate) mod linear;
pub(crate) mod operand;
pub(crate) mod poison;
pub(crate) mod random;
pub(crate) mod reduced;
