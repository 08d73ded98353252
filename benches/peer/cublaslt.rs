//! cuBLASLt's matrix product with fused bias and activation.
//!
//! The library is opened at run time; its few functions and constants are declared here by hand,
//! as `cublasLt.h`, `cublas_api.h` and `library_types.h` of CUDA 12 and 13 give them.
//!
//! cuBLASLt is column-major. A row-major matrix read as column-major is its transpose, so
//! `Y = X·W + b` becomes `Yᵀ = Wᵀ·Xᵀ + b`, with the bias along the rows of `Yᵀ`, where cuBLASLt's
//! epilogue adds it. The products of the backward pass become such products the same way; the
//! epilogue of dW sums dZ on the side.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use anyhow::{Context, bail, ensure};
use kasmina::{Activation, DType, WeightLayout};
use libloading::Library;

use super::library::symbol;
use crate::products::operands::Problem;

/// Folders or files to look in before the loader's own places, separated by colons.
const PATH_VARIABLE: &str = "KASMINA_CUBLASLT";
const FILE_NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
const WORKSPACE_BYTES: usize = 64 << 20;
/// How many algorithms the heuristic may propose.
const MAX_ALGORITHMS: usize = 16;

const CUDA_R_32F: c_int = 0;
const CUDA_R_16F: c_int = 2;
const CUDA_R_16BF: c_int = 14;
/// f32 accumulation; for f32 operands full f32 products, not TF32.
const CUBLAS_COMPUTE_32F: c_int = 68;
/// As above, f32 operands rounded to TF32.
const CUBLAS_COMPUTE_32F_FAST_TF32: c_int = 77;
const CUBLAS_OP_N: i32 = 0;
const CUBLAS_OP_T: i32 = 1;
const DESC_TRANSA: c_int = 3;
const DESC_TRANSB: c_int = 4;
const DESC_EPILOGUE: c_int = 7;
const DESC_BIAS_POINTER: c_int = 8;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const EPILOGUE_BIAS: u32 = 4;
const EPILOGUE_RELU_BIAS: u32 = 6;
const EPILOGUE_GELU_BIAS: u32 = 36;
const EPILOGUE_DEFAULT: u32 = 1;
const EPILOGUE_BGRADA: u32 = 256;
const EPILOGUE_BGRADB: u32 = 512;

type Handle = *mut c_void;
type Descriptor = *mut c_void;
type Layout = *mut c_void;
type Preference = *mut c_void;
type Stream = *mut c_void;
/// `cublasStatus_t`; 0 is success.
type Status = c_int;

/// `cublasLtMatmulAlgo_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Proposal {
    algorithm: Algorithm,
    workspace_bytes: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

type Create = unsafe extern "C" fn(*mut Handle) -> Status;
type Destroy = unsafe extern "C" fn(*mut c_void) -> Status;
type GetVersion = unsafe extern "C" fn() -> usize;
type DescCreate = unsafe extern "C" fn(*mut Descriptor, c_int, c_int) -> Status;
type SetAttribute = unsafe extern "C" fn(*mut c_void, c_int, *const c_void, usize) -> Status;
type LayoutCreate = unsafe extern "C" fn(*mut Layout, c_int, u64, u64, i64) -> Status;
type PreferenceCreate = unsafe extern "C" fn(*mut Preference) -> Status;
type GetHeuristic = unsafe extern "C" fn(
    Handle,
    Descriptor,
    Layout,
    Layout,
    Layout,
    Layout,
    Preference,
    c_int,
    *mut Proposal,
    *mut c_int,
) -> Status;
type Multiply = unsafe extern "C" fn(
    Handle,
    Descriptor,
    *const c_void,
    *const c_void,
    Layout,
    *const c_void,
    Layout,
    *const c_void,
    *const c_void,
    Layout,
    *mut c_void,
    Layout,
    *const Algorithm,
    *mut c_void,
    usize,
    Stream,
) -> Status;

/// The library, opened.
pub(crate) struct CublasLt {
    destroy: Destroy,
    desc_create: DescCreate,
    desc_destroy: Destroy,
    desc_set: SetAttribute,
    layout_create: LayoutCreate,
    layout_destroy: Destroy,
    preference_create: PreferenceCreate,
    preference_destroy: Destroy,
    preference_set: SetAttribute,
    get_heuristic: GetHeuristic,
    multiply: Multiply,
    handle: Handle,
    /// How it multiplies.
    compute: c_int,
    /// Its name and version, and how it multiplies where that is not with full accuracy.
    pub(crate) name: String,
    /// Keeps the functions above mapped.
    _library: Library,
}

impl CublasLt {
    /// Opens the library. A CUDA context must be current.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let library = open_library()?;
        // SAFETY: the types are those of cublasLt.h, and the pointers are used only while
        // `library`, stored beside them, stays open.
        let (mut this, create) = unsafe {
            let version = symbol::<GetVersion>(&library, "cublasLtGetVersion")?();
            let create: Create = symbol(&library, "cublasLtCreate")?;
            let this = Self {
                destroy: symbol(&library, "cublasLtDestroy")?,
                desc_create: symbol(&library, "cublasLtMatmulDescCreate")?,
                desc_destroy: symbol(&library, "cublasLtMatmulDescDestroy")?,
                desc_set: symbol(&library, "cublasLtMatmulDescSetAttribute")?,
                layout_create: symbol(&library, "cublasLtMatrixLayoutCreate")?,
                layout_destroy: symbol(&library, "cublasLtMatrixLayoutDestroy")?,
                preference_create: symbol(&library, "cublasLtMatmulPreferenceCreate")?,
                preference_destroy: symbol(&library, "cublasLtMatmulPreferenceDestroy")?,
                preference_set: symbol(&library, "cublasLtMatmulPreferenceSetAttribute")?,
                get_heuristic: symbol(&library, "cublasLtMatmulAlgoGetHeuristic")?,
                multiply: symbol(&library, "cublasLtMatmul")?,
                handle: ptr::null_mut(),
                compute: CUBLAS_COMPUTE_32F,
                name: format!(
                    "cuBLASLt {}.{}.{}",
                    version / 10_000,
                    version / 100 % 100,
                    version % 100
                ),
                _library: library,
            };
            (this, create)
        };
        // SAFETY: `handle` is where the new handle is written.
        check("cublasLtCreate", unsafe { create(&raw mut this.handle) })?;
        Ok(this)
    }

    /// The same, allowed to round f32 operands to TF32.
    pub(crate) fn with_tf32(mut self) -> Self {
        self.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
        self.name.push_str(" TF32");
        self
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the handle came from cublasLtCreate, and every `Product` that borrows it is
            // gone. The status of a failing destruction has no one to act on it.
            unsafe { (self.destroy)(self.handle) };
        }
    }
}

fn open_library() -> anyhow::Result<Library> {
    let listed = std::env::var_os(PATH_VARIABLE).unwrap_or_default();
    let mut candidates: Vec<PathBuf> = Vec::new();
    for entry in std::env::split_paths(&listed).filter(|entry| !entry.as_os_str().is_empty()) {
        if entry.is_dir() {
            candidates.extend(FILE_NAMES.iter().map(|name| entry.join(name)));
        } else {
            candidates.push(entry);
        }
    }
    candidates.extend(FILE_NAMES.iter().map(PathBuf::from));
    candidates.iter().find_map(|path| open_path(path)).with_context(|| {
        format!("none of {FILE_NAMES:?} found; name its folder in {PATH_VARIABLE}")
    })
}

fn open_path(path: &Path) -> Option<Library> {
    // SAFETY: cuBLASLt's initialisers only register its kernels with the CUDA runtime.
    unsafe { Library::new(path) }.ok()
}

fn check(call: &str, status: Status) -> anyhow::Result<()> {
    ensure!(status == 0, "{call} returned status {status}");
    Ok(())
}

/// Device addresses of one set of operands, row-major and without gaps between rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// X of a forward pass.
    pub(crate) x: u64,
    /// W of a forward pass.
    pub(crate) w: u64,
    /// Y of a forward pass.
    pub(crate) y: u64,
}

/// A row-major product as cuBLASLt is to compute it: `D = B·A` for row-major matrices, that is
/// `Dᵀ = Aᵀ·Bᵀ` for column-major ones. In [`Operands`], A is `w`, B is `x` and D is `y`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Description {
    dtype: DType,
    /// Rows and columns in memory, row-major, and whether it counts as its transpose.
    a: ([usize; 2], bool),
    /// The same of B.
    b: ([usize; 2], bool),
    d: [usize; 2],
    epilogue: u32,
}

impl Description {
    /// `Y = act(X·W + b)`
    fn forward(problem: &Problem) -> anyhow::Result<Self> {
        let &Problem { m, n, k, dtype, layout, activation } = problem;
        let epilogue = match activation {
            Activation::None => EPILOGUE_BIAS,
            Activation::Relu => EPILOGUE_RELU_BIAS,
            Activation::GeluTanh => EPILOGUE_GELU_BIAS,
            other => bail!("cuBLASLt does not fuse {other:?}"),
        };
        let (rows, columns) = layout.rows_columns(k, n);
        let a = ([rows, columns], layout == WeightLayout::OutIn);
        Ok(Self { dtype, a, b: ([m, k], false), d: [m, n], epilogue })
    }

    /// `dX = dZ·Wᵀ`, with dZ as `x` and dX as `y`.
    pub(crate) fn input_gradient(problem: &Problem) -> Self {
        let &Problem { m, n, k, dtype, layout, .. } = problem;
        let (rows, columns) = layout.rows_columns(k, n);
        let a = ([rows, columns], layout == WeightLayout::InOut);
        Self { dtype, a, b: ([m, n], false), d: [m, k], epilogue: EPILOGUE_DEFAULT }
    }

    /// `dW = Xᵀ·dZ` and db in the place of the bias. In [`Operands`], dW is `y`; X is `x` and dZ
    /// `w` with the weight as `[in, out]`, the other way round with `[out, in]`.
    pub(crate) fn weight_gradient(problem: &Problem) -> Self {
        let &Problem { m, n, k, dtype, layout, .. } = problem;
        // dZ is A or B, and its columns are the rows or the columns of cuBLASLt's result.
        let (a, b, d, epilogue) = match layout {
            WeightLayout::InOut => (n, k, [k, n], EPILOGUE_BGRADA),
            WeightLayout::OutIn => (k, n, [n, k], EPILOGUE_BGRADB),
        };
        Self { dtype, a: ([m, a], false), b: ([m, b], true), d, epilogue }
    }

    /// As [`weight_gradient`](Self::weight_gradient), without db.
    pub(crate) fn weight_gradient_alone(problem: &Problem) -> Self {
        Self { epilogue: EPILOGUE_DEFAULT, ..Self::weight_gradient(problem) }
    }
}

/// A product that cuBLASLt is ready to compute.
pub(crate) struct Product<'a> {
    library: &'a CublasLt,
    descriptor: Descriptor,
    w: Layout,
    x: Layout,
    y: Layout,
    algorithms: Vec<Algorithm>,
    chosen: usize,
    /// Device address of [`WORKSPACE_BYTES`] bytes.
    workspace: u64,
    stream: Stream,
}

impl<'a> Product<'a> {
    /// Bytes of device memory that [`Self::new`] wants as its workspace.
    pub(crate) const WORKSPACE_BYTES: usize = WORKSPACE_BYTES;

    /// Whether cuBLASLt fuses this activation; its GELU is the tanh approximation.
    #[must_use]
    pub(crate) fn fuses(activation: Activation) -> bool {
        matches!(activation, Activation::None | Activation::Relu | Activation::GeluTanh)
    }

    /// Prepares the forward pass of `problem` for `stream`, as [`new`](Self::new) does.
    ///
    /// # Safety
    /// As [`new`](Self::new).
    pub(crate) unsafe fn forward(
        library: &'a CublasLt,
        problem: &Problem,
        bias: u64,
        workspace: u64,
        stream: Stream,
    ) -> anyhow::Result<Self> {
        let description = Description::forward(problem)?;
        // SAFETY: the caller's contract.
        unsafe { Self::new(library, &description, bias, workspace, stream) }
    }

    /// Prepares a product for `stream`; the heuristic's first proposal is chosen.
    ///
    /// # Safety
    /// `bias` is the device address of as many elements as the epilogue reads or writes, and
    /// `workspace` that of [`WORKSPACE_BYTES`] bytes that nothing else uses; both and `stream`
    /// outlive the result.
    pub(crate) unsafe fn new(
        library: &'a CublasLt,
        description: &Description,
        bias: u64,
        workspace: u64,
        stream: Stream,
    ) -> anyhow::Result<Self> {
        let mut this = Self {
            library,
            descriptor: ptr::null_mut(),
            w: ptr::null_mut(),
            x: ptr::null_mut(),
            y: ptr::null_mut(),
            algorithms: Vec::new(),
            chosen: 0,
            workspace,
            stream,
        };
        // SAFETY: `descriptor` is where the new descriptor is written.
        check("cublasLtMatmulDescCreate", unsafe {
            (library.desc_create)(&raw mut this.descriptor, library.compute, CUDA_R_32F)
        })?;
        let &Description { dtype, a: (a, transpose_a), b: (b, transpose_b), d, epilogue } =
            description;
        let operation = |transpose| if transpose { CUBLAS_OP_T } else { CUBLAS_OP_N };
        this.set(DESC_TRANSA, &operation(transpose_a))?;
        this.set(DESC_TRANSB, &operation(transpose_b))?;
        this.set(DESC_EPILOGUE, &epilogue)?;
        if epilogue != EPILOGUE_DEFAULT {
            this.set(DESC_BIAS_POINTER, &bias)?;
        }
        this.w = this.layout(dtype, a[1], a[0])?;
        this.x = this.layout(dtype, b[1], b[0])?;
        this.y = this.layout(dtype, d[1], d[0])?;
        this.algorithms = this.propose()?;
        Ok(this)
    }

    /// Takes the algorithm for which `time` returns least.
    pub(crate) fn tune(
        &mut self,
        mut time: impl FnMut(&Self) -> anyhow::Result<f64>,
    ) -> anyhow::Result<()> {
        let mut best = (f64::INFINITY, 0);
        for candidate in 0..self.algorithms.len() {
            self.chosen = candidate;
            // A proposal that turns out not to run is no candidate.
            if let Ok(microseconds) = time(self)
                && microseconds < best.0
            {
                best = (microseconds, candidate);
            }
        }
        ensure!(best.0.is_finite(), "none of cuBLASLt's proposals runs");
        self.chosen = best.1;
        Ok(())
    }

    /// Enqueues the product.
    ///
    /// # Safety
    /// The addresses are those of matrices as the problem describes them, on the stream's device,
    /// and they stay allocated until the stream is synchronised.
    pub(crate) unsafe fn enqueue(&self, operands: Operands) -> anyhow::Result<()> {
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: descriptor, layouts and algorithm belong together, the scales have the scale
        // type f32 and are read during the call; the caller vouches for the operands, and `new`'s
        // caller for workspace and stream.
        check("cublasLtMatmul", unsafe {
            (self.library.multiply)(
                self.library.handle,
                self.descriptor,
                (&raw const one).cast(),
                operands.w as *const c_void,
                self.w,
                operands.x as *const c_void,
                self.x,
                (&raw const zero).cast(),
                operands.y as *const c_void,
                self.y,
                operands.y as *mut c_void,
                self.y,
                &raw const self.algorithms[self.chosen],
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream,
            )
        })
    }

    fn set<T: Copy>(&self, attribute: c_int, value: &T) -> anyhow::Result<()> {
        // SAFETY: the callers pass the type that cublasLt.h gives for the attribute: i32 for the
        // transpositions, u32 for the epilogue, an address for the bias.
        check("cublasLtMatmulDescSetAttribute", unsafe {
            (self.library.desc_set)(
                self.descriptor,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        })
    }

    /// A column-major layout without gaps.
    fn layout(&self, dtype: DType, rows: usize, columns: usize) -> anyhow::Result<Layout> {
        let dtype = match dtype {
            DType::F32 => CUDA_R_32F,
            DType::F16 => CUDA_R_16F,
            DType::BF16 => CUDA_R_16BF,
            other => bail!("no cuBLASLt type for {other}"),
        };
        let mut layout = ptr::null_mut();
        // SAFETY: `layout` is where the new layout is written.
        check("cublasLtMatrixLayoutCreate", unsafe {
            (self.library.layout_create)(
                &raw mut layout,
                dtype,
                rows as u64,
                columns as u64,
                rows as i64,
            )
        })?;
        Ok(layout)
    }

    fn propose(&self) -> anyhow::Result<Vec<Algorithm>> {
        let library = self.library;
        let mut preference = ptr::null_mut();
        // SAFETY: `preference` is where the new preference is written.
        check("cublasLtMatmulPreferenceCreate", unsafe {
            (library.preference_create)(&raw mut preference)
        })?;
        let mut proposals = [Proposal::default(); MAX_ALGORITHMS];
        let mut count = 0;
        // SAFETY: the attribute is a size_t; `proposals` has room for the number asked for; the
        // preference is not used after it is destroyed.
        let (set, found) = unsafe {
            let set = (library.preference_set)(
                preference,
                PREF_MAX_WORKSPACE_BYTES,
                ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of::<usize>(),
            );
            let found = (library.get_heuristic)(
                library.handle,
                self.descriptor,
                self.w,
                self.x,
                self.y,
                self.y,
                preference,
                MAX_ALGORITHMS as c_int,
                proposals.as_mut_ptr(),
                &raw mut count,
            );
            (library.preference_destroy)(preference);
            (set, found)
        };
        check("cublasLtMatmulPreferenceSetAttribute", set)?;
        check("cublasLtMatmulAlgoGetHeuristic", found)?;
        let usable: Vec<Algorithm> = proposals[..count as usize]
            .iter()
            .filter(|proposal| proposal.state == 0 && proposal.workspace_bytes <= WORKSPACE_BYTES)
            .map(|proposal| proposal.algorithm)
            .collect();
        ensure!(!usable.is_empty(), "cuBLASLt proposes no algorithm");
        Ok(usable)
    }
}

impl Drop for Product<'_> {
    fn drop(&mut self) {
        let layout_destroy = self.library.layout_destroy;
        for (destroy, object) in [
            (layout_destroy, self.w),
            (layout_destroy, self.x),
            (layout_destroy, self.y),
            (self.library.desc_destroy, self.descriptor),
        ] {
            if !object.is_null() {
                // SAFETY: the object came from the matching create function, and cuBLASLt reads
                // it only while it enqueues.
                unsafe { destroy(object) };
            }
        }
    }
}
