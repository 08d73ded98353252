//! What GPUs reach at best, as measured, not as data sheets promise.

use super::record::Record;

/// What multiplies the operands: each way has a ceiling of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Operands of 16 bits, on tensor cores.
    Half,
    /// f32 in TF32, on tensor cores.
    Tf32,
    /// f32 as three products of bf16 parts.
    ThreeProducts,
    /// f32 as six products of bf16 parts.
    SixProducts,
    /// f32 without tensor cores.
    Single,
}

impl Arithmetic {
    /// From the fastest to the slowest.
    pub const ALL: [Self; 5] =
        [Self::Half, Self::Tf32, Self::ThreeProducts, Self::SixProducts, Self::Single];

    /// That of a record, by its `dtype` and `products`.
    #[must_use]
    pub fn of(record: &Record) -> Self {
        let field = |name: &str| record.identity.get(name).map(String::as_str);
        match (field("dtype"), field("products")) {
            (Some("f32"), Some("tf32")) => Self::Tf32,
            (Some("f32"), Some("three")) => Self::ThreeProducts,
            (Some("f32"), Some("six")) => Self::SixProducts,
            (Some("f32"), _) => Self::Single,
            _ => Self::Half,
        }
    }

    /// How a plot calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Half => "16 bit",
            Self::Tf32 => "TF32",
            Self::ThreeProducts => "f32 by three products",
            Self::SixProducts => "f32 by six products",
            Self::Single => "f32",
        }
    }
}

/// A rate, and where it was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceiling {
    /// Operations or bytes per second in 10¹².
    pub rate: f64,
    /// Where it was measured, or what it follows from.
    pub source: &'static str,
}

/// The ceilings of a GPU model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Name as the driver tells it.
    pub gpu: &'static str,
    /// Of memory.
    pub memory: Ceiling,
    half: Ceiling,
    tf32: Ceiling,
    single: Ceiling,
}

/// Every GPU model that was measured.
pub const CEILINGS: [Ceilings; 1] = [Ceilings {
    gpu: "NVIDIA H200",
    memory: Ceiling { rate: 4.61, source: "CUB, f32 sum of 2^30 elements" },
    half: Ceiling { rate: 832.5, source: "bf16 product 4096×4096×14336 in burst" },
    tf32: Ceiling { rate: 423.6, source: "TF32 product 8192³ in burst" },
    single: Ceiling { rate: 51.4, source: "cuBLASLt without TF32, 4096³ in steady" },
}];

impl Ceilings {
    /// Those of this GPU model, if it was measured.
    #[must_use]
    pub fn of(gpu: &str) -> Option<&'static Self> {
        CEILINGS.iter().find(|ceilings| ceilings.gpu == gpu)
    }

    /// That of arithmetic. An f32 product made of several bf16 products takes as many times as long
    /// as one of them, however it is computed.
    #[must_use]
    pub fn arithmetic(&self, arithmetic: Arithmetic) -> Ceiling {
        let part = |products: f64, source| Ceiling { rate: self.half.rate / products, source };
        match arithmetic {
            Arithmetic::Half => self.half,
            Arithmetic::Tf32 => self.tf32,
            Arithmetic::ThreeProducts => part(3.0, "a third of 16 bit"),
            Arithmetic::SixProducts => part(6.0, "a sixth of 16 bit"),
            Arithmetic::Single => self.single,
        }
    }

    /// The least microseconds in which `flops` operations can be done and `bytes` bytes moved.
    #[must_use]
    pub fn least_us(&self, flops: f64, bytes: f64, arithmetic: Arithmetic) -> f64 {
        let (compute, memory) =
            (flops / self.arithmetic(arithmetic).rate, bytes / self.memory.rate);
        compute.max(memory) * 1e-6
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::record::tests::product_line;
    use crate::perf::{BASELINES, result_files};

    #[test]
    fn the_slower_of_arithmetic_and_memory_bounds_a_call() {
        let h200 = Ceilings::of("NVIDIA H200").unwrap();
        let seconds = |flops, bytes, arithmetic| h200.least_us(flops, bytes, arithmetic) * 1e-6;
        for second in [
            seconds(832.5e12, 1.0, Arithmetic::Half),
            seconds(423.6e12, 1.0, Arithmetic::Tf32),
            seconds(832.5e12 / 3.0, 1.0, Arithmetic::ThreeProducts),
            seconds(832.5e12 / 6.0, 1.0, Arithmetic::SixProducts),
            seconds(51.4e12, 1.0, Arithmetic::Single),
            seconds(1.0, 4.61e12, Arithmetic::Half),
        ] {
            assert!((second - 1.0).abs() < 1e-9, "{second}");
        }
        assert!(Ceilings::of("NVIDIA T4").is_none());
    }

    #[test]
    fn the_arithmetic_of_a_record_follows_from_its_type_and_products() {
        let bf16 = product_line("burst", 180.0, 200.0);
        let f32_by = |products: &str| {
            let fields = format!("\"dtype\":\"f32\",\"products\":{products}");
            bf16.replace("\"dtype\":\"bf16\"", &fields)
        };
        for (line, expected) in [
            (bf16.clone(), Arithmetic::Half),
            (bf16.replace("bf16", "f16"), Arithmetic::Half),
            (f32_by("\"tf32\""), Arithmetic::Tf32),
            (f32_by("\"three\""), Arithmetic::ThreeProducts),
            (f32_by("\"six\""), Arithmetic::SixProducts),
            (f32_by("null"), Arithmetic::Single),
        ] {
            assert_eq!(Arithmetic::of(&Record::parse(&line).unwrap()), expected, "{line}");
        }
    }

    #[test]
    fn no_committed_result_is_above_the_ceiling_of_its_arithmetic() {
        let files = result_files(&crate::workspace().join(BASELINES));
        for record in files.iter().flat_map(|file| Record::read(file).unwrap()) {
            let ceilings = Ceilings::of(&record.gpu).unwrap();
            let Some(tflops) = record.tflops(&record.times) else { continue };
            let ceiling = ceilings.arithmetic(Arithmetic::of(&record));
            assert!(tflops <= ceiling.rate, "{}: {tflops} beyond {ceiling:?}", record.case());
        }
    }
}
