//! Products of int8 rows with packed weights: words of four bytes along k, sixteen columns side by side. A word of x meets
//! sixteen columns at once, so nothing is summed across lanes at the end: what short rows of experts (32 neurons) spend most of
//! their time on otherwise. Packing pays from a few rows on.

use std::ops::Range;

/// Rows from which packing the weights costs less than it saves.
const WORTH: usize = 8;
/// Columns of a block.
const COLUMNS: usize = 16;

/// What becomes of the sums, and where it goes.
pub(super) struct Finish<'a> {
    pub x_scale: &'a [f32],
    pub w_scale: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub relu: bool,
    /// Added to what is there.
    pub add: bool,
}

/// Whether `rows` rows of `k` bytes should take this path on this processor.
pub(super) fn fits(rows: usize, k: usize) -> bool {
    rows >= WORTH && k > 0 && k.is_multiple_of(4) && available()
}

#[cfg(target_arch = "x86_64")]
fn available() -> bool {
    super::int8::vnni()
}

#[cfg(not(target_arch = "x86_64"))]
fn available() -> bool {
    false
}

/// Rows of `k` bytes as blocks of [`COLUMNS`] columns, each word with 128 added to its bytes; rows past the last are zeros.
pub(super) fn pack(w: &[i8], k: usize, packed: &mut Vec<i32>) {
    let (rows, words) = (w.len() / k.max(1), k / 4);
    packed.clear();
    packed.resize(rows.div_ceil(COLUMNS) * words * COLUMNS, 0);
    for (row, bytes) in w.chunks_exact(k.max(1)).enumerate() {
        let block = &mut packed[row / COLUMNS * words * COLUMNS + row % COLUMNS..];
        for (word, to) in bytes.chunks_exact(4).zip(block.iter_mut().step_by(COLUMNS)) {
            let word = i32::from_le_bytes([word[0] as u8, word[1] as u8, word[2] as u8, word[3] as u8]);
            *to = word ^ 0x8080_8080_u32 as i32;
        }
    }
}

/// y[out(i) + j] = finish(x(i) . column j) for rows `0..rows` of `k` bytes and the columns of `finish.w_scale`. `at(i)` is the
/// row's place in x, in `sums` (of its bytes) and in the scales; `sums` is indexed by i.
///
/// # Safety
/// For every row, `out(i)` starts as many elements as there are columns, which nobody else touches meanwhile.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn product(
    x: impl Fn(usize) -> (usize, *const i8),
    rows: Range<usize>,
    packed: &[i32],
    k: usize,
    sums: &[i32],
    finish: &Finish,
    out: impl Fn(usize) -> *mut f32,
) {
    let (columns, words) = (finish.w_scale.len(), k / 4);
    assert!(available() && packed.len() >= columns.div_ceil(COLUMNS) * words * COLUMNS, "packed columns");
    let Some(last) = rows.clone().last() else { return };
    for first in rows.step_by(8) {
        let own: [usize; 8] = std::array::from_fn(|r| (first + r).min(last));
        let x = own.map(&x);
        let sums = own.map(|i| sums[i]);
        let scales = x.map(|(at, _)| finish.x_scale[at]);
        let (x, out, stored) = (x.map(|(_, row)| row), own.map(&out), (last + 1 - first).min(8));
        for j in (0..columns).step_by(2 * COLUMNS) {
            let w = &packed[j / COLUMNS * words * COLUMNS..];
            let part = avx512::Part { x, sums, scales, out, stored, first: j };
            // SAFETY: rows hold k bytes, w the blocks of these columns, and `out` is as promised by the caller.
            unsafe {
                if j + COLUMNS < columns {
                    avx512::tile::<2>(&part, w, words, finish);
                } else {
                    avx512::tile::<1>(&part, w, words, finish);
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn product(
    _: impl Fn(usize) -> (usize, *const i8),
    _: Range<usize>,
    _: &[i32],
    _: usize,
    _: &[i32],
    _: &Finish,
    _: impl Fn(usize) -> *mut f32,
) {
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, Finish};

    /// Eight rows against the columns from `first` on; the first `stored` of them are wanted.
    pub(super) struct Part {
        pub x: [*const i8; 8],
        pub sums: [i32; 8],
        pub scales: [f32; 8],
        pub out: [*mut f32; 8],
        pub stored: usize,
        pub first: usize,
    }

    /// # Safety
    /// AVX-512 F, BW and VNNI are present; rows of x hold 4 `words` bytes, `w` NB blocks, rows of `out` all columns.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn tile<const NB: usize>(part: &Part, w: &[i32], words: usize, finish: &Finish) {
        assert!(w.len() >= NB * words * COLUMNS, "whole blocks");
        let mut acc = [[_mm512_setzero_si512(); NB]; 8];
        let mut ws = [_mm512_setzero_si512(); NB];
        for q in 0..words {
            for b in 0..NB {
                // SAFETY: word q of block b lies within w.
                ws[b] = unsafe { _mm512_loadu_si512(w.as_ptr().add((b * words + q) * COLUMNS).cast()) };
            }
            for r in 0..8 {
                // SAFETY: q < words.
                let xs = _mm512_set1_epi32(unsafe { part.x[r].add(4 * q).cast::<i32>().read_unaligned() });
                for b in 0..NB {
                    acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], ws[b], xs);
                }
            }
        }
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
            for r in 0..part.stored {
                let sum = _mm512_sub_epi32(acc[r][b], _mm512_set1_epi32(part.sums[r] << 7));
                // Three roundings in this order, as on every path and device.
                let value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(part.scales[r]));
                let mut value = _mm512_mul_ps(value, scale);
                if finish.bias.is_some() {
                    value = _mm512_add_ps(value, bias);
                }
                if finish.relu {
                    let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(value, _mm512_setzero_ps());
                    value = _mm512_mask_mov_ps(value, below, _mm512_setzero_ps());
                }
                // SAFETY: the mask covers columns of the row.
                unsafe {
                    let to = part.out[r].add(column);
                    if finish.add {
                        value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value);
                    }
                    _mm512_mask_storeu_ps(to, mask, value);
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn packed_products_are_exact_for_every_shape() {
        if !available() {
            return;
        }
        let mut stream = crate::rng::Stream::new(9, 0);
        for (m, n, k) in [(8, 1, 4), (9, 16, 8), (17, 33, 32), (8, 48, 100), (21, 70, 64)] {
            let mut bytes = |count: usize, extreme: bool| -> Vec<i8> {
                (0..count).map(|i| if extreme && i % 5 == 0 { -128 } else { stream.below(256) as u8 as i8 }).collect()
            };
            let (x, w) = (bytes(m * k, true), bytes(n * k, true));
            let sums: Vec<i32> = x.chunks(k).map(|row| row.iter().map(|&v| i32::from(v)).sum()).collect();
            let mut packed = Vec::new();
            pack(&w, k, &mut packed);
            let (ones, bias) = (vec![1.0; m.max(n)], vec![3.0; n]);
            let finish = Finish { x_scale: &ones[..m], w_scale: &ones[..n], bias: Some(&bias), relu: true, add: true };
            let mut y = vec![2.0f32; m * n];
            let base = y.as_mut_ptr();
            let row = |i: usize| (i, x[i * k..].as_ptr());
            // SAFETY: y has m rows of n.
            unsafe { product(row, 0..m, &packed, k, &sums, &finish, |i| base.add(i * n)) };
            for (id, got) in y.iter().enumerate() {
                let (x, w) = (&x[id / n * k..][..k], &w[id % n * k..][..k]);
                let exact: i32 = x.iter().zip(w).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
                assert_eq!(*got, (exact as f32 + 3.0).max(0.0) + 2.0, "{m} {n} {k} at {id}");
            }
        }
    }
}
