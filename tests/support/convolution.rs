//! A convolution and its gradients in f64, from the definition, and how far from them a result may
//! be.
//!
//! # Tolerance
//! As that of the linear layer (`linear.rs`): a sum of n products of magnitude `A = Σ|a·b|` errs by
//! at most `2·(√n + 4)·u·A` with u the unit roundoff of f32, and is rounded once to the element
//! type, of unit roundoff v and smallest number s:
//!
//! ```text
//! tolerance = (1.13·sum + 8·u·|S| + approximation)·(1 + v) + v·|act(S)| + s/2
//! ```
//!
//! Padding is no product: it counts in neither n nor A.

use kasmina::conv1d::Window;
use kasmina::{Activation, DType, FilterLayout, Padding, SequenceLayout, Tier};

use super::activation::apply;
use super::poison::Poison;
use super::random::Random;

/// One convolution to compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    /// Input and output channels.
    pub(crate) channels: [usize; 2],
    pub(crate) length: usize,
    pub(crate) taps: usize,
    pub(crate) window: Window,
}

impl Shape {
    /// Zeros on the left, and positions of the output; `None` where the filter does not fit.
    pub(crate) fn output(&self) -> Option<(usize, usize)> {
        let Window { stride, dilation, padding, .. } = self.window;
        let span = (self.taps - 1) * dilation + 1;
        let (left, right) = match padding {
            Padding::Valid => (0, 0),
            Padding::Explicit { left, right } => (left as usize, right as usize),
            Padding::Same => {
                let needed = (self.length.div_ceil(stride) - 1) * stride + span;
                let total = needed.saturating_sub(self.length);
                (total / 2, total - total / 2)
            }
            other => panic!("no reference for {other:?}"),
        };
        let places = (self.length + left + right).checked_sub(span)?;
        Some((left, places / stride + 1))
    }

    pub(crate) fn group_in(&self) -> usize {
        self.channels[0] / self.window.groups
    }
}

/// A sum of products with what its tolerance follows from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) value: f64,
    magnitude: f64,
    terms: usize,
}

impl Sum {
    fn add(&mut self, product: f64) {
        self.value += product;
        self.magnitude += product.abs();
        self.terms += 1;
    }

    /// The sum with something added that is exact.
    pub(crate) fn plus(mut self, value: f64) -> Self {
        self.value += value;
        self.magnitude += value.abs();
        self
    }

    /// Whether `got` is the sum of products that err by up to `relative` each.
    pub(crate) fn within<T: Poison>(&self, got: T, relative: f64) -> bool {
        let (u, v) = (DType::F32.unit_roundoff(), T::DTYPE.unit_roundoff());
        let sum = 2.0 * ((self.terms as f64).sqrt() + 4.0) * u * self.magnitude;
        let smallest = if T::DTYPE == DType::F16 { 2.0f64.powi(-24) } else { 1e-38 };
        let tolerance = sum + relative * self.magnitude + v * self.value.abs() + smallest;
        (f64::from(got.to_f32()) - self.value).abs() <= tolerance
    }

    /// The error of `got`, in units of its tolerance; infinite where one is NaN and the other not.
    pub(crate) fn error<T: Poison>(&self, got: T, activation: Activation, tier: Tier) -> f64 {
        let (expected, got) = (apply(activation, self.value), f64::from(got.to_f32()));
        if !expected.is_finite() || !self.value.is_finite() {
            let same = got == expected || (got.is_nan() && expected.is_nan());
            return if same { 0.0 } else { f64::INFINITY };
        }
        let (u, v) = (DType::F32.unit_roundoff(), T::DTYPE.unit_roundoff());
        let sum = 2.0 * ((self.terms as f64).sqrt() + 4.0) * u * self.magnitude;
        let smooth = !matches!(activation, Activation::None | Activation::Relu);
        let approximation =
            if smooth && tier == Tier::Hopper { 1.3e-4 * expected.abs() + 4e-7 } else { 0.0 };
        let smallest = match T::DTYPE {
            DType::F16 => 2.0f64.powi(-24),
            _ => f64::from(f32::MIN_POSITIVE),
        };
        let tolerance = (1.13 * sum + 8.0 * u * self.value.abs() + approximation) * (1.0 + v)
            + v * expected.abs()
            + smallest / 2.0;
        let error = (got - expected).abs() / tolerance;
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// Operands, in canonical order (`[batch, channels, length]` and `[out, in, tap]`), and the exact
/// results in the same order.
pub(crate) struct Convolution<T> {
    pub(crate) out_length: usize,
    pub(crate) x: Vec<T>,
    pub(crate) w: Vec<T>,
    pub(crate) bias: Vec<T>,
    pub(crate) dz: Vec<T>,
    /// Without the bias.
    pub(crate) z: Vec<Sum>,
    pub(crate) dx: Vec<Sum>,
    pub(crate) dw: Vec<Sum>,
    pub(crate) db: Vec<Sum>,
}

impl<T: Poison> Convolution<T> {
    /// Normally distributed operands; `None` where the filter does not fit.
    pub(crate) fn random(shape: Shape) -> Option<Self> {
        let mut random = Random::of(&format!("{shape:?} {}", T::DTYPE));
        let mut normal =
            |count| random.normal(count).into_iter().map(T::from_f32).collect::<Vec<T>>();
        let (_, out_length) = shape.output()?;
        let Shape { batch, channels: [input, out], length, taps, .. } = shape;
        let x = normal(batch * input * length);
        let w = normal(out * shape.group_in() * taps);
        let (bias, dz) = (normal(out), normal(batch * out * out_length));
        Some(Self::of(shape, [x, w, bias, dz]))
    }

    /// These operands, of a convolution whose results nobody compares.
    pub(crate) fn without_results(out_length: usize, [x, w, bias, dz]: [Vec<T>; 4]) -> Self {
        let (z, dx, dw, db) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { out_length, x, w, bias, dz, z, dx, dw, db }
    }

    /// These operands, of a filter that fits.
    pub(crate) fn of(shape: Shape, [x, w, bias, dz]: [Vec<T>; 4]) -> Self {
        let (left, out_length) = shape.output().expect("a filter that fits");
        let Shape { batch, channels: [input, out], length, taps, window } = shape;
        let wide = |values: &[T]| -> Vec<f64> {
            values.iter().map(|value| f64::from(value.to_f32())).collect()
        };
        let (wide_x, wide_w, wide_dz) = (wide(&x), wide(&w), wide(&dz));
        let (group_in, group_out) = (input / window.groups, out / window.groups);
        let mut z = vec![Sum::default(); dz.len()];
        let mut dx = vec![Sum::default(); x.len()];
        let mut dw = vec![Sum::default(); w.len()];
        let mut db = vec![Sum::default(); out];
        for b in 0..batch {
            for (o, db) in db.iter_mut().enumerate() {
                let first = o / group_out * group_in;
                let row = (b * out + o) * out_length;
                for gradient in &wide_dz[row..][..out_length] {
                    db.add(*gradient);
                }
                for i in 0..group_in {
                    let from = (b * input + first + i) * length;
                    for k in 0..taps {
                        let tap = (o * group_in + i) * taps + k;
                        for l in 0..out_length {
                            let Some(at) = (l * window.stride + k * window.dilation)
                                .checked_sub(left)
                                .filter(|&at| at < length)
                            else {
                                continue;
                            };
                            z[row + l].add(wide_x[from + at] * wide_w[tap]);
                            dx[from + at].add(wide_dz[row + l] * wide_w[tap]);
                            dw[tap].add(wide_dz[row + l] * wide_x[from + at]);
                        }
                    }
                }
            }
        }
        Self { out_length, x, w, bias, dz, z, dx, dw, db }
    }
}

/// Values of `[batch, channels, length]` in a layout.
pub(crate) fn laid_out<T: Copy>(
    values: &[T],
    [batch, channels, length]: [usize; 3],
    layout: SequenceLayout,
) -> Vec<T> {
    match layout {
        SequenceLayout::Ncl => values.to_vec(),
        SequenceLayout::Nlc => (0..batch * channels * length)
            .map(|i| {
                let (b, l, c) = (i / (channels * length), i / channels % length, i % channels);
                values[(b * channels + c) * length + l]
            })
            .collect(),
    }
}

/// The inverse of [`laid_out`].
pub(crate) fn canonical<T: Copy>(
    values: &[T],
    [batch, channels, length]: [usize; 3],
    layout: SequenceLayout,
) -> Vec<T> {
    match layout {
        SequenceLayout::Ncl => values.to_vec(),
        // The same exchange of axes, seen from the other side.
        SequenceLayout::Nlc => laid_out(values, [batch, length, channels], layout),
    }
}

/// Values of `[out, in, tap]` in a layout.
pub(crate) fn filter_laid_out<T: Copy>(
    values: &[T],
    [out, input, taps]: [usize; 3],
    layout: FilterLayout,
) -> Vec<T> {
    match layout {
        FilterLayout::OutInTap => values.to_vec(),
        FilterLayout::TapOutIn => (0..out * input * taps)
            .map(|i| values[i % (out * input) * taps + i / (out * input)])
            .collect(),
    }
}

/// The inverse of [`filter_laid_out`].
pub(crate) fn canonical_filter<T: Copy>(
    values: &[T],
    [out, input, taps]: [usize; 3],
    layout: FilterLayout,
) -> Vec<T> {
    match layout {
        FilterLayout::OutInTap => values.to_vec(),
        FilterLayout::TapOutIn => {
            (0..out * input * taps).map(|i| values[i % taps * (out * input) + i / taps]).collect()
        }
    }
}
