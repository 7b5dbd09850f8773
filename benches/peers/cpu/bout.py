"""One case, several contestants, in turn: what is believed, and what is not.

Nobody times or judges himself. A contestant's processor time is read from outside; its results are held against float64
before timing, after every timed run, and always on a set of memory that was filled with other numbers and poisoned since.
"""

import os
import random
import time
from pathlib import Path

import numpy

import models
from contestant import Refused
from references import bound_of, expected, judge

STORED = {"f32": numpy.float32, "bf16": numpy.uint16, "f16": numpy.float16, "i8": numpy.int8, "u32": numpy.uint32, "i32": numpy.int32}
# Different numbers, of which each set of memory gets other ones in every round.
SETS = 3
FEWEST_SLOTS, MOST_SLOTS = 3, 128
# A timed run takes as many slots as fill this time, each once: whoever ran twice on the same numbers could skip the second.
SAMPLE = 0.06
# Ops that change their inputs.
IN_PLACE = ("adamw", "accumulate_scaled", "sgd")
# Of the time of one run: what a contestant may do after it said that it was done, or when its result is fetched.
AFTERWARDS = 0.25
SETTLE = 0.01


def cache_bytes():
    """The processor's largest cache."""
    sizes = []
    for index in range(8):
        try:
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text().strip()
        except OSError:
            continue
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=32 << 20)


class Numbers:
    """Several sets of a case's inputs, as files, with their float64 results."""

    def __init__(self, case, draw, folder, seed):
        self.case, self.folder = case, folder
        # Other cases' files carry the seed too; their names must not meet.
        stem = f"{case['op']}-{os.getpid()}"
        self.paths = [[f"{folder}/{stem}-{s}-{i}" for i in range(len(case["inputs"]))] for s in range(SETS)]
        for s, paths in enumerate(self.paths):
            draw(case, seed * 100 + s, paths)
        self.wanted = {}

    def expected(self, index, computes):
        if (index, computes) not in self.wanted:
            arrays = [self.input(index, i) for i in range(len(self.case["inputs"]))]
            self.wanted[index, computes] = expected(self.case, arrays, computes)
        return self.wanted[index, computes]

    def input(self, index, number):
        """Input `number` of set `index`."""
        meta = self.case["inputs"][number]
        return numpy.fromfile(self.paths[index][number], dtype=STORED[meta["dtype"]]).reshape(meta["dims"])

    def bytes(self):
        tensors = self.case["inputs"] + self.case["outputs"]
        return sum(int(numpy.prod(t["dims"])) * numpy.dtype(STORED[t["dtype"]]).itemsize for t in tensors)

    def remove(self):
        for path in sum(self.paths, []):
            os.path.exists(path) and os.remove(path)


class Corner:
    """A contestant with one case."""

    def __init__(self, contestant, peer, numbers, chance):
        self.contestant, self.peer, self.numbers, self.chance = contestant, peer, numbers, chance
        self.case, self.in_place = numbers.case, numbers.case["op"] in IN_PLACE
        self.slots = slots_of(numbers)
        # Why there is no time: nothing to run, or nothing to believe.
        self.skip, self.fault, self.late, self.lazy = None, None, 0, 0
        self.kernel, self.error, self.samples, self.walls, self.round, self.runs = "", 0.0, [], [], 0, 1

    def stands(self):
        return not self.skip and not self.fault

    def attempt(self, step):
        """A contestant that fails takes no other with it."""
        try:
            step()
        except Refused as reason:
            self.fault = self.fault or str(reason)

    def fill(self, slots=None):
        """Other numbers in the same memory, and poison in the outputs."""
        for slot in range(self.slots) if slots is None else slots:
            paths = self.numbers.paths[(slot + self.round) % SETS]
            self.contestant.ask("fill", slot=slot, inputs=paths)

    def fetch(self, slot):
        """Has a slot's results written into new files; the processor time that it took."""
        for path in self.results:
            os.path.exists(path) and os.remove(path)
        return self.contestant.timed("read", slot=slot, outputs=self.results)[0]

    def check(self, slot, fetched=False):
        """Holds a slot's results against those of the numbers that it was last filled with."""
        if not fetched:
            self.fetch(slot)
        numbers = (slot + self.round) % SETS
        want = self.numbers.expected(numbers, self.computes)
        want = [want[i] for i in self.outputs] if self.computes is None else want
        for index, (path, expected_output) in enumerate(zip(self.results, want, strict=True)):
            if not os.path.exists(path):
                return f"output {index} was not handed in"
            meta = self.meta(index)
            got = numpy.fromfile(path, dtype=STORED[meta])
            if expected_output is not None and got.size == expected_output.size:
                got = models.handed_in(self.case, index, got, lambda i: self.numbers.input(numbers, i))
            error, reason = judge(expected_output, got, meta, bound_of(self.case, meta, self.computes))
            if reason:
                return f"output {index}: {reason}"
            self.error = max(self.error, error)
        return None

    def meta(self, index):
        if self.computes == "integer product":
            return "i32"
        if self.computes:
            return "f32"
        return self.case["outputs"][self.outputs[index]]["dtype"]

    def begin(self):
        """Checked on each set of numbers, then run once to see how long it takes."""
        answer = self.contestant.ask("open", case=self.case, peer=self.peer, slots=self.slots)
        self.skip = answer.get("skip")
        if self.skip:
            return
        self.kernel, self.outputs, self.computes = answer["kernel"], answer["outputs"], answer.get("computes")
        self.results = [f"{self.numbers.folder}/result-{os.getpid()}-{i}" for i in self.outputs]
        self.fill()
        self.contestant.ask("run", first=0, runs=self.slots)
        for slot in range(min(SETS, self.slots)):
            self.fault = self.fault or self.check(slot)
        if self.fault:
            return
        self.fill()
        once = []
        for turn in range(3):
            if self.in_place:
                self.fill([turn % self.slots])
            once.append(max(self.contestant.timed("run", first=turn % self.slots, runs=1)))
        self.single = max(min(once), 1e-7)
        self.runs = min(self.slots, int(SAMPLE / self.single) + 1)

    def sample(self, by_processor):
        """One timed run, checked on its last slot and on another that the contestant cannot guess."""
        self.round += 1
        self.fill()
        if not self.in_place:
            # Awake, with its code at hand.
            self.contestant.ask("run", first=self.slots - 1, runs=1)
            self.fill([self.slots - 1])
        cpu, wall = self.contestant.timed("run", first=0, runs=self.runs)
        said = self.contestant.cpu()
        if by_processor:
            time.sleep(SETTLE)
            self.late += self.contestant.cpu() - said > AFTERWARDS * cpu / self.runs + 1e-3
        last, other = self.runs - 1, self.chance.randrange(self.runs)
        fetch = [self.fetch(last) for _ in range(2)]
        if by_processor:
            self.lazy += fetch[0] - 1.5 * fetch[1] > AFTERWARDS * cpu / self.runs + 3e-3
        self.fault = self.fault or self.check(last, fetched=True) or (other != last and self.check(other)) or None
        self.samples.append(cpu * 1e6 / self.runs)
        self.walls.append(wall * 1e6 / self.runs)

    def close(self):
        self.contestant.ask("close")
        # Once may be the machine's doing; a habit is not.
        for count, what in ((self.late, "goes on working after it said that it was done"), (self.lazy, "works when fetched")):
            if count > len(self.samples) / 2:
                self.fault = self.fault or f"it {what}"


def slots_of(numbers):
    """So many that every run finds its inputs outside the caches."""
    return max(FEWEST_SLOTS, min(MOST_SLOTS, -(-2 * cache_bytes() // max(numbers.bytes(), 1))))


def busy():
    """Seconds that all processors worked since the machine was started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def bout(entries, rounds, by_processor, seed=None):
    """Ours and each peer on one case, A B C A B C: one timed run each per round, in an order that turns.

    `entries` are (contestant, peer, numbers), each contestant a process of its own; `by_processor` where all its work is its
    processor time. Back come the corners, with samples or with the reason why there are none, and how many processors others
    kept busy meanwhile.
    """
    # Which result is looked at is nobody's to know.
    chance = random.Random(seed)
    contestants = [entry[0] for entry in entries]
    spent = lambda: time.process_time() + sum(c.cpu() for c in contestants if c.alive())
    began, own, all_busy = time.perf_counter(), spent(), busy()
    corners = [Corner(*entry, chance) for entry in entries]
    for corner in corners:
        corner.attempt(corner.begin)
    for turn in range(rounds):
        order = [c for c in corners if c.stands()]
        first = turn % max(len(order), 1)
        for corner in order[first:] + order[:first]:
            corner.attempt(lambda corner=corner: corner.sample(by_processor))
    for corner in corners:
        corner.attempt(corner.close)
    others = busy() - all_busy - (spent() - own)
    return corners, max(0.0, others) / max(time.perf_counter() - began, 1e-9)
