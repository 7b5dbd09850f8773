"""Joins the records of both sides into one page of Markdown: what was measured, in which ratio, and what was not.

    python3 join.py RESULTS                          # to standard output
    python3 join.py RESULTS --into docs/benchmarks   # to docs/benchmarks/GPU-DATE.md

Nothing is filled in: a case or a peer without a valid time of this run leaves its cell blank.
"""

import argparse
import csv
import glob
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from case_list import read_cases, read_records
from goals import GOALS

# Times below this share of what the ceiling allows are measuring errors until shown otherwise.
SUSPECT = 1 / 1.05


@dataclass
class Time:
    """Medians of the rounds of one kernel on one case, in microseconds."""

    rounds: list = field(default_factory=list)
    # From p5 to p95 within each round.
    spreads: list = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.rounds)

    @property
    def spread(self):
        """Share of the median that rounds lie apart; within the only round where there is but one."""
        if len(self.rounds) > 1:
            return (max(self.rounds) - min(self.rounds)) / self.median
        return self.spreads[0] if self.spreads else 0.0

    def add(self, record):
        self.rounds.append(record["median_us"])
        self.spreads.append((record["p95_us"] - record["p5_us"]) / record["median_us"])


def valid(record):
    return record["supported"] and record["passed"] and not record["voided"] and record["median_us"] > 0


class Results:
    def __init__(self, folder):
        self.folder = folder
        self.cases = read_cases(os.path.join(folder, "cases.jsonl"))
        self.names = {case.key: case for case in self.cases}
        # By (name, mode) of ours: one time per op, as a backward may be of several; by (name, mode, kernel) of the peers.
        self.ours, self.peers, self.failures = {}, {}, []
        self.devices = {}
        for path in self.files("bench-cuda"):
            self.read(path, self.add_ours)
        for path in self.files("peers"):
            self.read(path, self.add_peer)

    def files(self, kind):
        return sorted(glob.glob(os.path.join(self.folder, f"{kind}.*.jsonl")))

    def read(self, path, add):
        for record in read_records(path):
            # A peer's "both" and a backward's peer are filed under the case of their own op.
            keys = [(record["op"], record["params"], mode, record["dtype"], record["layout"]) for mode in ("forward", "backward")]
            case = next((self.names[key] for key in keys if key in self.names), None)
            if case is None:
                continue
            self.devices.setdefault(record["device"]["backend"], record["device"])
            if record["device"]["backend"] != "cuda":
                continue
            if valid(record):
                add(case, record)
            elif record["error"]:
                self.failures.append((os.path.basename(path), case.name, record["mode"], record["kernel"], record["error"]))

    def add_ours(self, case, record):
        # Above what memory can deliver: not to be believed.
        share = record.get("ceiling_share")
        if share and share > 1 / SUSPECT:
            self.failures.append(("", case.name, record["mode"], record["kernel"], "above this run's ceiling"))
            return
        times = self.ours.setdefault((case.name, record["mode"]), {})
        times.setdefault((case.op, record["kernel"]), Time()).add(record)

    def add_peer(self, case, record):
        self.peers.setdefault((case.name, record["mode"], record["kernel"]), Time()).add(record)

    def our_time(self, name, mode):
        """Median and spread of ours; a backward of several ops, and both ways together, are sums of all their parts."""
        if mode == "both":
            parts = [self.our_time(name, "forward"), self.our_time(name, "backward")]
            if None in parts:
                return None
            return sum(p[0] for p in parts), max(p[1] for p in parts)
        times = self.ours.get((name, mode), {})
        ops = {case.op for case in self.cases if case.name == name and case.mode == mode}
        if not ops or {op for op, _ in times} != ops:
            return None
        best = {op: min((t for (o, _), t in times.items() if o == op), key=lambda t: t.median) for op in ops}
        return sum(t.median for t in best.values()), max(t.spread for t in best.values())

    def peers_of(self, name, mode):
        found = [(kernel, time) for (n, m, kernel), time in self.peers.items() if (n, m) == (name, mode)]
        return sorted(found, key=lambda pair: pair[1].median)

    def picked(self):
        """Names of the device's kernels behind a peer, shortened to what tells them apart."""
        found = {}
        for path in glob.glob(os.path.join(self.folder, "peers.*.jsonl.picked")):
            for line in read_records(path):
                names = {case.name for case in self.cases if (case.op, case.params) == (line["op"], line["params"])}
                for name in names:
                    plain = (kernel.removeprefix("void ").replace("(anonymous namespace)::", "") for kernel in line["picked"])
                    short = [kernel[:80] for kernel in list(plain)[:6]]
                    found[(name, line["mode"], line["kernel"])] = ", ".join(dict.fromkeys(short))
        return found

    def copy_rate(self):
        """GB/s of the fastest copy of either side in this run."""
        rates = []
        for (name, _, kernel), time in self.peers.items():
            if kernel.startswith("torch copy_"):
                case = next(c for c in self.cases if c.name == name)
                rates.append(case.bytes / time.median / 1e3)
        for case in self.cases:
            if case.group == "ceiling" and case.op in ("scale", "accumulate_scaled"):
                time = self.our_time(case.name, case.mode)
                rates += [case.bytes / time[0] / 1e3] if time else []
        return max(rates, default=None)

    def product_rate(self):
        """TFLOP/s of the library's largest bf16 product in this run."""
        rates = []
        for (name, _, kernel), time in self.peers.items():
            if kernel.startswith("torch.matmul [") and name.endswith("bf16"):
                case = next(c for c in self.cases if c.name == name)
                rates.append(case.flops / time.median / 1e6)
        return max(rates, default=None)


def duration(microseconds):
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds / 1000:.3f} ms"


def table(header, rows, left):
    """Markdown; columns of `left` are aligned to the left, others to the right."""
    escape = lambda cell: str(cell).replace("|", "\\|")
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(" --- " if i in left else " ---: " for i in range(len(header))) + "|")
    lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return lines


def verdict(ratio, spread, goal):
    if ratio >= goal.aim:
        return "aim"
    if ratio >= goal.must:
        return "must"
    return "must, within the spread" if ratio * (1 + spread) >= goal.must else "missed"


def goal_row(results, goal):
    """Title, our time, the peer, its time, ratio, must, aim, verdict; blank where a side is missing."""
    blank = [goal.title, "", "", "", "", f"{goal.must:.2f}", f"{goal.aim:.2f}", ""]
    names = sorted({c.name for c in results.cases if fnmatchcase(c.name, goal.cases)})
    if len(names) != 1:
        return blank
    name = names[0]
    ours = results.our_time(name, goal.mode)
    if ours is None:
        return blank
    blank[1] = duration(ours[0])
    if goal.ours:
        other = results.our_time(goal.ours, goal.mode)
        peer = other and (f"ours: {goal.ours}", other[0], other[1])
    elif goal.peers == "copy":
        rate = results.copy_rate()
        case = next(c for c in results.cases if c.name == name and c.mode == goal.mode)
        peer = rate and (f"copy at {rate:.0f} GB/s", case.bytes / rate / 1e3, 0.0)
    else:
        patterns = goal.peers.split("|")
        fitting = [p for p in results.peers_of(name, goal.mode) if any(fnmatchcase(p[0], x) for x in patterns)]
        peer = (fitting[0][0], fitting[0][1].median, fitting[0][1].spread) if fitting else None
    if not peer:
        return blank
    kernel, time, spread = peer
    ratio = time / ours[0]
    blank[2:5] = [kernel, duration(time), f"{ratio:.2f}"]
    blank[7] = verdict(ratio, ours[1] + spread, goal)
    return blank


def case_rows(results, group):
    """Every case of a group: ours, its rate, the fastest peer, the ratio; then how far the rounds lie apart."""
    rows, seen = [], set()
    for case in results.cases:
        for mode in dict.fromkeys((case.mode, "both")):
            if case.group != group or (case.name, mode) in seen:
                continue
            seen.add((case.name, mode))
            ours, peers = results.our_time(case.name, mode), results.peers_of(case.name, mode)
            if mode == "both" and not peers:
                continue
            parts = [c for c in results.cases if c.name == case.name and (mode == "both" or c.mode == mode)]
            work, moved = sum(c.flops for c in parts), sum(c.bytes for c in parts)
            rates = ["", ""]
            if ours:
                rates = [f"{work / ours[0] / 1e6:.1f}", f"{moved / ours[0] / 1e3:.0f}"]
            best = peers[0] if peers else None
            spreads = ([ours[1]] if ours else []) + ([best[1].spread] if best else [])
            rows.append(
                [
                    case.name,
                    mode,
                    duration(ours[0]) if ours else "",
                    *rates,
                    best[0] if best else "",
                    duration(best[1].median) if best else "",
                    f"{best[1].median / ours[0]:.2f}" if best and ours else "",
                    f"{max(spreads):.1%}" if spreads else "",
                ]
            )
    return rows


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.loads(file.read().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None


def environment(results):
    rows = []
    try:
        with open(os.path.join(results.folder, "gpu.csv"), encoding="utf-8") as file:
            header, values = list(csv.reader(file, skipinitialspace=True))[:2]
            rows += list(zip(header, values))
    except (OSError, ValueError):
        pass
    try:
        with open(os.path.join(results.folder, "environment.txt"), encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
            rows.append(("date", lines[0]))
            rows += [("program", line) for line in lines[1:4]]
    except (OSError, IndexError):
        pass
    libraries = read_json(os.path.join(results.folder, "libraries.json")) or {}
    rows += [(name, version) for name, version in libraries.items() if version]
    return rows


def correctness(results):
    """What `kernels verify` said, and the memory checker."""
    rows = []
    for name in ("verify-cuda", "gradients-cuda", "verify-wgpu", "gradients-wgpu"):
        summary = read_json(os.path.join(results.folder, f"{name}.json"))
        if summary and "cases" in summary:
            rows.append([name, *(summary[key] for key in ("cases", "passed", "failed", "skipped"))])
    for kind in ("memcheck", "racecheck"):
        try:
            with open(os.path.join(results.folder, f"sanitizer-{kind}.txt"), encoding="utf-8", errors="replace") as file:
                ends = re.findall(r"^== exit status (\d+)", file.read(), flags=re.MULTILINE)
        except OSError:
            continue
        clean = ends.count("0")
        rows.append([kind, len(ends), clean, len(ends) - clean, 0])
    return rows


def page(results):
    device = results.devices.get("cuda", {})
    lines = [f"# {device.get('name', 'No GPU')}", ""]
    rounds = [len(results.files("bench-cuda")), len(results.files("peers"))]
    lines += [
        f"One run: {rounds[0]} rounds of ours and {rounds[1]} of the peers, in turns, on fresh random inputs that do not fit the",
        "caches. A result is checked in f64 (in parts, where it is large) before it is timed; a wrong, voided or suspect one has",
        "no time. A ratio is the peer's time over ours: above 1, ours is faster. Times are medians over rounds of medians;",
        "`spread` is how far rounds lie apart, and a difference within it is none. Of a peer the faster of two forms counts:",
        "launched one by one ([stream]) or replayed as a graph ([graph]); ours is launched one by one. A blank was not measured.",
        "",
    ]
    lines += table(["", ""], environment(results), (0, 1)) + [""]
    copy, product = results.copy_rate(), results.product_rate()
    lines += [
        f"Ceilings of this run: copy {f'{copy:.0f} GB/s' if copy else '(not measured)'}, the library's fastest bf16 product "
        f"{f'{product:.0f} TFLOP/s' if product else '(not measured)'}.",
        "",
        "## Correctness",
        "",
    ]
    lines += table(["check", "cases", "passed", "failed", "skipped"], correctness(results), (0,)) + ["", "## Goals", ""]
    header = ["goal", "ours", "peer", "its time", "ratio", "must", "aim", "reached"]
    rows = [goal_row(results, goal) for goal in GOALS]
    lines += table(header, rows, (0, 2, 7)) + [""]
    reached = [row[7] for row in rows]
    measured = [r for r in reached if r]
    lines += [
        f"{len(measured)} of {len(rows)} goals measured: {reached.count('aim')} aims reached, "
        f"{reached.count('aim') + reached.count('must')} musts, {reached.count('missed')} missed.",
        "",
    ]
    header = ["case", "mode", "ours", "TFLOP/s", "GB/s", "fastest peer", "its time", "ratio", "spread"]
    for group in dict.fromkeys(case.group for case in results.cases):
        lines += [f"## {group}", ""] + table(header, case_rows(results, group), (0, 1, 5)) + [""]
    picked = results.picked()
    every = [
        [n, m, k, duration(t.median), len(t.rounds), picked.get((n, m, k.rsplit(" [", 1)[0]), "")]
        for (n, m, k), t in sorted(results.peers.items())
    ]
    header = ["case", "mode", "peer", "time", "rounds", "kernels"]
    lines += ["## Every peer", ""] + table(header, every, (0, 1, 2, 5)) + [""]
    failures = sorted(set(results.failures))
    lines += ["## Without a time", ""]
    lines += table(["file", "case", "mode", "kernel", "why"], failures, (0, 1, 2, 3, 4)) + [""]
    return "\n".join(lines), device.get("name", "no-gpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--into", help="folder of the page, which is named after GPU and date")
    options = parser.parse_args()
    results = Results(options.results)
    text, gpu = page(results)
    if not options.into:
        print(text)
        return
    # The day of the run, not of the joining.
    times = [r["time"] for path in results.files("peers") for r in read_records(path) if r["time"]]
    path = os.path.join(options.results, "environment.txt")
    day = min(times)[:10] if times else time.strftime("%Y-%m-%d", time.gmtime(os.path.getmtime(path)))
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    os.makedirs(options.into, exist_ok=True)
    target = os.path.join(options.into, f"{name}-{day}.md")
    with open(target, "w", encoding="utf-8") as file:
        file.write(text)
    print(target)


if __name__ == "__main__":
    main()
