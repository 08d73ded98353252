//! A convolutional layer with its parameters.
#![forbid(unsafe_code)]

mod backward;

pub use backward::Conv1dGradients;

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::Activation;
use kasmina_kernels::conv1d::{Conv1dShape, FilterLayout, Padding, SequenceLayout};

use crate::config::KernelConfig;
use crate::conv1d::{self, Forward, ForwardPass, Sequence, Sequences, Window};
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parameters::{Draw, Parameters, Weights, with_parameters};
use crate::tensor::Tensor;

/// What a [`KasminaConv1d`] is to be; [`build`](Self::build) makes it.
///
/// ```
/// use kasmina_host::{Activation, Conv1dConfig, Device, Padding, Tensor};
///
/// let device = Device::cpu();
/// let layer = Conv1dConfig::new(3, 8, 5)
///     .padding(Padding::Same)
///     .activation(Activation::Relu)
///     .build(&device)?;
/// let x = Tensor::full(&device, [2, 3, 100], 1.0f32)?;
/// let y = layer.forward(&x)?;
/// assert_eq!(y.shape().extents(), [2, 8, 100]);
/// let gradients = layer.backward(&x, &y, &y)?;
/// assert_eq!(gradients.dw.shape().extents(), [8, 3, 5]);
/// # Ok::<(), kasmina_host::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a config does nothing until `build`"]
pub struct Conv1dConfig {
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    window: Window,
    x_layout: SequenceLayout,
    y_layout: SequenceLayout,
    dy_layout: SequenceLayout,
    dx_layout: SequenceLayout,
    filter_layout: FilterLayout,
    activation: Activation,
    bias: bool,
    dtype: DType,
    seed: u64,
    kernel_config: KernelConfig,
}

impl Conv1dConfig {
    /// A layer with bias, without activation or padding, in f32, its tensors as
    /// `[batch, channels, length]` and its filter as `[out, in, tap]`.
    pub fn new(in_channels: usize, out_channels: usize, kernel_size: usize) -> Self {
        Self {
            in_channels,
            out_channels,
            kernel_size,
            window: Window::default(),
            x_layout: SequenceLayout::Ncl,
            y_layout: SequenceLayout::Ncl,
            dy_layout: SequenceLayout::Ncl,
            dx_layout: SequenceLayout::Ncl,
            filter_layout: FilterLayout::OutInTap,
            activation: Activation::None,
            bias: true,
            dtype: DType::F32,
            seed: 0,
            kernel_config: KernelConfig::default(),
        }
    }

    /// Input positions from one output position to the next.
    pub const fn stride(mut self, stride: usize) -> Self {
        self.window.stride = stride;
        self
    }

    /// Input positions from one tap to the next.
    pub const fn dilation(mut self, dilation: usize) -> Self {
        self.window.dilation = dilation;
        self
    }

    /// Zeros before and after the input.
    pub const fn padding(mut self, padding: Padding) -> Self {
        self.window.padding = padding;
        self
    }

    /// Groups into which the channels are divided.
    pub const fn groups(mut self, groups: usize) -> Self {
        self.window.groups = groups;
        self
    }

    /// The layout of all tensors of sequences: input, output and their gradients.
    pub const fn layout(mut self, layout: SequenceLayout) -> Self {
        self.x_layout = layout;
        self.y_layout = layout;
        self.dy_layout = layout;
        self.dx_layout = layout;
        self
    }

    /// The layout of the input.
    pub const fn input_layout(mut self, layout: SequenceLayout) -> Self {
        self.x_layout = layout;
        self
    }

    /// The layout of the output.
    pub const fn output_layout(mut self, layout: SequenceLayout) -> Self {
        self.y_layout = layout;
        self
    }

    /// The layout in which the output's gradient is given.
    pub const fn grad_output_layout(mut self, layout: SequenceLayout) -> Self {
        self.dy_layout = layout;
        self
    }

    /// The layout in which the input's gradient is returned.
    pub const fn grad_input_layout(mut self, layout: SequenceLayout) -> Self {
        self.dx_layout = layout;
        self
    }

    /// Which way round the filter and its gradient lie in memory. The initial filter is the same
    /// in both.
    pub const fn filter_layout(mut self, layout: FilterLayout) -> Self {
        self.filter_layout = layout;
        self
    }

    /// What is applied to the convolution with its bias.
    pub const fn activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// Whether there is a bias.
    pub const fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// The element type of tensors and parameters.
    pub const fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Seed of the initial parameters.
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How kernels are chosen.
    pub fn kernel_config(mut self, config: KernelConfig) -> Self {
        self.kernel_config = config;
        self
    }

    /// The layer, with filter and bias drawn uniformly from ±1/√(in_channels/groups · kernel_size)
    /// as PyTorch's `nn.Conv1d` does. The same seed gives the same values on every machine.
    ///
    /// # Errors
    /// [`Error::Convolution`] for a config that no input fits, [`Error::Overflow`] if the filter is
    /// too large to address, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn build(self, device: &Device) -> Result<KasminaConv1d> {
        let op = "Conv1dConfig::build";
        // An input that any filter fits, as none is known yet; the length is checked with each.
        let window = Window { padding: Padding::Same, ..self.window };
        let shape = window.shape(op, self.channels(), [1, 1])?;
        let parameters = self.draw(op, device, &shape)?;
        Ok(KasminaConv1d { config: self, device: device.clone(), parameters })
    }

    const fn channels(&self) -> [usize; 3] {
        [self.in_channels, self.out_channels, self.kernel_size]
    }

    fn draw(&self, op: &'static str, device: &Device, shape: &Conv1dShape) -> Result<Parameters> {
        let layout = self.filter_layout;
        let extents = layout.extents(shape);
        let [out, input, tap] =
            layout.strides(shape, extents[2] as u64).map(|stride| stride as usize);
        let (group_in, taps) = (shape.group_in() as usize, self.kernel_size);
        let draw = Draw {
            op,
            weight: extents.into(),
            bias: self.bias.then_some(self.out_channels),
            bound: 1.0 / ((group_in * taps) as f32).sqrt(),
            seed: self.seed,
        };
        // Numbered by (out, in, tap) whatever the layout.
        draw.parameters(device, self.dtype, |at| match layout {
            FilterLayout::OutInTap => at,
            FilterLayout::TapOutIn => {
                let (k, o, i) = (at / tap, at % tap / out, at % out / input);
                (o * group_in + i) * taps + k
            }
        })
    }
}

/// A convolutional layer, `y = act(w ⋆ x + b)`.
///
/// It can be shared between threads. Its operations are enqueued on the stream of the device
/// handle it was built with. A call that is refused leaves it as it was.
#[derive(Debug)]
pub struct KasminaConv1d {
    config: Conv1dConfig,
    device: Device,
    parameters: Parameters,
}

impl KasminaConv1d {
    /// `act(w ⋆ x + b)` in a new tensor. `x` is `[batch, in_channels, length]`, or
    /// `[batch, length, in_channels]` if the config says so. Enqueued: reading the result waits
    /// for it.
    ///
    /// # Errors
    /// As [`Forward::run`], and [`Error::DType`] if `x` has another element type than the layer;
    /// [`Error::OutOfMemory`].
    pub fn forward<T: Element>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let op = "KasminaConv1d::forward";
        let filter = self.parameters.of::<T>(op)?;
        let mut y = self.output(op, x)?;
        self.run(filter, x, self.config.activation, &mut y)?;
        Ok(y)
    }

    /// As [`forward`](Self::forward), into a tensor that exists. Says which tier runs it.
    ///
    /// # Errors
    /// As [`Forward::run`], and [`Error::DType`] if the tensors have another element type than
    /// the layer.
    pub fn forward_into<T: Element>(&self, x: &Tensor<T>, y: &mut Tensor<T>) -> Result<Tier> {
        let filter = self.parameters.of::<T>("KasminaConv1d::forward_into")?;
        self.run(filter, x, self.config.activation, y)
    }

    fn run<T: Element>(
        &self,
        filter: &Weights<T>,
        x: &Tensor<T>,
        activation: Activation,
        y: &mut Tensor<T>,
    ) -> Result<Tier> {
        let config = &self.config;
        let forward = Forward {
            x: Sequences::new(x, config.x_layout),
            w: &filter.weight,
            filter_layout: config.filter_layout,
            bias: filter.bias.as_ref(),
            window: config.window,
            activation,
        };
        forward.run(y, config.y_layout, &config.kernel_config)
    }

    /// Batch, channels and length of an input, which has the layer's channels.
    fn input_extents<T: Element>(&self, op: &'static str, x: &Tensor<T>) -> Result<[usize; 3]> {
        let Conv1dConfig { in_channels, x_layout, .. } = self.config;
        let got = *x.shape();
        let (batch, channels, length) = match (got.extents(), x_layout) {
            (&[batch, channels, length], SequenceLayout::Ncl)
            | (&[batch, length, channels], SequenceLayout::Nlc) => (batch, channels, length),
            _ => (1, 0, 1),
        };
        if channels != in_channels {
            let expected = x_layout.extents(batch, in_channels, length).into();
            return Err(Error::Shape { op, operand: "x", expected, got });
        }
        Ok([batch, channels, length])
    }

    /// A tensor for the output of `x`.
    fn output<T: Element>(&self, op: &'static str, x: &Tensor<T>) -> Result<Tensor<T>> {
        // Checked before memory is taken, whose size a wrong input would decide.
        let [batch, channels, length] = self.output_extents(op, x)?;
        let extents = self.config.y_layout.extents(batch, channels, length);
        Tensor::uninitialised(&self.device, extents.into(), op)
    }

    /// Batch, channels and length of the output for an input, which is checked.
    fn output_extents<T: Element>(&self, op: &'static str, x: &Tensor<T>) -> Result<[usize; 3]> {
        let config = &self.config;
        let [batch, _, length] = self.input_extents(op, x)?;
        let shape = config.window.shape(op, config.channels(), [batch, length])?;
        Ok(conv1d::out_extents(&shape))
    }

    /// Replaces the filter, given in its layout and rounded to the layer's element type. Returns
    /// once the values have been read.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not the filter's, [`Error::Driver`].
    pub fn set_weight(&mut self, values: &[f32]) -> Result<()> {
        self.parameters.set_weight("KasminaConv1d::set_weight", values)
    }

    /// Replaces the bias, rounded to the layer's element type. Returns once the values have been
    /// read.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `out_channels` values, or any for a layer without bias;
    /// [`Error::Driver`].
    pub fn set_bias(&mut self, values: &[f32]) -> Result<()> {
        self.parameters.set_bias("KasminaConv1d::set_bias", values)
    }

    /// Replaces the filter by a copy of `values`, which has the shape of
    /// [`weight_tensor`](Self::weight_tensor). Enqueued: nothing passes through the host.
    ///
    /// # Errors
    /// Before anything is enqueued: [`Error::DType`], [`Error::DeviceMismatch`], [`Error::Shape`],
    /// and [`Error::Overlap`] if `values` shares memory with the filter. Always: [`Error::Driver`].
    pub fn set_weight_tensor<T: Element>(&mut self, values: &Tensor<T>) -> Result<()> {
        self.parameters.set_weight_tensor("KasminaConv1d::set_weight_tensor", values)
    }

    /// Replaces the bias by a copy of `values`, `[out_channels]`. Enqueued: nothing passes through
    /// the host.
    ///
    /// # Errors
    /// As [`set_weight_tensor`](Self::set_weight_tensor), and [`Error::Shape`] if there are values
    /// for a layer without bias.
    pub fn set_bias_tensor<T: Element>(&mut self, values: &Tensor<T>) -> Result<()> {
        self.parameters.set_bias_tensor("KasminaConv1d::set_bias_tensor", values)
    }

    /// The filter in f32, in its layout. Waits for the stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn weight(&self) -> Result<Vec<f32>> {
        self.parameters.weight()
    }

    /// The bias in f32; `None` for a layer without. Waits for the stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn bias(&self) -> Result<Option<Vec<f32>>> {
        self.parameters.bias()
    }

    /// The filter as it lies on the device, `[out_channels, in_channels / groups, kernel_size]` or
    /// `[kernel_size, out_channels, in_channels / groups]` as the layout says. A clone shares the
    /// memory: what is written through it is the layer's filter.
    ///
    /// # Errors
    /// [`Error::DType`] if the layer has another element type.
    pub fn weight_tensor<T: Element>(&self) -> Result<&Tensor<T>> {
        Ok(&self.parameters.of("KasminaConv1d::weight_tensor")?.weight)
    }

    /// The bias as it lies on the device, `[out_channels]`; `None` for a layer without. A clone
    /// shares the memory: what is written through it is the layer's bias.
    ///
    /// # Errors
    /// [`Error::DType`] if the layer has another element type.
    pub fn bias_tensor<T: Element>(&self) -> Result<Option<&Tensor<T>>> {
        Ok(self.parameters.of("KasminaConv1d::bias_tensor")?.bias.as_ref())
    }

    /// The tier that would serve a contiguous input of `batch` sequences of `length` positions, as
    /// far as memory suffices.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a tier is forced that cannot; [`Error::Convolution`] if the filter
    /// does not fit the length or sizes exceed what kernels can address.
    pub fn tier_for(&self, batch: usize, length: usize) -> Result<Tier> {
        let op = "KasminaConv1d::tier_for";
        let config = &self.config;
        let shape = config.window.shape(op, config.channels(), [batch, length])?;
        let contiguous = |operand, layout: SequenceLayout, [batch, channels, length]: [_; 3]| {
            let [_, _, columns] = layout.extents(batch, channels, length);
            Sequence { operand, address: 0, layout, row_stride: columns as u64 }
        };
        with_parameters!(&self.parameters, filter => {
            let pass = ForwardPass {
                shape,
                dtype: config.dtype,
                x: contiguous("x", config.x_layout, [batch, config.in_channels, length]),
                w: conv1d::describe_filter(&filter.weight, config.filter_layout),
                bias: filter.bias.as_ref().map_or(0, Tensor::as_device_ptr),
                activation: config.activation,
                y: contiguous("y", config.y_layout, conv1d::out_extents(&shape)),
                tiled: config.kernel_config.tiling_enabled(),
            };
            conv1d::choose_forward_tier(&filter.weight, &config.kernel_config, &pass)
        })
    }

    /// Does now what the first forward pass over `batch` sequences of `length` positions would do
    /// first: loads its kernel, whose PTX the driver may have to compile. Which kernel it is depends
    /// on both. Returns when a pass over so many zeros has run.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn warmup(&self, batch: usize, length: usize) -> Result<()> {
        with_parameters!(&self.parameters, filter => self.warm_up(filter, batch, length))
    }

    fn warm_up<T: Element>(&self, filter: &Weights<T>, batch: usize, length: usize) -> Result<()> {
        let Conv1dConfig { in_channels, x_layout, activation, .. } = self.config;
        let x = Tensor::<T>::zeros(&self.device, x_layout.extents(batch, in_channels, length))?;
        let mut y = self.output("KasminaConv1d::warmup", &x)?;
        self.run(filter, &x, activation, &mut y)?;
        self.device.synchronize()
    }

    /// Channels of the input.
    #[must_use]
    pub const fn in_channels(&self) -> usize {
        self.config.in_channels
    }

    /// Channels of the output.
    #[must_use]
    pub const fn out_channels(&self) -> usize {
        self.config.out_channels
    }

    /// Taps of the filter.
    #[must_use]
    pub const fn kernel_size(&self) -> usize {
        self.config.kernel_size
    }

    /// How the filter moves over the input: stride, dilation, padding, groups.
    #[must_use]
    pub const fn window(&self) -> Window {
        self.config.window
    }

    /// The layout of the input.
    #[must_use]
    pub const fn input_layout(&self) -> SequenceLayout {
        self.config.x_layout
    }

    /// The layout of the output, and of the pre-activation.
    #[must_use]
    pub const fn output_layout(&self) -> SequenceLayout {
        self.config.y_layout
    }

    /// The layout in which the output's gradient is given.
    #[must_use]
    pub const fn grad_output_layout(&self) -> SequenceLayout {
        self.config.dy_layout
    }

    /// The layout in which the input's gradient is returned.
    #[must_use]
    pub const fn grad_input_layout(&self) -> SequenceLayout {
        self.config.dx_layout
    }

    /// Which way round the filter lies in memory.
    #[must_use]
    pub const fn filter_layout(&self) -> FilterLayout {
        self.config.filter_layout
    }

    /// The element type of tensors and parameters.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.config.dtype
    }

    /// What is applied to the convolution with its bias.
    #[must_use]
    pub const fn activation(&self) -> Activation {
        self.config.activation
    }

    /// The device handle it was built with.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }
}
