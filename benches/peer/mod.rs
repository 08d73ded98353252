//! Libraries to measure against, loaded at run time.

pub(crate) mod cublaslt;
