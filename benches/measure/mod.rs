//! How a call is timed, checked and recorded.

pub(crate) mod capture;
pub(crate) mod cuda;
pub(crate) mod operands;
pub(crate) mod record;
pub(crate) mod regime;
pub(crate) mod statistics;
