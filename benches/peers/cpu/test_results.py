"""What the file of results keeps, and what is timed again. `python3 -m unittest test_results`"""

import contextlib
import io
import json
import os
import sys
import tempfile
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import compare
import page
import results

CASE = {"op": "softmax", "params": "s", "group": "rows", "name": "softmax 4 x 4", "mode": "forward"}
CPU = {"backend": "cpu", "name": "CPU", "driver": "Linux", "software": False}


def match(run, *peers, program="p", **fields):
    """Ours and peers of one run, as they are written."""
    mark = {"id": run, "of": 1 + len(peers), "name": CASE["name"], "mode": "forward", "rounds": 7}
    mark["asked"] = {peer: "1" for peer in peers}
    limits = {"threads": 1, "others_percent": 0}
    record = {**dict.fromkeys(results.KEYS, 1.0), "op": "softmax", "params": "s", "mode": "forward", "passed": True, "commit": "c"}
    record.update({"time": "2026-01-01", "version": "1", "again": False, "voided": False, "samples_us": [1.0], "match": mark, **fields})
    device = lambda who: {**CPU, "limits": limits, "registry": [who]}
    both = [("espalier", program), *((peer, "") for peer in peers)]
    return [{**record, "device": device(who), "kernel_hash": of} for who, of in both]


class File(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path, self.said = os.path.join(self.folder.name, "results.jsonl"), []

    def take_over(self, text, program="p"):
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(text)
        self.said.clear()
        found = results.take_over(self.path, program, self.said.append)
        return [records[0]["match"]["id"] for records in found.values()]

    def test_only_whole_matches_are_gone_on_from(self):
        one, two = results.lines_of(match("1", "PyTorch")), results.lines_of(match("2", "PyTorch", "candle"))
        for end in (*range(0, len(two), 97), len(two) - 2, len(two) - 1):
            kept = self.take_over(one + two[:end])
            self.assertEqual(kept, ["2"] if end == len(two) - 1 else ["1"])
            if end < len(two) - 1:
                with open(self.path, encoding="utf-8") as file:
                    self.assertEqual(file.read(), one)
                self.assertFalse(os.path.exists(f"{self.path}.old-1"))
        # What is written next is whole, whatever was there.
        self.take_over(one + two[:-9])
        results.append(self.path, match("3"))
        found, cut, foreign = results.read(self.path)
        self.assertEqual(([r[0]["match"]["id"] for r in found.values()], cut, foreign), (["3"], 0, 0))

    def test_a_line_that_was_glued_to_another_takes_its_match_with_it(self):
        one, two = results.lines_of(match("1", "PyTorch")), results.lines_of(match("2", "PyTorch"))
        self.assertEqual(self.take_over(one[: len(one) // 4] + two), [])

    def test_nothing_of_others_is_lost(self):
        ours = results.lines_of(match("1"))
        for line in ("null", "5", '{"op":"x"}', "a list to buy", json.dumps({**match("1")[0], "match": None}), "[[]]"):
            self.assertEqual(self.take_over(line + "\n" + ours), ["1"])
            self.assertEqual(len(self.said), 1)
        self.assertEqual(len(os.listdir(self.folder.name)), 7)

    def test_another_programs_results_are_set_aside_each_time(self):
        for program in ("q", "r"):
            self.assertEqual(self.take_over(results.lines_of(match("1")), program), [])
            self.assertIn(".old-", self.said[0])
        self.assertEqual(sorted(os.listdir(self.folder.name)), ["results.jsonl.old-1", "results.jsonl.old-2"])


class Again(unittest.TestCase):
    def test_a_match_stands_where_all_peers_of_now_were_asked(self):
        had = match("1", "PyTorch", "candle")
        self.assertIsNone(compare.stale(had, {"PyTorch": "1"}, 7))
        self.assertIn("burn", compare.stale(had, {"PyTorch": "1", "burn": "1"}, 7))
        self.assertIn("PyTorch", compare.stale(had, {"PyTorch": "2"}, 7))
        self.assertIsNotNone(compare.stale(had, {}, 15))

    def test_noise_and_the_end_of_a_contestant_are_not_final(self):
        self.assertIsNotNone(compare.stale(match("1", "PyTorch", again=True), {}, 7))
        # What was wrong would be wrong again.
        self.assertIsNone(compare.stale(match("1", "PyTorch", passed=False, error="wrong"), {}, 7))
        case = {**CASE, "dtype": "f32", "layout": "contiguous", "flops": 1, "bytes": 1}
        run = mock.Mock(by_processor=False, version="1", commit="c", program="p")
        again = lambda fault, gone, others: compare.Run.record(
            run, "forward", mock.Mock(case=case, walls=[1.0], fault=fault, gone=gone), ("peer", "1"), [case], None, ({}, 0.0, others)
        )["again"]
        self.assertEqual([again(None, False, 0.0), again(None, False, 1.0), again("wrong", False, 1.0)], [False, True, False])
        self.assertTrue(again("it ended", True, 0.0))

    def test_a_ceiling_without_samples_is_measured_again(self):
        cases = [{**CASE, "op": op, "name": op, "group": "ceiling"} for op in ("multiply_add_chain", "scale")]
        run = mock.Mock(bounded_by=CPU, options=mock.Mock(threads=1))
        had = {(("cpu", "CPU", 1), c["name"], "forward"): match(c["op"], passed=False, min_us=0.0) for c in cases}
        run.match.side_effect = lambda *_: match("new", flops=4000, bytes=2000)
        self.assertEqual(compare.ceilings(run, cases, had, lambda _: None), {"gflops": 4.0, "gb": 2.0})
        had = {key: match("1", flops=1000, bytes=1000) for key in had}
        self.assertEqual(compare.ceilings(run, cases, had, lambda _: None), {"gflops": 1.0, "gb": 1.0})
        self.assertEqual(run.match.call_count, 2)
        run.match.side_effect = lambda *_: []
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit):
            compare.ceilings(run, cases, {}, lambda _: None)


class Errors(unittest.TestCase):
    def called(self, *arguments):
        said = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
            path = os.path.join(folder, "page.md")
            with open(path, "w", encoding="utf-8") as file:
                file.write("a page")
            program = ["--espalier", sys.executable, "--out", os.path.join(folder, "out"), "--page", path]
            with mock.patch.object(sys, "argv", ["compare.py", *program, *arguments]):
                with mock.patch.object(compare, "listed", lambda _: [CASE]), mock.patch.object(compare.signal, "signal"):
                    with self.assertRaises(SystemExit) as end:
                        compare.main()
            with open(path, encoding="utf-8") as file:
                self.assertEqual(file.read(), "a page")
        self.assertEqual(end.exception.code, 2)
        return said.getvalue()

    def test_filters_that_fit_nothing_and_numbers_that_cannot_be(self):
        self.assertIn("--op 'nonsense'", self.called("--op", "nonsense"))
        self.assertIn("--case 'NN'", self.called("--case", "NN"))
        for wrong in (["--rounds", "0"], ["--threads", "0"], ["--seed", "-1"], ["--growth", "/nope"], ["--espalier", "/nope"]):
            self.assertIn(wrong[0], self.called(*wrong))

    def test_no_page_is_written_of_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "page.md")
            self.assertFalse(page.write([], [CASE], path))
            self.assertFalse(page.write(match("1", "PyTorch")[1:], [CASE], path))
            self.assertEqual(os.listdir(folder), [])


class Folder(unittest.TestCase):
    def test_what_a_killed_judge_left_is_swept(self):
        with tempfile.TemporaryDirectory() as folder:
            # No process has so high a number.
            names = ["espalier-peers-4294967295", f"espalier-peers-{os.getppid()}", "espalier-peers-x"]
            for name in names:
                os.mkdir(os.path.join(folder, name))
            compare.sweep(folder)
            self.assertEqual(sorted(os.listdir(folder)), sorted(names[1:]))

    def test_where_memory_is_small_numbers_lie_beside_the_results(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
            free = lambda root: mock.Mock(free=64 << 20 if root == "/dev/shm" else 4 << 30)
            with mock.patch.object(compare.shutil, "disk_usage", free):
                found = compare.folder_for(os.path.join(folder, "results.jsonl"), 1 << 30)
            self.assertEqual(os.path.dirname(found), folder)
        self.assertTrue(not os.path.isdir("/dev/shm") or "/dev/shm has" in said.getvalue())


if __name__ == "__main__":
    unittest.main()
