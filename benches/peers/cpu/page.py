"""The page of what was measured: tables by group, goals, charts. Nothing is filled in that was not measured."""

import os
import statistics
from fnmatch import fnmatchcase

from chart import growth, ratios
from goals import GOALS

TITLES = {
    "matmul": "Matrix products",
    "int8": "int8 products",
    "sparse": "2:4, 80 and 90 % zeros",
    "quant": "Fake quantization",
    "attention": "Attention, 12 heads of 64, f32",
    "rows": "Rows: softmax, norms, GELU, top-k",
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
    """A case in one mode, ours and the peers'; `threads` is how it was timed."""

    def __init__(self, name, mode, group, threads):
        self.name, self.mode, self.group, self.threads, self.ours, self.peers = name, mode, group, threads, None, {}
        self.others = 0

    def ratio(self, peer):
        """Median, least and largest of the rounds' ratios of their time to ours."""
        theirs = self.peers.get(peer)
        if theirs is None or theirs.faults or self.ours is None or self.ours.faults:
            return None
        rounds = sorted(a / b for a, b in zip(theirs.samples, self.ours.samples))
        return (statistics.median(rounds), rounds[0], rounds[-1]) if rounds else None


def collect(records, cases):
    """Matches in the order of the cases. Records of one match stand next to each other, ours first; the last run of a match
    counts."""
    named = {(c["op"], c["params"]): c for c in cases}
    order = {c["name"]: i for i, c in enumerate(cases)}
    found = []
    for record in records:
        case = named.get((record["op"], record["params"]))
        if case is None or case["group"] == "ceiling":
            continue
        who, threads = record["device"]["registry"][0], record["device"]["limits"]["threads"]
        if who != "espalier":
            found[-1].peers[who] = Time(record)
        elif record["mode"] == "forward":
            found.append(Match(case["name"], "forward", case["group"], threads))
            found[-1].ours = Time(record)
        else:
            # Backward right behind forward: both together.
            found[-1].mode = "both"
            found[-1].ours.join(record)
        found[-1].others = max(found[-1].others, record["device"]["limits"]["others_percent"])
    matches = {(m.name, m.mode, m.threads): m for m in found}
    return sorted(matches.values(), key=lambda m: (m.threads, order[m.name], m.mode != "forward"))


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
    time = f"{middle / 1e3:.3g} ms" if middle >= 100 else f"{middle:.3g} µs"
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
        yield "| case | ours | of the ceiling | " + " | ".join(peers) + " |"
        yield "| --- | --- | --- |" + " --- |" * len(peers)
        for m in rows:
            name = m.name + (", forward and backward" if m.mode == "both" else "")
            time, share = ours(m)
            yield f"| {name} | {time} | {share} | " + " | ".join(cell(m, p) for p in peers) + " |"
        ran = dict.fromkeys(f"{p}: {m.peers[p].record['kernel']}" for p in peers for m in rows if p in m.peers)
        yield "\nWhat ran: " + "; ".join(line for line in ran if len(set(line.split(": "))) == 2) + ".\n"


def goals(matches):
    yield "| goal | against | must | aim | measured | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for goal in GOALS:
        found = []
        for m in matches:
            if m.mode == goal.mode and fnmatchcase(m.name, goal.cases):
                known = [r[0] for r in (m.ratio(p) for p in goal.peers) if r]
                # The fastest of several is the peer.
                found += [min(known)] if known else []
        measured = f"{min(found):.2f} to {max(found):.2f}" if len(found) > 1 else "".join(f"{x:.2f}" for x in found)
        verdict = "" if not found else "aim met" if min(found) >= goal.aim else "met" if min(found) >= goal.must else "missed"
        if found and verdict == "missed" and max(found) >= goal.must:
            verdict = f"missed in {sum(x < goal.must for x in found)} of {len(found)}"
        yield f"| {goal.title} | {' or '.join(goal.peers)} | {goal.must:g} | {goal.aim:g} | {measured} | {verdict} |"
    yield ""


def faults(matches):
    lines = []
    for m in matches:
        for who, time in [("espalier", m.ours), *m.peers.items()]:
            lines += [f"- {m.name} ({m.mode}), {who}: {fault}" for fault in time.faults]
    return ["## Without a time\n", *lines, ""] if lines else []


def write(records, cases, path):
    matches = collect(records, cases)
    stamps = sorted(r["time"] for r in records)
    device = records[-1]["device"]
    versions = dict.fromkeys(f"{r['device']['registry'][0]} {r['version']}" for r in records if r["device"]["registry"][0] != "espalier")
    commit = next((r["commit"] for r in reversed(records) if r["commit"]), "")
    span = stamps[0][:10] if stamps[0][:10] == stamps[-1][:10] else f"{stamps[0][:10]} to {stamps[-1][:10]}"
    best = {}
    for r in records:
        if r["op"] in ("multiply_add_chain", "scale", "accumulate_scaled") and r["min_us"]:
            best[r["op"]] = (r["flops"] / r["min_us"] / 1e3, r["bytes"] / r["min_us"] / 1e3)
    copies = [rates[1] for op, rates in best.items() if op != "multiply_add_chain"]
    lines = [
        "# Against other libraries, on a CPU\n",
        "`make peers` writes this page. A ratio is a peer's time over ours, in the same run: above 1, ours is faster. Each is the",
        "median of the rounds' ratios, with the least and the largest behind it; where these lie on both sides of 1, the two are equal.\n",
        f"- Machine: {device['name']}; {device['driver']}.",
        f"- Date {span}; espalier {commit}; {'; '.join(versions)}.",
        f"- Ceilings of this run, one thread: {best['multiply_add_chain'][0]:.0f} GFLOP/s in f32 (twice that in bf16, four times in int8), {max(copies):.0f} GB/s.",
        "",
        "How it is measured: every side is a process that holds no clock and no reference. A judge hands all of them the same numbers",
        "in files, in turn, in an order that changes; reads the processor time of the whole process from outside; and holds every",
        "result against float64 before timing, after every timed run, and always on memory that was poisoned and given other",
        "numbers since. Inputs come from a ring twice the size of the last-level cache. Results above the measured ceiling are void.",
        "[`cheats.py`](../benches/peers/cpu/cheats.py) has kernels that look fast without doing the work; a test shows that all are caught.\n",
    ]
    noisy = [m for m in matches if m.others > 15]
    if noisy:
        lines.append(
            f"Other programs kept a processor busy during {len(noisy)} of {len(matches)} of these cases. One-thread ratios are of processor"
            " time, which that touches only through shared caches and memory; two-thread ones are void then.\n"
        )
    for threads in sorted({m.threads for m in matches}):
        part = [m for m in matches if m.threads == threads]
        stem = os.path.splitext(path)[0]
        name = "one thread" if threads == 1 else f"{threads} threads"
        suffix = f"-{threads}.svg"
        os.makedirs(stem, exist_ok=True)
        files = [os.path.join(stem, kind + suffix) for kind in ("ratios", "growth")]
        for file, text in zip(files, (ratios(part), growth(part)), strict=True):
            with open(file, "w", encoding="utf-8") as out:
                out.write(text)
        lines += [f"## {name.capitalize()}\n"]
        lines += [f"![Ratios by case and peer]({os.path.basename(stem)}/ratios{suffix})\n", *goals(part), *tables(part)]
        lines += [f"![Rate of f32 products over their size]({os.path.basename(stem)}/growth{suffix})\n"]
    lines += faults(matches)
    with open(path, "w", encoding="utf-8") as out:
        out.write("\n".join(lines).rstrip() + "\n")
