//! What the bench of resident sessions measures with.

pub(crate) mod echo;
pub(crate) mod latency;
