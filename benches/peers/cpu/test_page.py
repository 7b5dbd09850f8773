"""What the page makes of records. `python3 -m unittest test_page`"""

import os
import re
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import chart
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

    def test_a_peer_is_of_its_own_match_or_of_none(self):
        ours, theirs = record("softmax", "s", "espalier", [100.0]), record("softmax", "s", "PyTorch", [200.0])
        both = self.records[-3:]
        # Whatever is lost, nothing is booked on the match before.
        for lost in ([theirs], [*both[1:]], [both[2]], [ours, theirs, *both[1:]], [ours, both[2]], [theirs, ours]):
            for match in page.collect(lost, CASES):
                self.assertEqual(match.name, "softmax 4 x 4")
                self.assertEqual([t.record for t in match.peers.values()], [r for r in lost if r is theirs and lost[0] is ours])
        marked = lambda r, run: {**r, "match": {"id": run}}
        (match,) = page.collect([marked(ours, 1), marked(theirs, 2)], CASES)
        self.assertEqual(match.peers, {})
        # Our own dense form has a case of its own.
        cases = [{**CASES[3], "op": op, "name": op} for op in ("matmul_bitmap_int8", "matmul_int8")]
        dense = record("matmul_int8", "m", "espalier, dense", [20.0])
        (match,) = page.collect([record("matmul_bitmap_int8", "m", "espalier", [10.0]), dense], cases)
        self.assertEqual(match.ratio("espalier, dense")[0], 2.0)

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
        self.assertIn("| KL with its gradient | PyTorch | 8 | 20 | 10.00 |  | met |", text)

    def written(self, records):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "benchmarks.md")
            page.write(records, CASES, path)
            with open(path, encoding="utf-8") as file:
                return file.read()

    def goal(self, title, against, *records):
        """What stands behind must and aim."""
        (row,) = [line for line in self.written(records).splitlines() if line.startswith(f"| {title} | {against} |")]
        return [column.strip() for column in row.split("|")[5:-1]]

    def test_a_spread_around_the_must_decides_nothing(self):
        softmax = lambda *theirs: self.goal(
            "softmax", "PyTorch", record("softmax", "s", "espalier", [100.0] * 3), record("softmax", "s", "PyTorch", list(theirs))
        )
        self.assertEqual(softmax(155.0, 160.0, 165.0), ["1.60", "", "met"])
        self.assertEqual(softmax(140.0, 160.0, 165.0), ["1.60", "", "met, undecided"])
        self.assertEqual(softmax(130.0, 140.0, 165.0), ["1.40", "", "missed, undecided"])
        self.assertEqual(softmax(130.0, 140.0, 145.0), ["1.40", "", "missed"])
        self.assertEqual(softmax(230.0, 230.0, 245.0), ["2.30", "", "aim met"])

    def test_what_is_void_stays_in_the_goal(self):
        gelus = [{**CASES[2], "op": f"gelu{i}", "name": f"gelu {i}"} for i in range(3)]
        CASES.extend(gelus)
        self.addCleanup(lambda: [CASES.remove(case) for case in gelus])
        times = lambda i, ours, theirs: [
            record(f"gelu{i}", "s", "espalier", [10.0], error=ours), record(f"gelu{i}", "s", "PyTorch", [20.0], error=theirs)
        ]  # fmt: skip
        said = self.goal("GELU", "PyTorch", *times(0, None, None), *times(1, "wrong", None), *times(2, None, "wrong"))
        self.assertEqual(said, ["2.00", "", "met by the rest, void in 2 of 3"])
        self.assertEqual(self.goal("GELU", "PyTorch", *times(0, "wrong", None))[-1], "void in 1 of 1")

    def test_nobody_is_the_fastest_without_a_remark_where_another_is_void(self):
        ours = record("matmul", "m", "espalier", [100.0])
        faer = record("matmul", "m", "faer", [99.0], error="suspect: more than 5 % above this run's ceiling")
        gemm = lambda time: record("matmul", "m", "gemm x86-v4", [time])
        said = lambda time: self.goal("f32 products", "faer or gemm x86-v4", ours, faer, gemm(time))
        self.assertEqual(said(120.0), ["1.20", "", "met by the rest, void in 1 of 1"])
        # What misses against the weaker one misses against the fastest.
        self.assertEqual(said(90.0), ["0.90", "", "missed, void in 1 of 1"])

    def test_memory_that_is_kept_stands_beside(self):
        kept = [record("softmax", "s", "espalier", [100.0]), record("softmax", "s", "PyTorch", [200.0])]
        kept.append(record("softmax", "s", "PyTorch, memory kept", [120.0]))
        self.assertEqual(self.goal("softmax", "PyTorch", *kept), ["2.00", "1.20", "met"])
        self.assertIn("allocator gives nothing back", self.written(kept))

    def test_programs_and_rounds_are_said(self):
        mine = lambda op, params, program: {**record(op, params, "espalier", [1.0] * 7), "kernel_hash": program}
        one = [mine("softmax", "s", "0123456789"), mine("matmul", "m", "0123456789"), mine("kl", "k", "0123456789")]
        text = self.written(one)
        self.assertIn("espalier abc (program 01234567);", text)
        self.assertIn("- Rounds: 7.", text)
        self.assertNotIn("programs of ours", text)
        text = self.written([*one[:2], mine("kl", "k", "fedcba98765")])
        self.assertIn("2 programs of ours: abc (program 01234567)", text)
        self.assertIn("  - abc (program fedcba98): kl 4 x 4.", text)
        # A run of one match that another program did again is that one's.
        self.assertNotIn("programs of ours", self.written([*one, mine("kl", "k", "0123456789")]))

    def test_peers_are_told_apart_and_the_legend_fits(self):
        peers = [f"a peer with a long name {i}" for i in range(13)]
        text = [record("softmax", "s", "espalier", [1.0]), *(record("softmax", "s", p, [2.0]) for p in peers)]
        matches = page.collect(text, CASES)
        self.assertEqual(len(set(chart.looks(matches).values())), 13)
        drawing = chart.ratios(matches)
        width = float(re.search(r'viewBox="0 0 (\d+)', drawing)[1])
        ends = [float(x) + 7.2 * len(p) for x, p in re.findall(r'<text x="([\d.]+)"[^>]*>(a peer[^<]*)<', drawing)]
        self.assertEqual(len(ends), 13)
        self.assertLess(max(ends), width)

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
