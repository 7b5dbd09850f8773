//! Products of int8 rows with exact int32 accumulation, shared by the dense, 2:4 and expert kernels.
//!
//! Both operands have their reduction axis contiguous, so a tile of 16 dot products runs along k without packing.
//! `vpdpbusd` multiplies unsigned by signed bytes: weights get 128 added (a flip of their top bit) and 128 times the
//! sum of the activation row is taken off at the end. Many rows take packed weights instead (`int8_packed.rs`). Integer sums are
//! exact, so every path gives the same bits.

use std::ops::Range;

use super::Args;
use super::int8_packed::{self as packed, Finish, Panels};
use super::scratch::{Scratch, scratch};
use super::simd::multiversion;
use super::sparse24::expand_row;

/// Weight rows of one parallel task: with 768 columns they are 48 KB, in the second-level cache.
const STRIP: usize = 64;
/// Bytes of packed weights that many rows meet before the next: half of the second-level cache.
const NEAR: usize = 1 << 19;
/// Compressed weight rows expanded at a time: with 768 columns 12 KB, in the first-level cache.
const EXPANDED: usize = 16;
/// Activation rows kept in the first-level cache while a strip passes over them.
const ROWS: usize = 32;
/// Multiply-adds below which threads cost more than they bring: about 5 us on one core.
const WORTH_THREADS: usize = 4 << 20;

/// The sum of the bytes of each row of `k`.
pub(super) fn sums(x: &[i8], k: usize) -> Vec<i32> {
    let mut sums = vec![0; x.len() / k.max(1)];
    #[cfg(target_arch = "x86_64")]
    if vnni::available() {
        // SAFETY: the features were found.
        unsafe { vnni::sums(x, k, &mut sums) };
        return sums;
    }
    sums.iter_mut().zip(x.chunks(k.max(1))).for_each(|(sum, row)| *sum = row.iter().map(|&v| i32::from(v)).sum());
    sums
}

multiversion! {

    fn dot(x: &[i8], w: &[i8]) -> i32 {
        x.iter().zip(w).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
    }
}

/// x[i] . w[j] at i * NR + j, for MR * NR = 16 pairs of rows of one length. `sums` holds the sum of each x row.
#[inline]
fn tile<const MR: usize, const NR: usize>(x: [&[i8]; MR], w: [&[i8]; NR], sums: [i32; MR]) -> [i32; 16] {
    let k = x[0].len();
    assert!(MR * NR == 16 && x.iter().chain(&w).all(|row| row.len() == k), "rows of one length");
    #[cfg(target_arch = "x86_64")]
    if vnni::available() {
        // SAFETY: the features were found, and every row has k bytes.
        return unsafe { vnni::tile::<MR, NR>(x.map(<[i8]>::as_ptr), w.map(<[i8]>::as_ptr), k, sums) };
    }
    let _ = sums;
    std::array::from_fn(|id| dot(x[id / NR], w[id % NR]))
}

#[cfg(target_arch = "x86_64")]
pub(super) fn vnni() -> bool {
    vnni::available()
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;
    use std::sync::LazyLock;

    pub(super) fn available() -> bool {
        static FOUND: LazyLock<bool> = LazyLock::new(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
        });
        *FOUND
    }

    /// # Safety
    /// AVX-512 F, BW and VNNI are present.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn sums(x: &[i8], k: usize, sums: &mut [i32]) {
        for (row, out) in x.chunks(k.max(1)).zip(sums) {
            let mut sum = _mm512_setzero_si512();
            for part in row.chunks(64) {
                // SAFETY: the mask covers the bytes of the part.
                let bytes = unsafe { _mm512_maskz_loadu_epi8(u64::MAX >> (64 - part.len()), part.as_ptr()) };
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
            }
            *out = _mm512_reduce_add_epi32(sum);
        }
    }

    /// # Safety
    /// AVX-512 F, BW and VNNI are present; every pointer starts `k` readable bytes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn tile<const MR: usize, const NR: usize>(
        x: [*const i8; MR],
        w: [*const i8; NR],
        k: usize,
        sums: [i32; MR],
    ) -> [i32; 16] {
        let flip = _mm512_set1_epi8(-128);
        let mut acc = [_mm512_setzero_si512(); 16];
        // Plain loops: a closure handed to `map` is not compiled for this function's instruction set.
        let mut ws = [_mm512_setzero_si512(); NR];
        let whole = k / 64 * 64;
        for at in (0..whole).step_by(64) {
            for j in 0..NR {
                // SAFETY: at + 64 <= k.
                ws[j] = _mm512_xor_si512(unsafe { _mm512_loadu_si512(w[j].add(at).cast()) }, flip);
            }
            for i in 0..MR {
                // SAFETY: at + 64 <= k.
                let xs = unsafe { _mm512_loadu_si512(x[i].add(at).cast()) };
                for j in 0..NR {
                    acc[i * NR + j] = _mm512_dpbusd_epi32(acc[i * NR + j], ws[j], xs);
                }
            }
        }
        if whole < k {
            // Lanes past the end are zero in x, so whatever the flip makes of w there adds nothing.
            let mask = (1u64 << (k - whole)) - 1;
            for j in 0..NR {
                // SAFETY: the mask covers bytes whole .. k.
                ws[j] = _mm512_xor_si512(unsafe { _mm512_maskz_loadu_epi8(mask, w[j].add(whole)) }, flip);
            }
            for i in 0..MR {
                // SAFETY: as above.
                let xs = unsafe { _mm512_maskz_loadu_epi8(mask, x[i].add(whole)) };
                for j in 0..NR {
                    acc[i * NR + j] = _mm512_dpbusd_epi32(acc[i * NR + j], ws[j], xs);
                }
            }
        }
        let mut out = [0i32; 16];
        // SAFETY: `out` is 64 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum_lanes(acc)) };
        for i in 0..MR {
            for j in 0..NR {
                out[i * NR + j] -= 128 * sums[i];
            }
        }
        out
    }

    /// Lane l of the result is the sum of the lanes of `acc[l]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn sum_lanes(acc: [__m512i; 16]) -> __m512i {
        let half = |a: __m512i, b: __m512i| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let quarter =
            |a: __m512i, b: __m512i| _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        let lanes = |a: __m512i, b: __m512i| {
            _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b))
        };
        let four = |i: usize| quarter(half(acc[i], acc[i + 1]), half(acc[i + 2], acc[i + 3]));
        lanes(lanes(four(0), four(4)), lanes(four(8), four(12)))
    }
}

/// Rows of int8 weights.
#[derive(Clone, Copy)]
pub(super) enum Weights<'a> {
    Dense(&'a [i8]),
    /// As `ops/sparse24_pack.rs` packs them.
    Sparse24 {
        values: &'a [i8],
        meta: &'a [u32],
    },
}

/// y[i, j] = (x[row(i)] . w[j]) x_scale[row(i)] w_scale[j] + bias[j], for `m` rows of `k` against `n` rows of `k`.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub x: &'a [i8],
    pub x_scale: &'a [f32],
    /// Of each row of x: see [`sums`]. Not for [`Product::run`].
    pub x_sums: &'a [i32],
    pub w: Weights<'a>,
    pub w_scale: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub relu: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// Where parallel tasks write; each writes columns of its own.
struct Columns(*mut f32);
// SAFETY: tasks write disjoint columns (see `Product::strip`), and the slice outlives them.
unsafe impl Sync for Columns {}

impl Product<'_> {
    /// The whole product into `y [m, n]`; finds the sums of x itself.
    pub(super) fn run(&self, args: &Args, y: &mut [f32]) {
        let place = |i: usize| [i, i];
        assert!(y.len() >= self.m * self.n, "room for the product");
        let out = &Columns(y.as_mut_ptr());
        if let Some(panels) = self.panels(args) {
            // SAFETY: `y` has m x n elements.
            return unsafe { self.strips(args, &panels, self.n, out, &|_, _| {}) };
        }
        let x_sums = sums(self.x, self.k);
        let product = Product { x_sums: &x_sums, ..*self };
        if self.alone() {
            return product.run_alone(place, y);
        }
        let sums = product.sums(&place);
        args.ranges(self.n.div_ceil(STRIP), 1, |range| {
            for s in range {
                // SAFETY: as above.
                unsafe { product.strip(s * STRIP, &place, &sums, out) };
            }
        });
    }

    /// As [`Product::run`] where there are panels, into rows of `stride` elements of `y`, of which `done(row, values)` is
    /// given what was just stored. Whether there were.
    pub(super) fn run_strips(
        &self,
        args: &Args,
        y: &mut [f32],
        stride: usize,
        done: &(impl Fn(usize, &mut [f32]) + Sync),
    ) -> bool {
        assert!(stride >= self.n && y.len() >= self.m * stride, "room for the product");
        let Some(panels) = self.panels(args) else { return false };
        // SAFETY: `y` has m rows of `stride` elements.
        unsafe { self.strips(args, &panels, stride, &Columns(y.as_mut_ptr()), done) };
        true
    }

    /// Whether it is too small for several threads.
    fn alone(&self) -> bool {
        self.m * self.n * self.k < WORTH_THREADS
    }

    fn panels(&self, args: &Args) -> Option<Panels> {
        Panels::of(&self.x[..self.m * self.k], self.k, self.n, args)
    }

    /// # Safety
    /// `out` starts m rows of `stride` elements, at least n, which nobody else touches meanwhile.
    unsafe fn strips(
        &self,
        args: &Args,
        panels: &Panels,
        stride: usize,
        out: &Columns,
        done: &(impl Fn(usize, &mut [f32]) + Sync),
    ) {
        let tasks = if self.alone() { 1 } else { 4 * args.threads() };
        let shared = if args.threads() == 1 { self.n } else { self.n.div_ceil(tasks) };
        let strip = (NEAR / self.k).min(shared).max(STRIP).next_multiple_of(32);
        args.ranges(self.n.div_ceil(strip), if self.alone() { usize::MAX } else { 1 }, |range| {
            for s in range {
                let columns = s * strip..((s + 1) * strip).min(self.n);
                let words = self.pack(columns.clone());
                // SAFETY: rows and columns exist, and each strip is visited by one task.
                unsafe {
                    let to = |i: usize| out.0.add(i * stride + columns.start);
                    let stored = |i: usize| std::slice::from_raw_parts_mut(to(i), columns.len());
                    let finished = |rows: Range<usize>| rows.for_each(|i| done(i, stored(i)));
                    panels.product(&words, &self.finish(columns.clone()), to, finished);
                }
            }
        });
    }

    /// Row i is the product of row `place(i)[0]` of x and goes to row `place(i)[1]` of `y [.., n]`; on this thread.
    pub(super) fn run_alone(&self, place: impl Fn(usize) -> [usize; 2], y: &mut [f32]) {
        assert!((0..self.m).all(|i| (place(i)[1] + 1) * self.n <= y.len()), "room for the product");
        // SAFETY: the rows lie within `y`, which is ours.
        unsafe { self.run_among(place, y.as_mut_ptr()) };
    }

    /// As [`Product::run_alone`] into rows that lie among those of others.
    ///
    /// # Safety
    /// `y` starts rows of n elements, all that `place` names; nobody else touches these meanwhile.
    pub(super) unsafe fn run_among(&self, place: impl Fn(usize) -> [usize; 2], y: *mut f32) {
        let sums = self.sums(&place);
        let out = Columns(y);
        for first in (0..self.n).step_by(STRIP) {
            // SAFETY: as promised by the caller.
            unsafe { self.strip(first, &place, &sums, &out) };
        }
    }

    /// Sum of each row's bytes.
    fn sums(&self, place: &impl Fn(usize) -> [usize; 2]) -> Vec<i32> {
        // There are none of rows without bytes.
        (0..self.m).map(|i| self.x_sums.get(place(i)[0]).copied().unwrap_or(0)).collect()
    }

    fn x_row(&self, row: usize) -> &[i8] {
        &self.x[row * self.k..][..self.k]
    }

    /// Columns first .. first + STRIP of every row.
    ///
    /// # Safety
    /// `out` starts rows of n elements, all that `place` names; nobody else touches these columns of them meanwhile.
    unsafe fn strip(&self, first: usize, place: &impl Fn(usize) -> [usize; 2], sums: &[i32], out: &Columns) {
        let end = (first + STRIP).min(self.n);
        if packed::fits(self.m, self.k) {
            // SAFETY: as promised by the caller.
            return unsafe { self.packed(first..end, place, sums, out) };
        }
        match self.w {
            // SAFETY: as promised by the caller.
            Weights::Dense(w) => unsafe {
                self.columns(first..end, &w[first * self.k..end * self.k], place, sums, out)
            },
            Weights::Sparse24 { values, meta } => {
                let (half, words) = (self.k / 2, self.k.div_ceil(32));
                let mut dense = vec![0i8; EXPANDED * self.k];
                for first in (first..end).step_by(EXPANDED) {
                    let end = (first + EXPANDED).min(end);
                    let dense = &mut dense[..(end - first) * self.k];
                    for (j, w) in (first..).zip(dense.chunks_mut(self.k.max(1))) {
                        expand_row(&values[j * half..][..half], &meta[j * words..][..words], w);
                    }
                    // SAFETY: as promised by the caller.
                    unsafe { self.columns(first..end, dense, place, sums, out) };
                }
            }
        }
    }

    /// The given columns of every row, their weights packed.
    ///
    /// # Safety
    /// As [`Product::strip`].
    unsafe fn packed(&self, columns: Range<usize>, place: &impl Fn(usize) -> [usize; 2], sums: &[i32], out: &Columns) {
        let words = self.pack(columns.clone());
        let x = |i: usize| (place(i)[0], sums[i], self.x_row(place(i)[0]).as_ptr());
        // SAFETY: as promised by the caller.
        unsafe {
            let to = |i: usize| out.0.add(place(i)[1] * self.n + columns.start);
            packed::product(x, self.m, &words, self.k, &self.finish(columns.clone()), to);
        }
    }

    /// The weights of these columns, packed.
    fn pack(&self, columns: Range<usize>) -> Scratch<f32> {
        match self.w {
            Weights::Dense(w) => packed::pack(&w[columns.start * self.k..columns.end * self.k], self.k),
            Weights::Sparse24 { values, meta } => {
                let (half, words) = (self.k / 2, self.k.div_ceil(32));
                let mut dense = scratch::<i8>(columns.len() * self.k);
                for (j, w) in columns.zip(dense.chunks_mut(self.k.max(1))) {
                    expand_row(&values[j * half..][..half], &meta[j * words..][..words], w);
                }
                packed::pack(&dense, self.k)
            }
        }
    }

    /// What becomes of the sums of these columns.
    fn finish(&self, columns: Range<usize>) -> Finish<'_> {
        Finish {
            x_scale: self.x_scale,
            w_scale: &self.w_scale[columns.clone()],
            bias: self.bias.map(|b| &b[columns]),
            relu: self.relu,
            add: false,
        }
    }

    /// The given columns, whose weights are `w`, of every row.
    ///
    /// # Safety
    /// As [`Product::strip`].
    unsafe fn columns(
        &self,
        columns: Range<usize>,
        w: &[i8],
        place: &impl Fn(usize) -> [usize; 2],
        sums: &[i32],
        out: &Columns,
    ) {
        for block in (0..self.m).step_by(ROWS) {
            let rows = block..(block + ROWS).min(self.m);
            let columns = columns.clone();
            // SAFETY: as promised by the caller.
            unsafe {
                match rows.len() {
                    1 => self.tiles::<1, 16>(rows, columns, w, place, sums, out),
                    2 | 3 => self.tiles::<2, 8>(rows, columns, w, place, sums, out),
                    _ => self.tiles::<4, 4>(rows, columns, w, place, sums, out),
                }
            }
        }
    }

    /// # Safety
    /// As [`Product::strip`].
    unsafe fn tiles<const MR: usize, const NR: usize>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        w: &[i8],
        place: &impl Fn(usize) -> [usize; 2],
        sums: &[i32],
        out: &Columns,
    ) {
        let (last_row, last_column) = (rows.end - 1, columns.len() - 1);
        for j in (0..columns.len()).step_by(NR) {
            // Tiles that reach over an edge repeat its last row; what that makes is not stored.
            let w: [&[i8]; NR] = std::array::from_fn(|c| &w[(j + c).min(last_column) * self.k..][..self.k]);
            let column = |c: usize| columns.start + (j + c).min(last_column);
            let w_scale: [f32; NR] = std::array::from_fn(|c| self.w_scale[column(c)]);
            let bias: [f32; NR] = std::array::from_fn(|c| self.bias.map_or(0.0, |b| b[column(c)]));
            for i in rows.clone().step_by(MR) {
                let of = |r: usize| (i + r).min(last_row);
                let x: [&[i8]; MR] = std::array::from_fn(|r| self.x_row(place(of(r))[0]));
                let acc = tile::<MR, NR>(x, w, std::array::from_fn(|r| sums[of(r)]));
                for r in 0..MR.min(last_row + 1 - i) {
                    let [from, to] = place(i + r);
                    let scale = self.x_scale[from];
                    let row: [f32; NR] = std::array::from_fn(|c| {
                        let value = acc[r * NR + c] as f32 * scale * w_scale[c];
                        let value = if self.bias.is_some() { value + bias[c] } else { value };
                        // A NaN becomes 0, as in every other ReLU.
                        if !self.relu || value > 0.0 { value } else { 0.0 }
                    });
                    let stored = NR.min(last_column + 1 - j);
                    // SAFETY: the caller promised the row; j + stored columns of it exist.
                    unsafe {
                        let to = out.0.add(to * self.n + columns.start + j);
                        std::ptr::copy_nonoverlapping(row.as_ptr(), to, stored);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(row: &[i8]) -> i32 {
        sums(row, row.len())[0]
    }

    #[test]
    fn every_tile_is_exact_for_every_length() {
        let mut stream = crate::rng::Stream::new(5, 0);
        for k in [1, 3, 4, 63, 64, 65, 127, 200] {
            let mut row = |extreme: bool| -> Vec<i8> {
                (0..k).map(|_| if extreme { -128 } else { (stream.below(256) as i32 - 128) as i8 }).collect()
            };
            let rows: Vec<Vec<i8>> = (0..20).map(|i| row(i % 7 == 0)).collect();
            let exact = |i: usize, j: usize| -> i64 {
                rows[i].iter().zip(&rows[j]).map(|(&a, &b)| i64::from(a) * i64::from(b)).sum()
            };
            let wide = tile::<1, 16>([&rows[0]], std::array::from_fn(|j| &rows[j + 4][..]), [sum(&rows[0])]);
            let x = std::array::from_fn(|i| &rows[i][..]);
            let square = tile::<4, 4>(x, std::array::from_fn(|j| &rows[j + 4][..]), x.map(sum));
            for j in 0..16 {
                assert_eq!(i64::from(wide[j]), exact(0, j + 4), "k {k}");
                assert_eq!(i64::from(square[j]), exact(j / 4, j % 4 + 4), "k {k}");
            }
        }
    }
}
