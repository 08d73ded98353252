//! A linear layer with its parameters.
#![forbid(unsafe_code)]

mod backward;
mod telemetry;

pub use backward::LinearGradients;

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::Activation;
use kasmina_kernels::gemm::WeightLayout;
use kasmina_kernels::gemm::hopper::unaligned;

use crate::config::KernelConfig;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gemm::{Forward, Pass, choose_forward_tier};
use crate::parameters::{Draw, Parameters, Weights, with_parameters};
use crate::persistent::{StreamConfig, StreamSession};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// What a [`KasminaLayer`] is to be; [`build`](Self::build) makes it.
///
/// ```
/// use kasmina_host::{Activation, Device, LinearConfig, Tensor};
///
/// let device = Device::cpu();
/// let layer = LinearConfig::new(3, 2).activation(Activation::Relu).build(&device)?;
/// let x = Tensor::from_slice(&device, &[1.0f32, 2.0, 3.0], [1, 3])?;
/// assert_eq!(layer.forward(&x)?.shape().extents(), [1, 2]);
/// # Ok::<(), kasmina_host::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a config does nothing until `build`"]
pub struct LinearConfig {
    in_features: usize,
    out_features: usize,
    activation: Activation,
    bias: bool,
    dtype: DType,
    weight_layout: WeightLayout,
    seed: u64,
    kernel_config: KernelConfig,
}

impl LinearConfig {
    /// A layer with bias, without activation, in f32, its weight as `[out, in]`.
    pub fn new(in_features: usize, out_features: usize) -> Self {
        Self {
            in_features,
            out_features,
            activation: Activation::None,
            bias: true,
            dtype: DType::F32,
            weight_layout: WeightLayout::OutIn,
            seed: 0,
            kernel_config: KernelConfig::default(),
        }
    }

    /// What is applied to `X·W + b`.
    pub const fn activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// Whether there is a bias.
    pub const fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// The element type of input, output and parameters.
    pub const fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Which way round the weight lies in memory. The initial weight is the same matrix in both.
    pub const fn weight_layout(mut self, layout: WeightLayout) -> Self {
        self.weight_layout = layout;
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

    /// The layer, with weight and bias drawn uniformly from ±1/√in_features as PyTorch's
    /// `nn.Linear` does. The same seed gives the same values on every machine.
    ///
    /// # Errors
    /// [`Error::Shape`] if a number of features is 0, [`Error::Overflow`] if the weight is too
    /// large to address, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn build(self, device: &Device) -> Result<KasminaLayer> {
        let op = "LinearConfig::build";
        let Self { in_features, out_features, weight_layout, .. } = self;
        let shape_of = |in_features, out_features| {
            let (rows, columns) = weight_layout.rows_columns(in_features, out_features);
            Shape::from([rows, columns])
        };
        let shape = shape_of(in_features, out_features);
        let expected = shape_of(in_features.max(1), out_features.max(1));
        if shape != expected {
            return Err(Error::Shape { op, operand: "weight", expected, got: shape });
        }
        let draw = Draw {
            op,
            weight: shape,
            bias: self.bias.then_some(out_features),
            bound: 1.0 / (in_features as f32).sqrt(),
            seed: self.seed,
        };
        // Numbered by (out, in) whatever the layout.
        let parameters = draw.parameters(device, self.dtype, |position| match weight_layout {
            WeightLayout::OutIn => position,
            WeightLayout::InOut => position % out_features * in_features + position / out_features,
        })?;
        Ok(KasminaLayer { config: self, device: device.clone(), parameters })
    }
}

/// A linear layer, `Y = act(X·W + b)`.
///
/// It can be shared between threads. Its operations are enqueued on the stream of the device
/// handle it was built with. A call that is refused leaves it as it was.
#[derive(Debug)]
pub struct KasminaLayer {
    config: LinearConfig,
    device: Device,
    parameters: Parameters,
}

impl KasminaLayer {
    /// `act(X·W + b)` for `x` of shape `[…, in_features]`, in a new tensor of shape
    /// `[…, out_features]`. Enqueued: reading the result waits for it.
    ///
    /// # Errors
    /// As [`Forward::run`], and [`Error::DType`] if `x` has another element type than the layer;
    /// [`Error::OutOfMemory`].
    pub fn forward<T: Element>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let op = "KasminaLayer::forward";
        let linear = self.parameters.of::<T>(op)?;
        // Checked before memory is taken, whose size a wrong input would decide.
        self.check_input(op, x)?;
        let shape = x.shape().with_columns(self.config.out_features);
        let mut y = Tensor::uninitialised(&self.device, shape, op)?;
        self.run(linear, x, &mut y)?;
        Ok(y)
    }

    /// As [`forward`](Self::forward), into a tensor that exists. Says which tier runs it.
    ///
    /// # Errors
    /// As [`Forward::run`], and [`Error::DType`] if the tensors have another element type than
    /// the layer.
    pub fn forward_into<T: Element>(&self, x: &Tensor<T>, y: &mut Tensor<T>) -> Result<Tier> {
        let linear = self.parameters.of::<T>("KasminaLayer::forward_into")?;
        self.run(linear, x, y)
    }

    fn run<T: Element>(
        &self,
        linear: &Weights<T>,
        x: &Tensor<T>,
        y: &mut Tensor<T>,
    ) -> Result<Tier> {
        self.pass(linear, x).run(y, &self.config.kernel_config)
    }

    fn pass<'a, T: Element>(&self, linear: &'a Weights<T>, x: &'a Tensor<T>) -> Forward<'a, T> {
        Forward {
            x,
            w: &linear.weight,
            bias: linear.bias.as_ref(),
            layout: self.config.weight_layout,
            activation: self.config.activation,
        }
    }

    fn check_input<T: Element>(&self, op: &'static str, x: &Tensor<T>) -> Result<()> {
        let expected = x.shape().with_columns(self.config.in_features);
        if *x.shape() == expected {
            return Ok(());
        }
        Err(Error::Shape { op, operand: "x", expected, got: *x.shape() })
    }

    /// Replaces the weight, given row by row in the layer's layout and rounded to its element
    /// type. Returns once the values have been read.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `in_features · out_features` values, [`Error::Driver`].
    pub fn set_weight(&mut self, values: &[f32]) -> Result<()> {
        self.parameters.set_weight("KasminaLayer::set_weight", values)
    }

    /// Replaces the bias, rounded to the layer's element type. Returns once the values have been
    /// read.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `out_features` values, or any for a layer without bias;
    /// [`Error::Driver`].
    pub fn set_bias(&mut self, values: &[f32]) -> Result<()> {
        self.parameters.set_bias("KasminaLayer::set_bias", values)
    }

    /// Replaces the weight by a copy of `values`, which has the shape of
    /// [`weight_tensor`](Self::weight_tensor). Enqueued: nothing passes through the host.
    ///
    /// # Errors
    /// Before anything is enqueued: [`Error::DType`], [`Error::DeviceMismatch`], [`Error::Shape`],
    /// and [`Error::Overlap`] if `values` shares memory with the weight. Always: [`Error::Driver`].
    pub fn set_weight_tensor<T: Element>(&mut self, values: &Tensor<T>) -> Result<()> {
        self.parameters.set_weight_tensor("KasminaLayer::set_weight_tensor", values)
    }

    /// Replaces the bias by a copy of `values`, `[out_features]`. Enqueued: nothing passes through
    /// the host.
    ///
    /// # Errors
    /// As [`set_weight_tensor`](Self::set_weight_tensor), and [`Error::Shape`] if there are values
    /// for a layer without bias.
    pub fn set_bias_tensor<T: Element>(&mut self, values: &Tensor<T>) -> Result<()> {
        self.parameters.set_bias_tensor("KasminaLayer::set_bias_tensor", values)
    }

    /// The weight in f32, row by row in the layer's layout. Waits for the stream.
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

    /// The weight as it lies on the device, `[out_features, in_features]` or the other way round as
    /// the layout says. A clone shares the memory: what is written through it is the layer's weight.
    ///
    /// # Errors
    /// [`Error::DType`] if the layer has another element type.
    pub fn weight_tensor<T: Element>(&self) -> Result<&Tensor<T>> {
        Ok(&self.parameters.of("KasminaLayer::weight_tensor")?.weight)
    }

    /// The bias as it lies on the device, `[out_features]`; `None` for a layer without. A clone
    /// shares the memory: what is written through it is the layer's bias.
    ///
    /// # Errors
    /// [`Error::DType`] if the layer has another element type.
    pub fn bias_tensor<T: Element>(&self) -> Result<Option<&Tensor<T>>> {
        Ok(self.parameters.of("KasminaLayer::bias_tensor")?.bias.as_ref())
    }

    /// The tier that would serve a contiguous input of `batch` rows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a tier is forced that cannot; [`Error::Overflow`] if the output
    /// is too large to address.
    pub fn tier_for(&self, batch: usize) -> Result<Tier> {
        let LinearConfig { in_features, out_features, dtype, weight_layout: layout, .. } =
            self.config;
        let fits = batch
            .checked_mul(in_features.max(out_features))
            .and_then(|elements| elements.checked_mul(dtype.size()))
            .is_some_and(|bytes| isize::try_from(bytes).is_ok());
        if !fits {
            let (op, limit) = ("KasminaLayer::tier_for", isize::MAX as u64);
            return Err(Error::Overflow { op, quantity: "the batch's size in bytes", limit });
        }
        let shape = [batch, out_features, in_features];
        let (_, weight_columns) = layout.rows_columns(in_features, out_features);
        let row_bytes =
            [in_features, weight_columns].map(|columns| (columns * dtype.size()) as u64);
        let addressable = row_bytes.iter().all(|&bytes| unaligned::is_aligned(0, bytes));
        let pass = Pass { dtype, layout, shape, addressable };
        choose_forward_tier(&self.device, &self.config.kernel_config, pass)
    }

    /// Does now what the first forward pass over `batch` rows would do first: loads its kernel,
    /// whose PTX the driver may have to compile. Which kernel it is depends on the batch. Returns
    /// when a pass over so many rows of zeros has run.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn warmup(&self, batch: usize) -> Result<()> {
        with_parameters!(&self.parameters, linear => self.warm_up(linear, batch))
    }

    fn warm_up<T: Element>(&self, linear: &Weights<T>, batch: usize) -> Result<()> {
        let x = Tensor::<T>::zeros(&self.device, [batch, self.config.in_features])?;
        let mut y = Tensor::zeros(&self.device, [batch, self.config.out_features])?;
        self.run(linear, &x, &mut y)?;
        self.device.synchronize()
    }

    /// A session in which this layer stays resident and answers small batches without a launch. It
    /// has a copy of the parameters: the layer may be used, changed and dropped meanwhile.
    ///
    /// # Errors
    /// As [`StreamSession::of_stack`].
    pub fn persistent<T: Element>(&self, config: StreamConfig) -> Result<StreamSession<T>> {
        StreamSession::of_stack(&[self], config)
    }

    pub(crate) const fn kernel_config(&self) -> &KernelConfig {
        &self.config.kernel_config
    }

    /// Elements per row of the input.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.config.in_features
    }

    /// Elements per row of the output.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.config.out_features
    }

    /// The element type of input, output and parameters.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.config.dtype
    }

    /// What is applied to `X·W + b`.
    #[must_use]
    pub const fn activation(&self) -> Activation {
        self.config.activation
    }

    /// Which way round the weight lies in memory.
    #[must_use]
    pub const fn weight_layout(&self) -> WeightLayout {
        self.config.weight_layout
    }

    /// The device handle it was built with.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
    }

    #[test]
    fn layers_are_send_and_sync() {
        fn send_sync<T: Send + Sync>() {}
        send_sync::<KasminaLayer>();
    }

    #[test]
    fn initial_parameters_are_uniform_within_one_over_the_root_of_in_features() {
        let layer = LinearConfig::new(100, 200).seed(7).build(&Device::cpu()).unwrap();
        let weight = layer.weight().unwrap();
        let mean = weight.iter().sum::<f32>() / weight.len() as f32;
        let variance = weight.iter().map(|w| w * w).sum::<f32>() / weight.len() as f32;
        assert!(weight.iter().chain(&layer.bias().unwrap().unwrap()).all(|w| w.abs() <= 0.1));
        // A uniform variable on ±0.1 has variance 0.01 / 3; 20,000 draws come within 2 %.
        assert!(mean.abs() < 2e-3 && (variance * 300.0 - 1.0).abs() < 0.02, "{mean} {variance}");
    }

    #[test]
    fn a_seed_gives_the_same_matrix_in_both_layouts_and_another_seed_another() {
        let config = LinearConfig::new(5, 3).seed(1);
        let build = |config: LinearConfig| config.build(&Device::cpu()).unwrap().weight().unwrap();
        let out_in = build(config.clone());
        let in_out = build(config.clone().weight_layout(WeightLayout::InOut));
        assert_eq!(in_out, transposed(&out_in, 3, 5));
        assert_ne!(out_in, build(config.seed(2)));
    }

    #[test]
    fn both_layouts_compute_the_same_and_keep_leading_axes() {
        let device = Device::cpu();
        let x = Tensor::from_slice(&device, &[1.0f32, -2.0, 0.5, 3.0], [2, 1, 2]).unwrap();
        for (layout, weight) in [
            (WeightLayout::OutIn, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            (WeightLayout::InOut, [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]),
        ] {
            let config = LinearConfig::new(2, 3).activation(Activation::Relu);
            let mut layer = config.weight_layout(layout).build(&device).unwrap();
            layer.set_weight(&weight).unwrap();
            layer.set_bias(&[0.0, 10.0, 0.0]).unwrap();
            let y = layer.forward(&x).unwrap();
            assert_eq!(y.shape().extents(), [2, 1, 3]);
            assert_eq!(y.to_vec().unwrap(), [0.0, 5.0, 0.0, 6.5, 23.5, 20.5]);
        }
    }

    #[test]
    fn a_refused_call_leaves_the_layer_usable() {
        let device = Device::cpu();
        let layer = LinearConfig::new(4, 2).build(&device).unwrap();
        let wrong_shape = Tensor::<f32>::zeros(&device, [3, 5]).unwrap();
        let error = layer.forward(&wrong_shape).unwrap_err();
        assert!(matches!(error, Error::Shape { operand: "x", .. }));
        let wrong_type = Tensor::<f16>::zeros(&device, [3, 4]).unwrap();
        let error = layer.forward(&wrong_type).unwrap_err();
        assert!(matches!(error, Error::DType { expected: DType::F32, got: DType::F16, .. }));
        let x = Tensor::<f32>::zeros(&device, [3, 4]).unwrap();
        assert_eq!(layer.forward(&x).unwrap().shape().extents(), [3, 2]);
    }

    #[test]
    fn parameters_of_the_wrong_length_are_refused() {
        let mut layer = LinearConfig::new(4, 2).bias(false).build(&Device::cpu()).unwrap();
        assert!(matches!(layer.set_weight(&[0.0; 7]), Err(Error::Shape { .. })));
        assert!(matches!(layer.set_bias(&[0.0; 2]), Err(Error::Shape { .. })));
        assert_eq!(layer.bias().unwrap(), None);
    }

    #[test]
    fn a_layer_without_features_and_one_too_large_are_refused() {
        let device = Device::cpu();
        let error = LinearConfig::new(0, 2).build(&device).unwrap_err();
        assert!(matches!(error, Error::Shape { operand: "weight", .. }));
        let error = LinearConfig::new(usize::MAX, 2).build(&device).unwrap_err();
        assert!(matches!(error, Error::Overflow { .. }));
        let layer = LinearConfig::new(2, 2).build(&device).unwrap();
        assert!(matches!(layer.tier_for(usize::MAX), Err(Error::Overflow { .. })));
    }

    #[test]
    fn warmup_and_tier_agree_with_the_device() {
        for dtype in DType::ALL {
            let layer = LinearConfig::new(3, 5).dtype(dtype).build(&Device::cpu()).unwrap();
            layer.warmup(8).unwrap();
            assert_eq!(layer.tier_for(8).unwrap(), Tier::Cpu);
        }
    }
}
