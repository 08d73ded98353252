//! `y = act(w ⋆ x + b)`: one-dimensional convolution and its gradients, on whichever tier serves
//! each pass.
//!
//! [`Forward`] is one pass, [`Backward`] up to two: the gradient of the input (dgrad), and those of
//! filter and bias (wgrad). The way of a call: check the operands → describe the pass → choose its
//! tier → launch. A tier is chosen for every pass by itself.
//!
//! Positions beyond the ends of the input count as zeros. Whether an infinite or NaN tap beside them
//! makes NaN differs between kernels, and so does whether an infinite or NaN input that no output
//! reads reaches the filter's gradient.
//!
//! # f32 on tensor cores
//! On the Hopper tier f32 is multiplied as a sum of three bf16 parts, of which six products are added
//! up with the accuracy of f32, as in linear layers. It serves every pass with a stride up to 8 that
//! asks for more than the bias's gradient and has more than single channels in its groups, whatever
//! the layouts, channels and addresses are, where that is expected to be faster than the portable
//! tier, or is forced. It takes memory of the stream's pool while it runs:
//!
//! - forward and input gradient: 6 bytes for each element of the tensor that is read and of the
//!   filter, a group's channels counted as a multiple of 16;
//! - filter gradient: the same for x and the output's gradient, and 64 KiB for up to twice as many
//!   tiles as there are multiprocessors and for each tile of the gradient.
//!
//! Without that memory the portable tier serves the call. Where an operand holds infinities, NaN,
//! numbers from 2⁶³ on, or such below 2⁻¹¹⁰ while the other has some from 2¹⁶ on, the GPU finds out and
//! computes the pass again in plain f32, at the portable tier's speed and with its bits. Other numbers
//! below 2⁻¹¹⁰ count with an error of 2⁻¹³⁴.
#![forbid(unsafe_code)]

mod hopper;
mod parts;
mod pass;
mod portable;

use kasmina_kernels::abi::Tier;
use kasmina_kernels::activation::Activation;
use kasmina_kernels::conv1d::{Conv1dExtents, Conv1dShape, FilterLayout, Padding, SequenceLayout};

use crate::config::KernelConfig;
use crate::cpu;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gemm::{self, check_shape, pick};
pub use crate::gemm::{Saved, Tiers};
use crate::gpu::Launch;
use crate::shape::Shape;
use crate::stream::Operation;
use crate::tensor::{Tensor, zeroed};
pub(crate) use pass::{ActivationGradPass, DgradPass, Filter, ForwardPass, Sequence, WgradPass};

/// How the filter moves over the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Input positions from one output position to the next, at least 1.
    pub stride: usize,
    /// Input positions from one tap to the next, at least 1.
    pub dilation: usize,
    /// Zeros before and after the input.
    pub padding: Padding,
    /// Groups into which the channels are divided; `in_channels` for a depthwise convolution.
    pub groups: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { stride: 1, dilation: 1, padding: Padding::Valid, groups: 1 }
    }
}

impl Window {
    /// The shape of the convolution of `batch` sequences of `in_length` positions.
    pub(crate) fn shape(
        self,
        op: &'static str,
        [in_channels, out_channels, kernel_size]: [usize; 3],
        [batch, in_length]: [usize; 2],
    ) -> Result<Conv1dShape> {
        let Self { stride, dilation, padding, groups } = self;
        let extents = Conv1dExtents {
            batch,
            in_channels,
            out_channels,
            in_length,
            kernel_size,
            stride,
            dilation,
            padding,
            groups,
        };
        Conv1dShape::new(&extents).map_err(|fault| Error::Convolution { op, fault })
    }
}

/// A tensor of sequences, of three axes, and which way round it lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a, T: Element> {
    /// `[batch, channels, length]` or `[batch, length, channels]`.
    pub tensor: &'a Tensor<T>,
    /// Which of the two.
    pub layout: SequenceLayout,
}

impl<'a, T: Element> Sequences<'a, T> {
    /// `tensor`, taken as `layout` says.
    #[must_use]
    pub const fn new(tensor: &'a Tensor<T>, layout: SequenceLayout) -> Self {
        Self { tensor, layout }
    }

    /// Batch, channels and length; one of 0 channels where the tensor has other than three axes.
    fn extents(self) -> [usize; 3] {
        match (self.tensor.shape().extents(), self.layout) {
            (&[batch, channels, length], SequenceLayout::Ncl)
            | (&[batch, length, channels], SequenceLayout::Nlc) => [batch, channels, length],
            _ => [1, 0, 1],
        }
    }

    fn check(
        self,
        op: &'static str,
        operand: &'static str,
        [batch, channels, length]: [usize; 3],
    ) -> Result<()> {
        let expected = Shape::from(self.layout.extents(batch, channels, length));
        check_shape(op, operand, expected, self.tensor.shape())
    }

    /// As kernels see it.
    fn describe(self, operand: &'static str) -> Sequence {
        Sequence {
            operand,
            address: self.tensor.as_device_ptr(),
            layout: self.layout,
            row_stride: self.tensor.row_stride() as u64,
        }
    }
}

/// One forward pass: the operands and what is done with them.
///
/// It is enqueued on the stream of the filter's device handle; where another operand belongs to
/// another stream of the same GPU, that stream is ordered around the use.
#[derive(Debug)]
#[must_use = "a pass does nothing until `run`"]
pub struct Forward<'a, T: Element> {
    /// The input.
    pub x: Sequences<'a, T>,
    /// The filter, with the extents of `filter_layout`.
    pub w: &'a Tensor<T>,
    /// Which way round the filter lies in memory.
    pub filter_layout: FilterLayout,
    /// `[out_channels]`, added at every position.
    pub bias: Option<&'a Tensor<T>>,
    /// How the filter moves over the input.
    pub window: Window,
    /// Applied to every element.
    pub activation: Activation,
}

impl<T: Element> Forward<'_, T> {
    const OP: &'static str = Operation::Conv1dForward.name();

    /// Enqueues the pass, writes `y`, and says which tier runs it. `y` has the layout
    /// `y_layout`, whatever that of the input is.
    ///
    /// # Errors
    /// Before anything is enqueued: [`Error::Convolution`], [`Error::DeviceMismatch`],
    /// [`Error::Shape`], [`Error::Overlap`], [`Error::Overflow`], and [`Error::Unsupported`] where
    /// the tier that the config or `KASMINA_TIER` forces cannot serve the call. On the first use of
    /// a kernel: [`Error::DriverTooOld`], [`Error::ModuleRejected`], [`Error::EntryMissing`],
    /// [`Error::PtxUnreadable`]. Always: [`Error::Driver`].
    pub fn run(
        &self,
        y: &mut Tensor<T>,
        y_layout: SequenceLayout,
        config: &KernelConfig,
    ) -> Result<Tier> {
        let y = Sequences::new(y, y_layout);
        let pass = self.check(y, config.tiling_enabled())?;
        let mut tier = choose_forward_tier(self.w, config, &pass)?;
        if y.tensor.is_empty() {
            return Ok(tier);
        }
        let device = self.w.device();
        let Some(stream) = device.stream().gpu() else {
            let (x, w) = (self.x.tensor.host_view(), self.w.host_view());
            let bias = self.bias.map(Tensor::host_view);
            let mut result = zeroed(y.tensor.len())?;
            let bias = bias.as_ref().map(|bias| bias.values());
            cpu::conv1d::forward(&pass, x.values(), w.values(), bias, &mut result);
            y.tensor.store(result);
            return Ok(tier);
        };
        let launch = Launch {
            stream,
            ptx_dir: config.ptx_override().or(device.defaults().ptx_override()),
            operation: Operation::Conv1dForward,
        };
        let operands = [Some(self.x.tensor), self.bias, Some(y.tensor)];
        ordered(self.w, &operands, || {
            if tier == Tier::Hopper {
                let (served, forced) =
                    (hopper::forward(&launch, stream, &pass), forced_tier(self.w, config));
                tier = or_portable(served, forced, || portable::forward(&launch, &pass))?;
                return Ok(());
            }
            portable::forward(&launch, &pass)
        })?;
        Ok(tier)
    }

    fn check(&self, y: Sequences<'_, T>, tiled: bool) -> Result<ForwardPass> {
        let op = Self::OP;
        let inputs = [("x", Some(self.x.tensor)), ("w", Some(self.w)), ("bias", self.bias)];
        check_devices(op, self.w, inputs.into_iter().chain([("y", Some(y.tensor))]))?;
        let shape = shape_of(op, self.x, self.w, self.filter_layout, self.window)?;
        if let Some(bias) = self.bias {
            check_shape(op, "bias", [shape.out_channels as usize].into(), bias.shape())?;
        }
        y.check(op, "y", out_extents(&shape))?;
        check_overlap(op, inputs, y.tensor)?;
        Ok(ForwardPass {
            shape,
            dtype: T::DTYPE,
            x: self.x.describe("x"),
            w: describe_filter(self.w, self.filter_layout),
            bias: self.bias.map_or(0, Tensor::as_device_ptr),
            activation: self.activation,
            y: y.describe("y"),
            tiled,
        })
    }
}

/// The gradients of a convolution, from the one with respect to `z = w ⋆ x + b`, the result before
/// the activation.
///
/// Where there is an activation, [`KasminaConv1d::backward`](crate::KasminaConv1d::backward) makes
/// `dz` of the output's gradient.
#[derive(Debug)]
#[must_use = "a pass does nothing until `run`"]
pub struct Backward<'a, T: Element> {
    /// The forward pass's input.
    pub x: Sequences<'a, T>,
    /// The filter.
    pub w: &'a Tensor<T>,
    /// Which way round the filter, and its gradient, lie in memory.
    pub filter_layout: FilterLayout,
    /// The gradient with respect to z.
    pub dz: Sequences<'a, T>,
    /// How the filter moves over the input.
    pub window: Window,
}

/// Where [`Backward`] writes; what is `None` is not computed.
#[derive(Debug)]
pub struct Gradients<'a, T: Element> {
    /// With respect to the input, and which way round it is to lie in memory.
    pub dx: Option<(&'a mut Tensor<T>, SequenceLayout)>,
    /// With respect to the filter.
    pub dw: Option<&'a mut Tensor<T>>,
    /// With respect to the bias, `[out_channels]`.
    pub db: Option<&'a mut Tensor<T>>,
    /// Whether the gradients of filter and bias are added to what is there. The sum is formed in
    /// f32 and rounded once.
    pub accumulate: bool,
}

/// None.
impl<T: Element> Default for Gradients<'_, T> {
    fn default() -> Self {
        Self { dx: None, dw: None, db: None, accumulate: false }
    }
}

impl<T: Element> Backward<'_, T> {
    const OP: &'static str = Operation::Conv1dBackward.name();

    /// Enqueues the passes that the wanted gradients need, and says which tiers run them.
    ///
    /// # Errors
    /// As [`Forward::run`], and [`Error::OutOfMemory`] for the partial sums of the filter's
    /// gradient.
    pub fn run(&self, gradients: Gradients<'_, T>, config: &KernelConfig) -> Result<Tiers> {
        let op = Self::OP;
        let Gradients { dx, dw, db, accumulate } = gradients;
        let dx = dx.map(|(tensor, layout)| Sequences::new(&*tensor, layout));
        let (dw, db) = (dw.as_deref(), db.as_deref());
        let inputs =
            [("x", Some(self.x.tensor)), ("w", Some(self.w)), ("dz", Some(self.dz.tensor))];
        let outputs = [("dx", dx.map(|dx| dx.tensor)), ("dw", dw), ("db", db)];
        check_devices(op, self.w, inputs.into_iter().chain(outputs))?;
        let shape = shape_of(op, self.x, self.w, self.filter_layout, self.window)?;
        self.dz.check(op, "dz", out_extents(&shape))?;
        if let Some(dx) = dx {
            dx.check(op, "dx", self.x.extents())?;
        }
        if let Some(dw) = dw {
            check_shape(op, "dw", self.filter_layout.extents(&shape).into(), dw.shape())?;
        }
        if let Some(db) = db {
            check_shape(op, "db", [shape.out_channels as usize].into(), db.shape())?;
        }
        for (_, output) in outputs {
            if let Some(output) = output {
                check_overlap(op, inputs, output)?;
            }
        }
        for (operand, output) in outputs.into_iter().skip(1) {
            let earlier = outputs.into_iter().take_while(|&(name, _)| name != operand);
            if let Some(output) = output {
                check_overlap(op, earlier, output)?;
            }
        }

        let dgrad = dx.map(|dx| DgradPass {
            shape,
            dtype: T::DTYPE,
            dz: self.dz.describe("dz"),
            w: describe_filter(self.w, self.filter_layout),
            dx: dx.describe("dx"),
            tiled: config.tiling_enabled(),
        });
        let wgrad = (dw.is_some() || db.is_some()).then(|| WgradPass {
            shape,
            dtype: T::DTYPE,
            x: self.x.describe("x"),
            dz: self.dz.describe("dz"),
            dw: dw.map(|dw| describe_filter(dw, self.filter_layout)),
            db: db.map(Tensor::as_device_ptr),
            accumulate,
        });
        // Both before anything is enqueued.
        let choose_dgrad = |pass: &DgradPass| {
            let obstacle = |tier| pass.obstacle(tier, config);
            choose_tier(op, self.w, config, obstacle, |tier, count| pass.pays(tier, count))
        };
        let choose_wgrad = |pass: &WgradPass| {
            let obstacle = |tier| pass.obstacle(tier, config);
            choose_tier(op, self.w, config, obstacle, |tier, count| pass.pays(tier, count))
        };
        let mut dgrad_tier = dgrad.as_ref().map(choose_dgrad).transpose()?;
        let mut wgrad_tier = wgrad.as_ref().map(choose_wgrad).transpose()?;

        let device = self.w.device();
        let Some(stream) = device.stream().gpu() else {
            self.run_on_cpu(dgrad.zip(dx), wgrad, dw, db)?;
            return Ok(Tiers { dx: dgrad_tier, dw: wgrad_tier });
        };
        let launch = Launch {
            stream,
            ptx_dir: config.ptx_override().or(device.defaults().ptx_override()),
            operation: Operation::Conv1dBackward,
        };
        let operands = inputs.into_iter().chain(outputs).map(|(_, tensor)| tensor);
        let operands: Vec<_> = operands.collect();
        ordered(self.w, &operands, || {
            if let (Some(pass), Some(dx)) = (&dgrad, dx)
                && !dx.tensor.is_empty()
            {
                if dgrad_tier == Some(Tier::Hopper) {
                    let (served, forced) =
                        (hopper::dgrad(&launch, stream, pass), forced_tier(self.w, config));
                    let tier = or_portable(served, forced, || portable::dgrad(&launch, pass))?;
                    dgrad_tier = Some(tier);
                } else {
                    portable::dgrad(&launch, pass)?;
                }
            }
            // Last what may be added to: after an error the call can be made again.
            if let Some(pass) = &wgrad {
                if wgrad_tier == Some(Tier::Hopper) {
                    let (served, forced) =
                        (hopper::wgrad(&launch, stream, pass), forced_tier(self.w, config));
                    let portable = || portable::wgrad(&launch, stream, pass);
                    wgrad_tier = Some(or_portable(served, forced, portable)?);
                } else {
                    portable::wgrad(&launch, stream, pass)?;
                }
            }
            Ok(())
        })?;
        Ok(Tiers { dx: dgrad_tier, dw: wgrad_tier })
    }

    fn run_on_cpu(
        &self,
        dgrad: Option<(DgradPass, Sequences<'_, T>)>,
        wgrad: Option<WgradPass>,
        dw: Option<&Tensor<T>>,
        db: Option<&Tensor<T>>,
    ) -> Result<()> {
        let (x, w) = (self.x.tensor.host_view(), self.w.host_view());
        let dz = self.dz.tensor.host_view();
        if let Some((pass, dx)) = dgrad
            && !dx.tensor.is_empty()
        {
            let mut result = zeroed(dx.tensor.len())?;
            cpu::conv1d::dgrad(&pass, dz.values(), w.values(), &mut result);
            dx.tensor.store(result);
        }
        let Some(pass) = wgrad else { return Ok(()) };
        let before = |tensor: Option<&Tensor<T>>| {
            tensor.map(
                |tensor| {
                    if pass.accumulate { tensor.to_vec() } else { zeroed(tensor.len()) }
                },
            )
        };
        let mut dw_values = before(dw).transpose()?;
        let mut db_values = before(db).transpose()?;
        cpu::conv1d::wgrad(
            &pass,
            x.values(),
            dz.values(),
            dw_values.as_deref_mut(),
            db_values.as_deref_mut(),
        );
        for (tensor, values) in [(dw, dw_values), (db, db_values)] {
            if let (Some(tensor), Some(values)) = (tensor, values) {
                tensor.store(values);
            }
        }
        Ok(())
    }
}

/// `dy · act'(z)` in a new tensor of the layout of `dy`.
pub(crate) fn activation_gradient<T: Element>(
    activation: Activation,
    z: Sequences<'_, T>,
    dy: Sequences<'_, T>,
    config: &KernelConfig,
) -> Result<Tensor<T>> {
    let op = Operation::ActivationGrad.name();
    let [batch, channels, length] = z.extents();
    check_devices(op, z.tensor, [("dy", Some(dy.tensor))])?;
    dy.check(op, "dy", [batch, channels, length])?;
    let shape = Shape::from(dy.layout.extents(batch, channels, length));
    let device = z.tensor.device();
    let dz = Tensor::uninitialised(device, shape, op)?;
    let overflow = |_| Error::Overflow { op, quantity: "an extent", limit: u64::from(u32::MAX) };
    let extent = |extent: usize| u32::try_from(extent).map_err(overflow);
    let extents = [extent(batch)?, extent(channels)?, extent(length)?];
    if dz.is_empty() {
        return Ok(dz);
    }
    let [z_view, dy_view] = [z.describe("z"), dy.describe("dy")];
    let Some(stream) = device.stream().gpu() else {
        let (z, dy) = (z.tensor.host_view(), dy.tensor.host_view());
        let mut result = zeroed(dz.len())?;
        let operands = [(z.values(), z_view), (dy.values(), dy_view)];
        cpu::conv1d::activation_grad(activation, extents, operands, dy_view.layout, &mut result);
        dz.store(result);
        return Ok(dz);
    };
    let launch = Launch {
        stream,
        ptx_dir: config.ptx_override().or(device.defaults().ptx_override()),
        operation: Operation::ActivationGrad,
    };
    let pass = ActivationGradPass {
        extents,
        dtype: T::DTYPE,
        activation,
        z: z_view,
        dy: dy_view,
        dz: Sequences::new(&dz, dy.layout).describe("dz"),
    };
    ordered(z.tensor, &[Some(dy.tensor)], || portable::activation_grad(&launch, &pass))?;
    Ok(dz)
}

/// Batch, channels and length of the output.
pub(crate) fn out_extents(shape: &Conv1dShape) -> [usize; 3] {
    [shape.batch, shape.out_channels, shape.out_length].map(|extent| extent as usize)
}

fn shape_of<T: Element>(
    op: &'static str,
    x: Sequences<'_, T>,
    w: &Tensor<T>,
    filter_layout: FilterLayout,
    window: Window,
) -> Result<Conv1dShape> {
    let [batch, in_channels, in_length] = x.extents();
    if in_channels == 0 {
        let expected = x.layout.extents(1, 1, 1).into();
        return Err(Error::Shape { op, operand: "x", expected, got: *x.tensor.shape() });
    }
    let (out_channels, group_in, kernel_size) = match (w.shape().extents(), filter_layout) {
        (&[out, input, taps], FilterLayout::OutInTap)
        | (&[taps, out, input], FilterLayout::TapOutIn) => (out, input, taps),
        _ => {
            let expected = [1, 1, 1].into();
            return Err(Error::Shape { op, operand: "w", expected, got: *w.shape() });
        }
    };
    let channels = [in_channels, out_channels, kernel_size];
    let shape = window.shape(op, channels, [batch, in_length])?;
    if group_in != shape.group_in() as usize {
        let expected = filter_layout.extents(&shape).into();
        return Err(Error::Shape { op, operand: "w", expected, got: *w.shape() });
    }
    Ok(shape)
}

pub(crate) fn describe_filter<T: Element>(w: &Tensor<T>, layout: FilterLayout) -> Filter {
    Filter { address: w.as_device_ptr(), layout, row_stride: w.row_stride() as u64 }
}

fn check_devices<'a, T: Element>(
    op: &'static str,
    w: &Tensor<T>,
    operands: impl IntoIterator<Item = (&'static str, Option<&'a Tensor<T>>)>,
) -> Result<()> {
    let expected = w.device().id();
    for (operand, tensor) in operands {
        let got = tensor.map_or(expected, |tensor| tensor.device().id());
        if got != expected {
            return Err(Error::DeviceMismatch { op, operand, expected, got });
        }
    }
    Ok(())
}

fn check_overlap<'a, T: Element>(
    op: &'static str,
    inputs: impl IntoIterator<Item = (&'static str, Option<&'a Tensor<T>>)>,
    output: &Tensor<T>,
) -> Result<()> {
    for (operand, input) in inputs {
        if input.is_some_and(|input| input.overlaps(output)) {
            return Err(Error::Overlap { op, operand });
        }
    }
    Ok(())
}

/// The tier that serves a forward pass with this filter.
pub(crate) fn choose_forward_tier<T: Element>(
    w: &Tensor<T>,
    config: &KernelConfig,
    pass: &ForwardPass,
) -> Result<Tier> {
    let obstacle = |tier| pass.obstacle(tier, config);
    let pays = |tier, multiprocessors| pass.pays(tier, multiprocessors);
    choose_tier(Operation::Conv1dForward.name(), w, config, obstacle, pays)
}

/// The forced tier, or the most demanding one that nothing speaks against and that pays on a GPU of
/// so many multiprocessors.
fn choose_tier<T: Element>(
    op: &'static str,
    w: &Tensor<T>,
    config: &KernelConfig,
    of_pass: impl Fn(Tier) -> Option<Obstacle>,
    pays: impl Fn(Tier, u32) -> bool,
) -> Result<Tier> {
    let device = w.device();
    let forced = forced_tier(w, config);
    let multiprocessors = device.capability().map_or(1, |capability| capability.sm_count);
    let slower = |tier| forced.is_none() && !pays(tier, multiprocessors);
    pick(op, forced, |tier| {
        let of_call = || of_pass(tier).or_else(|| slower(tier).then_some(Obstacle::Operation));
        device.obstacle(tier).or_else(of_call)
    })
}

/// The tier that the config or the environment forces.
fn forced_tier<T: Element>(w: &Tensor<T>, config: &KernelConfig) -> Option<Tier> {
    config.forced_tier().or(w.device().defaults().forced_tier())
}

/// What a Hopper kernel's launch came to: where it found no memory for copies or parts and is not
/// forced, the portable tier, which needs less, runs instead; nothing has been enqueued then.
fn or_portable(
    served: Result<()>,
    forced: Option<Tier>,
    portable: impl FnOnce() -> Result<()>,
) -> Result<Tier> {
    match served {
        Err(Error::OutOfMemory { .. }) if forced.is_none() => portable().map(|()| Tier::Portable),
        outcome => outcome.map(|()| Tier::Hopper),
    }
}

/// Enqueues on the stream of `w` between the streams' waits for each other.
pub(crate) fn ordered<T: Element>(
    w: &Tensor<T>,
    operands: &[Option<&Tensor<T>>],
    enqueue: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let streams = operands.iter().flatten().map(|operand| operand.device().stream());
    gemm::ordered(w.device().stream(), streams, enqueue)
}
