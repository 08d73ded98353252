//! The gradients of a linear layer, dX, and dW with db, beside cuBLASLt's.

use std::cell::RefCell;
use std::path::Path;

use anyhow::{Context, ensure};
use kasmina::gemm::{Backward, Gradients, Saved};
use kasmina::{Activation, Device, Element, F32Products, KernelConfig, Tensor, Tier, WeightLayout};
use serde::Serialize;

use super::operands::Problem;
use super::record::Timing;
use crate::measure::cuda::Clock;
use crate::measure::options::{layout_name, products_of};
use crate::measure::random::{Normals, SplitMix};
use crate::measure::record::{Peer, Provenance, append};
use crate::measure::regime::{self, Contender, NODES, Regime, Repetitions};
use crate::peer::cublaslt::{self, CublasLt, Description, Product};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// dX
    Input,
    /// dW and db
    Weight,
}

impl Operation {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Input => "dx",
            Self::Weight => "dw",
        }
    }
}

/// How it is timed.
pub(crate) struct Settings<'a> {
    pub(crate) tier: Option<Tier>,
    /// `None` is all that suit the problem.
    pub(crate) regimes: Option<&'a [Regime]>,
    pub(crate) repetitions: Repetitions,
    pub(crate) json: Option<&'a Path>,
}

/// One line of `benches/results`.
#[derive(Debug, Serialize)]
struct Record {
    #[serde(flatten)]
    provenance: Provenance,
    operation: &'static str,
    m: usize,
    n: usize,
    k: usize,
    dtype: &'static str,
    layout: &'static str,
    tier: &'static str,
    /// For f32 on tensor cores.
    products: Option<&'static str>,
    regime: &'static str,
    #[serde(flatten)]
    timing: Timing,
    peer: Option<Peer<Timing>>,
    ratio: Option<f64>,
}

/// Operands and gradients.
struct Set<T: Element> {
    x: Tensor<T>,
    w: Tensor<T>,
    dz: Tensor<T>,
    dx: Tensor<T>,
    dw: Tensor<T>,
    db: Tensor<T>,
}

/// As many sets as it takes for each call to find its own outside the L2 cache.
struct Operands<T: Element> {
    problem: Problem,
    sets: RefCell<Vec<Set<T>>>,
    /// Where cuBLASLt leaves db.
    peer_db: Tensor<T>,
}

impl<T: Element> Operands<T> {
    fn new(
        device: &Device,
        problem: Problem,
        l2_bytes: u64,
        normals: &mut Normals,
    ) -> anyhow::Result<Self> {
        let Problem { m, n, k, layout, .. } = problem;
        let bytes = (m * k + k * n + m * n) * size_of::<T>();
        let count = (2 * l2_bytes as usize).div_ceil(bytes).clamp(1, NODES);
        let (rows, columns) = layout.rows_columns(k, n);
        let mut normal = |shape: [usize; 2], scale| {
            Tensor::from_slice(device, &normals.take::<T>(shape[0] * shape[1], scale), shape)
        };
        let mut sets = Vec::with_capacity(count);
        for _ in 0..count {
            sets.push(Set {
                x: normal([m, k], 1.0)?,
                // Keeps the gradients of the order of 1.
                w: normal([rows, columns], 1.0 / (n as f32).sqrt())?,
                dz: normal([m, n], 1.0 / (m as f32).sqrt())?,
                dx: Tensor::zeros(device, [m, k])?,
                dw: Tensor::zeros(device, [rows, columns])?,
                db: Tensor::zeros(device, [n])?,
            });
        }
        let peer_db = Tensor::zeros(device, [n])?;
        Ok(Self { problem, sets: RefCell::new(sets), peer_db })
    }

    /// Enqueues kasmina's call number `call`; the tier that serves it.
    fn run(
        &self,
        operation: Operation,
        call: usize,
        config: &KernelConfig,
    ) -> anyhow::Result<Tier> {
        let mut sets = self.sets.borrow_mut();
        let index = call % sets.len();
        let Set { x, w, dz, dx, dw, db } = &mut sets[index];
        let backward = Backward {
            x,
            w,
            dy: dz,
            saved: Saved::Nothing,
            layout: self.problem.layout,
            activation: Activation::None,
        };
        let gradients = match operation {
            Operation::Input => Gradients { dx: Some(dx), ..Gradients::default() },
            Operation::Weight => Gradients { dw: Some(dw), db: Some(db), ..Gradients::default() },
        };
        let tiers = backward.run(gradients, config)?;
        tiers.dx.or(tiers.dw).context("the pass says which tier served it")
    }

    /// The operands of cuBLASLt's call number `call`.
    fn addresses(&self, operation: Operation, call: usize) -> cublaslt::Operands {
        let sets = self.sets.borrow();
        let Set { x, w, dz, dx, dw, .. } = &sets[call % sets.len()];
        let [x, w, dz, dx, dw] = [x, w, dz, dx, dw].map(Tensor::as_device_ptr);
        match (operation, self.problem.layout) {
            (Operation::Input, _) => cublaslt::Operands { x: dz, w, y: dx },
            (Operation::Weight, WeightLayout::InOut) => cublaslt::Operands { x, w: dz, y: dw },
            (Operation::Weight, WeightLayout::OutIn) => cublaslt::Operands { x: dz, w: x, y: dw },
        }
    }

    /// Fills the first results with NaN.
    fn poison(&self) -> anyhow::Result<()> {
        let Set { dx, dw, db, .. } = &mut self.sets.borrow_mut()[0];
        for result in [dx, dw, db] {
            let nan = vec![T::from_f32(f32::NAN); result.len()];
            result.copy_from_slice(&nan)?;
        }
        Ok(())
    }

    /// The largest error of the first results, `abs(g − r) / max(1, abs(r))`, over random elements
    /// and all of db, against f64.
    fn max_error(&self, operation: Operation) -> anyhow::Result<f64> {
        const ELEMENTS: usize = 128;
        let Problem { m, n, k, layout, dtype, .. } = self.problem;
        let Set { x, w, dz, dx, dw, db } = &self.sets.borrow()[0];
        let (x, w, dz) = (x.to_vec()?, w.to_vec()?, dz.to_vec()?);
        let of_weight = |l: usize, j: usize| match layout {
            WeightLayout::InOut => l * n + j,
            WeightLayout::OutIn => j * k + l,
        };
        let product = |a: T, b: T| f64::from(a.to_f32()) * f64::from(b.to_f32());
        let mut random = SplitMix(1);
        let mut largest = 0.0_f64;
        let mut compare = |got: T, reference: f64, terms: usize| {
            let error = (f64::from(got.to_f32()) - reference).abs() / reference.abs().max(1.0);
            // Twice the rounding of the result, and what f32 accumulation may add.
            let tolerance = 2.0 * dtype.unit_roundoff() + 1e-5 * (terms as f64).sqrt();
            ensure!(error <= tolerance, "error {error:.2e} exceeds the tolerance {tolerance:.2e}");
            largest = largest.max(error);
            Ok(())
        };
        let mut index = |bound: usize| random.next() as usize % bound;
        if operation == Operation::Input {
            let got = dx.to_vec()?;
            for _ in 0..ELEMENTS {
                let (i, l) = (index(m), index(k));
                let sum = (0..n).map(|j| product(dz[i * n + j], w[of_weight(l, j)])).sum();
                compare(got[i * k + l], sum, n)?;
            }
            return Ok(largest);
        }
        let (got, sums) = (dw.to_vec()?, db.to_vec()?);
        for _ in 0..ELEMENTS {
            let (l, j) = (index(k), index(n));
            let sum = (0..m).map(|i| product(x[i * k + l], dz[i * n + j])).sum();
            compare(got[of_weight(l, j)], sum, m)?;
        }
        for (j, &got) in sums.iter().enumerate() {
            let sum = (0..m).map(|i| f64::from(dz[i * n + j].to_f32())).sum();
            compare(got, sum, m)?;
        }
        Ok(largest)
    }
}

/// What measurements share.
pub(crate) struct Bench<'a> {
    pub(crate) device: &'a Device,
    pub(crate) clock: &'a Clock,
    pub(crate) provenance: &'a Provenance,
    pub(crate) cublaslt: Option<&'a CublasLt>,
    /// `Product::WORKSPACE_BYTES` long.
    pub(crate) workspace: &'a Tensor<f32>,
}

impl Bench<'_> {
    /// Times a gradient of the layer and prints what came out.
    pub(crate) fn run<T: Element>(
        &self,
        operation: Operation,
        problem: Problem,
        settings: &Settings<'_>,
        normals: &mut Normals,
    ) -> anyhow::Result<()> {
        let l2_bytes = self.device.capability().map_or(0, |capability| capability.l2_bytes);
        let operands = Operands::<T>::new(self.device, problem, l2_bytes, normals)?;
        let config = settings
            .tier
            .map_or_else(KernelConfig::default, |tier| KernelConfig::default().tier(tier));
        operands.poison()?;
        let tier = operands.run(operation, 0, &config)?;
        let error = operands.max_error(operation).context("kasmina's result is wrong")?;
        let ours = |call: usize| operands.run(operation, call, &config).map(drop);
        let product = self.product(operation, &problem, &operands)?;
        let theirs = |call: usize| match &product {
            Some((_, product)) => enqueue(product, operation, &operands, call),
            None => Ok(()),
        };
        let mut contenders: Vec<Contender<'_>> = vec![&ours];
        if product.is_some() {
            contenders.push(&theirs);
        }
        let regimes = match settings.regimes {
            Some(regimes) => regimes,
            None => regime::suited(self.clock, &ours)?,
        };
        for &regime in regimes {
            let times = regime::measure(self.clock, regime, settings.repetitions, &contenders)?;
            let timing = Timing::new(&problem, regime, &times[0], error);
            let peer = product.as_ref().map(|(name, _)| Peer {
                name: name.clone(),
                timing: Timing::new(&problem, regime, &times[1], 0.0),
            });
            let ratio = product
                .as_ref()
                .map(|_| regime.representative(&times[1]) / regime.representative(&times[0]));
            let record = Record {
                provenance: self.provenance.clone(),
                operation: operation.name(),
                m: problem.m,
                n: problem.n,
                k: problem.k,
                dtype: problem.dtype.name(),
                layout: layout_name(problem.layout),
                tier: tier.name(),
                products: products_of(problem.dtype, tier, F32Products::Six),
                regime: regime.name(),
                timing,
                peer,
                ratio,
            };
            println!(
                "{} {}x{}x{} {} {} {} {}: {:.2} us, peer {:.2} us, ratio {:.3}",
                record.operation,
                problem.m,
                problem.n,
                problem.k,
                record.dtype,
                record.layout,
                record.tier,
                record.regime,
                regime.representative(&times[0]),
                times.get(1).map_or(f64::NAN, |times| regime.representative(times)),
                ratio.unwrap_or(f64::NAN),
            );
            if let Some(file) = settings.json {
                append(&record, file)?;
            }
        }
        Ok(())
    }

    /// cuBLASLt's name and its fastest way to compute the gradient.
    fn product<T: Element>(
        &self,
        operation: Operation,
        problem: &Problem,
        operands: &Operands<T>,
    ) -> anyhow::Result<Option<(String, Product<'_>)>> {
        let Some(library) = self.cublaslt else { return Ok(None) };
        let stream = self.device.stream().as_raw();
        let (mut name, db) = (library.name.clone(), operands.peer_db.as_device_ptr());
        let workspace = self.workspace.as_device_ptr();
        // SAFETY: `self` keeps workspace and stream alive, and `operands`, which the caller keeps
        // longer than the result, db. Only calls on this one stream use them.
        let make = |description: &Description| unsafe {
            Product::new(library, description, db, workspace, stream as *mut _)
        };
        let mut product = match operation {
            Operation::Input => make(&Description::input_gradient(problem))?,
            Operation::Weight => match make(&Description::weight_gradient(problem)) {
                Ok(product) => product,
                // Where it has no such epilogue it is timed without db.
                Err(_) => {
                    name.push_str(", without db");
                    make(&Description::weight_gradient_alone(problem))?
                }
            },
        };
        product.tune(|product| {
            regime::estimate(self.clock, &|call| enqueue(product, operation, operands, call))
        })?;
        Ok(Some((name, product)))
    }
}

/// Enqueues cuBLASLt's call number `call`.
fn enqueue<T: Element>(
    product: &Product<'_>,
    operation: Operation,
    operands: &Operands<T>,
    call: usize,
) -> anyhow::Result<()> {
    let addresses = operands.addresses(operation, call);
    // SAFETY: the operands have the shapes and the type of the problem that `product` was made
    // for, lie on the device of its stream, and every measurement synchronises that stream before
    // they are dropped.
    unsafe { product.enqueue(addresses) }
}
