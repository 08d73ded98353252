//! The same elements under another shape.
#![forbid(unsafe_code)]

use super::Tensor;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::shape::Shape;

impl<T: Element> Tensor<T> {
    /// The same elements, in row-major order, under another shape. Nothing is copied: the result
    /// shares the memory, so what is written through one shows in the other.
    ///
    /// A tensor whose rows have gaps between them can be given other rows only of the same length.
    ///
    /// ```
    /// use kasmina_host::{Device, Tensor};
    ///
    /// let device = Device::cpu();
    /// let sequences = Tensor::from_slice(&device, &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 2, 3])?;
    /// let matrix = sequences.reshape([1, 6])?;
    /// assert_eq!(matrix.to_vec()?, sequences.to_vec()?);
    /// # Ok::<(), kasmina_host::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape has another number of elements, [`Error::Strided`] if rows
    /// that have gaps between them would have to be merged or cut.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let op = "Tensor::reshape";
        let shape = shape.into();
        if shape.elements() != Some(self.len()) {
            return Err(Error::Shape { op, operand: "tensor", expected: shape, got: self.shape });
        }
        let (columns, row_stride) = (self.shape.columns(), self.row_stride);
        if shape.columns() == columns {
            return Ok(self.view(0, shape));
        }
        // Where there is one row, or none, nothing lies between rows.
        if self.shape.rows() > 1 && row_stride != columns && !self.is_empty() {
            return Err(Error::Strided { op, operand: "tensor", columns, row_stride });
        }
        Ok(Self { row_stride: shape.columns(), ..self.view(0, shape) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn counting(shape: impl Into<Shape>) -> Tensor<f32> {
        let shape = shape.into();
        let values: Vec<f32> = (0..shape.elements().unwrap()).map(|i| i as f32).collect();
        Tensor::from_slice(&Device::cpu(), &values, shape).unwrap()
    }

    #[test]
    fn a_reshaped_tensor_has_the_same_elements_in_the_same_memory() {
        let tensor = counting([2, 3, 4]);
        let mut matrix = tensor.reshape([2, 12]).unwrap();
        assert_eq!((matrix.shape().extents(), matrix.row_stride()), (&[2, 12][..], 12));
        assert_eq!(matrix.to_vec().unwrap(), tensor.to_vec().unwrap());
        matrix.copy_from_slice(&[7.0; 24]).unwrap();
        assert_eq!(tensor.to_vec().unwrap(), [7.0; 24]);
        assert!(matrix.overlaps(&tensor));
        assert_eq!(
            tensor.reshape([24]).unwrap().reshape([2, 3, 4]).unwrap().shape(),
            tensor.shape()
        );
    }

    #[test]
    fn rows_of_a_tensor_can_be_reshaped_where_they_lie() {
        let second = counting([3, 8]).rows(1..2).unwrap();
        let reshaped = second.reshape([2, 2, 2]).unwrap();
        assert_eq!(reshaped.rows(1..2).unwrap().to_vec().unwrap(), [12.0, 13.0, 14.0, 15.0]);
    }

    #[test]
    fn rows_with_gaps_keep_their_length() {
        let columns = counting([6, 4]).columns(1..3).unwrap();
        let deep = columns.reshape([2, 3, 2]).unwrap();
        assert_eq!((deep.row_stride(), deep.to_vec().unwrap()), (4, columns.to_vec().unwrap()));
        let error = columns.reshape([3, 4]).unwrap_err();
        assert!(matches!(error, Error::Strided { columns: 2, row_stride: 4, .. }), "{error}");
        let single = columns.rows(2..3).unwrap();
        assert_eq!(single.reshape([2, 1]).unwrap().to_vec().unwrap(), [9.0, 10.0]);
    }

    #[test]
    fn another_number_of_elements_is_refused() {
        for shape in [[5, 5], [0, 24], [usize::MAX, 2]] {
            let error = counting([4, 6]).reshape(shape).unwrap_err();
            let expected = Shape::from(shape);
            assert!(matches!(error, Error::Shape { expected: got, .. } if got == expected));
        }
    }

    #[test]
    fn a_tensor_without_elements_has_any_shape_without_elements() {
        let empty = counting([6, 4]).columns(2..2).unwrap();
        let reshaped = empty.reshape([usize::MAX, 0, 3]).unwrap();
        assert!(reshaped.is_empty() && reshaped.to_vec().unwrap().is_empty());
    }
}
