//! Forward: blocks of keys, panels of queries side by side in vector lanes, online softmax down the keys.

use super::tile::{Left, Vector, Work, best, product};
use super::{
    KEYS, PAD, PANEL, Problem, Shared, Visible, pack, scores, take, tasks_per_chunk, transpose, with_workspace,
};
use crate::dtype::Float;
use crate::{Args, simd};
/// Value of a masked score, and lse of a row without keys: large and finite, as `MASKED` in the shaders.
pub const MASKED: f32 = -1e30;

/// Queries of a task: they share the packing of each block of keys.
const QUERIES: usize = 4 * PANEL;

pub(super) fn run<T: Float>(args: &Args) {
    let p = Problem::<T>::of(args);
    let (q, k, v) = (args.read::<T>(0), args.read::<T>(1), args.read::<T>(2));
    let (y, lse) = (Shared::of(args.write::<T>(p.inputs)), Shared::of(args.write::<f32>(p.inputs + 1)));
    let blocks = p.queries.div_ceil(QUERIES);
    let task_flops = 4 * p.queries.min(QUERIES) * p.keys * p.dim;
    args.ranges(p.batch * p.heads * blocks, tasks_per_chunk(task_flops), |tasks| {
        with_workspace(Workspace::len(&p), |memory| {
            for task in tasks.clone() {
                let (head, block) = (task / blocks, task % blocks);
                let (b, h) = (head / p.heads, head % p.heads);
                let rows = (block * QUERIES, p.queries.min((block + 1) * QUERIES));
                best(Task { p: &p, q, k, v, y, lse, b, h, rows, memory });
            }
        });
    });
}

struct Task<'a, T> {
    p: &'a Problem<'a, T>,
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    y: Shared<T>,
    lse: Shared<f32>,
    b: usize,
    h: usize,
    rows: (usize, usize),
    memory: &'a mut [f32],
}

struct Workspace<'w> {
    /// Scaled queries, a panel of `[D, PANEL]` after the other.
    q: &'w mut [f32],
    /// Unnormalised outputs `[rows, padded]`; largest score and sum of exponentials of each row.
    sums: &'w mut [f32],
    largest: &'w mut [f32],
    total: &'w mut [f32],
    /// One block of keys and values, `[block, padded]` each.
    keys: &'w mut [f32],
    values: &'w mut [f32],
    /// Scores, then exponentials, `[block, PANEL]`.
    scores: &'w mut [f32],
}

impl<'w> Workspace<'w> {
    /// Rows of a task in whole panels, D padded, keys of a block.
    fn extents<T: Float>(p: &Problem<T>) -> (usize, usize, usize) {
        (p.queries.min(QUERIES).next_multiple_of(PANEL), p.dim.next_multiple_of(PAD), p.keys.min(KEYS))
    }

    fn len<T: Float>(p: &Problem<T>) -> usize {
        let (rows, padded, block) = Self::extents(p);
        rows * (2 * padded + 2) + block * (2 * padded + PANEL)
    }

    fn of<T: Float>(p: &Problem<T>, mut memory: &'w mut [f32]) -> Self {
        let (rows, padded, block) = Self::extents(p);
        Self {
            q: take(&mut memory, rows * padded),
            sums: take(&mut memory, rows * padded),
            largest: take(&mut memory, rows),
            total: take(&mut memory, rows),
            keys: take(&mut memory, block * padded),
            values: take(&mut memory, block * padded),
            scores: take(&mut memory, block * PANEL),
        }
    }
}

impl<T: Float> Work for Task<'_, T> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let w = Workspace::of(self.p, std::mem::take(&mut self.memory));
        self.attend::<V>(w);
    }
}

impl<T: Float> Task<'_, T> {
    #[inline(always)]
    fn attend<V: Vector>(&self, w: Workspace) {
        let (p, (first, last)) = (self.p, self.rows);
        let (dim, padded, layout) = (p.dim, p.dim.next_multiple_of(PAD), (p.stride(), p.dim));
        let panels = (last - first).div_ceil(PANEL);
        for panel in 0..panels {
            let t = first + panel * PANEL;
            let rows = (last - t).min(PANEL);
            // The outputs' memory is free until the first block of keys.
            pack(&self.q[p.row(self.b, t, self.h, p.queries)..], layout, rows, padded, p.scale, w.sums);
            transpose(&w.sums[..rows * padded], (padded, dim), &mut w.q[panel * PANEL * padded..]);
        }
        w.largest.fill(MASKED);
        w.total.fill(0.0);
        w.sums.fill(0.0);
        let keys = p.visible(self.b, last - 1);
        for start in (0..keys).step_by(KEYS) {
            let count = (keys - start).min(KEYS);
            let at = p.row(self.b, start, self.h, p.keys);
            pack(&self.k[at..], layout, count, padded, 1.0, w.keys);
            pack(&self.v[at..], layout, count, padded, 1.0, w.values);
            for panel in 0..panels {
                let t = first + panel * PANEL;
                let rows = (last - t).min(PANEL);
                let visible = Visible::of(p, self.b, (t, t + rows), (start, count));
                if visible.keys() == 0 {
                    continue;
                }
                scores::<V>(&visible, w.keys, (padded, dim), &w.q[panel * PANEL * padded..], w.scores);
                p.add_bias(&visible, self.h, t, start, w.scores);
                let state = panel * PANEL..(panel + 1) * PANEL;
                let mut corrections = [1.0; PANEL];
                for half in 0..2 {
                    let lanes = state.start + half * PAD..state.start + (half + 1) * PAD;
                    let state = (&mut w.largest[lanes.clone()], &mut w.total[lanes]);
                    online(&visible, half, w.scores, state, &mut corrections[half * PAD..]);
                }
                let sums = &mut w.sums[state.start * padded..];
                if start > 0 {
                    for (row, correction) in sums.chunks_exact_mut(padded).zip(corrections) {
                        for x in row {
                            *x *= correction;
                        }
                    }
                }
                for half in 0..2 {
                    let rows = rows.saturating_sub(half * PAD).min(PAD);
                    let left = Left { data: &w.scores[half * PAD..], row: 1, column: PANEL };
                    let sums = (&mut sums[half * PAD * padded..], padded);
                    product::<V>((rows, padded, visible.most[half]), left, (w.values, padded), sums, true);
                }
            }
        }
        self.store(w, padded);
    }

    /// y = sums / total, lse = largest + ln total.
    #[inline(always)]
    fn store(&self, w: Workspace, padded: usize) {
        let (p, (first, last)) = (self.p, self.rows);
        // SAFETY: rows first..last of (b, h) belong to this task alone.
        let lse = unsafe { self.lse.slice((self.b * p.heads + self.h) * p.queries + first, last - first) };
        for (i, lse) in lse.iter_mut().enumerate() {
            let sums = &mut w.sums[i * padded..][..p.dim];
            if p.visible(self.b, first + i) > 0 {
                *lse = w.largest[i] + w.total[i].ln();
                let inverse = 1.0 / w.total[i];
                for x in &mut *sums {
                    *x *= inverse;
                }
            } else {
                *lse = MASKED;
                sums.fill(0.0);
            }
            // SAFETY: as above.
            let y = unsafe { self.y.slice(p.row(self.b, first + i, self.h, p.queries), p.dim) };
            simd::narrow(sums, y);
        }
    }
}

/// Turns one half panel of scores into exponentials against the running largest, zero where a lane does not see the
/// key; updates the running state and gives the factor for everything that was summed before.
#[inline(always)]
fn online(
    visible: &Visible,
    half: usize,
    scores: &mut [f32],
    (largest, total): (&mut [f32], &mut [f32]),
    corrections: &mut [f32],
) {
    let (counts, fewest, most) = (&visible.counts[half], visible.fewest[half], visible.most[half]);
    let rows = scores.as_chunks_mut::<PAD>().0;
    let mut high = [MASKED; PAD];
    high.copy_from_slice(&largest[..PAD]);
    for key in 0..most {
        let row = &mut rows[key * 2 + half];
        if key >= fewest {
            for lane in 0..PAD {
                row[lane] = if (key as u32) < counts[lane] { row[lane] } else { MASKED };
            }
        }
        for lane in 0..PAD {
            high[lane] = if row[lane] > high[lane] { row[lane] } else { high[lane] };
        }
    }
    // A lane that has seen nothing yet must not weigh its masked scores against each other.
    let base = high.map(|x| if x <= MASKED { 0.0 } else { x });
    let mut sum = [0.0; PAD];
    for key in 0..most {
        let row = &mut rows[key * 2 + half];
        for lane in 0..PAD {
            row[lane] = simd::exp(row[lane] - base[lane]);
            sum[lane] += row[lane];
        }
    }
    for lane in 0..PAD {
        let correction = simd::exp(largest[lane] - base[lane]);
        total[lane] = total[lane] * correction + sum[lane];
        largest[lane] = high[lane];
        corrections[lane] = correction;
    }
}
