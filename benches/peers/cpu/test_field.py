"""Who is asked on which device. `python3 -m unittest test_field`"""

import argparse
import os
import sys
import tempfile
import unittest
import unittest.mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import compare
import contestant
import goals

# Ours and a peer's program in one: it says where it runs, and who asked for what.
SIDE = """#!{python}
import json, os, sys
adapter = "llvmpipe" if os.environ["PEER_DEVICE"] == "wgpu" else None
peers = [{{"name": "on the processor", "version": "1"}}, {{"name": "elsewhere", "version": "1", "adapter": "a GPU"}}]
if adapter:
    peers.append({{"name": "on the adapter", "version": "1", "adapter": adapter}})
for line in sys.stdin:
    said = {{"ok": True, "device": adapter or "CPU", "arguments": sys.argv[1:], "peers": peers}}
    print(json.dumps({{**said, "threads": os.environ["LP_NUM_THREADS"]}}), flush=True)
"""


class Asked(unittest.TestCase):
    def field(self, device):
        with tempfile.TemporaryDirectory() as folder:
            side = os.path.join(folder, "side")
            with open(side, "w", encoding="utf-8") as file:
                file.write(SIDE.format(python=sys.executable))
            os.chmod(side, 0o700)
            options = argparse.Namespace(espalier=side, rust=[side], python=[], peer="*", threads=1, device=device)
            affinity = os.sched_getaffinity(0)
            try:
                field = compare.Field(options)
                field.end()
            finally:
                os.sched_setaffinity(0, affinity)
            return field

    def test_only_those_on_the_same_device(self):
        self.assertEqual([peer[0] for peer in self.field("cpu").peers], ["on the processor"])
        self.assertEqual([peer[0] for peer in self.field("wgpu").peers], ["on the adapter"])

    def test_ours_runs_where_it_should(self):
        self.assertEqual(self.field("cpu").about["arguments"][-2:], ["--device", "cpu:1"])
        about = self.field("wgpu").about
        self.assertEqual(about["arguments"][-2:], ["--device", "wgpu"])
        # A software adapter has no more threads than the processor's kernels.
        self.assertEqual(about["threads"], "1")


class Silence(unittest.TestCase):
    def given_up(self, answers, limit):
        """Why a contestant that writes this is given up."""
        code = f"import sys, time; sys.stdin.readline(); sys.stdout.write({answers!r}); sys.stdout.flush(); time.sleep(60)"
        with unittest.mock.patch.object(contestant, "LIMIT", limit), self.assertRaises(contestant.Gone) as gone:
            side = contestant.Contestant([sys.executable, "-c", code], 1)
            self.addCleanup(side.end)
            side.ask("run")
        return str(gone.exception)

    def test_who_never_answers_is_given_up(self):
        self.assertIn("no answer within 0.5 s", self.given_up("", 0.5))

    def test_half_a_line_is_no_answer(self):
        self.assertIn("no answer within 0.5 s", self.given_up('{"ok":', 0.5))

    def test_who_says_more_than_was_asked_is_given_up(self):
        self.assertIn("does not answer in JSON when asked to run", self.given_up('{"ok": true}\nloading\n{"ok": true}\n', 60))


class Goals(unittest.TestCase):
    def test_an_adapter_is_asked_what_has_a_goal_there(self):
        asked = lambda name, mode="forward", peer=None: compare.wanted(peer, name, mode, "wgpu")
        self.assertTrue(asked("NN 512 x 512 x 512 f32") and asked("NN 1024 x 1024 x 1024 f32", peer=goals.NAIVE))
        self.assertTrue(asked("add 4096 x 1024") and asked("gelu (erf) 4096 x 1024") and asked("full d64 S=512 B=1 H=12"))
        self.assertFalse(asked("NN 512 x 512 x 512 bf16") or asked("NN 2048 x 2048 x 2048 f32") or asked("kl T=2 512 x 32000"))
        self.assertFalse(asked("full d64 S=512 B=1 H=12", "both") or asked("softmax 4096 x 1024", peer=goals.NAIVE))
        self.assertFalse(compare.wanted(goals.NAIVE, "NN 512 x 512 x 512 f32", "forward", "cpu"))


if __name__ == "__main__":
    unittest.main()
