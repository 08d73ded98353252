//! Copies from tensor to tensor.
#![forbid(unsafe_code)]

use super::{Storage, Tensor};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gemm::{check_shape, ordered};

impl<T: Element> Tensor<T> {
    /// Overwrites the elements with those of `values`, which errors call so. Enqueued on this
    /// tensor's stream; where `values` belong to another of the same GPU, that stream is ordered
    /// around the copy.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DeviceMismatch`] and [`Error::Overlap`] before anything is
    /// enqueued, [`Error::Driver`].
    pub(crate) fn assign(&mut self, op: &'static str, values: &Self) -> Result<()> {
        let operand = "values";
        let (expected, got) = (self.device.id(), values.device.id());
        if got != expected {
            return Err(Error::DeviceMismatch { op, operand, expected, got });
        }
        check_shape(op, operand, self.shape, &values.shape)?;
        if self.overlaps(values) {
            return Err(Error::Overlap { op, operand });
        }
        match (&*self.storage, &*values.storage) {
            (Storage::Gpu(target), Storage::Gpu(source)) if !self.is_empty() => {
                let streams = std::iter::once(values.device.stream());
                ordered(self.device.stream(), streams, || {
                    target.copy_from(self.region(), source, values.region())
                })
            }
            _ => {
                self.store(values.to_vec()?);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn values_are_copied_between_views_with_gaps_of_different_size() {
        let cpu = Device::cpu();
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let source = Tensor::from_slice(&cpu, &values, [3, 4]).unwrap().columns(1..3).unwrap();
        let whole = Tensor::<f32>::zeros(&cpu, [3, 3]).unwrap();
        whole.columns(0..2).unwrap().assign("copy", &source).unwrap();
        assert_eq!(whole.to_vec().unwrap(), [1.0, 2.0, 0.0, 5.0, 6.0, 0.0, 9.0, 10.0, 0.0]);
    }

    #[test]
    fn values_that_overlap_their_target_are_refused_and_neighbours_are_not() {
        let whole = Tensor::<f32>::full(&Device::cpu(), [2, 4], 1.0).unwrap();
        let mut left = whole.columns(0..2).unwrap();
        let error = left.assign("copy", &whole.columns(1..3).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Overlap { operand: "values", .. }));
        left.assign("copy", &whole.columns(2..4).unwrap()).unwrap();
        let mut nothing = whole.columns(1..1).unwrap();
        nothing.assign("copy", &whole.columns(4..4).unwrap()).unwrap();
    }
}
