//! `Y = act(X·W + b)`: the forward pass of a linear layer.
//!
//! X is `[m, k]` row-major, Y is `[m, n]` row-major, b is `[n]`, and W is `[k, n]` or `[n, k]`
//! row-major, as [`WeightLayout`] says. Any of them may have a row stride wider than its rows.
//! f16 and bf16 accumulate in f32; the bias and the activation are applied in f32 before the one
//! rounding to the element type.

pub mod backward;
#[cfg(target_arch = "nvptx64")]
mod element;
pub mod hopper;
pub mod portable;

/// Which way round the weight matrix lies in memory.
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

/// Which way round the first operand of a product lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum InputLayout {
    /// `[m, k]` row-major: the input of a forward pass.
    #[default]
    Plain,
    /// `[k, m]` row-major: an input that counts as its transpose, as X does in `dW = Xᵀ·dZ`.
    Transposed,
}
