"""No cheat gets a time, and no honest kernel loses its own. `python3 -m unittest test_cheats`"""

import os
import random
import shutil
import statistics
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import numpy

import compare
from bout import SETS, STORED, Numbers, bout
from cheats import CHEATS, HONEST
from contestant import Contestant
from references import expected

# A short run and a long one.
SIZES = (128, 1024)
# Of a smaller cache there are fewer slots to fill.
CACHE = 64 << 20
ROUNDS = 5


def case_of(n):
    matrix = {"dims": [n, n], "dtype": "f32"}
    params = f"Matmul{{transpose_a:false,transpose_b:false,epilogue:None,accumulate:false}} f32[{n},{n}] f32[{n},{n}]"
    return {"op": "matmul", "params": params, "inputs": [matrix, matrix], "outputs": [matrix]}


def draw(case, seed, paths):
    for i, (path, meta) in enumerate(zip(paths, case["inputs"], strict=True)):
        numpy.random.default_rng([seed, i]).standard_normal(meta["dims"], dtype=numpy.float32).tofile(path)


class Cheats(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        smaller = mock.patch("bout.cache_bytes", lambda: CACHE)
        smaller.start()
        cls.addClassCleanup(smaller.stop)
        # In memory where that can be, as the comparison has it.
        cls.folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.numbers = {}
        for n in SIZES:
            os.mkdir(os.path.join(cls.folder, str(n)))
            cls.numbers[n] = Numbers(case_of(n), draw, os.path.join(cls.folder, str(n)), 1)

    def corners(self, *names, n=SIZES[-1], by_processor=True):
        command = [sys.executable, "-B", os.path.join(HERE, "cheats.py")]
        contestants = [Contestant(command, 1) for _ in names]
        try:
            entries = [(c, name, self.numbers[n]) for c, name in zip(contestants, names, strict=True)]
            return bout(entries, ROUNDS, by_processor, seed=7)[0]
        finally:
            for contestant in contestants:
                contestant.end()

    def everywhere(self):
        """Both sizes, by processor time and by the clock on the wall."""
        for n in SIZES:
            for by_processor in (True, False):
                yield {"n": n, "by_processor": by_processor}

    def test_the_honest_are_believed(self):
        for where in self.everywhere():
            for corner in self.corners(*(kind.__name__ for kind in HONEST), **where):
                with self.subTest(corner.peer, **where):
                    self.assertIsNone(corner.fault)
                    self.assertEqual(len(corner.samples), ROUNDS)
                    self.assertLess(corner.error, 1e-5)
                    self.assertGreater(min(corner.samples), 100.0 if where["n"] == 1024 else 10.0)

    def test_cheats_are_caught(self):
        self.assertGreaterEqual(len(CHEATS), 10)
        for kind in CHEATS:
            for where in self.everywhere():
                with self.subTest(kind.__name__, **where):
                    (corner,) = self.corners(kind.__name__, **where)
                    self.assertIsNotNone(corner.fault, f"{kind.__name__} got {corner.samples}")

    def test_results_that_are_kept_are_of_no_use(self):
        for where in self.everywhere():
            with self.subTest(**where):
                honest, keeps = self.corners("Honest", "ByContent", **where)
                self.assertIsNone(keeps.fault)
                self.assertGreater(statistics.median(keeps.samples), 0.7 * statistics.median(honest.samples))

    def test_what_is_expected_is_computed_once_for_all(self):
        """Of two slots a round; where that takes long of one, which still finds who works on the first and the last."""
        for slow, slots in ((1e9, 2), (-1.0, 1)):
            with mock.patch("bout.SLOW", slow), mock.patch("bout.expected", wraps=expected) as asked:
                self.numbers[128].slow = False
                self.numbers[128].wanted.clear()
                corners = self.corners("Honest", "HonestNewMemory", n=128)
                self.assertEqual([corner.fault for corner in corners], [None, None])
                self.assertEqual(asked.call_count, SETS + slots * ROUNDS)
                self.assertIsNotNone(self.corners("HonestAtFirst", n=128)[0].fault)
        self.numbers[128].slow = False

    def test_a_clock_within_reach_is_not_asked(self):
        honest, patched = self.corners("Honest", "PatchesTheClock")
        self.assertIsNone(patched.fault)
        self.assertGreater(min(patched.samples), 0.3 * min(honest.samples))

    def test_a_contestant_that_dies_takes_no_other_with_it(self):
        command = [sys.executable, "-B", os.path.join(HERE, "cheats.py")]
        dead, alive = Contestant(command, 1), Contestant(command, 1)
        dead.process.kill()
        dead.process.wait()
        entries = [(dead, "Honest", self.numbers[128]), (alive, "Honest", self.numbers[128])]
        corners = bout(entries, 2, True)[0]
        alive.end()
        self.assertIsNotNone(corners[0].fault)
        self.assertIsNone(corners[1].fault)

    def test_above_the_ceiling_is_suspect(self):
        n, case = 1024, case_of(1024)
        ceiling = {"gflops": 100.0, "gb": 10.0}
        record = {"flops": 2 * n**3, "bytes": 12 * n**2, "gflops": 106.0, "bandwidth_gb": 0.6, "voided": False, "error": None}
        compare.against(record, case, ceiling)
        self.assertTrue(record["voided"] and "suspect" in record["error"])
        record.update(gflops=104.0, voided=False, error=None)
        compare.against(record, case, ceiling)
        self.assertFalse(record["voided"])

    def test_no_time_at_all_is_suspect(self):
        case = {**case_of(1024), "mode": "forward", "dtype": "f32", "layout": "contiguous", "flops": 1 << 31, "bytes": 12 << 20}
        corner = mock.Mock(case=case, samples=[0.0, 0.0, 9.0], walls=[0.0, 0.0, 9.0], fault=None, kernel="k", error=0.0)
        run = mock.Mock(by_processor=True, version="1", commit="c", program="p")
        run.options = mock.Mock(threads=1, seed=1)
        for ceiling in (None, {"gflops": 100.0, "gb": 10.0}):
            record = compare.Run.record(run, "forward", corner, ("peer", "1"), [case], ceiling, ({}, 0.0, 0.0))
            self.assertTrue(record["voided"] and "no time" in record["error"])


class Changes(unittest.TestCase):
    """What a run gets is new, and is what it could have been."""

    case = {
        "op": "some",
        "inputs": [
            {"dims": [32, 64], "dtype": "f32"},
            {"dims": [32], "dtype": "f32"},
            {"dims": [512], "dtype": "i8"},
            {"dims": [32, 64], "dtype": "u32"},
        ],
        "outputs": [],
    }

    def draw(self, case, seed, paths):
        chance = numpy.random.default_rng(seed)
        for path, meta in zip(paths, case["inputs"], strict=True):
            chance.integers(1, 100, meta["dims"]).astype(STORED[meta["dtype"]]).tofile(path)

    def test_each_variant_is_new_and_leaves_the_set_as_it_was(self):
        with tempfile.TemporaryDirectory() as folder:
            numbers, chance, seen = Numbers(self.case, self.draw, folder, 1), random.Random(3), set()
            sets = [[Path(path).read_bytes() for path in paths] for paths in numbers.paths]
            for _ in range(100):
                variant = numbers.vary(chance)
                with numbers.written(variant) as paths:
                    given = [Path(path).read_bytes() for path in paths]
                before = sets[variant.base]
                # What is changed, what is too small, what is changed, what has to fit.
                self.assertEqual([a == b for a, b in zip(given, before)], [False, True, False, True])
                seen.add(tuple(given))
                array = numpy.frombuffer(given[0], dtype=numpy.float32)
                self.assertTrue(set(array) <= set(numpy.frombuffer(before[0], dtype=numpy.float32)))
            self.assertEqual(len(seen), 100)
            self.assertEqual(sets, [[Path(path).read_bytes() for path in paths] for paths in numbers.paths])

    def test_the_reference_is_of_what_was_written(self):
        with tempfile.TemporaryDirectory() as folder:
            numbers = Numbers(self.case, self.draw, folder, 1)
            variant = numbers.vary(random.Random(5))
            with numbers.written(variant) as paths:
                given = [Path(path).read_bytes() for path in paths]
            self.assertEqual(given, [numbers.input(variant, i).tobytes() for i in range(4)])

    def test_looked_at_are_two_that_differ_in_each_round(self):
        with tempfile.TemporaryDirectory() as folder:
            numbers, chance, seen = Numbers(self.case, self.draw, folder, 1), random.Random(3), set()
            for _ in range(10):
                numbers.begin_round(chance)
                seen |= set(numbers.looked_at)
            self.assertEqual(len(seen), 20)


if __name__ == "__main__":
    unittest.main()
