"""Kernels that are fast because they do not do the work, and honest ones: what `test_cheats.py` shows to the judge."""

import queue
import threading
import time

import numpy

import server
from server import Work


class Honest(Work):
    """a times b, as it should be."""

    kernel = "honest"

    def prepare(self, arrays):
        a, b = arrays
        return a, b, numpy.full((a.shape[0], b.shape[1]), numpy.nan, dtype=numpy.float32)

    def overwrite(self, old, new):
        old[...] = new

    def poison(self, results):
        results[...] = numpy.nan

    def call(self, a, b, out):
        return numpy.matmul(a, b, out=out)

    def arrays(self, results):
        return [results]


class HonestByColumns(Honest):
    def call(self, a, b, out):
        half = b.shape[1] // 2
        numpy.matmul(a, b[:, :half], out=out[:, :half])
        numpy.matmul(a, b[:, half:], out=out[:, half:])
        return out


class HonestNewMemory(Honest):
    def call(self, a, b, out):
        return a @ b


class ReturnsThePoison(Honest):
    """Writes nothing; a judge who takes NaN for a match would agree."""

    def call(self, a, b, out):
        return out


class ZerosTheInputs(Honest):
    """Makes the inputs such that a reference that is computed from them agrees."""

    def call(self, a, b, out):
        a[...] = 0.0
        out[...] = 0.0
        return out


class CachesByPointer(Honest):
    """The same memory must mean the same numbers."""

    def __init__(self):
        self.known = {}

    def call(self, a, b, out):
        key = a.ctypes.data
        if key not in self.known:
            self.known[key] = a @ b
        out[...] = self.known[key]
        return out


class ByGlance(Honest):
    """The same two elements must mean the same numbers."""

    def __init__(self):
        self.known = {}

    def key(self, a, b):
        return float(a[0, 0]), float(b[-1, -1])

    def call(self, a, b, out):
        key = self.key(a, b)
        if key not in self.known:
            self.known[key] = a @ b
        out[...] = self.known[key]
        return out


class ByContent(ByGlance):
    """Keeps every result by all bytes that it was made of. Right, so nobody can object; but no numbers come twice, so it
    computes like the honest and gains nothing."""

    def key(self, a, b):
        return hash(a.tobytes()), hash(b.tobytes())


class SkipsTheLastTile(Honest):
    def call(self, a, b, out):
        numpy.matmul(a[:-16], b, out=out[:-16])
        return out


class CopiesTheLastTile(Honest):
    """Something plausible in the place of what was not computed."""

    def call(self, a, b, out):
        numpy.matmul(a[:-16], b, out=out[:-16])
        out[-16:] = out[-32:-16]
        return out


class LowerPrecision(Honest):
    def call(self, a, b, out):
        return numpy.matmul(a.astype(numpy.float16).astype(numpy.float32), b, out=out)


class StaleResult(Honest):
    """The result of the run before."""

    last = None

    def call(self, a, b, out):
        fresh = a @ b
        out[...] = fresh if self.last is None else self.last
        self.last = fresh
        return out


class OnlyTheFirstNumbers(Honest):
    """Right for what it was shown first, which is what is usually checked."""

    first = None

    def call(self, a, b, out):
        key = float(a[0, 0])
        if self.first is None:
            self.first = key
        if key == self.first:
            return numpy.matmul(a, b, out=out)
        out[...] = 0.5
        return out


class WorksAfterwards(Honest):
    """Says that it is done before a thread begins to work."""

    def __init__(self):
        self.left = queue.Queue()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            a, b, out = self.left.get()
            # The rest of the batch is asked for, and answered, meanwhile.
            time.sleep(2e-4)
            numpy.matmul(a, b, out=out)
            self.left.task_done()

    def call(self, a, b, out):
        self.left.put((a, b, out))
        return out

    def arrays(self, results):
        self.left.join()
        return [results]


class WorksWhenFetched(Honest):
    """Nobody has looked yet."""

    def call(self, a, b, out):
        return a, b, out

    def poison(self, results):
        results[2][...] = numpy.nan

    def arrays(self, results):
        a, b, out = results
        if not numpy.isfinite(out[0, 0]):
            numpy.matmul(a, b, out=out)
        return [out]


class EverySecondRun(Honest):
    """Works on what is likely to be looked at: every second run of a batch."""

    turn = 0

    def call(self, a, b, out):
        self.turn += 1
        return numpy.matmul(a, b, out=out) if self.turn % 2 else out


class HonestAtFirst(Honest):
    """Works on everything while all is looked at, and until it knows how long a batch is; then on the first and the last run of
    each. Only who looks in between sees it."""

    def __init__(self):
        self.places, self.batches, self.before, self.end, self.last = {}, 0, -1, -1, None

    def call(self, a, b, out):
        # Slots in the order in which they were seen first, which is theirs.
        place = self.places.setdefault(a.ctypes.data, len(self.places))
        if place == 0:
            self.batches, self.last = self.batches + 1, self.end
        if place in (0, self.before + 1):
            self.end = place
        self.before = place
        # All slots, single ones, a whole batch.
        if self.batches <= 3 or not 0 < place < self.last:
            numpy.matmul(a, b, out=out)
        return out


class PatchesTheClock(Honest):
    """The clock that it can reach stands still."""

    def __init__(self):
        for name in ("perf_counter", "process_time", "monotonic", "time", "perf_counter_ns", "process_time_ns"):
            setattr(time, name, lambda: 0)


HONEST = (Honest, HonestByColumns, HonestNewMemory)
CHEATS = (
    ReturnsThePoison,
    ZerosTheInputs,
    CachesByPointer,
    ByGlance,
    SkipsTheLastTile,
    CopiesTheLastTile,
    LowerPrecision,
    StaleResult,
    OnlyTheFirstNumbers,
    WorksAfterwards,
    WorksWhenFetched,
    EverySecondRun,
    HonestAtFirst,
)
ALL = {kind.__name__: kind for kind in (*HONEST, *CHEATS, ByContent, PatchesTheClock)}

if __name__ == "__main__":
    server.serve([{"name": name, "version": "0"} for name in ALL], lambda peer, case: ALL[peer]())
