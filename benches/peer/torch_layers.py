#!/usr/bin/env python3
"""What PyTorch takes for convolutions, statistics and small layers, in the regimes of the benches.

Needs a GPU and PyTorch, and no Rust. PyTorch reaches cuDNN through its graph interface, which is
often faster than the functions that `cargo bench --bench conv1d` calls, and computes `var_mean`,
which CUB does not have. With --json FILE, each case appends a JSON line whose fields are those of
our own benches, with `contender` PyTorch. With --beside FILE, lines of ours with the same fields
are set beside them; run this on the same GPU right after the bench that wrote the file.

    cargo bench --bench conv1d -- --json results.jsonl
    python3 benches/peer/torch_layers.py --beside results.jsonl
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn import functional

from timing import NODES, REST, Contender, event, flush_buffer, provenance, quantile

CONVOLUTIONS = (
    "32x256x256x4096x3,32x512x512x2048x5,16x64x64x16384x7,64x32x32x8192x3,"
    "8x1024x1024x1024x3,16x128x256x4096x9,4x128x128x65536x3,"
    "8x1024x1024x8192x3x1024,8x1024x1024x8192x4x1024,8x1024x1024x8192x7x1024"
)
LENGTHS = "2^10,2^12,2^14,2^16,2^18,2^20,2^22,2^24,2^26,2^28,2^30"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Beyond this length a call is timed by itself, up to it in a graph of calls.
LONGEST_IN_GRAPH = 1 << 24
# Writes of the flushing buffer ahead of a sample of the burst regime.
FLUSHES = 6
# Answers of the session that are timed, and those ahead of them.
ANSWERS, WARM_UP = 5000, 500
PEER = f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def buffer_sets(size):
    """How many buffers of `size` bytes each call of a graph needs to find its own outside L2."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(NODES, max(1, -(-2 * l2_bytes // size)))


def burst(call, samples, flush):
    """Calls one by one, not in a graph, whose launch would be timed too."""
    for _ in range(3):
        call()
    times = []
    for _ in range(samples):
        time.sleep(REST)
        start, end = event(), event()
        # Long enough for Python to enqueue the call behind it.
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def graph(calls, samples, flush):
    contender = Contender("graph", calls, {})
    contender.record_single()
    calls = contender.capture(NODES)
    calls.replay()
    times = []
    for _ in range(samples):
        start, end = event(), event()
        flush.zero_()
        start.record()
        calls.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / NODES)
    return times


def convolutions(options, flush):
    """The three passes of each convolution in both layouts; yields fields and samples."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    for text in options.convolutions.split(","):
        batch, inputs, outputs, length, taps, groups = (
            [int(extent) for extent in text.split("x")] + [1]
        )[:6]
        for layout in ("ncl", "nlc"):
            kind = {"device": "cuda", "dtype": DTYPES[options.dtype]}
            # With channels last, a one-dimensional convolution is one over images of height 1.
            image = (1,) if layout == "nlc" else ()
            form = torch.channels_last if layout == "nlc" else torch.contiguous_format
            x = torch.randn(batch, inputs, *image, length, **kind).to(memory_format=form)
            scale = (inputs // groups * taps) ** -0.5
            w = torch.randn(outputs, inputs // groups, *image, taps, **kind) * scale
            w = w.to(memory_format=form)
            ones, zeros = [1] * (len(image) + 1), [0] * len(image)
            geometry = (ones, zeros + [taps // 2], ones, False, zeros + [0], groups)

            def forward():
                return torch.ops.aten.convolution(x, w, None, *geometry)

            def backward(mask):
                bias = [outputs] if mask[2] else None
                return torch.ops.aten.convolution_backward(dy, x, w, bias, *geometry, mask)

            # With an even number of taps the result has one position more than the input.
            dy = torch.randn_like(forward())
            passes = {
                "forward": forward,
                "dgrad": lambda: backward([True, False, False]),
                "wgrad": lambda: backward([False, True, True]),
            }
            for name, call in passes.items():
                fields = {
                    "operation": f"conv1d {name}", "batch": batch, "in_channels": inputs,
                    "out_channels": outputs, "length": length, "taps": taps, "groups": groups,
                    "layout": layout, "dtype": options.dtype, "regime": "burst",
                }
                yield fields, burst(call, options.samples, flush)


def reductions(options, flush):
    """Sum and variance with mean, of f32 and bf16; yields fields and samples."""
    for text in options.lengths.split(","):
        length = 1 << int(text[2:]) if text.startswith("2^") else int(text)
        for dtype in ("f32", "bf16"):
            in_graph = length <= LONGEST_IN_GRAPH
            size = length * DTYPES[dtype].itemsize
            sets = buffer_sets(size) if in_graph else 1
            data = [torch.randn(length, device="cuda", dtype=DTYPES[dtype]) for _ in range(sets)]
            for name, function in (("sum", torch.sum), ("var_mean", torch.var_mean)):
                calls = [lambda x=x, function=function: function(x) for x in data]
                regime = "graph" if in_graph else "burst"
                fields = {"operation": name, "len": length, "dtype": dtype, "regime": regime}
                if in_graph:
                    yield fields, graph(calls, options.samples, flush)
                else:
                    yield fields, burst(calls[0], options.samples, flush)
            del data


def sessions(options, _flush):
    """One small layer per batch, synchronised after each; yields fields and samples."""
    x = torch.randn(32, 256, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16) / 16
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)

    def eager():
        return functional.relu(functional.linear(x, w, bias))

    recorded = Contender("graph", [eager], {})
    recorded.record_single()
    ways = {"eager + sync": eager, "graph + sync": recorded.single.replay}
    for way, call in ways.items():
        times = []
        for _ in range(WARM_UP + ANSWERS):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e6)
        yield {"case": "linear 32x256x256", "contender": f"{PEER}, {way}"}, times[WARM_UP:]


def key(record):
    """What tells a case of ours from another; `var_mean` is set beside the summary."""
    names = (
        "batch", "in_channels", "out_channels", "length", "taps", "groups", "layout", "len",
        "dtype", "regime", "case",
    )
    operation = record.get("operation")
    operation = "summary" if operation == "var_mean" else operation
    return (operation, *(record.get(name) for name in names))


def own_times(path):
    """Microseconds of our best tier by case; of several lines of a case the last counts."""
    times = {}
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            resident = record.get("contender", "resident") == "resident"
            plain = record.get("tiled", True) and record.get("filter", "oik") == "oik"
            if resident and plain:
                times[key(record)] = record.get("median_us") or record.get("p50_us")
    return times


def main():
    groups = {"conv1d": convolutions, "reduce": reductions, "persistent": sessions}
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--benches", default=",".join(groups))
    parser.add_argument("--convolutions", default=CONVOLUTIONS, help="BxIxOxLxK[xG],...")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the convolutions")
    parser.add_argument("--lengths", default=LENGTHS, help="of the reductions")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--json", help="file to which JSON lines are appended")
    parser.add_argument("--beside", help="file with the lines of our benches")
    options = parser.parse_args()
    unknown = set(options.benches.split(",")) - set(groups)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(groups)}")

    torch.manual_seed(0)
    flush, origin = flush_buffer(), provenance()
    own = own_times(options.beside) if options.beside else {}
    print(f"{origin['gpu']}, {PEER}\n\n| case | PyTorch µs | p90 | ours µs | ratio |", flush=True)
    print("|---|---|---|---|---|")
    for bench in options.benches.split(","):
        for fields, times in groups[bench](options, flush):
            median, p90 = quantile(times, 0.5), quantile(times, 0.9)
            if options.json:
                middle = "p50_us" if "case" in fields else "median_us"
                record = origin | {"contender": PEER, "foreign": True} | fields
                record |= {"samples": len(times), "p10_us": quantile(times, 0.1), middle: median}
                record |= {"p90_us": p90, "mean_us": statistics.fmean(times)}
                with open(options.json, "a") as file:
                    file.write(json.dumps(record) + "\n")
            ours = own.get(key(fields))
            beside = f"{ours:.2f} | {median / ours:.2f}" if ours else "– | –"
            name = " ".join(str(value) for value in fields.values())
            print(f"| {name} | {median:.2f} | {p90:.2f} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
