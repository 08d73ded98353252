//! PTX instructions, one function each, under their PTX names.
//!
//! Every function is `unsafe` whose instruction has a rule the type system cannot hold; its
//! `# Safety` section states that rule. Shared-memory addresses are `u32` in the shared window.

mod barrier;
#[cfg(kasmina_tier = "hopper")]
mod cluster;
mod convert;
#[cfg(kasmina_tier = "hopper")]
mod cp_async;
mod fence;
mod global;
mod grid;
mod grid_memory;
mod math;
mod mbarrier;
#[cfg(kasmina_tier = "hopper")]
pub(crate) mod mma;
#[cfg(kasmina_tier = "hopper")]
mod packed;
mod registers;
pub mod simt;
mod smem;
mod special;
mod system_memory;
mod tma;
mod warp;
#[cfg(kasmina_tier = "hopper")]
pub(crate) mod wgmma;

pub use barrier::*;
#[cfg(kasmina_tier = "hopper")]
pub use cluster::*;
pub use convert::*;
#[cfg(kasmina_tier = "hopper")]
pub use cp_async::*;
pub use fence::*;
pub use global::*;
pub use grid::*;
pub use grid_memory::*;
pub use math::*;
pub use mbarrier::*;
#[cfg(kasmina_tier = "hopper")]
pub use packed::*;
pub use registers::*;
pub use simt::*;
pub use smem::*;
pub use special::*;
pub use system_memory::*;
pub use tma::*;
pub use warp::*;
