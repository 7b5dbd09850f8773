//! Rows that lie anywhere times a panel of packed weights, added to rows that lie anywhere: what an expert does to its tokens.

use std::cell::Cell;

use crate::dtype::Float;
use crate::gemm::{View, pack_b};
use crate::simd;

/// Columns of a panel.
pub(super) const COLUMNS: usize = 32;
/// Most rows of a tile: 16 sums, two registers of the panel and one of x.
const TILE: usize = 8;
/// Longest panel: with 32 columns 32 KB, in the first-level cache.
const LONGEST: usize = 256;

thread_local! {
    /// Taken while in use.
    static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// y[at(i) + j] += x(i) . w[j] for `rows` rows x and the rows of `w`, `k` elements each. Rows of y may be the same: they are added to
/// in turn. Meanwhile `ahead`, the weights of a call to come, is brought near, so that its packing waits for no memory.
pub(super) fn add<'x, T: Float>(
    x: impl Fn(usize) -> &'x [f32],
    rows: usize,
    w: &[T],
    k: usize,
    y: &mut [f32],
    at: impl Fn(usize) -> usize,
    ahead: &[T],
) {
    let columns = w.len() / k.max(1);
    let mut panel = PANEL.take();
    let tiles = rows.div_ceil(TILE) * columns.div_ceil(COLUMNS) * k.div_ceil(LONGEST);
    let mut lines = ahead.chunks(64 / size_of::<T>());
    let each = lines.len().div_ceil(tiles.max(1));
    for first in (0..columns).step_by(COLUMNS) {
        let width = (columns - first).min(COLUMNS);
        for k0 in (0..k).step_by(LONGEST) {
            let depth = (k - k0).min(LONGEST);
            panel.resize(panel.len().max(depth * COLUMNS), 0.0);
            pack_b(View::transposed(w, k), (first, width), (k0, depth), COLUMNS, &mut panel[..depth * COLUMNS]);
            let part = |i: usize| &x(i)[k0..k0 + depth];
            // Rows that lie anywhere are of the tile after the next one; the next panel has them near.
            let near = |i: usize| {
                lines.by_ref().take(each).for_each(|line| simd::prefetch(line.as_ptr()));
                let to_come = if first == 0 { (i + TILE).min(rows)..(i + 2 * TILE).min(rows) } else { 0..0 };
                to_come.for_each(|i| part(i).chunks(16).for_each(|line| simd::prefetch(line.as_ptr())));
            };
            multiply(part, rows, &panel[..depth * COLUMNS], width, y, |i| at(i) + first, near);
        }
    }
    PANEL.set(panel);
}

/// Calls `done(i)` where a tile of rows ends before row i.
fn multiply<'x>(
    x: impl Fn(usize) -> &'x [f32],
    rows: usize,
    panel: &[f32],
    width: usize,
    y: &mut [f32],
    at: impl Fn(usize) -> usize,
    mut done: impl FnMut(usize),
) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        // Evenly: a tile of one or two rows takes as long as one of four.
        let mut tiles = rows.div_ceil(TILE);
        let mut i = 0;
        while i < rows {
            let count = (rows - i).div_ceil(tiles);
            macro_rules! tile {
                ($($rows:literal)*) => {
                    match count {
                        $($rows => {
                            let of: [&[f32]; $rows] = std::array::from_fn(|r| x(i + r));
                            // SAFETY: the features were found, and `tile` checks every extent.
                            unsafe { avx512::tile(of, panel, width, y, std::array::from_fn(|r| at(i + r))) }
                        })*
                        _ => unreachable!("tiles of at most eight rows"),
                    }
                };
            }
            tile!(1 2 3 4 5 6 7 8);
            (i, tiles) = (i + count, tiles - 1);
            done(i);
        }
        return;
    }
    for i in 0..rows {
        portable(x(i), panel, &mut y[at(i)..][..width]);
        if (i + 1).is_multiple_of(TILE) {
            done(i + 1);
        }
    }
}

simd::multiversion! {
    fn portable(x: &[f32], panel: &[f32], y: &mut [f32]) {
        let mut sums = [0.0f32; COLUMNS];
        for (x, w) in x.iter().zip(panel.as_chunks::<COLUMNS>().0) {
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum += x * w;
            }
        }
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::COLUMNS;

    /// R rows.
    ///
    /// # Safety
    /// AVX-512 F is present.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) unsafe fn tile<const R: usize>(
        x: [&[f32]; R],
        panel: &[f32],
        width: usize,
        y: &mut [f32],
        at: [usize; R],
    ) {
        let k = panel.len() / COLUMNS;
        assert!(width <= COLUMNS && x.iter().all(|x| x.len() == k), "rows of the panel's depth");
        assert!(at.iter().all(|at| at + width <= y.len()), "room for every row");
        let (x, mut w) = (x.map(<[f32]>::as_ptr), panel.as_ptr());
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for p in 0..k {
            // SAFETY: the panel has k groups of 32 values, each row k.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(w), _mm512_loadu_ps(w.add(16)));
                for (sum, x) in sums.iter_mut().zip(x) {
                    let value = _mm512_set1_ps(*x.add(p));
                    sum[0] = _mm512_fmadd_ps(value, low, sum[0]);
                    sum[1] = _mm512_fmadd_ps(value, high, sum[1]);
                }
                w = w.add(COLUMNS);
            }
        }
        let mask = |from: usize| (u32::MAX >> (COLUMNS - width) >> from) as __mmask16;
        for (sum, at) in sums.iter().zip(at) {
            for (v, &sum) in sum.iter().enumerate() {
                // SAFETY: masked to `width` columns from `at`, which exist.
                unsafe {
                    let y = y.as_mut_ptr().wrapping_add(at + 16 * v);
                    _mm512_mask_storeu_ps(y, mask(16 * v), _mm512_add_ps(_mm512_maskz_loadu_ps(mask(16 * v), y), sum));
                }
            }
        }
    }
}
