//! Extents of a tensor.
#![forbid(unsafe_code)]

use std::fmt;

use crate::error::Error;

/// The extents of a row-major tensor: 1 to 4 axes, the last one contiguous.
///
/// Operations on matrices take the last axis as the columns and all others together as the rows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    extents: [usize; Self::MAX_RANK],
    rank: usize,
}

impl Shape {
    /// The most axes a shape can have.
    pub const MAX_RANK: usize = 4;

    /// The extents, slowest axis first.
    #[must_use]
    pub fn extents(&self) -> &[usize] {
        &self.extents[..self.rank]
    }

    /// The number of axes.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// The number of elements; `None` where it exceeds `isize::MAX`, the most that memory holds.
    #[must_use]
    pub fn elements(&self) -> Option<usize> {
        // An extent of 0 empties the tensor however large the others are.
        if self.extents().contains(&0) {
            return Some(0);
        }
        self.extents()
            .iter()
            .try_fold(1usize, |product, &extent| product.checked_mul(extent))
            .filter(|&elements| isize::try_from(elements).is_ok())
    }

    /// The extent of the last axis.
    #[must_use]
    pub const fn columns(&self) -> usize {
        self.extents[self.rank - 1]
    }

    /// The product of all extents but the last, which saturates. That of a tensor with elements
    /// does not have to.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.extents[..self.rank - 1]
            .iter()
            .fold(1usize, |product, &extent| product.saturating_mul(extent))
    }

    /// The same shape with another extent of the last axis.
    #[must_use]
    pub const fn with_columns(mut self, columns: usize) -> Self {
        self.extents[self.rank - 1] = columns;
        self
    }

    /// The same shape with another extent of the first axis.
    pub(crate) const fn with_leading(mut self, extent: usize) -> Self {
        self.extents[0] = extent;
        self
    }
}

macro_rules! from_arrays {
    ($($rank:literal),+) => {$(
        impl From<[usize; $rank]> for Shape {
            fn from(extents: [usize; $rank]) -> Self {
                let mut padded = [1; Self::MAX_RANK];
                padded[..$rank].copy_from_slice(&extents);
                Self { extents: padded, rank: $rank }
            }
        }
    )+};
}
from_arrays!(1, 2, 3, 4);

impl TryFrom<&[usize]> for Shape {
    type Error = Error;

    fn try_from(extents: &[usize]) -> Result<Self, Error> {
        if extents.is_empty() || extents.len() > Self::MAX_RANK {
            return Err(Error::Rank { got: extents.len() });
        }
        let mut padded = [1; Self::MAX_RANK];
        padded[..extents.len()].copy_from_slice(extents);
        Ok(Self { extents: padded, rank: extents.len() })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.extents(), f)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.extents(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_axes_together_are_the_rows() {
        let shape = Shape::from([2, 3, 5]);
        assert_eq!((shape.rows(), shape.columns(), shape.elements()), (6, 5, Some(30)));
        let vector = Shape::from([7]);
        assert_eq!((vector.rows(), vector.columns()), (1, 7));
    }

    #[test]
    fn element_count_that_overflows_is_none_unless_an_extent_is_zero() {
        assert_eq!(Shape::from([usize::MAX, 2]).elements(), None);
        assert_eq!(Shape::from([isize::MAX as usize + 1]).elements(), None);
        assert_eq!(Shape::from([usize::MAX, 0, 2]).elements(), Some(0));
    }

    #[test]
    fn slices_convert_up_to_four_axes() {
        assert_eq!(Shape::try_from(&[1, 2][..]).unwrap(), Shape::from([1, 2]));
        assert!(matches!(Shape::try_from(&[1; 5][..]), Err(Error::Rank { got: 5 })));
        assert!(matches!(Shape::try_from(&[][..]), Err(Error::Rank { got: 0 })));
    }
}
