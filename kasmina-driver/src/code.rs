//! The driver's result codes: their names, their meaning, and which of them `cust_raw` knows.

use core::ffi::CStr;

use cust_raw::CUresult;

/// What is known about a code.
pub(crate) struct Description {
    /// The driver's name for it.
    pub(crate) name: &'static str,
    /// What it means, with the remedy where there is one. A C string, because
    /// `cuGetErrorString` hands it out.
    pub(crate) meaning: &'static CStr,
}

/// The table, in two parts: codes that are variants of `CUresult` and codes that came later.
macro_rules! codes {
    (
        known_to_cust_raw { $($code:literal $name:ident $meaning:literal)* }
        newer { $($new_code:literal $new_name:ident $new_meaning:literal)* }
    ) => {
        /// What is known about `code`, if anything.
        pub(crate) const fn describe(code: u32) -> Option<Description> {
            let (name, meaning) = match code {
                $($code => (stringify!($name), $meaning),)*
                $($new_code => (stringify!($new_name), $new_meaning),)*
                _ => return None,
            };
            Some(Description { name, meaning })
        }

        /// The result for `code`: the variant of that number, or `CUDA_ERROR_UNKNOWN`.
        pub(crate) const fn fold(code: u32) -> CUresult {
            match code {
                $($code => CUresult::$name,)*
                _ => CUresult::CUDA_ERROR_UNKNOWN,
            }
        }

        /// The number of `result`. Having no wildcard, it proves that no variant was forgotten.
        pub(crate) const fn number(result: CUresult) -> u32 {
            match result {
                $(CUresult::$name => $code,)*
            }
        }

        $(const _: () = assert!(CUresult::$name as u32 == $code);)*
    };
}

codes! {
    known_to_cust_raw {
        0 CUDA_SUCCESS c"no error"
        1 CUDA_ERROR_INVALID_VALUE c"an argument is out of its permitted range"
        2 CUDA_ERROR_OUT_OF_MEMORY c"there is not enough memory"
        3 CUDA_ERROR_NOT_INITIALIZED c"the driver is not initialised"
        4 CUDA_ERROR_DEINITIALIZED c"the driver is shutting down"
        5 CUDA_ERROR_PROFILER_DISABLED c"the profiler is disabled"
        6 CUDA_ERROR_PROFILER_NOT_INITIALIZED c"the profiler is not initialised"
        7 CUDA_ERROR_PROFILER_ALREADY_STARTED c"the profiler is already started"
        8 CUDA_ERROR_PROFILER_ALREADY_STOPPED c"the profiler is already stopped"
        34 CUDA_ERROR_STUB_LIBRARY
            c"the library is the toolkit's stand-in for linking; install the NVIDIA driver"
        100 CUDA_ERROR_NO_DEVICE
            c"the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        101 CUDA_ERROR_INVALID_DEVICE c"there is no such GPU, or it does not support the operation"
        102 CUDA_ERROR_DEVICE_NOT_LICENSED c"the GPU is not licensed"
        200 CUDA_ERROR_INVALID_IMAGE c"the module is not valid PTX or machine code"
        201 CUDA_ERROR_INVALID_CONTEXT c"no valid context is current on this thread"
        202 CUDA_ERROR_CONTEXT_ALREADY_CURRENT c"the context is already current"
        205 CUDA_ERROR_MAP_FAILED c"memory could not be mapped"
        206 CUDA_ERROR_UNMAP_FAILED c"memory could not be unmapped"
        207 CUDA_ERROR_ARRAY_IS_MAPPED c"the array is mapped and cannot be destroyed"
        208 CUDA_ERROR_ALREADY_MAPPED c"the resource is already mapped"
        209 CUDA_ERROR_NO_BINARY_FOR_GPU c"the module holds no code for this GPU"
        210 CUDA_ERROR_ALREADY_ACQUIRED c"the resource is already acquired"
        211 CUDA_ERROR_NOT_MAPPED c"the resource is not mapped"
        212 CUDA_ERROR_NOT_MAPPED_AS_ARRAY c"the resource is not mapped as an array"
        213 CUDA_ERROR_NOT_MAPPED_AS_POINTER c"the resource is not mapped as a pointer"
        214 CUDA_ERROR_ECC_UNCORRECTABLE c"an uncorrectable memory error occurred; reset the GPU"
        215 CUDA_ERROR_UNSUPPORTED_LIMIT c"the GPU does not support this limit"
        216 CUDA_ERROR_CONTEXT_ALREADY_IN_USE c"the context is in use by another thread"
        217 CUDA_ERROR_PEER_ACCESS_UNSUPPORTED c"the GPUs cannot access each other's memory"
        218 CUDA_ERROR_INVALID_PTX c"the PTX does not compile"
        219 CUDA_ERROR_INVALID_GRAPHICS_CONTEXT c"the graphics context is invalid"
        220 CUDA_ERROR_NVLINK_UNCORRECTABLE c"an uncorrectable NVLink error occurred; reset the GPU"
        221 CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            c"the driver's PTX compiler library is missing; reinstall the NVIDIA driver"
        222 CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            c"the PTX is newer than the driver; update the NVIDIA driver"
        223 CUDA_ERROR_JIT_COMPILATION_DISABLED
            c"compilation of PTX is disabled; unset CUDA_DISABLE_PTX_JIT"
        224 CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY c"the GPU does not support this execution affinity"
        300 CUDA_ERROR_INVALID_SOURCE c"the device kernel source is invalid"
        301 CUDA_ERROR_FILE_NOT_FOUND c"the file was not found"
        302 CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND c"a symbol of a shared library was not found"
        303 CUDA_ERROR_SHARED_OBJECT_INIT_FAILED c"a shared library could not be initialised"
        304 CUDA_ERROR_OPERATING_SYSTEM c"a call to the operating system failed"
        400 CUDA_ERROR_INVALID_HANDLE c"a handle is not valid"
        401 CUDA_ERROR_ILLEGAL_STATE c"a resource is not in a state that permits the operation"
        500 CUDA_ERROR_NOT_FOUND c"the named symbol was not found"
        600 CUDA_ERROR_NOT_READY c"the work has not finished yet"
        700 CUDA_ERROR_ILLEGAL_ADDRESS c"a kernel accessed memory it must not; the context is lost"
        701 CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
            c"the launch needs more registers or threads than the GPU has"
        702 CUDA_ERROR_LAUNCH_TIMEOUT
            c"a kernel ran longer than the system permits; the context is lost"
        703 CUDA_ERROR_LAUNCH_INCOMPATIBLE_TEXTURING
            c"the kernel uses an incompatible texturing mode"
        704 CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED c"peer access is already enabled"
        705 CUDA_ERROR_PEER_ACCESS_NOT_ENABLED c"peer access is not enabled"
        708 CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE c"the primary context is already active"
        709 CUDA_ERROR_CONTEXT_IS_DESTROYED c"the context is destroyed"
        710 CUDA_ERROR_ASSERT c"an assertion failed in a kernel; the context is lost"
        711 CUDA_ERROR_TOO_MANY_PEERS c"peer access is enabled for too many GPUs"
        712 CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED c"the host memory is already registered"
        713 CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED c"the host memory is not registered"
        714 CUDA_ERROR_HARDWARE_STACK_ERROR c"a kernel corrupted its stack; the context is lost"
        715 CUDA_ERROR_ILLEGAL_INSTRUCTION
            c"a kernel executed an illegal instruction; the context is lost"
        716 CUDA_ERROR_MISALIGNED_ADDRESS
            c"a kernel accessed a misaligned address; the context is lost"
        717 CUDA_ERROR_INVALID_ADDRESS_SPACE
            c"a kernel used an address of the wrong memory space; the context is lost"
        718 CUDA_ERROR_INVALID_PC c"a kernel jumped to an invalid address; the context is lost"
        719 CUDA_ERROR_LAUNCH_FAILED c"a kernel failed; the context is lost"
        720 CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
            c"the cooperative grid does not fit on the GPU at once"
        800 CUDA_ERROR_NOT_PERMITTED c"the operation is not permitted"
        801 CUDA_ERROR_NOT_SUPPORTED c"the GPU or the driver does not support the operation"
        802 CUDA_ERROR_SYSTEM_NOT_READY
            c"the system is not ready; check that nvidia-fabricmanager is running"
        803 CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            c"libcuda and the kernel driver differ in version; restart the machine"
        804 CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
            c"the compatibility driver does not support this GPU; update the NVIDIA driver"
        805 CUDA_ERROR_MPS_CONNECTION_FAILED c"the MPS control daemon or server cannot be reached"
        806 CUDA_ERROR_MPS_RPC_FAILURE c"a call to the MPS server failed"
        807 CUDA_ERROR_MPS_SERVER_NOT_READY c"the MPS server is not ready"
        808 CUDA_ERROR_MPS_MAX_CLIENTS_REACHED c"the MPS server has too many clients"
        809 CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED c"the MPS server has too many connections"
        900 CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            c"the operation is not permitted while a stream is captured"
        901 CUDA_ERROR_STREAM_CAPTURE_INVALIDATED c"the capture was invalidated by an earlier error"
        902 CUDA_ERROR_STREAM_CAPTURE_MERGE c"the operation would merge two captures"
        903 CUDA_ERROR_STREAM_CAPTURE_UNMATCHED
            c"the stream is not part of the capture that is being ended"
        904 CUDA_ERROR_STREAM_CAPTURE_UNJOINED
            c"the capture has a fork that was not joined to its first stream"
        905 CUDA_ERROR_STREAM_CAPTURE_ISOLATION
            c"the operation would make the capture depend on the legacy stream"
        906 CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
            c"the operation would depend on the legacy stream implicitly"
        907 CUDA_ERROR_CAPTURED_EVENT
            c"the event was last recorded in a stream that is being captured"
        908 CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD c"the capture was begun by another thread"
        909 CUDA_ERROR_TIMEOUT c"a wait took longer than its limit"
        910 CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE
            c"the graph differs too much to be updated in place"
        911 CUDA_ERROR_EXTERNAL_DEVICE c"a device other than the GPU reported an error"
        999 CUDA_ERROR_UNKNOWN c"an unknown internal error occurred"
    }
    newer {
        36 CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER
            c"the driver is too old for the call; update the NVIDIA driver"
        46 CUDA_ERROR_DEVICE_UNAVAILABLE c"the GPU is busy or in exclusive use by another process"
        47 CUDA_ERROR_MULTICAST_RESOURCE_FULL c"the GPU has no room for another multicast object"
        225 CUDA_ERROR_UNSUPPORTED_DEVSIDE_SYNC
            c"the code synchronises on the device in a way the GPU does not support"
        226 CUDA_ERROR_CONTAINED c"a contained memory error ended the work; the context is lost"
        227 CUDA_ERROR_INSUFFICIENT_LOADER_VERSION
            c"the driver's loader is too old for the module; update the NVIDIA driver"
        402 CUDA_ERROR_LOSSY_QUERY c"the answer cannot be expressed without loss"
        721 CUDA_ERROR_TENSOR_MEMORY_LEAK
            c"a kernel ended without releasing its tensor memory; the context is lost"
        810 CUDA_ERROR_MPS_CLIENT_TERMINATED c"the MPS server ended this client"
        811 CUDA_ERROR_CDP_NOT_SUPPORTED c"the GPU does not support launches from kernels here"
        812 CUDA_ERROR_CDP_VERSION_MISMATCH
            c"the module was built for another version of launches from kernels"
        912 CUDA_ERROR_INVALID_CLUSTER_SIZE
            c"the cluster size does not suit the kernel, the grid or the GPU"
        913 CUDA_ERROR_FUNCTION_NOT_LOADED c"the function is not loaded and the call needs it to be"
        914 CUDA_ERROR_INVALID_RESOURCE_TYPE c"a resource is of the wrong type"
        915 CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION
            c"the resources are insufficient or do not apply"
        916 CUDA_ERROR_KEY_ROTATION c"a key rotation failed"
        917 CUDA_ERROR_STREAM_DETACHED c"the stream has lost the context it belonged to"
        918 CUDA_ERROR_GRAPH_RECAPTURE_FAILURE c"the graph could not be captured again"
        919 CUDA_ERROR_FABRIC_NOT_READY c"the NVLink fabric is not ready"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_codes_keep_their_number_and_others_become_unknown() {
        for code in 0..2000 {
            let result = fold(code);
            if number(result) != code {
                assert_eq!(result, CUresult::CUDA_ERROR_UNKNOWN, "{code}");
            }
        }
        assert_eq!(fold(222), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        assert_eq!(fold(912), CUresult::CUDA_ERROR_UNKNOWN);
        assert_eq!(fold(u32::MAX), CUresult::CUDA_ERROR_UNKNOWN);
    }

    #[test]
    fn newer_codes_have_a_name() {
        assert_eq!(describe(912).unwrap().name, "CUDA_ERROR_INVALID_CLUSTER_SIZE");
        assert!(describe(1).is_some() && describe(9).is_none());
    }
}
