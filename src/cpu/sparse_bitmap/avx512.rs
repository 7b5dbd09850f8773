//! The AVX-512 paths of `cpu/sparse_bitmap.rs`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::gemm::turn;
use super::{BLOCK, Line, Out, Product, Strip};

/// sum + x w: of floats, or of groups of four bytes, those of x unsigned.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn multiply<const BYTES: bool>(sum: __m512i, x: __m512i, w: __m512i) -> __m512i {
    if BYTES {
        return _mm512_dpbusd_epi32(sum, x, w);
    }
    _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), _mm512_castsi512_ps(sum)))
}

/// [`super::lists`] for either type, with 16 A tokens.
///
/// # Safety
/// [`super::vector`] found the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,bmi1,bmi2,popcnt")]
pub(super) unsafe fn lists<const A: usize, const BYTES: bool>(strip: &Strip, sums: &mut [Line]) {
    assert!(strip.x.len() >= BLOCK * A, "a whole block");
    let ones = _mm512_set1_epi8(1);
    for (j, sums) in strip.rows.clone().zip(sums.chunks_exact_mut(A)) {
        let (mut mask, values) = strip.weights.list(strip.b, j);
        let mut acc = [_mm512_setzero_si512(); A];
        if strip.b > 0 {
            for i in 0..A {
                // SAFETY: a line is one register.
                acc[i] = unsafe { _mm512_load_si512(sums.as_ptr().add(i).cast()) };
            }
        }
        let mut total = _mm512_setzero_si512();
        let mut add = |place: usize, w: __m512i| {
            for i in 0..A {
                // SAFETY: x has BLOCK words of A lines.
                let x = unsafe { _mm512_load_si512(strip.x.as_ptr().add(place * A + i).cast()) };
                acc[i] = multiply::<BYTES>(acc[i], x, w);
            }
            if BYTES {
                total = _mm512_dpbusd_epi32(total, ones, w);
            }
        };
        let mut value = values.as_ptr();
        // What bounds this is loads. Of floats sixteen words come at once, and a permutation spreads each over a register; at the start
        // of a list it is waited for, which the short lists that bytes have do not win back.
        if BYTES {
            while mask != 0 {
                // SAFETY: a list has a value for each bit of its mask.
                let w = _mm512_set1_epi32(unsafe { value.read() } as i32);
                value = value.wrapping_add(1);
                add(mask.trailing_zeros() as usize, w);
                mask &= mask - 1;
            }
        }
        let mut lane = _mm512_setzero_si512();
        while mask != 0 {
            // SAFETY: as above, with a register of padding behind them.
            let held = unsafe { _mm512_loadu_si512(value.cast()) };
            value = value.wrapping_add(16);
            for _ in 0..16 {
                add(mask.trailing_zeros() as usize, _mm512_permutexvar_epi32(lane, held));
                // Of which the permutation takes four bits.
                lane = _mm512_add_epi32(lane, _mm512_set1_epi32(1));
                mask &= mask - 1;
                if mask == 0 {
                    break;
                }
            }
        }
        let excess = _mm512_slli_epi32::<7>(total);
        for i in 0..A {
            let sum = if BYTES { _mm512_sub_epi32(acc[i], excess) } else { acc[i] };
            // SAFETY: as above.
            unsafe { _mm512_store_si512(sums.as_mut_ptr().add(i).cast(), sum) };
        }
    }
}

/// Finishes the sums `[row, token]` and turns them into rows of y.
///
/// # Safety
/// As [`Product::strip`]; [`super::vector`] found the instructions; `sums` holds `width` lines for each row, and for as many
/// more as make a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn store<const BYTES: bool>(
    product: &Product,
    first: usize,
    rows: Range<usize>,
    width: usize,
    sums: &[Line],
    out: &Out,
) {
    assert!(sums.len() >= rows.len().next_multiple_of(16) * width, "whole blocks of rows");
    for (v, token) in (first..product.m).step_by(16).take(width).enumerate() {
        let tokens = (product.m - token).min(16);
        let lanes = ((1u32 << tokens) - 1) as u16;
        let x_scale = match product.scales {
            // SAFETY: masked to the tokens that exist.
            Some([x, _]) => unsafe { _mm512_maskz_loadu_ps(lanes, x[token..].as_ptr()) },
            None => _mm512_setzero_ps(),
        };
        for j in rows.clone().step_by(16) {
            let mut block = [_mm512_setzero_ps(); 16];
            let columns = (rows.end - j).min(16);
            for r in 0..16 {
                // SAFETY: the rows of this block have lines.
                let sum = unsafe { _mm512_load_si512(sums.as_ptr().add((j - rows.start + r) * width + v).cast()) };
                let row = j + r.min(columns - 1);
                let mut y = match product.scales {
                    Some([_, w]) if BYTES => {
                        _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), x_scale), _mm512_set1_ps(w[row]))
                    }
                    _ => _mm512_castsi512_ps(sum),
                };
                if let Some(bias) = product.bias {
                    y = _mm512_add_ps(y, _mm512_set1_ps(bias[row]));
                }
                block[r] = y;
            }
            for (i, y) in turn(block).into_iter().enumerate().take(tokens) {
                // SAFETY: token + i < m, and columns of this strip are stored.
                unsafe {
                    let to = out.0.add((token + i) * product.n + j);
                    match columns {
                        16 => _mm512_storeu_ps(to, y),
                        _ => _mm512_mask_storeu_ps(to, (1 << columns) - 1, y),
                    }
                }
            }
        }
    }
}

/// Tokens first .. first + M against `rows` of the weights, 16 words of k side by side; gives M. `sums` holds M lines for
/// each row, `x` as many lines for each token as there are registers in a row.
///
/// # Safety
/// As [`store`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,bmi1,bmi2,popcnt")]
pub(super) unsafe fn expand<const M: usize, const BYTES: bool>(
    product: &Product,
    first: usize,
    rows: Range<usize>,
    x: &[Line],
    sums: &mut [Line],
    out: &Out,
) -> usize {
    let blocks = product.words.div_ceil(BLOCK);
    assert!(x.len() >= M * blocks * BLOCK / 16 && first + M <= product.m, "whole rows");
    let ones = _mm512_set1_epi8(1);
    for b in 0..blocks {
        for (j, sums) in rows.clone().zip(sums.chunks_exact_mut(M)) {
            let (mask, values) = product.weights.list(b, j);
            let mut acc = [_mm512_setzero_si512(); M];
            if b > 0 {
                for t in 0..M {
                    // SAFETY: a line is one register.
                    acc[t] = unsafe { _mm512_load_si512(sums.as_ptr().add(t).cast()) };
                }
            }
            let mut total = _mm512_setzero_si512();
            let mut value = values.as_ptr();
            for q in 0..BLOCK / 16 {
                let part = (mask >> (16 * q)) as u16;
                // SAFETY: a list has a value for each bit of its mask and a register of padding behind them.
                let w = unsafe { _mm512_maskz_expand_epi32(part, _mm512_loadu_si512(value.cast())) };
                // SAFETY: as above.
                value = unsafe { value.add(part.count_ones() as usize) };
                for t in 0..M {
                    // SAFETY: token t has `blocks` times four lines.
                    let x = unsafe { _mm512_load_si512(x.as_ptr().add((t * blocks + b) * BLOCK / 16 + q).cast()) };
                    acc[t] = multiply::<BYTES>(acc[t], x, w);
                }
                if BYTES {
                    total = _mm512_dpbusd_epi32(total, ones, w);
                }
            }
            let excess = _mm512_slli_epi32::<7>(total);
            for t in 0..M {
                let sum = if BYTES { _mm512_sub_epi32(acc[t], excess) } else { acc[t] };
                // SAFETY: as above.
                unsafe { _mm512_store_si512(sums.as_mut_ptr().add(t).cast(), sum) };
            }
        }
    }
    // SAFETY: as promised by the caller.
    unsafe { reduce::<M, BYTES>(product, first, rows, sums, out) };
    M
}

/// [`expand`] of one token, whose words of k each row gathers from four registers: costs what is kept.
///
/// # Safety
/// As [`store`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,bmi1,bmi2,popcnt")]
pub(super) unsafe fn gather<const BYTES: bool>(
    product: &Product,
    first: usize,
    rows: Range<usize>,
    x: &[Line],
    sums: &mut [Line],
    out: &Out,
) -> usize {
    let places: [u8; BLOCK] = std::array::from_fn(|i| i as u8);
    // SAFETY: 64 bytes.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    let ones = _mm512_set1_epi8(1);
    for (b, x) in x.chunks_exact(BLOCK / 16).enumerate().take(product.words.div_ceil(BLOCK)) {
        // SAFETY: a block of x is four lines.
        let x: [__m512i; 4] = unsafe { x.as_ptr().cast::<[__m512i; 4]>().read() };
        for (j, sums) in rows.clone().zip(&mut *sums) {
            let (mask, values) = product.weights.list(b, j);
            let mut acc = _mm512_setzero_si512();
            if b > 0 {
                // SAFETY: a line is one register.
                acc = unsafe { _mm512_load_si512(sums.0.as_ptr().cast()) };
            }
            let mut kept = Line([0; 16]);
            // SAFETY: a line is one register.
            unsafe { _mm512_store_si512(kept.0.as_mut_ptr().cast(), _mm512_maskz_compress_epi8(mask, places)) };
            let (kept, count): (&[u8], _) = (bytemuck::cast_slice(&kept.0), mask.count_ones() as usize);
            for at in (0..count).step_by(16) {
                let lanes = _bzhi_u32(0xffff, (count - at) as u32) as u16;
                // SAFETY: at + 16 <= 64.
                let place = _mm512_cvtepu8_epi32(unsafe { _mm_load_si128(kept.as_ptr().add(at).cast()) });
                let low = _mm512_maskz_permutex2var_epi32(lanes, x[0], place, x[1]);
                let upper = _mm512_mask_test_epi32_mask(lanes, place, _mm512_set1_epi32(32));
                let high = _mm512_permutex2var_epi32(x[2], place, x[3]);
                // SAFETY: masked to the values of the list.
                let w = unsafe { _mm512_maskz_loadu_epi32(lanes, values.as_ptr().add(at).cast()) };
                acc = multiply::<BYTES>(acc, _mm512_mask_mov_epi32(low, upper, high), w);
                if BYTES {
                    acc = _mm512_sub_epi32(
                        acc,
                        _mm512_slli_epi32::<7>(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, w)),
                    );
                }
            }
            // SAFETY: a line is one register.
            unsafe { _mm512_store_si512(sums.0.as_mut_ptr().cast(), acc) };
        }
    }
    // SAFETY: as promised by the caller.
    unsafe { reduce::<1, BYTES>(product, first, rows, sums, out) };
    1
}

/// Sums over the lanes, M lines of them for each row, finished.
///
/// # Safety
/// As [`store`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn reduce<const M: usize, const BYTES: bool>(
    product: &Product,
    first: usize,
    rows: Range<usize>,
    sums: &[Line],
    out: &Out,
) {
    for (j, sums) in rows.zip(sums.chunks_exact(M)) {
        for t in 0..M {
            // SAFETY: a line is one register.
            let lanes = unsafe { _mm512_load_si512(sums.as_ptr().add(t).cast()) };
            let sum = if BYTES {
                _mm512_reduce_add_epi32(lanes) as u32
            } else {
                _mm512_reduce_add_ps(_mm512_castsi512_ps(lanes)).to_bits()
            };
            // SAFETY: the caller promised this element.
            unsafe { out.0.add((first + t) * product.n + j).write(product.finish::<BYTES>(sum, first + t, j)) };
        }
    }
}
