"""Times `espalier` and other libraries on the CPU cases of its table, in turn, and writes JSON lines and a page.
With `--device wgpu` its WGSL kernels, on those cases that have a goal there, and who runs on the same adapter.

    python3 compare.py --espalier target/release/espalier --out target/peers/results.jsonl

A run that was cut short goes on where it was: a match that the file has of this very program, and for which all peers of now
were asked, is not timed again, unless noise or the end of a contestant made it void (`--fresh` forgets all). What is not
installed is left out, and said. `--page docs/benchmarks.md` writes the page of what the file has.
"""

import argparse
import fcntl
import fnmatch
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]

import numpy

import results
from bout import SETS, STORED, Numbers, bout
from contestant import Contestant, Refused
from goals import DENSE, NAIVE, goals_on
from results import place_of

# Processors that others may keep busy before two threads' wall time says more about them than about us.
OTHERS = 0.15
# Above this run's ceiling by more than its own noise: not to be believed.
SUSPECT = 1.05
# Width of the units that a multiply-add runs in, against f32's: vdpbf16ps and vpdpbusd do two and four.
WIDTH = {"f32": 1, "bf16": 2, "i8": 4}


def at_least(least):
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


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
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="no new case after this long")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    # What cannot go well is said before an hour is spent on it.
    if not os.path.isfile(options.espalier) or not os.access(options.espalier, os.X_OK):
        parser.error(f"--espalier {options.espalier} is no program")
    for name, path in (("--out", options.out), ("--page", options.page)):
        if path and os.path.isdir(path):
            parser.error(f"{name} {path} is a folder")
    try:
        options.grown = read_growth(options.growth) if options.growth else []
    except (OSError, ValueError) as reason:
        parser.error(f"--growth {options.growth}: {reason}")
    if options.device != "cpu":
        # Threads are a processor's.
        options.threads = 1
    return options


def read_growth(path):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if not all(results.has(row, ("name", "variable", "found", "least", "most", "sizes", "us", "holds")) for row in rows):
        raise ValueError("not what `kernels bench --growth` writes")
    return rows


def say(text):
    print(text, file=sys.stderr, flush=True)


def stop(reason):
    say(f"compare.py: error: {reason}")
    sys.exit(2)


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
            offered = asked.about.get("peers")
            if not isinstance(offered, list) or not all(results.has(peer, ("name", "version")) for peer in offered):
                say(f"left out: {' '.join(command)} is no peer")
                offered = []
            for peer in offered:
                if peer.get("adapter") != adapter:
                    say(f"left out: {peer['name']} runs on {peer.get('adapter') or 'the processor'}")
                elif fits(peer["name"], options.peer):
                    self.peers.append((peer["name"], peer["version"], command, peer.get("environment", {})))
            asked.end()
        if options.peer != "*" and not self.peers:
            say(f"nobody here fits --peer {options.peer!r}")

    def contestant(self, role, command, environment=None):
        key = (role, *command)
        if key not in self.running or not self.running[key].alive():
            environment = {**self.environment, **(environment or {})}
            self.running[key] = Contestant(command, self.options.threads, self.cpus, environment)
        return self.running[key]

    def end(self):
        for contestant in self.running.values():
            contestant.end()


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
    """Our own dense form of the same size, where a case is held against one."""
    dense = DENSE.get(case["op"])
    size = lambda c: (c["inputs"][0]["dims"], c["outputs"][0]["dims"])
    return next((c for c in cases if c["op"] == dense and size(c) == size(case)), None)


def sweep(root):
    """Folders of judges that were killed, and of one that had our number before."""
    for folder in Path(root).glob("espalier-peers-*"):
        number = folder.name.rsplit("-", 1)[1]
        try:
            if number.isdecimal() and folder.lstat().st_uid == os.getuid() and not lives(int(number)):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            # Another judge was faster.
            continue


def lives(number):
    return number != os.getpid() and os.path.exists(f"/proc/{number}")


def room_for(cases):
    """Bytes that a match's files take at most: sets of inputs and one contestant's results, of two cases."""

    def size(case):
        of = lambda tensor, least=0: math.prod(tensor["dims"]) * max(least, numpy.dtype(STORED[tensor["dtype"]]).itemsize)
        # Results may be handed in as f32.
        return SETS * sum(map(of, case["inputs"])) + sum(of(tensor, 4) for tensor in case["outputs"])

    return 2 * max(map(size, cases))


def folder_for(out, room):
    """Where the numbers lie: in memory, so that no disk is waited for, or beside the results where memory is too small."""
    beside = os.path.dirname(os.path.abspath(out))
    for root in ("/dev/shm", beside):
        if not os.path.isdir(root) or not os.access(root, os.W_OK):
            continue
        sweep(root)
        free = shutil.disk_usage(root).free
        if free >= room:
            folder = os.path.join(root, f"espalier-peers-{os.getpid()}")
            os.makedirs(folder, mode=0o700, exist_ok=True)
            return folder
        say(f"{root} has {free / 1e6:.0f} MB free and the numbers need {room / 1e6:.0f}")
    stop("there is no room for the numbers")


class Run:
    def __init__(self, options, room):
        self.options, self.field = options, Field(options)
        program = self.field.about
        self.folder = folder_for(options.out, room)
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
        try:
            self.field.end()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def asked(self, name, mode, backend):
        """Who is to be asked on a match, with versions."""
        peers = {peer: version for peer, version, _, _ in self.field.peers}
        if wanted(NAIVE, name, mode, backend) and fits(NAIVE, self.options.peer):
            peers[NAIVE] = self.version
        return peers

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
        if ceiling is not None and NAIVE in self.asked(name, mode, device["backend"]):
            entries.append((self.field.contestant("naive", ours), "naive rung", numbers[-1]))
            names.append((NAIVE, self.version))
        asked = {peer: version for peer, version in names if peer not in ("espalier", "espalier, dense")}
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
        # By this the file's reader knows a whole match, and who goes on whether it has what is wanted.
        mark = {"id": f"{time.time_ns()}-{os.getpid()}", "of": len(records), "name": name, "mode": mode}
        mark.update(asked=asked, rounds=self.options.rounds)
        return [{**record, "match": mark} for record in records]

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
            # Whether another run may do better.
            "again": corner.gone,
        }
        if samples and middle <= 0:
            # Nothing takes no time, and nothing could be held against a ceiling.
            record["voided"], record["error"] = True, record["error"] or "suspect: no time was seen"
        elif ceiling and middle:
            against(record, case, ceiling)
        if not self.by_processor and others > OTHERS:
            # What is wrong is wrong without noise too.
            record["again"] = record["again"] or corner.fault is None
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


def stale(records, peers, rounds):
    """Why a match that the file has is timed again; nothing where it stands."""
    if any(r["again"] for r in records):
        return "void by noise or by the end of a contestant"
    mark = records[0]["match"]
    others = [peer for peer, version in peers.items() if mark["asked"].get(peer) != version]
    if others:
        return f"not asked then: {', '.join(others)}"
    return "of fewer rounds" if mark["rounds"] < rounds else None


def ceilings(run, cases, had, write):
    """What this machine reaches on work that does nothing else, in this run."""
    place, best = (run.bounded_by["backend"], run.bounded_by["name"], run.options.threads), {}
    for case in (c for c in cases if c["group"] == "ceiling"):
        believed = lambda r: r["passed"] and not r["voided"] and r["min_us"] > 0
        records = had.get((place, case["name"], "forward"), [])
        if not records or not all(map(believed, records)):
            records = run.match(case["name"], "forward", [case], None)
            write(records)
        for r in records:
            if r["passed"] and r["min_us"] > 0:
                best[case["op"]] = [r[key] / r["min_us"] / 1e3 for key in ("flops", "bytes")]
            else:
                say(f"{case['name']}: {r['error']}")
    copies = [rate[1] for op, rate in best.items() if op != "multiply_add_chain"]
    if "multiply_add_chain" not in best or not copies:
        stop("without ceilings nothing can be believed")
    return {"gflops": best["multiply_add_chain"][0], "gb": max(copies)}


def listed(program):
    command = [program, "kernels", "bench", "--sizes", "cpu", "--list", "--format", "json"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        cases = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError, subprocess.CalledProcessError) as reason:
        stop(f"{program} lists no cases: {reason}")
    if not cases or not all(results.has(case, ("group", "name", "op", "params", "mode")) for case in cases):
        stop(f"{program} lists no cases")
    return cases


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
    # Whoever stops a run finds no gigabytes of numbers left in memory. `nohup` stays what it is.
    signals = [s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    for number in signals:
        signal.signal(number, lambda *_: sys.exit("stopped"))
    begin, cases = time.monotonic(), listed(options.espalier)
    table = list(matches([c for c in cases if c["group"] != "ceiling"]))
    fitting = [m for m in table if fits(m[2][-1]["op"], options.op) and fits(m[0], options.case)]
    if not fitting:
        stop(f"no case fits --op {options.op!r} --case {options.case!r}")
    try:
        os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
        open(options.out, "ab").close()
        # Two judges would write one file, and time each other's work.
        alone = os.open(os.path.dirname(os.path.abspath(options.out)), os.O_RDONLY)
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"another judge writes to the folder of {options.out}")
    except OSError as reason:
        stop(reason)
    run = None
    try:
        needed = [part for _, _, parts in fitting for part in (*parts, dense_of(parts[-1], cases)) if part]
        run = Run(options, room_for(needed + [c for c in cases if c["group"] == "ceiling"]))
        if options.fresh:
            os.remove(options.out)
        had = results.take_over(options.out, run.program, say)
        time_all(run, cases, fitting, had, begin)
    except Refused as reason:
        # Of the processor there must be times; an adapter need not be there.
        if run or options.device == "cpu":
            stop(reason)
        say(f"left out: {options.device}: {reason}")
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        if run:
            run.end()
    write_page(options, cases)


def time_all(run, cases, fitting, had, begin):
    options, place, due, why = run.options, (run.options.device, run.device["name"], run.options.threads), [], Counter()
    for name, mode, parts in fitting:
        if options.device != "cpu" and not wanted(None, name, mode, options.device):
            continue
        records = had.get((place, name, mode))
        reason = stale(records, run.asked(name, mode, options.device), options.rounds) if records else "not there"
        why[reason] += 1
        due += [(name, mode, parts)] if reason else []
    say(f"{why.pop(None, 0)} matches are taken over from {options.out}, {len(due)} are to be timed")
    for reason, count in why.items():
        say(f"  {count}: {reason}")
    write = lambda records: results.append(options.out, records)
    ceiling = ceilings(run, cases, had, write)
    say(f"ceilings of this run: {ceiling['gflops']:.0f} GFLOP/s in f32, {ceiling['gb']:.1f} GB/s")
    for name, mode, parts in due:
        if time.monotonic() - begin > options.limit_seconds:
            say("time is up; the next call goes on from here")
            break
        found = run.match(name, mode, parts, ceiling, dense_of(parts[-1], cases))
        write(found)
        say(f"{time.monotonic() - begin:6.1f} s  {describe(name, mode, found)}")


def write_page(options, cases):
    if options.page:
        import page

        found = results.read(options.out)[0] if os.path.exists(options.out) else {}
        if not page.write(sum(found.values(), []), cases, options.page, options.grown):
            say(f"{options.page} is left as it is: nothing was timed")


if __name__ == "__main__":
    main()
