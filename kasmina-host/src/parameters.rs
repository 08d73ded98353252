//! Weight and bias of a layer, in whichever element type it has.
#![forbid(unsafe_code)]

use std::any::Any;

use half::{bf16, f16};
use kasmina_kernels::abi::DType;
use rayon::prelude::*;

use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gemm::check_shape;
use crate::shape::Shape;
use crate::tensor::{Tensor, zeroed};

#[derive(Debug)]
pub(crate) enum Parameters {
    F32(Weights<f32>),
    F16(Weights<f16>),
    BF16(Weights<bf16>),
}

#[derive(Debug)]
pub(crate) struct Weights<T: Element> {
    pub(crate) weight: Tensor<T>,
    pub(crate) bias: Option<Tensor<T>>,
}

/// Evaluates an expression with the parameters of whichever element type there is.
macro_rules! with_parameters {
    ($parameters:expr, $weights:ident => $body:expr) => {
        match $parameters {
            $crate::parameters::Parameters::F32($weights) => $body,
            $crate::parameters::Parameters::F16($weights) => $body,
            $crate::parameters::Parameters::BF16($weights) => $body,
        }
    };
}
pub(crate) use with_parameters;

/// How initial parameters are drawn: uniformly from ±`bound`.
pub(crate) struct Draw {
    pub(crate) op: &'static str,
    pub(crate) weight: Shape,
    /// Elements of the bias; `None` for a layer without.
    pub(crate) bias: Option<usize>,
    pub(crate) bound: f32,
    pub(crate) seed: u64,
}

impl Draw {
    /// Parameters in which the weight's element at a position in memory has the number that
    /// `number` says, so that a seed gives the same matrix in every layout.
    pub(crate) fn parameters(
        &self,
        device: &Device,
        dtype: DType,
        number: impl Fn(usize) -> usize + Sync,
    ) -> Result<Parameters> {
        match dtype {
            DType::F32 => Ok(Parameters::F32(self.weights(device, number)?)),
            DType::F16 => Ok(Parameters::F16(self.weights(device, number)?)),
            DType::BF16 => Ok(Parameters::BF16(self.weights(device, number)?)),
            got => Err(Error::DType { op: self.op, expected: DType::F32, got }),
        }
    }

    fn weights<T: Element>(
        &self,
        device: &Device,
        number: impl Fn(usize) -> usize + Sync,
    ) -> Result<Weights<T>> {
        // Reserved first, so that a weight that does not fit costs no time.
        let mut weight = Tensor::uninitialised(device, self.weight, self.op)?;
        let mut values: Vec<T> = zeroed(weight.len())?;
        values.par_iter_mut().enumerate().for_each(|(position, value)| {
            *value = T::from_f32(self.bound * uniform(self.seed, number(position) as u64));
        });
        weight.copy_from_slice(&values)?;
        let bias = self.bias.map(|len| {
            // Numbers no weight has.
            let values: Vec<T> = (0..len as u64)
                .map(|index| T::from_f32(self.bound * uniform(!self.seed, !index)))
                .collect();
            Tensor::from_slice(device, &values, [len])
        });
        Ok(Weights { weight, bias: bias.transpose()? })
    }
}

/// The `index`th number of a sequence in [−1, 1): SplitMix64, whose numbers can be drawn in any
/// order, with the upper 24 bits as the fraction.
fn uniform(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let steps = 1u32 << 23;
    (z >> 40) as f32 / steps as f32 - 1.0
}

impl Parameters {
    /// The parameters, which errors say to be of another type than `T` if they are.
    pub(crate) fn of<T: Element>(&self, op: &'static str) -> Result<&Weights<T>> {
        let any = with_parameters!(self, weights => weights as &dyn Any);
        any.downcast_ref().ok_or(Error::DType { op, expected: self.dtype(), got: T::DTYPE })
    }

    fn of_mut<T: Element>(&mut self, op: &'static str) -> Result<&mut Weights<T>> {
        let mismatch = Error::DType { op, expected: self.dtype(), got: T::DTYPE };
        let any = with_parameters!(self, weights => weights as &mut dyn Any);
        any.downcast_mut().ok_or(mismatch)
    }

    fn dtype(&self) -> DType {
        with_parameters!(self, weights => weights.weight.dtype())
    }

    /// The weight in f32.
    pub(crate) fn weight(&self) -> Result<Vec<f32>> {
        with_parameters!(self, weights => in_f32(&weights.weight))
    }

    /// The bias in f32.
    pub(crate) fn bias(&self) -> Result<Option<Vec<f32>>> {
        with_parameters!(self, weights => weights.bias.as_ref().map(in_f32).transpose())
    }

    pub(crate) fn set_weight(&mut self, op: &'static str, values: &[f32]) -> Result<()> {
        with_parameters!(self, weights => replace(op, &mut weights.weight, values))
    }

    pub(crate) fn set_bias(&mut self, op: &'static str, values: &[f32]) -> Result<()> {
        with_parameters!(self, weights => match &mut weights.bias {
            Some(bias) => replace(op, bias, values),
            None => no_values(op, [values.len()].into()),
        })
    }

    pub(crate) fn set_weight_tensor<T: Element>(
        &mut self,
        op: &'static str,
        values: &Tensor<T>,
    ) -> Result<()> {
        self.of_mut(op)?.weight.assign(op, values)
    }

    pub(crate) fn set_bias_tensor<T: Element>(
        &mut self,
        op: &'static str,
        values: &Tensor<T>,
    ) -> Result<()> {
        match &mut self.of_mut(op)?.bias {
            Some(bias) => bias.assign(op, values),
            None => no_values(op, *values.shape()),
        }
    }
}

/// What a layer without bias says to values for it.
fn no_values(op: &'static str, got: Shape) -> Result<()> {
    check_shape(op, "values", [0].into(), &got)
}

fn replace<T: Element>(op: &'static str, tensor: &mut Tensor<T>, values: &[f32]) -> Result<()> {
    if values.len() != tensor.len() {
        let (expected, got) = (*tensor.shape(), [values.len()].into());
        return Err(Error::Shape { op, operand: "values", expected, got });
    }
    let mut rounded: Vec<T> = zeroed(values.len())?;
    rounded.par_iter_mut().zip(values).for_each(|(rounded, &value)| *rounded = T::from_f32(value));
    tensor.copy_from_slice(&rounded)
}

fn in_f32<T: Element>(tensor: &Tensor<T>) -> Result<Vec<f32>> {
    Ok(tensor.to_vec()?.into_par_iter().map(T::to_f32).collect())
}
