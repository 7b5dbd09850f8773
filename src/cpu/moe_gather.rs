//! CPU kernels of `ops/moe_gather.rs`. A few tokens read each chosen expert where it lies; many are put together by expert, some at
//! a time, so that every expert's weights meet all of their rows while they are in the cache.

use super::dot_tile;
use super::gemm::{Product as Dense, View, gemm};
use super::int8::{Product, Weights};
use super::matmul::floats;
use super::{Args, float_kernel, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Tokens that are put together. Fixed, so that sums do not depend on the number of threads.
const TASK: usize = 64;
/// Rows of one expert up to which dot products against its weight as it lies beat packing it.
const FEW: usize = 16;
/// Multiply-adds of one parallel task where tokens are few.
const GRAIN: usize = 1 << 16;

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

    /// Extents of a token in y: rows of n each.
    fn rows_of_token(&self) -> usize {
        if self.sum { 1 } else { self.k }
    }

    /// The row of y that a slot goes to, or is added to.
    fn out(&self, slot: usize) -> usize {
        if self.sum { slot / self.k } else { slot }
    }

    /// Calls `work(expert, its slots in rising order)` over `count` tokens from `first` on.
    fn by_expert(&self, first: usize, count: usize, mut work: impl FnMut(usize, &[u32])) {
        let slots = first * self.k..(first + count) * self.k;
        let mut ends = vec![0u32; self.experts + 1];
        slots.clone().filter_map(|slot| self.expert(slot)).for_each(|e| ends[e + 1] += 1);
        for e in 0..self.experts {
            ends[e + 1] += ends[e];
        }
        let mut sorted = vec![0u32; ends[self.experts] as usize];
        for slot in slots {
            if let Some(e) = self.expert(slot) {
                sorted[ends[e] as usize] = slot as u32;
                ends[e] += 1;
            }
        }
        let mut start = 0;
        for (e, &end) in ends[..self.experts].iter().enumerate() {
            if end as usize > start {
                work(e, &sorted[start..end as usize]);
                start = end as usize;
            }
        }
    }

    /// Whether work is shared by rows of y, or by its columns, and not by tasks of tokens.
    fn few(&self) -> bool {
        self.tokens == 1 || (!self.sum && self.tokens <= 4)
    }
}

pub fn gathered_matmul(args: &Args) -> Result<()> {
    float_kernel!(args, floating)
}

/// Arguments: x, weight, bias, indices (, gates), y.
fn floating<T: Float>(args: &Args) -> Result<()> {
    let g = Gathered::new(args, 3);
    let (x, weight) = (args.read::<T>(0), args.read::<T>(1));
    let mut wide = Vec::new();
    let bias = floats(args.read::<T>(2), &mut wide);
    let y = args.write::<T>(args.len() - 1);
    let (n, d) = (g.n, g.d);
    let x_row = |slot: usize| &x[g.row(slot) * d..][..d];
    if g.few() && g.sum {
        // Columns of the one token, each the sum of its experts' dot products in the order of its choices.
        args.rows(y, 1, GRAIN.div_ceil((g.k * d).max(1)).max(16), |first, y| {
            let (mut total, mut made) = (vec![0.0f32; y.len()], vec![0.0f32; y.len()]);
            for slot in 0..g.k {
                if let Some(e) = g.expert(slot) {
                    product(x_row, &[slot as u32], &weight[(e * n + first) * d..][..y.len() * d], d, &mut made);
                    add(&mut total, &made);
                }
            }
            finish(&mut total, &bias[first..], g.relu);
            simd::narrow(&total, y);
        });
        return Ok(());
    }
    if g.few() {
        args.rows(y, n, GRAIN.div_ceil((n * d).max(1)), |first, y| {
            let mut made = vec![0.0f32; n];
            for (slot, y) in (first..).zip(y.chunks_mut(n.max(1))) {
                let Some(e) = g.expert(slot) else {
                    y.fill(T::store(0.0));
                    continue;
                };
                product(x_row, &[slot as u32], &weight[e * n * d..][..n * d], d, &mut made);
                finish(&mut made, &bias[e * n..], g.relu);
                simd::narrow(&made, y);
            }
        });
        return Ok(());
    }
    let per_token = g.rows_of_token();
    args.rows(y, per_token * n, TASK, |first, y| {
        let tokens = y.len() / (per_token * n).max(1);
        let mut total = vec![0.0f32; if g.sum { y.len() } else { 0 }];
        let mut made = Vec::new();
        y.fill(T::store(0.0));
        g.by_expert(first, tokens, |e, slots| {
            made.resize(slots.len() * n, 0.0);
            product(x_row, slots, &weight[e * n * d..][..n * d], d, &mut made);
            for (&slot, made) in slots.iter().zip(made.chunks_mut(n.max(1))) {
                let at = (g.out(slot as usize) - first * per_token) * n;
                if g.sum {
                    add(&mut total[at..][..n], made);
                } else {
                    finish(made, &bias[e * n..], g.relu);
                    simd::narrow(made, &mut y[at..][..n]);
                }
            }
        });
        if g.sum {
            for (total, y) in total.chunks_mut(n.max(1)).zip(y.chunks_mut(n.max(1))) {
                finish(total, bias, g.relu);
                simd::narrow(total, y);
            }
        }
    });
    Ok(())
}

/// The rows of x behind `slots` times rows of `w`, `d` long, into `y [slots, w.len() / d]`.
fn product<'x, T: Float>(row: impl Fn(usize) -> &'x [T], slots: &[u32], w: &[T], d: usize, y: &mut [f32]) {
    let (m, n) = (slots.len(), y.len() / slots.len().max(1));
    if m <= FEW && T::DTYPE == DType::F32 {
        return dot_tile::product(|i| bytemuck::cast_slice(row(slots[i] as usize)), m, bytemuck::cast_slice(w), n, y);
    }
    let rows: Vec<T> = slots.iter().flat_map(|&slot| row(slot as usize).iter().copied()).collect();
    gemm(&Dense::new([m, n, d], View::rows(&rows, d), View::transposed(w, d)), y, n);
}

fn add(sum: &mut [f32], row: &[f32]) {
    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
}

fn finish(y: &mut [f32], bias: &[f32], relu: bool) {
    for (y, b) in y.iter_mut().zip(bias) {
        *y += b;
        if relu && *y < 0.0 {
            *y = 0.0;
        }
    }
}

/// Arguments: x, x_scale, weight, w_scale, bias, indices (, gates), y.
pub fn gathered_matmul_int8(args: &Args) -> Result<()> {
    let g = Gathered::new(args, 5);
    let (x, x_scale) = (args.read::<i8>(0), args.read::<f32>(1));
    let (w, w_scale, bias) = (args.read::<i8>(2), args.read::<f32>(3), args.read::<f32>(4));
    let y = args.write::<f32>(args.len() - 1);
    let (n, d) = (g.n, g.d);
    // Columns from `first` on, as many as wanted, of one expert over some slots.
    let part = |e: usize, (first, columns): (usize, usize), m: usize| Product {
        x,
        x_scale,
        w: Weights::Dense(&w[(e * n + first) * d..][..columns * d]),
        w_scale: &w_scale[e * n + first..][..columns],
        bias: (!g.sum).then(|| &bias[e * n + first..][..columns]),
        relu: g.relu && !g.sum,
        add: g.sum,
        m,
        n: columns,
        k: d,
    };
    if g.few() && g.sum {
        args.rows(y, 1, (4 * GRAIN).div_ceil((g.k * d).max(1)).max(16), |first, y| {
            y.fill(0.0);
            for (slot, e) in (0..g.k).filter_map(|slot| Some((slot, g.expert(slot)?))) {
                part(e, (first, y.len()), 1).run_alone(|_| [slot, 0], y);
            }
            finish(y, &bias[first..], g.relu);
        });
        return Ok(());
    }
    let per_token = g.rows_of_token();
    // Integer sums are exact and floats are added expert by expert, so tasks may follow the threads.
    let task = g.tokens.div_ceil(args.threads()).clamp(1, 8 * TASK);
    args.rows(y, per_token * n, task, |first, y| {
        y.fill(0.0);
        g.by_expert(first, y.len() / (per_token * n).max(1), |e, slots| {
            let place = |i: usize| [g.row(slots[i] as usize), g.out(slots[i] as usize) - first * per_token];
            part(e, (0, n), slots.len()).run_alone(place, y);
        });
        if g.sum {
            y.chunks_mut(n.max(1)).for_each(|y| finish(y, bias, g.relu));
        }
    });
    Ok(())
}
