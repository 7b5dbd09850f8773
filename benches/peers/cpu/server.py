"""The answering end of `contestant.py`, for peers that are Python libraries."""

import json
import sys
import traceback

import numpy

STORED = {"f32": numpy.float32, "bf16": numpy.uint16, "f16": numpy.float16, "i8": numpy.int8, "u32": numpy.uint32}


class Skipped(Exception):
    """The library has nothing for this case."""


class Work:
    """A library at work on one case: `prepare` takes arrays of a slot's inputs, `call` runs on what it returned and gives
    the results, `arrays` turns those into arrays."""

    kernel = ""
    # Which of the case's outputs, in which order, come out; by what they are judged where that is not the op's own.
    outputs = (0,)
    computes = None

    def prepare(self, arrays):
        raise NotImplementedError

    def call(self, *inputs):
        raise NotImplementedError

    def overwrite(self, old, new):
        """Puts new inputs into the memory of old ones."""
        raise NotImplementedError

    def poison(self, results):
        """Makes old results unusable, in memory that may be used again."""

    def arrays(self, results):
        raise NotImplementedError


def load(meta, path):
    return numpy.fromfile(path, dtype=STORED[meta["dtype"]]).reshape(meta["dims"])


def serve(peers, find):
    """Answers until the other end closes; `find(peer, case)` gives the `Work`, or raises `Skipped`."""
    # Whatever a library prints must not come between answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    work, slots, results, case = None, [], [], None
    for line in sys.stdin:
        request = json.loads(line)
        what, answer = request["do"], {"ok": True}
        try:
            if what == "hello":
                answer["peers"] = peers
            elif what == "open":
                work, case = None, request["case"]
                slots, results = [None] * request["slots"], [None] * request["slots"]
                work = find(request["peer"], case)
                answer.update(kernel=work.kernel, outputs=list(work.outputs), computes=work.computes)
            elif what == "fill":
                arrays = [load(meta, path) for meta, path in zip(case["inputs"], request["inputs"], strict=True)]
                slot = request["slot"]
                if results[slot] is not None:
                    work.poison(results[slot])
                results[slot] = None
                fresh = work.prepare(arrays)
                if slots[slot] is None:
                    slots[slot] = fresh
                else:
                    # The old memory keeps its addresses.
                    for old, new in zip(slots[slot], fresh, strict=True):
                        work.overwrite(old, new)
            elif what == "run":
                for turn in range(request["first"], request["first"] + request["runs"]):
                    slot = turn % len(slots)
                    results[slot] = work.call(*slots[slot])
            elif what == "read":
                found = results[request["slot"]]
                arrays = [] if found is None else work.arrays(found)
                for path, array in zip(request["outputs"], arrays):
                    numpy.ascontiguousarray(array).tofile(path)
            elif what == "close":
                work, slots, results = None, [], []
        except Skipped as reason:
            answer = {"skip": str(reason)}
        except Exception as failure:  # said, not fatal: the next case may work
            traceback.print_exc(file=sys.stderr)
            answer = {"error": f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
