//! Operands of `Y = act(X·W + b)`, and whether the result is right.

use std::cell::RefCell;

use anyhow::ensure;
use kasmina::{Activation, DType, Device, Element, KernelConfig, Tensor, Tier, WeightLayout, gemm};

use crate::measure::random::{Normals, SplitMix};
use crate::measure::regime::NODES;

/// What is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem {
    /// Rows of X and Y.
    pub(crate) m: usize,
    /// Columns of Y.
    pub(crate) n: usize,
    /// Columns of X.
    pub(crate) k: usize,
    /// Type of all elements.
    pub(crate) dtype: DType,
    /// How W lies in memory.
    pub(crate) layout: WeightLayout,
    /// Applied last.
    pub(crate) activation: Activation,
}

impl Problem {
    /// Floating-point operations, a multiplication and an addition counting as two.
    pub(crate) fn operations(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }
}

/// As many sets of operands as it takes for each call to find its own outside the L2 cache; all
/// share one bias.
pub(crate) struct Operands<T: Element> {
    problem: Problem,
    x: Vec<Tensor<T>>,
    w: Vec<Tensor<T>>,
    y: RefCell<Vec<Tensor<T>>>,
    bias: Tensor<T>,
    first: HostOperands<T>,
}

/// The first set, for the reference.
struct HostOperands<T> {
    x: Vec<T>,
    w: Vec<T>,
    bias: Vec<T>,
}

impl<T: Element> Operands<T> {
    /// Operands for `problem`, whose `dtype` is that of `T`.
    pub(crate) fn new(
        device: &Device,
        problem: Problem,
        l2_bytes: u64,
        normals: &mut Normals,
    ) -> anyhow::Result<Self> {
        let Problem { m, n, k, layout, .. } = problem;
        let bytes = (m * k + k * n + m * n) * size_of::<T>();
        let sets = (2 * l2_bytes as usize).div_ceil(bytes).clamp(1, NODES);
        let (w_rows, w_columns) = layout.rows_columns(k, n);
        // Keeps Y of the order of 1 for every k.
        let w_scale = 1.0 / (k as f32).sqrt();

        let first = HostOperands {
            x: normals.take(m * k, 1.0),
            w: normals.take(k * n, w_scale),
            bias: normals.take(n, 1.0),
        };
        let mut x = vec![Tensor::from_slice(device, &first.x, [m, k])?];
        let mut w = vec![Tensor::from_slice(device, &first.w, [w_rows, w_columns])?];
        let mut y = vec![Tensor::zeros(device, [m, n])?];
        for _ in 1..sets {
            x.push(Tensor::from_slice(device, &normals.take(m * k, 1.0), [m, k])?);
            let values = normals.take(k * n, w_scale);
            w.push(Tensor::from_slice(device, &values, [w_rows, w_columns])?);
            y.push(Tensor::zeros(device, [m, n])?);
        }
        let bias = Tensor::from_slice(device, &first.bias, [n])?;
        Ok(Self { problem, x, w, y: RefCell::new(y), bias, first })
    }

    /// Enqueues kasmina's forward pass for call `call`; the tier that serves it.
    pub(crate) fn forward(&self, call: usize, config: &KernelConfig) -> anyhow::Result<Tier> {
        let set = call % self.x.len();
        let forward = gemm::Forward {
            x: &self.x[set],
            w: &self.w[set],
            bias: Some(&self.bias),
            layout: self.problem.layout,
            activation: self.problem.activation,
        };
        Ok(forward.run(&mut self.y.borrow_mut()[set], config)?)
    }

    /// Device addresses of X, W and Y for call `call`.
    pub(crate) fn addresses(&self, call: usize) -> [u64; 3] {
        let set = call % self.x.len();
        let y = self.y.borrow()[set].as_device_ptr();
        [self.x[set].as_device_ptr(), self.w[set].as_device_ptr(), y]
    }

    /// Device address of the bias.
    pub(crate) fn bias_address(&self) -> u64 {
        self.bias.as_device_ptr()
    }

    /// Overwrites the first Y with NaN, which no result may leave.
    pub(crate) fn poison(&self) -> anyhow::Result<()> {
        let nan = vec![T::from_f32(f32::NAN); self.problem.m * self.problem.n];
        Ok(self.y.borrow_mut()[0].copy_from_slice(&nan)?)
    }

    /// The largest error of the first Y, `abs(y − r) / max(1, abs(r))`, over random elements,
    /// against f64.
    pub(crate) fn max_error(&self) -> anyhow::Result<f64> {
        let Problem { k, dtype, .. } = self.problem;
        let largest = self.largest_error()?;
        // Twice the rounding of the result, and what f32 accumulation of k terms may add.
        let tolerance = 2.0 * dtype.unit_roundoff() + 1e-5 * (k as f64).sqrt();
        ensure!(largest <= tolerance, "error {largest:.2e} exceeds the tolerance {tolerance:.2e}");
        Ok(largest)
    }

    /// As [`Self::max_error`], however large.
    pub(crate) fn largest_error(&self) -> anyhow::Result<f64> {
        const ELEMENTS: usize = 256;
        let Problem { m, n, k, layout, activation, .. } = self.problem;
        let y = self.y.borrow()[0].to_vec()?;
        ensure!(y.iter().all(|value| !value.to_f32().is_nan()), "an element was not written");
        let (x, w) = (&self.first.x, &self.first.w);
        let mut random = SplitMix(1);
        let mut largest = 0.0_f64;
        for _ in 0..ELEMENTS {
            let row = random.next() as usize % m;
            let column = random.next() as usize % n;
            let product = |i: usize| {
                let at = match layout {
                    WeightLayout::InOut => i * n + column,
                    WeightLayout::OutIn => column * k + i,
                };
                f64::from(x[row * k + i].to_f32()) * f64::from(w[at].to_f32())
            };
            let bias = f64::from(self.first.bias[column].to_f32());
            let sum = (0..k).map(product).sum::<f64>() + bias;
            let reference = f64::from(activation.apply(sum as f32));
            let error = (f64::from(y[row * n + column].to_f32()) - reference).abs();
            largest = largest.max(error / reference.abs().max(1.0));
        }
        Ok(largest)
    }
}
