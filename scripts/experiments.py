#!/usr/bin/env python3
"""Runs the experiments of a claims file and writes what came out as Markdown.

    python3 scripts/experiments.py                      # all runs of recipes/experiments/claims.toml, then the tables
    python3 scripts/experiments.py --only 'obs-*' teacher
    python3 scripts/experiments.py --tables             # tables of what has been run so far
    python3 scripts/experiments.py --tables --write docs/experiments.md

A run that is finished under the same command is not repeated; one that was stopped goes on. Runs lie in
runs/experiments/NAME-SEED. Python 3.11 or later, nothing else.
"""

import argparse
import fnmatch
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

LOWER_IS_BETTER = {"loss", "KiB", "ms"}
HOLDS, NOT_RUN = "holds", "not run"
BEGIN, END = "<!-- experiments -->", "<!-- end of experiments -->"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--claims", default="recipes/experiments/claims.toml", type=pathlib.Path)
    parser.add_argument("--program", default="target/release/espalier", help="the espalier program")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/experiments", type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=["*"], help="names of runs, with * and ?")
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the file's")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--write", type=pathlib.Path, help=f"put the tables between {BEGIN} and {END} of this file")
    args = parser.parse_args()
    plan = tomllib.loads(args.claims.read_text())
    seeds = args.seeds or plan["seeds"]
    if not args.tables:
        # Seed by seed, so that what is stopped early has whole seeds.
        for seed in seeds:
            for run in plan["run"]:
                if any(fnmatch.fnmatch(run["name"], only) for only in args.only):
                    carry_out(args, plan, run, seed)
    results = Results(args.out, seeds)
    text = "\n\n".join([summary(plan["claim"], results)] + [tables(claim, results) for claim in plan["claim"]])
    if args.write:
        before, rest = args.write.read_text().split(BEGIN)
        args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)


def carry_out(args, plan, run, seed):
    base = args.claims.parent / run.get("base", plan["base"])
    fetch_text(args, base)
    out = args.out / f"{run['name']}-{seed}"
    command = [args.program, "--quiet", "--device", args.device, "run", str(base), "--seed", str(seed), "--out", str(out)]
    for setting in run.get("set", []):
        command += ["--set", setting]
    for other in run.get("reuse", ["teacher"]):
        command += ["--reuse", str(args.out / f"{other}-{seed}")]
    marker = out / "report.json"
    if marker.exists() and same_command(json.loads(marker.read_text())["reproduce"], command):
        return
    print(shlex.join(command), file=sys.stderr, flush=True)
    again = ["--overwrite"] if marker.exists() else []
    done = subprocess.run(command + again, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        print(f"{out}: exit code {done.returncode}", file=sys.stderr, flush=True)


def same_command(before, command):
    """Whether two commands run the same recipe: the program and the device may be others."""
    start = command.index("run")
    words = [w for w in shlex.split(before) if w != "--overwrite"]
    return "run" in words and words[words.index("run"):] == command[start:]


def fetch_text(args, base):
    """Collects the installed catalogs once: all runs read the same text, split by package in the same way."""
    folder = tomllib.loads(base.read_text())["data"]["corpus"].get("folder", {}).get("path")
    if folder and not pathlib.Path(folder).exists():
        language = pathlib.Path(folder).name
        subprocess.run([args.program, "data", "collect", "--language", language, "--out", folder], check=True)


class Results:
    """Reports of runs by seed."""

    def __init__(self, out, seeds):
        self.out, self.seeds, self.read = out, seeds, {}

    def value(self, row, seed, measure):
        """A measure of the stage `row`, given as RUN/STAGE; None where there is none yet."""
        run, stage = row.split("/")
        path = self.out / f"{run}-{seed}" / "report.json"
        if path not in self.read:
            self.read[path] = json.loads(path.read_text()) if path.exists() else None
        report = self.read[path]
        stages = [s for s in report["stages"] if s["name"] == stage] if report else []
        return measured(report, stages[0], measure) if stages else None


def measured(report, stage, measure):
    directions = {d["direction"]: d for d in stage["directions"]}
    latency = re.fullmatch(r"ms at batch (\d+)", measure)
    if latency:
        return next((l["p50_ms"] for l in stage["latency"] if l["batch"] == int(latency[1])), None)
    match measure:
        case "loss":
            return stage["validation_loss"]
        case "accuracy":
            return stage["token_accuracy"]
        case "KiB":
            return stage["activated_bytes"] / 1024
        case "entity F1":
            scores = [d["entity_f1"] for d in directions.values()]
            return sum(scores) / len(scores) if all(s is not None for s in scores) else None
        case "transfer gap":
            # How much the second direction has, beyond the first.
            first, second = (d["token_accuracy"] for d in directions.values())
            return second - first
        case "captured":
            # Of the positive activation mass: the router's part of what the oracle takes, mean over blocks.
            found = [re.search(r"([\d.]+) % of positive activation mass .*?([\d.]+) % by the oracle", n) for n in report["notes"]]
            shares = [float(f[1]) / float(f[2]) for f in found if f]
            return sum(shares) / len(shares) if shares else None
        case direction if direction in directions:
            return directions[direction]["token_accuracy"]
    raise SystemExit(f"{measure}: no such measure; directions are {', '.join(directions)}")


def tables(claim, results):
    """A claim's rows and checks."""
    rows, checks = claim["rows"], claim["check"]
    measures = list(dict.fromkeys(["loss", "accuracy"] + claim.get("show", []) + [c["measure"] for c in checks]))
    lines = [f"### {claim['name']}", "", f"{claim['source']}.", "", "| | " + " | ".join(measures) + " |"]
    lines.append("| --- |" + " ---: |" * len(measures))
    for label, row in rows.items():
        cells = [shown(measure, [results.value(row, seed, measure) for seed in results.seeds]) for measure in measures]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("")
    for check in checks:
        lines += (f"- {text}: {found}: **{verdict}**" for text, found, verdict in judgements(check, rows, results))
    return "\n".join(lines)


def summary(claims, results):
    """One line for each claim: how many of its checks hold."""
    lines = ["| claim | source | holds |", "| --- | --- | --- |"]
    for claim in claims:
        judged = [j for check in claim["check"] for j in judgements(check, claim["rows"], results) if j[2] != NOT_RUN]
        held = sum(verdict == HOLDS for _, _, verdict in judged)
        lines.append(f"| {claim['name']} | {claim['source']} | {'yes' if held == len(judged) else f'{held} of {len(judged)} checks'} |")
    return "\n".join(lines)


def judgements(check, rows, results):
    return [judged(*comparison, results) for comparison in single(check, rows)]


def single(check, rows):
    """The comparisons that a check consists of: (text, how its values are shown, value of a seed, whether it holds)."""
    measure = check["measure"]
    difference = lambda value: number(measure, value, difference=True)
    if "order" in check:
        sign = -1 if measure.split()[0] in LOWER_IS_BETTER else 1
        for better, worse in zip(check["order"], check["order"][1:]):
            value = lambda r, seed, a=rows[better], b=rows[worse]: minus(r, measure, seed, a, b)
            yield f"{measure}: {better} before {worse}", difference, value, lambda x: sign * x > 0
        return
    low, high = check.get("at_least", float("-inf")), check.get("at_most", float("inf"))
    holds = lambda x: low <= x <= high
    words = [("at_least", "at least"), ("at_most", "at most")]
    bounds = " and ".join(f"{word} {check[key]:g}" for key, word in words if key in check)
    row = rows[check["row"]]
    if "of" in check:
        value = lambda r, seed: quotient(r.value(row, seed, measure), r.value(rows[check["of"]], seed, measure))
        yield f"{measure}: {check['row']}, share of {check['of']} {bounds}", lambda x: f"{x:.3f}", value, holds
    elif "minus" in check:
        value = lambda r, seed: minus(r, measure, seed, row, rows[check["minus"]])
        yield f"{measure}: {check['row']} less {check['minus']} {bounds}", difference, value, holds
    else:
        value = lambda r, seed: r.value(row, seed, measure)
        yield f"{measure}: {check['row']} {bounds}", lambda x: number(measure, x), value, holds


def minus(results, measure, seed, row, other):
    a, b = results.value(row, seed, measure), results.value(other, seed, measure)
    return None if a is None or b is None else a - b


def quotient(a, b):
    return None if a is None or not b else a / b


def judged(text, show, value, holds, results):
    values = [v for v in (value(results, seed) for seed in results.seeds) if v is not None]
    if not values:
        return text, "-", NOT_RUN
    mean, held = sum(values) / len(values), sum(map(holds, values))
    verdict = (
        HOLDS if held == len(values) else
        f"in the mean, and in {held} of {len(values)} seeds" if holds(mean) else
        f"does not hold ({held} of {len(values)} seeds)"
    )
    return text, f"{', '.join(map(show, values))}; mean {show(mean)}", verdict


def shown(measure, values):
    """Mean and range over seeds."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = number(measure, sum(values) / len(values))
    low, high = number(measure, min(values)), number(measure, max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def number(measure, value, difference=False):
    sign = "+" if difference else ""
    if measure == "loss":
        return f"{value:+.4f}" if difference else f"{value:.3f}"
    if measure.startswith("ms"):
        return f"{value:{sign}.2f}"
    if measure == "KiB":
        return f"{value:{sign}.0f}"
    return f"{100 * value:+.1f} points" if difference else f"{100 * value:.1f} %"


if __name__ == "__main__":
    main()
