//! One-dimensional convolution on the CPU: the walks that kernels take too, as products of
//! matrices of f32.
//!
//! Sequences are computed side by side, and within one, groups and blocks of positions. A block's
//! size depends on the shape alone and a block is computed by one thread, so the bits of the result
//! do not depend on the number of threads.

use kasmina_kernels::activation::Activation;
use kasmina_kernels::conv1d::{Conv1dShape, Gather, SequenceLayout};
use kasmina_kernels::gemm::{InputLayout, WeightLayout};
use rayon::prelude::*;

use super::gemm::{Matrix, Operands, add_product};
use crate::conv1d::{DgradPass, Filter, ForwardPass, Sequence, WgradPass};
use crate::element::Element;

/// Positions of a block.
const BLOCK: usize = 256;

/// Where elements of a tensor of sequences are in its slice.
#[derive(Clone, Copy)]
struct Strides {
    batch: usize,
    channel: usize,
    position: usize,
}

impl Strides {
    fn of(layout: SequenceLayout, [channels, length]: [u32; 2], row_stride: u64) -> Self {
        let [batch, channel, position] =
            layout.strides(channels, length, row_stride).map(|stride| stride as usize);
        Self { batch, channel, position }
    }

    const fn at(self, batch: usize, channel: usize, position: usize) -> usize {
        batch * self.batch + channel * self.channel + position * self.position
    }
}

/// A walk over sequences: what is multiplied and where the sums go.
struct Walk<'a, T> {
    gather: Gather,
    input: &'a [T],
    in_strides: Strides,
    in_length: usize,
    /// Rows (channels that are written) and depth (channels that are read) of a group.
    rows: usize,
    depth: usize,
    /// `[groups][rows][depth·taps]`, taps in the order of the walk.
    filter: Vec<f32>,
}

/// `y`, contiguous in its layout.
pub(crate) fn forward<T: Element>(
    pass: &ForwardPass,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
) {
    let shape = &pass.shape;
    let [rows, depth] = [shape.group_out(), shape.group_in()].map(|extent| extent as usize);
    let gather = shape.forward_gather();
    let walk = Walk {
        filter: packed(shape, w, pass.w, [rows, depth], &gather, false),
        gather,
        input: x,
        in_strides: strides(pass.x, shape.in_channels, shape.in_length),
        in_length: shape.in_length as usize,
        rows,
        depth,
    };
    let [channels, length] = [shape.out_channels, shape.out_length];
    let out_strides = contiguous(pass.y.layout, channels, length);
    let act = |channel: usize, sum: f32| {
        let bias = bias.map_or(0.0, |bias| bias[channel].to_f32());
        pass.activation.apply(sum + bias)
    };
    run(&[walk], shape.groups as usize, y, out_strides, act);
}

/// `dx`, contiguous in its layout.
pub(crate) fn dgrad<T: Element>(pass: &DgradPass, dz: &[T], w: &[T], dx: &mut [T]) {
    let shape = &pass.shape;
    let [rows, depth] = [shape.group_in(), shape.group_out()].map(|extent| extent as usize);
    let walks: Vec<_> = (0..shape.residues())
        .map(|residue| {
            let gather = shape.dgrad_gather(residue);
            Walk {
                filter: packed(shape, w, pass.w, [rows, depth], &gather, true),
                gather,
                input: dz,
                in_strides: strides(pass.dz, shape.out_channels, shape.out_length),
                in_length: shape.out_length as usize,
                rows,
                depth,
            }
        })
        .collect();
    let out_strides = contiguous(pass.dx.layout, shape.in_channels, shape.in_length);
    run(&walks, shape.groups as usize, dx, out_strides, |_, sum| sum);
}

/// Adds the gradients of filter and bias to what `dw` and `db`, contiguous, hold.
pub(crate) fn wgrad<T: Element>(
    pass: &WgradPass,
    x: &[T],
    dz: &[T],
    dw: Option<&mut [T]>,
    db: Option<&mut [T]>,
) {
    let shape = &pass.shape;
    let [rows, depth] = [shape.group_out(), shape.group_in()].map(|extent| extent as usize);
    let (batch, length) = (shape.batch as usize, shape.out_length as usize);
    let dz_strides = strides(pass.dz, shape.out_channels, shape.out_length);
    let gather = shape.forward_gather();
    let walk = Walk {
        gather,
        input: x,
        in_strides: strides(pass.x, shape.in_channels, shape.in_length),
        in_length: shape.in_length as usize,
        rows,
        depth,
        filter: Vec::new(),
    };
    let columns = depth * gather.taps as usize;
    // For each group `[rows][depth·taps]`, then the sums for the bias.
    let sums: Vec<(Vec<f32>, Vec<f32>)> = (0..shape.groups as usize)
        .into_par_iter()
        .map(|group| {
            let mut sums = vec![0.0; rows * columns];
            let mut bias = vec![0.0; rows];
            let (mut patches, mut gradients) = (Vec::new(), Vec::new());
            for b in 0..batch {
                for first in (0..length).step_by(BLOCK) {
                    let count = BLOCK.min(length - first);
                    walk.patches(&mut patches, b, group, first, count);
                    gradients.clear();
                    for row in 0..rows {
                        gradients.extend((first..first + count).map(|position| {
                            dz[dz_strides.at(b, group * rows + row, position)].to_f32()
                        }));
                    }
                    for (bias, gradients) in bias.iter_mut().zip(gradients.chunks(count)) {
                        *bias += gradients.iter().sum::<f32>();
                    }
                    let product = Operands {
                        x: matrix(&gradients, rows, count),
                        x_layout: InputLayout::Plain,
                        w: matrix(&patches, columns, count),
                        layout: WeightLayout::OutIn,
                    };
                    add_product(product, &mut sums);
                }
            }
            (sums, bias)
        })
        .collect();
    let taps = gather.taps as usize;
    if let (Some(dw), Some(filter)) = (dw, pass.dw) {
        let contiguous = filter.layout.extents(shape)[2] as u64;
        let [out, input, tap] =
            filter.layout.strides(shape, contiguous).map(|stride| stride as usize);
        for (group, (sums, _)) in sums.iter().enumerate() {
            for (index, sum) in sums.iter().enumerate() {
                let (row, i, k) = (index / columns, index % columns / taps, index % taps);
                let at = &mut dw[(group * rows + row) * out + i * input + k * tap];
                *at = T::from_f32(at.to_f32() + sum);
            }
        }
    }
    if let Some(db) = db {
        for (db, sum) in db.iter_mut().zip(sums.iter().flat_map(|(_, bias)| bias)) {
            *db = T::from_f32(db.to_f32() + sum);
        }
    }
}

/// `dy · act'(z)`, contiguous in the layout of the result.
pub(crate) fn activation_grad<T: Element>(
    activation: Activation,
    extents: [u32; 3],
    [z, dy]: [(&[T], Sequence); 2],
    layout: SequenceLayout,
    dz: &mut [T],
) {
    let [batch, channels, length] = extents;
    let [(z, z_strides), (dy, dy_strides)] =
        [z, dy].map(|(values, sequence)| (values, strides(sequence, channels, length)));
    let out = contiguous(layout, channels, length);
    for b in 0..batch as usize {
        for channel in 0..channels as usize {
            for position in 0..length as usize {
                let z = z[z_strides.at(b, channel, position)].to_f32();
                let dy = dy[dy_strides.at(b, channel, position)].to_f32();
                dz[out.at(b, channel, position)] = T::from_f32(activation.gradient(z, dy));
            }
        }
    }
}

fn strides(sequence: Sequence, channels: u32, length: u32) -> Strides {
    Strides::of(sequence.layout, [channels, length], sequence.row_stride)
}

fn contiguous(layout: SequenceLayout, channels: u32, length: u32) -> Strides {
    let [_, _, columns] = layout.extents(1, channels as usize, length as usize);
    Strides::of(layout, [channels, length], columns as u64)
}

fn matrix(data: &[f32], rows: usize, columns: usize) -> Matrix<'_, f32> {
    Matrix { data, rows, columns, row_stride: columns }
}

/// The filter as `[groups][rows][depth·taps]` in the order of a walk.
fn packed<T: Element>(
    shape: &Conv1dShape,
    w: &[T],
    filter: Filter,
    [rows, depth]: [usize; 2],
    gather: &Gather,
    transposed: bool,
) -> Vec<f32> {
    let [out, input, tap] =
        filter.layout.strides(shape, filter.row_stride).map(|stride| stride as usize);
    let group_out = shape.group_out() as usize;
    let mut packed = Vec::with_capacity(shape.groups as usize * rows * depth);
    for group in 0..shape.groups as usize {
        for row in 0..rows {
            for channel in 0..depth {
                let (o, i) = if transposed { (channel, row) } else { (row, channel) };
                for t in 0..gather.taps as i64 {
                    let k = gather.first_tap as i64 + t * i64::from(gather.tap_stride);
                    let at = (group * group_out + o) * out + i * input + k as usize * tap;
                    packed.push(w[at].to_f32());
                }
            }
        }
    }
    packed
}

impl<T: Element> Walk<'_, T> {
    /// What `count` positions of the walk from `first` meet, as `[depth·taps][count]`.
    fn patches(
        &self,
        patches: &mut Vec<f32>,
        batch: usize,
        group: usize,
        first: usize,
        count: usize,
    ) {
        let gather = &self.gather;
        patches.clear();
        for channel in 0..self.depth {
            for t in 0..i64::from(gather.taps) {
                let from = i64::from(gather.in_first) + t * i64::from(gather.tap_step);
                patches.extend((first..first + count).map(|q| {
                    let position = from + q as i64 * i64::from(gather.in_step);
                    match usize::try_from(position) {
                        Ok(position) if position < self.in_length => {
                            let channel = group * self.depth + channel;
                            self.input[self.in_strides.at(batch, channel, position)].to_f32()
                        }
                        _ => 0.0,
                    }
                }));
            }
        }
    }

    /// The sums of a block, `[rows][count]`.
    fn sums(&self, batch: usize, group: usize, first: usize, count: usize) -> Vec<f32> {
        let columns = self.depth * self.gather.taps as usize;
        let mut sums = vec![0.0; self.rows * count];
        if columns > 0 {
            let mut patches = Vec::with_capacity(columns * count);
            self.patches(&mut patches, batch, group, first, count);
            let filter = &self.filter[group * self.rows * columns..][..self.rows * columns];
            let product = Operands {
                x: matrix(filter, self.rows, columns),
                x_layout: InputLayout::Plain,
                w: matrix(&patches, columns, count),
                layout: WeightLayout::InOut,
            };
            add_product(product, &mut sums);
        }
        sums
    }
}

/// Computes every walk of every sequence and puts `finish(channel, sum)` where it belongs.
fn run<T: Element>(
    walks: &[Walk<'_, T>],
    groups: usize,
    out: &mut [T],
    strides: Strides,
    finish: impl Fn(usize, f32) -> f32 + Sync,
) {
    out.par_chunks_mut(strides.batch).enumerate().for_each(|(batch, out)| {
        for walk in walks {
            let gather = &walk.gather;
            let positions = gather.out_count as usize;
            let blocks = (0..groups)
                .flat_map(|group| (0..positions).step_by(BLOCK).map(move |first| (group, first)));
            let blocks: Vec<_> = blocks.collect();
            // A few blocks at a time, so that their sums do not fill memory.
            for some in blocks.chunks(64) {
                let sums: Vec<_> = some
                    .par_iter()
                    .map(|&(group, first)| {
                        walk.sums(batch, group, first, BLOCK.min(positions - first))
                    })
                    .collect();
                for (&(group, first), sums) in some.iter().zip(&sums) {
                    let count = BLOCK.min(positions - first);
                    for (row, sums) in sums.chunks(count).enumerate() {
                        let channel = group * walk.rows + row;
                        for (q, &sum) in (first..).zip(sums) {
                            let position = gather.out_first as usize + q * gather.out_step as usize;
                            out[strides.at(0, channel, position)] =
                                T::from_f32(finish(channel, sum));
                        }
                    }
                }
            }
        }
    });
}
