//! The backward pass of a convolutional layer.

use kasmina_kernels::activation::Activation;

use super::KasminaConv1d;
use crate::conv1d::{self, Backward, Gradients, Saved, Sequences, Tiers};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The gradients of a [`KasminaConv1d`]'s input and parameters.
#[derive(Debug)]
pub struct Conv1dGradients<T: Element> {
    /// Of the input, in the layout of the config.
    pub dx: Tensor<T>,
    /// Of the filter, in its layout.
    pub dw: Tensor<T>,
    /// Of the bias, `[out_channels]`; `None` for a layer without.
    pub db: Option<Tensor<T>>,
}

impl KasminaConv1d {
    /// The gradients of input, filter and bias, in new tensors, from that of the output, `dy` in
    /// its layout. Enqueued: reading them waits for it.
    ///
    /// `x` is the input of the forward pass and `saved` what is kept of it: a reference to its
    /// output, or a [`Saved`]. Without an activation and with ReLU the output is enough. GELU and
    /// SiLU need the pre-activation: given only the output, this computes it anew from `x`, which
    /// costs another forward pass; [`pre_activation`](Self::pre_activation) gives it for keeping.
    ///
    /// # Errors
    /// As [`Backward::run`], and [`Error::DType`] if the tensors have another element type than
    /// the layer.
    pub fn backward<'a, T: Element>(
        &self,
        x: &Tensor<T>,
        saved: impl Into<Saved<'a, T>>,
        dy: &Tensor<T>,
    ) -> Result<Conv1dGradients<T>> {
        let op = "KasminaConv1d::backward";
        let filter = self.parameters.of::<T>(op)?;
        // Checked before memory is taken, whose size a wrong input would decide.
        let [batch, channels, length] = self.input_extents(op, x)?;
        let dx_layout = self.config.dx_layout;
        let dx_shape = dx_layout.extents(batch, channels, length).into();
        let like = |tensor: &Tensor<T>| Tensor::uninitialised(&self.device, *tensor.shape(), op);
        let mut dx = Tensor::uninitialised(&self.device, dx_shape, op)?;
        let mut dw = like(&filter.weight)?;
        let mut db = filter.bias.as_ref().map(like).transpose()?;
        let gradients = Gradients {
            dx: Some((&mut dx, dx_layout)),
            dw: Some(&mut dw),
            db: db.as_mut(),
            accumulate: false,
        };
        self.backward_into(x, saved, dy, gradients)?;
        Ok(Conv1dGradients { dx, dw, db })
    }

    /// As [`backward`](Self::backward), only the gradients that are wanted, into tensors that
    /// exist, whose values those of filter and bias may be added to. Says which tiers compute them.
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
        let op = "KasminaConv1d::backward_into";
        let (config, saved) = (&self.config, saved.into());
        let filter = self.parameters.of::<T>(op)?;
        let [batch, channels, length] = self.output_extents(op, x)?;
        let kept = saved.tensor().map(|(operand, tensor)| (operand, tensor, config.y_layout));
        for (operand, tensor, layout) in kept.into_iter().chain([("dy", dy, config.dy_layout)]) {
            let expected = Shape::from(layout.extents(batch, channels, length));
            if *tensor.shape() != expected {
                return Err(Error::Shape { op, operand, expected, got: *tensor.shape() });
            }
            let (expected, got) = (self.device.id(), tensor.device().id());
            if got != expected {
                return Err(Error::DeviceMismatch { op, operand, expected, got });
            }
        }
        let activation = config.activation;
        let anew = if saved.tells(activation) { None } else { Some(self.pre_activation(x)?) };
        let before = anew.as_ref().map_or(saved, Saved::PreActivation).tensor();
        let dz = match before {
            Some((_, z)) if activation != Activation::None => {
                let z = Sequences::new(z, config.y_layout);
                let dy = Sequences::new(dy, config.dy_layout);
                conv1d::activation_gradient(activation, z, dy, &config.kernel_config)?
            }
            _ => dy.clone(),
        };
        let backward = Backward {
            x: Sequences::new(x, config.x_layout),
            w: &filter.weight,
            filter_layout: config.filter_layout,
            dz: Sequences::new(&dz, config.dy_layout),
            window: config.window,
        };
        backward.run(gradients, &config.kernel_config)
    }

    /// `w ⋆ x + b`, the output as it is before the activation, in a new tensor of the output's
    /// layout. It is what the backward pass of GELU and SiLU needs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn pre_activation<T: Element>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let op = "KasminaConv1d::pre_activation";
        let filter = self.parameters.of::<T>(op)?;
        let mut z = self.output(op, x)?;
        self.run(filter, x, Activation::None, &mut z)?;
        Ok(z)
    }
}
