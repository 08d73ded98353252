//! How kernels are chosen and where their PTX comes from.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use kasmina_kernels::abi::Tier;
use kasmina_kernels::gemm::F32Products;
use kasmina_kernels::gemm::hopper::Forced;
use kasmina_kernels::gemm::hopper::comparison::Without;

use crate::error::{Error, Result};

/// Environment variable that names a tier to force.
const TIER_VARIABLE: &str = "KASMINA_TIER";
/// Environment variable that names a folder of PTX modules.
const PTX_DIR_VARIABLE: &str = "KASMINA_PTX_DIR";

/// How kernels are chosen, and where their PTX comes from.
///
/// The default leaves everything to the library. What a config leaves open is taken from
/// `KASMINA_TIER` and `KASMINA_PTX_DIR` as they were when the [`Device`](crate::Device) was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a config does nothing until something is given it"]
pub struct KernelConfig {
    tier: Option<Tier>,
    hopper_tile: Option<[u32; 2]>,
    hopper_split_k: Option<u32>,
    hopper_multicast: Option<u32>,
    hopper_ping_pong: Option<bool>,
    hopper_direct: Option<bool>,
    without: Option<Without>,
    f32_products: F32Products,
    enable_tma: bool,
    enable_persistent_kernels: bool,
    enable_tiling: bool,
    ptx_dir: Option<PathBuf>,
}

impl Default for KernelConfig {
    fn default() -> Self {
        Self {
            tier: None,
            hopper_tile: None,
            hopper_split_k: None,
            hopper_multicast: None,
            hopper_ping_pong: None,
            hopper_direct: None,
            without: None,
            f32_products: F32Products::Six,
            enable_tma: true,
            enable_persistent_kernels: true,
            enable_tiling: true,
            ptx_dir: None,
        }
    }
}

impl KernelConfig {
    /// The config that `KASMINA_TIER` and `KASMINA_PTX_DIR` ask for; unset or empty variables ask
    /// for nothing.
    ///
    /// # Errors
    /// [`Error::UnknownTier`] if `KASMINA_TIER` names none.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(std::env::var_os(TIER_VARIABLE), std::env::var_os(PTX_DIR_VARIABLE))
    }

    fn from_variables(tier: Option<OsString>, ptx_dir: Option<OsString>) -> Result<Self> {
        let tier = match tier.filter(|name| !name.is_empty()) {
            None => None,
            Some(name) => {
                let name = name.to_string_lossy().into_owned();
                let tier = name.parse();
                Some(tier.map_err(|fault| Error::UnknownTier { name, fault })?)
            }
        };
        let ptx_dir = ptx_dir.filter(|path| !path.is_empty()).map(PathBuf::from);
        Ok(Self { tier, ptx_dir, ..Self::default() })
    }

    /// Forces a tier: a call gets exactly this one or
    /// [`Error::Unsupported`](crate::Error::Unsupported).
    pub const fn tier(mut self, tier: Tier) -> Self {
        self.tier = Some(tier);
        self
    }

    /// Forces the output tile of Hopper kernels, rows and columns: `[128, 256]`, `[128, 128]`,
    /// `[64, 128]` or `[64, 64]`; for f32 `[128, 128]` or `[64, 128]`, but in TF32 the four, and with
    /// rows and columns exchanged where W is `[in, out]`. By default each call gets the one expected
    /// to be fastest. Other tiers have one tile and take no notice.
    pub const fn hopper_tile(mut self, tile: [u32; 2]) -> Self {
        self.hopper_tile = Some(tile);
        self
    }

    /// Forces how many blocks of a Hopper kernel share a tile, each with a part of k: 1, or with
    /// the tile of 64×64 also 2, 4 or 8. Where k has fewer steps of 64 a tile has one block all the
    /// same. By default each call gets what is expected to be fastest. f32 kernels other than
    /// those in TF32, where a step is 32, and the weight's gradient take no notice.
    pub const fn hopper_split_k(mut self, blocks: u32) -> Self {
        self.hopper_split_k = Some(blocks);
        self
    }

    /// Forces into how many blocks of a Hopper kernel, with tiles below each other, each part of W
    /// is loaded: 1, or 2 with the tile of 64×128. By default each call gets what is expected to be
    /// fastest. f32 kernels and the weight's gradient take no notice.
    pub const fn hopper_multicast(mut self, blocks: u32) -> Self {
        self.hopper_multicast = Some(blocks);
        self
    }

    /// Forces whether the two consumers of a Hopper kernel have a tile each, one stored while the
    /// other is multiplied, or share each tile. There are kernels where they have a tile each with
    /// the tile of 128×128. By default each call gets what is expected to be fastest. f32 kernels,
    /// the weight's gradient, kernels without a part and passes with fused telemetry take no notice.
    pub const fn hopper_ping_pong(mut self, ping_pong: bool) -> Self {
        self.hopper_ping_pong = Some(ping_pong);
        self
    }

    /// Forces whether kernels that multiply f32 by six products split it into parts on its way into
    /// the tensor cores, in one launch and without memory for parts, or take parts made before. Those
    /// have tiles of `[64, 64]`, or of `[32, 64]` with 1, 2, 4 or 8 blocks to a tile, which
    /// `hopper_tile` and `hopper_split_k` then force. By default, where no tile is forced, each call
    /// gets what is expected to be faster. The weight's gradient is split on its way or, without that,
    /// not computed on tensor cores. Other products and types take no notice.
    pub const fn hopper_direct(mut self, direct: bool) -> Self {
        self.hopper_direct = Some(direct);
        self
    }

    /// Takes a Hopper kernel that goes without one of its parts, to measure what that part gains:
    /// of the forced tile, else of 128×256. Forward passes on the `hopper` tier that there is no
    /// such kernel for are [`Error::Unsupported`](crate::Error::Unsupported): TMA loads and warp
    /// specialisation are left out only for bf16, W as `[in, out]`, and tiles of 128×256 and 64×64.
    /// What else runs takes no notice.
    pub const fn hopper_without(mut self, part: Without) -> Self {
        self.without = Some(part);
        self
    }

    /// Which products make up an f32 product of a linear layer on the `hopper` tier, forward and in
    /// the input's gradient: how accurate it is. By default the six that give the full accuracy of
    /// f32. Other tiers multiply f32 as it is and take no notice; convolutions on `hopper` add up the
    /// six.
    pub const fn f32_products(mut self, products: F32Products) -> Self {
        self.f32_products = products;
        self
    }

    /// Whether kernels that load through TMA may be chosen; they may by default.
    pub const fn enable_tma(mut self, enable: bool) -> Self {
        self.enable_tma = enable;
        self
    }

    /// Whether [`should_use_persistent`](crate::should_use_persistent) may advise resident kernels;
    /// it may by default.
    pub const fn enable_persistent_kernels(mut self, enable: bool) -> Self {
        self.enable_persistent_kernels = enable;
        self
    }

    /// Whether convolutions may reuse what they load, in shared memory and registers; they may by
    /// default. Without it the portable tier computes one element per thread straight from global
    /// memory, neighbouring threads at distant addresses: the baseline that tiling is measured
    /// against.
    pub const fn enable_tiling(mut self, enable: bool) -> Self {
        self.enable_tiling = enable;
        self
    }

    /// Loads PTX from this folder, laid out as `<tier>/<module>.ptx`, instead of the modules that
    /// are built in.
    pub fn ptx_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.ptx_dir = Some(folder.into());
        self
    }

    /// The tier that is forced, if one is.
    #[must_use]
    pub const fn forced_tier(&self) -> Option<Tier> {
        self.tier
    }

    /// The output tile that is forced on Hopper kernels, if one is.
    #[must_use]
    pub const fn forced_hopper_tile(&self) -> Option<[u32; 2]> {
        self.hopper_tile
    }

    /// How many blocks are forced to share a tile of a Hopper kernel, if a number is.
    #[must_use]
    pub const fn forced_hopper_split_k(&self) -> Option<u32> {
        self.hopper_split_k
    }

    /// Into how many blocks of a Hopper kernel W is forced to be loaded, if a number is.
    #[must_use]
    pub const fn forced_hopper_multicast(&self) -> Option<u32> {
        self.hopper_multicast
    }

    /// Whether consumers of a Hopper kernel are forced to have a tile each or not, if either is.
    #[must_use]
    pub const fn forced_hopper_ping_pong(&self) -> Option<bool> {
        self.hopper_ping_pong
    }

    /// Whether f32 is forced to be split on its way into the tensor cores or before, if either is.
    #[must_use]
    pub const fn forced_hopper_direct(&self) -> Option<bool> {
        self.hopper_direct
    }

    /// The part that Hopper's forward kernels are to go without, if one is.
    #[must_use]
    pub const fn left_out(&self) -> Option<Without> {
        self.without
    }

    /// What of Hopper kernels is forced.
    pub(crate) const fn forced_hopper(&self) -> Forced {
        let (tile, split_k) = (self.hopper_tile, self.hopper_split_k);
        let (cluster_m, ping_pong) = (self.hopper_multicast, self.hopper_ping_pong);
        Forced { tile, split_k, cluster_m, ping_pong }
    }

    /// Which products make up an f32 product on the `hopper` tier.
    #[must_use]
    pub const fn chosen_f32_products(&self) -> F32Products {
        self.f32_products
    }

    /// Whether kernels that load through TMA may be chosen.
    #[must_use]
    pub const fn tma_enabled(&self) -> bool {
        self.enable_tma
    }

    /// Whether resident kernels may be advised.
    #[must_use]
    pub const fn persistent_kernels_enabled(&self) -> bool {
        self.enable_persistent_kernels
    }

    /// Whether convolutions may reuse what they load.
    #[must_use]
    pub const fn tiling_enabled(&self) -> bool {
        self.enable_tiling
    }

    /// The folder that overrides the built-in PTX, if one does.
    #[must_use]
    pub fn ptx_override(&self) -> Option<&Path> {
        self.ptx_dir.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_are_unset_or_empty_ask_for_nothing() {
        assert_eq!(KernelConfig::from_variables(None, None).unwrap(), KernelConfig::default());
        let empty = KernelConfig::from_variables(Some("".into()), Some("".into()));
        assert_eq!(empty.unwrap(), KernelConfig::default());
    }

    #[test]
    fn variables_name_a_tier_and_a_folder() {
        let config =
            KernelConfig::from_variables(Some("portable".into()), Some("/ptx".into())).unwrap();
        assert_eq!(config.forced_tier(), Some(Tier::Portable));
        assert_eq!(config.ptx_override(), Some(Path::new("/ptx")));
    }

    #[test]
    fn a_tier_nobody_knows_is_refused_by_name() {
        let error = KernelConfig::from_variables(Some("turbo".into()), None).unwrap_err();
        assert!(matches!(error, Error::UnknownTier { ref name, .. } if name == "turbo"));
        let message = error.to_string();
        assert!(message.ends_with("there are cpu, portable and hopper"), "{message}");
    }
}
