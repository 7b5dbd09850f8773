//! Packing: panels of A and B copied to f32 in the order in which a micro-kernel reads them. This is where strides,
//! transposes and 16-bit storage end.

use super::View;
use crate::dtype::Float;
use crate::simd::{self, Level};

/// `depth` groups of `width` values to be packed: value (x, p) is `data[first + x * across + p * along]`.
#[derive(Clone, Copy)]
struct Panel<'a, T> {
    data: &'a [T],
    first: usize,
    width: usize,
    depth: usize,
    across: usize,
    along: usize,
}

impl<T: Float> Panel<'_, T> {
    /// Groups of `padded` values, zeros behind `width`.
    fn pack(self, padded: usize, out: &mut [f32]) {
        let Self { data, first, width, depth, across, along } = self;
        if width == 0 || depth == 0 {
            return;
        }
        // The one bounds check that the vector code needs.
        let data = &data[first..first + (width - 1) * across + (depth - 1) * along + 1];
        let out = &mut out[..depth * padded];
        #[cfg(target_arch = "x86_64")]
        if simd::level() == Level::Avx512 && (across == 1 || along == 1) {
            // SAFETY: the processor has AVX-512; both slices were cut to what the panel reaches.
            unsafe {
                match across {
                    1 => avx512::copy(data, width, depth, along, padded, out),
                    _ => avx512::transpose(data, width, depth, across, padded, out),
                }
            }
            return;
        }
        for (p, group) in out.chunks_exact_mut(padded).enumerate() {
            for (x, o) in group[..width].iter_mut().enumerate() {
                *o = data[x * across + p * along].load();
            }
            group[width..].fill(0.0);
        }
    }
}

/// Rows `i0..i0 + m` of A over `k0..k0 + k`, in panels of `rows` rows; the last panel is as narrow as its rows.
pub(super) fn pack_a<T: Float>(
    a: View<T>,
    (i0, m): (usize, usize),
    (k0, k): (usize, usize),
    rows: usize,
    out: &mut [f32],
) {
    for (start, part) in (0..m).step_by(rows).zip(out[..m * k].chunks_mut((rows * k).max(1))) {
        let width = rows.min(m - start);
        let first = (i0 + start) * a.row + k0 * a.column;
        Panel { data: a.data, first, width, depth: k, across: a.row, along: a.column }.pack(width, part);
    }
}

/// Columns `j0..j0 + n` of B over `k0..k0 + k`, in panels of `columns` columns, the last one padded with zeros.
pub(in super::super) fn pack_b<T: Float>(
    b: View<T>,
    (j0, n): (usize, usize),
    (k0, k): (usize, usize),
    columns: usize,
    out: &mut [f32],
) {
    for (start, part) in (0..n).step_by(columns).zip(out.chunks_mut((columns * k).max(1))) {
        let width = columns.min(n - start);
        let first = (j0 + start) * b.column + k0 * b.row;
        Panel { data: b.data, first, width, depth: k, across: b.column, along: b.row }.pack(columns, part);
    }
}

/// Columns of B `[k, ..]` side by side: `out [k, padded]`, zeros behind the last.
pub(in super::super) fn pack_columns<T: Float>(
    b: View<T>,
    (first, columns): (usize, usize),
    k: usize,
    padded: usize,
    out: &mut [f32],
) {
    pack_b(b, (first, columns), (0, k), padded, out);
}

#[cfg(target_arch = "x86_64")]
pub(in super::super) use avx512::turn;

/// Rows of `words` 32-bit words as columns: `out [words, 16]`, padded with zeros to sixteen rows. Needs AVX-512.
#[cfg(target_arch = "x86_64")]
pub(in super::super) fn turn_words(rows: &[f32], words: usize, out: &mut [f32]) {
    let width = rows.len() / words.max(1);
    assert!(width <= 16 && rows.len() == width * words && out.len() >= 16 * words, "up to sixteen whole rows");
    assert!(simd::level() == Level::Avx512, "AVX-512");
    // SAFETY: the instructions exist, and both slices hold what was asserted.
    unsafe { avx512::transpose(rows, width, words, words, 16, out) };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use crate::dtype::{DType, Float};

    /// The first `mask` of 16 elements as f32.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load<T: Float>(at: *const T, mask: __mmask16) -> __m512 {
        // SAFETY: the caller promises the unmasked elements.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm512_maskz_loadu_ps(mask, at.cast()),
                DType::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())),
                _ => {
                    let words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
                }
            }
        }
    }

    fn mask(count: usize) -> __mmask16 {
        ((1u32 << count.min(16)) - 1) as u16
    }

    /// Groups lie together in memory, `along` elements apart.
    ///
    /// # Safety
    /// `data` holds (depth - 1) * along + width elements, `out` depth * padded.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn copy<T: Float>(
        data: &[T],
        width: usize,
        depth: usize,
        along: usize,
        padded: usize,
        out: &mut [f32],
    ) {
        for x in (0..padded).step_by(16) {
            let (from, to) = (mask(width.saturating_sub(x)), mask(padded - x));
            for p in 0..depth {
                // SAFETY: masked to the panel on both sides; x <= width where anything is loaded.
                unsafe {
                    let values = load(data.as_ptr().wrapping_add(p * along + x), from);
                    _mm512_mask_storeu_ps(out.as_mut_ptr().add(p * padded + x), to, values);
                }
            }
        }
    }

    /// Groups lie across rows that are `across` elements apart: blocks of 16 x 16 are turned in registers.
    ///
    /// # Safety
    /// `data` holds (width - 1) * across + depth elements, `out` depth * padded.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn transpose<T: Float>(
        data: &[T],
        width: usize,
        depth: usize,
        across: usize,
        padded: usize,
        out: &mut [f32],
    ) {
        for x in (0..padded).step_by(16) {
            let rows = width.saturating_sub(x).min(16);
            let to = mask(padded - x);
            for p in (0..depth).step_by(16) {
                let from = mask(depth - p);
                let mut block = [_mm512_setzero_ps(); 16];
                for (i, row) in block.iter_mut().enumerate() {
                    if i < rows {
                        // SAFETY: row x + i < width, masked to the depth.
                        *row = unsafe { load(data.as_ptr().wrapping_add((x + i) * across + p), from) };
                    }
                }
                let turned = turn(block);
                for (i, &group) in turned.iter().enumerate() {
                    if p + i < depth {
                        // SAFETY: group p + i < depth, masked to the panel's width.
                        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr().add((p + i) * padded + x), to, group) };
                    }
                }
            }
        }
    }

    /// The transpose of 16 x 16 values: pairs within 128-bit lanes, then the lanes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in super::super::super) fn turn(r: [__m512; 16]) -> [__m512; 16] {
        let mut t = r;
        for i in (0..16).step_by(4) {
            let low = _mm512_unpacklo_ps(r[i], r[i + 1]);
            let high = _mm512_unpackhi_ps(r[i], r[i + 1]);
            let low2 = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
            let high2 = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
            t[i] = _mm512_shuffle_ps::<0x44>(low, low2);
            t[i + 1] = _mm512_shuffle_ps::<0xee>(low, low2);
            t[i + 2] = _mm512_shuffle_ps::<0x44>(high, high2);
            t[i + 3] = _mm512_shuffle_ps::<0xee>(high, high2);
        }
        // Now lane l of t[4 q + c] holds column 4 l + c of rows 4 q..4 q + 4: gather lane l of the four q.
        let mut out = t;
        for c in 0..4 {
            let a = _mm512_shuffle_f32x4::<0x88>(t[c], t[4 + c]);
            let b = _mm512_shuffle_f32x4::<0x88>(t[8 + c], t[12 + c]);
            let d = _mm512_shuffle_f32x4::<0xdd>(t[c], t[4 + c]);
            let e = _mm512_shuffle_f32x4::<0xdd>(t[8 + c], t[12 + c]);
            out[c] = _mm512_shuffle_f32x4::<0x88>(a, b);
            out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(a, b);
            out[4 + c] = _mm512_shuffle_f32x4::<0x88>(d, e);
            out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(d, e);
        }
        out
    }
}
