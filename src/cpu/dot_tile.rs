//! x W^T for few rows: both operands have their reduction axis contiguous, so tiles of 16 dot products run along it
//! without packing either. What packing costs is only won back over many rows.

use super::simd;

/// y[i, j] = x[i] . w[j] for rows of x and rows of `w`, `n` to a row of y.
pub(super) fn product<'x>(x: impl Fn(usize) -> &'x [f32], m: usize, w: &[f32], n: usize, y: &mut [f32]) {
    if m == 0 || n == 0 {
        return;
    }
    match m {
        1 => tiles::<1, 16>(x, m, w, n, y),
        2 | 3 => tiles::<2, 8>(x, m, w, n, y),
        _ => tiles::<4, 4>(x, m, w, n, y),
    }
}

fn tiles<'x, const MR: usize, const NR: usize>(
    x: impl Fn(usize) -> &'x [f32],
    m: usize,
    w: &[f32],
    n: usize,
    y: &mut [f32],
) {
    let k = w.len() / n;
    for i in (0..m).step_by(MR) {
        // Tiles that reach over an edge repeat its last row; what that makes is not stored.
        let rows: [&[f32]; MR] = std::array::from_fn(|r| &x((i + r).min(m - 1))[..k]);
        for j in (0..n).step_by(NR) {
            let columns: [&[f32]; NR] = std::array::from_fn(|c| &w[(j + c).min(n - 1) * k..][..k]);
            let sums = tile(rows, columns);
            for r in 0..MR.min(m - i) {
                for c in 0..NR.min(n - j) {
                    y[(i + r) * n + j + c] = sums[r * NR + c];
                }
            }
        }
    }
}

/// For each of the rows first .. first + count (up to 16) of every w the sum over `parts` (x, w) of x . w[row]: lanes are added up
/// once for all parts.
pub(super) fn sum(parts: &[(&[f32], &[f32])], first: usize, count: usize) -> [f32; 16] {
    assert!(count <= 16 && parts.iter().all(|(x, w)| w.len() >= (first + count) * x.len()), "rows of every w");
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 && count == 16 {
        // SAFETY: the features were found; every w has the rows.
        return unsafe { avx512::sum(parts, first) };
    }
    let mut sums = [0.0; 16];
    for (x, w) in parts {
        let rows = w[first * x.len()..].chunks_exact(x.len().max(1));
        sums[..count].iter_mut().zip(rows).for_each(|(sum, w)| *sum += portable(x, w));
    }
    sums
}

/// x[i] . w[j] at i * NR + j; all rows have one length.
fn tile<const MR: usize, const NR: usize>(x: [&[f32]; MR], w: [&[f32]; NR]) -> [f32; 16] {
    let k = x[0].len();
    assert!(MR * NR == 16 && x.iter().chain(&w).all(|row| row.len() == k), "rows of one length");
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        // SAFETY: the features were found, and every row has k elements.
        return unsafe { avx512::tile::<MR, NR>(x, w) };
    }
    std::array::from_fn(|id| portable(x[id / NR], w[id % NR]))
}

simd::multiversion! {
    fn portable(x: &[f32], w: &[f32]) -> f32 {
        simd::sums2(x, w, |a, b| [a * b])[0]
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    /// # Safety
    /// AVX-512 F is present; all rows have the length of the first.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn tile<const MR: usize, const NR: usize>(x: [&[f32]; MR], w: [&[f32]; NR]) -> [f32; 16] {
        let k = x[0].len();
        let mut acc = [_mm512_setzero_ps(); 16];
        let mut ws = [_mm512_setzero_ps(); NR];
        let mut at = 0;
        while at < k {
            let left = k - at;
            let mask = if left >= 16 { u16::MAX } else { (1 << left) - 1 };
            for j in 0..NR {
                // SAFETY: the mask covers elements at .. min(at + 16, k).
                ws[j] = unsafe { _mm512_maskz_loadu_ps(mask, w[j].as_ptr().add(at)) };
            }
            for i in 0..MR {
                // SAFETY: as above.
                let xs = unsafe { _mm512_maskz_loadu_ps(mask, x[i].as_ptr().add(at)) };
                for j in 0..NR {
                    acc[i * NR + j] = _mm512_fmadd_ps(xs, ws[j], acc[i * NR + j]);
                }
            }
            at += 16;
        }
        let mut out = [0.0; 16];
        // SAFETY: `out` is 64 bytes.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum_lanes(acc)) };
        out
    }

    /// # Safety
    /// AVX-512 F is present; every w has rows first .. first + 16 of the length of its x.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn sum(parts: &[(&[f32], &[f32])], first: usize) -> [f32; 16] {
        let mut acc = [_mm512_setzero_ps(); 16];
        for (x, w) in parts {
            let k = x.len();
            for at in (0..k).step_by(16) {
                let left = k - at;
                let mask = if left >= 16 { u16::MAX } else { (1 << left) - 1 };
                // SAFETY: the mask covers elements at .. min(at + 16, k), here and of each row below.
                unsafe {
                    let (xs, w) = (_mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)), w.as_ptr().add(first * k + at));
                    for j in 0..16 {
                        acc[j] = _mm512_fmadd_ps(xs, _mm512_maskz_loadu_ps(mask, w.add(j * k)), acc[j]);
                    }
                }
            }
        }
        let mut out = [0.0; 16];
        // SAFETY: `out` is 64 bytes.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum_lanes(acc)) };
        out
    }

    /// Lane l of the result is the sum of the lanes of `acc[l]`: all sixteen at once cost as much as two alone.
    #[target_feature(enable = "avx512f,avx512dq")]
    fn sum_lanes(acc: [__m512; 16]) -> __m512 {
        let half = |a: __m512, b: __m512| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let quarter = |a: __m512, b: __m512| {
            let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
            let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
            _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
        };
        let lanes = |a: __m512, b: __m512| {
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
        };
        let four = |i: usize| quarter(half(acc[i], acc[i + 1]), half(acc[i + 2], acc[i + 3]));
        lanes(lanes(four(0), four(4)), lanes(four(8), four(12)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_of_tile() {
        for (m, n, k) in [(1, 1, 1), (1, 17, 31), (2, 9, 16), (3, 5, 33), (5, 6, 7), (9, 33, 100)] {
            let value = |i: usize| (i * 37 % 23) as f32 - 11.0;
            let x: Vec<f32> = (0..m * k).map(value).collect();
            let w: Vec<f32> = (0..n * k).map(|i| value(i + 5)).collect();
            let mut y = vec![f32::NAN; m * n];
            product(|i| &x[i * k..][..k], m, &w, n, &mut y);
            for (id, got) in y.iter().enumerate() {
                // Sums of small whole numbers are exact in any order.
                let want: f32 = (0..k).map(|c| x[id / n * k + c] * w[id % n * k + c]).sum();
                assert_eq!(*got, want, "{m} {n} {k} at {id}");
            }
        }
    }
}
