//! Values by their names: `Display` and `FromStr` of what has a `name()`.

use core::fmt;

/// There is no value of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownName {
    kind: &'static str,
    names: &'static [&'static str],
}

impl UnknownName {
    pub(crate) const fn new(kind: &'static str, names: &'static [&'static str]) -> Self {
        Self { kind, names }
    }

    /// The names there are.
    #[must_use]
    pub const fn names(&self) -> &'static [&'static str] {
        self.names
    }
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no such {}; there are ", self.kind)?;
        let last = self.names.len().saturating_sub(1);
        for (index, name) in self.names.iter().enumerate() {
            let separator = match index {
                0 => "",
                _ if index == last => " and ",
                _ => ", ",
            };
            write!(f, "{separator}{name}")?;
        }
        Ok(())
    }
}

impl core::error::Error for UnknownName {}

/// `Display` by `name()`.
macro_rules! displayed_by_name {
    ($($type:ty),+ $(,)?) => {$(
        impl core::fmt::Display for $type {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.pad(self.name())
            }
        }
    )+};
}
pub(crate) use displayed_by_name;

/// `FromStr` by `name()` among `ALL`; the second argument is what a person calls such a value.
macro_rules! parsed_by_name {
    ($type:ty, $kind:literal) => {
        impl core::str::FromStr for $type {
            type Err = $crate::names::UnknownName;

            fn from_str(name: &str) -> Result<Self, Self::Err> {
                const NAMES: [&str; <$type>::ALL.len()] = {
                    let mut names = [""; <$type>::ALL.len()];
                    let mut index = 0;
                    while index < names.len() {
                        names[index] = <$type>::ALL[index].name();
                        index += 1;
                    }
                    names
                };
                let named = Self::ALL.into_iter().find(|value| value.name() == name);
                named.ok_or($crate::names::UnknownName::new($kind, &NAMES))
            }
        }
    };
}
pub(crate) use parsed_by_name;

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::ToString;

    use crate::abi::{DType, Tier};
    use crate::activation::Activation;
    use crate::conv1d::{FilterLayout, SequenceLayout};
    use crate::gemm::WeightLayout;

    #[test]
    fn what_is_displayed_can_be_parsed() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        for dtype in DType::ALL {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
        }
        for activation in Activation::ALL {
            assert_eq!(activation.to_string().parse(), Ok(activation));
        }
    }

    #[test]
    fn a_name_nobody_has_is_answered_with_those_there_are() {
        let unknown = "BF16".parse::<DType>().unwrap_err();
        assert_eq!(unknown.names(), ["f32", "f16", "bf16"]);
        assert_eq!(unknown.to_string(), "no such element type; there are f32, f16 and bf16");
        let unknown = "tanh".parse::<Activation>().unwrap_err();
        assert!(unknown.to_string().ends_with("none, relu, gelu, gelu-tanh and silu"));
    }

    #[test]
    fn layouts_are_displayed_by_the_order_of_their_axes() {
        assert_eq!(WeightLayout::OutIn.to_string(), "nk");
        assert_eq!(SequenceLayout::Nlc.to_string(), "nlc");
        assert_eq!(format!("{:>5}", FilterLayout::OutInTap), "  oik");
    }
}
