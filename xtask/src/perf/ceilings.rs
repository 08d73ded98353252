//! What GPUs reach at best, as measured, not as data sheets promise.

/// The ceilings of a GPU model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Name as the driver tells it.
    pub gpu: &'static str,
    /// Bytes per second in 10¹².
    pub tbps: f64,
    /// Where that was measured.
    pub tbps_source: &'static str,
    /// Operations per second in 10¹² on operands of 16 bits, with tensor cores.
    pub half_tflops: f64,
    /// Where that was measured.
    pub half_source: &'static str,
    /// Operations per second in 10¹² on f32 operands, without tensor cores.
    pub single_tflops: f64,
    /// Where that was measured.
    pub single_source: &'static str,
}

/// Every GPU model that was measured.
pub const CEILINGS: [Ceilings; 1] = [Ceilings {
    gpu: "NVIDIA H200",
    tbps: 4.61,
    tbps_source: "CUB, f32 sum of 2^30 elements",
    half_tflops: 829.0,
    half_source: "bf16 product 4096×4096×14336 in burst",
    single_tflops: 50.3,
    single_source: "cuBLASLt without TF32, 4096³ in burst",
}];

impl Ceilings {
    /// Those of this GPU model, if it was measured.
    #[must_use]
    pub fn of(gpu: &str) -> Option<&'static Self> {
        CEILINGS.iter().find(|ceilings| ceilings.gpu == gpu)
    }

    /// Operations per second in 10¹² on operands of this type.
    #[must_use]
    pub fn tflops(&self, dtype: &str) -> f64 {
        if dtype == "f32" { self.single_tflops } else { self.half_tflops }
    }

    /// The least microseconds in which `flops` operations on operands of this type can be done and
    /// `bytes` bytes moved.
    #[must_use]
    pub fn least_us(&self, flops: f64, bytes: f64, dtype: &str) -> f64 {
        let (compute, memory) = (flops / self.tflops(dtype), bytes / self.tbps);
        compute.max(memory) * 1e-6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_arithmetic_and_memory_bounds_a_call() {
        let h200 = Ceilings::of("NVIDIA H200").unwrap();
        let seconds = |flops, bytes, dtype| h200.least_us(flops, bytes, dtype) * 1e-6;
        for second in [
            seconds(829e12, 1.0, "bf16"),
            seconds(50.3e12, 1.0, "f32"),
            seconds(1.0, 4.61e12, "bf16"),
        ] {
            assert!((second - 1.0).abs() < 1e-9, "{second}");
        }
        assert!(Ceilings::of("NVIDIA T4").is_none());
    }
}
