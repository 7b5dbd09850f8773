"""Times PyTorch and what is built on it on a case list of `espalier kernels bench --list --format json`.

    python3 run.py --cases cases.jsonl --out peers.jsonl

Without a GPU, `--device cpu` exercises the plumbing: reading, checking, timing by the wall clock, writing. Such records
say "cpu" and are never joined with a GPU's.
"""

import argparse
import fnmatch
import importlib
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch

from case_list import read_cases
from compiled import Compiler
from context import Context
from protocol import RING_BYTES, Bench, first_line

MODULES = ("products", "attention", "rows", "losses", "reduced")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--op", default="*", help="only ops whose name fits (* and ?)")
    parser.add_argument("--peer", default="*", help="only peers whose name fits (* and ?)")
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds of sampling per peer at most")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="no new case after this long")
    parser.add_argument("--largest-bytes", type=float, default=float("inf"), help="leave larger cases out")
    parser.add_argument("--compile-mode", default="max-autotune-no-cudagraphs", help='"none" leaves torch.compile out')
    parser.add_argument("--start", type=float, default=0.0, help="share of the list to begin behind; what is before it comes last")
    parser.add_argument("--compile-seconds", type=float, default=150.0, help="seconds for compiling in all")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main():
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU")
    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(False)
    handlers = {}
    for name in MODULES:
        handlers.update(importlib.import_module(name).HANDLERS)
    begin = time.monotonic()
    with open(options.out, "a", encoding="utf-8") as out:
        # A small ring on a CPU: nothing is ranked there.
        ring = RING_BYTES if options.device == "cuda" else 1 << 22
        picked = open(f"{options.out}.picked", "a", encoding="utf-8")
        bench = Bench(options.device, out, options.seconds, options.seed, ring, picked)
        context = Context(bench, Compiler(options.compile_mode, options.compile_seconds))
        cases = read_cases(options.cases)
        # Rounds that run out of time begin elsewhere each, so that every case has its turn.
        begin_at = int(len(cases) * options.start)
        for case in cases[begin_at:] + cases[:begin_at]:
            wanted = fnmatch.fnmatchcase(case.op, options.op) and case.bytes <= options.largest_bytes
            if not wanted or case.op not in handlers:
                continue
            if time.monotonic() - begin > options.limit_seconds:
                print(f"time is up before {case.op} {case.name}", file=sys.stderr)
                break
            print(f"{time.monotonic() - begin:7.1f} s  {case.op}  {case.name}", file=sys.stderr, flush=True)
            try:
                for peer in handlers[case.op](case, context):
                    if fnmatch.fnmatchcase(peer.kernel, options.peer):
                        bench.run(case, peer)
            except Exception as failure:  # a case that cannot be set up takes no other with it
                bench.skipped(case, "none", case.mode, first_line(failure))


if __name__ == "__main__":
    main()
