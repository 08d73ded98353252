//! Results that a device may still be computing.
#![forbid(unsafe_code)]

use std::fmt;
use std::mem::offset_of;

use kasmina_kernels::reduce::Moments;

use super::{Reduction, Summary};
use crate::error::Result;
use crate::gpu::Buffer;
use crate::tensor::Region;

const RECORD_BYTES: usize = size_of::<Moments>();

/// A summary that is being computed.
#[must_use = "a pending summary is worth nothing until it is read"]
pub struct PendingSummary {
    pub(super) moments: PendingMoments,
}

impl PendingSummary {
    /// Waits for the summary.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the reduction or an operation before it failed.
    pub fn read(&self) -> Result<Summary> {
        Ok(Summary::of(self.moments.read()?))
    }

    /// Whether it has been computed, so that [`read`](Self::read) waits for nothing but the copy of
    /// 56 bytes. Does not wait; always true on the CPU.
    ///
    /// It is asked of the reducer's stream, on which `read` copies: it says no as long as anything
    /// that was enqueued there since has not run.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the reduction or an operation before it failed, and
    /// while the stream is being captured.
    pub fn is_ready(&self) -> Result<bool> {
        self.moments.is_ready()
    }

    /// The device address of the result, for kernels that use it without a way over the host: one
    /// record as [`PendingSummaries::as_device_ptr`] describes it; 0 where there is none, on the CPU
    /// and for a tensor without elements.
    #[must_use]
    pub fn as_device_ptr(&self) -> u64 {
        self.moments.as_device_ptr()
    }
}

/// Summaries of segments, which are being computed.
#[must_use = "pending summaries are worth nothing until they are read"]
pub struct PendingSummaries {
    pub(super) moments: PendingMoments,
    pub(super) count: usize,
}

impl PendingSummaries {
    /// Waits for the summaries, in the order of the segments.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the reduction or an operation before it failed.
    pub fn read(&self) -> Result<Vec<Summary>> {
        Ok(self.moments.read_each(self.count)?.into_iter().map(Summary::of).collect())
    }

    /// Whether they have been computed: as [`PendingSummary::is_ready`].
    ///
    /// # Errors
    /// As there.
    pub fn is_ready(&self) -> Result<bool> {
        self.moments.is_ready()
    }

    /// How many segments there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are no segments.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The device address of the results, for kernels that use them without a way over the host; 0
    /// where there are none, on the CPU and for a matrix without elements.
    ///
    /// They are written once everything enqueued so far on the reducer's stream has run, and stay
    /// there as long as this lives. Each segment has a record of 56 bytes, aligned to 8: number of
    /// elements (u64), sum, mean and Σ (x − mean)² (f64), elements that are not finite and dead ones
    /// (u64), minimum and maximum (f32).
    #[must_use]
    pub fn as_device_ptr(&self) -> u64 {
        self.moments.as_device_ptr()
    }
}

impl fmt::Debug for PendingSummaries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingSummaries").field("count", &self.count).finish_non_exhaustive()
    }
}

/// A number that is being computed.
#[must_use = "a pending reduction is worth nothing until it is read"]
pub struct PendingReduction {
    pub(super) moments: PendingMoments,
    pub(super) reduction: Reduction,
}

impl PendingReduction {
    /// Waits for the number; `None` where `TelemetryReducer::reduce` gives it.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the reduction or an operation before it failed.
    pub fn read(&self) -> Result<Option<f64>> {
        Ok(self.reduction.of(&Summary::of(self.moments.read()?)))
    }

    /// Whether it has been computed: as [`PendingSummary::is_ready`].
    ///
    /// # Errors
    /// As there.
    pub fn is_ready(&self) -> Result<bool> {
        self.moments.is_ready()
    }

    /// The device address of the result, for kernels that use it without a way over the host: one
    /// record as [`PendingSummaries::as_device_ptr`] describes it. [`Reduction::Sum`] fills in the
    /// number of elements, sum and mean, [`Reduction::Max`] and [`Reduction::Min`] the number and what
    /// they are called after, the others all of it. 0 where there is none, on the CPU and for a
    /// tensor without elements.
    #[must_use]
    pub fn as_device_ptr(&self) -> u64 {
        self.moments.as_device_ptr()
    }
}

impl fmt::Debug for PendingSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingSummary").finish_non_exhaustive()
    }
}

impl fmt::Debug for PendingReduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingReduction")
            .field("reduction", &self.reduction)
            .finish_non_exhaustive()
    }
}

pub(super) enum PendingMoments {
    Known(Moments),
    /// Of each segment.
    KnownEach(Vec<Moments>),
    /// A record, or one for each segment.
    OnDevice(Buffer),
    /// From the single-stage kernel: one f32.
    SumOnDevice {
        count: u64,
        sum: Buffer,
    },
}

impl PendingMoments {
    fn is_ready(&self) -> Result<bool> {
        match self {
            Self::Known(_) | Self::KnownEach(_) => Ok(true),
            Self::OnDevice(buffer) | Self::SumOnDevice { sum: buffer, .. } => buffer.is_ready(),
        }
    }

    /// Where the records are.
    fn as_device_ptr(&self) -> u64 {
        match self {
            Self::OnDevice(buffer) => buffer.address(),
            Self::Known(_) | Self::KnownEach(_) | Self::SumOnDevice { .. } => 0,
        }
    }

    fn read(&self) -> Result<Moments> {
        match self {
            Self::Known(moments) => Ok(*moments),
            Self::KnownEach(each) => Ok(each.first().copied().unwrap_or(Moments::EMPTY)),
            Self::OnDevice(buffer) => Ok(from_record(&read_start(buffer)?)),
            Self::SumOnDevice { count, sum } => {
                let sum = f64::from(f32::from_ne_bytes(read_start(sum)?));
                Ok(Moments { count: *count, sum, mean: sum / *count as f64, ..Moments::EMPTY })
            }
        }
    }

    /// Those of `count` segments; what is known is the same for all.
    fn read_each(&self, count: usize) -> Result<Vec<Moments>> {
        match self {
            Self::KnownEach(each) => Ok(each.clone()),
            Self::OnDevice(buffer) if count > 0 => {
                let mut bytes = vec![0; count * RECORD_BYTES];
                let (row_bytes, row_stride) = (bytes.len(), bytes.len());
                buffer.read(Region { offset: 0, rows: 1, row_bytes, row_stride }, &mut bytes)?;
                let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
                Ok(records.iter().map(from_record).collect())
            }
            _ => Ok(vec![self.read()?; count]),
        }
    }
}

/// The first bytes of a buffer, once everything before on its stream has run.
fn read_start<const N: usize>(buffer: &Buffer) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    buffer.read(Region { offset: 0, rows: 1, row_bytes: N, row_stride: N }, &mut bytes)?;
    Ok(bytes)
}

/// The record as the device wrote it.
fn from_record(record: &[u8; RECORD_BYTES]) -> Moments {
    fn field<const N: usize>(record: &[u8; RECORD_BYTES], at: usize) -> [u8; N] {
        std::array::from_fn(|byte| record[at + byte])
    }
    Moments {
        count: u64::from_ne_bytes(field(record, offset_of!(Moments, count))),
        sum: f64::from_ne_bytes(field(record, offset_of!(Moments, sum))),
        mean: f64::from_ne_bytes(field(record, offset_of!(Moments, mean))),
        m2: f64::from_ne_bytes(field(record, offset_of!(Moments, m2))),
        min: f32::from_ne_bytes(field(record, offset_of!(Moments, min))),
        max: f32::from_ne_bytes(field(record, offset_of!(Moments, max))),
        non_finite: u64::from_ne_bytes(field(record, offset_of!(Moments, non_finite))),
        dead: u64::from_ne_bytes(field(record, offset_of!(Moments, dead))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Segments, TelemetryReducer, Tensor};

    #[test]
    fn results_on_the_cpu_are_ready_and_have_no_device_address() {
        let device = Device::cpu();
        let reducer = TelemetryReducer::new(&device).unwrap();
        for rows in [0, 3] {
            let tensor = Tensor::<f32>::zeros(&device, [rows, 2]).unwrap();
            let summary = reducer.summary_async(&tensor).unwrap();
            assert!(summary.is_ready().unwrap());
            assert_eq!(summary.as_device_ptr(), 0);
            let each = reducer.segmented_async(&tensor, Segments::Rows).unwrap();
            assert!(each.is_ready().unwrap());
            assert_eq!(each.as_device_ptr(), 0);
            let largest = reducer.reduce_async(&tensor, Reduction::Max).unwrap();
            assert!(largest.is_ready().unwrap());
            assert_eq!(largest.as_device_ptr(), 0);
        }
    }

    #[test]
    fn a_record_is_read_field_by_field() {
        let mut record = [0; RECORD_BYTES];
        record[offset_of!(Moments, m2)..][..8].copy_from_slice(&2.5f64.to_ne_bytes());
        record[offset_of!(Moments, max)..][..4].copy_from_slice(&1.5f32.to_ne_bytes());
        record[offset_of!(Moments, dead)..][..8].copy_from_slice(&7u64.to_ne_bytes());
        let moments = from_record(&record);
        assert_eq!((moments.m2, moments.max, moments.dead, moments.count), (2.5, 1.5, 7, 0));
    }
}
