//! Matrices on a device, with everything around them poisoned.

use kasmina::{Device, Element, Result, Tensor};

pub(crate) use super::poison::{Poison, bits};

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Row after row.
    Contiguous,
    /// Rows a multiple of 16 bytes apart, from an address that is one, with poison between.
    Aligned,
    /// Rows an odd number of elements apart, one element off an aligned address.
    Misaligned,
}

impl Placement {
    /// Row stride and first column.
    const fn of(self, columns: usize) -> (usize, usize) {
        match self {
            Self::Contiguous => (columns, 0),
            Self::Aligned => (columns.next_multiple_of(8) + 8, 8),
            Self::Misaligned => ((columns + 1) | 1, 1),
        }
    }
}

/// A matrix that is a view of a larger, poisoned one.
pub(crate) struct Placed<T: Element> {
    whole: Tensor<T>,
    /// The matrix itself.
    pub(crate) view: Tensor<T>,
    first_column: usize,
}

impl<T: Poison> Placed<T> {
    /// A matrix of these values, row by row.
    pub(crate) fn new(
        device: &Device,
        values: &[T],
        [rows, columns]: [usize; 2],
        placement: Placement,
    ) -> Result<Self> {
        let (stride, first_column) = placement.of(columns);
        let mut whole = vec![T::POISON; rows * stride];
        for (row, values) in values.chunks(columns).enumerate() {
            whole[row * stride + first_column..][..columns].copy_from_slice(values);
        }
        let whole = Tensor::from_slice(device, &whole, [rows, stride])?;
        let view = whole.columns(first_column..first_column + columns)?;
        Ok(Self { whole, view, first_column })
    }

    /// A matrix to write to, poisoned throughout.
    pub(crate) fn poisoned(
        device: &Device,
        shape: [usize; 2],
        placement: Placement,
    ) -> Result<Self> {
        Self::new(device, &vec![T::POISON; shape[0] * shape[1]], shape, placement)
    }

    /// The matrix's values, once it is sure that nothing around it was written.
    pub(crate) fn read(&self) -> std::result::Result<Vec<T>, String> {
        let columns = self.view.shape().columns();
        let stride = self.whole.shape().columns();
        let whole = self.whole.to_vec().map_err(|error| error.to_string())?;
        let mut values = Vec::with_capacity(self.view.len());
        for (row, whole) in whole.chunks(stride).enumerate() {
            for (column, value) in whole.iter().enumerate() {
                if column.checked_sub(self.first_column).is_some_and(|column| column < columns) {
                    values.push(*value);
                } else if value.bits() != T::POISON.bits() {
                    return Err(format!(
                        "row {row}: {value:?} was written {column} columns into a row of which \
                         {columns} from {} on are the output's",
                        self.first_column
                    ));
                }
            }
        }
        Ok(values)
    }
}
