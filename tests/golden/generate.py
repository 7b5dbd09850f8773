#!/usr/bin/env python3
"""Writes the metric goldens beside this file from the original programs.

    python3 -m venv venv && venv/bin/pip install sacrebleu==2.6.0 seqeval==1.2.2
    venv/bin/python tests/golden/generate.py

Everything is drawn from a fixed seed; the text is written for this purpose.
"""

import json
import random
import warnings
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as lenient_scores
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import IOB1, IOB2, IOBES

warnings.filterwarnings("ignore")
HERE = Path(__file__).parent
random.seed(20261120)

ENGLISH = """The file could not be opened : permission denied .|Please enter a new UNIX password:|Cannot
 allocate memory, needs 3,072.5 MB|Usage: git log [<options>] [<range>] [[--] <path>...]|it's a well-known bug (see #42)
|unknown option -- 'x'|Removed 17 of 1,024 packages in 0.35 s.|warning: 100% full|He said "no", then left...|10.0.0.1:8080
|--force -f /dev/null|&quot;quoted&quot; &amp; &lt;tag&gt; &amp;lt;|e-mail a.b@c.org|v2.0-beta.3|The kernel is being rebuilt
|Could not resolve host name|sorted by size, name, or date|Try again later!|5-10 files|.5 or 1. or ,7|<skipped> text|a_b^c~d`e
|connection reset by peer|no such file or directory|disk quota exceeded"""
CHINESE = """无法打开文件：权限不够|请输入新的 UNIX 密码：|无法分配内存，需要 3,072.5 MB|用法：git log [<选项>]|这是一个已知的错误（见 #42）
|未知选项“x”|已删除 1,024 个软件包中的 17 个。|警告：磁盘已满！|他说：“不”，然后离开了……|内核正在重新编译|没有那个文件或目录
|按大小、名称或日期排序|请稍后再试|连接被对方重设|㐀㒰 豈 ㌀ ，。！？|ＡＢＣ１２３|第1章—概述|ㄅㄆㄇ ﹏ ☂ ✂"""
ODD = ["", " ", "\t", "…", "—", "–", "a\u00a0b", "x\u2028y", "p\u001cq", "café naïve", "e\u0301", "👩‍💻 ok 🎉", "€5.00 £3 ¥7",
       "½ ² ③ Ⅳ", "𠀀𠀁 扩展", "日本語のテキスト", "한국어", "مرحبا", "שלום", "± × ÷ ≤", "«bonjour»", "¿qué?", "U+200B\u200bend", "-",
       "...", "(hi)", "((a))", "a--b", "1-2-3", "1,000.00", "3.", ".3", "O'Neil's", "<>", "\u3000全角\u3000", "a-\nb", "a\nb"]
POOL = [s.strip("\n") for s in ENGLISH.split("|")] + [s.strip("\n") for s in CHINESE.split("|")] + ODD


def disturb(text):
    """A plausible wrong translation of the text."""
    pieces = text.split(" ") if random.random() < 0.5 else list(text)
    joint = " " if len(pieces) and " ".join(pieces) == text else ""
    for _ in range(random.randint(0, 3)):
        kind = random.randrange(4)
        at = random.randrange(len(pieces) + 1)
        if kind == 0 and at < len(pieces):
            del pieces[at]
        elif kind == 1:
            pieces.insert(at, random.choice(["the", "的", ",", "。", "7", "x"]))
        elif kind == 2 and at + 1 < len(pieces):
            pieces[at], pieces[at + 1] = pieces[at + 1], pieces[at]
        elif kind == 3 and at < len(pieces):
            pieces[at] = random.choice(["file", "文", "!", "42"])
    return joint.join(pieces)


def segment():
    roll = random.random()
    if roll < 0.12:
        return random.choice(ODD)
    if roll < 0.8:
        return random.choice(POOL)
    return random.choice([" ", ""]).join(random.choice(POOL) for _ in range(random.randint(2, 3)))


def translation_case(size):
    references = [segment() for _ in range(size)]
    hypotheses = [r if random.random() < 0.15 else segment() if random.random() < 0.1 else disturb(r) for r in references]
    return hypotheses, references


def translation():
    oracle = (["无法打开文件：权限不够", "请输入新的 UNIX 密码：", "The file 'a.txt' is missing."],
              ["无法打开文件：权限不足", "输入新的 UNIX 密码：", "The file 'a.txt' was not found."])
    cases = [oracle, ([""], [""]), ([""], ["a"]), (["a"], [""]), (["a b c d"], ["a b c d"])]
    cases += [([s], [s]) for s in ODD[:6]]
    cases += [translation_case(size) for size in [1] * 130 + [2] * 60 + [3] * 40 + [8] * 12 + [20] * 3]
    rows = []
    for hypotheses, references in cases:
        row = {"hypotheses": hypotheses, "references": references}
        for name in ["13a", "zh", "char", "intl"]:
            metric = BLEU(tokenize=name)
            row[name] = metric.corpus_score(hypotheses, [references]).score
            row.setdefault("signatures", {})[name] = str(metric.get_signature())
        for name, order in [("chrf", 0), ("chrf++", 2)]:
            metric = CHRF(word_order=order)
            row[name] = metric.corpus_score(hypotheses, [references]).score
            row["signatures"][name] = str(metric.get_signature())
        rows.append(row)
    signatures = rows[0]["signatures"]
    assert all(row.pop("signatures") == signatures for row in rows)
    return {"signatures": signatures, "cases": rows}


def tags(prefixes, length, valid):
    kinds = ["PER", "LOC", "ORG-X"]
    out, open_kind = [], None
    for _ in range(length):
        if not valid:
            prefix = random.choice(prefixes)
            out.append("O" if prefix == "O" else f"{prefix}-{random.choice(kinds)}")
            continue
        if open_kind and random.random() < 0.6:
            out.append(f"I-{open_kind}")
        elif random.random() < 0.5:
            open_kind = random.choice(kinds)
            out.append(f"B-{open_kind}")
        else:
            open_kind = None
            out.append("O")
    return out


def entities():
    schemes = {"IOB1": (IOB1, "IOB"), "IOB2": (IOB2, "IOB"), "IOBES": (IOBES, "IOBES")}
    rows = []
    for index in range(240):
        prefixes = "IOB" if index % 2 else "IOBES"
        sentences = random.randint(1, 3)
        actual = [tags(prefixes, random.randint(0, 8), index % 3 == 0) for _ in range(sentences)]
        predicted = [[t if random.random() < 0.8 else random.choice(tags(prefixes, 3, False)) for t in s] for s in actual]
        if index % 40 == 7:
            actual[0] = actual[0] + ["B", "I", "O"]
            predicted[0] = predicted[0] + ["I", "I", "B-"]
        row = {"actual": actual, "predicted": predicted}
        for name in ["conlleval"] + list(schemes):
            if name == "conlleval":
                score = lambda average: lenient_scores(actual, predicted, average=average)
            else:
                scheme, allowed = schemes[name]
                if any(t[0] not in allowed for s in actual + predicted for t in s):
                    continue
                score = lambda average: strict_scores(actual, predicted, average=average, scheme=scheme)
            micro = [float(x) for x in score("micro")[:3]]
            per_type = [int(x) for x in score(None)[3]]
            macro = float(score("macro")[2]) if per_type else None
            row[name] = {"micro": micro, "macro_f1": macro, "support": per_type}
        assert abs(row["conlleval"]["micro"][2] - f1_score(actual, predicted)) < 1e-12
        rows.append(row)
    return {"cases": rows}


for name, data in [("translation", translation()), ("entities", entities())]:
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in data.pop("cases"))
    head = json.dumps(data, ensure_ascii=False)[1:-1]
    text = "{" + head + (", " if head else "") + '"cases": [\n' + lines + "\n]}\n"
    json.loads(text)
    (HERE / f"{name}.json").write_text(text, encoding="utf-8")
    print(name, text.count("\n") - 2, "cases,", len(text.encode()), "bytes")
