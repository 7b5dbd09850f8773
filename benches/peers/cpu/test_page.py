"""What the page makes of records. `python3 -m unittest test_page`"""

import os
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import page

CASES = [
    {"op": "multiply_add_chain", "params": "chain", "group": "ceiling", "name": "chain"},
    {"op": "scale", "params": "scale", "group": "ceiling", "name": "copy"},
    {"op": "softmax", "params": "s", "group": "rows", "name": "softmax 4 x 4"},
    {"op": "kl", "params": "k", "group": "losses", "name": "kl 4 x 4"},
    {"op": "kl_bwd", "params": "b", "group": "losses", "name": "kl 4 x 4"},
]


def record(op, params, who, samples, mode="forward", error=None):
    middle = sorted(samples)[len(samples) // 2]
    limits = {"threads": 1, "load_percent": 0, "others_percent": 0}
    return {
        "time": "2026-01-01T00:00:00Z",
        "version": "1",
        "commit": "abc",
        "device": {"name": "CPU", "driver": "Linux", "limits": limits, "registry": [who]},
        "op": op,
        "params": params,
        "mode": mode,
        "kernel": "k",
        "passed": error is None,
        "voided": False,
        "error": error,
        "samples_us": samples,
        "min_us": min(samples),
        "median_us": middle,
        "flops": 1000,
        "bytes": 1000,
        "gflops": 1.0,
        "bandwidth_gb": 1.0,
    }


class Page(unittest.TestCase):
    records = [
        record("multiply_add_chain", "chain", "espalier", [1.0]),
        record("scale", "scale", "espalier", [1.0]),
        record("softmax", "s", "espalier", [100.0, 200.0, 100.0]),
        record("softmax", "s", "PyTorch", [200.0, 300.0, 200.0]),
        record("softmax", "s", "wrong", [1.0, 1.0, 1.0], error="relative error 1"),
        record("kl", "k", "espalier", [10.0, 10.0, 10.0]),
        record("kl", "k", "PyTorch", [20.0, 20.0, 20.0]),
        record("kl", "k", "espalier", [10.0, 10.0, 10.0]),
        record("kl_bwd", "b", "espalier", [30.0, 30.0, 30.0], "backward"),
        record("kl_bwd", "b", "PyTorch", [400.0, 400.0, 400.0], "both"),
    ]

    def test_ratios_are_of_rounds_and_both_ways_are_sums(self):
        found = {(m.name, m.mode): m for m in page.collect(self.records, CASES)}
        self.assertEqual(found["softmax 4 x 4", "forward"].ratio("PyTorch"), (2.0, 1.5, 2.0))
        self.assertIsNone(found["softmax 4 x 4", "forward"].ratio("wrong"))
        self.assertEqual(found["kl 4 x 4", "forward"].ratio("PyTorch")[0], 2.0)
        self.assertEqual(found["kl 4 x 4", "both"].ratio("PyTorch")[0], 10.0)

    def test_a_later_run_of_a_match_counts(self):
        again = [record("softmax", "s", "espalier", [50.0]), record("softmax", "s", "PyTorch", [200.0])]
        found = {(m.name, m.mode): m for m in page.collect(self.records + again, CASES)}
        self.assertEqual(found["softmax 4 x 4", "forward"].ratio("PyTorch")[0], 4.0)

    def test_the_page_says_what_has_no_time(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "benchmarks.md")
            page.write(self.records, CASES, path)
            with open(path, encoding="utf-8") as file:
                text = file.read()
            self.assertTrue(os.path.exists(os.path.join(folder, "benchmarks", "ratios-1.svg")))
        self.assertIn("**2.00** (1.50–2.00)", text)
        self.assertIn("softmax 4 x 4 (forward), wrong: relative error 1", text)
        self.assertIn("| KL with its gradient | PyTorch | 8 | 20 | 10.00 | met |", text)


if __name__ == "__main__":
    unittest.main()
