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
    {"op": "matmul", "params": "m", "group": "matmul", "name": "NN 512 x 512 x 512 f32"},
    {"op": "kl", "params": "k", "group": "losses", "name": "kl 4 x 4"},
    {"op": "kl_bwd", "params": "b", "group": "losses", "name": "kl 4 x 4"},
]


CPU = {"backend": "cpu", "name": "CPU", "driver": "Linux", "software": False}
ADAPTER = {"backend": "wgpu", "name": "llvmpipe (256 bits)", "driver": "Mesa", "software": True}


def record(op, params, who, samples, mode="forward", error=None, device=CPU):
    middle = sorted(samples)[len(samples) // 2]
    limits = {"threads": 1, "load_percent": 0, "others_percent": 0}
    return {
        "time": "2026-01-01T00:00:00Z",
        "version": "1",
        "commit": "abc",
        "device": {**device, "limits": limits, "registry": [who]},
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
            law = {"name": "f32 product", "variable": "n", "found": [3.2], "least": [2.9], "most": [3.1]}
            law.update(sizes=[1.0, 2.0], us=[1.0, 9.0], holds=False)
            page.write(self.records, CASES, path, [law])
            with open(path, encoding="utf-8") as file:
                text = file.read()
            self.assertTrue(os.path.exists(os.path.join(folder, "benchmarks", "ratios-1.svg")))
        self.assertIn("**2.00** (1.50–2.00)", text)
        self.assertIn("| f32 product | n | 3.20 | 2.90 to 3.10 | 1 2 | 1 9 | broken |", text)
        self.assertIn("softmax 4 x 4 (forward), wrong: relative error 1", text)
        self.assertIn("| KL with its gradient | PyTorch | 8 | 20 | 10.00 | met |", text)

    def test_an_adapter_has_a_section_of_its_own(self):
        on = [
            record("softmax", "s", "espalier", [1000.0, 1000.0], device=ADAPTER),
            record("softmax", "s", "burn wgpu", [5000.0, 6000.0], device=ADAPTER),
            record("matmul", "m", "espalier", [10.0], device=ADAPTER),
            record("matmul", "m", "burn wgpu", [18.0], device=ADAPTER),
            record("matmul", "m", "espalier, naive rung", [99.0], device=ADAPTER),
        ]
        found = page.collect(on + self.records, CASES)
        self.assertEqual([m.place.backend for m in found], ["cpu"] * 3 + ["wgpu"] * 2)
        softmax = [m for m in found if m.name == "softmax 4 x 4"]
        self.assertEqual([sorted(m.peers) for m in softmax], [["PyTorch", "wrong"], ["burn wgpu"]])
        self.assertEqual(softmax[1].ratio("burn wgpu"), (5.5, 5.0, 6.0))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "benchmarks.md")
            page.write(self.records + on, CASES, path)
            with open(path, encoding="utf-8") as file:
                processor, adapter = file.read().split("## WGSL kernels on software Vulkan")
            self.assertTrue(os.path.exists(os.path.join(folder, "benchmarks", "ratios-llvmpipe.svg")))
            # No processor's page is needed for an adapter's.
            page.write(on, CASES, path)
        self.assertNotIn("| burn wgpu |", processor)
        self.assertNotIn("PyTorch", adapter)
        self.assertIn("Adapter: llvmpipe (256 bits); driver: Mesa.", adapter)
        self.assertIn("| softmax, LayerNorm | burn wgpu | 4 | 7 | 5.50 | met |", adapter)
        self.assertIn("| f32 products | burn wgpu | 1.5 | 2 | 1.80 | met |", adapter)
        self.assertIn("| f32 products | espalier, naive rung | 10 | 10 | 9.90 | missed |", adapter)


if __name__ == "__main__":
    unittest.main()
