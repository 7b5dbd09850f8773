"""Times `espalier` and other libraries on the CPU cases of its table, in turn, and writes JSON lines and a page.
With `--device wgpu` its WGSL kernels, on those cases that have a goal there, and who runs on the same adapter.

    python3 compare.py --espalier target/release/espalier --out target/peers/results.jsonl

A run that was cut short goes on where it was: cases that the file has of this very program are not timed again (`--fresh`
forgets them). What is not installed is left out, and said. `--page docs/benchmarks.md` writes the page of what the file has.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]

from bout import Numbers, bout
from case_list import read_records
from contestant import Contestant, Refused
from goals import NAIVE, goals_on

# Processors that others may keep busy before two threads' wall time says more about them than about us.
OTHERS = 0.15
# Above this run's ceiling by more than its own noise: not to be believed.
SUSPECT = 1.05
# Width of the units that a multiply-add runs in, against f32's: vdpbf16ps and vpdpbusd do two and four.
WIDTH = {"f32": 1, "bf16": 2, "i8": 4}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--espalier", required=True, help="the program")
    parser.add_argument("--rust", action="append", default=[], help="a program of benches/peers/rust or like it; repeatable")
    parser.add_argument("--python", action="append", default=[], help="a script of a Python peer; repeatable")
    parser.add_argument("--out", required=True)
    parser.add_argument("--page")
    parser.add_argument("--device", choices=("cpu", "wgpu"), default="cpu")
    parser.add_argument("--growth", help="what `espalier kernels bench --growth --format json` wrote, for the page")
    parser.add_argument("--op", default="*", help="only ops whose name fits (* and ?, several separated by |)")
    parser.add_argument("--case", default="*", help="only cases whose name fits (* and ?)")
    parser.add_argument("--peer", default="*", help="only peers whose name fits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="no new case after this long")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    if options.device != "cpu":
        # Threads are a processor's.
        options.threads = 1
    return options


def say(text):
    print(text, file=sys.stderr, flush=True)


def fits(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags", "").split()
    wide = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f in flags]
    return f"{found.get('model name', 'CPU')} (family {found.get('cpu family')}, {', '.join(wide)})"


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def earlier(path, program):
    """What a run of this very program has written already; another program's results are set aside."""
    records = read_records(path) if os.path.exists(path) else []
    if any(r["kernel_hash"] not in ("", program) for r in records):
        os.replace(path, f"{path}.old")
        return []
    return records


class Field:
    """Everybody who can be asked, started when first needed: a process for each peer, as no two may share a clock."""

    def __init__(self, options):
        self.options, self.running, self.peers = options, {}, []
        # One core for those who are timed, another for the one who asks.
        cores = sorted(os.sched_getaffinity(0))
        self.cpus = {cores[-1]} if options.threads == 1 and len(cores) > 1 else None
        if self.cpus:
            os.sched_setaffinity(0, set(cores) - self.cpus)
        serve = [options.espalier, "kernels", "bench", "--serve", "--sizes", "cpu", "--device"]
        self.on_processor = [*serve, f"cpu:{options.threads}"]
        self.ours = self.on_processor if options.device == "cpu" else [*serve, options.device]
        self.environment = {"PEER_DEVICE": options.device}
        self.about = self.contestant("ours", self.ours).about
        # Another adapter is another question.
        adapter = None if options.device == "cpu" else self.about["device"]
        commands = [[p] for p in options.rust] + [[sys.executable, p] for p in options.python]
        for command in commands:
            if not os.path.exists(command[-1]):
                say(f"left out: {command[-1]} is not there")
                continue
            try:
                asked = Contestant(command, options.threads, self.cpus, self.environment)
            except (Refused, OSError) as reason:
                say(f"left out: {' '.join(command)}: {reason}")
                continue
            for peer in asked.about["peers"]:
                if peer.get("adapter") != adapter:
                    say(f"left out: {peer['name']} runs on {peer.get('adapter') or 'the processor'}")
                elif fits(peer["name"], options.peer):
                    self.peers.append((peer["name"], peer["version"], command, peer.get("environment", {})))
            asked.end()

    def contestant(self, role, command, environment=None):
        key = (role, *command)
        if key not in self.running or not self.running[key].alive():
            environment = {**self.environment, **(environment or {})}
            self.running[key] = Contestant(command, self.options.threads, self.cpus, environment)
        return self.running[key]

    def end(self):
        for contestant in self.running.values():
            contestant.end()


def place_of(record):
    device = record["device"]
    return device["backend"], device["name"], device["limits"]["threads"]


def wanted(peer, name, mode, backend):
    """Whether a goal there asks for that peer; for any with `None`."""
    return any(goal.covers(name, mode) and peer in (None, *goal.peers) for goal in goals_on(backend))


def matches(cases):
    """A forward case alone; a backward one together with its forward, as whoever trains runs both."""
    forward = {c["name"]: c for c in cases if c["mode"] == "forward"}
    for case in cases:
        if case["mode"] == "forward":
            yield case["name"], "forward", [case]
        elif case["name"] in forward:
            yield case["name"], "both", [forward[case["name"]], case]


def dense_of(case, cases):
    """What is held against our own dense form of the same size: a sparse int8 product against the int8 one without zeros, a
    sparse int8 encoder against the f32 one of the same weights."""
    dense = {"matmul_bitmap_int8": "matmul_int8", "encoder_int8": "encoder"}.get(case["op"])
    size = lambda c: (c["inputs"][0]["dims"], c["outputs"][0]["dims"])
    return next((c for c in cases if c["op"] == dense and size(c) == size(case)), None)


class Run:
    def __init__(self, options):
        self.options, self.field = options, Field(options)
        program = self.field.about
        # Files in memory, so that no disk is waited for.
        root = "/dev/shm" if os.path.isdir("/dev/shm") else os.path.dirname(os.path.abspath(options.out))
        self.folder = os.path.join(root, f"espalier-peers-{os.getpid()}")
        os.makedirs(self.folder)
        self.version = program["version"]
        self.commit = subprocess.run(
            ["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        self.program = digest(options.espalier)
        system = " ".join((platform.system(), *platform.libc_ver()))
        self.processor = {"backend": "cpu", "name": processor(), "driver": system, "software": False}
        self.device = self.processor
        if options.device != "cpu":
            names = {key: program[ours] for key, ours in (("name", "device"), ("driver", "driver"), ("software", "software"))}
            self.device = {"backend": options.device, **names}
        # A software adapter's threads are those of the process, and the processor bounds what it can reach.
        self.by_processor = options.threads == 1 and (options.device == "cpu" or program["software"])
        self.bounded_by = self.processor if self.device["software"] else self.device

    def draw(self, case, seed, paths):
        self.field.contestant("ours", self.field.ours).ask("draw", case=case, seed=seed, inputs=paths)

    def end(self):
        self.field.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def match(self, name, mode, parts, ceiling, dense=None):
        """Everybody on one match, also our own `dense` case where there is one; the records."""
        numbers = [Numbers(part, self.draw, self.folder, self.options.seed) for part in parts]
        # Without a ceiling this measures one.
        device = self.bounded_by if ceiling is None else self.device
        ours = self.field.ours if device is self.device else self.field.on_processor
        entries = [(self.field.contestant("ours" if i == 0 else "ours too", ours), "", n) for i, n in enumerate(numbers)]
        names = [("espalier", self.version)] * len(parts)
        if ceiling is not None:
            for peer, version, command, environment in self.field.peers:
                try:
                    entries.append((self.field.contestant(peer, command, environment), peer, numbers[-1]))
                    names.append((peer, version))
                except (Refused, OSError) as reason:
                    say(f"left out: {peer}: {reason}")
        if dense:
            numbers.append(Numbers(dense, self.draw, self.folder, self.options.seed))
            entries.append((self.field.contestant("dense", self.field.ours), "", numbers[-1]))
            names.append(("espalier, dense", self.version))
        if ceiling is not None and wanted(NAIVE, name, mode, device["backend"]) and fits(NAIVE, self.options.peer):
            entries.append((self.field.contestant("naive", ours), "naive rung", numbers[-1]))
            names.append((NAIVE, self.version))
        load = os.getloadavg()[0]
        corners, others = bout(entries, self.options.rounds, self.by_processor)
        for n in numbers:
            n.remove()
        records = []
        for i, (corner, (peer, version)) in enumerate(zip(corners, names, strict=True)):
            if corner.skip:
                continue
            counted = parts if i >= len(parts) else [corner.case]
            theirs = mode if i >= len(parts) else corner.case["mode"]
            records.append(self.record(theirs, corner, (peer, version), counted, ceiling, (device, load, others)))
        return records

    def record(self, mode, corner, who, counted, ceiling, around):
        """As `espalier kernels bench --format json` writes it."""
        case, (peer, version), (device, load, others) = corner.case, who, around
        samples = corner.samples if self.by_processor else corner.walls
        ordered = sorted(samples)
        middle = ordered[len(ordered) // 2] if ordered else 0.0
        flops, size = (sum(c[key] for c in counted) for key in ("flops", "bytes"))
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": version,
            "commit": self.commit if peer == "espalier" else "",
            "device": {
                **device,
                "limits": {
                    "threads": self.options.threads,
                    "load_percent": round(load * 100),
                    "others_percent": round(others * 100),
                },
                "registry": [peer],
            },
            "op": case["op"],
            "params": case["params"],
            "mode": mode,
            "dtype": case["dtype"],
            "layout": case["layout"],
            "kernel": corner.kernel,
            "kernel_hash": self.program if peer == "espalier" else "",
            "supported": True,
            "passed": corner.fault is None and bool(samples),
            "error": corner.fault,
            "error_metric": "relative Frobenius error against float64, and every element",
            "error_value": corner.error,
            "seed": self.options.seed,
            "timing_source": "cpu" if self.by_processor else "wall",
            "warmups": corner.slots,
            "runs": corner.runs,
            "samples_us": samples,
            "min_us": ordered[0] if ordered else 0.0,
            "p5_us": ordered[0] if ordered else 0.0,
            "median_us": middle,
            "p95_us": ordered[-1] if ordered else 0.0,
            "flops": flops,
            "bytes": size,
            "gflops": flops / middle / 1e3 if middle else 0.0,
            "bandwidth_gb": size / middle / 1e3 if middle else 0.0,
            "voided": False,
        }
        if samples and middle <= 0:
            # Nothing takes no time, and nothing could be held against a ceiling.
            record["voided"], record["error"] = True, record["error"] or "suspect: no time was seen"
        elif ceiling and middle:
            against(record, case, ceiling)
        if not self.by_processor and others > OTHERS:
            record["voided"], record["error"] = True, record["error"] or f"noisy: others kept {others:.2f} processors busy"
        return record


def against(record, case, ceiling):
    """The ceiling that binds a case, and the share of it that was reached."""
    # A model's weights are f32 whatever its products are computed in.
    width = max(WIDTH.get(dtype, 1) for dtype in (case["inputs"][0]["dtype"], case.get("dtype")))
    compute = record["flops"] / (ceiling["gflops"] * width)
    memory = record["bytes"] / ceiling["gb"]
    if memory >= compute:
        record["ceiling"], record["ceiling_unit"] = ceiling["gb"], "GB/s"
        record["ceiling_share"] = record["bandwidth_gb"] / ceiling["gb"]
    else:
        record["ceiling"], record["ceiling_unit"] = ceiling["gflops"] * width, "GFLOP/s"
        record["ceiling_share"] = record["gflops"] / record["ceiling"]
    if record["ceiling_share"] > SUSPECT:
        record["voided"], record["error"] = True, record["error"] or "suspect: more than 5 % above this run's ceiling"


def ceilings(run, cases, records, write):
    """What this machine reaches on work that does nothing else, in this run."""
    place = (run.bounded_by["backend"], run.bounded_by["name"], run.options.threads)
    found = {r["op"]: r for r in records if place_of(r) == place}
    for case in (c for c in cases if c["group"] == "ceiling"):
        if case["op"] not in found:
            (found[case["op"]],) = run.match(case["name"], "forward", [case], None)
            write([found[case["op"]]])
    best = {op: [r[key] / r["min_us"] / 1e3 for key in ("flops", "bytes")] for op, r in found.items() if r["passed"]}
    copies = [rate[1] for op, rate in best.items() if op != "multiply_add_chain"]
    return {"gflops": best["multiply_add_chain"][0], "gb": max(copies)}


def listed(program):
    command = [program, "kernels", "bench", "--sizes", "cpu", "--list", "--format", "json"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def describe(name, mode, records):
    ours = sum(r["median_us"] for r in records if r["device"]["registry"] == ["espalier"])
    parts = [f"{name} ({mode}): {ours:.0f} us"]
    for r in records:
        if r["error"]:
            parts.append(f"{r['device']['registry'][0]}: {r['error']}")
        elif r["device"]["registry"] != ["espalier"] and ours:
            parts.append(f"{r['device']['registry'][0]} {r['median_us'] / ours:.2f}")
    return ", ".join(parts)


def main():
    options = arguments()
    # Whoever stops a run finds no gigabytes of numbers left in memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if options.fresh and os.path.exists(options.out):
        os.remove(options.out)
    os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
    begin, cases = time.monotonic(), listed(options.espalier)
    records = earlier(options.out, digest(options.espalier))
    try:
        run = Run(options)
    except Refused as reason:
        # Of the processor there must be times; an adapter need not be there.
        if options.device == "cpu":
            raise
        say(f"left out: {options.device}: {reason}")
        write_page(options, cases)
        return
    # A match's records are written together.
    done = {(*place_of(r), r["op"], r["params"]) for r in records if r["device"]["registry"][0] == "espalier"}
    place = (options.device, run.device["name"], options.threads)
    try:
        with open(options.out, "a", encoding="utf-8") as out:

            def write(found):
                for record in found:
                    out.write(json.dumps(record) + "\n")
                out.flush()

            ceiling = ceilings(run, cases, records, write)
            say(f"ceilings of this run: {ceiling['gflops']:.0f} GFLOP/s in f32, {ceiling['gb']:.1f} GB/s")
            for name, mode, parts in matches([c for c in cases if c["group"] != "ceiling"]):
                last = parts[-1]
                asked = fits(last["op"], options.op) and fits(name, options.case)
                asked = asked and (options.device == "cpu" or wanted(None, name, mode, options.device))
                if not asked or (*place, last["op"], last["params"]) in done:
                    continue
                if time.monotonic() - begin > options.limit_seconds:
                    say("time is up; the next call goes on from here")
                    break
                found = run.match(name, mode, parts, ceiling, dense_of(last, cases))
                write(found)
                say(f"{time.monotonic() - begin:6.1f} s  {describe(name, mode, found)}")
    finally:
        run.end()
    write_page(options, cases)


def write_page(options, cases):
    if options.page:
        import page

        grown = [json.loads(line) for line in Path(options.growth).read_text().splitlines()] if options.growth else []
        page.write(read_records(options.out), cases, options.page, grown)


if __name__ == "__main__":
    main()
