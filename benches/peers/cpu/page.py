"""The page of what was measured: tables by group, goals, charts. Nothing is filled in that was not measured."""

import os
import re
import statistics
from typing import NamedTuple

from chart import growth, ratios
from goals import DENSE, KEPT, goals_on
from results import replace

TITLES = {
    "matmul": "Matrix products",
    "int8": "int8 products",
    "sparse": "2:4, 80 and 90 % zeros",
    "quant": "Fake quantization",
    "attention": "Attention, 12 heads of 64, f32",
    "rows": "Rows and elements: softmax, norms, add, GELU, top-k",
    "losses": "Losses over a vocabulary",
    "optimizer": "Optimizer",
    "models": "Models",
}


class Time:
    """One side of a match: times of the rounds, in microseconds."""

    def __init__(self, record):
        self.samples, self.record, self.faults = list(record["samples_us"]), record, []
        self.add_fault(record)

    def add_fault(self, record):
        if not record["passed"] or record["voided"]:
            self.faults.append(record["error"])

    def join(self, record):
        """Backward after forward: what both take together, round by round."""
        self.samples = [a + b for a, b in zip(self.samples, record["samples_us"])]
        self.add_fault(record)

    @property
    def median(self):
        return statistics.median(self.samples)


class Match:
    """A case in one mode, ours and the peers'; `place` is where it was timed."""

    def __init__(self, name, mode, group, place):
        self.name, self.mode, self.group, self.place, self.ours, self.peers = name, mode, group, place, None, {}
        self.others = 0
        # What its last record of ours is of, and the run it stands in where that is known.
        self.key, self.run = None, None

    def takes(self, record):
        """Whether a peer's record is of this match."""
        key = (record["op"], record["params"])
        dense = record["device"]["registry"][0] == "espalier, dense" and record["op"] == DENSE.get(self.key[0])
        return self.mode == record["mode"] and self.same_run(record) and (key == self.key or dense)

    def same_run(self, record):
        return self.run == run_of(record) and self.place == Place.of(record)

    def ratio(self, peer):
        """Median, least and largest of the rounds' ratios of their time to ours."""
        theirs = self.peers.get(peer)
        if theirs is None or theirs.faults or self.ours is None or self.ours.faults:
            return None
        rounds = sorted(a / b for a, b in zip(theirs.samples, self.ours.samples))
        return (statistics.median(rounds), rounds[0], rounds[-1]) if rounds else None


class Place(NamedTuple):
    """Of one section of the page: adapters are compared with nobody but those who run on them."""

    backend: str
    name: str
    driver: str
    software: bool
    threads: int

    @staticmethod
    def of(record):
        device = record["device"]
        parts = [device[key] for key in ("backend", "name", "driver", "software")]
        return Place(*parts, device["limits"]["threads"])

    @property
    def stem(self):
        """In names of files."""
        return str(self.threads) if self.backend == "cpu" else re.sub("[^a-z0-9]+", "-", self.name.split("(")[0].lower()).strip("-")

    def head(self):
        if self.backend == "cpu":
            yield "## One thread\n" if self.threads == 1 else f"## {self.threads} threads\n"
        elif self.software:
            yield "## WGSL kernels on software Vulkan\n"
            yield f"- Adapter: {self.name}; driver: {self.driver}."
            yield "- It is a program for the processor, with one thread here: processor time is the clock, the ceilings are the"
            yield "  processor's, and nothing follows for a GPU.\n"
        else:
            yield f"## WGSL kernels on {self.name}\n"
            yield f"- Driver: {self.driver}. Wall time, from the request to the answer.\n"


def run_of(record):
    return record.get("match", {}).get("id")


def collect(records, cases):
    """Matches in the order of the cases. Records of one match stand next to each other, ours first; the last run of a match
    counts. A record whose match is not there is nobody's."""
    named = {(c["op"], c["params"]): c for c in cases}
    order = {c["name"]: i for i, c in enumerate(cases)}
    found = []
    for record in records:
        key = (record["op"], record["params"])
        case = named.get(key)
        if case is None or case["group"] == "ceiling":
            continue
        who, last = record["device"]["registry"][0], found[-1] if found else None
        if who != "espalier":
            if last is None or not last.takes(record):
                continue
            last.peers[who] = Time(record)
        elif record["mode"] == "forward":
            last = Match(case["name"], "forward", case["group"], Place.of(record))
            last.ours, last.key, last.run = Time(record), key, run_of(record)
            found.append(last)
        else:
            # Backward right behind its forward: both together.
            pair = last and last.mode == "forward" and last.name == case["name"] and not last.peers and last.same_run(record)
            if not pair:
                continue
            last.mode, last.key = "both", key
            last.ours.join(record)
        last.others = max(last.others, record["device"]["limits"]["others_percent"])
    matches = {(m.name, m.mode, m.place): m for m in found}
    return sorted(matches.values(), key=lambda m: (m.place, order[m.name], m.mode != "forward"))


def cell(match, peer):
    found = match.ratio(peer)
    if found is None:
        theirs = match.peers.get(peer)
        return "" if theirs is None else "void"
    middle, low, high = found
    return f"**{middle:.2f}** ({low:.2f}–{high:.2f})"


def ours(match):
    if match.ours.faults:
        return "void", ""
    record, middle = match.ours.record, match.ours.median
    time = f"{middle / 1e6:.3g} s" if middle >= 1e6 else f"{middle / 1e3:.3g} ms" if middle >= 100 else f"{middle:.3g} µs"
    if match.mode != "forward":
        return time, ""
    share = record.get("ceiling_share")
    rate = f"{record['gflops']:.0f} GFLOP/s" if record.get("ceiling_unit") == "GFLOP/s" else f"{record['bandwidth_gb']:.1f} GB/s"
    return f"{time}, {rate}", f"{share:.0%}" if share else ""


def tables(matches):
    for group, title in TITLES.items():
        rows = [m for m in matches if m.group == group]
        if not rows:
            continue
        peers = sorted({p for m in rows for p in m.peers}, key=lambda p: (not p.startswith("PyTorch"), p))
        yield f"### {title}\n"
        yield "| case | ours | of the ceiling |" + "".join(f" {p} |" for p in peers)
        yield "| --- | --- | --- |" + " --- |" * len(peers)
        for m in rows:
            name = m.name + (", forward and backward" if m.mode == "both" else "")
            time, share = ours(m)
            yield f"| {name} | {time} | {share} |" + "".join(f" {cell(m, p)} |" for p in peers)
        ran = dict.fromkeys(f"{p}: {m.peers[p].record['kernel']}" for p in peers for m in rows if p in m.peers)
        ran = "; ".join(line for line in ran if len(set(line.split(": "))) == 2)
        yield f"\nWhat ran: {ran}.\n" if ran else ""


class Standing:
    """Of one goal in the matches of a place: the ratio that decides each, its spread, and what is void."""

    def __init__(self, covered, peers, must):
        self.must, self.found, self.void, self.cases = must, [], 0, 0
        for m in covered:
            theirs = [p for p in peers if p in m.peers]
            if not theirs:
                continue
            self.cases += 1
            # The fastest of several is the peer.
            known = min((r for r in (m.ratio(p) for p in theirs) if r), default=None)
            # Who is void may have been it: the ratio of the others says no more than that, and is never without the remark.
            self.void += any(m.ratio(p) is None for p in theirs)
            self.found += [known] if known else []

    def measured(self):
        middles = [middle for middle, _, _ in self.found]
        return f"{min(middles):.2f} to {max(middles):.2f}" if len(middles) > 1 else "".join(f"{x:.2f}" for x in middles)

    def voids(self):
        return f"void in {self.void} of {self.cases}" if self.void else ""

    def verdict(self, aim):
        if not self.found:
            return self.voids()
        missed = [r for r in self.found if r[0] < self.must]
        either_way = [r for r in self.found if r[1] < self.must <= r[2]]
        if missed:
            verdict = "missed" if len(missed) == self.cases else f"missed in {len(missed)} of {self.cases}"
            undecided = all(r in either_way for r in missed)
        else:
            verdict = "met by the rest" if self.void else "aim met" if min(self.found)[0] >= aim else "met"
            undecided = bool(either_way)
        return ", ".join([verdict] + ["undecided"] * undecided + [self.voids()] * bool(self.void))


def goals(matches):
    """Where PyTorch alone is the peer, what it does with memory that is kept stands next to it."""
    wanted = goals_on(matches[0].place.backend)
    beside = any(goal.peers == ("PyTorch",) for goal in wanted)
    yield "| goal | against | must | aim | measured |" + (f" {KEPT} |" if beside else "") + " |"
    yield "| --- | --- | --- | --- | --- |" + (" --- |" if beside else "") + " --- |"
    for goal in wanted:
        covered = [m for m in matches if goal.covers(m.name, m.mode)]
        standing = Standing(covered, goal.peers, goal.must)
        kept = Standing(covered, (KEPT,), 0.0) if goal.peers == ("PyTorch",) else Standing([], (), 0.0)
        beside_it = ", ".join(filter(None, (kept.measured(), kept.voids())))
        columns = f"{standing.measured()} |" + (f" {beside_it} |" if beside else "")
        yield f"| {goal.title} | {' or '.join(goal.peers)} | {goal.must:g} | {goal.aim:g} | {columns} {standing.verdict(goal.aim)} |"
    yield ""


def laws(rows):
    """How our times grow with sizes: rows of `espalier kernels bench --growth`."""
    if not rows:
        return
    yield "## How cost grows\n"
    yield "Least times of our kernels at sizes that double, all sizes in turn (`espalier kernels bench --growth`). A slope is that of"
    yield "the logarithms of the three largest sizes; a share is of the first case's time.\n"
    yield "| what | over | found | must be | sizes | µs | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        found = " ".join(f"{x:.2f}" for x in row["found"])
        if len(row["found"]) == 1:
            must = f"{row['least'][0]:.2f} to {row['most'][0]:.2f}"
        else:
            must = "at most " + " ".join(f"{x:.2f}" for x in row["most"])
        sizes, times = " ".join(f"{x:g}" for x in row["sizes"]), " ".join(f"{x:.0f}" for x in row["us"])
        yield f"| {row['name']} | {row['variable']} | {found} | {must} | {sizes} | {times} | {'' if row['holds'] else 'broken'} |"
    yield ""


def faults(matches):
    lines = []
    for m in matches:
        for who, time in [("espalier", m.ours), *m.peers.items()]:
            lines += [f"- {m.name} ({m.mode}), {who}: {fault}" for fault in time.faults]
    return ["## Without a time\n", *lines, ""] if lines else []


def programs(matches):
    """Which of our programs the times are of; where there are several, which timed what."""
    timed = {}
    for m in matches:
        record = m.ours.record
        name = m.name + (", forward and backward" if m.mode == "both" else "")
        name += f" on {m.place.stem}" if m.place.backend != "cpu" else f" with {m.place.threads} threads" if m.place.threads > 1 else ""
        timed.setdefault((record["commit"], record.get("kernel_hash", "")[:8]), []).append(name)
    said = {key: " ".join(filter(None, (key[0], key[1] and f"(program {key[1]})"))) for key in timed}
    if len(timed) < 2:
        return "".join(said.values()), []
    most = max(timed, key=lambda key: len(timed[key]))
    lines = [f"- These times are of {len(timed)} programs of ours: {said[most]}, but for what stands below."]
    lines += [f"  - {said[key]}: {'; '.join(names)}." for key, names in timed.items() if key != most]
    return " and ".join(said.values()), lines


def rounds_of(matches):
    counts = {len(m.ours.samples) for m in matches if m.ours.samples}
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{most}" if least == most else f"{least} to {most}"


def write(records, cases, path, grown=()):
    """Whether there was anything to write."""
    matches = collect(records, cases)
    if not matches:
        return False
    stamps = sorted(r["time"] for r in records)
    by_backend = {r["device"]["backend"]: r["device"] for r in records}
    device = by_backend.get("cpu", records[-1]["device"])
    versions = dict.fromkeys(f"{r['device']['registry'][0]} {r['version']}" for r in records if r["device"]["registry"][0] != "espalier")
    ours_are, several = programs(matches)
    span = stamps[0][:10] if stamps[0][:10] == stamps[-1][:10] else f"{stamps[0][:10]} to {stamps[-1][:10]}"
    best, ceilings = {}, []
    for r in records:
        ceiling = r["op"] in ("multiply_add_chain", "scale", "accumulate_scaled", "sgd") and r["min_us"]
        if ceiling and Place.of(r).backend == "cpu" and Place.of(r).threads == 1:
            best[r["op"]] = (r["flops"] / r["min_us"] / 1e3, r["bytes"] / r["min_us"] / 1e3)
    copies = [rates[1] for op, rates in best.items() if op != "multiply_add_chain"]
    if copies and "multiply_add_chain" in best:
        compute = f"{best['multiply_add_chain'][0]:.0f} GFLOP/s in f32 (twice that in bf16, four times in int8)"
        ceilings = [f"- Ceilings of this run, one thread: {compute}, {max(copies):.0f} GB/s."]
    lines = [
        "# Against other libraries\n",
        "`make peers` writes this page. A ratio is a peer's time over ours, in the same run: above 1, ours is faster. Each is the",
        "median of the rounds' ratios, with the least and the largest behind it; where these lie on both sides of 1, the two are equal.\n",
        f"- Machine: {device['name']}; {device['driver']}.",
        f"- Date {span}; espalier {ours_are}; {'; '.join(versions)}.",
        *several,
        f"- Rounds: {rounds_of(matches)}.",
        *ceilings,
        "",
        "How it is measured: every side is a process that holds no clock and no reference. A judge hands all of them the same numbers",
        "in files, in turn, in an order that changes; reads the processor time of the whole process from outside; and holds every",
        "result against float64 before timing, after every timed run, and always on memory that was poisoned and given numbers since",
        "that nobody had seen. Inputs come from a ring twice the size of the last-level cache. A result more than 5 % above the measured",
        "ceiling is void.",
        "[`cheats.py`](../benches/peers/cpu/cheats.py) has kernels that look fast without doing the work; a test shows that all are caught.\n",
        f"*{KEPT}* is the same library where memory is no question: it writes into tensors that are there where an op can",
        "do so, and its allocator gives nothing back. As PyTorch comes, each large result is new memory that the system has to find and",
        "clear, which is most of the time of what only reads and writes. Goals against PyTorch alone are of PyTorch as it comes; what it",
        "does with memory kept stands beside.\n",
        "A goal is *met* or *missed* by the median of its worst case and fastest peer; it is *undecided* where the rounds that say so lie",
        "on both sides of the must, and *void* in the cases where ours or a peer's has no time to be believed: what is measured is then of",
        "the others alone.\n",
    ]
    noisy = [m for m in matches if m.others > 15]
    if noisy:
        lines.append(
            f"Other programs kept a processor busy during {len(noisy)} of {len(matches)} of these cases. One-thread ratios are of processor"
            " time, which that touches only through shared caches and memory; two-thread ones are void then.\n"
        )
    stem = os.path.splitext(path)[0]
    os.makedirs(stem, exist_ok=True)

    def chart(kind, place, text, label):
        replace(os.path.join(stem, f"{kind}-{place.stem}.svg"), text)
        return f"![{label}]({os.path.basename(stem)}/{kind}-{place.stem}.svg)\n"

    for place in sorted({m.place for m in matches}):
        part = [m for m in matches if m.place == place]
        lines += [*place.head(), chart("ratios", place, ratios(part), "Ratios by case and peer"), *goals(part), *tables(part)]
        if place.backend == "cpu":
            lines += [chart("growth", place, growth(part), "Rate of f32 products over their size")]
    lines += [*laws(grown), *faults(matches)]
    replace(path, "\n".join(lines).rstrip() + "\n")
    return True
