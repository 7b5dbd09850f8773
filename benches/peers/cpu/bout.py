"""One case, several contestants, in turn: what is believed, and what is not.

Nobody times or judges himself. A contestant's processor time is read from outside; its results are held against float64
before timing, after every timed run, and always on a set of memory that was filled with other numbers and poisoned since. No run
meets numbers that were there before.
"""

import os
import random
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy

import models
from contestant import Gone, Refused
from references import bound_of, expected, judge

STORED = {"f32": numpy.float32, "bf16": numpy.uint16, "f16": numpy.float16, "i8": numpy.int8, "u32": numpy.uint32, "i32": numpy.int32}
# Numbers that are drawn once. What a timed run gets is one of these with changes that are drawn for it alone.
SETS = 3
FEWEST_SLOTS, MOST_SLOTS = 3, 128
# Seconds for a float64 result above which one slot is looked at after a run instead of two.
SLOW = 1.0
# A timed run takes as many slots as fill this time, each once and each with numbers that nobody was given before: whoever
# keeps results by what they were made of finds none of them again, in this run or in another round.
SAMPLE = 0.06
# Ops that change their inputs.
IN_PLACE = ("adamw", "accumulate_scaled", "sgd")
# Of the time of one run: what a contestant may do after it said that it was done, or when its result is fetched.
AFTERWARDS = 0.25
SETTLE = 0.01
# Fetches whose middle is no accident.
ENOUGH = 8
# What changes: integers without a sign are tokens, masks and places, which have to fit each other and what they point to.
CHANGED = ("f32", "f16", "bf16", "i8")
# Fewer elements are rates, a factor, a step, each with a meaning and a range of its own.
FEWEST_CHANGED = 64
# The part of an array that is copied over another part: of every type more than its bound lets pass if it is not seen.
SHARE = 256
# Stretches begin at and take whole fours, which is what an encoder's zeros are made of.
FOUR = 4


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


class Variant(NamedTuple):
    """Numbers of a set, of which a stretch of each array is a copy of another: so every value keeps to the range of its kind.

    Results that are inputs of a way back (sums of exponentials, outputs of attention) then are of other numbers; each reference
    takes them as they are given, or makes them anew.
    """

    base: int
    # Of each input to where, from where and how many elements; None where it is as in the set.
    moves: tuple


class Numbers:
    """Several sets of a case's inputs, as files, with their float64 results, and changes to them without end."""

    def __init__(self, case, draw, folder, seed):
        self.case, self.folder = case, folder
        # Other cases' files carry the seed too; their names must not meet.
        stem = f"{case['op']}-{os.getpid()}"
        self.paths = [[f"{folder}/{stem}-{s}-{i}" for i in range(len(case["inputs"]))] for s in range(SETS)]
        for s, paths in enumerate(self.paths):
            draw(case, seed * 100 + s, paths)
        self.wanted, self.slow = {}, False

    def plain(self, base):
        return Variant(base, (None,) * len(self.case["inputs"]))

    def vary(self, chance):
        base = chance.randrange(SETS)
        variant = Variant(base, tuple(self.move(base, i, chance) for i in range(len(self.case["inputs"]))))
        if not any(variant.moves):
            raise ValueError(f"{self.case['op']}: nothing of it can be changed")
        return variant

    def move(self, base, number, chance):
        meta = self.case["inputs"][number]
        dims, size = meta["dims"], numpy.dtype(STORED[meta["dtype"]]).itemsize
        count = int(numpy.prod(dims))
        if meta["dtype"] not in CHANGED or count < FEWEST_CHANGED:
            return None
        length = max(FOUR, count // SHARE // FOUR * FOUR)
        # From other rows: equal elements of one would leave open which is the larger.
        apart = length + (dims[-1] if len(dims) > 1 else 0)
        with open(self.paths[base][number], "rb") as file:
            at = lambda place: os.pread(file.fileno(), length * size, place * size)
            for _ in range(16):
                to, of = (FOUR * chance.randrange((count - length) // FOUR + 1) for _ in range(2))
                if abs(to - of) >= apart and at(to) != at(of):
                    return to, of, length
        return None

    @contextmanager
    def written(self, variant):
        """The files of a variant, which are those of its set again afterwards."""
        paths, before = self.paths[variant.base], []
        try:
            for path, meta, move in zip(paths, self.case["inputs"], variant.moves, strict=True):
                if move:
                    size = numpy.dtype(STORED[meta["dtype"]]).itemsize
                    to, of, length = (x * size for x in move)
                    with open(path, "r+b") as file:
                        before.append((path, to, os.pread(file.fileno(), length, to)))
                        os.pwrite(file.fileno(), os.pread(file.fileno(), length, of), to)
            yield paths
        finally:
            for path, to, content in before:
                with open(path, "r+b") as file:
                    os.pwrite(file.fileno(), content, to)

    def begin_round(self, chance):
        """Numbers of the slots that are looked at, the same for all contestants, so that what is expected is computed once.

        They differ: of twins one could be worked on, and that there are twins would say where somebody looks.
        """
        self.wanted.clear()
        self.looked_at = self.vary(chance), self.vary(chance)

    def expected(self, variant, computes):
        if (variant, computes) not in self.wanted:
            arrays, began = [self.input(variant, i) for i in range(len(self.case["inputs"]))], time.perf_counter()
            self.wanted[variant, computes] = expected(self.case, arrays, computes)
            self.slow = self.slow or time.perf_counter() - began > SLOW
        return self.wanted[variant, computes]

    def input(self, variant, number):
        """Input `number` of a variant."""
        meta, move = self.case["inputs"][number], variant.moves[number]
        array = numpy.fromfile(self.paths[variant.base][number], dtype=STORED[meta["dtype"]])
        if move:
            to, of, length = move
            array[to : to + length] = array[of : of + length].copy()
        return array.reshape(meta["dims"])

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
        # Its process ended, which says nothing about another run.
        self.gone = False
        self.kernel, self.error, self.samples, self.walls, self.runs = "", 0.0, [], [], 1
        # What each slot was filled with last.
        self.filled = {}

    def stands(self):
        return not self.skip and not self.fault

    def attempt(self, step):
        """A contestant that fails takes no other with it."""
        try:
            step()
        except Refused as reason:
            self.gone = self.gone or isinstance(reason, Gone)
            self.fault = self.fault or str(reason)

    def fill(self, slot, variant):
        """Other numbers in the same memory, and poison in the outputs."""
        with self.numbers.written(variant) as paths:
            self.contestant.ask("fill", slot=slot, inputs=paths)
        self.filled[slot] = variant

    def fill_plain(self):
        for slot in range(self.slots):
            self.fill(slot, self.numbers.plain(slot % SETS))

    def fetch(self, slot):
        """Has a slot's results written into new files; the processor and wall time that it took."""
        for path in self.results:
            os.path.exists(path) and os.remove(path)
        return self.contestant.timed("read", slot=slot, outputs=self.results)

    def check(self, slot):
        """Holds a slot's results against those of the numbers that it was last filled with."""
        self.fetch(slot)
        variant = self.filled[slot]
        want = self.numbers.expected(variant, self.computes)
        want = [want[i] for i in self.outputs] if self.computes is None else want
        for index, (path, expected_output) in enumerate(zip(self.results, want, strict=True)):
            if not os.path.exists(path):
                return f"output {index} was not handed in"
            meta = self.meta(index)
            got = numpy.fromfile(path, dtype=STORED[meta])
            if expected_output is not None and got.size == expected_output.size:
                got = models.handed_in(self.case, index, got, lambda i: self.numbers.input(variant, i))
            dims = self.case["outputs"][self.outputs[index]]["dims"] if expected_output is None else expected_output.shape
            error, reason = judge(expected_output, got, meta, bound_of(self.case, meta, self.computes), dims)
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
        self.fill_plain()
        self.contestant.ask("run", first=0, runs=self.slots)
        for slot in range(min(SETS, self.slots)):
            self.fault = self.fault or self.check(slot)
        if self.fault:
            return
        self.fill_plain()
        once = []
        for turn in range(3):
            if self.in_place:
                self.fill(turn % self.slots, self.numbers.plain(turn % SETS))
            once.append(max(self.contestant.timed("run", first=turn % self.slots, runs=1)))
        self.single = max(min(once), 1e-7)
        self.runs = min(self.slots, int(SAMPLE / self.single) + 1)

    def sample(self, by_processor):
        """One timed run, checked on its last slot and on another that the contestant cannot guess."""
        last = self.runs - 1
        # Two that differ, where there are two; one of them, by lot, where each takes long.
        slots = sorted({last, self.chance.randrange(max(last, 1))}, reverse=True)
        if self.numbers.slow:
            slots = [self.chance.choice(slots)]
        checked = dict(zip(slots, self.numbers.looked_at))
        fresh = lambda slot: checked.get(slot) or self.numbers.vary(self.chance)
        warm = None if self.in_place else self.slots - 1
        for slot in range(self.slots):
            if slot != warm:
                self.fill(slot, fresh(slot))
        if warm is not None:
            # Awake, with its code at hand.
            self.fill(warm, self.numbers.vary(self.chance))
            self.contestant.ask("run", first=warm, runs=1)
            self.fill(warm, fresh(warm))
        cpu, wall = self.contestant.timed("run", first=0, runs=self.runs)
        said = self.contestant.cpu()
        if by_processor:
            time.sleep(SETTLE)
            self.late += self.contestant.cpu() - said > AFTERWARDS * cpu / self.runs + 1e-3
        self.look_for_work_left(cpu, wall, by_processor)
        for slot in checked:
            self.fault = self.fault or self.check(slot)
        self.samples.append(cpu * 1e6 / self.runs)
        self.walls.append(wall * 1e6 / self.runs)

    def look_for_work_left(self, cpu, wall, by_processor):
        """Fetches all results twice: what the first time takes longer was left to it. Wall time also has what others of its
        threads go on doing."""
        took = [[self.fetch(slot)[0 if by_processor else 1] for slot in range(self.runs)] for _ in range(2)]
        run = cpu if by_processor else wall
        sums, middles = [sum(x) for x in took], [statistics.median(x) for x in took]
        # All of it may be waited for at once, or each slot's be done for itself, which next to the fetch of a small result is
        # little: that many fetches show by their middle.
        at_once = sums[0] - 1.5 * sums[1] > AFTERWARDS * run + 1e-3
        one_by_one = self.runs >= ENOUGH and middles[0] - 1.25 * middles[1] > AFTERWARDS * run / self.runs + 2e-5
        self.lazy += at_once or one_by_one

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
        for numbers in {id(corner.numbers): corner.numbers for corner in corners}.values():
            numbers.begin_round(chance)
        order = [c for c in corners if c.stands()]
        first = turn % max(len(order), 1)
        for corner in order[first:] + order[:first]:
            corner.attempt(lambda corner=corner: corner.sample(by_processor))
    for corner in corners:
        corner.attempt(corner.close)
    others = busy() - all_busy - (spent() - own)
    return corners, max(0.0, others) / max(time.perf_counter() - began, 1e-9)
