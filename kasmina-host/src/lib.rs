//! The safe API of kasmina: devices, tensors, layers.
//!
//! The crate `kasmina` re-exports all of this; its documentation is the place to start.
//!
//! | module | holds |
//! |---|---|
//! | [`conv1d`] | one-dimensional convolution and its gradients as functions of their operands |
//! | [`gemm`] | the linear layer's forward and backward pass as functions of their operands |
//! | `device`, `stream` | where things run, and in which order |
//! | `tensor`, `shape`, `element` | what they run on |
//! | `reduce` | statistics of whole tensors and of their segments |
//! | `layer`, `conv1d_layer` | what they are used through |
//! | `parameters` | their weights and biases |
//! | `persistent` | layers that stay resident for streams of small batches |
//! | `config` | how kernels are chosen |
//! | `error` | what can go wrong |
//! | `cpu` | the CPU tier |
//! | `gpu` | everything that calls the driver, and with it most of the crate's unsafe code |
// The GPU tiers' share of what is written once for all tiers.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))]

mod config;
pub mod conv1d;
mod conv1d_layer;
mod cpu;
mod device;
mod element;
mod error;
pub mod gemm;
#[cfg_attr(not(feature = "cuda"), path = "gpu_absent.rs")]
mod gpu;
mod layer;
mod parameters;
mod persistent;
mod reduce;
mod shape;
mod stream;
mod tensor;
mod tensor_map;

pub use config::KernelConfig;
pub use conv1d_layer::{Conv1dConfig, Conv1dGradients, KasminaConv1d};
pub use device::{Capability, Device, DeviceId, MemoryStats};
pub use element::Element;
pub use error::{Error, ForeignPointerFault, Obstacle, Result, SessionFault};
pub use gemm::LayerTelemetry;
pub use half::{self, bf16, f16};
pub use kasmina_kernels::abi::{DType, Tier};
pub use kasmina_kernels::activation::Activation;
pub use kasmina_kernels::conv1d::{Conv1dFault, FilterLayout, Padding, SequenceLayout};
pub use kasmina_kernels::gemm::hopper::comparison::Without;
pub use kasmina_kernels::gemm::{F32Products, WeightLayout};
pub use kasmina_kernels::names::UnknownName;
pub use kasmina_kernels::persistent::PlanFault;
pub use layer::{KasminaLayer, LinearConfig, LinearGradients};
pub use persistent::{
    Answer, PersistentTrial, Pipelined, StreamConfig, StreamPath, StreamSession, StreamStats,
    Ticket, should_use_persistent,
};
pub use reduce::{
    NanPolicy, PendingReduction, PendingSummaries, PendingSummary, ReducerConfig, Reduction,
    Segments, Summary, TelemetryReducer,
};
pub use shape::Shape;
pub use stream::Stream;
pub use tensor::Tensor;
