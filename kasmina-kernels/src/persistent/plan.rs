//! How a stack of layers lies in a block: which weights stay in shared memory, where everything
//! is, and how weights are packed for it.

use core::fmt;
use core::mem::size_of;

use crate::abi::{DType, Tier};
use crate::activation::{Activation, EpilogueActivation};

use super::{MAX_LAYERS, MAX_WIDTH, PORTABLE_ROWS, ROW_PAD_BYTES, SCRATCH_BYTES};

/// What is asked of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Elements per row of its input.
    pub in_features: u32,
    /// Elements per row of its output.
    pub out_features: u32,
    /// What is applied to `X·W + b`.
    pub activation: Activation,
}

/// One layer as the kernel reads it, from shared memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerPlan {
    /// Elements per row of its input.
    pub in_features: u32,
    /// Elements per row of its output.
    pub out_features: u32,
    /// Bytes from the start of the packed weights to its matrix, a multiple of 16.
    pub weight_at: u32,
    /// Bytes of its matrix, a multiple of 16.
    pub weight_bytes: u32,
    /// Bytes from the start of the packed weights to its bias, f32, a multiple of 16.
    pub bias_at: u32,
    /// Bytes of its bias, a multiple of 16.
    pub bias_bytes: u32,
    /// Where in shared memory its matrix stays; [`STREAMED`](Self::STREAMED) if it does not fit,
    /// [`AHEAD`](Self::AHEAD) if it need not.
    pub weight_smem: u32,
    /// Where in shared memory its bias stays.
    pub bias_smem: u32,
    /// The activation's code, for the portable tier.
    pub activation: u32,
    /// The activation, for the tensor-core tier.
    pub form: EpilogueActivation,
    /// Keeps the size a multiple of 16.
    pub reserved: u32,
}

const _: () = assert!(size_of::<LayerPlan>() == 80);

impl LayerPlan {
    /// In place of an address in shared memory: the matrix is read from the L2 cache.
    pub const STREAMED: u32 = u32::MAX;
    /// In place of an address in shared memory: the matrix is read from the L2 cache into registers
    /// while the block waits for a unit.
    pub const AHEAD: u32 = u32::MAX - 1;

    /// Whether each warp's part of the matrix is what it loads before a unit comes.
    const fn fits_ahead(&self) -> bool {
        self.in_features.div_ceil(32) == super::AHEAD_STEPS
            && self.out_features.div_ceil(32) <= super::THREADS / 32
    }

    /// The plan in words, as it lies in memory.
    #[must_use]
    pub fn words(&self) -> [u32; 20] {
        let form = &self.form;
        let mut words = [0; 20];
        words[..9].copy_from_slice(&[
            self.in_features,
            self.out_features,
            self.weight_at,
            self.weight_bytes,
            self.bias_at,
            self.bias_bytes,
            self.weight_smem,
            self.bias_smem,
            self.activation,
        ]);
        for (word, q) in words[9..16].iter_mut().zip(form.q) {
            *word = q.to_bits();
        }
        words[16..19].copy_from_slice(&[form.t_max.to_bits(), form.lower.to_bits(), form.smooth]);
        words
    }
}

/// A stack of layers and where its parts lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StackPlan {
    tier: Tier,
    dtype: DType,
    layers: [LayerPlan; MAX_LAYERS],
    count: usize,
    /// Bytes of the packed weights and biases of all layers.
    pub packed_bytes: u32,
    /// Bytes from one row of activations in shared memory to the next.
    pub row_bytes: u32,
    /// Dynamic shared memory of a block.
    pub smem_bytes: u32,
}

/// Why a stack cannot stay resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanFault {
    /// The number of layers is not 1 to [`MAX_LAYERS`].
    Layers(usize),
    /// A layer's width is not 1 to [`MAX_WIDTH`].
    Width(u32),
    /// A layer's input is not as wide as the output before it.
    Chain {
        /// Which layer.
        layer: usize,
        /// How wide its input has to be.
        expected: u32,
        /// How wide it is.
        got: u32,
    },
    /// Activations and biases alone need more shared memory than a block may have.
    SharedMemory {
        /// Bytes they need.
        needed: u32,
        /// Bytes there are.
        limit: u32,
    },
}

impl fmt::Display for PlanFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layers(got) => {
                write!(f, "a stack of {got} layers was given, 1 to {MAX_LAYERS} can stay resident")
            }
            Self::Width(got) => {
                write!(f, "a layer has {got} inputs or outputs, 1 to {MAX_WIDTH} can stay resident")
            }
            Self::Chain { layer, expected, got } => {
                write!(f, "layer {layer} has {got} inputs and the one before it {expected} outputs")
            }
            Self::SharedMemory { needed, limit } => {
                write!(f, "activations need {needed} bytes of shared memory, a block has {limit}")
            }
        }
    }
}

impl core::error::Error for PlanFault {}

impl StackPlan {
    /// The plan of these layers for blocks that may have `smem_limit` bytes of shared memory.
    ///
    /// # Errors
    /// [`PlanFault`].
    pub fn new(
        tier: Tier,
        dtype: DType,
        shapes: &[LayerShape],
        smem_limit: u32,
    ) -> Result<Self, PlanFault> {
        check(shapes)?;
        let empty = LayerPlan {
            in_features: 0,
            out_features: 0,
            weight_at: 0,
            weight_bytes: 0,
            bias_at: 0,
            bias_bytes: 0,
            weight_smem: LayerPlan::STREAMED,
            bias_smem: 0,
            activation: 0,
            form: EpilogueActivation::new(Activation::None),
            reserved: 0,
        };
        let mut layers = [empty; MAX_LAYERS];
        let widest = shapes.iter().map(|shape| shape.in_features.max(shape.out_features)).max();
        let (row_bytes, rows) = match tier {
            Tier::Hopper => {
                let bytes = widest.unwrap_or(1).next_multiple_of(32) * dtype.size() as u32;
                (bytes + ROW_PAD_BYTES, super::PART_ROWS)
            }
            _ => (widest.unwrap_or(1).next_multiple_of(4) * 4 + ROW_PAD_BYTES, PORTABLE_ROWS),
        };
        let mut smem = SCRATCH_BYTES + 2 * rows * row_bytes;
        let mut packed = 0;
        for (layer, shape) in layers.iter_mut().zip(shapes) {
            layer.in_features = shape.in_features;
            layer.out_features = shape.out_features;
            layer.activation = shape.activation as u32;
            layer.form = EpilogueActivation::new(shape.activation);
            layer.weight_bytes = matrix_bytes(tier, dtype, shape.in_features, shape.out_features);
            layer.bias_bytes = shape.out_features.next_multiple_of(32) * 4;
            layer.weight_at = packed;
            layer.bias_at = packed + layer.weight_bytes;
            packed += layer.weight_bytes + layer.bias_bytes;
            layer.bias_smem = smem;
            smem += layer.bias_bytes;
        }
        if smem > smem_limit {
            return Err(PlanFault::SharedMemory { needed: smem, limit: smem_limit });
        }
        let whole: u32 = layers[..shapes.len()].iter().map(|layer| layer.weight_bytes).sum();
        if tier == Tier::Hopper && smem + whole > smem_limit && layers[0].fits_ahead() {
            layers[0].weight_smem = LayerPlan::AHEAD;
        }
        // Those that fit, in order: one that does not leaves room for a smaller one after it.
        for layer in &mut layers[..shapes.len()] {
            if layer.weight_smem == LayerPlan::STREAMED && smem + layer.weight_bytes <= smem_limit {
                layer.weight_smem = smem;
                smem += layer.weight_bytes;
            }
        }
        let (packed_bytes, smem_bytes) = (packed, smem);
        Ok(Self { tier, dtype, layers, count: shapes.len(), packed_bytes, row_bytes, smem_bytes })
    }

    /// The layers.
    #[must_use]
    pub fn layers(&self) -> &[LayerPlan] {
        &self.layers[..self.count]
    }

    /// Whether the kernel reads a payload while it arrives in its slot.
    #[must_use]
    pub fn takes_arriving(&self) -> bool {
        self.tier == Tier::Hopper && self.layers[0].in_features.is_multiple_of(8)
    }

    /// Puts a layer's matrix and bias where the kernel expects them in the packed weights.
    ///
    /// `weight(k, n)` gives the bits of the weight from input `k` to output `n`, in the lower end.
    pub fn pack(
        &self,
        layer: usize,
        weight: impl Fn(u32, u32) -> u32,
        bias: impl Fn(u32) -> f32,
        packed: &mut [u8],
    ) {
        let plan = &self.layers()[layer];
        let size = self.dtype.size();
        let matrix = &mut packed[plan.weight_at as usize..][..plan.weight_bytes as usize];
        matrix.fill(0);
        for k in 0..plan.in_features {
            for n in 0..plan.out_features {
                let at = match self.tier {
                    Tier::Hopper => fragment_offset(plan.in_features, k, n),
                    _ => k * plan.out_features + n,
                };
                matrix[at as usize * size..][..size]
                    .copy_from_slice(&weight(k, n).to_le_bytes()[..size]);
            }
        }
        let biases = &mut packed[plan.bias_at as usize..][..plan.bias_bytes as usize];
        biases.fill(0);
        for (n, place) in (0..plan.out_features).zip(biases.chunks_exact_mut(4)) {
            place.copy_from_slice(&bias(n).to_le_bytes());
        }
    }
}

fn check(shapes: &[LayerShape]) -> Result<(), PlanFault> {
    if shapes.is_empty() || shapes.len() > MAX_LAYERS {
        return Err(PlanFault::Layers(shapes.len()));
    }
    for (layer, shape) in shapes.iter().enumerate() {
        for width in [shape.in_features, shape.out_features] {
            if width == 0 || width > MAX_WIDTH {
                return Err(PlanFault::Width(width));
            }
        }
        if layer > 0 && shape.in_features != shapes[layer - 1].out_features {
            let (expected, got) = (shapes[layer - 1].out_features, shape.in_features);
            return Err(PlanFault::Chain { layer, expected, got });
        }
    }
    Ok(())
}

/// Bytes of a packed matrix: on the tensor-core tier with both extents rounded up to 32.
const fn matrix_bytes(tier: Tier, dtype: DType, in_features: u32, out_features: u32) -> u32 {
    let elements = match tier {
        Tier::Hopper => in_features.next_multiple_of(32) * out_features.next_multiple_of(32),
        _ => in_features * out_features,
    };
    (elements * dtype.size() as u32).next_multiple_of(16)
}

/// Elements of a fragment: a 16×16 tile of the transposed weight, eight per lane.
const FRAGMENT: u32 = 256;

/// Where the weight from input `k` to output `n` lies among the packed 16-bit elements: by pairs of
/// 16 outputs, within one by steps of 32 inputs, within one four fragments of `mma.m16n8k16`'s A
/// operand, (outputs, inputs) = (0, 0), (0, 16), (16, 0), (16, 16), each lane's eight elements
/// together, so that a lane loads a fragment with one 16-byte load.
const fn fragment_offset(in_features: u32, k: u32, n: u32) -> u32 {
    let steps = in_features.div_ceil(32);
    let fragment = (n / 32 * steps + k / 32) * 4 + n % 32 / 16 * 2 + k % 32 / 16;
    // PTX ISA, m16n8k16: lane = 4·(row % 8) + column % 8 / 2; registers a0 to a3 are the quarters
    // (row / 8, column / 8) = (0, 0), (1, 0), (0, 1), (1, 1).
    let (row, column) = (n % 16, k % 16);
    let lane = row % 8 * 4 + column % 8 / 2;
    let register = row / 8 + column / 8 * 2;
    fragment * FRAGMENT + lane * 8 + register * 2 + column % 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    const fn shape(in_features: u32, out_features: u32) -> LayerShape {
        LayerShape { in_features, out_features, activation: Activation::Relu }
    }

    const MLP: [LayerShape; 3] = [shape(256, 256), shape(256, 256), shape(256, 64)];

    #[test]
    fn fragments_hold_every_weight_once() {
        for (k, n) in [(1, 1), (16, 16), (31, 33), (64, 96), (256, 64)] {
            let elements = matrix_bytes(Tier::Hopper, DType::BF16, k, n) / 2;
            let mut seen = vec![false; elements as usize];
            for (i, j) in (0..k).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let at = fragment_offset(k, i, j) as usize;
                assert!(!seen[at], "({i}, {j}) of {k}×{n}");
                seen[at] = true;
            }
        }
    }

    #[test]
    fn a_lane_finds_its_registers_in_sixteen_neighbouring_bytes() {
        // a0 of lane 5: row 1, columns 2 and 3; a3: row 9, columns 10 and 11.
        assert_eq!([fragment_offset(32, 2, 1), fragment_offset(32, 3, 1)], [40, 41]);
        assert_eq!([fragment_offset(32, 10, 9), fragment_offset(32, 11, 9)], [46, 47]);
        assert_eq!(fragment_offset(32, 16, 0), 256);
        assert_eq!(fragment_offset(32, 0, 16), 512);
    }

    #[test]
    fn a_small_layer_stays_in_shared_memory_and_so_does_all_but_the_first_of_an_mlp() {
        let limit = crate::abi::MAX_SMEM_BYTES;
        let one = StackPlan::new(Tier::Hopper, DType::BF16, &MLP[..1], limit).unwrap();
        assert_ne!(one.layers()[0].weight_smem, LayerPlan::STREAMED);
        let three = StackPlan::new(Tier::Hopper, DType::BF16, &MLP, limit).unwrap();
        assert_eq!(three.layers()[0].weight_smem, LayerPlan::AHEAD);
        assert!(three.layers()[1..].iter().all(|plan| plan.weight_smem < three.smem_bytes));
        assert!(three.smem_bytes <= limit);
        // A first layer that is not what a block holds in registers takes its place as the others.
        let shapes = [shape(288, 256), shape(256, 256), shape(256, 64)];
        let other = StackPlan::new(Tier::Hopper, DType::BF16, &shapes, limit).unwrap();
        let resident = other.layers().iter().map(|plan| plan.weight_smem < other.smem_bytes);
        assert!(resident.eq([true, false, true]));
    }

    #[test]
    fn parts_in_shared_memory_are_aligned_and_do_not_overlap() {
        for (tier, dtype) in [(Tier::Hopper, DType::F16), (Tier::Portable, DType::F32)] {
            let shapes = [shape(5, 33), shape(33, 7), shape(7, 100)];
            let plan = StackPlan::new(tier, dtype, &shapes, 60_000).unwrap();
            let mut parts = vec![(0, SCRATCH_BYTES)];
            for layer in plan.layers() {
                parts.push((layer.bias_smem, layer.bias_bytes));
                parts.push((layer.weight_smem, layer.weight_bytes));
            }
            parts.sort_unstable();
            for pair in parts.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            assert!(parts.iter().all(|(at, bytes)| at % 16 == 0 && bytes % 16 == 0));
            let (at, bytes) = parts[parts.len() - 1];
            assert!(at + bytes <= plan.smem_bytes && plan.row_bytes.is_multiple_of(16));
        }
    }

    #[test]
    fn packed_weights_are_found_again() {
        let plan = StackPlan::new(Tier::Portable, DType::BF16, &[shape(3, 2)], 60_000).unwrap();
        let mut packed = vec![0xAA; plan.packed_bytes as usize];
        plan.pack(0, |k, n| k * 16 + n, |n| n as f32 + 0.5, &mut packed);
        assert_eq!(packed[..12], [0, 0, 1, 0, 16, 0, 17, 0, 32, 0, 33, 0]);
        let bias = plan.layers()[0].bias_at as usize;
        assert_eq!(packed[bias..][..8], [0.5f32.to_le_bytes(), 1.5f32.to_le_bytes()].concat());
        assert!(packed[bias + 8..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn stacks_that_do_not_fit_say_why() {
        let plan = |shapes: &[LayerShape]| {
            StackPlan::new(Tier::Hopper, DType::BF16, shapes, 200_000).unwrap_err()
        };
        assert_eq!(plan(&[]), PlanFault::Layers(0));
        assert_eq!(plan(&[shape(8, 8); MAX_LAYERS + 1]), PlanFault::Layers(MAX_LAYERS + 1));
        assert_eq!(plan(&[shape(0, 8)]), PlanFault::Width(0));
        assert_eq!(plan(&[shape(8, MAX_WIDTH + 1)]), PlanFault::Width(MAX_WIDTH + 1));
        let chain = PlanFault::Chain { layer: 1, expected: 4, got: 5 };
        assert_eq!(plan(&[shape(8, 4), shape(5, 4)]), chain);
        let small = StackPlan::new(Tier::Hopper, DType::BF16, &[shape(1024, 8)], 100_000);
        assert!(matches!(small, Err(PlanFault::SharedMemory { limit: 100_000, .. })));
    }
}
