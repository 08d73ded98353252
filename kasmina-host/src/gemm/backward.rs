//! The backward pass of a linear layer: `dX = dZ·Wᵀ`, `dW = Xᵀ·dZ`, `db = Σ dZ` over the rows,
//! with `dZ = dY ⊙ act'(Z)`.
//!
//! The way of a call: check the operands → choose the tier of each product → dZ, unless there is no
//! activation → dX, which is a forward pass with the weight's layout the other way round → dW →
//! sums of partial results.

mod partials;
mod product;

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::Activation;
use kasmina_kernels::gemm::backward::{Chunks, GradientParams, gradient_kernel};
use kasmina_kernels::gemm::hopper::Forced;
use kasmina_kernels::gemm::hopper::weight_gradient::{self, Summed};
use kasmina_kernels::gemm::{InputLayout, WeightLayout};

use super::unaligned::is_addressable;
use super::{
    Forward, Packed, Pass, check_shape, choose_forward_tier, direct, extent, kernel_obstacle,
    ordered, pack, pick,
};
use crate::config::KernelConfig;
use crate::cpu;
use crate::cpu::gemm::Matrix;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::Launch;
use crate::shape::Shape;
use crate::stream::Operation;
use crate::tensor::{Tensor, zeroed};
use partials::Partials;
use product::{Product, WeightGradient};

const OP: &str = Operation::GemmBackward.name();
/// Rows of dZ are a multiple of so many elements apart, which TMA needs of 16-bit types.
const DZ_ALIGN: usize = 8;

/// What is kept of the forward pass, to know the activation's gradient by.
#[derive(Debug)]
pub enum Saved<'a, T: Element> {
    /// Nothing: enough without an activation.
    Nothing,
    /// The output: enough for ReLU.
    Output(&'a Tensor<T>),
    /// The pre-activation, `Z = X·W + b` or `z = w ⋆ x + b`: enough for every activation.
    PreActivation(&'a Tensor<T>),
}

impl<T: Element> Clone for Saved<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for Saved<'_, T> {}

impl<'a, T: Element> Saved<'a, T> {
    /// The tensor, if there is one, and its name in errors.
    pub(crate) const fn tensor(self) -> Option<(&'static str, &'a Tensor<T>)> {
        match self {
            Self::Nothing => None,
            Self::Output(y) => Some(("y", y)),
            Self::PreActivation(z) => Some(("z", z)),
        }
    }

    /// Whether the gradient of `activation` follows from it.
    pub(crate) const fn tells(self, activation: Activation) -> bool {
        match self {
            Self::Nothing => matches!(activation, Activation::None),
            Self::Output(_) => !activation.needs_pre_activation(),
            Self::PreActivation(_) => true,
        }
    }
}

/// The output.
impl<'a, T: Element> From<&'a Tensor<T>> for Saved<'a, T> {
    fn from(y: &'a Tensor<T>) -> Self {
        Self::Output(y)
    }
}

/// The gradients that are wanted, and where they go.
#[derive(Debug)]
pub struct Gradients<'a, T: Element> {
    /// That of X, of the shape of X. It is replaced.
    pub dx: Option<&'a mut Tensor<T>>,
    /// That of W, of the shape of W.
    pub dw: Option<&'a mut Tensor<T>>,
    /// That of the bias, `[n]`.
    pub db: Option<&'a mut Tensor<T>>,
    /// Whether dW and db are added to what the tensors hold, as over the parts of a batch, instead
    /// of replacing it.
    pub accumulate: bool,
}

/// None.
impl<T: Element> Default for Gradients<'_, T> {
    fn default() -> Self {
        Self { dx: None, dw: None, db: None, accumulate: false }
    }
}

/// Which tier computes the gradients; `None` for one that is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiers {
    /// The input's: `dZ·Wᵀ`, or a convolution's dgrad.
    pub dx: Option<Tier>,
    /// The weight's: `Xᵀ·dZ`, or a convolution's wgrad, which makes the bias's too.
    pub dw: Option<Tier>,
}

/// One backward pass: the operands of the forward pass, what is kept of it, and the gradient of its
/// output.
///
/// X is `[…, k]`, W a matrix in either layout, dY and what is saved are `[…, n]`. dZ is rounded to
/// the element type, unless there is no activation and it is dY; db is the sum of dZ, on a GPU
/// before that rounding. dX, dW and db are added in f32 and rounded once; where dW is added to
/// what is there, the tier `hopper` may round the product before and the sum after. The pass is
/// enqueued on the stream of W's device handle; where another operand belongs to another stream of
/// the same GPU, that stream is ordered around the use.
#[derive(Debug)]
#[must_use = "a pass does nothing until `run`"]
pub struct Backward<'a, T: Element> {
    /// The input of the forward pass.
    pub x: &'a Tensor<T>,
    /// The weight.
    pub w: &'a Tensor<T>,
    /// The gradient of the output.
    pub dy: &'a Tensor<T>,
    /// What is kept of the forward pass.
    pub saved: Saved<'a, T>,
    /// Which way round W lies in memory.
    pub layout: WeightLayout,
    /// The activation of the forward pass.
    pub activation: Activation,
}

/// The extents of a checked backward pass, by the names of the forward pass.
#[derive(Clone, Copy, Debug)]
struct Extents {
    m: u32,
    n: u32,
    k: u32,
}

impl<T: Element> Backward<'_, T> {
    /// Enqueues the pass, writes the gradients that are wanted, and says which tiers compute them.
    ///
    /// # Errors
    /// Before anything is enqueued: [`Error::DeviceMismatch`], [`Error::Shape`],
    /// [`Error::Saved`], [`Error::Overlap`], [`Error::Overflow`], and [`Error::Unsupported`] where the
    /// tier that the config or `KASMINA_TIER` forces cannot serve the call. When some gradients may
    /// have been written: [`Error::OutOfMemory`] for want of memory for dZ, partial results, and
    /// copies of operands whose rows are no multiple of 16 bytes apart, on the first use of a kernel
    /// [`Error::DriverTooOld`], [`Error::ModuleRejected`], [`Error::EntryMissing`] and
    /// [`Error::PtxUnreadable`], and always [`Error::Driver`].
    pub fn run(&self, gradients: Gradients<'_, T>, config: &KernelConfig) -> Result<Tiers> {
        let extents = self.check(&gradients)?;
        let mut tiers = self.choose_tiers(&gradients, config)?;
        let Some(stream) = self.w.device().stream().gpu() else {
            self.run_on_cpu(extents, gradients)?;
            return Ok(tiers);
        };
        // Elementwise kernels serve any shape on any GPU.
        let device = self.w.device();
        let forced = config.forced_tier().or(device.defaults().forced_tier());
        let hopper = device.obstacle(Tier::Hopper).is_none();
        let elementwise = forced.unwrap_or(if hopper { Tier::Hopper } else { Tier::Portable });
        let launch = Launch {
            stream,
            ptx_dir: config.ptx_override().or(self.w.device().defaults().ptx_override()),
            operation: Operation::GemmBackward,
        };
        let outputs = [gradients.dx.as_deref(), gradients.dw.as_deref(), gradients.db.as_deref()];
        let saved = self.saved.tensor().map(|(_, tensor)| tensor);
        let operands = [Some(self.x), Some(self.dy), saved].into_iter().chain(outputs).flatten();
        // Cloned, as the gradients are borrowed exclusively below.
        let devices: Vec<_> = operands.map(|operand| operand.device().clone()).collect();
        let streams = devices.iter().map(Device::stream);
        ordered(self.w.device().stream(), streams, || {
            let partials = Partials::new(stream, elementwise);
            self.enqueue(extents, gradients, &mut tiers, config, &launch, partials)
        })?;
        Ok(tiers)
    }

    fn check(&self, gradients: &Gradients<'_, T>) -> Result<Extents> {
        let expected = self.w.device().id();
        let inputs = [Some(("x", self.x)), Some(("w", self.w)), Some(("dy", self.dy))];
        let inputs = inputs.into_iter().chain([self.saved.tensor()]).flatten();
        let outputs = [
            ("dx", gradients.dx.as_deref()),
            ("dw", gradients.dw.as_deref()),
            ("db", gradients.db.as_deref()),
        ];
        let outputs = outputs.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)));
        for (operand, tensor) in inputs.clone().chain(outputs.clone()) {
            let got = tensor.device().id();
            if got != expected {
                return Err(Error::DeviceMismatch { op: OP, operand, expected, got });
            }
        }

        let (k, n) = match (self.w.shape().extents(), self.layout) {
            (&[k, n], WeightLayout::InOut) | (&[n, k], WeightLayout::OutIn) if k > 0 && n > 0 => {
                (k, n)
            }
            _ => {
                let (k, n) = (self.x.shape().columns().max(1), self.dy.shape().columns().max(1));
                let (rows, columns) = self.layout.rows_columns(k, n);
                let (expected, got) = ([rows, columns].into(), *self.w.shape());
                return Err(Error::Shape { op: OP, operand: "w", expected, got });
            }
        };
        check_shape(OP, "x", self.x.shape().with_columns(k), self.x.shape())?;
        let of_output = self.x.shape().with_columns(n);
        check_shape(OP, "dy", of_output, self.dy.shape())?;
        if let Some((name, saved)) = self.saved.tensor() {
            check_shape(OP, name, of_output, saved.shape())?;
        }
        for (name, output) in outputs.clone() {
            let expected = match name {
                "dx" => *self.x.shape(),
                "dw" => *self.w.shape(),
                _ => Shape::from([n]),
            };
            check_shape(OP, name, expected, output.shape())?;
        }
        if !self.saved.tells(self.activation) {
            let needed = if self.activation.needs_pre_activation() {
                "the pre-activation, Saved::PreActivation"
            } else {
                "the output, Saved::Output, or the pre-activation, Saved::PreActivation"
            };
            return Err(Error::Saved { op: OP, activation: self.activation, needed });
        }

        for (number, (_, output)) in outputs.clone().enumerate() {
            let others = outputs.clone().skip(number + 1);
            for (operand, other) in inputs.clone().chain(others) {
                if output.overlaps(other) {
                    return Err(Error::Overlap { op: OP, operand });
                }
            }
        }
        Ok(Extents {
            m: extent(OP, "the number of rows", self.x.shape().rows())?,
            n: extent(OP, "the number of output features", n)?,
            k: extent(OP, "the number of input features", k)?,
        })
    }

    fn choose_tiers(&self, gradients: &Gradients<'_, T>, config: &KernelConfig) -> Result<Tiers> {
        let device = self.w.device();
        // Also where no product is wanted.
        let forced = config.forced_tier().or(device.defaults().forced_tier());
        if let Some(tier) = forced
            && let Some(reason) = device.obstacle(tier)
        {
            return Err(reason.refuse(OP, tier));
        }
        // dZ, where it is not dY, is memory of our own.
        let dz_addressable = self.activation != Activation::None || is_addressable(self.dy);
        let addressable = dz_addressable && is_addressable(self.w);
        let of_dx = |dx: &Tensor<T>| {
            let pass = Pass {
                dtype: T::DTYPE,
                layout: self.layout.transposed(),
                shape: [dx.shape().rows(), dx.shape().columns(), self.dy.shape().columns()],
                addressable,
            };
            choose_forward_tier(device, config, pass)
        };
        let of_dw = |dw: &Tensor<T>| {
            if T::DTYPE == DType::F32 {
                let shape = [dw.shape().rows(), dw.shape().columns(), self.x.shape().rows()];
                // Extents beyond 32 bits are refused later; here they only have to be compared.
                let shape = shape.map(|extent| u32::try_from(extent).unwrap_or(u32::MAX));
                return direct::choose_gradient_tier(device, config, OP, shape);
            }
            pick(OP, forced, |tier| {
                let of_call = || match tier {
                    Tier::Hopper if !weight_gradient::serves(T::DTYPE) => {
                        Some(Obstacle::DType(T::DTYPE))
                    }
                    Tier::Hopper if !config.tma_enabled() => Some(Obstacle::TmaDisabled),
                    Tier::Hopper => {
                        // dW is cut along the batch by a plan of its own.
                        let forced =
                            Forced { tile: config.forced_hopper_tile(), ..Forced::default() };
                        kernel_obstacle(forced)
                    }
                    _ => None,
                };
                device.obstacle(tier).or_else(of_call)
            })
        };
        Ok(Tiers {
            dx: gradients.dx.as_deref().map(of_dx).transpose()?,
            dw: gradients.dw.as_deref().map(of_dw).transpose()?,
        })
    }

    /// Enqueues everything on W's stream, which is ordered with those of the operands.
    fn enqueue(
        &self,
        extents: Extents,
        gradients: Gradients<'_, T>,
        tiers: &mut Tiers,
        config: &KernelConfig,
        launch: &Launch<'_>,
        mut partials: Partials<'_>,
    ) -> Result<()> {
        let Extents { m, n, .. } = extents;
        let Gradients { dx, dw, db, accumulate } = gradients;
        if m == 0 {
            if !accumulate {
                for zeros in [dw, db].into_iter().flatten() {
                    partials.add(0, zeros, false)?;
                }
            }
            return partials.enqueue::<T>(launch);
        }

        let weight_gradient = dw.as_ref().zip(tiers.dw);
        let weight_gradient =
            weight_gradient.map(|(dw, tier)| WeightGradient::plan(dw, m, tier, config, launch));
        let weight_gradient = weight_gradient.transpose()?;
        let active = self.activation != Activation::None;
        // Where dZ passes through the shared memory of the Hopper kernel, that sums it.
        let fused = !active && matches!(weight_gradient, Some(WeightGradient::Hopper(_)));
        let mut dz = None;
        if active && (dx.is_some() || dw.is_some()) {
            let shape = self.dy.shape().with_columns((n as usize).next_multiple_of(DZ_ALIGN));
            let padded = Tensor::uninitialised(self.w.device(), shape, OP)?;
            dz = Some(padded.columns(0..n as usize)?);
        }
        let written = dz.is_some();
        // Once for both products.
        let tensor_cores = T::DTYPE.size() == 2 && {
            [dx.as_ref().and(tiers.dx), dw.as_ref().and(tiers.dw)].contains(&Some(Tier::Hopper))
        };
        if !active && tensor_cores {
            let packed = Packed::new(self.dy, self.w.device(), launch, OP)?;
            pack(&[&packed], launch)?;
            dz = packed.into_copy();
        }
        let mut db = db;
        let separate_db = if fused { None } else { db.take() };
        if written || separate_db.is_some() {
            self.enqueue_gradient(
                extents,
                dz.as_ref().filter(|_| written),
                separate_db,
                accumulate,
                &mut partials,
                launch,
            )?;
        }
        let dz = dz.as_ref().unwrap_or(self.dy);

        if let Some(dx) = dx {
            let layout = self.layout.transposed();
            let product =
                Forward { x: dz, w: self.w, bias: None, layout, activation: Activation::None };
            // Not always the tier that was chosen: f32 in parts needs memory.
            tiers.dx = Some(product.run(dx, config)?);
        }
        if let (Some(dw), Some(how)) = (dw, weight_gradient) {
            let (first, second, summed) = match self.layout {
                WeightLayout::InOut => (self.x, dz, Summed::Second),
                WeightLayout::OutIn => (dz, self.x, Summed::First),
            };
            let product = Product { device: self.w.device(), first, second, batch: m, accumulate };
            match how {
                WeightGradient::Portable(tiles) => product.enqueue_portable(dw, tiles, launch)?,
                WeightGradient::Direct(kernel) => product.enqueue_direct(dw, kernel, launch)?,
                WeightGradient::Hopper(plan) => {
                    let db = db.map(|db| (db, summed));
                    product.enqueue_hopper(dw, plan, db, &mut partials, launch)?;
                }
            }
        }
        partials.enqueue::<T>(launch)
    }

    /// dZ, where it is wanted, and db, or partial sums of it.
    fn enqueue_gradient(
        &self,
        Extents { m, n, .. }: Extents,
        dz: Option<&Tensor<T>>,
        db: Option<&mut Tensor<T>>,
        accumulate: bool,
        partials: &mut Partials<'_>,
        launch: &Launch<'_>,
    ) -> Result<()> {
        let tier = partials.tier();
        let kernel = gradient_kernel(tier, T::DTYPE);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, tier))?;
        launch.prepare(kernel)?;
        let chunks = Chunks::of(m, n, T::DTYPE);
        let stride = |tensor: &Tensor<T>| tensor.row_stride() as u64;
        let saved = self.saved.tensor().map(|(_, saved)| saved);
        let saved = saved.filter(|_| self.activation != Activation::None);
        let mut params = GradientParams {
            dy: self.dy.as_device_ptr(),
            saved: saved.map_or(0, Tensor::as_device_ptr),
            dz: dz.map_or(0, Tensor::as_device_ptr),
            db: 0,
            partials: 0,
            dy_stride: stride(self.dy),
            saved_stride: saved.map_or(0, stride),
            dz_stride: dz.map_or(0, stride),
            m,
            n,
            chunk_rows: chunks.rows,
            activation: self.activation as u32,
            accumulate: u32::from(accumulate),
            grid: chunks.grid(),
        };
        match db {
            Some(db) if chunks.count > 1 => {
                params.partials = partials.add(chunks.count, db, accumulate)?;
            }
            Some(db) => params.db = db.as_device_ptr(),
            None => {}
        }
        launch.run(kernel, chunks.blocks(), &params)
    }

    fn run_on_cpu(&self, extents: Extents, gradients: Gradients<'_, T>) -> Result<()> {
        let (m, n, k) = (extents.m as usize, extents.n as usize, extents.k as usize);
        let Gradients { dx, dw, db, accumulate } = gradients;
        let [x, w, dy] = [self.x, self.w, self.dy].map(Tensor::host_view);
        let (w_rows, w_columns) = self.layout.rows_columns(k, n);
        let x = matrix(x.values(), m, k, self.x.row_stride());
        let w = matrix(w.values(), w_rows, w_columns, self.w.row_stride());
        let dy = matrix(dy.values(), m, n, self.dy.row_stride());
        let mut values = Vec::new();
        let saved = self.saved.tensor().filter(|_| self.activation != Activation::None);
        if let Some((_, saved)) = saved {
            values = zeroed(m * n)?;
            let (view, stride) = (saved.host_view(), saved.row_stride());
            let saved = matrix(view.values(), m, n, stride);
            cpu::backward::gradient(self.activation, dy, saved, &mut values);
        }
        let dz = if saved.is_some() { matrix(&values[..], m, n, n) } else { dy };
        if let Some(db) = db {
            let mut result = if accumulate { db.to_vec()? } else { zeroed(n)? };
            cpu::backward::column_sums(dz, &mut result, accumulate);
            db.store(result);
        }
        if let Some(dw) = dw {
            let mut result = if accumulate { dw.to_vec()? } else { zeroed(dw.len())? };
            let (first, second) = match self.layout {
                WeightLayout::InOut => (x, dz),
                WeightLayout::OutIn => (dz, x),
            };
            let operands = cpu::gemm::Operands {
                x: first,
                x_layout: InputLayout::Transposed,
                w: second,
                layout: WeightLayout::InOut,
            };
            if m > 0 {
                cpu::gemm::product(operands, &mut result, w_columns, |sum, _, before| {
                    let before = if accumulate { before.to_f32() } else { 0.0 };
                    T::from_f32(before + sum)
                });
            }
            dw.store(result);
        }
        if let Some(dx) = dx {
            let mut result = zeroed(dx.len())?;
            let layout = match self.layout {
                WeightLayout::InOut => WeightLayout::OutIn,
                WeightLayout::OutIn => WeightLayout::InOut,
            };
            let operands = cpu::gemm::Operands { x: dz, x_layout: InputLayout::Plain, w, layout };
            cpu::gemm::product(operands, &mut result, k, |sum, _, _| T::from_f32(sum));
            dx.store(result);
        }
        Ok(())
    }
}

const fn matrix<T>(data: &[T], rows: usize, columns: usize, row_stride: usize) -> Matrix<'_, T> {
    Matrix { data, rows, columns, row_stride }
}
