//! Backward: five products per (block of keys, block of queries), scores recomputed from lse.

use super::tile::{Left, Vector, Work, best, product};
use super::{PAD, Problem, Shared, pack, pack_transposed, take, tasks_per_chunk, with_workspace};
use crate::cpu::{Args, simd};
use crate::dtype::Float;

/// Keys and queries of a block.
const KEYS: usize = 128;
const QUERIES: usize = 32;

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
    if tensors.dbias.is_some() {
        // The bias gradient sums over the batch, so a task takes all batch elements of its head in order.
        args.ranges(p.heads, tasks_per_chunk(flops * p.batch), |heads| {
            for h in heads {
                with_workspace(p.workspace() + p.queries * p.keys, |memory| {
                    let (bias, memory) = memory.split_at_mut(p.queries * p.keys);
                    bias.fill(0.0);
                    for b in 0..p.batch {
                        best(Task { p: &p, x: &tensors, b, h, memory, bias });
                    }
                    tensors.store_bias(&p, h, bias);
                });
            }
        });
    } else {
        args.ranges(p.batch * p.heads, tasks_per_chunk(flops), |tasks| {
            for task in tasks {
                let (b, h) = (task / p.heads, task % p.heads);
                with_workspace(p.workspace(), |memory| best(Task { p: &p, x: &tensors, b, h, memory, bias: &mut [] }));
            }
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

impl<T: Float> Tensors<'_, T> {
    fn store_bias(&self, p: &Problem<T>, h: usize, bias: &[f32]) {
        if let Some(out) = &self.dbias {
            // SAFETY: head h belongs to this task alone.
            simd::narrow(bias, unsafe { out.slice(h * bias.len(), p.queries * p.keys) });
        }
    }
}

impl<T: Float> Problem<'_, T> {
    /// D and the length of a block of keys, padded.
    fn extents(&self) -> (usize, usize) {
        (self.dim.next_multiple_of(PAD), self.keys.min(KEYS).next_multiple_of(PAD))
    }

    fn workspace(&self) -> usize {
        let (padded, block) = self.extents();
        self.queries * (3 * padded + 1) + block * (3 * padded + 2 * self.dim + 2 * QUERIES)
    }
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
    /// Scaled queries, dy and dq / scale, each `[T, padded]`; delta `[T]`.
    q: &'w mut [f32],
    dy: &'w mut [f32],
    dq: &'w mut [f32],
    delta: &'w mut [f32],
    /// One block of keys: `[block, padded]`, `[D, block]`, values `[D, block]`, gradients `[block, padded]`.
    keys: &'w mut [f32],
    keys_t: &'w mut [f32],
    values_t: &'w mut [f32],
    dk: &'w mut [f32],
    dv: &'w mut [f32],
    /// P and dS `[QUERIES, block]`.
    p: &'w mut [f32],
    ds: &'w mut [f32],
}

impl<T: Float> Work for Task<'_, T> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let (m, dim, (padded, block)) = (self.p.queries, self.p.dim, self.p.extents());
        let mut memory = std::mem::take(&mut self.memory);
        let w = Workspace {
            q: take(&mut memory, m * padded),
            dy: take(&mut memory, m * padded),
            dq: take(&mut memory, m * padded),
            delta: take(&mut memory, m),
            keys: take(&mut memory, block * padded),
            keys_t: take(&mut memory, block * dim),
            values_t: take(&mut memory, block * dim),
            dk: take(&mut memory, block * padded),
            dv: take(&mut memory, block * padded),
            p: take(&mut memory, block * QUERIES),
            ds: take(&mut memory, block * QUERIES),
        };
        self.run_in::<V>(w, padded, block);
    }
}

impl<T: Float> Task<'_, T> {
    #[inline(always)]
    fn run_in<V: Vector>(&mut self, mut w: Workspace, padded: usize, block: usize) {
        let p = self.p;
        let layout = (p.stride(), p.dim);
        let first = p.row(self.b, 0, self.h, p.queries);
        pack(&self.x.y[first..], layout, p.queries, padded, 1.0, w.q);
        pack(&self.x.dy[first..], layout, p.queries, padded, 1.0, w.dy);
        for (t, delta) in w.delta.iter_mut().enumerate() {
            [*delta] = simd::sums2(&w.q[t * padded..][..padded], &w.dy[t * padded..][..padded], |y, dy| [y * dy]);
        }
        pack(&self.x.q[first..], layout, p.queries, padded, p.scale, w.q);
        w.dq.fill(0.0);
        for start in (0..p.keys).step_by(KEYS) {
            let count = (p.keys - start).min(KEYS);
            let at = p.row(self.b, start, self.h, p.keys);
            pack_transposed(&self.x.v[at..], layout, count, block, w.keys, w.values_t);
            pack_transposed(&self.x.k[at..], layout, count, block, w.keys, w.keys_t);
            pack(&self.x.k[at..], layout, count, padded, 1.0, w.keys);
            w.dk.fill(0.0);
            w.dv.fill(0.0);
            for t in (0..p.queries).step_by(QUERIES) {
                self.block::<V>(&mut w, (padded, block), (start, count), t);
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

    /// What queries `t..` of one block have to do with keys `start..start + count`.
    #[inline(always)]
    fn block<V: Vector>(
        &mut self,
        w: &mut Workspace,
        (padded, block): (usize, usize),
        (start, count): (usize, usize),
        t: usize,
    ) {
        let p = self.p;
        let rows = (p.queries - t).min(QUERIES);
        let seen = p.visible(self.b, t + rows - 1).saturating_sub(start).min(count);
        if seen == 0 {
            return;
        }
        let width = seen.next_multiple_of(V::LANES);
        let (q, dy) = (&w.q[t * padded..], &w.dy[t * padded..]);
        let left = |data| Left { data, row: padded, column: 1 };
        product::<V>((rows, width, p.dim), left(q), (w.keys_t, block), (w.p, block), false);
        product::<V>((rows, width, p.dim), left(dy), (w.values_t, block), (w.ds, block), false);
        for i in 0..rows {
            let n = p.visible(self.b, t + i).saturating_sub(start).min(count);
            let (probabilities, ds) = (&mut w.p[i * block..][..width], &mut w.ds[i * block..][..width]);
            probabilities[n..].fill(0.0);
            ds[n..].fill(0.0);
            let (probabilities, ds) = (&mut probabilities[..n], &mut ds[..n]);
            let at = (self.h * p.queries + t + i) * p.keys + start;
            if let Some(bias) = p.bias {
                for (score, bias) in probabilities.iter_mut().zip(&bias[at..][..n]) {
                    *score += bias.load();
                }
            }
            let lse = self.x.lse[(self.b * p.heads + self.h) * p.queries + t + i];
            let delta = w.delta[t + i];
            for (probability, ds) in probabilities.iter_mut().zip(&mut *ds) {
                *probability = simd::exp(*probability - lse);
                *ds = *probability * (*ds - delta);
            }
            if !self.bias.is_empty() {
                let row = &mut self.bias[(t + i) * p.keys + start..][..n];
                for (sum, ds) in row.iter_mut().zip(ds) {
                    *sum += *ds;
                }
            }
        }
        let across = |data| Left { data, row: 1, column: block };
        product::<V>((seen, padded, rows), across(w.p), (dy, padded), (w.dv, padded), true);
        product::<V>((seen, padded, rows), across(w.ds), (q, padded), (w.dk, padded), true);
        let left = Left { data: w.ds, row: block, column: 1 };
        product::<V>((rows, padded, seen), left, (w.keys, padded), (&mut w.dq[t * padded..], padded), true);
    }
}
