"""Y = relu(X·W + b) in Triton, four ways to load and schedule.

X is [m, k], W is [k, n], Y is [m, n], all row-major and of one 16-bit type; the bias is [n]. Products
are accumulated in f32 and rounded once. `VARIANTS` lists them with the configurations among which
`fastest` picks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_at(index, tiles_m, tiles_n, group_m: tl.constexpr):
    """Row and column of the tile visited `index`th: groups of rows, so that neighbours share L2."""
    group_tiles = group_m * tiles_n
    first_row = index // group_tiles * group_m
    rows = min(tiles_m - first_row, group_m)
    return first_row + index % group_tiles % rows, index % group_tiles // rows


@triton.jit
def finish(accumulator, bias, column, n, block_n: tl.constexpr):
    """Adds the bias of the tile's columns and applies the activation."""
    columns = column + tl.arange(0, block_n)
    addend = tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
    return tl.maximum(accumulator + addend[None, :], 0.0)


@triton.jit
def gemm_pointers(
    x, w, bias, y, m, n, k,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, group_m: tl.constexpr,
):
    """One program per tile, loads through a pointer for each element."""
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(m, block_m), tl.cdiv(n, block_n), group_m)
    rows = tile_m * block_m + tl.arange(0, block_m)
    columns = tile_n * block_n + tl.arange(0, block_n)
    depths = tl.arange(0, block_k)
    # Addresses beyond the edge wrap around: what they load is never stored.
    x_at = x + (rows % m)[:, None] * k + depths[None, :]
    w_at = w + depths[:, None] * n + (columns % n)[None, :]
    accumulator = tl.zeros((block_m, block_n), tl.float32)
    for step in tl.range(0, tl.cdiv(k, block_k)):
        left = k - step * block_k
        x_tile = tl.load(x_at, mask=depths[None, :] < left, other=0.0)
        w_tile = tl.load(w_at, mask=depths[:, None] < left, other=0.0)
        accumulator = tl.dot(x_tile, w_tile, accumulator)
        x_at += block_k
        w_at += block_k * n
    result = finish(accumulator, bias, tile_n * block_n, n, block_n).to(y.dtype.element_ty)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(y + rows[:, None] * n + columns[None, :], result, mask=mask)


@triton.jit
def gemm_tma(
    x_map, w_map, bias, y_map, m, n, k,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, group_m: tl.constexpr,
):
    """One program per tile, loads and stores through tensor maps."""
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(m, block_m), tl.cdiv(n, block_n), group_m)
    row, column = tile_m * block_m, tile_n * block_n
    accumulator = tl.zeros((block_m, block_n), tl.float32)
    for step in range(tl.cdiv(k, block_k)):
        x_tile = x_map.load([row, step * block_k])
        w_tile = w_map.load([step * block_k, column])
        accumulator = tl.dot(x_tile, w_tile, accumulator)
    result = finish(accumulator, bias, column, n, block_n).to(y_map.dtype)
    y_map.store([row, column], result)


@triton.jit
def gemm_tma_specialised(
    x_map, w_map, bias, y, m, n, k,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, group_m: tl.constexpr,
):
    """As `gemm_tma`, but other warps load than multiply. The compiler divides the rows of a tile of
    128 among two groups of warps, and then cannot store through a tensor map of the whole tile."""
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(m, block_m), tl.cdiv(n, block_n), group_m)
    row, column = tile_m * block_m, tile_n * block_n
    accumulator = tl.zeros((block_m, block_n), tl.float32)
    for step in tl.range(0, tl.cdiv(k, block_k), warp_specialize=True):
        x_tile = x_map.load([row, step * block_k])
        w_tile = w_map.load([step * block_k, column])
        accumulator = tl.dot(x_tile, w_tile, accumulator)
    result = finish(accumulator, bias, column, n, block_n).to(y.dtype.element_ty)
    rows, columns = row + tl.arange(0, block_m), column + tl.arange(0, block_n)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(y + rows[:, None] * n + columns[None, :], result, mask=mask)


@triton.jit
def gemm_tma_persistent(
    x_map, w_map, bias, y_map, m, n, k,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, group_m: tl.constexpr,
    multiprocessors: tl.constexpr, halves: tl.constexpr,
):
    """One program per multiprocessor, which goes through its tiles; loads of the next tile overlap
    the stores of the last, because both loops are one to the pipeliner. With `halves`, a tile is
    stored as two halves of its columns, through half as much shared memory."""
    tiles_m, tiles_n = tl.cdiv(m, block_m), tl.cdiv(n, block_n)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, multiprocessors, flatten=True):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        row, column = tile_m * block_m, tile_n * block_n
        accumulator = tl.zeros((block_m, block_n), tl.float32)
        for step in range(tl.cdiv(k, block_k)):
            x_tile = x_map.load([row, step * block_k])
            w_tile = w_map.load([step * block_k, column])
            accumulator = tl.dot(x_tile, w_tile, accumulator)
        result = finish(accumulator, bias, column, n, block_n)
        if halves:
            pair = tl.permute(tl.reshape(result, (block_m, 2, block_n // 2)), (0, 2, 1))
            left, right = tl.split(pair)
            y_map.store([row, column], left.to(y_map.dtype))
            y_map.store([row, column + block_n // 2], right.to(y_map.dtype))
        else:
            y_map.store([row, column], result.to(y_map.dtype))


@dataclass(frozen=True)
class Config:
    """What a variant is compiled for."""

    block_m: int
    block_n: int
    stages: int
    warps: int
    halves: bool = False
    block_k: int = 64
    group_m: int = 8

    def __str__(self):
        halves = " halves" if self.halves else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} {self.stages} stages {self.warps} warps{halves}"

    def constants(self):
        names = ("block_m", "block_n", "block_k", "group_m")
        return {name: getattr(self, name) for name in names}

    def options(self):
        return {"num_stages": self.stages, "num_warps": self.warps}

    def tiles(self, m, n):
        return triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n)


def launch_pointers(config, x, w, bias, y):
    m, k = x.shape
    n = w.shape[1]
    grid = (config.tiles(m, n),)
    return lambda: gemm_pointers[grid](
        x, w, bias, y, m, n, k, **config.constants(), **config.options()
    )


def maps(config, x, w, y):
    """Tensor maps of the operands. Triton encodes them at each launch, which a captured graph keeps,
    so that their encoding is not timed."""
    y_columns = config.block_n // 2 if config.halves else config.block_n
    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, [config.block_k, config.block_n]),
        TensorDescriptor.from_tensor(y, [config.block_m, y_columns]),
    )


def launch_tma(config, x, w, bias, y):
    m, k = x.shape
    n = w.shape[1]
    x_map, w_map, y_map = maps(config, x, w, y)
    grid = (config.tiles(m, n),)
    return lambda: gemm_tma[grid](
        x_map, w_map, bias, y_map, m, n, k, **config.constants(), **config.options()
    )


def launch_tma_specialised(config, x, w, bias, y):
    m, k = x.shape
    n = w.shape[1]
    x_map, w_map, _ = maps(config, x, w, y)
    grid = (config.tiles(m, n),)
    return lambda: gemm_tma_specialised[grid](
        x_map, w_map, bias, y, m, n, k, **config.constants(), **config.options()
    )


def launch_tma_persistent(config, x, w, bias, y):
    m, k = x.shape
    n = w.shape[1]
    x_map, w_map, y_map = maps(config, x, w, y)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    grid = (min(config.tiles(m, n), multiprocessors),)
    return lambda: gemm_tma_persistent[grid](
        x_map, w_map, bias, y_map, m, n, k, multiprocessors=multiprocessors, halves=config.halves,
        **config.constants(), **config.options(),
    )


VARIANTS = {
    "Triton pointers": (
        launch_pointers,
        [Config(128, 256, 3, 8), Config(128, 256, 4, 8)],
    ),
    "Triton TMA": (
        launch_tma,
        [Config(128, 256, 3, 8), Config(128, 256, 4, 8), Config(128, 128, 4, 4)],
    ),
    "Triton TMA warp-specialised": (
        launch_tma_specialised,
        [Config(128, 256, 3, 4), Config(128, 256, 4, 4), Config(128, 128, 4, 4)],
    ),
    "Triton TMA persistent": (
        launch_tma_persistent,
        [
            Config(128, 256, 3, 8),
            Config(128, 256, 3, 8, halves=True),
            Config(128, 256, 4, 8, halves=True),
            Config(128, 128, 4, 4),
            Config(128, 128, 3, 8),
        ],
    ),
}
