//! `Y = act(X·W + b)`: the forward pass of a linear layer, on whichever tier serves it.
//!
//! The way of a call: check the operands → choose the tier → fill the kernel's parameters, with
//! tensor maps where it takes them → launch.
#![forbid(unsafe_code)]

mod backward;
mod comparison;
mod direct;
mod split;
mod telemetry;
mod tf32;
mod unaligned;

pub use backward::{Backward, Gradients, Saved, Tiers};
pub use telemetry::LayerTelemetry;

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::{Activation, EpilogueActivation};
use kasmina_kernels::gemm::hopper::unaligned::PlainRows;
use kasmina_kernels::gemm::hopper::{self, Forced, HopperGemmParams, Problem, Tile};
use kasmina_kernels::gemm::portable::{self, PortableGemmParams};
use kasmina_kernels::gemm::{F32Products, InputLayout, WeightLayout};
use kasmina_kernels::tile_scheduler::TileScheduler;

use crate::config::KernelConfig;
use crate::cpu;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::{Gpu, Launch};
use crate::shape::Shape;
use crate::stream::{Operation, Stream};
use crate::tensor::{Tensor, zeroed};
use crate::tensor_map::{Promotion, TensorMapKey};
pub(crate) use split::{Pass, choose_forward_tier};
use unaligned::{Packed, pack, plain_rows};

const OP: &str = Operation::GemmForward.name();
/// Extents travel as 32 bits, and kernels add a tile's width to them.
const MAX_EXTENT: usize = i32::MAX as usize;
/// The driver's limit on the blocks of a grid.
const MAX_TILES: u64 = i32::MAX as u64;

/// One forward pass: the operands and what is done with them.
///
/// X is `[…, k]` and counts as a matrix of all its rows, W is a matrix in either layout, the bias
/// is `[n]`, and Y is `[…, n]`. It is enqueued on the stream of W's device handle; where another
/// operand belongs to another stream of the same GPU, that stream is ordered around the use.
#[derive(Debug)]
#[must_use = "a pass does nothing until `run`"]
pub struct Forward<'a, T: Element> {
    /// The input.
    pub x: &'a Tensor<T>,
    /// The weight.
    pub w: &'a Tensor<T>,
    /// Added to every row of X·W.
    pub bias: Option<&'a Tensor<T>>,
    /// Which way round W lies in memory.
    pub layout: WeightLayout,
    /// Applied to every element of X·W + b.
    pub activation: Activation,
}

/// The extents of a checked forward pass.
#[derive(Clone, Copy, Debug)]
struct Extents {
    m: u32,
    n: u32,
    k: u32,
}

impl<T: Element> Forward<'_, T> {
    /// Enqueues the pass, writes Y, and says which tier runs it.
    ///
    /// On the `hopper` tier, f32 in parts that are made before takes 4 to 6 bytes of device memory
    /// for each element of X and W (also in place of TF32, where TMA cannot address them), and a
    /// 16-bit X or W whose rows are no multiple of 16 bytes apart takes that of a copy, from the
    /// stream's pool; where there is none, the next tier runs it unless one is forced.
    ///
    /// # Errors
    /// Before anything is enqueued: [`Error::DeviceMismatch`], [`Error::Shape`],
    /// [`Error::Overlap`], [`Error::Overflow`], and [`Error::Unsupported`] where the tier that the
    /// config or `KASMINA_TIER` forces cannot serve the call. On the first use of a kernel:
    /// [`Error::DriverTooOld`], [`Error::ModuleRejected`], [`Error::EntryMissing`],
    /// [`Error::PtxUnreadable`]. Always: [`Error::Driver`].
    pub fn run(&self, y: &mut Tensor<T>, config: &KernelConfig) -> Result<Tier> {
        let extents = self.check(y)?;
        let tier = self.choose_tier(extents, config)?;
        if y.is_empty() {
            return Ok(tier);
        }
        let device = self.w.device();
        let Some(stream) = device.stream().gpu() else {
            self.run_on_cpu(extents, y)?;
            return Ok(tier);
        };
        let launch = Launch {
            stream,
            ptx_dir: config.ptx_override().or(device.defaults().ptx_override()),
            operation: Operation::GemmForward,
        };
        if tier != Tier::Hopper {
            self.run_portable(extents, y, &launch)?;
            return Ok(tier);
        }
        let served = if T::DTYPE == DType::F32 {
            let products = split::products(config, self.is_addressable());
            let sm_count = stream.gpu().capability().sm_count;
            let Extents { m, n, k } = extents;
            match direct::choose(config, products, self.layout, [m, n, k], sm_count) {
                Some(selected) => self.run_direct(extents, y, &launch, selected),
                None if products == F32Products::Tf32 => {
                    self.run_in_tf32(extents, y, &launch, config)
                }
                None => self.run_in_parts(extents, y, &launch, stream, products, config),
            }
        } else {
            self.run_on_hopper(extents, y, &launch, config)
        };
        match served {
            // Copies need memory, the portable kernels do not; nothing has been enqueued yet.
            Err(Error::OutOfMemory { .. }) if split::forced_tier(device, config).is_none() => {
                self.run_portable(extents, y, &launch)?;
                Ok(Tier::Portable)
            }
            outcome => outcome.map(|()| tier),
        }
    }

    /// Enqueues the pass over 16-bit types, after copies of the operands that TMA cannot address.
    fn run_on_hopper(
        &self,
        extents: Extents,
        y: &Tensor<T>,
        launch: &Launch<'_>,
        config: &KernelConfig,
    ) -> Result<()> {
        let packed = |operand| Packed::new(operand, self.w.device(), launch, OP);
        let (x, w) = (packed(self.x)?, packed(self.w)?);
        if !x.is_copy() && !w.is_copy() {
            return self.run_aligned(extents, y, launch, config);
        }
        let aligned = Forward { x: x.tensor(), w: w.tensor(), ..*self };
        self.ordered(y, || {
            pack(&[&x, &w], launch)?;
            aligned.run_aligned(extents, y, launch, config)
        })
    }

    /// Enqueues the pass over operands that TMA can address.
    fn run_aligned(
        &self,
        extents: Extents,
        y: &Tensor<T>,
        launch: &Launch<'_>,
        config: &KernelConfig,
    ) -> Result<()> {
        let gpu: &Gpu = launch.stream.gpu();
        if let Some(without) = config.left_out() {
            return self.run_without(without, extents, y, launch, gpu, config);
        }
        let sm_count = gpu.capability().sm_count;
        let (problem, forced) = (self.problem(extents), config.forced_hopper());
        // The tier was chosen with the type and what is forced in mind.
        let refused = || Obstacle::DType(T::DTYPE).refuse(OP, Tier::Hopper);
        let selected = hopper::select(T::DTYPE, self.layout, problem, sm_count, forced);
        let selected = selected.ok_or_else(refused)?;
        let params = self.hopper_params(extents, selected.tile, selected.store_rows(), y, gpu)?;
        let free = gpu.free_multiprocessors();
        let blocks = selected.tile.num_blocks(params.tiles.num_tiles(), free);
        launch.prepare(&selected.kernel)?;
        self.ordered(y, || launch.run(&selected.kernel, blocks, &params))
    }

    /// What a Hopper kernel is chosen for.
    fn problem(&self, Extents { m, n, k }: Extents) -> Problem {
        let straddles = |tensor: &Tensor<T>| Problem::straddles(row_stride_bytes(tensor));
        Problem { m, n, k, x_straddles: straddles(self.x), w_straddles: straddles(self.w) }
    }

    fn run_portable(&self, extents: Extents, y: &Tensor<T>, launch: &Launch<'_>) -> Result<()> {
        let tiles = portable::tiles(extents.m, extents.n);
        check_tiles(OP, tiles)?;
        let params = self.portable_params(extents, y);
        let kernel = portable::kernel(T::DTYPE, InputLayout::Plain, self.layout);
        let kernel = kernel.ok_or_else(|| Obstacle::DType(T::DTYPE).refuse(OP, Tier::Portable))?;
        launch.prepare(kernel)?;
        self.ordered(y, || launch.run(kernel, tiles.num_tiles(), &params))
    }

    /// The tier that [`run`](Self::run) would use, given enough memory.
    ///
    /// # Errors
    /// Those that `run` reports before anything is enqueued.
    pub fn tier(&self, y: &Tensor<T>, config: &KernelConfig) -> Result<Tier> {
        let extents = self.check(y)?;
        self.choose_tier(extents, config)
    }

    fn check(&self, y: &Tensor<T>) -> Result<Extents> {
        let expected = self.w.device().id();
        let inputs = [("x", Some(self.x)), ("w", Some(self.w)), ("bias", self.bias)];
        for (operand, tensor) in inputs.into_iter().chain([("y", Some(y))]) {
            let got = tensor.map_or(expected, |tensor| tensor.device().id());
            if got != expected {
                return Err(Error::DeviceMismatch { op: OP, operand, expected, got });
            }
        }

        let (k, n) = match (self.w.shape().extents(), self.layout) {
            (&[k, n], WeightLayout::InOut) | (&[n, k], WeightLayout::OutIn) if k > 0 => (k, n),
            _ => {
                // One where k is 0: a sum of no products is nobody's intention.
                let k = self.x.shape().columns().max(1);
                let (rows, columns) = self.layout.rows_columns(k, y.shape().columns());
                let (expected, got) = ([rows, columns].into(), *self.w.shape());
                return Err(Error::Shape { op: OP, operand: "w", expected, got });
            }
        };
        check_shape(OP, "x", self.x.shape().with_columns(k), self.x.shape())?;
        if let Some(bias) = self.bias {
            check_shape(OP, "bias", [n].into(), bias.shape())?;
        }
        check_shape(OP, "y", self.x.shape().with_columns(n), y.shape())?;

        for (operand, input) in inputs {
            if input.is_some_and(|input| input.overlaps(y)) {
                return Err(Error::Overlap { op: OP, operand });
            }
        }
        Ok(Extents {
            m: extent(OP, "the number of rows", self.x.shape().rows())?,
            n: extent(OP, "the number of output features", n)?,
            k: extent(OP, "the number of input features", k)?,
        })
    }

    fn choose_tier(&self, Extents { m, n, k }: Extents, config: &KernelConfig) -> Result<Tier> {
        let pass = Pass {
            dtype: T::DTYPE,
            layout: self.layout,
            shape: [m, n, k].map(|extent| extent as usize),
            addressable: self.is_addressable(),
        };
        let tier = choose_forward_tier(self.w.device(), config, pass)?;
        match comparison::obstacle(config, T::DTYPE, self.layout) {
            Some(obstacle) if tier == Tier::Hopper => Err(obstacle.refuse(OP, tier)),
            _ => Ok(tier),
        }
    }

    /// Whether TMA can address X and W as they lie.
    fn is_addressable(&self) -> bool {
        [self.x, self.w].into_iter().all(unaligned::is_addressable)
    }

    /// Enqueues the pass between the streams' waits for each other.
    fn ordered(&self, y: &Tensor<T>, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        let streams = self.streams(y);
        ordered(self.w.device().stream(), streams, enqueue)
    }

    /// As [`ordered`](Self::ordered), with a stream whose memory the pass uses as well.
    fn ordered_with(
        &self,
        y: &Tensor<T>,
        stream: &Stream,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let streams = self.streams(y).chain([stream]);
        ordered(self.w.device().stream(), streams, enqueue)
    }

    fn streams<'a>(&'a self, y: &'a Tensor<T>) -> impl Iterator<Item = &'a Stream> + Clone {
        let operands = [Some(self.x), self.bias, Some(y)].into_iter().flatten();
        operands.map(|operand| operand.device().stream())
    }

    fn run_on_cpu(&self, extents: Extents, y: &Tensor<T>) -> Result<()> {
        let (m, n, k) = (extents.m as usize, extents.n as usize, extents.k as usize);
        let (x, w) = (self.x.host_view(), self.w.host_view());
        let bias = self.bias.map(Tensor::host_view);
        let (w_rows, w_columns) = self.layout.rows_columns(k, n);
        let mut result = zeroed(y.len())?;
        cpu::gemm::forward(
            cpu::gemm::Matrix {
                data: x.values(),
                rows: m,
                columns: k,
                row_stride: self.x.row_stride(),
            },
            cpu::gemm::Matrix {
                data: w.values(),
                rows: w_rows,
                columns: w_columns,
                row_stride: self.w.row_stride(),
            },
            self.layout,
            bias.as_ref().map(|bias| &bias.values()[..n]),
            self.activation,
            &mut result,
            n,
        );
        y.store(result);
        Ok(())
    }

    fn portable_params(&self, extents: Extents, y: &Tensor<T>) -> PortableGemmParams {
        PortableGemmParams {
            x: self.x.as_device_ptr(),
            w: self.w.as_device_ptr(),
            bias: self.bias.map_or(0, Tensor::as_device_ptr),
            y: y.as_device_ptr(),
            x_stride: self.x.row_stride() as u64,
            w_stride: self.w.row_stride() as u64,
            y_stride: y.row_stride() as u64,
            m: extents.m,
            n: extents.n,
            k: extents.k,
            activation: self.activation as u32,
            accumulate: 0,
            reserved: 0,
        }
    }

    fn hopper_params(
        &self,
        extents: Extents,
        tile: Tile,
        store_rows: u32,
        y: &Tensor<T>,
        gpu: &Gpu,
    ) -> Result<HopperGemmParams> {
        let Extents { m, n, k } = extents;
        let tiles = tile.scheduler(m, n);
        check_tiles(OP, tiles)?;
        let (w_extents, w_box) = match self.layout {
            WeightLayout::InOut => ([n, k], [hopper::SLAB_N, hopper::BLOCK_K]),
            WeightLayout::OutIn => ([k, n], [hopper::BLOCK_K, tile.w_rows()]),
        };
        let x_box = [hopper::BLOCK_K, tile.x_rows(m)];
        let y_box = [hopper::SLAB_N, store_rows];
        // Timed on an H200: a twentieth to a tenth for tiles of 64 rows where blocks share
        // anything, and next to nothing where they do not.
        let promotion = match tile.block_m {
            64 => Promotion::Bytes128,
            _ => Promotion::Bytes256,
        };
        let plain = plain_rows(y, [m, n]);
        let x_key = tensor_map_key(self.x, [k, m], x_box).promoted(promotion);
        let w_key = tensor_map_key(self.w, w_extents, w_box).promoted(promotion);
        let y_key = tensor_map_key(y, [n, m], y_box);
        // A map that nothing uses has to be one all the same.
        let y_key = if plain == PlainRows::NONE { y_key } else { x_key };
        let [x_map, w_map, y_map] = gpu.tensor_maps(&[x_key, w_key, y_key])?;
        Ok(HopperGemmParams {
            x_map,
            w_map,
            y_map,
            bias: self.bias.map_or(0, Tensor::as_device_ptr),
            n,
            k_blocks: k.div_ceil(hopper::BLOCK_K),
            tiles,
            activation: EpilogueActivation::new(self.activation),
            stage_bytes: tile.stage_bytes(m),
            plain,
        })
    }
}

/// Enqueues on `own` what uses tensors of `streams`, between the streams' waits for each other.
pub(crate) fn ordered<'a>(
    own: &Stream,
    streams: impl Iterator<Item = &'a Stream> + Clone,
    enqueue: impl FnOnce() -> Result<()>,
) -> Result<()> {
    for stream in streams.clone() {
        own.wait(stream)?;
    }
    // Part of it may have been enqueued where it fails: the streams wait all the same.
    let enqueued = enqueue();
    let mut waited = Ok(());
    for stream in streams {
        waited = waited.and(stream.wait(own));
    }
    // A stream that does not wait might give memory of this operation away while it runs.
    enqueued.and(waited.or_else(|error| own.synchronize().and(Err(error))))
}

/// Extents and box with the columns first, the order of the driver.
fn tensor_map_key<T: Element>(
    tensor: &Tensor<T>,
    extents: [u32; 2],
    box_extents: [u32; 2],
) -> TensorMapKey {
    TensorMapKey {
        address: tensor.as_device_ptr(),
        row_stride_bytes: row_stride_bytes(tensor),
        extents,
        box_extents,
        dtype: T::DTYPE,
        rounds_to_tf32: false,
        promotion: Promotion::default(),
    }
}

fn row_stride_bytes<T: Element>(tensor: &Tensor<T>) -> u64 {
    (tensor.row_stride() * size_of::<T>()) as u64
}

/// The tier that serves a forward pass of this type on this device.
pub(crate) fn choose_tier(device: &Device, config: &KernelConfig, dtype: DType) -> Result<Tier> {
    let forced = config.forced_tier().or(device.defaults().forced_tier());
    pick(OP, forced, |tier| {
        let of_call = || match tier {
            Tier::Hopper if !hopper::serves(dtype) => Some(Obstacle::DType(dtype)),
            Tier::Hopper if !config.tma_enabled() => Some(Obstacle::TmaDisabled),
            Tier::Hopper => kernel_obstacle(config.forced_hopper()),
            _ => None,
        };
        device.obstacle(tier).or_else(of_call)
    })
}

/// The forced tier, or the most demanding one that nothing speaks against.
pub(crate) fn pick(
    op: &'static str,
    forced: Option<Tier>,
    obstacle: impl Fn(Tier) -> Option<Obstacle>,
) -> Result<Tier> {
    if let Some(tier) = forced {
        return obstacle(tier).map_or(Ok(tier), |reason| Err(reason.refuse(op, tier)));
    }
    let mut refused = (Tier::Cpu, Obstacle::GpuMemory);
    for tier in Tier::ALL.into_iter().rev() {
        match obstacle(tier) {
            None => return Ok(tier),
            // Of the tiers on a GPU the least demanding one has the reason worth reading.
            Some(reason) if tier != Tier::Cpu => refused = (tier, reason),
            Some(_) => {}
        }
    }
    let (tier, reason) = refused;
    Err(reason.refuse(op, tier))
}

/// Why there is no Hopper kernel as it is forced.
fn kernel_obstacle(forced: Forced) -> Option<Obstacle> {
    let any_turns = Forced { ping_pong: None, ..forced };
    let any_multicast = Forced { cluster_m: None, ..any_turns };
    let any_split = Forced { split_k: None, ..any_multicast };
    let tile = forced.tile.filter(|_| !any_split.exists()).map(Obstacle::Tile);
    let split = || forced.split_k.filter(|_| !any_multicast.exists()).map(Obstacle::SplitK);
    let multicast = || forced.cluster_m.filter(|_| !any_turns.exists()).map(Obstacle::Multicast);
    let ping_pong = || (!forced.exists()).then_some(Obstacle::PingPong);
    tile.or_else(split).or_else(multicast).or_else(ping_pong)
}

pub(crate) fn check_shape(
    op: &'static str,
    operand: &'static str,
    expected: Shape,
    got: &Shape,
) -> Result<()> {
    if expected == *got {
        return Ok(());
    }
    Err(Error::Shape { op, operand, expected, got: *got })
}

fn extent(op: &'static str, quantity: &'static str, extent: usize) -> Result<u32> {
    let overflow = Error::Overflow { op, quantity, limit: MAX_EXTENT as u64 };
    if extent > MAX_EXTENT { Err(overflow) } else { u32::try_from(extent).map_err(|_| overflow) }
}

fn check_tiles(op: &'static str, tiles: TileScheduler) -> Result<()> {
    if u64::from(tiles.tiles_m) * u64::from(tiles.tiles_n) <= MAX_TILES {
        return Ok(());
    }
    Err(Error::Overflow { op, quantity: "the number of output tiles", limit: MAX_TILES })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Obstacle = Obstacle::Capability { major: 8, minor: 0 };

    fn matrix(shape: [usize; 2]) -> Tensor<f32> {
        Tensor::zeros(&Device::cpu(), shape).unwrap()
    }

    fn forward<'a>(x: &'a Tensor<f32>, w: &'a Tensor<f32>) -> Forward<'a, f32> {
        let (layout, activation) = (WeightLayout::OutIn, Activation::None);
        Forward { x, w, bias: None, layout, activation }
    }

    #[test]
    fn the_next_tier_serves_what_the_best_one_cannot() {
        assert_eq!(pick(OP, None, |_| None).unwrap(), Tier::Hopper);
        let tier = pick(OP, None, |tier| (tier == Tier::Hopper).then_some(DEVICE)).unwrap();
        assert_eq!(tier, Tier::Portable);
    }

    #[test]
    fn a_forced_tier_that_cannot_serve_is_an_error_with_the_reason() {
        let error = pick(OP, Some(Tier::Hopper), |tier| (tier == Tier::Hopper).then_some(DEVICE));
        assert!(matches!(
            error,
            Err(Error::Unsupported { tier: Tier::Hopper, reason: DEVICE, .. })
        ));
    }

    #[test]
    fn a_gpu_tier_forced_on_host_memory_is_refused() {
        let (x, w, mut y) = (matrix([2, 3]), matrix([5, 3]), matrix([2, 5]));
        for tier in [Tier::Portable, Tier::Hopper] {
            let config = KernelConfig::default().tier(tier);
            let error = forward(&x, &w).run(&mut y, &config).unwrap_err();
            assert!(matches!(
                error,
                Error::Unsupported { tier: got, reason: Obstacle::HostMemory, .. } if got == tier
            ));
        }
    }

    #[test]
    fn mismatched_shapes_name_the_operand_and_what_would_fit() {
        let config = KernelConfig::default();
        let (x, w) = (matrix([2, 3]), matrix([5, 3]));
        let check = |pass: Forward<'_, f32>, mut y: Tensor<f32>, name, fits: Shape| match pass
            .run(&mut y, &config)
            .unwrap_err()
        {
            Error::Shape { operand, expected, .. } => {
                assert_eq!((operand, expected), (name, fits));
            }
            error => panic!("{error}"),
        };
        check(forward(&matrix([2, 4]), &w), matrix([2, 5]), "x", [2, 3].into());
        check(forward(&x, &w), matrix([3, 5]), "y", [2, 5].into());
        check(forward(&x, &w), matrix([2, 6]), "y", [2, 5].into());
        let bias = Tensor::zeros(&Device::cpu(), [4]).unwrap();
        let pass = Forward { bias: Some(&bias), ..forward(&x, &w) };
        check(pass, matrix([2, 5]), "bias", [5].into());
        check(forward(&matrix([2, 0]), &matrix([5, 0])), matrix([2, 5]), "w", [5, 1].into());
    }

    #[test]
    fn an_output_that_overlaps_an_input_is_refused_and_interleaved_columns_are_not() {
        let all = matrix([4, 8]);
        let (x, w) = (all.columns(0..3).unwrap(), matrix([5, 3]));
        let config = KernelConfig::default();
        let mut apart = all.columns(3..8).unwrap();
        forward(&x, &w).run(&mut apart, &config).unwrap();
        let x = all.columns(1..4).unwrap();
        let error = forward(&x, &w).run(&mut apart, &config).unwrap_err();
        assert!(matches!(error, Error::Overlap { operand: "x", .. }));
    }

    #[test]
    fn no_rows_give_an_empty_result() {
        let (x, w, mut y) = (matrix([0, 3]), matrix([5, 3]), matrix([0, 5]));
        assert_eq!(forward(&x, &w).run(&mut y, &KernelConfig::default()).unwrap(), Tier::Cpu);
        assert!(y.to_vec().unwrap().is_empty());
    }

    #[test]
    fn extents_and_tiles_beyond_31_bits_overflow() {
        assert!(extent(OP, "m", i32::MAX as usize).is_ok());
        assert!(matches!(extent(OP, "m", 1 << 31), Err(Error::Overflow { quantity: "m", .. })));
        let tiles = |tiles_m, tiles_n| TileScheduler { tiles_m, tiles_n, group_m: 1 };
        assert!(check_tiles(OP, tiles(1 << 15, (1 << 16) - 1)).is_ok());
        assert!(matches!(check_tiles(OP, tiles(1 << 16, 1 << 16)), Err(Error::Overflow { .. })));
    }
}
