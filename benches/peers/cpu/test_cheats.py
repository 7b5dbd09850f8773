"""No cheat gets a time, and no honest kernel loses its own. `python3 -m unittest test_cheats`"""

import os
import shutil
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import numpy

import compare
from bout import Numbers, bout
from cheats import CHEATS, HONEST
from contestant import Contestant

N = 1024
MATRIX = {"dims": [N, N], "dtype": "f32"}
CASE = {
    "op": "matmul",
    "params": f"Matmul{{transpose_a:false,transpose_b:false,epilogue:None,accumulate:false}} f32[{N},{N}] f32[{N},{N}]",
    "inputs": [MATRIX, MATRIX],
    "outputs": [MATRIX],
}


def draw(case, seed, paths):
    for i, path in enumerate(paths):
        numpy.random.default_rng([seed, i]).standard_normal((N, N), dtype=numpy.float32).tofile(path)


class Cheats(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.numbers = Numbers(CASE, draw, cls.folder, 1)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def corners(self, *names):
        command = [sys.executable, "-B", os.path.join(HERE, "cheats.py")]
        contestants = [Contestant(command, 1) for _ in names]
        try:
            entries = [(c, name, self.numbers) for c, name in zip(contestants, names, strict=True)]
            return bout(entries, 5, True, seed=7)[0]
        finally:
            for contestant in contestants:
                contestant.end()

    def test_the_honest_are_believed(self):
        for corner in self.corners(*(kind.__name__ for kind in HONEST)):
            self.assertIsNone(corner.fault, corner.peer)
            self.assertEqual(len(corner.samples), 5)
            self.assertLess(corner.error, 1e-5)
            self.assertGreater(min(corner.samples), 100.0)

    def test_cheats_are_caught(self):
        self.assertGreaterEqual(len(CHEATS), 10)
        for kind in CHEATS:
            with self.subTest(kind.__name__):
                (corner,) = self.corners(kind.__name__)
                self.assertIsNotNone(corner.fault, f"{kind.__name__} got {corner.samples}")

    def test_a_clock_within_reach_is_not_asked(self):
        honest, patched = self.corners("Honest", "PatchesTheClock")
        self.assertIsNone(patched.fault)
        self.assertGreater(min(patched.samples), 0.3 * min(honest.samples))

    def test_a_contestant_that_dies_takes_no_other_with_it(self):
        command = [sys.executable, "-B", os.path.join(HERE, "cheats.py")]
        dead, alive = Contestant(command, 1), Contestant(command, 1)
        dead.process.kill()
        dead.process.wait()
        entries = [(dead, "Honest", self.numbers), (alive, "Honest", self.numbers)]
        corners = bout(entries, 2, True)[0]
        alive.end()
        self.assertIsNotNone(corners[0].fault)
        self.assertIsNone(corners[1].fault)

    def test_above_the_ceiling_is_suspect(self):
        case = {"inputs": [MATRIX]}
        ceiling = {"gflops": 100.0, "gb": 10.0}
        record = {"flops": 2 * N**3, "bytes": 12 * N**2, "gflops": 106.0, "bandwidth_gb": 0.6, "voided": False, "error": None}
        compare.against(record, case, ceiling)
        self.assertTrue(record["voided"] and "suspect" in record["error"])
        record.update(gflops=104.0, voided=False, error=None)
        compare.against(record, case, ceiling)
        self.assertFalse(record["voided"])


if __name__ == "__main__":
    unittest.main()
