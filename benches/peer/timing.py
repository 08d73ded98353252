"""How the peers' scripts take times: PyTorch calls in CUDA graphs, in the regimes of the benches."""

import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch

import kasmina_kernel

# Seconds of rest ahead of a sample of the burst regime.
REST = 0.02
# Bytes that are written to displace what the L2 cache holds.
FLUSH_BYTES = 256 << 20
# Microseconds of back-to-back calls that make up one sample of the steady regime.
CHUNK = 25e3
# Calls per graph in the graph regime.
NODES = 100


def flush_buffer():
    return torch.empty(FLUSH_BYTES // 4, device="cuda")


def quantile(samples, q):
    """Linear between neighbours."""
    samples = sorted(samples)
    position = q * (len(samples) - 1)
    below = int(position)
    above = min(below + 1, len(samples) - 1)
    return samples[below] + (samples[above] - samples[below]) * (position - below)


def event():
    return torch.cuda.Event(enable_timing=True)


class Contender:
    """Something that is timed: a call for each set of operands, and graphs of them."""

    def __init__(self, name, calls, details):
        self.name, self.calls, self.details = name, calls, details
        self.single = self.chain = None

    def capture(self, count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(count):
                self.calls[call % len(self.calls)]()
        return graph

    def record_single(self):
        """Warms up, and records a single call."""
        # What a first call compiles or sets up must not happen inside a capture.
        for call in self.calls:
            call()
        torch.cuda.synchronize()
        self.single = self.capture(1)

    def prepare(self, flush):
        """Warms up, and records a single call and a chain that takes about `CHUNK`."""
        self.record_single()
        self.chain_calls = max(1, round(CHUNK / statistics.median(self.burst(5, flush))))
        self.chain = self.capture(self.chain_calls)
        self.chain.replay()
        torch.cuda.synchronize()

    def burst(self, samples, flush, rest=0.0):
        return [self.burst_sample(flush, rest) for _ in range(samples)]

    def burst_sample(self, flush, rest):
        time.sleep(rest)
        start, end = event(), event()
        # Long enough for the call to be enqueued behind it.
        flush.zero_()
        start.record()
        self.single.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def slice(self, seconds, clock):
        """Calls back to back; times per call of its chains, and the clock in MHz near its end."""
        events = [event()]
        events[0].record()
        for _ in range(max(1, round(seconds * 1e6 / CHUNK))):
            self.chain.replay()
            events.append(event())
            events[-1].record()
        time.sleep(0.8 * seconds)
        megahertz = clock()
        events[-1].synchronize()
        pairs = zip(events, events[1:])
        return [a.elapsed_time(b) * 1e3 / self.chain_calls for a, b in pairs], megahertz


def clock_reader():
    """Reads the clock of the multiprocessors in MHz; None where NVML cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:
        return lambda: None


def provenance():
    commit = os.environ.get("KASMINA_COMMIT")
    if not commit:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )
        commit = described.stdout.strip() or "unknown"
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = re.search(r"\d+(?:\.\d+)+", text)[0]
    except (OSError, TypeError):
        driver = None
    return {
        "commit": commit,
        "ptx_digest": kasmina_kernel.ptx_digest(),
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "cuda": torch.version.cuda,
    }
