//! How a call is timed and recorded.

pub(crate) mod capture;
pub(crate) mod cuda;
pub(crate) mod options;
pub(crate) mod random;
pub(crate) mod record;
pub(crate) mod regime;
pub(crate) mod statistics;
