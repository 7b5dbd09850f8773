//! CPU kernels of `ops/moe_gather.rs`. The first product goes expert by expert, each of whose weights meets all of its rows while it
//! is in the cache. The second goes by columns: the sums of some tokens stay in the cache while every expert adds to them.

mod panel;

use std::cell::Cell;
use std::ops::Range;

use super::int8::{self, Product, Weights};
use super::int8_packed::{self as packed, Finish};
use super::matmul::floats;
use super::{Args, dot_tile, float_kernel, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Rows of one expert in one task, about: an expert's rows are cut evenly, so that no few of them need its weights packed anew.
const ROWS: usize = 128;
/// Tokens whose sums are made together.
const TOKENS: usize = 256;
/// Most of these sums at a time: 64 KB, in the second-level cache.
const SUMS: usize = 1 << 14;
/// Multiply-adds of one parallel task.
const GRAIN: usize = 1 << 17;
/// Rows of an expert (on average) up to which a token's sums over its experts, which take weights as they lie, beat packing them.
const FEW: usize = 12;

/// Longest rows that packing can beat taking weights as they lie, and elements of a row for which an expert must have one.
const LONG: usize = 1024;
const SHORT: usize = 24;

thread_local! {
    /// Rows of sums. Taken while in use.
    static MADE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

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

    /// The slots of each [`TOKENS`] tokens, by expert.
    fn blocks(&self) -> Vec<Sorted> {
        (0..self.tokens).step_by(TOKENS).map(|first| self.sorted(first, (self.tokens - first).min(TOKENS))).collect()
    }

    /// The slots of `count` tokens from `first` on, by expert.
    fn sorted(&self, first: usize, count: usize) -> Sorted {
        let slots = first * self.k..(first + count) * self.k;
        let mut ends = vec![0; self.experts + 1];
        slots.clone().filter_map(|slot| self.expert(slot)).for_each(|e| ends[e + 1] += 1);
        for e in 0..self.experts {
            ends[e + 1] += ends[e];
        }
        let mut sorted = vec![Slot::default(); ends[self.experts]];
        for (token, own) in (first..).zip(slots.step_by(self.k)) {
            for at in own..own + self.k {
                if let Some(e) = self.expert(at) {
                    sorted[ends[e]] = Slot { token: token as u32, at: at as u32 };
                    ends[e] += 1;
                }
            }
        }
        Sorted { slots: sorted, ends }
    }
}

/// A token's place for one of its experts.
#[derive(Clone, Copy, Default)]
struct Slot {
    token: u32,
    at: u32,
}

impl Slot {
    fn token(self) -> usize {
        self.token as usize
    }

    fn at(self) -> usize {
        self.at as usize
    }
}

/// Slots by expert, in rising order within each; ends[e] is where those of e end.
struct Sorted {
    slots: Vec<Slot>,
    ends: Vec<usize>,
}

impl Sorted {
    /// Experts that have slots, and these.
    fn experts(&self) -> impl Iterator<Item = (usize, &[Slot])> {
        let start = |e: usize| if e == 0 { 0 } else { self.ends[e - 1] };
        let all = (0..self.ends.len() - 1).map(move |e| (e, &self.slots[start(e)..self.ends[e]]));
        all.filter(|(_, slots)| !slots.is_empty())
    }
}

/// Where parallel tasks write: rows or columns of their own.
#[derive(Clone, Copy)]
struct Target<T>(*mut T);
// SAFETY: tasks write disjoint parts (see `each` and `sums`), and the slice outlives them.
unsafe impl<T: Send> Sync for Target<T> {}

impl<T> Target<T> {
    /// # Safety
    /// The elements lie within the slice, and nobody else touches them meanwhile.
    #[expect(clippy::mut_from_ref, reason = "every task takes other elements")]
    unsafe fn part(&self, start: usize, length: usize) -> &mut [T] {
        // SAFETY: as promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), length) }
    }
}

/// Some rows of one expert.
struct Part<'a> {
    expert: usize,
    slots: &'a [Slot],
    /// Whose rows are made next.
    next: usize,
}

/// The first product: `work(part, y)` makes the rows of the part's slots, which are its alone.
fn each<T: Float>(args: &Args, g: &Gathered, y: &mut [T], work: impl Fn(Part, &Target<T>) + Sync + Send) {
    let sorted = g.sorted(0, g.tokens);
    assert!(y.len() >= g.tokens * g.k * g.n, "a row for each slot");
    if sorted.slots.len() < g.tokens * g.k {
        y.fill(T::store(0.0));
    }
    let cut = |count: usize| count.div_ceil(((count + ROWS / 2) / ROWS).max(1));
    let parts: Vec<(usize, &[Slot])> =
        sorted.experts().flat_map(|(e, slots)| slots.chunks(cut(slots.len())).map(move |part| (e, part))).collect();
    let work_of_part = sorted.slots.len() / parts.len().max(1) * g.n * g.d;
    let target = &Target(y.as_mut_ptr());
    args.ranges(parts.len(), GRAIN / work_of_part.max(1), |range| {
        for at in range {
            let (expert, slots) = parts[at];
            work(Part { expert, slots, next: parts.get(at + 1).map_or(expert, |(next, _)| *next) }, target);
        }
    });
}

/// The second product: `work(block, tokens, columns, sums)` adds to `sums [tokens, columns]`, which start at zero. A sum's terms come
/// in the same order whatever the columns and tokens that are made together.
fn sums<T: Float>(
    args: &Args,
    g: &Gathered,
    bias: &[f32],
    y: &mut [T],
    work: impl Fn(usize, Range<usize>, Range<usize>, &mut [f32]) + Sync + Send,
) {
    let (n, tokens) = (g.n, g.tokens.min(TOKENS));
    assert!(y.len() >= g.tokens * n, "a row for each token");
    let most = if args.threads() == 1 { n } else { GRAIN.div_ceil((tokens * g.k * g.d).max(1)) };
    let width = most.min(SUMS / tokens.max(1)).next_multiple_of(panel::COLUMNS).clamp(1, n.max(1));
    let strips = n.div_ceil(width);
    let target = &Target(y.as_mut_ptr());
    args.ranges(g.tokens.div_ceil(TOKENS) * strips, 1, |tasks| {
        let mut made = MADE.take();
        for task in tasks {
            let (block, strip) = (task / strips, task % strips);
            let tokens = block * TOKENS..((block + 1) * TOKENS).min(g.tokens);
            let columns = strip * width..((strip + 1) * width).min(n);
            made.clear();
            made.resize(tokens.len() * columns.len(), 0.0);
            work(block, tokens.clone(), columns.clone(), &mut made);
            for (token, row) in tokens.zip(made.chunks_mut(columns.len().max(1))) {
                // SAFETY: one task makes these columns of this token.
                let y = unsafe { target.part(token * n + columns.start, columns.len()) };
                finish(row, 1, &bias[columns.clone()], g.relu);
                simd::narrow(row, y);
            }
        }
        MADE.set(made);
    });
}

simd::multiversion! {
    /// Each of the rows plus the bias, through ReLU.
    fn finish(rows: &mut [f32], count: usize, bias: &[f32], relu: bool) {
        let n = rows.len() / count.max(1);
        for row in rows.chunks_exact_mut(n.max(1)) {
            for (x, b) in row.iter_mut().zip(bias) {
                let z = *x + b;
                *x = if relu && z < 0.0 { 0.0 } else { z };
            }
        }
    }

    fn add_row(sum: &mut [f32], row: &[f32]) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
}

pub fn gathered_matmul(args: &Args) -> Result<()> {
    float_kernel!(args, floating)
}

/// Arguments: x, weight, bias, indices (, gates), y.
fn floating<T: Float>(args: &Args) -> Result<()> {
    let g = Gathered::new(args, 3);
    let (mut wide, mut wide_bias) = (Vec::new(), Vec::new());
    let (x, weight) = (floats(args.read::<T>(0), &mut wide), args.read::<T>(1));
    let bias = floats(args.read::<T>(2), &mut wide_bias);
    let (n, d, y) = (g.n, g.d, args.write::<T>(args.len() - 1));
    let row = |at: usize| &x[at * d..][..d];
    let as_it_lies = T::DTYPE == DType::F32;
    if !g.sum {
        let weights = |e: usize| &weight[e * n * d..][..n * d];
        each(args, &g, y, |Part { expert: e, slots, next }, y| {
            let (w, mut made) = (weights(e), MADE.take());
            let row = |i: usize| row(slots[i].token());
            made.clear();
            made.resize(slots.len() * n, 0.0);
            if as_it_lies && (d > LONG || slots.len() <= d / SHORT) {
                dot_tile::product(row, slots.len(), bytemuck::cast_slice(w), n, &mut made);
            } else {
                let ahead = if next == e { &[] } else { weights(next) };
                panel::add(row, slots.len(), w, d, &mut made, |i| i * n, ahead);
            }
            finish(&mut made, slots.len(), &bias[e * n..][..n], g.relu);
            for (slot, row) in slots.iter().zip(made.chunks(n.max(1))) {
                // SAFETY: this slot is this task's alone.
                simd::narrow(row, unsafe { y.part(slot.at() * n, n) });
            }
            MADE.set(made);
        });
    } else if as_it_lies && g.tokens * g.k <= FEW * g.experts {
        let weight: &[f32] = bytemuck::cast_slice(weight);
        let part = |at: usize| Some((row(at), &weight[g.expert(at)? * n * d..][..n * d]));
        let parts: Vec<Vec<_>> = (0..g.tokens).map(|t| (t * g.k..(t + 1) * g.k).filter_map(part).collect()).collect();
        sums(args, &g, bias, y, |_, tokens, columns, sums| {
            for start in columns.clone().step_by(16) {
                let width = (columns.end - start).min(16);
                for (parts, sums) in parts[tokens.clone()].iter().zip(sums.chunks_mut(columns.len())) {
                    let made = dot_tile::sum(parts, start, width);
                    sums[start - columns.start..][..width].copy_from_slice(&made[..width]);
                }
            }
        });
    } else {
        let sorted = g.blocks();
        sums(args, &g, bias, y, |block, tokens, columns, sums| {
            for (e, slots) in sorted[block].experts() {
                let w = &weight[(e * n + columns.start) * d..(e * n + columns.end) * d];
                let at = |i: usize| (slots[i].token() - tokens.start) * columns.len();
                panel::add(|i| row(slots[i].at()), slots.len(), w, d, sums, at, &[]);
            }
        });
    }
    Ok(())
}

/// Arguments: x, x_scale, weight, w_scale, bias, indices (, gates), y.
pub fn gathered_matmul_int8(args: &Args) -> Result<()> {
    let g = Gathered::new(args, 5);
    let (x, x_scale) = (args.read::<i8>(0), args.read::<f32>(1));
    let (w, w_scale, bias) = (args.read::<i8>(2), args.read::<f32>(3), args.read::<f32>(4));
    let (n, d, y) = (g.n, g.d, args.write::<f32>(args.len() - 1));
    let x_sums = int8::sums(x, d);
    let product = |own: Range<usize>, rows: usize| Product {
        x,
        x_scale,
        x_sums: &x_sums,
        w: Weights::Dense(&w[own.start * d..own.end * d]),
        w_scale: &w_scale[own.clone()],
        bias: None,
        relu: g.relu,
        m: rows,
        n: own.len(),
        k: d,
    };
    if !g.sum {
        each(args, &g, y, |Part { expert: e, slots, .. }, y| {
            let own = e * n..(e + 1) * n;
            let product = Product { bias: Some(&bias[own.clone()]), ..product(own, slots.len()) };
            let place = |i: usize| [slots[i].token(), slots[i].at()];
            // SAFETY: `y` has a row for each slot, and these are this task's alone.
            unsafe { product.run_among(place, y.0) };
        });
        return Ok(());
    }
    let (sorted, packs) = (g.blocks(), packed::fits(usize::MAX, d));
    sums(args, &g, bias, y, |block, tokens, columns, sums| {
        let (width, mut made) = (columns.len(), Vec::new());
        for (e, slots) in sorted[block].experts() {
            let own = e * n + columns.start..e * n + columns.end;
            let at = |i: usize| (slots[i].token() - tokens.start) * width;
            if !packs {
                made.resize(slots.len() * width, 0.0);
                let product = Product { relu: false, ..product(own, slots.len()) };
                product.run_alone(|i| [slots[i].at(), i], &mut made);
                made.chunks(width).enumerate().for_each(|(i, row)| add_row(&mut sums[at(i)..][..width], row));
                continue;
            }
            let words = packed::pack(&w[own.start * d..own.end * d], d);
            let finish = Finish { x_scale, w_scale: &w_scale[own], bias: None, relu: false, add: true };
            let row = |i: usize| (slots[i].at(), x_sums[slots[i].at()], x[slots[i].at() * d..][..d].as_ptr());
            let base = Target(sums.as_mut_ptr());
            // SAFETY: rows of x were cut to d bytes, and `sums` has a row of these columns for each of the tokens.
            unsafe { packed::product(row, slots.len(), &words, d, &finish, |i| base.0.add(at(i))) };
        }
    });
    Ok(())
}
