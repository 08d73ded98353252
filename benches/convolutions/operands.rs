//! Convolutions to time, and their operands.

use anyhow::Context;
use kasmina::conv1d::{Backward, Forward, Gradients, Sequences, Tiers, Window};
use kasmina::{
    Activation, Device, Element, FilterLayout, KernelConfig, Padding, SequenceLayout, Tensor, Tier,
};

use crate::measure::random::Normals;

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// `y = w ⋆ x`
    Forward,
    /// The gradient of the input.
    Dgrad,
    /// The gradients of filter and bias.
    Wgrad,
}

impl Pass {
    pub(crate) const ALL: [Self; 3] = [Self::Forward, Self::Dgrad, Self::Wgrad];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Dgrad => "dgrad",
            Self::Wgrad => "wgrad",
        }
    }
}

/// A convolution of stride and dilation 1 that keeps the length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convolution {
    pub(crate) batch: usize,
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    pub(crate) length: usize,
    /// An even number is padded by one more on the right, which cuDNN leaves out.
    pub(crate) taps: usize,
    pub(crate) groups: usize,
}

/// The shapes of large and of thin layers, then depthwise ones.
pub(crate) const SHAPES: [[usize; 6]; 10] = [
    [32, 256, 256, 4096, 3, 1],
    [32, 512, 512, 2048, 5, 1],
    [16, 64, 64, 16384, 7, 1],
    [64, 32, 32, 8192, 3, 1],
    [8, 1024, 1024, 1024, 3, 1],
    [16, 128, 256, 4096, 9, 1],
    [4, 128, 128, 65536, 3, 1],
    [8, 1024, 1024, 8192, 3, 1024],
    [8, 1024, 1024, 8192, 4, 1024],
    [8, 1024, 1024, 8192, 7, 1024],
];

impl Convolution {
    pub(crate) const fn of(extents: [usize; 6]) -> Self {
        let [batch, in_channels, out_channels, length, taps, groups] = extents;
        Self { batch, in_channels, out_channels, length, taps, groups }
    }

    /// Batch, input, output, length, taps and, unless 1, groups.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let numbers: Vec<usize> = text
            .split('x')
            .map(|number| number.parse().ok().filter(|&n| n > 0))
            .collect::<Option<_>>()
            .with_context(|| format!("{text} is not a shape like 32x256x256x4096x3"))?;
        let extents: [usize; 6] = match *numbers.as_slice() {
            [b, i, o, l, k] => [b, i, o, l, k, 1],
            [b, i, o, l, k, g] => [b, i, o, l, k, g],
            _ => anyhow::bail!("{text} is not a shape like 32x256x256x4096x3"),
        };
        Ok(Self::of(extents))
    }

    pub(crate) fn window(&self) -> Window {
        Window { padding: Padding::Same, groups: self.groups, ..Window::default() }
    }

    /// Multiplications and additions of a pass.
    pub(crate) fn flops(&self) -> f64 {
        2.0 * (self.batch * self.length * self.out_channels) as f64
            * (self.in_channels / self.groups * self.taps) as f64
    }

    /// Bytes of elements of `size` bytes that a pass moves if it moves each once.
    pub(crate) fn bytes(&self, size: usize) -> f64 {
        let sequences = self.batch * self.length * (self.in_channels + self.out_channels);
        let filter = self.out_channels * self.in_channels / self.groups * self.taps;
        ((sequences + filter) * size) as f64
    }
}

/// Tensors of one convolution, all of one layout.
pub(crate) struct Operands<T: Element> {
    pub(crate) convolution: Convolution,
    pub(crate) layout: SequenceLayout,
    pub(crate) filter_layout: FilterLayout,
    pub(crate) x: Tensor<T>,
    pub(crate) w: Tensor<T>,
    /// With respect to y.
    pub(crate) dz: Tensor<T>,
}

/// Where a pass writes.
pub(crate) struct Results<T: Element> {
    /// y or dx.
    pub(crate) sequences: Tensor<T>,
    pub(crate) dw: Tensor<T>,
    pub(crate) db: Tensor<T>,
}

impl<T: Element> Operands<T> {
    pub(crate) fn new(
        device: &Device,
        convolution: Convolution,
        (layout, filter_layout): (SequenceLayout, FilterLayout),
        normals: &mut Normals,
    ) -> anyhow::Result<Self> {
        let Convolution { batch, in_channels, out_channels, length, taps, groups } = convolution;
        let mut random = |extents: [usize; 3], scale| {
            let values = normals.take::<T>(extents.iter().product(), scale);
            Tensor::from_slice(device, &values, extents)
        };
        let group_in = in_channels / groups;
        let filter = match filter_layout {
            FilterLayout::OutInTap => [out_channels, group_in, taps],
            FilterLayout::TapOutIn => [taps, out_channels, group_in],
        };
        let scale = 1.0 / ((group_in * taps) as f32).sqrt();
        Ok(Self {
            convolution,
            layout,
            filter_layout,
            x: random(layout.extents(batch, in_channels, length), 1.0)?,
            w: random(filter, scale)?,
            dz: random(layout.extents(batch, out_channels, length), 1.0)?,
        })
    }

    /// Memory for the results of `pass`.
    pub(crate) fn results(&self, device: &Device, pass: Pass) -> anyhow::Result<Results<T>> {
        let like = if pass == Pass::Dgrad { &self.x } else { &self.dz };
        Ok(Results {
            sequences: Tensor::zeros(device, *like.shape())?,
            dw: Tensor::zeros(device, *self.w.shape())?,
            db: Tensor::zeros(device, [self.convolution.out_channels])?,
        })
    }

    /// Enqueues a pass and says which tier runs it.
    pub(crate) fn enqueue(
        &self,
        pass: Pass,
        results: &mut Results<T>,
        config: &KernelConfig,
    ) -> anyhow::Result<Tier> {
        let x = Sequences::new(&self.x, self.layout);
        let (filter_layout, window) = (self.filter_layout, self.convolution.window());
        if pass == Pass::Forward {
            let forward = Forward {
                x,
                w: &self.w,
                filter_layout,
                bias: None,
                window,
                activation: Activation::None,
            };
            return Ok(forward.run(&mut results.sequences, self.layout, config)?);
        }
        let backward = Backward {
            x,
            w: &self.w,
            filter_layout,
            dz: Sequences::new(&self.dz, self.layout),
            window,
        };
        let gradients = if pass == Pass::Dgrad {
            Gradients { dx: Some((&mut results.sequences, self.layout)), ..Gradients::default() }
        } else {
            Gradients {
                dw: Some(&mut results.dw),
                db: Some(&mut results.db),
                ..Gradients::default()
            }
        };
        let Tiers { dx, dw } = backward.run(gradients, config)?;
        dx.or(dw).context("a pass was asked for")
    }
}

impl<T: Element> Results<T> {
    /// What `pass` wrote for the first sequence, or of the filter.
    pub(crate) fn sample(&self, pass: Pass) -> anyhow::Result<Vec<f32>> {
        let values = match pass {
            Pass::Wgrad => self.dw.to_vec()?,
            _ => self.sequences.rows(0..1)?.to_vec()?,
        };
        Ok(values.into_iter().map(T::to_f32).collect())
    }
}
