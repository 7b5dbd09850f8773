"""How a peer is timed: checked against float64 first, over a ring of inputs larger than the caches, and checked again.

Every result is written as the record that `espalier kernels bench --format json` writes, so that both can be compared.
"""

import json
import time
from dataclasses import dataclass
from typing import Any, Callable

import torch

# The same numbers as the other side's.
RING_BYTES = 256 << 20
MOST_SLOTS = 32
SAMPLE_SECONDS = 1e-3
HEAT_SECONDS = 0.2
# Of the second form of a peer, which finds the device warm.
REHEAT_SECONDS = 0.05
SAMPLES = 30
FEWEST_SAMPLES = 5
# Samples whose middles drift by more than this between first and last third say more about the machine than about the kernel.
DRIFT = 0.2
# Launches in one graph, at least.
GRAPH_LAUNCHES = 10

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8, "u32": torch.int64}


@dataclass
class Peer:
    """One way in which a library does a case's work."""

    kernel: str
    # "forward", "backward", or "both" in one go.
    mode: str
    # Fresh random inputs, from a generator; not timed.
    make: Callable[[Any], tuple]
    # The work on one set of inputs.
    call: Callable[..., Any]
    # Relative error of a subset of the result against float64, from inputs and outputs.
    check: Callable[[tuple, Any], float]
    bound: float
    # The inputs are changed: the result cannot be checked a second time.
    in_place: bool = False


class Skipped(Exception):
    """A peer that cannot do this case, with the reason."""


def first_line(failure):
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def tensors(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for item in thing:
            yield from tensors(item)


def relative_error(got, want):
    """|got - want| / |want| of all elements of all pairs."""
    error = power = 0.0
    for g, w in zip(tensors(got), tensors(want), strict=True):
        if g.shape != w.shape:
            raise ValueError(f"shape {tuple(g.shape)} where {tuple(w.shape)} was expected")
        g, w = g.detach().double(), w.detach().double()
        error += float(((g - w) ** 2).sum())
        power += float((w**2).sum())
    return (error / power) ** 0.5 if power > 0 else error**0.5


def spread(extent, count):
    """This many indices, spread over the axis with its first and last."""
    if count >= extent:
        return list(range(extent))
    return [i * (extent - 1) // max(count - 1, 1) for i in range(count)]


def quantile(ordered, share):
    if not ordered:
        return 0.0
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Bench:
    """The device, the settings, and the file that records go to."""

    def __init__(self, device, out, seconds, seed, ring_bytes=RING_BYTES, picked=None):
        # A file for the names of the device's kernels behind each peer.
        self.picked = picked
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.out, self.seconds, self.seed, self.ring_bytes = out, seconds, seed, ring_bytes
        # Autograd runs backward on the stream of the forward; only a stream of our own can be captured.
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.describe()

    def describe(self):
        libraries = [f"torch {torch.__version__}"]
        name, driver = "cpu", ""
        if self.cuda:
            name = torch.cuda.get_device_name(self.device)
            driver = f"CUDA runtime {torch.version.cuda}"
            libraries.append(f"cudnn {torch.backends.cudnn.version()}")
        for module in ("triton", "liger_kernel"):
            try:
                from importlib.metadata import version

                libraries.append(f"{module} {version(module)}")
            except Exception:  # what is not installed is not listed
                pass
        self.record_device = {
            "backend": self.device.type,
            "name": name,
            "driver": driver,
            "vendor_id": 0,
            "device_id": 0,
            "software": False,
            "limits": {},
            "registry": libraries,
        }

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def generator(self, salt):
        generator = torch.Generator(device=self.device)
        generator.manual_seed(self.seed * 1000 + salt)
        return generator

    def blank(self, case, peer_kernel, mode):
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": torch.__version__,
            "commit": "",
            "device": self.record_device,
            "op": case.op,
            "params": case.params,
            "mode": mode,
            "dtype": case.dtype,
            "layout": case.layout,
            "kernel": peer_kernel,
            "kernel_hash": "",
            "supported": False,
            "passed": False,
            "error": None,
            "error_metric": "",
            "error_value": None,
            "error_bound": None,
            "seed": self.seed,
            "input_hash": "",
            "output_hash": "",
            "timing_source": "event" if self.cuda else "wall",
            "warmups": 0,
            "runs": 0,
            "samples_us": [],
            "min_us": 0.0,
            "p5_us": 0.0,
            "median_us": 0.0,
            "p95_us": 0.0,
            "flops": case.flops,
            "bytes": case.bytes,
            "memory": 0,
            "gflops": 0.0,
            "bandwidth_gb": 0.0,
            "ceiling": None,
            "ceiling_unit": "",
            "ceiling_share": None,
            "naive_ratio": None,
            "voided": False,
        }

    def write(self, record):
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()

    def skipped(self, case, kernel, mode, reason):
        record = self.blank(case, kernel, mode)
        record["error"] = reason
        self.write(record)

    def run(self, case, peer):
        """Times one peer: launch by launch, then as a replayed graph."""
        try:
            if self.cuda:
                with torch.cuda.stream(self.stream):
                    self._run(case, peer)
            else:
                self._run(case, peer)
        except Skipped as reason:
            self.skipped(case, peer.kernel, peer.mode, str(reason))
        except Exception as failure:  # one peer that fails takes no other with it
            self.skipped(case, peer.kernel, peer.mode, first_line(failure))
            # Unless it took the device: every later call would fail, and say nothing of its own peer.
            self.synchronize()
        if self.cuda:
            torch.cuda.empty_cache()

    def _run(self, case, peer):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        slots = [peer.make(self.generator(0))]
        out = peer.call(*slots[0])
        self.synchronize()
        record = self.blank(case, peer.kernel, peer.mode)
        record["supported"] = True
        record["error_metric"] = "relative Frobenius error against float64 on a subset"
        record["error_bound"] = peer.bound
        record["error_value"] = peer.check(slots[0], out)
        if not record["error_value"] <= peer.bound:
            # A wrong result has no time.
            record["error"] = f"relative error {record['error_value']:.3e} above {peer.bound:.3e}"
            self.write(record)
            return
        size = sum({t.data_ptr(): t.nbytes for t in tensors((slots[0], out))}.values())
        if self.cuda:
            # What the peer keeps beside inputs and outputs counts, too.
            record["memory"] = torch.cuda.max_memory_allocated(self.device)
        del out
        self._name_kernels(case, peer, slots[0])
        count = max(2, min(MOST_SLOTS, -(-self.ring_bytes // max(size, 1))))
        if self.cuda and count * size > 0.6 * torch.cuda.mem_get_info(self.device)[0]:
            count = 1
            record["error"] = "one set of inputs only: two do not fit"
        slots += [peer.make(self.generator(salt)) for salt in range(1, count)]
        self.synchronize()
        self._stream(dict(record), peer, slots)
        if self.cuda:
            self._graph(dict(record), peer, slots)

    def _name_kernels(self, case, peer, slot):
        """Which kernels the library picked for this shape, into a file of their own."""
        if self.picked is None or peer.in_place:
            return
        activity = torch.profiler.ProfilerActivity.CUDA if self.cuda else torch.profiler.ProfilerActivity.CPU
        kind = torch.autograd.DeviceType.CUDA if self.cuda else torch.autograd.DeviceType.CPU
        try:
            with torch.profiler.profile(activities=[activity]) as profile:
                peer.call(*slot)
                self.synchronize()
            names = list(dict.fromkeys(e.name for e in profile.events() if e.device_type == kind))
        except RuntimeError:
            # Where the profiler may not read the device, nobody asks again.
            self.picked = None
            return
        line = {"op": case.op, "params": case.params, "mode": peer.mode, "kernel": peer.kernel, "picked": names}
        self.picked.write(json.dumps(line) + "\n")
        self.picked.flush()

    def _stream(self, record, peer, slots):
        record["kernel"] += " [stream]" if self.cuda else ""
        position = 0

        def work(runs):
            nonlocal position
            for _ in range(runs):
                peer.call(*slots[position])
                position = (position + 1) % len(slots)

        single = self._heat(record, lambda: work(1), HEAT_SECONDS)
        record["runs"] = runs = max(1, min(1000, int(SAMPLE_SECONDS / single)))
        self._sample(record, lambda: work(runs), runs)
        if not peer.in_place:
            self._check_again(record, peer, slots[0], peer.call(*slots[0]))
        self._finish(record)

    def _graph(self, record, peer, slots):
        record["kernel"] += " [graph]"
        launches = len(slots) * -(-GRAPH_LAUNCHES // len(slots))
        graph, outputs = torch.cuda.CUDAGraph(), []
        try:
            self.synchronize()
            with torch.cuda.graph(graph, stream=self.stream):
                for i in range(launches):
                    out = peer.call(*slots[i % len(slots)])
                    # Only the last results are kept: the others' memory is used again, as it would be in a step.
                    outputs = (outputs + [out])[-len(slots) :]
        except Exception as failure:  # work that waits for the device cannot be captured
            self.synchronize()
            record["supported"] = record["passed"] = False
            record["error"] = f"cannot be captured: {first_line(failure)}"
            self.write(record)
            return
        # A graph that runs nothing must not pass for a fast one.
        inputs = {t.data_ptr() for t in tensors(slots)}
        for t in tensors(outputs[-1]):
            if t.is_floating_point() and t.data_ptr() not in inputs and not t.requires_grad:
                t.fill_(float("nan"))
        single = self._heat(record, graph.replay, REHEAT_SECONDS)
        replays = max(1, int(SAMPLE_SECONDS / single))
        record["runs"] = launches * replays

        def work():
            for _ in range(replays):
                graph.replay()

        self._sample(record, work, launches * replays)
        if not peer.in_place:
            self._check_again(record, peer, slots[(launches - 1) % len(slots)], outputs[-1])
        self._finish(record)

    def _heat(self, record, once, seconds):
        """Warm-ups; the shortest time of one, in seconds."""
        shortest, begin, done = float("inf"), time.perf_counter(), 0
        heat = seconds if self.cuda else 0.0
        while done < 3 or time.perf_counter() - begin < heat:
            start = time.perf_counter()
            once()
            self.synchronize()
            shortest = min(shortest, time.perf_counter() - start)
            done += 1
        record["warmups"] = done
        return max(shortest, 1e-7)

    def _sample(self, record, work, runs):
        samples, begin = [], time.perf_counter()
        device_time = wall_time = 0.0
        while len(samples) < SAMPLES and (
            len(samples) < FEWEST_SAMPLES or time.perf_counter() - begin < self.seconds
        ):
            if self.cuda:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                wall = time.perf_counter()
                first.record(self.stream)
                work()
                last.record(self.stream)
                last.synchronize()
                wall_time += time.perf_counter() - wall
                elapsed = first.elapsed_time(last) * 1e-3
                device_time += elapsed
            else:
                wall = time.perf_counter()
                work()
                elapsed = time.perf_counter() - wall
            samples.append(elapsed * 1e6 / runs)
        record["samples_us"] = samples
        if self.cuda and wall_time / len(samples) > 0.02 and abs(device_time - wall_time) > 0.2 * wall_time:
            record["voided"] = True
            record["error"] = f"the events count {device_time:.3f} s where the wall clock counts {wall_time:.3f} s"
        third = len(samples) // 3
        if third >= 3:
            early, late = (quantile(sorted(part), 0.5) for part in (samples[:third], samples[-third:]))
            if abs(late / early - 1.0) > DRIFT:
                record["voided"] = True
                record["error"] = f"times drifted by {abs(late / early - 1.0):.0%} while sampling"

    def _check_again(self, record, peer, slot, out):
        self.synchronize()
        after = peer.check(slot, out)
        if not after <= peer.bound:
            record["passed"], record["supported"] = False, True
            record["error"] = f"relative error {after:.3e} after timing"
            record["samples_us"] = []

    def _finish(self, record):
        ordered = sorted(record["samples_us"])
        record["passed"] = bool(ordered)
        record["min_us"], record["p5_us"] = quantile(ordered, 0.0), quantile(ordered, 0.05)
        record["median_us"], record["p95_us"] = quantile(ordered, 0.5), quantile(ordered, 0.95)
        if record["median_us"] > 0:
            record["gflops"] = record["flops"] / record["median_us"] / 1e3
            record["bandwidth_gb"] = record["bytes"] / record["median_us"] / 1e3
        self.write(record)
