//! Products of int8 rows with packed weights: words of four bytes along k, sixteen columns side by side. A word of x meets
//! sixteen columns at once, so nothing is summed across lanes at the end: what short rows of experts (32 neurons) spend most of
//! their time on otherwise. Packing pays from a few rows on.

/// Rows from which packing the weights costs less than it saves.
const WORTH: usize = 3;
/// Columns of a block.
const COLUMNS: usize = 16;

/// What becomes of the sums.
pub(super) struct Finish<'a> {
    pub x_scale: &'a [f32],
    pub w_scale: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub relu: bool,
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
/// unsigned by signed bytes, so x gets 128 added there: -128 times the sum of each column comes first in its block.
#[cfg(target_arch = "x86_64")]
pub(super) fn pack(w: &[i8], k: usize, packed: &mut Vec<f32>) {
    let words = k / 4;
    let mut aligned: Vec<f32> = Vec::new();
    let w: &[f32] = bytemuck::try_cast_slice(w).unwrap_or_else(|_| {
        let word = |b: &[i8]| f32::from_bits(u32::from_le_bytes([b[0] as u8, b[1] as u8, b[2] as u8, b[3] as u8]));
        aligned = w.chunks_exact(4).map(word).collect();
        &aligned
    });
    packed.clear();
    packed.resize((w.len() / words.max(1)).div_ceil(COLUMNS) * (words + 1) * COLUMNS, 0.0);
    for (rows, block) in w.chunks(COLUMNS * words).zip(packed.chunks_mut((words + 1) * COLUMNS)) {
        let (sums, block) = block.split_at_mut(COLUMNS);
        super::gemm::turn_words(rows, words, block);
        // SAFETY: `fits` found the instructions; sums has COLUMNS words and block a whole number of them.
        unsafe { avx512::corrections(block, sums) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn pack(_: &[i8], _: usize, _: &mut Vec<f32>) {}

/// y[out(i) + j] = finish(x(i) . column j) for `rows` rows of `k` bytes and the columns of `finish.w_scale`. `x(i)` is the row's
/// place in the scales and where it starts.
///
/// # Safety
/// For every row, `x(i)` starts k bytes and `out(i)` as many elements as there are columns, which nobody else touches meanwhile.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn product(
    x: impl Fn(usize) -> (usize, *const i8),
    rows: usize,
    packed: &[f32],
    k: usize,
    finish: &Finish,
    out: impl Fn(usize) -> *mut f32,
) {
    let (columns, words) = (finish.w_scale.len(), k / 4);
    assert!(available() && packed.len() >= columns.div_ceil(COLUMNS) * (words + 1) * COLUMNS, "packed columns");
    for first in (0..rows).step_by(8) {
        let own: [usize; 8] = std::array::from_fn(|r| (first + r).min(rows - 1));
        let x = own.map(&x);
        let scales = x.map(|(at, _)| finish.x_scale[at]);
        let (x, out, stored) = (x.map(|(_, row)| row), own.map(&out), (rows - first).min(8));
        for j in (0..columns).step_by(2 * COLUMNS) {
            let w = &packed[j / COLUMNS * (words + 1) * COLUMNS..];
            let part = avx512::Part { x, scales, out, stored, first: j };
            // SAFETY: rows hold k bytes, w the blocks of these columns, and `out` is as promised by the caller.
            unsafe {
                match (j + COLUMNS < columns, stored > 4) {
                    (true, true) => avx512::tile::<8, 2>(&part, w, words, finish),
                    (true, false) => avx512::tile::<4, 2>(&part, w, words, finish),
                    (false, true) => avx512::tile::<8, 1>(&part, w, words, finish),
                    (false, false) => avx512::tile::<4, 1>(&part, w, words, finish),
                }
            }
        }
    }
}

/// # Safety
/// Nothing is asked for: it does nothing, and `fits` says so.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn product(
    _: impl Fn(usize) -> (usize, *const i8),
    _: usize,
    _: &[f32],
    _: usize,
    _: &Finish,
    _: impl Fn(usize) -> *mut f32,
) {
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, Finish};

    /// Up to eight rows against the columns from `first` on; the first `stored` of them are wanted.
    pub(super) struct Part {
        pub x: [*const i8; 8],
        pub scales: [f32; 8],
        pub out: [*mut f32; 8],
        pub stored: usize,
        pub first: usize,
    }

    /// -128 times the sum of the bytes of each column.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI are present; `sums` holds a word for each column.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn corrections(block: &[f32], sums: &mut [f32]) {
        let mut sum = _mm512_setzero_si512();
        for words in block.chunks_exact(COLUMNS) {
            // SAFETY: a chunk is 64 bytes.
            let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), words);
        }
        let sum = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sum));
        // SAFETY: promised by the caller.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum) };
    }

    /// # Safety
    /// AVX-512 F, BW and VNNI are present; rows of x hold 4 `words` bytes, `w` NB blocks, rows of `out` all columns; MR is at
    /// least `stored` and at most 8.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn tile<const MR: usize, const NB: usize>(part: &Part, w: &[f32], words: usize, finish: &Finish) {
        let block = (words + 1) * COLUMNS;
        assert!(w.len() >= NB * block && part.stored <= MR && MR <= 8, "whole blocks");
        let flip = _mm512_set1_epi8(-128);
        let mut ws = [_mm512_setzero_si512(); NB];
        for b in 0..NB {
            // SAFETY: the corrections of block b come first in it.
            ws[b] = unsafe { _mm512_loadu_si512(w.as_ptr().add(b * block).cast()) };
        }
        let mut acc = [ws; MR];
        for q in 0..words {
            for b in 0..NB {
                // SAFETY: word q of block b lies within w.
                ws[b] = unsafe { _mm512_loadu_si512(w.as_ptr().add(b * block + (q + 1) * COLUMNS).cast()) };
            }
            for r in 0..MR {
                // SAFETY: q < words.
                let xs = _mm512_set1_epi32(unsafe { part.x[r].add(4 * q).cast::<i32>().read_unaligned() });
                let xs = _mm512_xor_si512(xs, flip);
                for b in 0..NB {
                    acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], xs, ws[b]);
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
                // Three roundings in this order, as on every path and device.
                let value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][b]), _mm512_set1_ps(part.scales[r]));
                let mut value = _mm512_mul_ps(value, scale);
                if finish.bias.is_some() {
                    value = _mm512_add_ps(value, bias);
                }
                if finish.relu {
                    let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(value, _mm512_setzero_ps());
                    value = _mm512_mask_mov_ps(value, below, _mm512_setzero_ps());
                }
                // SAFETY: the mask covers columns of the row.
                unsafe { _mm512_mask_storeu_ps(part.out[r].add(column), mask, value) };
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
        for (m, n, k) in [(3, 1, 4), (8, 1, 4), (9, 16, 8), (17, 33, 32), (4, 48, 100), (21, 70, 64)] {
            let mut bytes = |count: usize, extreme: bool| -> Vec<i8> {
                (0..count).map(|i| if extreme && i % 5 == 0 { -128 } else { stream.below(256) as u8 as i8 }).collect()
            };
            let (x, w) = (bytes(m * k, true), bytes(n * k, true));
            let mut packed = Vec::new();
            pack(&w, k, &mut packed);
            let (ones, bias) = (vec![1.0; m.max(n)], vec![3.0; n]);
            let finish = Finish { x_scale: &ones[..m], w_scale: &ones[..n], bias: Some(&bias), relu: true };
            let mut y = vec![2.0f32; m * n];
            let base = y.as_mut_ptr();
            let row = |i: usize| (i, x[i * k..].as_ptr());
            // SAFETY: y has m rows of n.
            unsafe { product(row, m, &packed, k, &finish, |i| base.add(i * n)) };
            for (id, got) in y.iter().enumerate() {
                let (x, w) = (&x[id / n * k..][..k], &w[id % n * k..][..k]);
                let exact: i32 = x.iter().zip(w).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
                assert_eq!(*got, (exact as f32 + 3.0).max(0.0), "{m} {n} {k} at {id}");
            }
        }
    }
}
