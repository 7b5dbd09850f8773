"""Charts as SVG, in colours that light and dark pages can bear."""

import math
import re
from html import escape

# Of a palette that the colour blind can tell apart; grey and black are the page's own.
COLOURS = ("#d55e00", "#3a86c8", "#009e73", "#e69f00", "#cc79a7", "#6fbde8", "#8c6d31")
# Outlines in units of a mark's size. As many as have no divisor in common with the colours: 35 peers before a look comes again.
SHAPES = (
    None,
    ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    ((0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    ((0.0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
)
GREY = "#808080"
OURS = (GREY, None)
MARK, LEGEND_LINE = 4.5, 18


def text(x, y, content, anchor="start", size=12):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{GREY}">{escape(content)}</text>'


def line(x1, y1, x2, y2, width=1, colour=GREY, opacity=1.0):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


def mark(x, y, look, title):
    """A dot, or what tells a peer apart where colours do not."""
    (colour, shape), name = look, f"<title>{escape(title)}</title>"
    if shape is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{MARK}" fill="{colour}">{name}</circle>'
    points = " ".join(f"{x + MARK * dx:.1f},{y + MARK * dy:.1f}" for dx, dy in shape)
    return f'<polygon points="{points}" fill="{colour}">{name}</polygon>'


def frame(width, height, label, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'{head} font-family="sans-serif" role="img" aria-label="{escape(label)}">\n' + "\n".join(parts) + "\n</svg>\n"


def looks(matches):
    """A colour and a shape for each peer."""
    peers = sorted({p for m in matches for p in m.peers}, key=lambda p: (not p.startswith("PyTorch"), p))
    return {p: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, p in enumerate(peers)}


def legend(names, width):
    """Names behind their marks, in as many lines as they need; and where these end."""
    parts, x, y = [], 10.0, 20.0
    for name, look in names.items():
        taken = 30 + 7.2 * len(name)
        if x > 10.0 and x + taken > width:
            x, y = 10.0, y + LEGEND_LINE
        parts += [mark(x + 5, y - 4, look, name), text(x + 14, y, name)]
        x += taken
    return parts, y


def ratios(matches):
    """One row per case, one mark per peer: its time over ours."""
    look = looks(matches)
    rows = [m for m in matches if any(m.ratio(p) for p in m.peers)]
    left, right, step = 270, 850, 18
    found = [m.ratio(p)[0] for m in rows for p in m.peers if m.ratio(p)] or [1.0]
    low, high = min(0.5, *found) * 0.95, max(4.0, *found) * 1.1
    at = lambda ratio: left + (right - left) * math.log(ratio / low) / math.log(high / low)
    parts, top = legend(look, right + 20)
    top += 30
    bottom = top + step * len(rows)
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
                parts += [line(at(least), y, at(most), y, 2, look[peer][0], 0.6)]
                parts += [mark(at(middle), y, look[peer], f"{name}: {peer} {middle:.2f} ({least:.2f} to {most:.2f})")]
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
    look = {"espalier": OURS, **looks(matches)}
    left, right = 60, 620
    parts, top = legend({who: look[who] for who in cubes}, right + 20)
    top, bottom = top + 20, top + 280
    sizes = sorted({n for curve in cubes.values() for n in curve}) or [1]
    most = max((rate for curve in cubes.values() for rate in curve.values()), default=1.0) * 1.1
    x = lambda n: left + (right - left) * (math.log2(n / sizes[0]) / max(math.log2(sizes[-1] / sizes[0]), 1))
    y = lambda rate: bottom - (bottom - top) * rate / most
    for n in sizes:
        parts += [text(x(n), bottom + 18, str(n), "middle")]
    for tick in range(0, int(most) + 1, 50):
        parts += [line(left, y(tick), right, y(tick), opacity=0.2), text(left - 6, y(tick) + 4, str(tick), "end")]
    for who, curve in cubes.items():
        points = sorted(curve.items())
        for (n, rate), (m, after) in zip(points, points[1:]):
            parts += [line(x(n), y(rate), x(m), y(after), 3 if who == "espalier" else 1.5, look[who][0])]
        parts += [mark(x(n), y(rate), look[who], f"{who}, {n}: {rate:.0f} GFLOP/s") for n, rate in points]
    parts += [text((left + right) / 2, bottom + 36, "n of an n x n x n product in f32; GFLOP/s", "middle")]
    return frame(right + 20, bottom + 46, "Rate of f32 products over their size", parts)
