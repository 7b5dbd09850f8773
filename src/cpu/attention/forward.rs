//! Forward: blocks of keys, online softmax over them.

use super::tile::{Left, Vector, Work, best, product};
use super::{PAD, Problem, Shared, pack, pack_transposed, take, tasks_per_chunk, with_workspace};
use crate::cpu::{Args, simd};
use crate::dtype::Float;
use crate::ops::attention::MASKED;

/// Queries of a task, keys of a block, queries of one score tile.
const QUERIES: usize = 128;
const KEYS: usize = 128;
const ROWS: usize = 8;

pub(super) fn run<T: Float>(args: &Args) {
    let p = Problem::<T>::of(args);
    let (q, k, v) = (args.read::<T>(0), args.read::<T>(1), args.read::<T>(2));
    let (y, lse) = (Shared::of(args.write::<T>(p.inputs)), Shared::of(args.write::<f32>(p.inputs + 1)));
    let blocks = p.queries.div_ceil(QUERIES);
    let task_flops = 4 * p.queries.min(QUERIES) * p.keys * p.dim;
    args.ranges(p.batch * p.heads * blocks, tasks_per_chunk(task_flops), |tasks| {
        for task in tasks {
            let (head, block) = (task / blocks, task % blocks);
            let (b, h) = (head / p.heads, head % p.heads);
            let rows = (block * QUERIES, p.queries.min((block + 1) * QUERIES));
            with_workspace(p.forward_workspace(), |memory| {
                best(Task { p: &p, q, k, v, y, lse, b, h, rows, memory });
            });
        }
    });
}

impl<T: Float> Problem<'_, T> {
    /// D and the length of a block of keys, padded.
    fn padded(&self) -> (usize, usize) {
        (self.dim.next_multiple_of(PAD), self.keys.min(KEYS).next_multiple_of(PAD))
    }

    fn forward_workspace(&self) -> usize {
        let (m, (padded, block)) = (self.queries.min(QUERIES), self.padded());
        m * (self.dim + padded + 2) + block * (self.dim + padded + ROWS)
    }
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

impl<T: Float> Work for Task<'_, T> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let (m, dim, (padded, block)) = (self.rows.1 - self.rows.0, self.p.dim, self.p.padded());
        let mut memory = std::mem::take(&mut self.memory);
        let w = Workspace {
            q: take(&mut memory, m * dim),
            sums: take(&mut memory, m * padded),
            largest: take(&mut memory, m),
            total: take(&mut memory, m),
            keys: take(&mut memory, block * dim),
            values: take(&mut memory, block * padded),
            scores: take(&mut memory, block * ROWS),
        };
        self.attend::<V>(w, padded, block);
    }
}

struct Workspace<'w> {
    /// Scaled queries `[m, D]`.
    q: &'w mut [f32],
    /// Unnormalised outputs `[m, padded]`, largest score and sum of exponentials `[m]`.
    sums: &'w mut [f32],
    largest: &'w mut [f32],
    total: &'w mut [f32],
    /// One block of keys `[D, block]` and values `[block, padded]`.
    keys: &'w mut [f32],
    values: &'w mut [f32],
    /// Scores, then probabilities, `[ROWS, block]`.
    scores: &'w mut [f32],
}

impl<T: Float> Task<'_, T> {
    #[inline(always)]
    fn attend<V: Vector>(&self, w: Workspace, padded: usize, block: usize) {
        let (p, (first, last)) = (self.p, self.rows);
        let (m, layout) = (last - first, (p.stride(), p.dim));
        pack(&self.q[p.row(self.b, first, self.h, p.queries)..], layout, m, p.dim, p.scale, w.q);
        w.largest.fill(MASKED);
        w.total.fill(0.0);
        w.sums.fill(0.0);
        let keys = p.visible(self.b, last - 1);
        for start in (0..keys).step_by(KEYS) {
            let count = (keys - start).min(KEYS);
            let at = p.row(self.b, start, self.h, p.keys);
            pack_transposed(&self.k[at..], layout, count, block, w.values, w.keys);
            pack(&self.v[at..], layout, count, padded, 1.0, w.values);
            for i in (0..m).step_by(ROWS) {
                let rows = (m - i).min(ROWS);
                // Causal masks leave nothing to the right of the last row's keys.
                let seen = p.visible(self.b, first + i + rows - 1).saturating_sub(start).min(count);
                if seen == 0 {
                    continue;
                }
                let width = seen.next_multiple_of(V::LANES);
                let left = Left { data: &w.q[i * p.dim..], row: p.dim, column: 1 };
                product::<V>((rows, width, p.dim), left, (w.keys, block), (w.scores, block), false);
                for r in 0..rows {
                    let t = first + i + r;
                    let n = p.visible(self.b, t).saturating_sub(start).min(count);
                    let scores = &mut w.scores[r * block..][..width];
                    self.add_bias(t, start, &mut scores[..n]);
                    let state = (&mut w.largest[i + r], &mut w.total[i + r]);
                    let correction = online(scores, n, state);
                    if start > 0 && correction != 1.0 {
                        for x in &mut w.sums[(i + r) * padded..][..padded] {
                            *x *= correction;
                        }
                    }
                }
                let left = Left { data: w.scores, row: block, column: 1 };
                product::<V>((rows, padded, seen), left, (w.values, padded), (&mut w.sums[i * padded..], padded), true);
            }
        }
        self.store(w, padded);
    }

    #[inline(always)]
    fn add_bias(&self, t: usize, start: usize, scores: &mut [f32]) {
        let Some(bias) = self.p.bias else { return };
        let bias = &bias[(self.h * self.p.queries + t) * self.p.keys + start..][..scores.len()];
        for (score, bias) in scores.iter_mut().zip(bias) {
            *score += bias.load();
        }
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

/// Turns `n` scores into exponentials against the running largest, zeroes the rest of the row, updates the running
/// state, and returns the factor for everything that was summed before.
#[inline(always)]
fn online(scores: &mut [f32], n: usize, (largest, total): (&mut f32, &mut f32)) -> f32 {
    let (seen, hidden) = scores.split_at_mut(n);
    hidden.fill(0.0);
    if n == 0 {
        return 1.0;
    }
    let high = simd::largest(seen).max(*largest);
    let correction = simd::exp(*largest - high);
    for x in &mut *seen {
        *x = simd::exp(*x - high);
    }
    let [sum] = simd::sums(seen, |x| [x]);
    *total = *total * correction + sum;
    *largest = high;
    correction
}
