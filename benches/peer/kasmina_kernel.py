"""kasmina's own Hopper kernels, launched from Python beside its peers.

Loads the committed PTX and fills the parameters as `kasmina-host/src/gemm.rs` does: bf16, X [m, k],
W [k, n], bias and ReLU. Stages and tiles are read from `kasmina-kernels/src/gemm/hopper.rs`.
"""

import ctypes
import hashlib
import json
import re
import struct
from pathlib import Path

import torch
from cuda.bindings import driver

KERNELS = Path(__file__).resolve().parents[2] / "kasmina-kernels"

BLOCK_K = SLAB_N = CONSUMER_M = 64
WARP_M = 16
GROUP_M = 16


def check(result):
    """What a call of the driver returns beside its status."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(status)
    return values[0] if len(values) == 1 else values


def ptx_digest():
    """As the benches write it: over all modules in the order of the manifest."""
    sha = hashlib.sha256()
    for module in json.loads((KERNELS / "ptx/manifest.json").read_text())["modules"]:
        sha.update((KERNELS / "ptx" / module["file"]).read_bytes())
    return sha.hexdigest()[:16]


def tensor_map(tensor, box_columns, box_rows):
    """Of a row-major bf16 matrix: 128-byte swizzle, zeros beyond the edges."""
    rows, columns = tensor.shape
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            tensor.data_ptr(),
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(columns * 2)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return b"".join(int(word).to_bytes(8, "little") for word in encoded.opaque)


class Kernel:
    """The kernel of one output tile."""

    def __init__(self, block_m, block_n):
        self.block_m, self.block_n = block_m, block_n
        self.entry = f"gemm_bf16_kn_{block_m}x{block_n}x{BLOCK_K}"
        rows = (KERNELS / "src/gemm/hopper.rs").read_text()
        row = re.search(rf"{self.entry}:.* (\d+) stages, 1 split, 1 share;", rows)
        ptx_file = KERNELS / f"ptx/hopper/{self.entry}.ptx"
        if row is None or not ptx_file.exists():
            raise RuntimeError(f"there is no kernel {self.entry}")
        ptx = ptx_file.read_text()
        self.stages = int(row[1])
        self.parameter_bytes = int(re.search(r"_param_0\[(\d+)\]", ptx)[1])
        consumers = block_m // CONSUMER_M
        self.block_dim = 128 * (1 + consumers)
        slab_buffers = 2 if block_n > SLAB_N else 1
        # Stages, slabs of the epilogue, bias, and two barriers per stage: `Tile::smem_bytes`.
        self.smem_bytes = (
            self.stages * (block_m + block_n) * BLOCK_K * 2
            + consumers * slab_buffers * CONSUMER_M * SLAB_N * 2
            + consumers * block_n * 4
            + self.stages * 16
        )
        self.module = check(driver.cuModuleLoadData(ptx.encode() + b"\0"))
        self.function = check(driver.cuModuleGetFunction(self.module, self.entry.encode()))
        attributes = driver.CUfunction_attribute
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self.function, dynamic, self.smem_bytes))
        self.registers = check(
            driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_NUM_REGS, self.function)
        )

    def resources(self):
        return {
            "config": f"{self.block_m}x{self.block_n}x{BLOCK_K} {self.stages} stages",
            "registers": self.registers,
            "shared_bytes": self.smem_bytes,
            "threads": self.block_dim,
        }

    def launcher(self, x, w, bias, y):
        """Enqueues Y = relu(X·W + b) on the current stream, whenever it is called."""
        m, k = x.shape
        n = w.shape[1]
        tiles_m, tiles_n = -(-m // self.block_m), -(-n // self.block_n)
        x_rows = min(self.block_m, -(-m // 8) * 8)
        # Each warp stores its own rows in the widest tiles: `Tile::stores_by_warp`.
        store_rows = WARP_M if self.block_n == 256 else CONSUMER_M
        # Seven coefficients and the hold of the sigmoid form, which ReLU does not use; the lower
        # bound 0, and 0 for the piecewise-linear form. Then the bytes of a stage's boxes.
        stage_bytes = (x_rows + self.block_n) * BLOCK_K * 2
        relu = struct.pack("<9f2I", *[0.0] * 9, 0, stage_bytes)
        parameters = (
            tensor_map(x, BLOCK_K, x_rows)
            + tensor_map(w, SLAB_N, BLOCK_K)
            + tensor_map(y, SLAB_N, store_rows)
            + struct.pack("<Q5I", bias.data_ptr(), n, -(-k // BLOCK_K), tiles_m, tiles_n, GROUP_M)
            + relu
            # `PlainRows::NONE`: TMA stores Y.
            + struct.pack("<2Q2I", 0, 0, 0, 0)
        )
        if len(parameters) != self.parameter_bytes:
            raise RuntimeError(
                f"{self.entry} takes {self.parameter_bytes} bytes of parameters, not "
                f"{len(parameters)}: bring this file in line with HopperGemmParams"
            )
        buffer = ctypes.create_string_buffer(parameters, len(parameters))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        overlap = driver.CUlaunchAttribute()
        overlap.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        allowed = driver.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        overlap.value = allowed
        config = driver.CUlaunchConfig()
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        config.gridDimX = min(tiles_m * tiles_n, multiprocessors)
        config.gridDimY = config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.block_dim, 1, 1
        config.sharedMemBytes = self.smem_bytes
        config.attrs, config.numAttrs = [overlap], 1

        def enqueue():
            config.hStream = torch.cuda.current_stream().cuda_stream
            check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(arguments), 0))

        # `arguments` holds no more than the address of `buffer`.
        enqueue.parameters = buffer
        return enqueue
