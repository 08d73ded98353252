//! One thread per element, straight from global memory: convolutions of very few channels per
//! group, the baseline that tiles are compared with, and the gradient of the activation.

use super::*;
use crate::activation::Activation;
use crate::gemm::element::Element;
use crate::ptx;
use crate::tile_scheduler::div;

/// Index of the thread in the grid.
#[inline(always)]
fn global_index() -> u64 {
    u64::from(ptx::block_index()) * u64::from(THREADS) + u64::from(ptx::thread_index())
}

/// Batch, channel and position of an element, numbered along positions or along channels first.
/// `None` beyond the last.
#[inline(always)]
fn element_at(
    [batch, channels, length]: [u32; 3],
    channels_first: bool,
) -> Option<(u32, u32, u32)> {
    let index = global_index();
    let per_sequence = u64::from(channels) * u64::from(length);
    let sequence = index.checked_div(per_sequence)?;
    if sequence >= u64::from(batch) {
        return None;
    }
    let within = index - sequence * per_sequence;
    let fast = if channels_first { channels } else { length };
    let slow = within.checked_div(u64::from(fast))?;
    let rest = (within - slow * u64::from(fast)) as u32;
    let (channel, position) =
        if channels_first { (rest, slow as u32) } else { (slow as u32, rest) };
    Some((sequence as u32, channel, position))
}

impl Strided {
    /// Address of an element of `size` bytes.
    #[inline(always)]
    fn at(&self, batch: u32, channel: u32, position: u32, size: u32) -> u64 {
        let element = u64::from(batch) * self.batch
            + u64::from(channel) * self.channel
            + u64::from(position) * self.position;
        self.address + element * u64::from(size)
    }
}

/// One result.
///
/// # Safety
/// As the entries': tensors and filter are as the strides say, and nothing else writes them while
/// the kernel runs.
#[inline(always)]
pub(super) unsafe fn direct<E: Element>(params: &GatherParams) {
    let shape = &params.shape;
    let dgrad = params.dgrad != 0;
    let (channels, length) = if dgrad {
        (shape.in_channels, shape.in_length)
    } else {
        (shape.out_channels, shape.out_length)
    };
    let Some((batch, channel, position)) =
        element_at([shape.batch, channels, length], params.channels_first != 0)
    else {
        return;
    };
    let (rows, depth, in_length) = if dgrad {
        (shape.group_in(), shape.group_out(), shape.out_length)
    } else {
        (shape.group_out(), shape.group_in(), shape.in_length)
    };
    let group = div(channel, rows);
    let row = channel - group * rows;
    let filter = &params.filter;
    let first = u64::from(group * shape.group_out()) * filter.out;
    let (row_stride, depth_stride) =
        if dgrad { (filter.input, filter.out) } else { (filter.out, filter.input) };
    let w = filter.address + (first + u64::from(row) * row_stride) * u64::from(E::SIZE);
    let mut sum = 0.0;
    let mut tap = 0;
    while tap < shape.kernel_size {
        ptx::nounroll();
        let reach = tap * shape.dilation;
        let meets = if dgrad {
            let from = (position + shape.padding_left).wrapping_sub(reach);
            let quotient = div(from, shape.stride);
            // As unsigned, a negative distance is beyond the last position.
            let exact = quotient * shape.stride == from && (from as i32) >= 0;
            if exact { quotient } else { u32::MAX }
        } else {
            (position * shape.stride + reach).wrapping_sub(shape.padding_left)
        };
        if meets < in_length {
            let mut index = 0;
            while index < depth {
                let element = u64::from(index) * depth_stride + u64::from(tap) * filter.tap;
                // SAFETY: an existing tap and an existing element of the tensor.
                let (a, b) = unsafe {
                    let at = params.input.at(batch, group * depth + index, meets, E::SIZE);
                    (E::load(at), E::load(w + element * u64::from(E::SIZE)))
                };
                sum = ptx::fma_rn_f32(E::widen(a), E::widen(b), sum);
                index += 1;
            }
        }
        tap += 1;
    }
    if params.bias != 0 {
        let address = params.bias + u64::from(channel) * u64::from(E::SIZE);
        // SAFETY: an existing channel.
        sum += E::widen(unsafe { E::load(address) });
    }
    let value = Activation::from_code(params.activation).apply(sum);
    // SAFETY: an existing element, of this thread's own.
    unsafe { E::store(params.output.at(batch, channel, position, E::SIZE), E::round(value)) };
}

/// One element of `dz = dy · act'(z)`.
///
/// # Safety
/// As the entries': the tensors are as the strides say, and nothing else writes them while the
/// kernel runs.
#[inline(always)]
pub(super) unsafe fn activation_grad<E: Element>(params: &ActivationGradParams) {
    let channels_first = params.dz.channel == 1;
    let extents = [params.batch, params.channels, params.length];
    let Some((batch, channel, position)) = element_at(extents, channels_first) else {
        return;
    };
    // SAFETY: an existing element of each tensor.
    let (z, dy) = unsafe {
        let z = E::load(params.z.at(batch, channel, position, E::SIZE));
        (E::widen(z), E::widen(E::load(params.dy.at(batch, channel, position, E::SIZE))))
    };
    let dz = Activation::from_code(params.activation).gradient(z, dy);
    // SAFETY: an existing element, of this thread's own.
    unsafe { E::store(params.dz.at(batch, channel, position, E::SIZE), E::round(dz)) };
}
