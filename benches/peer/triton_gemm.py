#!/usr/bin/env python3
"""Y = relu(X·W + b) in bf16: kasmina's kernel, cuBLASLt, PyTorch and Triton in one process, by turns.

Needs a Hopper GPU, PyTorch, Triton and cuda.bindings, and no Rust. Operands and regimes are those of
`cargo bench --bench gemm`, which benches/results/README.md describes; calls are recorded into CUDA
graphs, so that no contender is timed by how fast Python enqueues it. With --json FILE, each
contender appends a JSON line per shape and regime: `contender` says who was measured, `peer` is
cuBLASLt, and `ratio` is cuBLASLt's time over that of the contender. `cargo xtask perf report FILE`
makes a table of them.

    python3 benches/peer/triton_gemm.py --json triton.jsonl
"""

import argparse
import json
import statistics

import torch
import triton

import kasmina_kernel
import triton_kernels
from timing import REST, Contender, clock_reader, flush_buffer, provenance, quantile

SHAPES = "8192x8192x8192,4096x4096x4096,4096x14336x4096,16384x4096x4096"
CUBLASLT = "cuBLASLt"
# PyTorch takes the first algorithm that the heuristic proposes.
CUBLASLT_OF_TORCH = f"{CUBLASLT} of PyTorch {torch.__version__}"
KASMINA = "kasmina"
# Measured only when named: with Triton 3.6 on an H200 its kernel never ended, and a kernel that
# hangs takes the whole run with it.
ONLY_WHEN_NAMED = {"Triton TMA warp-specialised"}


class Operands:
    """As many sets as it takes for each call to find its own outside the L2 cache."""

    def __init__(self, m, n, k):
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        sets = max(1, -(-2 * l2_bytes // (2 * (m * k + k * n + m * n))))
        device = {"device": "cuda", "dtype": torch.bfloat16}
        self.x = [torch.randn(m, k, **device) for _ in range(sets)]
        # Keeps Y of the order of 1 for every k.
        self.w = [torch.randn(k, n, **device) * k**-0.5 for _ in range(sets)]
        self.y = [torch.empty(m, n, **device) for _ in range(sets)]
        self.bias = torch.randn(n, **device)

    def max_error(self, call):
        """Largest abs(y − r) / max(1, abs(r)) over 256 random elements, against f64."""
        m, k = self.x[0].shape
        n = self.bias.shape[0]
        self.y[0].fill_(float("nan"))
        call()
        torch.cuda.synchronize()
        y = self.y[0]
        if y.isnan().any():
            raise RuntimeError("an element was not written")
        rows, columns = (torch.randint(extent, (256,), device="cuda") for extent in (m, n))
        products = self.x[0][rows].double() * self.w[0][:, columns].t().double()
        reference = (products.sum(1) + self.bias[columns].double()).relu()
        error = ((y[rows, columns].double() - reference).abs() / reference.clamp(min=1.0)).max()
        tolerance = 2.0 / 256 + 1e-5 * k**0.5
        if not error.item() <= tolerance:
            raise RuntimeError(f"error {error.item():.2e} exceeds the tolerance {tolerance:.2e}")
        return error.item()


def resources(kernel, config):
    threads = 32 * kernel.metadata.num_warps
    return {
        "config": str(config),
        "registers": kernel.n_regs,
        "spilled_bytes": kernel.n_spills,
        "shared_bytes": kernel.metadata.shared,
        "threads": threads,
    }


def peers(operands, wanted):
    """Those that have one way to compute it."""
    sets = list(zip(operands.x, operands.w, operands.y))
    bias = operands.bias

    def fused(x, w, y):
        return lambda: torch._addmm_activation(bias, x, w, out=y)

    def eager(x, w, y):
        return lambda: torch.addmm(bias, x, w, out=y).relu_()

    if CUBLASLT in wanted:
        yield Contender(CUBLASLT, [fused(*each) for each in sets], {})
    if "PyTorch eager" in wanted:
        yield Contender("PyTorch eager", [eager(*each) for each in sets], {})
    if KASMINA in wanted:
        kernel = kasmina_kernel.Kernel(128, 256)
        calls = [kernel.launcher(x, w, bias, y) for x, w, y in sets]
        yield Contender(KASMINA, calls, kernel.resources())


def prepared(contender, flush, details):
    """Whether it can be measured; says why not, because the others go on without it."""
    try:
        contender.details = details()
        contender.prepare(flush)
    except Exception as error:
        print(f"    {contender.name} left out: {type(error).__name__}: {error}"[:300], flush=True)
        return False
    return True


def fastest(name, operands, flush, regime):
    """The variant in that of its configurations which is fastest in this regime."""
    launch, configs = triton_kernels.VARIANTS[name]
    best, best_time = None, float("inf")
    for config in configs:
        sets = zip(operands.x, operands.w, operands.y)
        calls = [launch(config, x, w, operands.bias, y) for x, w, y in sets]
        contender = Contender(name, calls, {})
        if not prepared(contender, flush, lambda: resources(calls[0](), config)):
            continue
        if regime == "steady":
            took = statistics.median(contender.slice(0.1, lambda: None)[0])
        else:
            took = statistics.median(contender.burst(5, flush))
        print(f"    {name} {config}: {took:.1f} us {contender.details}", flush=True)
        if took < best_time:
            best, best_time = contender, took
    return best


def measure(regime, contenders, options, flush, clock):
    """Samples of each contender, taken by turns, and its clocks."""
    times = [[] for _ in contenders]
    clocks = [[] for _ in contenders]
    turns = range(len(contenders))
    if regime == "burst":
        for round_ in range(options.samples):
            for turn in turns:
                turn = (turn + round_) % len(contenders)
                times[turn].append(contenders[turn].burst_sample(flush, REST))
        return times, clocks
    rounds = 1 + max(1, round(options.seconds / options.slice))
    for round_ in range(rounds):
        for turn in turns:
            turn = (turn + round_) % len(contenders)
            samples, megahertz = contenders[turn].slice(options.slice, clock)
            # The first slice brings the GPU to the temperature that the others find.
            if round_ > 0:
                times[turn] += samples
                clocks[turn].append(megahertz)
    return times, clocks


def timed(times, regime, operations, error):
    mean, median = statistics.fmean(times), quantile(times, 0.5)
    representative = mean if regime == "steady" else median
    return {
        "samples": len(times),
        "median_us": median,
        "p10_us": quantile(times, 0.1),
        "p90_us": quantile(times, 0.9),
        "mean_us": mean,
        "tflops": operations / representative * 1e-6,
        "max_error": error,
    }


def shape_records(shape, options, flush, clock, origin):
    m, n, k = shape
    operations = 2.0 * m * n * k
    operands = Operands(m, n, k)
    fixed = [
        contender
        for contender in peers(operands, options.contenders)
        if prepared(contender, flush, lambda contender=contender: contender.details)
    ]
    for regime in options.regimes:
        tuned = [name for name in triton_kernels.VARIANTS if name in options.contenders]
        found = [fastest(name, operands, flush, regime) for name in tuned]
        contenders = fixed + [contender for contender in found if contender is not None]
        errors = [operands.max_error(contender.calls[0]) for contender in contenders]
        times, clocks = measure(regime, contenders, options, flush, clock)
        timings = [timed(t, regime, operations, e) for t, e in zip(times, errors)]
        by_name = {contender.name: t for contender, t in zip(contenders, timings)}
        peer = by_name.get(CUBLASLT)
        for contender, own, megahertz in zip(contenders, timings, clocks):
            seen = [value for value in megahertz if value is not None]
            details = dict(contender.details)
            if seen:
                details["sm_clock_mhz"] = statistics.median(seen)
            record = origin | {
                "operation": "gemm", "contender": contender.name,
                "foreign": contender.name != KASMINA, "m": m, "n": n, "k": k,
                "dtype": "bf16", "layout": "in-out", "activation": "relu",
                "tier": "hopper" if contender.name == KASMINA else None, "regime": regime,
            }
            record |= own | {"details": details}
            compared = peer if contender.name != CUBLASLT else None
            record["peer"] = compared and {"name": CUBLASLT_OF_TORCH} | compared
            record["ratio"] = compared and own["tflops"] / compared["tflops"]
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(record) + "\n")
            yield record


def main():
    names = [CUBLASLT, KASMINA, "PyTorch eager", *triton_kernels.VARIANTS]
    default = [name for name in names if name not in ONLY_WHEN_NAMED]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="MxNxK,...")
    parser.add_argument("--contenders", default=",".join(default))
    parser.add_argument("--regimes", default="burst,steady")
    parser.add_argument("--samples", type=int, default=60, help="per contender in burst")
    parser.add_argument("--seconds", type=float, default=3.0, help="per contender in steady")
    parser.add_argument("--slice", type=float, default=0.5, help="length of a turn in steady")
    parser.add_argument("--json", help="file to which JSON lines are appended")
    options = parser.parse_args()
    options.contenders = options.contenders.split(",")
    options.regimes = options.regimes.split(",")
    unknown = set(options.contenders) - set(names) or set(options.regimes) - {"burst", "steady"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; contenders are {', '.join(names)}")

    torch.manual_seed(0)
    flush = flush_buffer()
    clock, origin = clock_reader(), provenance()
    print(f"{origin['gpu']}, PyTorch {torch.__version__}, Triton {triton.__version__}", flush=True)
    rows = []
    for text in options.shapes.split(","):
        shape = [int(extent) for extent in text.split("x")]
        for record in shape_records(shape, options, flush, clock, origin):
            rows.append(
                f"| {text} | {record['regime']} | {record['contender']} "
                f"| {record['median_us']:.1f} | {record['tflops']:.1f} "
                f"| {record['ratio'] or 1:.3f} | {record['max_error']:.1e} | {record['details']} |"
            )
            print(rows[-1], flush=True)
    print("\n| shape | regime | who | us | TFLOP/s | × cuBLASLt | error | details |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
