//! CUDA versions of drivers, and which PTX each accepts.

use core::ffi::c_int;
use core::fmt;

/// The newest CUDA version a driver supports, as `cuDriverGetVersion` reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DriverVersion {
    /// The 12 of CUDA 12.8.
    pub major: u32,
    /// The 8 of CUDA 12.8.
    pub minor: u32,
}

impl DriverVersion {
    /// The version `major.minor`.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// From the driver's encoding, 1000 × major + 10 × minor.
    pub(crate) const fn from_encoded(encoded: c_int) -> Self {
        let encoded = encoded.unsigned_abs();
        Self::new(encoded / 1000, encoded % 1000 / 10)
    }

    /// Whether this driver compiles PTX of `.version major.minor`.
    ///
    /// A version newer than the table of [`required_driver_for_ptx`] counts as unsupported.
    #[must_use]
    pub fn supports_ptx(self, major: u32, minor: u32) -> bool {
        required_driver_for_ptx(major, minor).is_some_and(|required| self >= required)
    }
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// PTX versions and the CUDA version that introduced each, ascending in both
/// (PTX ISA reference, "Release Notes").
const PTX_INTRODUCED: [((u32, u32), DriverVersion); 22] = [
    ((6, 3), DriverVersion::new(10, 0)),
    ((6, 4), DriverVersion::new(10, 1)),
    ((6, 5), DriverVersion::new(10, 2)),
    ((7, 0), DriverVersion::new(11, 0)),
    ((7, 1), DriverVersion::new(11, 1)),
    ((7, 2), DriverVersion::new(11, 2)),
    ((7, 3), DriverVersion::new(11, 3)),
    ((7, 4), DriverVersion::new(11, 4)),
    ((7, 5), DriverVersion::new(11, 5)),
    ((7, 6), DriverVersion::new(11, 6)),
    ((7, 7), DriverVersion::new(11, 7)),
    ((7, 8), DriverVersion::new(11, 8)),
    ((8, 0), DriverVersion::new(12, 0)),
    ((8, 1), DriverVersion::new(12, 1)),
    ((8, 2), DriverVersion::new(12, 2)),
    ((8, 3), DriverVersion::new(12, 3)),
    ((8, 4), DriverVersion::new(12, 4)),
    // CUDA 12.6 brought no new PTX.
    ((8, 5), DriverVersion::new(12, 5)),
    ((8, 6), DriverVersion::new(12, 7)),
    ((8, 7), DriverVersion::new(12, 8)),
    ((8, 8), DriverVersion::new(12, 9)),
    ((9, 0), DriverVersion::new(13, 0)),
];

/// The oldest driver that compiles PTX of `.version major.minor`, or `None` for a version newer
/// than the table.
///
/// PTX older than 6.3 is reported as needing CUDA 10.0, the oldest that knows a supported GPU.
#[must_use]
pub fn required_driver_for_ptx(major: u32, minor: u32) -> Option<DriverVersion> {
    PTX_INTRODUCED
        .iter()
        .find(|(version, _)| *version >= (major, minor))
        .map(|(_, required)| *required)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_ascends_in_both_columns() {
        assert!(PTX_INTRODUCED.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1));
    }

    #[test]
    fn each_ptx_version_needs_the_cuda_that_introduced_it() {
        for ((major, minor), required) in [
            ((6, 0), (10, 0)),
            ((6, 3), (10, 0)),
            ((6, 5), (10, 2)),
            ((7, 0), (11, 0)),
            ((7, 8), (11, 8)),
            ((8, 0), (12, 0)),
            ((8, 5), (12, 5)),
            ((8, 6), (12, 7)),
            ((8, 8), (12, 9)),
            ((9, 0), (13, 0)),
        ] {
            let required = DriverVersion::new(required.0, required.1);
            assert_eq!(required_driver_for_ptx(major, minor), Some(required), "{major}.{minor}");
        }
    }

    #[test]
    fn a_driver_supports_the_ptx_of_its_own_and_older_versions_only() {
        let driver = DriverVersion::new(12, 6);
        assert!(driver.supports_ptx(6, 3));
        assert!(driver.supports_ptx(8, 5));
        assert!(!driver.supports_ptx(8, 6));
        assert!(!DriverVersion::new(11, 8).supports_ptx(8, 0));
        assert!(DriverVersion::new(13, 0).supports_ptx(9, 0));
    }

    #[test]
    fn ptx_newer_than_the_table_is_not_promised() {
        assert_eq!(required_driver_for_ptx(10, 0), None);
        assert!(!DriverVersion::new(20, 0).supports_ptx(10, 0));
    }

    #[test]
    fn the_drivers_encoding_is_decoded() {
        assert_eq!(DriverVersion::from_encoded(13_000), DriverVersion::new(13, 0));
        assert_eq!(DriverVersion::from_encoded(12_080), DriverVersion::new(12, 8));
        assert_eq!(DriverVersion::from_encoded(10_020).to_string(), "10.2");
    }
}
