//! A layer's forward pass with the statistics of its output.
#![forbid(unsafe_code)]

use super::KasminaLayer;
use crate::element::Element;
use crate::error::Result;
use crate::gemm::LayerTelemetry;
use crate::reduce::TelemetryReducer;
use crate::tensor::Tensor;

impl KasminaLayer {
    /// As [`forward`](Self::forward), with the statistics of each of `chunks` ranges of the output
    /// features over the batch: the seeds that a layer's features are watched by. What counts as
    /// dead and what becomes of NaN is the reducer's to say.
    ///
    /// Where the forward kernel can make them itself, they cost little, and need no workspace;
    /// otherwise the output is reduced after the pass, in that of the reducer. [`LayerTelemetry::is_fused`] tells which it was, and
    /// [`Forward::run_with_telemetry`](crate::gemm::Forward::run_with_telemetry) when it is.
    ///
    /// ```
    /// use kasmina_host::{Device, LinearConfig, TelemetryReducer, Tensor};
    ///
    /// let device = Device::cpu();
    /// let layer = LinearConfig::new(3, 4).build(&device)?;
    /// let reducer = TelemetryReducer::new(&device)?;
    /// let x = Tensor::from_slice(&device, &[1.0f32, 2.0, 3.0], [1, 3])?;
    /// let (y, telemetry) = layer.forward_with_telemetry(&x, &reducer, 2)?;
    /// let summaries = telemetry.read()?;
    /// assert_eq!(summaries.len(), 2);
    /// assert_eq!(summaries[0].max(), y.to_vec()?[..2].iter().copied().reduce(f32::max));
    /// # Ok::<(), kasmina_host::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`forward`](Self::forward) and [`TelemetryReducer::segmented`].
    pub fn forward_with_telemetry<T: Element>(
        &self,
        x: &Tensor<T>,
        reducer: &TelemetryReducer,
        chunks: usize,
    ) -> Result<(Tensor<T>, LayerTelemetry)> {
        let op = "KasminaLayer::forward_with_telemetry";
        let linear = self.parameters.of::<T>(op)?;
        self.check_input(op, x)?;
        let shape = x.shape().with_columns(self.config.out_features);
        let mut y = Tensor::uninitialised(&self.device, shape, op)?;
        let pass = self.pass(linear, x);
        let telemetry =
            pass.run_with_telemetry(&mut y, &self.config.kernel_config, reducer, chunks)?;
        Ok((y, telemetry))
    }

    /// As [`forward_with_telemetry`](Self::forward_with_telemetry), into a tensor that exists.
    ///
    /// # Errors
    /// As there.
    pub fn forward_into_with_telemetry<T: Element>(
        &self,
        x: &Tensor<T>,
        y: &mut Tensor<T>,
        reducer: &TelemetryReducer,
        chunks: usize,
    ) -> Result<LayerTelemetry> {
        let linear = self.parameters.of::<T>("KasminaLayer::forward_into_with_telemetry")?;
        let pass = self.pass(linear, x);
        pass.run_with_telemetry(y, &self.config.kernel_config, reducer, chunks)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Device, Error, LinearConfig, TelemetryReducer, Tensor};

    #[test]
    fn telemetry_on_the_cpu_is_a_reduction_of_the_output() {
        let device = Device::cpu();
        let layer = LinearConfig::new(5, 7).build(&device).unwrap();
        let reducer = TelemetryReducer::new(&device).unwrap();
        let x = Tensor::<f32>::zeros(&device, [3, 5]).unwrap();
        let (y, telemetry) = layer.forward_with_telemetry(&x, &reducer, 3).unwrap();
        assert!(!telemetry.is_fused());
        let counts: Vec<u64> =
            telemetry.read().unwrap().iter().map(crate::Summary::count).collect();
        assert_eq!((y.shape().extents(), &counts[..]), (&[3, 7][..], &[9, 6, 6][..]));
    }

    #[test]
    fn no_chunks_or_more_than_features_are_refused_before_the_pass() {
        let device = Device::cpu();
        let layer = LinearConfig::new(5, 7).build(&device).unwrap();
        let reducer = TelemetryReducer::new(&device).unwrap();
        let x = Tensor::<f32>::zeros(&device, [3, 5]).unwrap();
        let mut y = Tensor::from_slice(&device, &[9.0f32; 21], [3, 7]).unwrap();
        for chunks in [0, 8] {
            let error = layer.forward_into_with_telemetry(&x, &mut y, &reducer, chunks);
            assert!(matches!(error, Err(Error::Chunks { columns: 7, .. })));
        }
        assert_eq!(y.to_vec().unwrap(), [9.0; 21]);
    }
}
