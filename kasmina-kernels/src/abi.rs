//! What host and device agree on: tiers, element types, PTX modules, kernels and their parameters.

#[cfg(feature = "ptx")]
use alloc::string::String;
use core::marker::PhantomData;

#[cfg(feature = "ptx")]
use miniz_oxide::inflate;

use crate::conv1d::{self, hopper as conv1d_hopper};
use crate::gemm::hopper::{
    self, comparison, direct, ping_pong, split, telemetry, tf32, weight_gradient,
};
use crate::gemm::{backward, portable};
use crate::names::{displayed_by_name, parsed_by_name};
use crate::persistent;
use crate::reduce;

/// A family of kernels that share their hardware requirements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Tier {
    /// Any machine: `matrixmultiply` and rayon.
    Cpu,
    /// Compute capability 7.5 and later: shared-memory tiles, no tensor cores.
    Portable,
    /// Compute capability 9.0 exactly: TMA, wgmma, warp specialisation.
    Hopper,
}

impl Tier {
    /// Every tier, the least demanding first.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Portable, Self::Hopper];

    /// Lower-case name, as `KASMINA_TIER` takes it and as the folder of its PTX is called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Portable => "portable",
            Self::Hopper => "hopper",
        }
    }

    /// The architecture its PTX is compiled for; `None` for the CPU.
    #[must_use]
    pub const fn target_cpu(self) -> Option<&'static str> {
        match self {
            Self::Cpu => None,
            Self::Portable => Some("sm_75"),
            Self::Hopper => Some("sm_90a"),
        }
    }

    /// Whether a GPU of compute capability `major.minor` runs this tier.
    #[must_use]
    pub const fn runs_on(self, major: u32, minor: u32) -> bool {
        match self {
            Self::Cpu => true,
            Self::Portable => major > 7 || (major == 7 && minor >= 5),
            // sm_90a is architecture-specific: no later GPU accepts it.
            Self::Hopper => major == 9 && minor == 0,
        }
    }
}

displayed_by_name!(Tier);
parsed_by_name!(Tier, "tier");

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: binary32 with a 7-bit fraction.
    BF16,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// Bytes per element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Lower-case name, as it stands in entry names.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Unit roundoff: half the distance from 1 to the next representable number.
    #[must_use]
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => 1.0 / (1u64 << 24) as f64,
            Self::F16 => 1.0 / (1u64 << 11) as f64,
            Self::BF16 => 1.0 / (1u64 << 8) as f64,
        }
    }
}

displayed_by_name!(DType);
parsed_by_name!(DType, "element type");

/// A PTX module: the unit the driver compiles on first use.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// The tier whose hardware it needs.
    pub tier: Tier,
    /// File stem under `ptx/<tier>/`.
    pub name: &'static str,
    /// The kernels it holds.
    pub entries: &'static [&'static str],
    /// Its text, deflated (RFC 1951).
    #[cfg(feature = "ptx")]
    pub deflated_ptx: &'static [u8],
}

#[cfg(feature = "ptx")]
impl Module {
    /// Its text.
    #[must_use]
    pub fn ptx(&self) -> String {
        self.inflated(usize::MAX)
    }

    /// The beginning of its text, with what it asks of the driver.
    #[must_use]
    pub fn ptx_header(&self) -> String {
        self.inflated(1 << 10)
    }

    fn inflated(&self, limit: usize) -> String {
        let text = match inflate::decompress_to_vec_with_limit(self.deflated_ptx, limit) {
            Ok(text) => text,
            // What comes from the build script is whole: only the limit can end it.
            Err(cut) => cut.output,
        };
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// A [`Module`] and, in a host build that embeds PTX, its text.
macro_rules! module {
    ($tier:ident, $folder:literal, $name:expr, [$($entry:expr),+ $(,)?]) => {
        $crate::abi::Module {
            tier: $crate::abi::Tier::$tier,
            name: $name,
            entries: &[$($entry),+],
            #[cfg(feature = "ptx")]
            deflated_ptx: include_bytes!(concat!(
                env!("OUT_DIR"), "/", $folder, "/", $name, ".ptx"
            )),
        }
    };
}
pub(crate) use module;

/// A [`Kernel`] of the Hopper tier that waits for predecessors, alone in a module of its name.
macro_rules! hopper_kernel {
    ($entry:ident, $block_dim:expr, $smem_bytes:expr) => {{
        static MODULE: $crate::abi::Module =
            $crate::abi::module!(Hopper, "hopper", stringify!($entry), [stringify!($entry)]);
        $crate::abi::Kernel::new(&MODULE, stringify!($entry), $block_dim, $smem_bytes)
            .waiting_for_predecessors()
    }};
}
pub(crate) use hopper_kernel;

/// The modules that hold several kernels, or one that has no table.
static SHARED_MODULES: &[&Module] = &[
    &portable::F32,
    &portable::F16,
    &portable::BF16,
    &portable::F32_REPAIR,
    &portable::TRANSPOSED_F32,
    &portable::TRANSPOSED_F16,
    &portable::TRANSPOSED_BF16,
    &backward::PORTABLE_F32,
    &backward::PORTABLE_F16,
    &backward::PORTABLE_BF16,
    &backward::HOPPER_F32,
    &backward::HOPPER_F16,
    &backward::HOPPER_BF16,
    &reduce::PORTABLE_F32,
    &reduce::PORTABLE_F16,
    &reduce::PORTABLE_BF16,
    &reduce::HOPPER_F32,
    &reduce::HOPPER_F16,
    &reduce::HOPPER_BF16,
    &persistent::PORTABLE_F32,
    &persistent::PORTABLE_F16,
    &persistent::PORTABLE_BF16,
    &persistent::PORTABLE_ECHO,
    &persistent::HOPPER_F16,
    &persistent::HOPPER_BF16,
    &conv1d::portable::F32,
    &conv1d::portable::F16,
    &conv1d::portable::BF16,
    &conv1d::portable::F32_REPAIR,
    &conv1d_hopper::parts::split::MODULE,
    &hopper::unaligned::MODULE,
    &split::SPLIT_MODULE,
    &conv1d_hopper::depthwise::F16,
    &conv1d_hopper::depthwise::BF16,
    &conv1d_hopper::pack::MODULE,
    &conv1d_hopper::wgrad::sum::MODULE,
];

/// The modules of `$first`, then those of the tables of kernels that each have a module.
macro_rules! modules {
    ($first:path, $($table:path),+ $(,)?) => {{
        let mut modules = [$first[0]; $first.len() $(+ $table.len())+];
        let mut len = 0;
        while len < $first.len() {
            modules[len] = $first[len];
            len += 1;
        }
        $(
            let mut row = 0;
            while row < $table.len() {
                modules[len] = $table[row].kernel.module;
                len += 1;
                row += 1;
            }
        )+
        modules
    }};
}

/// Every PTX module, in the order `cargo xtask ptx` writes them.
pub static MODULES: &[&Module] = &modules![
    SHARED_MODULES,
    hopper::KERNELS,
    ping_pong::KERNELS,
    weight_gradient::KERNELS,
    split::KERNELS,
    direct::KERNELS,
    tf32::KERNELS,
    comparison::KERNELS,
    telemetry::KERNELS,
    conv1d_hopper::gather::KERNELS,
    conv1d_hopper::gather::halo::KERNELS,
    conv1d_hopper::wgrad::KERNELS,
    conv1d_hopper::parts::KERNELS,
    conv1d_hopper::parts::wgrad::KERNELS,
];

/// A kernel that takes one parameter struct `P` by value.
///
/// Entry name, block size and shared memory come from the row that also makes the device entry,
/// so the three cannot part; the type parameter ties the parameters to the entry.
pub struct Kernel<P: KernelParams> {
    /// The module that holds it.
    pub module: &'static Module,
    /// Name of the PTX entry.
    pub entry: &'static str,
    /// Threads per block.
    pub block_dim: u32,
    /// Dynamic shared memory per block, in bytes.
    pub smem_bytes: u32,
    /// Whether it waits for the grid before it (`griddepcontrol.wait`) ahead of its first access
    /// to global memory, so that the two may overlap.
    pub waits_for_predecessors: bool,
    /// Whether its grid is one cluster, of at most 16 blocks.
    pub one_cluster: bool,
    params: PhantomData<fn(P)>,
}

/// Shared memory one block of compute capability 9.0 may ask for, in bytes.
pub const MAX_SMEM_BYTES: u32 = 232_448;

impl<P: KernelParams> Kernel<P> {
    /// A kernel whose launch geometry is legal; anything else does not compile in a `const`.
    #[must_use]
    pub const fn new(
        module: &'static Module,
        entry: &'static str,
        block_dim: u32,
        smem_bytes: u32,
    ) -> Self {
        assert!(block_dim.is_multiple_of(32) && block_dim > 0 && block_dim <= 1024);
        assert!(smem_bytes <= MAX_SMEM_BYTES);
        assert!(align_of::<P>() <= 16, "rustc cannot pass a wider alignment to a kernel");
        assert!(size_of::<P>() <= 4096, "a kernel's parameters are limited to 4 KiB");
        Self {
            module,
            entry,
            block_dim,
            smem_bytes,
            waits_for_predecessors: false,
            one_cluster: false,
            params: PhantomData,
        }
    }

    /// The same kernel, whose grid is one cluster.
    #[must_use]
    pub const fn as_one_cluster(mut self) -> Self {
        self.one_cluster = true;
        self
    }

    /// The same kernel, known to wait for the grid before it.
    #[must_use]
    pub const fn waiting_for_predecessors(mut self) -> Self {
        self.waits_for_predecessors = true;
        self
    }
}

/// A parameter struct that a kernel takes by value.
///
/// # Safety
/// The type is `repr(C)`, has fixed-width fields and no padding, so that its bytes mean the same
/// on both sides and none of them is uninitialised.
pub unsafe trait KernelParams: Copy + 'static {}

/// A TMA descriptor (`CUtensorMap`), opaque to us.
///
/// The hardware wants 64-byte alignment. rustc cannot give a kernel parameter more than 16, so it
/// stands first in its parameter struct and `cargo xtask ptx` raises the parameter's alignment.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);
