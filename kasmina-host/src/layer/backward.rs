//! The backward pass of a linear layer.

use kasmina_kernels::activation::Activation;

use super::KasminaLayer;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gemm::{Backward, Forward, Gradients, Saved, Tiers};
use crate::tensor::Tensor;

/// The gradients of a [`KasminaLayer`]'s input and parameters.
#[derive(Debug)]
pub struct LinearGradients<T: Element> {
    /// Of the input, of its shape.
    pub dx: Tensor<T>,
    /// Of the weight, in its layout.
    pub dw: Tensor<T>,
    /// Of the bias, `[out_features]`; `None` for a layer without.
    pub db: Option<Tensor<T>>,
}

impl KasminaLayer {
    /// The gradients of input, weight and bias, in new tensors, from that of the output, `dy` of
    /// shape `[…, out_features]`. Enqueued: reading them waits for it.
    ///
    /// `x` is the input of the forward pass and `saved` what is kept of it: a reference to its
    /// output, or a [`Saved`]. Without an activation and with ReLU the output is enough. GELU and
    /// SiLU need the pre-activation: given only the output, this computes it anew from `x`, which
    /// costs another forward pass; [`pre_activation`](Self::pre_activation) gives it for keeping.
    ///
    /// ```
    /// use kasmina_host::{Activation, Device, LinearConfig, Tensor};
    ///
    /// let device = Device::cpu();
    /// let layer = LinearConfig::new(3, 2).activation(Activation::Relu).build(&device)?;
    /// let x = Tensor::from_slice(&device, &[1.0f32, 2.0, 3.0], [1, 3])?;
    /// let y = layer.forward(&x)?;
    /// let dy = Tensor::full(&device, [1, 2], 1.0f32)?;
    /// let gradients = layer.backward(&x, &y, &dy)?;
    /// assert_eq!(gradients.dx.shape(), x.shape());
    /// assert_eq!(gradients.dw.shape().extents(), [2, 3]);
    /// # Ok::<(), kasmina_host::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Backward::run`], and [`Error::DType`](crate::Error::DType) if the tensors have another
    /// element type than the layer.
    pub fn backward<'a, T: Element>(
        &self,
        x: &Tensor<T>,
        saved: impl Into<Saved<'a, T>>,
        dy: &Tensor<T>,
    ) -> Result<LinearGradients<T>> {
        let op = "KasminaLayer::backward";
        let linear = self.parameters.of::<T>(op)?;
        // Checked before memory is taken, whose size a wrong input would decide.
        self.check_input(op, x)?;
        let like = |tensor: &Tensor<T>| Tensor::uninitialised(&self.device, *tensor.shape(), op);
        let mut dx = like(x)?;
        let mut dw = like(&linear.weight)?;
        let mut db = linear.bias.as_ref().map(like).transpose()?;
        let gradients =
            Gradients { dx: Some(&mut dx), dw: Some(&mut dw), db: db.as_mut(), accumulate: false };
        self.backward_into(x, saved, dy, gradients)?;
        Ok(LinearGradients { dx, dw, db })
    }

    /// As [`backward`](Self::backward), only the gradients that are wanted, into tensors that
    /// exist, whose values those of weight and bias may be added to. Says which tiers compute them.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn backward_into<'a, T: Element>(
        &self,
        x: &Tensor<T>,
        saved: impl Into<Saved<'a, T>>,
        dy: &Tensor<T>,
        gradients: Gradients<'_, T>,
    ) -> Result<Tiers> {
        let op = "KasminaLayer::backward_into";
        let linear = self.parameters.of::<T>(op)?;
        let (saved, activation) = (saved.into(), self.config.activation);
        if let Some((operand, saved)) = saved.tensor() {
            // Here, as an output that does not tell the gradient is not looked at again.
            let (expected, got) = (x.shape().with_columns(self.config.out_features), saved.shape());
            if *got != expected {
                return Err(Error::Shape { op, operand, expected, got: *got });
            }
        }
        let anew = if saved.tells(activation) { None } else { Some(self.pre_activation(x)?) };
        let backward = Backward {
            x,
            w: &linear.weight,
            dy,
            saved: anew.as_ref().map_or(saved, Saved::PreActivation),
            layout: self.config.weight_layout,
            activation,
        };
        backward.run(gradients, &self.config.kernel_config)
    }

    /// `X·W + b`, the output as it is before the activation, in a new tensor. It is what the
    /// backward pass of GELU and SiLU needs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn pre_activation<T: Element>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let op = "KasminaLayer::pre_activation";
        let linear = self.parameters.of::<T>(op)?;
        self.check_input(op, x)?;
        let shape = x.shape().with_columns(self.config.out_features);
        let mut z = Tensor::uninitialised(&self.device, shape, op)?;
        let forward = Forward {
            x,
            w: &linear.weight,
            bias: linear.bias.as_ref(),
            layout: self.config.weight_layout,
            activation: Activation::None,
        };
        forward.run(&mut z, &self.config.kernel_config)?;
        Ok(z)
    }
}
