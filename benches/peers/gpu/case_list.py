"""The case list that `espalier kernels bench --list --format json` prints."""

import json
import re
from dataclasses import dataclass, field

TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|-?[0-9][0-9.]*(?:e-?[0-9]+)?|[{}()\[\],:]")


@dataclass
class Value:
    """One parameter value of an op: a name with fields in braces or arguments in parentheses, either of which may be empty."""

    name: str
    fields: dict = field(default_factory=dict)
    arguments: list = field(default_factory=list)

    def __getitem__(self, key):
        return self.fields[key]

    def get(self, key, default=None):
        return self.fields.get(key, default)


def parse_value(text):
    """Reads the op and its parameters, which stand in front of the first operand: `Matmul{transpose_a:false,...} bf16[2,3]`."""
    tokens = TOKEN.findall(text)
    value, rest = _value(tokens)
    if rest:
        raise ValueError(f"{text!r}: {rest[0]!r} was not expected")
    return value


def _value(tokens):
    head, rest = tokens[0], tokens[1:]
    if head in ("true", "false"):
        return head == "true", rest
    if head[0].isdigit() or head[0] == "-":
        return (float(head) if any(c in head for c in ".e") else int(head)), rest
    if head == "[":
        items = []
        while rest[0] != "]":
            item, rest = _value(rest)
            items.append(item)
            rest = rest[1:] if rest[0] == "," else rest
        return items, rest[1:]
    value = Value(head)
    if rest and rest[0] == "{":
        rest = rest[1:]
        while rest[0] != "}":
            key = rest[0]
            value.fields[key], rest = _value(rest[2:])
            rest = rest[1:] if rest[0] == "," else rest
        rest = rest[1:]
    elif rest and rest[0] == "(":
        rest = rest[1:]
        while rest[0] != ")":
            item, rest = _value(rest)
            value.arguments.append(item)
            rest = rest[1:] if rest[0] == "," else rest
        rest = rest[1:]
    return value, rest


@dataclass
class Case:
    """One case: what is computed on which shapes, under the names that both sides file it by."""

    group: str
    name: str
    op: str
    params: str
    mode: str
    dtype: str
    layout: str
    inputs: list
    outputs: list
    flops: int
    bytes: int

    @property
    def value(self):
        return parse_value(self.params.split(" ", 1)[0])

    def dims(self, index):
        return self.inputs[index]["dims"]

    @property
    def key(self):
        return self.op, self.params, self.mode, self.dtype, self.layout


def read_cases(path):
    with open(path, encoding="utf-8") as lines:
        return [Case(**json.loads(line)) for line in lines if line.strip()]


def read_records(path):
    """Records of either side. A last line that a stopped run left half written is dropped."""
    records = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records
