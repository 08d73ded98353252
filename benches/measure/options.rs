//! What the options of benches have in common.
#![allow(dead_code, reason = "no bench needs all of it")]

use std::path::PathBuf;

use super::regime::Repetitions;
use anyhow::Context;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kasmina::{DType, Device, F32Products, Tier, WeightLayout};

/// Samples in burst and graph.
const SAMPLES: usize = 60;
/// Length of the steady regime per contender, in microseconds.
const STEADY: f64 = 3.0e6;
/// What the quick way divides repetitions by.
const QUICK: usize = 10;

/// How often, and where to.
#[derive(clap::Args)]
pub(crate) struct Sampling {
    /// Samples in burst and graph, or answers
    #[arg(long, value_name = "N", value_parser = positive)]
    samples: Option<usize>,
    /// Repeats everything a tenth as often: to see that it runs, not for results to keep
    #[arg(long)]
    quick: bool,
    /// Appends the results to this file as JSON lines
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// What cargo passes to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

impl Sampling {
    /// As many samples as were asked for.
    pub(crate) fn samples_or(&self, default: usize) -> usize {
        self.samples.unwrap_or(self.scaled(default))
    }

    /// This many, or a tenth if it has to be quick.
    pub(crate) fn scaled(&self, count: usize) -> usize {
        if self.quick { count.div_ceil(QUICK) } else { count }
    }

    /// How often each regime repeats its calls.
    pub(crate) fn repetitions(&self) -> Repetitions {
        let steady = if self.quick { STEADY / QUICK as f64 } else { STEADY };
        Repetitions { samples: self.samples_or(SAMPLES), steady }
    }
}

/// The first GPU, on a stream of its own, which can be captured into a graph. Says so where there
/// is none, and nothing to measure.
pub(crate) fn device() -> Option<Device> {
    match Device::cuda(0).and_then(|device| device.on_new_stream()) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("nothing to measure: {error}");
            None
        }
    }
}

/// Parses the names of these values.
pub(crate) fn one_of<T: Copy + Send + Sync + 'static>(
    values: impl IntoIterator<Item = T>,
    name: impl Fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    let named: Vec<(&str, T)> = values.into_iter().map(|value| (name(value), value)).collect();
    let names: Vec<&str> = named.iter().map(|(name, _)| *name).collect();
    PossibleValuesParser::new(names).try_map(move |text| {
        let found = named.iter().find(|(name, _)| *name == text);
        found.map(|&(_, value)| value).with_context(|| format!("{text} is not known"))
    })
}

/// The name of a layout on the command line and in the results.
pub(crate) const fn layout_name(layout: WeightLayout) -> &'static str {
    match layout {
        WeightLayout::InOut => "in-out",
        WeightLayout::OutIn => "out-in",
    }
}

pub(crate) const PRODUCTS: [F32Products; 3] =
    [F32Products::Six, F32Products::Three, F32Products::Tf32];

pub(crate) const fn products_name(products: F32Products) -> &'static str {
    match products {
        F32Products::Six => "six",
        F32Products::Three => "three",
        F32Products::Tf32 => "tf32",
    }
}

/// The name of the products that make up one, for the results: `None` but for f32 on tensor cores.
pub(crate) fn products_of(dtype: DType, tier: Tier, products: F32Products) -> Option<&'static str> {
    ((dtype, tier) == (DType::F32, Tier::Hopper)).then(|| products_name(products))
}

/// Parses yes or no.
pub(crate) fn yes_or_no() -> impl TypedValueParser<Value = bool> {
    one_of([true, false], |yes| if yes { "yes" } else { "no" })
}

/// Parses `4096x4096x4096`, or as many extents as there are.
pub(crate) fn extents<const AXES: usize>(text: &str) -> anyhow::Result<[usize; AXES]> {
    let extents: Option<Vec<usize>> =
        text.split('x').map(|extent| extent.parse().ok().filter(|&extent| extent > 0)).collect();
    let extents = extents.and_then(|extents| extents.try_into().ok());
    extents.with_context(|| format!("{text} is not {AXES} extents like 64x64"))
}

fn positive(text: &str) -> anyhow::Result<usize> {
    text.parse().ok().filter(|&number| number > 0).context("not a positive number")
}
