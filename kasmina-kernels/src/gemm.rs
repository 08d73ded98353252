//! `Y = act(X·W + b)`: the forward pass of a linear layer.
//!
//! X is `[m, k]` row-major, Y is `[m, n]` row-major, b is `[n]`, and W is `[k, n]` or `[n, k]`
//! row-major, as [`WeightLayout`] says. Any of them may have a row stride wider than its rows.
//! f16 and bf16 accumulate in f32, and f32 stays f32, on tensor cores as a sum of bf16 [`parts`];
//! the bias and the activation are applied in f32 before the one rounding to the element type.

pub mod backward;
#[cfg(target_arch = "nvptx64")]
pub(crate) mod element;
pub mod hopper;
pub mod parts;
pub mod portable;

use crate::names::displayed_by_name;

/// Which way round the weight matrix lies in memory.
///
/// Exhaustive on purpose: whoever lays out data has to know every layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightLayout {
    /// `[in_features, out_features]`, that is `[k, n]`, row-major.
    InOut,
    /// `[out_features, in_features]`, that is `[n, k]`, row-major: PyTorch's layout.
    #[default]
    OutIn,
}

impl WeightLayout {
    /// Both layouts.
    pub const ALL: [Self; 2] = [Self::InOut, Self::OutIn];

    /// The layout in which the same memory holds the transposed matrix.
    #[must_use]
    pub const fn transposed(self) -> Self {
        match self {
            Self::InOut => Self::OutIn,
            Self::OutIn => Self::InOut,
        }
    }

    /// The matrix's rows and columns in memory.
    #[must_use]
    pub const fn rows_columns(self, k: usize, n: usize) -> (usize, usize) {
        match self {
            Self::InOut => (k, n),
            Self::OutIn => (n, k),
        }
    }

    /// Two letters for entry names: the order of the axes, slowest first.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InOut => "kn",
            Self::OutIn => "nk",
        }
    }
}

displayed_by_name!(WeightLayout);

/// Which way round the first operand of a product lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum InputLayout {
    /// `[m, k]` row-major: the input of a forward pass.
    #[default]
    Plain,
    /// `[k, m]` row-major: an input that counts as its transpose, as X does in `dW = Xᵀ·dZ`.
    Transposed,
}

/// Which products make up an f32 product on tensor cores: how accurate it is.
///
/// With `u = 2⁻²⁴`, the roundoff of f32, and `A = Σ |x·w|` over the k products of an element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum F32Products {
    /// Six products of three bf16 parts: what is left out is at most `u·A`. Where 16 or more products of
    /// like size make up an element, its error is no larger than in plain f32 (measured); where one
    /// of them is most of it, that error is up to two roundoffs, where plain f32 has one.
    #[default]
    Six,
    /// Three products of two bf16 parts: what is left out is at most `512·u·A`, for random operands
    /// about 4.4e-6 of the result, a hundredth of what TF32 leaves out.
    Three,
    /// One product, of operands rounded to TF32, which has 10 bits of fraction: it errs by at most
    /// `(2¹⁴ + 4)·u·A` and, for random operands, by about 2.9e-4 of the result. Where X or W have
    /// addresses or row strides that are no multiples of 16 bytes, it is [`Six`](Self::Six). The
    /// weight's gradient takes no notice.
    Tf32,
}

impl F32Products {
    /// How many there are.
    #[must_use]
    pub const fn count(self) -> u32 {
        match self {
            Self::Six => 6,
            Self::Three => 3,
            Self::Tf32 => 1,
        }
    }
}
