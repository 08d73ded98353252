//! A stack of layers in f64, and how far from it a result may be.
//!
//! # Tolerance
//! Let u and v be the unit roundoffs of f32 and of the element type. With `S = Σ x·w + b` and
//! `A = Σ |x·w| + |b|`, one layer's sum errs by at most `2·(√k + 4)·u·A`, and its activation adds
//! what `support/linear.rs` derives. What the layer before may err by, `e` per input, adds
//! `Σ e·|w|`. Between layers the reference rounds to the element type as the layers do, and a
//! result may be rounded to the neighbour: `e = error + v·|y|`, twice where it is an input.

use half::{bf16, f16};
use kasmina::{Activation, DType, Element, KasminaLayer, Tier, WeightLayout};
use libtest_mimic::Failed;

use crate::random::Random;

/// An element type with a value that no computation leaves behind.
pub(crate) trait Poison: Element {
    /// A NaN whose bytes are all 0xFF.
    const POISON: Self;
    /// The same NaN without its sign.
    const POISON_WITHOUT_SIGN: Self;
    fn bits(self) -> u32;
}

macro_rules! poison {
    ($($type:ident $bits:ident),+) => {$(
        impl Poison for $type {
            const POISON: Self = $type::from_bits($bits::MAX);
            const POISON_WITHOUT_SIGN: Self = $type::from_bits($bits::MAX >> 1);
            fn bits(self) -> u32 {
                self.to_bits().into()
            }
        }
    )+};
}
poison!(f32 u32, f16 u16, bf16 u16);

/// The bits of every element, which compare where NaN does not.
pub(crate) fn bits<T: Poison>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.bits()).collect()
}

/// Normally distributed rows.
pub(crate) fn batch<T: Poison>(rows: usize, columns: usize) -> Vec<T> {
    let mut random = Random::of(&format!("batch {rows} {columns} {}", T::DTYPE));
    random.normal(rows * columns).into_iter().map(T::from_f32).collect()
}

pub(crate) struct Stack {
    layers: Vec<Layer>,
}

struct Layer {
    inputs: usize,
    outputs: usize,
    activation: Activation,
    /// `[inputs, outputs]`
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Stack {
    /// The layers with their present parameters.
    pub(crate) fn of(layers: &[&KasminaLayer]) -> Result<Self, Failed> {
        let layers = layers.iter().map(|layer| {
            let (inputs, outputs) = (layer.in_features(), layer.out_features());
            let given = layer.weight()?;
            let at = |k: usize, n: usize| match layer.weight_layout() {
                WeightLayout::InOut => k * outputs + n,
                WeightLayout::OutIn => n * inputs + k,
            };
            let weight = (0..inputs * outputs)
                .map(|i| f64::from(given[at(i / outputs, i % outputs)]))
                .collect();
            let bias = layer.bias()?.unwrap_or_else(|| vec![0.0; outputs]);
            let bias = bias.into_iter().map(f64::from).collect();
            Ok(Layer { inputs, outputs, activation: layer.activation(), weight, bias })
        });
        Ok(Self { layers: layers.collect::<kasmina::Result<_>>()? })
    }

    pub(crate) fn in_features(&self) -> usize {
        self.layers[0].inputs
    }

    pub(crate) fn out_features(&self) -> usize {
        self.layers[self.layers.len() - 1].outputs
    }

    /// Compares a result with the reference, element by element.
    pub(crate) fn compare<T: Poison>(&self, x: &[T], y: &[T], tier: Tier) -> Result<(), String> {
        let (inputs, outputs) = (self.in_features(), self.out_features());
        if y.len() * inputs != x.len() * outputs {
            return Err(format!("{} results for {} values", y.len(), x.len()));
        }
        for (row, (x, y)) in x.chunks(inputs).zip(y.chunks(outputs)).enumerate() {
            let mut values: Vec<f64> = x.iter().map(|x| f64::from(x.to_f32())).collect();
            let mut errors = vec![0.0; inputs];
            for (depth, layer) in self.layers.iter().enumerate() {
                (values, errors) = layer.forward::<T>(&values, &errors, tier);
                if depth + 1 < self.layers.len() {
                    for (value, error) in values.iter_mut().zip(&mut errors) {
                        *error += 2.0 * T::DTYPE.unit_roundoff() * value.abs();
                        *value = f64::from(T::from_f32(*value as f32).to_f32());
                    }
                }
            }
            for (column, (got, (value, error))) in
                y.iter().zip(values.into_iter().zip(errors)).enumerate()
            {
                let wide = f64::from(got.to_f32());
                let right = if value.is_finite() {
                    let smallest = if T::DTYPE == DType::F16 { 3e-8 } else { 1e-38 };
                    let rounding = T::DTYPE.unit_roundoff() * value.abs();
                    (wide - value).abs()
                        <= error * (1.0 + T::DTYPE.unit_roundoff()) + rounding + smallest
                } else {
                    wide == value || (wide.is_nan() && value.is_nan())
                };
                if !right {
                    return Err(format!(
                        "({row}, {column}): got {got:?}, expected {value:e} to within {error:e}"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Layer {
    /// Exact outputs, and how far results may be from them.
    fn forward<T: Poison>(&self, x: &[f64], errors: &[f64], tier: Tier) -> (Vec<f64>, Vec<f64>) {
        let u = DType::F32.unit_roundoff();
        let mut outputs = Vec::with_capacity(self.outputs);
        let mut output_errors = Vec::with_capacity(self.outputs);
        for n in 0..self.outputs {
            let bias = self.bias[n];
            let (mut sum, mut magnitude, mut inherited) = (bias, bias.abs(), 0.0);
            for k in 0..self.inputs {
                let weight = self.weight[k * self.outputs + n];
                sum += x[k] * weight;
                magnitude += (x[k] * weight).abs();
                inherited += errors[k] * weight.abs();
            }
            let y = apply(self.activation, sum);
            let smooth = !matches!(self.activation, Activation::None | Activation::Relu);
            let approximation =
                if smooth && tier == Tier::Hopper { 1.3e-4 * y.abs() + 4e-7 } else { 0.0 };
            let sum_error = 2.0 * ((self.inputs as f64).sqrt() + 4.0) * u * magnitude + inherited;
            outputs.push(y);
            output_errors.push(1.13 * sum_error + 8.0 * u * sum.abs() + approximation);
        }
        (outputs, output_errors)
    }
}

/// The activation in f64, from its definition.
fn apply(activation: Activation, x: f64) -> f64 {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};
    match activation {
        Activation::None => x,
        // Not `max`, which would hide NaN.
        Activation::Relu if x < 0.0 => 0.0,
        Activation::Relu => x,
        Activation::Gelu => 0.5 * x * libm::erfc(-x * FRAC_1_SQRT_2),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
        other => panic!("{other:?} has no reference: add its definition here"),
    }
}

/// A row whose first elements tell it from every other: the item's number in base 128, which bf16
/// holds exactly.
pub(crate) fn numbered(item: u64, columns: usize) -> Vec<bf16> {
    let digit = |place: usize| (item >> (7 * place) & 127) as f32;
    (0..columns)
        .map(|column| bf16::from_f32(if column < 6 { digit(column) } else { 1.0 }))
        .collect()
}
