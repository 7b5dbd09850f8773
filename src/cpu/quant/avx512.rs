//! Storing levels by AVX-512: a conversion rounds to even by itself, and the narrowest moves write bytes.

use std::arch::x86_64::*;

use super::{Grid, Scheme, extent_here, largest, store_level};

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// [`super::store_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
pub(super) fn store_rows(x: &[f32], q: &mut [i8], scales: &mut [f32], scheme: &Scheme, shift: f32) {
    let length = q.len() / scales.len().max(1);
    for ((x, q), scale) in x.chunks_exact(length).zip(q.chunks_exact_mut(length)).zip(scales) {
        let grid = scheme.grid(if scheme.asymmetric() { extent_here(x) } else { [largest(x); 2] });
        *scale = grid.scale;
        store_row(x, q, &grid, shift);
    }
}

/// [`super::store_row`]: [`store_level`] of each element.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
pub(super) fn store_row(x: &[f32], q: &mut [i8], grid: &Grid, shift: f32) {
    let ((xs, x_tail), (qs, q_tail)) = (x.as_chunks::<16>(), q.as_chunks_mut::<16>());
    let (inverse, zero, shifted) = (_mm512_set1_ps(grid.inverse), _mm512_set1_ps(grid.zero), _mm512_set1_ps(shift));
    let (low, high) = (_mm512_set1_ps(grid.low), _mm512_set1_ps(grid.high));
    // Where nothing is added, numbers are clamped before they are rounded: the same, as the ends are whole.
    let plain = grid.zero == 0.0 && shift == 0.0;
    for (x, q) in xs.iter().zip(qs) {
        // SAFETY: sixteen floats.
        let scaled = _mm512_mul_ps(unsafe { _mm512_loadu_ps(x.as_ptr()) }, inverse);
        let raw = if plain { scaled } else { _mm512_add_ps(_mm512_roundscale_ps::<NEAREST>(scaled), zero) };
        // Numbers alone; what is none becomes 0.
        let numbers = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(raw, raw);
        let level = _mm512_sub_ps(_mm512_min_ps(_mm512_max_ps(raw, low), high), shifted);
        let level = _mm512_maskz_cvt_roundps_epi32::<NEAREST>(numbers, level);
        // SAFETY: sixteen bytes.
        unsafe { _mm_storeu_si128(q.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(level)) };
    }
    q_tail.iter_mut().zip(x_tail).for_each(|(q, x)| *q = store_level(*x, grid, shift));
}
