//! cuDNN's convolutions, one-dimensional ones as images of height 1.
//!
//! The library is opened at run time; its few functions and constants are declared here by hand, as
//! `cudnn_cnn.h` and `cudnn_ops.h` of cuDNN 9 give them. Every pass runs with the fastest of the
//! algorithms that cuDNN times itself, with the given workspace; for f32 without TF32.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::ptr;

use anyhow::{Context, ensure};
use kasmina::{DType, Device, Element, SequenceLayout, Tensor};
use libloading::Library;

use super::library::symbol;
use crate::convolutions::operands::{Convolution, Operands, Pass, Results};

/// The file, or the folder that holds it; else the loader's own places.
const PATH_VARIABLE: &str = "KASMINA_CUDNN";
const FILE_NAME: &str = "libcudnn.so.9";
const WORKSPACE_BYTES: usize = 1 << 30;
/// How many algorithms are timed.
const MAX_ALGORITHMS: usize = 10;

const CROSS_CORRELATION: c_int = 1;
const DATA_FLOAT: c_int = 0;
const DATA_HALF: c_int = 2;
const DATA_BFLOAT16: c_int = 9;
const FORMAT_NCHW: c_int = 0;
const FORMAT_NHWC: c_int = 1;
/// Tensor cores.
const MATH_TENSOR_OP: c_int = 1;
/// No tensor cores, and so no TF32.
const MATH_FMA: c_int = 3;

type Pointer = *mut c_void;
/// `cudnnStatus_t`; 0 is success.
type Status = c_int;
type Create = unsafe extern "C" fn(*mut Pointer) -> Status;
type Destroy = unsafe extern "C" fn(Pointer) -> Status;
type GetVersion = unsafe extern "C" fn() -> usize;
type SetStream = unsafe extern "C" fn(Pointer, Pointer) -> Status;
/// Descriptor, then seven numbers at most.
type SetTensor = unsafe extern "C" fn(Pointer, c_int, c_int, c_int, c_int, c_int, c_int) -> Status;
type SetConvolution =
    unsafe extern "C" fn(Pointer, c_int, c_int, c_int, c_int, c_int, c_int, c_int, c_int) -> Status;
type SetNumber = unsafe extern "C" fn(Pointer, c_int) -> Status;
/// Handle, two operands with descriptors, the convolution, the result with its descriptor, how many
/// algorithms may be returned, how many are, the algorithms, workspace.
type Find = unsafe extern "C" fn(
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    c_int,
    *mut c_int,
    *mut Algorithm,
    Pointer,
    usize,
) -> Status;
/// Handle, alpha, two operands with descriptors, the convolution, algorithm, workspace, beta, the
/// result with its descriptor.
type Convolve = unsafe extern "C" fn(
    Pointer,
    *const f32,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    c_int,
    Pointer,
    usize,
    *const f32,
    Pointer,
    Pointer,
) -> Status;
type BackwardBias = unsafe extern "C" fn(
    Pointer,
    *const f32,
    Pointer,
    Pointer,
    *const f32,
    Pointer,
    Pointer,
) -> Status;

/// `cudnnConvolutionFwdAlgoPerf_t` and its two brothers, which have the same fields.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Algorithm {
    number: c_int,
    status: Status,
    milliseconds: f32,
    memory: usize,
    determinism: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

/// The library, opened, with a handle on the stream that is measured.
pub(crate) struct Cudnn {
    handle: Pointer,
    workspace: Tensor<f32>,
    /// Its name and version.
    pub(crate) name: String,
    library: Library,
}

impl Cudnn {
    /// Opens the library for the stream of `device`, a GPU.
    pub(crate) fn open(device: &Device) -> anyhow::Result<Self> {
        let mut path =
            std::env::var_os(PATH_VARIABLE).map_or_else(|| FILE_NAME.into(), PathBuf::from);
        if path.is_dir() {
            path.push(FILE_NAME);
        }
        // SAFETY: the initialisers of cuDNN have no preconditions.
        let library = unsafe { Library::new(&path) }
            .with_context(|| format!("cuDNN 9 is not to be had; name it in {PATH_VARIABLE}"))?;
        let mut handle = ptr::null_mut();
        // SAFETY: the types are those of cuDNN's headers; the stream lives as long as `device`,
        // which the workspace holds.
        let version = unsafe {
            check("cudnnCreate", symbol::<Create>(&library, "cudnnCreate")?(&raw mut handle))?;
            let stream = device.stream().as_raw() as Pointer;
            let set_stream = symbol::<SetStream>(&library, "cudnnSetStream")?;
            check("cudnnSetStream", set_stream(handle, stream))?;
            symbol::<GetVersion>(&library, "cudnnGetVersion")?()
        };
        let (major, minor) = (version / 10_000, version / 100 % 100);
        let name = format!("cuDNN {major}.{minor}.{}", version % 100);
        let workspace = Tensor::zeros(device, [WORKSPACE_BYTES / size_of::<f32>()])?;
        Ok(Self { handle, workspace, name, library })
    }

    /// Prepares a pass over `operands`, whose memory, like that of `results`, the calls use.
    pub(crate) fn prepare<T: Element>(
        &self,
        pass: Pass,
        operands: &Operands<T>,
        results: &Results<T>,
    ) -> anyhow::Result<Prepared<'_>> {
        let Convolution { batch, in_channels, out_channels, length, taps, groups } =
            operands.convolution;
        let data = match T::DTYPE {
            DType::F16 => DATA_HALF,
            DType::BF16 => DATA_BFLOAT16,
            _ => DATA_FLOAT,
        };
        let format = match operands.layout {
            SequenceLayout::Ncl => FORMAT_NCHW,
            SequenceLayout::Nlc => FORMAT_NHWC,
        };
        let tensor = |channels: usize, length: usize, batch: usize| {
            let numbers = [format, data, int(batch)?, int(channels)?, 1, int(length)?];
            self.descriptor("Tensor", "cudnnSetTensor4dDescriptor", numbers)
        };
        // cuDNN pads both sides alike: for an even number of taps, one less than ours.
        let pad = (taps - 1) / 2;
        let x = tensor(in_channels, length, batch)?;
        let y = tensor(out_channels, length + 2 * pad + 1 - taps, batch)?;
        let bias = tensor(out_channels, 1, 1)?;
        // The filter lies as the data do, so as `[out, tap, in]` for channels last: the same
        // numbers of a random filter in another order.
        let numbers = [data, format, int(out_channels)?, int(in_channels / groups)?, 1, int(taps)?];
        let w = self.descriptor("Filter", "cudnnSetFilter4dDescriptor", numbers)?;
        let convolution = self.created("Convolution")?;
        let math = if T::DTYPE == DType::F32 { MATH_FMA } else { MATH_TENSOR_OP };
        // SAFETY: the types are those of cuDNN's headers, the descriptor is alive.
        unsafe {
            let set = "cudnnSetConvolution2dDescriptor";
            let function = symbol::<SetConvolution>(&self.library, set)?;
            let (raw, mode) = (convolution.raw, CROSS_CORRELATION);
            check(set, function(raw, 0, int(pad)?, 1, 1, 1, 1, mode, DATA_FLOAT))?;
            let set = "cudnnSetConvolutionGroupCount";
            check(set, symbol::<SetNumber>(&self.library, set)?(raw, int(groups)?))?;
            let set = "cudnnSetConvolutionMathType";
            check(set, symbol::<SetNumber>(&self.library, set)?(raw, math))?;
        }
        let address = |tensor: &Tensor<T>| tensor.as_device_ptr() as Pointer;
        let (at_x, at_w, at_dz) =
            (address(&operands.x), address(&operands.w), address(&operands.dz));
        let sequences = address(&results.sequences);
        let (find, run, operands, result) = match pass {
            Pass::Forward => (
                "cudnnFindConvolutionForwardAlgorithmEx",
                "cudnnConvolutionForward",
                [(x.raw, at_x), (w.raw, at_w)],
                (y.raw, sequences),
            ),
            Pass::Dgrad => (
                "cudnnFindConvolutionBackwardDataAlgorithmEx",
                "cudnnConvolutionBackwardData",
                [(w.raw, at_w), (y.raw, at_dz)],
                (x.raw, sequences),
            ),
            Pass::Wgrad => (
                "cudnnFindConvolutionBackwardFilterAlgorithmEx",
                "cudnnConvolutionBackwardFilter",
                [(x.raw, at_x), (y.raw, at_dz)],
                (w.raw, address(&results.dw)),
            ),
        };
        let mut algorithms = [Algorithm::default(); MAX_ALGORITHMS];
        let mut count = 0;
        // SAFETY: the types are those of cuDNN's headers; descriptors describe the tensors, all of
        // which, and the workspace, are alive.
        let (function, bias_function) = unsafe {
            check(
                find,
                symbol::<Find>(&self.library, find)?(
                    self.handle,
                    operands[0].0,
                    operands[0].1,
                    operands[1].0,
                    operands[1].1,
                    convolution.raw,
                    result.0,
                    result.1,
                    MAX_ALGORITHMS as c_int,
                    &raw mut count,
                    algorithms.as_mut_ptr(),
                    self.workspace.as_device_ptr() as Pointer,
                    WORKSPACE_BYTES,
                ),
            )?;
            let bias_function = symbol(&self.library, "cudnnConvolutionBackwardBias")?;
            (symbol(&self.library, run)?, bias_function)
        };
        // Fastest first; an algorithm that failed has a status.
        let best = algorithms[..count as usize]
            .iter()
            .find(|algorithm| algorithm.status == 0 && algorithm.memory <= WORKSPACE_BYTES)
            .context("cuDNN has no algorithm for this")?;
        Ok(Prepared {
            library: self,
            function,
            bias_function,
            operands,
            result,
            algorithm: *best,
            bias: (pass == Pass::Wgrad).then(|| (bias.raw, address(&results.db))),
            computes_bias: pass == Pass::Wgrad,
            convolution: convolution.raw,
            _descriptors: [x, y, bias, w, convolution],
        })
    }

    fn created(&self, kind: &'static str) -> anyhow::Result<Descriptor> {
        let mut raw = ptr::null_mut();
        // SAFETY: the types are those of cuDNN's headers.
        let destroy = unsafe {
            let name = format!("cudnnCreate{kind}Descriptor");
            check("cudnnCreate…Descriptor", symbol::<Create>(&self.library, &name)?(&raw mut raw))?;
            symbol::<Destroy>(&self.library, &format!("cudnnDestroy{kind}Descriptor"))?
        };
        Ok(Descriptor { raw, destroy })
    }

    fn descriptor(
        &self,
        kind: &'static str,
        set: &'static str,
        [a, b, c, d, e, f]: [c_int; 6],
    ) -> anyhow::Result<Descriptor> {
        let descriptor = self.created(kind)?;
        // SAFETY: the type is that of cuDNN's headers, the descriptor is alive.
        unsafe {
            let function = symbol::<SetTensor>(&self.library, set)?;
            check(set, function(descriptor.raw, a, b, c, d, e, f))?;
        }
        Ok(descriptor)
    }
}

/// A descriptor of cuDNN's.
struct Descriptor {
    raw: Pointer,
    destroy: Destroy,
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: created by the library, which its borrower keeps open, and destroyed once.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// A pass that cuDNN is ready to compute, again and again on one stream.
pub(crate) struct Prepared<'a> {
    library: &'a Cudnn,
    function: Convolve,
    bias_function: BackwardBias,
    operands: [(Pointer, Pointer); 2],
    result: (Pointer, Pointer),
    algorithm: Algorithm,
    /// Where the bias gradient goes, in wgrad.
    bias: Option<(Pointer, Pointer)>,
    /// Whether the bias gradient belongs to the pass.
    computes_bias: bool,
    convolution: Pointer,
    _descriptors: [Descriptor; 5],
}

impl Prepared<'_> {
    /// Enqueues the pass.
    pub(crate) fn enqueue(&self) -> anyhow::Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let [(a_desc, a), (b_desc, b)] = self.operands;
        // SAFETY: as `Cudnn::prepare`, whose caller keeps operands and results alive.
        check("a convolution", unsafe {
            (self.function)(
                self.library.handle,
                &raw const one,
                a_desc,
                a,
                b_desc,
                b,
                self.convolution,
                self.algorithm.number,
                self.library.workspace.as_device_ptr() as Pointer,
                WORKSPACE_BYTES,
                &raw const zero,
                self.result.0,
                self.result.1,
            )
        })?;
        let Some((bias_desc, bias)) = self.bias else { return Ok(()) };
        // SAFETY: as above.
        check("cudnnConvolutionBackwardBias", unsafe {
            let handle = self.library.handle;
            (self.bias_function)(
                handle,
                &raw const one,
                b_desc,
                b,
                &raw const zero,
                bias_desc,
                bias,
            )
        })
    }

    /// Leaves the bias gradient out, which cuDNN does not compute for every type.
    pub(crate) fn drop_bias(&mut self) {
        self.bias = None;
    }

    /// The algorithm, whether it gives the same bits every time, and what is left out.
    pub(crate) fn algorithm(&self) -> String {
        let kind = if self.algorithm.determinism == 1 { "" } else { ", not deterministic" };
        let without = if self.computes_bias == self.bias.is_some() { "" } else { ", no bias" };
        format!("algorithm {}{kind}{without}", self.algorithm.number)
    }
}

fn int(value: usize) -> anyhow::Result<c_int> {
    c_int::try_from(value).context("an extent beyond cuDNN's")
}

fn check(call: &str, status: Status) -> anyhow::Result<()> {
    ensure!(status == 0, "{call} returned cuDNN's status {status}");
    Ok(())
}
