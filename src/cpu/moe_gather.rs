//! CPU kernels of `ops/moe_gather.rs`. A few tokens read each chosen expert where it lies; many are put together by expert, some at
//! a time, so that every expert's weights meet all of their rows while they are in the cache.

use std::ops::Range;

use super::dot_tile;
use super::gemm::{Product as Dense, View, gemm};
use super::int8::{Product, Weights};
use super::matmul::floats;
use super::{Args, float_kernel, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Tokens that are put together, at least and at most. A function of the problem alone, so that sums do not depend on the
/// number of threads.
const TASK: [usize; 2] = [64, 256];
/// Rows of one expert up to which dot products against its weight as it lies beat packing it.
const FEW: usize = 16;
/// Multiply-adds of one parallel task where tokens are few.
const GRAIN: usize = 1 << 17;

/// Parameters of both kernels: tokens, n, d, k, experts, sum, relu, skips, threshold.
struct Gathered<'a> {
    tokens: usize,
    n: usize,
    d: usize,
    k: usize,
    experts: usize,
    sum: bool,
    relu: bool,
    indices: &'a [u32],
    gates: Option<&'a [f32]>,
    threshold: f32,
}

impl<'a> Gathered<'a> {
    /// `indices`: the argument that holds them; gates, where there are any, follow.
    fn new(args: &Args<'a>, indices: usize) -> Self {
        Self {
            tokens: args.u(0),
            n: args.u(1),
            d: args.u(2),
            k: args.u(3),
            experts: args.u(4),
            sum: args.u(5) == 1,
            relu: args.u(6) == 1,
            indices: args.read(indices),
            gates: (args.u(7) == 1).then(|| args.read(indices + 1)),
            threshold: args.f(8),
        }
    }

    fn expert(&self, slot: usize) -> Option<usize> {
        let expert = self.indices[slot] as usize;
        (expert < self.experts && self.gates.is_none_or(|g| g[slot] > self.threshold)).then_some(expert)
    }

    /// The row of x that a slot takes.
    fn row(&self, slot: usize) -> usize {
        if self.sum { slot } else { slot / self.k }
    }

    /// The slots of `count` tokens from `first` on, by expert.
    fn sorted(&self, first: usize, count: usize) -> Sorted {
        let slots = first * self.k..(first + count) * self.k;
        let mut ends = vec![0; self.experts + 1];
        slots.clone().filter_map(|slot| self.expert(slot)).for_each(|e| ends[e + 1] += 1);
        for e in 0..self.experts {
            ends[e + 1] += ends[e];
        }
        let mut sorted = vec![0u32; ends[self.experts]];
        for slot in slots {
            if let Some(e) = self.expert(slot) {
                sorted[ends[e]] = slot as u32;
                ends[e] += 1;
            }
        }
        Sorted { slots: sorted, ends }
    }
}

/// Slots by expert, in rising order within each; ends[e] is where those of e end.
struct Sorted {
    slots: Vec<u32>,
    ends: Vec<usize>,
}

impl Sorted {
    /// Experts that have slots, and these.
    fn experts(&self) -> impl Iterator<Item = (usize, &[u32])> {
        let start = |e: usize| if e == 0 { 0 } else { self.ends[e - 1] };
        let all = (0..self.ends.len() - 1).map(move |e| (e, &self.slots[start(e)..self.ends[e]]));
        all.filter(|(_, slots)| !slots.is_empty())
    }
}

/// Both kernels around their products: `product(expert, columns, slots, out)` makes `out [slots, columns]`, without bias.
fn execute<T: Float>(
    args: &Args,
    g: &Gathered,
    bias: &[f32],
    y: &mut [T],
    product: impl Fn(usize, Range<usize>, &[u32], &mut [f32]) + Sync + Send,
) {
    let (n, d, slots) = (g.n, g.d, g.tokens * g.k);
    if g.tokens > TASK[0] {
        let per_token = if g.sum { 1 } else { g.k };
        args.rows(y, per_token * n, g.tokens.div_ceil(4).clamp(TASK[0], TASK[1]), |first, y| {
            let tokens = y.len() / (per_token * n).max(1);
            let sorted = g.sorted(first, tokens);
            let mut made = Vec::new();
            if g.sum {
                let mut total = vec![0.0f32; y.len()];
                for (e, slots) in sorted.experts() {
                    made.resize(slots.len() * n, 0.0);
                    product(e, 0..n, slots, &mut made);
                    add(g, slots, first, &made, &mut total);
                }
                store(g, &mut total, bias, y);
            } else {
                y.fill(T::store(0.0));
                for (e, slots) in sorted.experts() {
                    made.resize(slots.len() * n, 0.0);
                    product(e, 0..n, slots, &mut made);
                    place(g, slots, first, &mut made, &bias[e * n..][..n], y);
                }
            }
        });
        return;
    }
    let sorted = g.sorted(0, g.tokens);
    if g.sum {
        // Columns are shared out: every sum is one task's, in the same order whatever their width.
        let width = GRAIN.div_ceil((slots * d).max(1)).next_multiple_of(16).min(n.max(1));
        let mut totals = vec![0.0f32; n.div_ceil(width) * g.tokens * width];
        args.rows(&mut totals, g.tokens * width, 1, |part, total| {
            let columns = part * width..((part + 1) * width).min(n);
            let total = &mut total[..g.tokens * columns.len()];
            let mut made = Vec::new();
            for (e, slots) in sorted.experts() {
                made.resize(slots.len() * columns.len(), 0.0);
                product(e, columns.clone(), slots, &mut made);
                add(g, slots, 0, &made, total);
            }
        });
        for (part, totals) in totals.chunks_mut((g.tokens * width).max(1)).enumerate() {
            let columns = part * width..((part + 1) * width).min(n);
            let rows = totals[..g.tokens * columns.len()].chunks_mut(columns.len().max(1));
            for (total, y) in rows.zip(y.chunks_mut(n.max(1))) {
                store(g, total, &bias[columns.clone()], &mut y[columns.clone()]);
            }
        }
        return;
    }
    // Experts are shared out.
    let mut made = vec![0.0f32; sorted.slots.len() * n];
    let mut rest = made.as_mut_slice();
    let mut parts = Vec::new();
    for (e, slots) in sorted.experts() {
        let (own, after) = std::mem::take(&mut rest).split_at_mut(slots.len() * n);
        parts.push((e, slots, own));
        rest = after;
    }
    y.fill(T::store(0.0));
    if slots * n * d < 2 * GRAIN {
        for (e, slots, made) in parts {
            product(e, 0..n, slots, made);
            place(g, slots, 0, made, &bias[e * n..][..n], y);
        }
        return;
    }
    args.parts(parts.into_iter(), |_, (e, slots, made)| product(e, 0..n, slots, made));
    let mut made = made.as_mut_slice();
    for (e, slots) in sorted.experts() {
        let (own, after) = std::mem::take(&mut made).split_at_mut(slots.len() * n);
        place(g, slots, 0, own, &bias[e * n..][..n], y);
        made = after;
    }
}

/// Adds each slot's row to its token's, of those from `first` on.
fn add(g: &Gathered, slots: &[u32], first: usize, made: &[f32], total: &mut [f32]) {
    let n = made.len() / slots.len().max(1);
    for (&slot, made) in slots.iter().zip(made.chunks(n.max(1))) {
        add_row(&mut total[(slot as usize / g.k - first) * n..][..n], made);
    }
}

/// Puts each slot's row, finished, where the slot lies behind those of the tokens before `first`.
fn place<T: Float>(g: &Gathered, slots: &[u32], first: usize, made: &mut [f32], bias: &[f32], y: &mut [T]) {
    let n = bias.len();
    for (&slot, made) in slots.iter().zip(made.chunks_mut(n.max(1))) {
        store(g, made, bias, &mut y[(slot as usize - first * g.k) * n..][..n]);
    }
}

/// Rows with their bias, through ReLU, to y.
fn store<T: Float>(g: &Gathered, rows: &mut [f32], bias: &[f32], y: &mut [T]) {
    for (row, y) in rows.chunks_mut(bias.len().max(1)).zip(y.chunks_mut(bias.len().max(1))) {
        finish_row(row, bias, g.relu);
        simd::narrow(row, y);
    }
}

simd::multiversion! {
    fn add_row(sum: &mut [f32], row: &[f32]) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }

    fn finish_row(y: &mut [f32], bias: &[f32], relu: bool) {
        for (y, b) in y.iter_mut().zip(bias) {
            let z = *y + b;
            *y = if relu && z < 0.0 { 0.0 } else { z };
        }
    }
}

pub fn gathered_matmul(args: &Args) -> Result<()> {
    float_kernel!(args, floating)
}

/// Arguments: x, weight, bias, indices (, gates), y.
fn floating<T: Float>(args: &Args) -> Result<()> {
    let g = Gathered::new(args, 3);
    let (x, weight, mut wide) = (args.read::<T>(0), args.read::<T>(1), Vec::new());
    let bias = floats(args.read::<T>(2), &mut wide);
    let (n, d) = (g.n, g.d);
    let row = |slot: u32| &x[g.row(slot as usize) * d..][..d];
    execute(args, &g, bias, args.write::<T>(args.len() - 1), |e, columns, slots, y| {
        let w = &weight[(e * n + columns.start) * d..(e * n + columns.end) * d];
        let (m, n) = (slots.len(), columns.len());
        if m <= FEW && T::DTYPE == DType::F32 {
            return dot_tile::product(|i| bytemuck::cast_slice(row(slots[i])), m, bytemuck::cast_slice(w), n, y);
        }
        let mut rows = Vec::with_capacity(m * d);
        slots.iter().for_each(|&slot| rows.extend_from_slice(row(slot)));
        gemm(&Dense::new([m, n, d], View::rows(&rows, d), View::transposed(w, d)), y, n);
    });
    Ok(())
}

/// Arguments: x, x_scale, weight, w_scale, bias, indices (, gates), y.
pub fn gathered_matmul_int8(args: &Args) -> Result<()> {
    let g = Gathered::new(args, 5);
    let (x, x_scale) = (args.read::<i8>(0), args.read::<f32>(1));
    let (w, w_scale, bias) = (args.read::<i8>(2), args.read::<f32>(3), args.read::<f32>(4));
    let (n, d) = (g.n, g.d);
    execute(args, &g, bias, args.write::<f32>(args.len() - 1), |e, columns, slots, y| {
        let own = e * n + columns.start..e * n + columns.end;
        let product = Product {
            x,
            x_scale,
            w: Weights::Dense(&w[own.start * d..own.end * d]),
            w_scale: &w_scale[own],
            bias: None,
            relu: false,
            m: slots.len(),
            n: columns.len(),
            k: d,
        };
        product.run_alone(|i| [g.row(slots[i] as usize), i], y);
    });
    Ok(())
}
