//! `Y = act(X·W + b)` and the products of its backward pass on the CPU: `matrixmultiply` for the products, rayon over blocks of Y.
//!
//! A block's size depends on the shapes alone and a block is computed by one thread, so the bits
//! of the result do not depend on the number of threads. f16 and bf16 are widened to f32 a block
//! at a time; every result is summed in f32 and rounded once.

use kasmina_kernels::activation::Activation;
use kasmina_kernels::gemm::{InputLayout, WeightLayout};
use rayon::prelude::*;

use crate::element::Element;

/// Rows of Y per block.
const BLOCK_M: usize = 128;
/// Columns of Y per block.
const BLOCK_N: usize = 256;
/// Depth that is widened at once. With the blocks above it bounds a thread's scratch memory to
/// 0.9 MB; a multiple of the 256 by which `matrixmultiply` walks k.
const BLOCK_K: usize = 512;

/// A row-major matrix in host memory, or a view of columns of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a, T> {
    /// From the first element of the first row to at least the last of the last row.
    pub(crate) data: &'a [T],
    /// Rows.
    pub(crate) rows: usize,
    /// Columns.
    pub(crate) columns: usize,
    /// Elements from row to row, at least `columns`.
    pub(crate) row_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Rows and columns from (`row`, `column`) on, at least one of each.
    fn part(self, row: usize, rows: usize, column: usize, columns: usize) -> Self {
        let start = row * self.row_stride + column;
        let end = start + (rows - 1) * self.row_stride + columns;
        Self { data: &self.data[start..end], rows, columns, row_stride: self.row_stride }
    }
}

impl<'a, T: Element> Matrix<'a, T> {
    /// The same numbers as f32: in place if they are, else copied to `scratch` without gaps.
    fn widen(self, scratch: &'a mut Vec<f32>) -> Matrix<'a, f32> {
        if let Ok(data) = bytemuck::try_cast_slice(self.data)
            && size_of::<T>() == size_of::<f32>()
        {
            let Self { rows, columns, row_stride, .. } = self;
            return Matrix { data, rows, columns, row_stride };
        }
        scratch.clear();
        for row in self.data.chunks(self.row_stride).take(self.rows) {
            scratch.extend(row[..self.columns].iter().map(|value| value.to_f32()));
        }
        Matrix { data: scratch, rows: self.rows, columns: self.columns, row_stride: self.columns }
    }
}

/// A block of Y and the rows of it that are written.
struct Block<'y, T> {
    row: usize,
    column: usize,
    rows: Vec<&'y mut [T]>,
}

/// One thread's memory for the block it works on.
#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    w: Vec<f32>,
    sums: Vec<f32>,
}

/// `y = act(x·w + bias)`, with `w` as `layout` says.
///
/// X has at least one column, the bias has a value for each column of Y, and Y has the rows of X;
/// `gemm::Forward` has checked so. Columns of `y` beyond those of the result are left alone.
pub(crate) fn forward<T: Element>(
    x: Matrix<'_, T>,
    w: Matrix<'_, T>,
    layout: WeightLayout,
    bias: Option<&[T]>,
    activation: Activation,
    y: &mut [T],
    y_row_stride: usize,
) {
    let operands = Operands { x, x_layout: InputLayout::Plain, w, layout };
    product(operands, y, y_row_stride, |sum, column, _| {
        let bias = bias.map_or(0.0, |bias| bias[column].to_f32());
        T::from_f32(activation.apply(sum + bias))
    });
}

/// The operands of a product, which have at least one k in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands<'a, T> {
    pub(crate) x: Matrix<'a, T>,
    pub(crate) x_layout: InputLayout,
    pub(crate) w: Matrix<'a, T>,
    pub(crate) layout: WeightLayout,
}

/// `y = finish(x·w)`: `finish` gets the sum, its column and what `y` holds there. Columns of `y`
/// beyond those of the result are left alone.
pub(crate) fn product<T: Element>(
    Operands { x, x_layout, w, layout }: Operands<'_, T>,
    y: &mut [T],
    y_row_stride: usize,
    finish: impl Fn(f32, usize, T) -> T + Sync,
) {
    let n = match layout {
        WeightLayout::InOut => w.columns,
        WeightLayout::OutIn => w.rows,
    };
    let (m, depth) = match x_layout {
        InputLayout::Plain => (x.rows, x.columns),
        InputLayout::Transposed => (x.columns, x.rows),
    };
    if m == 0 || n == 0 {
        return;
    }
    blocks(y, m, n, y_row_stride).into_par_iter().for_each_init(
        Scratch::default,
        |scratch, mut block| {
            let (rows, columns) = (block.rows.len(), block.rows[0].len());
            scratch.sums.clear();
            scratch.sums.resize(rows * columns, 0.0);
            // f32 is not copied, so there is no scratch memory to bound.
            let step = if size_of::<T>() == size_of::<f32>() { depth } else { BLOCK_K };
            for k in (0..depth).step_by(step) {
                let depth = step.min(depth - k);
                let x = match x_layout {
                    InputLayout::Plain => x.part(block.row, rows, k, depth),
                    InputLayout::Transposed => x.part(k, depth, block.row, rows),
                };
                let w = match layout {
                    WeightLayout::InOut => w.part(k, depth, block.column, columns),
                    WeightLayout::OutIn => w.part(block.column, columns, k, depth),
                };
                let (x, w) = (x.widen(&mut scratch.x), w.widen(&mut scratch.w));
                add_product(Operands { x, x_layout, w, layout }, &mut scratch.sums);
            }
            for (y, sums) in block.rows.iter_mut().zip(scratch.sums.chunks(columns)) {
                for (column, (y, &sum)) in y.iter_mut().zip(sums).enumerate() {
                    *y = finish(sum, block.column + column, *y);
                }
            }
        },
    );
}

/// The blocks of `y`, each with its rows of it.
fn blocks<T>(y: &mut [T], m: usize, n: usize, row_stride: usize) -> Vec<Block<'_, T>> {
    let mut blocks: Vec<Block<'_, T>> = Vec::new();
    let mut first_of_row = 0;
    for (row, y) in y.chunks_mut(row_stride).take(m).enumerate() {
        if row % BLOCK_M == 0 {
            first_of_row = blocks.len();
            let columns = (0..n).step_by(BLOCK_N);
            blocks.extend(columns.map(|column| Block { row, column, rows: Vec::new() }));
        }
        let parts = y[..n].chunks_mut(BLOCK_N);
        for (block, part) in blocks[first_of_row..].iter_mut().zip(parts) {
            block.rows.push(part);
        }
    }
    blocks
}

/// `sums += x·w`, with `sums` as wide as the result.
pub(crate) fn add_product(
    Operands { x, x_layout, w, layout }: Operands<'_, f32>,
    sums: &mut [f32],
) {
    let (m, k, x_m_stride, x_k_stride) = match x_layout {
        InputLayout::Plain => (x.rows, x.columns, x.row_stride, 1),
        InputLayout::Transposed => (x.columns, x.rows, 1, x.row_stride),
    };
    let (n, w_k_stride, w_n_stride) = match layout {
        WeightLayout::InOut => (w.columns, w.row_stride, 1),
        WeightLayout::OutIn => (w.rows, 1, w.row_stride),
    };
    assert_eq!(sums.len(), m * n);
    let stride = |elements: usize| isize::try_from(elements).expect("a slice's length fits");
    // SAFETY: `part` cut both slices to reach from the first to the last element that rows,
    // columns and strides describe, and so does the assertion for `sums`, which is borrowed
    // exclusively and has distinct elements at distinct positions.
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            1.0,
            x.data.as_ptr(),
            stride(x_m_stride),
            stride(x_k_stride),
            w.data.as_ptr(),
            stride(w_k_stride),
            stride(w_n_stride),
            1.0,
            sums.as_mut_ptr(),
            stride(n),
            1,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Small integers, whose products and sums are exact in f32.
    fn integers(count: usize, modulus: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7 + i / 3) % modulus) as f32 - 2.0).collect()
    }

    fn reference(x: &[f32], w: &[f32], layout: WeightLayout, shape: [usize; 3]) -> Vec<f32> {
        let [m, n, k] = shape;
        let w_at = |k_index: usize, column: usize| match layout {
            WeightLayout::InOut => w[k_index * n + column],
            WeightLayout::OutIn => w[column * k + k_index],
        };
        (0..m * n).map(|i| (0..k).map(|j| x[i / n * k + j] * w_at(j, i % n)).sum()).collect()
    }

    fn run<T: Element>(
        x: &[T],
        w: &[T],
        layout: WeightLayout,
        [m, n, k]: [usize; 3],
        bias: Option<&[T]>,
        activation: Activation,
    ) -> Vec<T> {
        let mut y = vec![T::from_f32(f32::NAN); m * n];
        let (w_rows, w_columns) = layout.rows_columns(k, n);
        forward(
            Matrix { data: x, rows: m, columns: k, row_stride: k },
            Matrix { data: w, rows: w_rows, columns: w_columns, row_stride: w_columns },
            layout,
            bias,
            activation,
            &mut y,
            n,
        );
        y
    }

    #[test]
    fn blocks_and_both_layouts_match_reference() {
        for shape in [[1, 1, 1], [1, 600, 17], [129, 257, 40], [300, 3, 1030]] {
            let [m, n, k] = shape;
            let (x, w) = (integers(m * k, 5), integers(k * n, 7));
            for layout in WeightLayout::ALL {
                let expected = reference(&x, &w, layout, shape);
                assert_eq!(run(&x, &w, layout, shape, None, Activation::None), expected);
                let [x, w] = [&x, &w].map(|values| -> Vec<bf16> {
                    values.iter().copied().map(bf16::from_f32).collect()
                });
                let expected: Vec<_> = expected.into_iter().map(bf16::from_f32).collect();
                assert_eq!(run(&x, &w, layout, shape, None, Activation::None), expected);
            }
        }
    }

    #[test]
    fn bias_and_activation_come_before_the_one_rounding() {
        // 256 + 1 is 256 in bf16, but the bias takes the 256 away first.
        let [x, w, bias] = [[256.0, 1.0], [1.0, 1.0], [-256.0, 0.0]].map(|v| v.map(bf16::from_f32));
        let y = run(&x, &w, WeightLayout::OutIn, [1, 1, 2], Some(&bias[..1]), Activation::Relu);
        assert_eq!(y, [bf16::ONE]);
    }

    #[test]
    fn columns_beyond_the_result_are_left_alone() {
        let (x, w, mut y) = ([1.0_f32; 6], [2.0_f32; 3], [9.0_f32; 7]);
        forward(
            Matrix { data: &x[..5], rows: 2, columns: 2, row_stride: 3 },
            Matrix { data: &w[..2], rows: 2, columns: 1, row_stride: 1 },
            WeightLayout::InOut,
            None,
            Activation::None,
            &mut y,
            4,
        );
        assert_eq!(y, [4.0, 9.0, 9.0, 9.0, 4.0, 9.0, 9.0]);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let shape = [200, 700, 333];
        let [m, n, k] = shape;
        let sines = |count: usize| -> Vec<f32> { (0..count).map(|i| (i as f32).sin()).collect() };
        let (x, w) = (sines(m * k), sines(k * n));
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&x, &w, WeightLayout::OutIn, shape, None, Activation::Gelu))
        };
        let one: Vec<u32> = of(1).into_iter().map(f32::to_bits).collect();
        for threads in [2, 3, 8] {
            let bits: Vec<u32> = of(threads).into_iter().map(f32::to_bits).collect();
            assert_eq!(bits, one);
        }
    }
}
