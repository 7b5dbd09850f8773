//! x Wᵀ with W compressed, on AVX-512: half of the dense product's multiply-adds, and the bits of that of
//! operands that are widened to f32.
//!
//! Lanes are weight rows. Values are turned, so that a register holds one value of each of 16 rows; every quarter of another
//! holds the same four columns of a row of x, of which `vpermilps` picks for each lane the one at its place: by the low two bits
//! of its word of meta, which is shifted on from value to value. Multiply-adds have two ports and permutations one of these and
//! a third: 3/4 of the dense rate for half of the work, whatever the number of rows.
//!
//! An element of y is one chain of multiply-adds in the order of k, begun anew where the dense product begins a block. A zero adds
//! nothing to a chain, so both give the same bits (where x is finite: what a dropped weight would meet is not read).

use std::arch::x86_64::*;
use std::ops::Range;

use super::Compressed;
use crate::Args;
use crate::attention::Shared;
use crate::dtype::Float;
use crate::gemm::{Activation, View, depth, finish, pack_b};
use crate::scratch::scratch;
use crate::simd;

/// Weight rows of a block: the lanes of a register.
const LANES: usize = 16;
/// Blocks of weight rows, and rows of x, of a tile: sixteen sums in registers.
const BLOCKS: usize = 4;
const TOKENS: usize = 4;
/// Columns whose values are turned at a time: with 64 weight rows 16 KB, in the first-level cache. Whole words of meta.
const NEAR: usize = 128;
/// Weights above which those of the next columns are asked for ahead: 2 MB of them do not stay in the second-level cache.
const FAR: usize = 1 << 20;
/// Multiply-adds below which threads cost more than they bring: about 10 us on one core.
const WORTH_THREADS: usize = 2 << 20;

/// y = x Wᵀ (+ bias) for `x [m, k]`.
pub(super) fn run<T: Float>(args: &Args, x: &[f32], m: usize, w: &Compressed<T>, y: &mut [T]) {
    assert!(
        simd::level() == simd::Level::Avx512 && x.len() == m * w.k && y.len() == m * w.n,
        "AVX-512 and these shapes"
    );
    let y = &Shared::of(y);
    let strip = LANES * BLOCKS;
    let strips = w.n.div_ceil(strip);
    args.ranges(strips, if m * w.n * w.k < WORTH_THREADS { strips } else { 1 }, |range| {
        for s in range {
            rows(x, m, w, s * strip..((s + 1) * strip).min(w.n), y);
        }
    });
}

/// The outputs of up to BLOCKS blocks of weight rows.
fn rows<T: Float>(x: &[f32], m: usize, w: &Compressed<T>, rows: Range<usize>, y: &Shared<T>) {
    let (k, words) = (w.k, w.k.div_ceil(32));
    let blocks = rows.len().div_ceil(LANES);
    let width = blocks * LANES;
    let (mut values, mut meta) = (scratch::<f32>(width * NEAR / 2), scratch::<f32>(width * NEAR / 32));
    let own = (rows.start, rows.len());
    let dense = depth(k);
    // All sums, and those of the blocks after the first, which are added when they are whole.
    let (mut total, mut chain) = (scratch::<f32>(m * width), scratch::<f32>(if k > dense { m * width } else { 0 }));
    if k == 0 {
        total.fill(0.0);
    }
    for block in (0..k).step_by(dense) {
        let end = (block + dense).min(k);
        let sums = if block == 0 { &mut total } else { &mut chain };
        for column in (block..end).step_by(NEAR) {
            let columns = NEAR.min(end - column);
            pack_b(
                View::transposed(w.values, k / 2),
                own,
                (column / 2, columns / 2),
                LANES,
                &mut values[..width * columns / 2],
            );
            let near = columns.div_ceil(32);
            let places = View::transposed(bytemuck::cast_slice(w.meta), words);
            pack_b::<f32>(places, own, (column / 32, near), LANES, &mut meta[..width * near]);
            if w.n * k >= FAR {
                let next = column + columns;
                if next < k { w.prefetch(rows.clone(), next) } else { w.prefetch(rows.end..rows.end + rows.len(), 0) }
            }
            for (i, sums) in sums.chunks_mut(TOKENS * width).enumerate() {
                let part = Part {
                    x: &x[i * TOKENS * k + column..],
                    k,
                    columns,
                    values: &values[..width * columns / 2],
                    meta: &meta[..width * near],
                    fresh: column == block,
                };
                part.multiply(sums, blocks);
            }
        }
        if block > 0 {
            add(&mut total, &chain);
        }
    }
    let bias = w.bias.map(|b| &b[rows.clone()]);
    for (i, sums) in total.chunks_exact_mut(width).enumerate() {
        let sums = &mut sums[..rows.len()];
        finish(sums, bias, Activation::None);
        // SAFETY: these columns of y are this task's.
        simd::narrow(sums, unsafe { y.slice(i * w.n + rows.start, rows.len()) });
    }
}

impl<T> Compressed<'_, T> {
    /// Asks for the values and places of NEAR columns: rows are far apart, which the processor does not foresee.
    fn prefetch(&self, rows: Range<usize>, column: usize) {
        for j in rows.start..rows.end.min(self.n) {
            let values = self.values(j)[column / 2..].chunks(64 / size_of::<T>()).take(NEAR / 2 * size_of::<T>() / 64);
            for line in values.map(|line| line.as_ptr().cast()).chain([self.meta(j)[column / 32..].as_ptr().cast()]) {
                // SAFETY: a prefetch reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
            }
        }
    }
}

simd::multiversion! {
    fn add(total: &mut [f32], chain: &[f32]) {
        total.iter_mut().zip(chain).for_each(|(total, chain)| *total += chain);
    }
}

/// Some columns of some rows of x, from the first of them on, and turned weights.
struct Part<'a> {
    x: &'a [f32],
    /// From row to row of x.
    k: usize,
    columns: usize,
    values: &'a [f32],
    meta: &'a [f32],
    /// The products become the sums; else they are added.
    fresh: bool,
}

impl Part<'_> {
    fn multiply(&self, sums: &mut [f32], blocks: usize) {
        macro_rules! tile {
            ($($tokens:literal $blocks:literal)*) => {
                match (sums.len() / (blocks * LANES), blocks) {
                    // SAFETY: `run` found AVX-512.
                    $(($tokens, $blocks) => unsafe { self.tile::<$tokens, $blocks>(sums) },)*
                    _ => unreachable!("at most {TOKENS} rows and {BLOCKS} blocks"),
                }
            };
        }
        tile!(1 1  1 2  1 3  1 4  2 1  2 2  2 3  2 4  3 1  3 2  3 3  3 4  4 1  4 2  4 3  4 4);
    }

    /// # Safety
    /// AVX-512 F is present.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn tile<const M: usize, const B: usize>(&self, sums: &mut [f32]) {
        let (groups, block) = (self.columns / 4, self.columns / 2 * LANES);
        let words = self.columns.div_ceil(32);
        assert!(
            self.x.len() >= (M - 1) * self.k + self.columns && sums.len() == M * B * LANES,
            "rows of x and their sums"
        );
        assert!(self.values.len() == B * block && self.meta.len() == B * words * LANES, "whole blocks of weights");
        let mut acc = [[_mm512_setzero_ps(); B]; M];
        // SAFETY: everything read and written lies within what was asserted.
        unsafe {
            if !self.fresh {
                for t in 0..M {
                    for b in 0..B {
                        acc[t][b] = _mm512_loadu_ps(sums.as_ptr().add((t * B + b) * LANES));
                    }
                }
            }
            for word in 0..words {
                let mut places = [_mm512_setzero_si512(); B];
                for b in 0..B {
                    places[b] = _mm512_loadu_si512(self.meta.as_ptr().add((b * words + word) * LANES).cast());
                }
                for group in 8 * word..(8 * word + 8).min(groups) {
                    let (mut values, mut second) = ([[_mm512_setzero_ps(); 2]; B], [_mm512_setzero_si512(); B]);
                    for b in 0..B {
                        let at = self.values.as_ptr().add(b * block + 2 * group * LANES);
                        values[b] = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(LANES))];
                        second[b] = _mm512_srli_epi32::<2>(places[b]);
                    }
                    for t in 0..M {
                        let x = _mm512_broadcast_f32x4(_mm_loadu_ps(self.x.as_ptr().add(t * self.k + 4 * group)));
                        for b in 0..B {
                            let picked = _mm512_permutevar_ps(x, places[b]);
                            acc[t][b] = _mm512_fmadd_ps(values[b][0], picked, acc[t][b]);
                        }
                        for b in 0..B {
                            let picked = _mm512_permutevar_ps(x, second[b]);
                            acc[t][b] = _mm512_fmadd_ps(values[b][1], picked, acc[t][b]);
                        }
                    }
                    for b in 0..B {
                        places[b] = _mm512_srli_epi32::<4>(places[b]);
                    }
                }
            }
            for t in 0..M {
                for b in 0..B {
                    _mm512_storeu_ps(sums.as_mut_ptr().add((t * B + b) * LANES), acc[t][b]);
                }
            }
        }
    }
}
