//! Backward: five products per (block of keys, panel of queries), scores recomputed from lse.

use super::tile::{Left, Vector, Work, best, product};
use super::{
    KEYS, PAD, PANEL, Problem, Shared, Visible, pack, scores, take, tasks_per_chunk, transpose, with_workspace,
};
use crate::dtype::Float;
use crate::{Args, simd};

pub(super) fn run<T: Float>(args: &Args) {
    let p = Problem::<T>::of(args);
    let n = p.inputs;
    let tensors = Tensors {
        q: args.read(0),
        k: args.read(1),
        v: args.read(2),
        y: args.read(n),
        lse: args.read(n + 1),
        dy: args.read(n + 2),
        dq: Shared::of(args.write(n + 3)),
        dk: Shared::of(args.write(n + 4)),
        dv: Shared::of(args.write(n + 5)),
        dbias: p.bias.map(|_| Shared::of(args.write(n + 6))),
    };
    let flops = 10 * p.queries * p.keys * p.dim;
    if let Some(dbias) = tensors.dbias {
        // The bias gradient sums over the batch, so a task takes all batch elements of its head in order.
        let pairs = p.queries * p.keys;
        args.ranges(p.heads, tasks_per_chunk(flops * p.batch), |heads| {
            with_workspace(Workspace::len(&p) + pairs, |memory| {
                let (bias, memory) = memory.split_at_mut(pairs);
                for h in heads.clone() {
                    bias.fill(0.0);
                    for b in 0..p.batch {
                        best(Task { p: &p, x: &tensors, b, h, memory, bias });
                    }
                    // SAFETY: head h belongs to this task alone.
                    simd::narrow(bias, unsafe { dbias.slice(h * pairs, pairs) });
                }
            });
        });
    } else {
        args.ranges(p.batch * p.heads, tasks_per_chunk(flops), |tasks| {
            with_workspace(Workspace::len(&p), |memory| {
                for task in tasks.clone() {
                    best(Task { p: &p, x: &tensors, b: task / p.heads, h: task % p.heads, memory, bias: &mut [] });
                }
            });
        });
    }
}

struct Tensors<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    y: &'a [T],
    lse: &'a [f32],
    dy: &'a [T],
    dq: Shared<T>,
    dk: Shared<T>,
    dv: Shared<T>,
    dbias: Option<Shared<T>>,
}

struct Task<'a, T> {
    p: &'a Problem<'a, T>,
    x: &'a Tensors<'a, T>,
    b: usize,
    h: usize,
    memory: &'a mut [f32],
    /// Bias gradient of this head, `[T, S]`, or empty.
    bias: &'a mut [f32],
}

struct Workspace<'w> {
    /// Scaled queries, dy and dq / scale, each `[rows, padded]`; the first two also as panels of `[D, PANEL]`.
    q: &'w mut [f32],
    dy: &'w mut [f32],
    dq: &'w mut [f32],
    q_panels: &'w mut [f32],
    dy_panels: &'w mut [f32],
    /// rowsum(dy y) and lse of each row.
    delta: &'w mut [f32],
    lse: &'w mut [f32],
    /// One block of keys, values and their gradients, `[block, padded]` each.
    keys: &'w mut [f32],
    values: &'w mut [f32],
    dk: &'w mut [f32],
    dv: &'w mut [f32],
    /// P and dS, `[block, PANEL]` each.
    p: &'w mut [f32],
    ds: &'w mut [f32],
}

impl<'w> Workspace<'w> {
    /// Rows of a task in whole panels, D padded, keys of a block.
    fn extents<T: Float>(p: &Problem<T>) -> (usize, usize, usize) {
        (p.queries.next_multiple_of(PANEL), p.dim.next_multiple_of(PAD), p.keys.min(KEYS))
    }

    fn len<T: Float>(p: &Problem<T>) -> usize {
        let (rows, padded, block) = Self::extents(p);
        rows * (5 * padded + 2) + block * (4 * padded + 2 * PANEL)
    }

    fn of<T: Float>(p: &Problem<T>, mut memory: &'w mut [f32]) -> Self {
        let (rows, padded, block) = Self::extents(p);
        Self {
            q: take(&mut memory, rows * padded),
            dy: take(&mut memory, rows * padded),
            dq: take(&mut memory, rows * padded),
            q_panels: take(&mut memory, rows * padded),
            dy_panels: take(&mut memory, rows * padded),
            delta: take(&mut memory, rows),
            lse: take(&mut memory, rows),
            keys: take(&mut memory, block * padded),
            values: take(&mut memory, block * padded),
            dk: take(&mut memory, block * padded),
            dv: take(&mut memory, block * padded),
            p: take(&mut memory, block * PANEL),
            ds: take(&mut memory, block * PANEL),
        }
    }
}

impl<T: Float> Work for Task<'_, T> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let mut w = Workspace::of(self.p, std::mem::take(&mut self.memory));
        let (p, padded) = (self.p, self.p.dim.next_multiple_of(PAD));
        let layout = (p.stride(), p.dim);
        self.prepare(&mut w, padded);
        for start in (0..p.keys).step_by(KEYS) {
            let count = (p.keys - start).min(KEYS);
            let at = p.row(self.b, start, self.h, p.keys);
            pack(&self.x.k[at..], layout, count, padded, 1.0, w.keys);
            pack(&self.x.v[at..], layout, count, padded, 1.0, w.values);
            w.dk.fill(0.0);
            w.dv.fill(0.0);
            for t in (0..p.queries).step_by(PANEL) {
                self.panel::<V>(&mut w, padded, (start, count), t);
            }
            for i in 0..count {
                let at = p.row(self.b, start + i, self.h, p.keys);
                // SAFETY: the keys of (b, h) belong to this task alone.
                unsafe {
                    simd::narrow(&w.dk[i * padded..][..p.dim], self.x.dk.slice(at, p.dim));
                    simd::narrow(&w.dv[i * padded..][..p.dim], self.x.dv.slice(at, p.dim));
                }
            }
        }
        for t in 0..p.queries {
            let row = &mut w.dq[t * padded..][..p.dim];
            for x in &mut *row {
                *x *= p.scale;
            }
            // SAFETY: the queries of (b, h) belong to this task alone.
            simd::narrow(row, unsafe { self.x.dq.slice(p.row(self.b, t, self.h, p.queries), p.dim) });
        }
    }
}

impl<T: Float> Task<'_, T> {
    /// Everything that depends on the queries alone.
    #[inline(always)]
    fn prepare(&self, w: &mut Workspace, padded: usize) {
        let p = self.p;
        let layout = (p.stride(), p.dim);
        let first = p.row(self.b, 0, self.h, p.queries);
        pack(&self.x.y[first..], layout, p.queries, padded, 1.0, w.q);
        pack(&self.x.dy[first..], layout, p.queries, padded, 1.0, w.dy);
        w.delta.fill(0.0);
        w.lse.fill(0.0);
        w.lse[..p.queries].copy_from_slice(&self.x.lse[(self.b * p.heads + self.h) * p.queries..][..p.queries]);
        let rows = w.q.chunks_exact(padded).zip(w.dy.chunks_exact(padded));
        for (delta, (y, dy)) in w.delta[..p.queries].iter_mut().zip(rows) {
            let mut lanes = [0.0; PAD];
            for (y, dy) in y.as_chunks::<PAD>().0.iter().zip(dy.as_chunks::<PAD>().0) {
                for lane in 0..PAD {
                    lanes[lane] += y[lane] * dy[lane];
                }
            }
            *delta = lanes.iter().sum();
        }
        pack(&self.x.q[first..], layout, p.queries, padded, p.scale, w.q);
        for t in (0..p.queries).step_by(PANEL) {
            let rows = t * padded..p.queries.min(t + PANEL) * padded;
            transpose(&w.q[rows.clone()], (padded, p.dim), &mut w.q_panels[t * padded..]);
            transpose(&w.dy[rows], (padded, p.dim), &mut w.dy_panels[t * padded..]);
        }
        w.dq.fill(0.0);
    }

    /// What the panel of queries from `t` has to do with keys `start..start + count`.
    #[inline(always)]
    fn panel<V: Vector>(&mut self, w: &mut Workspace, padded: usize, (start, count): (usize, usize), t: usize) {
        let p = self.p;
        let rows = (p.queries - t).min(PANEL);
        let visible = Visible::of(p, self.b, (t, t + rows), (start, count));
        let seen = visible.keys();
        if seen == 0 {
            return;
        }
        let extents = (padded, p.dim);
        scores::<V>(&visible, w.keys, extents, &w.q_panels[t * padded..], w.p);
        scores::<V>(&visible, w.values, extents, &w.dy_panels[t * padded..], w.ds);
        p.add_bias(&visible, self.h, t, start, w.p);
        for half in 0..2 {
            let lanes = t + half * PAD..t + (half + 1) * PAD;
            probabilities(&visible, half, seen, (&w.lse[lanes.clone()], &w.delta[lanes]), (w.p, w.ds));
        }
        if !self.bias.is_empty() {
            for lane in 0..rows {
                let row = &mut self.bias[(t + lane) * p.keys + start..][..seen];
                for (sum, ds) in row.iter_mut().zip(w.ds[lane..].iter().step_by(PANEL)) {
                    *sum += *ds;
                }
            }
        }
        let down = |data| Left { data, row: PANEL, column: 1 };
        let (q, dy) = (&w.q[t * padded..], &w.dy[t * padded..]);
        product::<V>((seen, padded, rows), down(w.p), (dy, padded), (w.dv, padded), true);
        product::<V>((seen, padded, rows), down(w.ds), (q, padded), (w.dk, padded), true);
        for half in 0..2 {
            let rows = rows.saturating_sub(half * PAD).min(PAD);
            let left = Left { data: &w.ds[half * PAD..], row: 1, column: PANEL };
            let dq = (&mut w.dq[(t + half * PAD) * padded..], padded);
            product::<V>((rows, padded, visible.most[half]), left, (w.keys, padded), dq, true);
        }
    }
}

/// P = exp(scores - lse) and dS = P (dP - delta) for one half panel of `seen` keys, both zero where a lane does not see
/// the key.
#[inline(always)]
fn probabilities(
    visible: &Visible,
    half: usize,
    seen: usize,
    (lse, delta): (&[f32], &[f32]),
    (p, ds): (&mut [f32], &mut [f32]),
) {
    let (counts, fewest, most) = (&visible.counts[half], visible.fewest[half], visible.most[half]);
    let rows = p.as_chunks_mut::<PAD>().0.iter_mut().zip(ds.as_chunks_mut::<PAD>().0);
    let (Some((lse, _)), Some((delta, _))) = (lse.split_first_chunk::<PAD>(), delta.split_first_chunk::<PAD>()) else {
        return;
    };
    for (key, (p, ds)) in rows.skip(half).step_by(2).take(seen).enumerate() {
        if key >= most {
            *p = [0.0; PAD];
            *ds = [0.0; PAD];
            continue;
        }
        for lane in 0..PAD {
            p[lane] = simd::exp(p[lane] - lse[lane]);
            ds[lane] = p[lane] * (ds[lane] - delta[lane]);
        }
        if key >= fewest {
            for lane in 0..PAD {
                let live = (key as u32) < counts[lane];
                p[lane] = if live { p[lane] } else { 0.0 };
                ds[lane] = if live { ds[lane] } else { 0.0 };
            }
        }
    }
}
