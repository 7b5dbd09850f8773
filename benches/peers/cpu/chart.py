"""Charts as SVG, in colours that light and dark pages can bear."""

import math
import re
from html import escape

COLOURS = ("#d1495b", "#2a9d8f", "#e9a23b", "#4f7cac", "#8e6bbf", "#7a9e3a", "#b5651d", "#888888")
GREY = "#808080"


def text(x, y, content, anchor="start", size=12):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{GREY}">{escape(content)}</text>'


def line(x1, y1, x2, y2, width=1, colour=GREY, opacity=1.0):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


def dot(x, y, colour, title):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{escape(title)}</title></circle>'


def frame(width, height, label, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'{head} font-family="sans-serif" role="img" aria-label="{escape(label)}">\n' + "\n".join(parts) + "\n</svg>\n"


def colours(matches):
    peers = sorted({p for m in matches for p in m.peers}, key=lambda p: (not p.startswith("PyTorch"), p))
    return {p: COLOURS[i % len(COLOURS)] for i, p in enumerate(peers)}


def legend(names, y):
    parts, x = [], 10.0
    for name, colour in names.items():
        parts += [dot(x + 5, y - 4, colour, name), text(x + 14, y, name)]
        x += 30 + 7.2 * len(name)
    return parts


def ratios(matches):
    """One row per case, one dot per peer: its time over ours."""
    colour = colours(matches)
    rows = [m for m in matches if any(m.ratio(p) for p in m.peers)]
    left, right, top, step = 270, 850, 50, 18
    found = [m.ratio(p)[0] for m in rows for p in m.peers if m.ratio(p)] or [1.0]
    low, high = min(0.5, *found) * 0.95, max(4.0, *found) * 1.1
    at = lambda ratio: left + (right - left) * math.log(ratio / low) / math.log(high / low)
    bottom = top + step * len(rows)
    parts = legend(colour, 20)
    for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64):
        if low <= tick <= high:
            parts += [line(at(tick), top - 8, at(tick), bottom, 2 if tick == 1 else 1, opacity=1.0 if tick == 1 else 0.3)]
            parts += [text(at(tick), bottom + 16, f"{tick:g}", "middle")]
    for i, m in enumerate(rows):
        y = top + step * i + 6
        name = m.name + (", both ways" if m.mode == "both" else "")
        parts += [text(left - 8, y + 4, name, "end", 11), line(left, y, right, y, opacity=0.12)]
        for peer in m.peers:
            ratio = m.ratio(peer)
            if ratio:
                middle, least, most = ratio
                parts += [line(at(least), y, at(most), y, 2, colour[peer], 0.6)]
                parts += [dot(at(middle), y, colour[peer], f"{name}: {peer} {middle:.2f} ({least:.2f} to {most:.2f})")]
    parts += [text((left + right) / 2, bottom + 34, "time of the peer / our time", "middle")]
    return frame(right + 20, bottom + 44, "Ratios by case and peer", parts)


def growth(matches):
    """Rates of square f32 products over their size."""
    cubes = {}
    for m in matches:
        size = re.fullmatch(r"NN (\d+) x \1 x \1 f32", m.name)
        if size:
            for who, time in [("espalier", m.ours), *m.peers.items()]:
                if not time.faults and time.samples:
                    n = int(size[1])
                    cubes.setdefault(who, {})[n] = 2 * n**3 / time.median / 1e3
    colour = {"espalier": GREY, **colours(matches)}
    left, right, top, bottom = 60, 620, 40, 300
    sizes = sorted({n for curve in cubes.values() for n in curve}) or [1]
    most = max((rate for curve in cubes.values() for rate in curve.values()), default=1.0) * 1.1
    x = lambda n: left + (right - left) * (math.log2(n / sizes[0]) / max(math.log2(sizes[-1] / sizes[0]), 1))
    y = lambda rate: bottom - (bottom - top) * rate / most
    parts = legend({who: colour[who] for who in cubes}, 20)
    for n in sizes:
        parts += [text(x(n), bottom + 18, str(n), "middle")]
    for tick in range(0, int(most) + 1, 50):
        parts += [line(left, y(tick), right, y(tick), opacity=0.2), text(left - 6, y(tick) + 4, str(tick), "end")]
    for who, curve in cubes.items():
        points = sorted(curve.items())
        for (n, rate), (m, after) in zip(points, points[1:]):
            parts += [line(x(n), y(rate), x(m), y(after), 3 if who == "espalier" else 1.5, colour[who])]
        parts += [dot(x(n), y(rate), colour[who], f"{who}, {n}: {rate:.0f} GFLOP/s") for n, rate in points]
    parts += [text((left + right) / 2, bottom + 36, "n of an n x n x n product in f32; GFLOP/s", "middle")]
    return frame(right + 20, bottom + 46, "Rate of f32 products over their size", parts)
