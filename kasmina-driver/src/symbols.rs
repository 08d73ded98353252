//! The driver's functions, one row each.
//!
//! A row becomes a function of the driver's own name that looks its symbol up on first use, calls
//! it, and passes its result through [`conclude`]. From then on a call costs one atomic load and
//! one indirect call more than a direct one.
//!
//! Where NVIDIA changed a function, the new one carries a suffix (`cuMemAlloc_v2`) and the library
//! keeps the old one, so each name here means the same in every driver that has it.

use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_ushort, c_void};
use core::mem;
use core::ptr::NonNull;

use cust_raw::{
    CUDA_ARRAY3D_DESCRIPTOR, CUDA_EXTERNAL_MEMORY_BUFFER_DESC, CUDA_EXTERNAL_MEMORY_HANDLE_DESC,
    CUDA_KERNEL_NODE_PARAMS, CUDA_MEMCPY2D, CUDA_RESOURCE_DESC, CUDA_RESOURCE_VIEW_DESC,
    CUDA_TEXTURE_DESC, CUarray, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent,
    CUexternalMemory, CUfunc_cache, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec,
    CUgraphNode, CUgraphNodeType, CUhostFn, CUjit_option, CUjitInputType, CUlimit, CUlinkState,
    CUmem_advise, CUmodule, CUoccupancyB2DSize, CUpointer_attribute, CUresult, CUsharedconfig,
    CUstream, CUstreamCaptureMode, CUsurfObject, CUtexObject,
};

use crate::call::{conclude, unreachable_driver};
use crate::code;
use crate::launch::{CUlaunchConfig, FunctionAttribute};
use crate::loader::Symbol;
use crate::tensor_map::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};

/// One forwarding function.
macro_rules! forward {
    ($(#[$attribute:meta])* $name:ident($($argument:ident: $type:ty),*)) => {
        #[doc = concat!("`", stringify!($name), "` of the CUDA driver.")]
        ///
        /// # Safety
        ///
        /// The arguments satisfy what the CUDA Driver API reference asks of them for this function:
        /// handles are live, and pointers are valid for what the driver reads and writes through
        /// them for as long as the work lasts.
        $(#[$attribute])*
        pub unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
            static SYMBOL: Symbol = Symbol::new(stringify!($name));
            // The driver's result is an integer here: a newer driver returns codes that `CUresult`
            // does not have, and reading one as that type would be undefined behaviour.
            type Foreign = unsafe extern "C" fn($($type),*) -> u32;
            match SYMBOL.address() {
                Ok(address) => {
                    // SAFETY: the address is that of the driver's function of this name, whose C
                    // signature the row states; both types are one non-null code pointer.
                    let function = unsafe { mem::transmute::<NonNull<c_void>, Foreign>(address) };
                    // SAFETY: the caller vouches for the arguments, and the library stays open for
                    // as long as the process lives.
                    conclude(SYMBOL.name(), unsafe { function($($argument),*) })
                }
                Err(origin) => unreachable_driver(SYMBOL.name(), origin),
            }
        }
    };
}

/// Functions that `cust_raw` declares: exported, so that its declarations resolve to them, and
/// checked against its signatures by the compiler.
macro_rules! declared_by_cust_raw {
    ($($name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {$(
        const _: unsafe extern "C" fn($($type),*) -> CUresult = cust_raw::$name;
        forward! { #[unsafe(no_mangle)] $name($($argument: $type),*) }
    )*};
}

/// Functions newer than `cust_raw`, or whose arguments have values newer than its enums: only Rust
/// calls them, by path, so they are not exported.
macro_rules! newer_than_cust_raw {
    ($($name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {$(
        forward! {
            #[expect(non_snake_case, reason = "the driver's name")]
            $name($($argument: $type),*)
        }
    )*};
}

declared_by_cust_raw! {
    // Driver and devices
    cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice);
    cuDriverGetVersion(driver_version: *mut c_int);
    cuInit(flags: c_uint);

    // Contexts
    cuCtxCreate_v2(context: *mut CUcontext, flags: c_uint, device: CUdevice);
    cuCtxDestroy_v2(context: CUcontext);
    cuCtxGetApiVersion(context: CUcontext, version: *mut c_uint);
    cuCtxGetCacheConfig(config: *mut CUfunc_cache);
    cuCtxGetCurrent(context: *mut CUcontext);
    cuCtxGetDevice(device: *mut CUdevice);
    cuCtxGetFlags(flags: *mut c_uint);
    cuCtxGetLimit(value: *mut usize, limit: CUlimit);
    cuCtxGetSharedMemConfig(config: *mut CUsharedconfig);
    cuCtxGetStreamPriorityRange(least_priority: *mut c_int, greatest_priority: *mut c_int);
    cuCtxPopCurrent_v2(context: *mut CUcontext);
    cuCtxPushCurrent_v2(context: CUcontext);
    cuCtxSetCacheConfig(config: CUfunc_cache);
    cuCtxSetCurrent(context: CUcontext);
    cuCtxSetLimit(limit: CUlimit, value: usize);
    cuCtxSetSharedMemConfig(config: CUsharedconfig);
    cuCtxSynchronize();
    cuDevicePrimaryCtxRelease_v2(device: CUdevice);
    cuDevicePrimaryCtxReset_v2(device: CUdevice);
    cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    cuDevicePrimaryCtxSetFlags_v2(device: CUdevice, flags: c_uint);

    // Modules, linking and functions
    cuFuncGetAttribute(value: *mut c_int, attribute: CUfunction_attribute, function: CUfunction);
    cuFuncSetCacheConfig(function: CUfunction, config: CUfunc_cache);
    cuFuncSetSharedMemConfig(function: CUfunction, config: CUsharedconfig);
    cuLinkAddData_v2(
        state: CUlinkState, kind: CUjitInputType, data: *mut c_void, size: usize,
        name: *const c_char, num_options: c_uint, options: *mut CUjit_option,
        option_values: *mut *mut c_void,
    );
    cuLinkComplete(state: CUlinkState, cubin_out: *mut *mut c_void, size_out: *mut usize);
    cuLinkCreate_v2(
        num_options: c_uint, options: *mut CUjit_option, option_values: *mut *mut c_void,
        state_out: *mut CUlinkState,
    );
    cuLinkDestroy(state: CUlinkState);
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuModuleGetGlobal_v2(
        address: *mut CUdeviceptr, bytes: *mut usize, module: CUmodule, name: *const c_char,
    );
    cuModuleLoad(module: *mut CUmodule, path: *const c_char);
    cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    cuModuleLoadDataEx(
        module: *mut CUmodule, image: *const c_void, num_options: c_uint,
        options: *mut CUjit_option, option_values: *mut *mut c_void,
    );
    cuModuleUnload(module: CUmodule);

    // Occupancy and launch
    cuLaunchCooperativeKernel(
        function: CUfunction, grid_dim_x: c_uint, grid_dim_y: c_uint, grid_dim_z: c_uint,
        block_dim_x: c_uint, block_dim_y: c_uint, block_dim_z: c_uint, shared_mem_bytes: c_uint,
        stream: CUstream, kernel_params: *mut *mut c_void,
    );
    cuLaunchHostFunc(stream: CUstream, function: CUhostFn, user_data: *mut c_void);
    cuLaunchKernel(
        function: CUfunction, grid_dim_x: c_uint, grid_dim_y: c_uint, grid_dim_z: c_uint,
        block_dim_x: c_uint, block_dim_y: c_uint, block_dim_z: c_uint, shared_mem_bytes: c_uint,
        stream: CUstream, kernel_params: *mut *mut c_void, extra: *mut *mut c_void,
    );
    cuOccupancyAvailableDynamicSMemPerBlock(
        dynamic_smem_size: *mut usize, function: CUfunction, num_blocks: c_int, block_size: c_int,
    );
    cuOccupancyMaxActiveBlocksPerMultiprocessor(
        num_blocks: *mut c_int, function: CUfunction, block_size: c_int, dynamic_smem_size: usize,
    );
    cuOccupancyMaxPotentialBlockSize(
        min_grid_size: *mut c_int, block_size: *mut c_int, function: CUfunction,
        block_size_to_dynamic_smem_size: CUoccupancyB2DSize, dynamic_smem_size: usize,
        block_size_limit: c_int,
    );

    // Streams
    cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode);
    cuStreamCreate(stream: *mut CUstream, flags: c_uint);
    cuStreamCreateWithPriority(stream: *mut CUstream, flags: c_uint, priority: c_int);
    cuStreamDestroy_v2(stream: CUstream);
    cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph);
    cuStreamGetFlags(stream: CUstream, flags: *mut c_uint);
    cuStreamGetPriority(stream: CUstream, priority: *mut c_int);
    cuStreamQuery(stream: CUstream);
    cuStreamSynchronize(stream: CUstream);
    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint);

    // Events
    cuEventCreate(event: *mut CUevent, flags: c_uint);
    cuEventDestroy_v2(event: CUevent);
    cuEventElapsedTime(milliseconds: *mut f32, start: CUevent, end: CUevent);
    cuEventQuery(event: CUevent);
    cuEventRecord(event: CUevent, stream: CUstream);
    cuEventSynchronize(event: CUevent);

    // Graphs
    cuGraphAddKernelNode(
        node: *mut CUgraphNode, graph: CUgraph, dependencies: *const CUgraphNode,
        num_dependencies: usize, node_params: *const CUDA_KERNEL_NODE_PARAMS,
    );
    cuGraphCreate(graph: *mut CUgraph, flags: c_uint);
    cuGraphDebugDotPrint(graph: CUgraph, path: *const c_char, flags: c_uint);
    cuGraphDestroy(graph: CUgraph);
    cuGraphExecDestroy(exec: CUgraphExec);
    cuGraphGetEdges(
        graph: CUgraph, from: *mut CUgraphNode, to: *mut CUgraphNode, num_edges: *mut usize,
    );
    cuGraphGetNodes(graph: CUgraph, nodes: *mut CUgraphNode, num_nodes: *mut usize);
    cuGraphInstantiateWithFlags(exec: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong);
    cuGraphKernelNodeGetParams(node: CUgraphNode, node_params: *mut CUDA_KERNEL_NODE_PARAMS);
    cuGraphLaunch(exec: CUgraphExec, stream: CUstream);
    cuGraphNodeGetType(node: CUgraphNode, kind: *mut CUgraphNodeType);

    // Memory
    cuMemAdvise(address: CUdeviceptr, count: usize, advice: CUmem_advise, device: CUdevice);
    cuMemAllocAsync(address: *mut CUdeviceptr, byte_count: usize, stream: CUstream);
    cuMemAllocHost_v2(host: *mut *mut c_void, byte_count: usize);
    cuMemAllocManaged(address: *mut CUdeviceptr, byte_count: usize, flags: c_uint);
    cuMemAlloc_v2(address: *mut CUdeviceptr, byte_count: usize);
    cuMemFreeAsync(address: CUdeviceptr, stream: CUstream);
    cuMemFreeHost(host: *mut c_void);
    cuMemFree_v2(address: CUdeviceptr);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemHostAlloc(host: *mut *mut c_void, byte_count: usize, flags: c_uint);
    cuMemHostGetDevicePointer_v2(address: *mut CUdeviceptr, host: *mut c_void, flags: c_uint);
    cuMemPrefetchAsync(address: CUdeviceptr, count: usize, dst_device: CUdevice, stream: CUstream);
    cuPointerGetAttribute(data: *mut c_void, attribute: CUpointer_attribute, ptr: CUdeviceptr);

    // Copies and fills
    cuMemcpy2DAsync_v2(copy: *const CUDA_MEMCPY2D, stream: CUstream);
    cuMemcpy2D_v2(copy: *const CUDA_MEMCPY2D);
    cuMemcpyAtoH_v2(
        dst_host: *mut c_void, src_array: CUarray, src_offset: usize, byte_count: usize,
    );
    cuMemcpyDtoDAsync_v2(
        dst_device: CUdeviceptr, src_device: CUdeviceptr, byte_count: usize, stream: CUstream,
    );
    cuMemcpyDtoD_v2(dst_device: CUdeviceptr, src_device: CUdeviceptr, byte_count: usize);
    cuMemcpyDtoHAsync_v2(
        dst_host: *mut c_void, src_device: CUdeviceptr, byte_count: usize, stream: CUstream,
    );
    cuMemcpyDtoH_v2(dst_host: *mut c_void, src_device: CUdeviceptr, byte_count: usize);
    cuMemcpyHtoA_v2(
        dst_array: CUarray, dst_offset: usize, src_host: *const c_void, byte_count: usize,
    );
    cuMemcpyHtoDAsync_v2(
        dst_device: CUdeviceptr, src_host: *const c_void, byte_count: usize, stream: CUstream,
    );
    cuMemcpyHtoD_v2(dst_device: CUdeviceptr, src_host: *const c_void, byte_count: usize);
    cuMemsetD16Async(dst_device: CUdeviceptr, value: c_ushort, count: usize, stream: CUstream);
    cuMemsetD16_v2(dst_device: CUdeviceptr, value: c_ushort, count: usize);
    cuMemsetD32Async(dst_device: CUdeviceptr, value: c_uint, count: usize, stream: CUstream);
    cuMemsetD32_v2(dst_device: CUdeviceptr, value: c_uint, count: usize);
    cuMemsetD8Async(dst_device: CUdeviceptr, value: c_uchar, count: usize, stream: CUstream);
    cuMemsetD8_v2(dst_device: CUdeviceptr, value: c_uchar, count: usize);

    // Arrays, textures, surfaces and external memory
    cuArray3DCreate_v2(array: *mut CUarray, descriptor: *const CUDA_ARRAY3D_DESCRIPTOR);
    cuArray3DGetDescriptor_v2(descriptor: *mut CUDA_ARRAY3D_DESCRIPTOR, array: CUarray);
    cuArrayDestroy(array: CUarray);
    cuDestroyExternalMemory(memory: CUexternalMemory);
    cuExternalMemoryGetMappedBuffer(
        address: *mut CUdeviceptr, memory: CUexternalMemory,
        buffer_desc: *const CUDA_EXTERNAL_MEMORY_BUFFER_DESC,
    );
    cuImportExternalMemory(
        memory: *mut CUexternalMemory, mem_handle_desc: *const CUDA_EXTERNAL_MEMORY_HANDLE_DESC,
    );
    cuSurfObjectCreate(surface: *mut CUsurfObject, resource: *const CUDA_RESOURCE_DESC);
    cuSurfObjectDestroy(surface: CUsurfObject);
    cuSurfObjectGetResourceDesc(resource: *mut CUDA_RESOURCE_DESC, surface: CUsurfObject);
    cuTexObjectCreate(
        texture: *mut CUtexObject, resource: *const CUDA_RESOURCE_DESC,
        description: *const CUDA_TEXTURE_DESC, view: *const CUDA_RESOURCE_VIEW_DESC,
    );
    cuTexObjectDestroy(texture: CUtexObject);
    cuTexObjectGetResourceDesc(resource: *mut CUDA_RESOURCE_DESC, texture: CUtexObject);
}

newer_than_cust_raw! {
    cuFuncSetAttribute(function: CUfunction, attribute: FunctionAttribute, value: c_int);
    cuLaunchKernelEx(
        config: *const CUlaunchConfig, function: CUfunction, kernel_params: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    cuOccupancyMaxActiveClusters(
        num_clusters: *mut c_int, function: CUfunction, config: *const CUlaunchConfig,
    );
    cuTensorMapEncodeTiled(
        tensor_map: *mut CUtensorMap, data_type: CUtensorMapDataType, rank: u32,
        global_address: *mut c_void, global_dim: *const u64, global_strides: *const u64,
        box_dim: *const u32, element_strides: *const u32, interleave: CUtensorMapInterleave,
        swizzle: CUtensorMapSwizzle, l2_promotion: CUtensorMapL2promotion,
        oob_fill: CUtensorMapFloatOOBfill,
    );
}

/// `cuGetErrorString`, answered from the crate's own table.
///
/// `cust` prints its errors through this function and panics when it fails, as it would wherever
/// the error to print is that there is no driver. The table holds every code `cust` can ask for.
///
/// # Safety
///
/// `text` is null or valid for writing a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: CUresult, text: *mut *const c_char) -> CUresult {
    let Some(description) = code::describe(code::number(error)) else {
        return CUresult::CUDA_ERROR_INVALID_VALUE;
    };
    if text.is_null() {
        return CUresult::CUDA_ERROR_INVALID_VALUE;
    }
    // SAFETY: not null, so by this function's contract valid for the write.
    unsafe { text.write(description.meaning.as_ptr()) };
    CUresult::CUDA_SUCCESS
}
