//! The layers of a session: their shapes, and their parameters in the two forms that consumers
//! take.
#![forbid(unsafe_code)]

use kasmina_kernels::activation::Activation;
use kasmina_kernels::gemm::WeightLayout;
use kasmina_kernels::persistent::{LayerShape, StackPlan};

use crate::config::KernelConfig;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gemm::Forward;
use crate::layer::KasminaLayer;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The parameters of a stack as they were at one time.
pub(super) struct Parameters {
    layers: Vec<LayerParameters>,
}

struct LayerParameters {
    in_features: usize,
    out_features: usize,
    activation: Activation,
    layout: WeightLayout,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    kernel_config: KernelConfig,
}

impl Parameters {
    /// Those of the layers, which have this element type and live on one device.
    pub(super) fn of<T: Element>(layers: &[&KasminaLayer], op: &'static str) -> Result<Self> {
        let mut parameters = Vec::with_capacity(layers.len());
        for layer in layers {
            if layer.dtype() != T::DTYPE {
                return Err(Error::DType { op, expected: layer.dtype(), got: T::DTYPE });
            }
            let (expected, got) = (layers[0].device().id(), layer.device().id());
            if got != expected {
                return Err(Error::DeviceMismatch { op, operand: "layer", expected, got });
            }
            parameters.push(LayerParameters {
                in_features: layer.in_features(),
                out_features: layer.out_features(),
                activation: layer.activation(),
                layout: layer.weight_layout(),
                weight: layer.weight()?,
                bias: layer.bias()?,
                kernel_config: layer.kernel_config().clone(),
            });
        }
        Ok(Self { layers: parameters })
    }

    /// The layers' shapes. Widths beyond 32 bits stay beyond what a plan takes.
    pub(super) fn shapes(&self) -> Vec<LayerShape> {
        let width = |features: usize| u32::try_from(features).unwrap_or(u32::MAX);
        let shape = |layer: &LayerParameters| LayerShape {
            in_features: width(layer.in_features),
            out_features: width(layer.out_features),
            activation: layer.activation,
        };
        self.layers.iter().map(shape).collect()
    }

    /// The parameters as a resident kernel reads them.
    pub(super) fn pack<T: Element>(&self, plan: &StackPlan) -> Vec<u8> {
        let mut packed = vec![0; plan.packed_bytes as usize];
        for (index, layer) in self.layers.iter().enumerate() {
            let weight = |k: u32, n: u32| {
                let (k, n) = (k as usize, n as usize);
                let at = match layer.layout {
                    WeightLayout::InOut => k * layer.out_features + n,
                    WeightLayout::OutIn => n * layer.in_features + k,
                };
                let value = T::from_f32(layer.weight[at]);
                let mut bits = [0; 4];
                bits[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
                u32::from_le_bytes(bits)
            };
            let bias = |n: u32| layer.bias.as_ref().map_or(0.0, |bias| bias[n as usize]);
            plan.pack(index, weight, bias, &mut packed);
        }
        packed
    }

    /// The parameters as tensors on a device, for one forward pass per layer.
    pub(super) fn stack<T: Element>(&self, device: &Device) -> Result<Stack<T>> {
        let rounded =
            |values: &[f32]| values.iter().map(|&value| T::from_f32(value)).collect::<Vec<T>>();
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (rows, columns) = layer.layout.rows_columns(layer.in_features, layer.out_features);
            let bias = layer
                .bias
                .as_ref()
                .map(|bias| Tensor::from_slice(device, &rounded(bias), [bias.len()]));
            layers.push(StackLayer {
                weight: Tensor::from_slice(device, &rounded(&layer.weight), [rows, columns])?,
                bias: bias.transpose()?,
                layout: layer.layout,
                activation: layer.activation,
                out_features: layer.out_features,
                kernel_config: layer.kernel_config.clone(),
            });
        }
        Ok(Stack { device: device.clone(), layers })
    }
}

/// A stack that is run layer by layer.
pub(super) struct Stack<T: Element> {
    device: Device,
    layers: Vec<StackLayer<T>>,
}

struct StackLayer<T: Element> {
    weight: Tensor<T>,
    bias: Option<Tensor<T>>,
    layout: WeightLayout,
    activation: Activation,
    out_features: usize,
    kernel_config: KernelConfig,
}

impl<T: Element> Stack<T> {
    /// The output for `rows` rows of input, once it is there.
    pub(super) fn run(&self, rows: usize, input: &[T]) -> Result<Vec<T>> {
        let columns = input.len() / rows.max(1);
        let mut x = Tensor::from_slice(&self.device, input, [rows, columns])?;
        for layer in &self.layers {
            let shape = Shape::from([rows, layer.out_features]);
            let mut y = Tensor::uninitialised(&self.device, shape, "StreamSession")?;
            let forward = Forward {
                x: &x,
                w: &layer.weight,
                bias: layer.bias.as_ref(),
                layout: layer.layout,
                activation: layer.activation,
            };
            forward.run(&mut y, &layer.kernel_config)?;
            x = y;
        }
        x.to_vec()
    }
}
