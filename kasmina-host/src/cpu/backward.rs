//! The elementwise and summing parts of a linear layer's backward pass on the CPU.
//!
//! The products are those of [`super::gemm`].

use kasmina_kernels::activation::Activation;
use rayon::prelude::*;

use super::gemm::Matrix;
use crate::element::Element;

/// Columns that one thread sums.
const BLOCK_N: usize = 64;

/// `dy ⊙ act'(saved)` without gaps between rows, into `dz`. All three have the same rows and
/// columns.
pub(crate) fn gradient<T: Element>(
    activation: Activation,
    dy: Matrix<'_, T>,
    saved: Matrix<'_, T>,
    dz: &mut [T],
) {
    dz.par_chunks_mut(dy.columns).enumerate().for_each(|(row, dz)| {
        let dy = &dy.data[row * dy.row_stride..][..dz.len()];
        let saved = &saved.data[row * saved.row_stride..][..dz.len()];
        for ((dz, dy), z) in dz.iter_mut().zip(dy).zip(saved) {
            *dz = T::from_f32(activation.gradient(z.to_f32(), dy.to_f32()));
        }
    });
}

/// The sums of the columns, added row by row in f64, so that their bits depend on no thread. Added
/// to what `db` holds if `accumulate`.
pub(crate) fn column_sums<T: Element>(dz: Matrix<'_, T>, db: &mut [T], accumulate: bool) {
    db.par_chunks_mut(BLOCK_N).enumerate().for_each(|(block, db)| {
        let mut sums = [0.0f64; BLOCK_N];
        for row in 0..dz.rows {
            let values = &dz.data[row * dz.row_stride + block * BLOCK_N..][..db.len()];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += f64::from(value.to_f32());
            }
        }
        for (db, sum) in db.iter_mut().zip(sums) {
            let before = if accumulate { f64::from(db.to_f32()) } else { 0.0 };
            *db = T::from_f32((before + sum) as f32);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_reads_rows_with_gaps_and_writes_them_without() {
        let dy = [1.0f32, 2.0, f32::NAN, 3.0, 4.0];
        let y = [0.0f32, 5.0, 6.0, 0.0];
        let mut dz = [f32::NAN; 4];
        let dy = Matrix { data: &dy[..], rows: 2, columns: 2, row_stride: 3 };
        let saved = Matrix { data: &y[..], rows: 2, columns: 2, row_stride: 2 };
        gradient(Activation::Relu, dy, saved, &mut dz);
        assert_eq!(dz, [0.0, 2.0, 3.0, 0.0]);
    }

    #[test]
    fn column_sums_of_more_columns_than_a_block_add_to_what_is_there_if_asked_to() {
        let (rows, columns) = (3, BLOCK_N + 5);
        let dz: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let dz = Matrix { data: &dz[..], rows, columns, row_stride: columns };
        let mut db = vec![1.0f32; columns];
        column_sums(dz, &mut db, true);
        let expected: Vec<f32> = (0..columns).map(|i| (3 * i + 3 * columns + 1) as f32).collect();
        assert_eq!(db, expected);
        column_sums(dz, &mut db, false);
        assert_eq!(db[0], (3 * columns) as f32);
    }
}
