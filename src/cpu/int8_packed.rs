//! Products of int8 rows with packed weights: words of four bytes along k, sixteen columns side by side. A word of x meets
//! sixteen columns at once, so nothing is summed across lanes at the end: what short rows of experts (32 neurons) spend most of
//! their time on otherwise. Packing pays from a few rows on. Many rows against many columns are packed too, in panels of up to
//! fourteen: 28 sums in registers then take 16 loads for 28 multiply-adds, as in `gemm/tile.rs`.

use std::ops::Range;

use super::Args;
use super::gemm::{View, pack_a};
use super::scratch::{Scratch, scratch};

/// Rows from which packing the weights costs less than it saves.
const WORTH: usize = 3;
/// Columns of a block.
const COLUMNS: usize = 16;
/// Most rows of a panel of x, and the rows and columns from which packing x pays.
const ROWS: usize = 14;
const MANY_ROWS: usize = 16;
const MANY_COLUMNS: usize = 128;
/// Bytes of x that are worth a parallel task.
const SHARE: usize = 1 << 18;

/// What becomes of the sums.
pub(super) struct Finish<'a> {
    pub x_scale: &'a [f32],
    pub w_scale: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub relu: bool,
    /// Rows are added to what is there, without bias and ReLU.
    pub add: bool,
}

/// Whether `rows` rows of `k` bytes should take this path on this processor.
pub(super) fn fits(rows: usize, k: usize) -> bool {
    rows >= WORTH && k > 0 && k.is_multiple_of(4) && available()
}

#[cfg(target_arch = "x86_64")]
fn available() -> bool {
    super::int8::vnni() && super::simd::level() == super::simd::Level::Avx512
}

#[cfg(not(target_arch = "x86_64"))]
fn available() -> bool {
    false
}

/// Rows of `k` bytes, a whole number of words, as blocks of [`COLUMNS`] columns; rows past the last are zeros. `vpdpbusd` multiplies
/// unsigned by signed bytes: weights get 128 added here, and 128 times the sum of a row of x is taken off its products.
#[cfg(target_arch = "x86_64")]
pub(super) fn pack(w: &[i8], k: usize) -> Scratch<f32> {
    let block = k / 4 * COLUMNS;
    let mut packed = scratch::<f32>((w.len() / k.max(1)).div_ceil(COLUMNS) * block);
    for (rows, block) in w.chunks(COLUMNS * k.max(1)).zip(packed.chunks_mut(block.max(1))) {
        // SAFETY: `fits` found the instructions; there are up to COLUMNS whole rows, and room for their words.
        unsafe { avx512::turn(rows, k, block) };
    }
    packed
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn pack(_: &[i8], _: usize) -> Scratch<f32> {
    scratch(0)
}

/// y[out(i) + j] = finish(x(i) . column j) for `rows` rows of `k` bytes and the columns of `finish.w_scale`. `x(i)` is the row's
/// place in the scales, the sum of its bytes and where it starts.
///
/// # Safety
/// For every row, `x(i)` starts k bytes and `out(i)` as many elements as there are columns, which nobody else touches meanwhile and
/// which are initialized where they are added to.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn product(
    x: impl Fn(usize) -> (usize, i32, *const i8),
    rows: usize,
    packed: &[f32],
    k: usize,
    finish: &Finish,
    out: impl Fn(usize) -> *mut f32,
) {
    let mut first = 0;
    while first < rows {
        // As many rows as there are registers for, then fewer: every tile is whole.
        // SAFETY: as promised by the caller.
        first += unsafe {
            match rows - first {
                1 => group::<1, false>(&x, first, packed, k, finish, &out),
                2 | 3 => group::<2, false>(&x, first, packed, k, finish, &out),
                4..8 => group::<4, false>(&x, first, packed, k, finish, &out),
                _ => group::<8, false>(&x, first, packed, k, finish, &out),
            }
        };
    }
}

/// MR rows from `first` on against all columns; gives MR. `PANEL`: they are a panel, which starts at the first one's place.
///
/// # Safety
/// As [`product`].
#[cfg(target_arch = "x86_64")]
unsafe fn group<const MR: usize, const PANEL: bool>(
    x: &impl Fn(usize) -> (usize, i32, *const i8),
    first: usize,
    packed: &[f32],
    k: usize,
    finish: &Finish,
    out: &impl Fn(usize) -> *mut f32,
) -> usize {
    let (columns, words) = (finish.w_scale.len(), k / 4);
    assert!(available() && packed.len() >= columns.div_ceil(COLUMNS) * words * COLUMNS, "packed columns");
    let x: [_; MR] = std::array::from_fn(|r| x(first + r));
    let mut part = avx512::Part::<MR> {
        x: x.map(|(.., row)| row),
        scales: x.map(|(at, ..)| finish.x_scale[at]),
        sums: x.map(|(_, sum, _)| sum),
        out: std::array::from_fn(|r| out(first + r)),
        first: 0,
    };
    for j in (0..columns).step_by(2 * COLUMNS) {
        let w = &packed[j / COLUMNS * words * COLUMNS..];
        part.first = j;
        // SAFETY: rows hold k bytes, w the blocks of these columns, and `out` is as promised by the caller.
        unsafe {
            match j + COLUMNS < columns {
                true => avx512::tile::<MR, 2, PANEL>(&part, w, words, finish),
                false => avx512::tile::<MR, 1, PANEL>(&part, w, words, finish),
            }
        }
    }
    MR
}

/// # Safety
/// Nothing is asked for: it does nothing, and `fits` says so.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn product(
    _: impl Fn(usize) -> (usize, i32, *const i8),
    _: usize,
    _: &[f32],
    _: usize,
    _: &Finish,
    _: impl Fn(usize) -> *mut f32,
) {
}

/// Rows of x in panels, with the sums of their bytes.
pub(super) struct Panels {
    words: Scratch<f32>,
    sums: Scratch<i32>,
    /// Rows of every panel but the last.
    rows: usize,
    k: usize,
}

impl Panels {
    /// `None` where packing rows of `k` bytes for `columns` columns does not pay, or not on this processor.
    pub(super) fn of(x: &[i8], k: usize, columns: usize, args: &Args) -> Option<Self> {
        let m = x.len() / k.max(1);
        let x: &[f32] = bytemuck::try_cast_slice(x).ok()?;
        if !fits(m, k) || m < MANY_ROWS || columns < MANY_COLUMNS {
            return None;
        }
        let rows = m.div_ceil(m.div_ceil(ROWS));
        let (mut words, mut sums) = (scratch::<f32>(x.len()), scratch::<i32>(m));
        let grain = rows * SHARE.div_ceil(rows * k);
        args.rows2((&mut words, &mut sums), (k / 4, 1), grain, |first, words, sums| {
            for i in (0..sums.len()).step_by(rows) {
                let count = rows.min(sums.len() - i);
                let panel = &mut words[i * k / 4..(i + count) * k / 4];
                pack_a(View::rows(x, k / 4), (first + i, count), (0, k / 4), 1, panel);
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `fits` found the instructions.
                unsafe {
                    avx512::sums(panel, &mut sums[i..i + count]);
                }
            }
        });
        Some(Self { words, sums, rows, k })
    }

    /// As [`product`], of all rows; `done` is told which rows were just stored.
    ///
    /// # Safety
    /// As [`product`].
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn product(
        &self,
        packed: &[f32],
        finish: &Finish,
        out: impl Fn(usize) -> *mut f32,
        done: impl Fn(Range<usize>),
    ) {
        let m = self.sums.len();
        for first in (0..m).step_by(self.rows) {
            let start = self.words[first * self.k / 4..].as_ptr();
            let x = |i: usize| (i, self.sums[i], start.wrapping_add(i - first).cast());
            macro_rules! panel {
                ($($rows:literal)*) => {
                    match self.rows.min(m - first) {
                        // SAFETY: as promised by the caller; the panel has this many rows.
                        $($rows => unsafe { group::<$rows, true>(&x, first, packed, self.k, finish, &out) },)*
                        _ => unreachable!("at most {ROWS} rows"),
                    }
                };
            }
            panel!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            done(first..(first + self.rows).min(m));
        }
    }

    /// # Safety
    /// Nothing is asked for: there are no panels.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) unsafe fn product(
        &self,
        _: &[f32],
        _: &Finish,
        _: impl Fn(usize) -> *mut f32,
        _: impl Fn(Range<usize>),
    ) {
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, Finish};
    use crate::simd;

    /// Rows against the columns from `first` on.
    pub(super) struct Part<const MR: usize> {
        pub x: [*const i8; MR],
        pub scales: [f32; MR],
        pub sums: [i32; MR],
        pub out: [*mut f32; MR],
        pub first: usize,
    }

    /// The sum of the bytes of each row of a panel: a row is a lane.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI are present.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn sums(panel: &[f32], sums: &mut [i32]) {
        let rows = sums.len();
        assert!((1..=COLUMNS).contains(&rows), "lanes of a register");
        let mask = u16::MAX >> (COLUMNS - rows);
        // Four, so that none waits for the one before.
        let mut parts = [_mm512_setzero_si512(); 4];
        for groups in panel.chunks(4 * rows) {
            for (part, group) in parts.iter_mut().zip(groups.chunks_exact(rows)) {
                // SAFETY: the mask covers the group.
                let bytes = unsafe { _mm512_maskz_loadu_epi32(mask, group.as_ptr().cast()) };
                *part = _mm512_dpbusd_epi32(*part, _mm512_set1_epi8(1), bytes);
            }
        }
        let [a, b, c, d] = parts;
        let sum = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
        // SAFETY: the mask covers the sums.
        unsafe { _mm512_mask_storeu_epi32(sums.as_mut_ptr(), mask, sum) };
    }

    /// One block, eight words at a time, 128 added to every byte.
    ///
    /// # Safety
    /// AVX-512 F, BW and VL are present; `rows` are up to sixteen rows of `k` bytes, a whole number of words.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn turn(rows: &[i8], k: usize, out: &mut [f32]) {
        let (count, words) = (rows.len() / k, k / 4);
        assert!(count <= COLUMNS && out.len() >= words * COLUMNS, "one block");
        for first in (0..words).step_by(8) {
            if first % 16 == 0 {
                // The next block, whose rows are as many streams as the processor does not foresee.
                let ahead = rows.as_ptr().wrapping_add(COLUMNS * k + 4 * first);
                (0..COLUMNS).for_each(|row| simd::prefetch(ahead.wrapping_add(row * k)));
            }
            let left = (words - first).min(8);
            let mask = u8::MAX >> (8 - left);
            let half = |row: usize| match row < count {
                // SAFETY: the mask covers words of this row.
                true => unsafe { _mm256_maskz_loadu_epi32(mask, rows.as_ptr().add(row * k + 4 * first).cast()) },
                false => _mm256_setzero_si256(),
            };
            // Rows 0 to 3 before 4 to 7 and 8 to 11 before 12 to 15: pairs of lanes are then in order after the last step.
            let both = |row: usize| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(row)), half(row + 4));
            let mut turned = [_mm512_setzero_si512(); 8];
            for side in 0..2 {
                let [a, b, c, d] = [both(8 * side), both(8 * side + 1), both(8 * side + 2), both(8 * side + 3)];
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                turned[4 * side] = _mm512_unpacklo_epi64(ab, cd);
                turned[4 * side + 1] = _mm512_unpackhi_epi64(ab, cd);
                let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                turned[4 * side + 2] = _mm512_unpacklo_epi64(ab, cd);
                turned[4 * side + 3] = _mm512_unpackhi_epi64(ab, cd);
            }
            for word in 0..8 {
                let (low, high) = (turned[word % 4], turned[4 + word % 4]);
                let columns = match word < 4 {
                    true => _mm512_shuffle_i32x4::<0x88>(low, high),
                    false => _mm512_shuffle_i32x4::<0xdd>(low, high),
                };
                if word < left {
                    let columns = _mm512_xor_si512(columns, _mm512_set1_epi8(-128));
                    // SAFETY: first + word < words.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().add((first + word) * COLUMNS).cast(), columns) };
                }
            }
        }
    }

    /// The rows against NB blocks. All loops over registers are of known length, so that sums never leave them.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI are present; rows of x hold 4 `words` bytes, or the first starts a panel of MR of them; `w` holds NB
    /// blocks, rows of `out` all columns, initialized where they are added to.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn tile<const MR: usize, const NB: usize, const PANEL: bool>(
        part: &Part<MR>,
        w: &[f32],
        words: usize,
        finish: &Finish,
    ) {
        let block = words * COLUMNS;
        assert!(w.len() >= NB * block, "whole blocks");
        let mut ws = [_mm512_setzero_si512(); NB];
        let mut acc = [[_mm512_setzero_si512(); NB]; MR];
        for r in 0..MR {
            acc[r] = [_mm512_set1_epi32(-128 * part.sums[r]); NB];
            // The results' lines are there when they are written.
            (0..NB).for_each(|b| simd::prefetch(part.out[r].wrapping_add(part.first + b * COLUMNS)));
        }
        let (mut w, start) = (w.as_ptr(), part.x[0].cast::<i32>());
        for q in 0..words {
            for b in 0..NB {
                // SAFETY: word q of block b lies within w.
                ws[b] = unsafe { _mm512_loadu_si512(w.add(b * block).cast()) };
            }
            w = w.wrapping_add(COLUMNS);
            for r in 0..MR {
                // SAFETY: q < words.
                let word = unsafe {
                    match PANEL {
                        true => start.add(q * MR + r),
                        false => part.x[r].add(4 * q).cast(),
                    }
                    .read_unaligned()
                };
                for b in 0..NB {
                    acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], ws[b], _mm512_set1_epi32(word));
                }
            }
        }
        let negative = if finish.relu { u16::MAX } else { 0 };
        for b in 0..NB {
            let column = part.first + b * COLUMNS;
            let left = finish.w_scale.len() - column;
            let mask = if left >= COLUMNS { u16::MAX } else { (1 << left) - 1 };
            // SAFETY: the mask covers columns that exist.
            let scale = unsafe { _mm512_maskz_loadu_ps(mask, finish.w_scale.as_ptr().add(column)) };
            let bias = match finish.bias {
                // SAFETY: as above; bias has an element for each column.
                Some(bias) => unsafe { _mm512_maskz_loadu_ps(mask, bias[..finish.w_scale.len()].as_ptr().add(column)) },
                None => _mm512_setzero_ps(),
            };
            for r in 0..MR {
                // Three roundings in this order, as on every path and device.
                let value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][b]), _mm512_set1_ps(part.scales[r]));
                let value = _mm512_mul_ps(value, scale);
                // SAFETY: the mask covers columns of the row, which is initialized where it is added to.
                unsafe {
                    let to = part.out[r].add(column);
                    let value = if finish.add {
                        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value)
                    } else {
                        let value = _mm512_add_ps(value, bias);
                        // Of a NaN and 0 the second: 0, as everywhere.
                        _mm512_mask_max_ps(value, negative, value, _mm512_setzero_ps())
                    };
                    _mm512_mask_storeu_ps(to, mask, value);
                }
            }
        }
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    #[test]
    fn packed_products_are_exact_for_every_shape() {
        if !available() {
            return;
        }
        let mut stream = crate::rng::Stream::new(9, 0);
        for (m, n, k) in [
            (3, 1, 4),
            (8, 1, 4),
            (9, 16, 8),
            (17, 33, 32),
            (4, 48, 100),
            (21, 70, 64),
            (21, 140, 68),
            (43, 128, 4),
            (211, 161, 36),
        ] {
            let mut bytes = |count: usize, extreme: bool| -> Vec<i8> {
                (0..count).map(|i| if extreme && i % 5 == 0 { -128 } else { stream.below(256) as u8 as i8 }).collect()
            };
            let (x, w) = (bytes(m * k, true), bytes(n * k, true));
            let packed = pack(&w, k);
            let (ones, bias) = (vec![1.0; m.max(n)], vec![3.0; n]);
            let finish = Finish { x_scale: &ones[..m], w_scale: &ones[..n], bias: Some(&bias), relu: true, add: false };
            let mut y = vec![2.0f32; m * n];
            let base = y.as_mut_ptr();
            let row = |i: usize| (i, x[i * k..][..k].iter().map(|&v| i32::from(v)).sum(), x[i * k..].as_ptr());
            // SAFETY: y has m rows of n.
            unsafe { product(row, m, &packed, k, &finish, |i| base.add(i * n)) };
            let check = |y: &[f32]| {
                for (id, got) in y.iter().enumerate() {
                    let (x, w) = (&x[id / n * k..][..k], &w[id % n * k..][..k]);
                    let exact: i32 = x.iter().zip(w).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
                    assert_eq!(*got, (exact as f32 + 3.0).max(0.0), "{m} {n} {k} at {id}");
                }
            };
            check(&y);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            let args = Args::new(&[], crate::dtype::DType::I8, &pool);
            let mut aligned = scratch::<i8>(m * k);
            aligned.copy_from_slice(&x);
            let panels = Panels::of(&aligned, k, n, &args);
            assert_eq!(panels.is_some(), m >= MANY_ROWS && n >= MANY_COLUMNS);
            if let Some(panels) = panels {
                y.fill(2.0);
                // SAFETY: as above.
                unsafe { panels.product(&packed, &finish, |i| base.add(i * n), |_| {}) };
                check(&y);
            }
        }
    }
}
