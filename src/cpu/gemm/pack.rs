//! Packing: panels of A and B copied to words in the order in which a micro-kernel reads them. This is where strides and
//! transposes end, and 16-bit storage too, but for bf16 that meets bf16: a word is then a pair along k, as it is.

use super::View;
use crate::dtype::Float;
use crate::simd::{self, Level};

/// Columns of B that are read row by row, not panel by panel: the processor foresees the rest of a row.
const TOGETHER: usize = 256;

/// `depth` groups of `width` values to be packed: value (x, p) is `data[first + x * across + p * along]`. They become
/// panels of `padded` values side by side, with zeros behind the last.
#[derive(Clone, Copy)]
struct Groups<'a, T> {
    data: &'a [T],
    first: usize,
    width: usize,
    depth: usize,
    across: usize,
    along: usize,
    padded: usize,
}

impl<T: Float> Groups<'_, T> {
    /// As words of WORD elements: of 1, which becomes f32, or of 2 bf16.
    fn pack<const WORD: usize>(self, out: &mut [f32]) {
        let Self { data, first, width, depth, across, along, padded } = self;
        if width == 0 || depth == 0 {
            return;
        }
        // The one bounds check that the vector code needs.
        let data = &data[first..first + (width - 1) * across + (depth - 1) * along + 1];
        let panel = depth.div_ceil(WORD) * padded;
        let out = &mut out[..width.div_ceil(padded) * panel];
        // Rows as they lie are read together, columns as they lie panel by panel.
        let step = if across == 1 { TOGETHER.next_multiple_of(padded) } else { padded };
        for (x, out) in (0..width).step_by(step).zip(out.chunks_mut(step / padded * panel)) {
            let (data, width) = (&data[x * across..], step.min(width - x));
            #[cfg(target_arch = "x86_64")]
            if simd::level() == Level::Avx512 && (across == 1 || along == 1) {
                // SAFETY: the processor has AVX-512; both slices were cut to what the groups reach.
                unsafe {
                    match across {
                        1 => avx512::copy::<T, WORD>(data, [width, depth, along, padded], out),
                        _ => avx512::transpose::<T, WORD>(data, [width, depth, across, padded], out),
                    }
                }
                continue;
            }
            for (x, out) in (0..width).step_by(padded).zip(out.chunks_exact_mut(panel)) {
                for (p, group) in (0..depth).step_by(WORD).zip(out.chunks_exact_mut(padded)) {
                    let width = padded.min(width - x);
                    for (i, word) in group[..width].iter_mut().enumerate() {
                        let at = (x + i) * across + p * along;
                        *word = data[at].load();
                        if WORD == 2 {
                            let next = if p + 1 < depth { data[at + along].load() } else { 0.0 };
                            *word = f32::from_bits(word.to_bits() >> 16 | next.to_bits());
                        }
                    }
                    group[width..].fill(0.0);
                }
            }
        }
    }

    fn pack_words(self, word: usize, out: &mut [f32]) {
        if word == 2 { self.pack::<2>(out) } else { self.pack::<1>(out) }
    }
}

/// Rows `i0..i0 + m` of A over `k0..k0 + k` as one panel of `m` rows.
pub(in super::super) fn pack_a<T: Float>(
    a: View<T>,
    (i0, m): (usize, usize),
    (k0, k): (usize, usize),
    word: usize,
    out: &mut [f32],
) {
    let first = i0 * a.row + k0 * a.column;
    Groups { data: a.data, first, width: m, depth: k, across: a.row, along: a.column, padded: m }.pack_words(word, out);
}

/// Columns `j0..j0 + n` of B over `k0..k0 + k`, in panels of `columns` columns, the last one padded with zeros.
pub(in super::super) fn pack_b<T: Float>(
    b: View<T>,
    columns: (usize, usize),
    depth: (usize, usize),
    width: usize,
    out: &mut [f32],
) {
    pack_b_words(b, columns, depth, (width, 1), out);
}

/// As [`pack_b`], with words of `word` elements.
pub(super) fn pack_b_words<T: Float>(
    b: View<T>,
    (j0, n): (usize, usize),
    (k0, k): (usize, usize),
    (columns, word): (usize, usize),
    out: &mut [f32],
) {
    let first = j0 * b.column + k0 * b.row;
    let (across, along) = (b.column, b.row);
    Groups { data: b.data, first, width: n, depth: k, across, along, padded: columns }.pack_words(word, out);
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

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use crate::dtype::{DType, Float};
    use crate::simd;

    /// Groups that [`copy`] asks for ahead: while it moves them, memory answers.
    const AHEAD: usize = 8;

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

    /// The lowest `count` of 16 lanes, or of 32.
    fn mask(count: usize) -> __mmask16 {
        ((1u32 << count.min(16)) - 1) as u16
    }

    fn wide_mask(count: usize) -> __mmask32 {
        ((1u64 << count.min(32)) - 1) as u32
    }

    /// Groups lie together in memory, `along` elements apart.
    ///
    /// # Safety
    /// `data` holds (depth - 1) * along + width elements, `out` whole panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn copy<T: Float, const WORD: usize>(
        data: &[T],
        [width, depth, along, padded]: [usize; 4],
        out: &mut [f32],
    ) {
        let panel = depth.div_ceil(WORD) * padded;
        for p in (0..depth).step_by(WORD) {
            let row = data.as_ptr().wrapping_add(p * along);
            for ahead in (AHEAD..AHEAD + WORD).map(|ahead| row.wrapping_add(ahead * along)) {
                (0..width).step_by(64 / size_of::<T>()).for_each(|x| simd::prefetch(ahead.wrapping_add(x)));
            }
            let second = if p + 1 < depth { u16::MAX } else { 0 };
            for first in (0..width).step_by(padded) {
                let to = &mut out[first / padded * panel + p / WORD * padded..][..padded];
                for x in (0..padded).step_by(16) {
                    let from = mask(width.saturating_sub(first + x));
                    let at = row.wrapping_add(first + x);
                    // SAFETY: masked to the panel on both sides.
                    unsafe {
                        let values = match WORD {
                            2 => {
                                let low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(from, at.cast()));
                                let high = _mm256_maskz_loadu_epi16(from & second, at.wrapping_add(along).cast());
                                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                                _mm512_castsi512_ps(_mm512_or_si512(low, high))
                            }
                            _ => load(at, from),
                        };
                        _mm512_mask_storeu_ps(to.as_mut_ptr().add(x), mask(padded - x), values);
                    }
                }
            }
        }
    }

    /// Groups lie across rows that are `across` elements apart: blocks of 16 x 16 words are turned in registers.
    ///
    /// # Safety
    /// `data` holds (width - 1) * across + depth elements, `out` one panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn transpose<T: Float, const WORD: usize>(
        data: &[T],
        [width, depth, across, padded]: [usize; 4],
        out: &mut [f32],
    ) {
        let words = depth.div_ceil(WORD);
        for x in (0..padded).step_by(16) {
            let rows = width.saturating_sub(x).min(16);
            let to = mask(padded - x);
            for p in (0..words).step_by(16) {
                let left = depth - p * WORD;
                let mut block = [_mm512_setzero_ps(); 16];
                for (i, row) in block.iter_mut().enumerate() {
                    if i < rows {
                        let at = data.as_ptr().wrapping_add((x + i) * across + p * WORD);
                        // SAFETY: row x + i < width, masked to the depth.
                        *row = unsafe {
                            match WORD {
                                2 => _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(wide_mask(left), at.cast())),
                                _ => load(at, mask(left)),
                            }
                        };
                    }
                }
                let turned = turn(block);
                for (i, &group) in turned.iter().enumerate() {
                    if p + i < words {
                        // SAFETY: group p + i < words, masked to the panel's width.
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
