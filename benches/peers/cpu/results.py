"""The file of results: whole matches only, whatever happened to who wrote them.

Each record says in `match` which match it is of and how many records that has, so that one which was cut short is known.
"""

import json
import os
import shutil
from pathlib import Path

# What every line of ours begins with, and one that was cut as far as it goes.
BEGIN = '{"time": '
KEYS = (
    "time", "version", "commit", "device", "op", "params", "mode", "kernel", "kernel_hash", "passed", "error", "samples_us",
    "min_us", "median_us", "flops", "bytes", "gflops", "bandwidth_gb", "voided", "again", "match",
)  # fmt: skip
DEVICE = ("backend", "name", "driver", "software", "limits", "registry")
MATCH = ("id", "of", "name", "mode", "asked", "rounds")


def has(what, keys):
    return isinstance(what, dict) and all(key in what for key in keys)


def is_record(what):
    if not (has(what, KEYS) and has(what["device"], DEVICE) and has(what["match"], MATCH)):
        return False
    device, mark = what["device"], what["match"]
    named = all(isinstance(text, str) for text in (mark["id"], mark["name"], mark["mode"], device["backend"], device["name"]))
    listed = isinstance(mark["asked"], dict) and isinstance(device["registry"], list) and bool(device["registry"])
    return named and listed and has(device["limits"], ("threads", "others_percent"))


def place_of(record):
    device = record["device"]
    return device["backend"], device["name"], device["limits"]["threads"]


def read(path):
    """The last whole run of each match, by place, name and mode; how many lines are of runs that were cut, and how many are
    not ours at all."""
    runs, cut, foreign = {}, 0, 0
    for line in Path(path).read_text("utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            ours = line.startswith(BEGIN) or BEGIN.startswith(line)
            cut, foreign = cut + ours, foreign + (not ours)
            continue
        if is_record(record):
            runs.setdefault(record["match"]["id"], []).append(record)
        else:
            foreign += 1
    found = {}
    for records in runs.values():
        mark = records[0]["match"]
        if len(records) != mark["of"]:
            cut += len(records)
            continue
        key = (place_of(records[0]), mark["name"], mark["mode"])
        # In the file's order the last comes last.
        found.pop(key, None)
        found[key] = records
    return found, cut, foreign


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def replace(path, text):
    """Whoever looks finds the file as it was or as it is to be."""
    fresh = f"{path}.new-{os.getpid()}"
    try:
        with open(fresh, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, path)
    finally:
        os.path.exists(fresh) and os.remove(fresh)


def append(path, records):
    """A match at once: what stops us between two leaves none half written."""
    with open(path, "ab") as out:
        out.write(lines_of(records).encode())
        out.flush()
        os.fsync(out.fileno())


def beside(path):
    """A name that nothing has yet."""
    number = 1
    while os.path.exists(f"{path}.old-{number}"):
        number += 1
    return f"{path}.old-{number}"


def take_over(path, program, say):
    """What the file has of this very program; it is left with that alone. What would be lost but for cut matches is kept beside it."""
    if not os.path.exists(path):
        return {}
    found, cut, foreign = read(path)
    if any(record["kernel_hash"] not in ("", program) for records in found.values() for record in records):
        aside = beside(path)
        os.replace(path, aside)
        say(f"results of another program are set aside: {aside}")
        return {}
    if foreign:
        aside = beside(path)
        shutil.copyfile(path, aside)
        say(f"{foreign} lines of {path} are no results of this judge; the file as it was: {aside}")
    if cut:
        say(f"{cut} lines of matches that were cut short are dropped")
    replace(path, "".join(map(lines_of, found.values())))
    return found
