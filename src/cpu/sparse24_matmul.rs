//! CPU kernels of `ops/sparse24_matmul.rs`.
//!
//! For few rows the product is bound by reading the weights, so they are read compressed and expanded in registers
//! (`vexpandps` with masks made from meta). For many rows strips of weights are expanded into the cache and multiplied
//! by the dense kernel.

use super::gemm::{Product as Dense, View, gemm_threaded};
use super::int8::{self, Product, Weights};
use super::matmul::floats;
use super::sparse24::{expand_row, places};
use super::{Args, float_kernel, simd};
use crate::dtype::Float;
use crate::error::Result;

/// Rows up to which weights are expanded in registers.
const FEW: usize = 8;
/// Weight rows expanded at a time for many rows: with 768 columns 0.8 MB, in the second-level cache.
const STRIP: usize = 256;
/// Weight rows of one parallel task.
const TASK: usize = 128;

/// Parameters: m, n, k, bias.
pub fn matmul_sparse24(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let [m, n, k] = [0, 1, 2].map(|i| args.u(i));
    let (x, values, meta) = (args.read::<T>(0), args.read::<T>(1), args.read::<u32>(2));
    let (mut wide_x, mut wide_bias) = (Vec::new(), Vec::new());
    let bias = (args.u(3) == 1).then(|| floats(args.read::<T>(3), &mut wide_bias));
    let y = args.write::<T>(args.len() - 1);
    let words = k.div_ceil(32);
    if m <= FEW {
        let rows = Few { x: floats(x, &mut wide_x), values, meta, bias, n, k };
        let mut columns = vec![0.0; n * m];
        // One weight row makes m neighbours of the transposed result: tasks own whole columns of y.
        let work = |first: usize, out: &mut [f32]| rows.run(first, m, out);
        args.rows(&mut columns, m, TASK, work);
        for (j, column) in columns.chunks(m).enumerate() {
            column.iter().enumerate().for_each(|(i, &v)| y[i * n + j] = T::store(v));
        }
        return Ok(());
    }
    let mut dense = vec![T::zeroed(); STRIP.min(n) * k];
    for first in (0..n).step_by(STRIP) {
        let count = STRIP.min(n - first);
        let strip = &mut dense[..count * k];
        args.rows(strip, k, super::grain(k), |row, part| {
            for (j, w) in (first + row..).zip(part.chunks_mut(k)) {
                expand_row(&values[j * k / 2..][..k / 2], &meta[j * words..][..words], w);
            }
        });
        let bias = bias.map(|b| &b[first..first + count]);
        let product = Dense { bias, ..Dense::new([m, count, k], View::rows(x, k), View::transposed(strip, k)) };
        gemm_threaded(args, &product, &mut y[first..], n);
    }
    Ok(())
}

/// Few rows of x against compressed weights.
struct Few<'a, T> {
    x: &'a [f32],
    values: &'a [T],
    meta: &'a [u32],
    bias: Option<&'a [f32]>,
    n: usize,
    k: usize,
}

impl<T: Float> Few<'_, T> {
    /// out[j * m + i] = y[i, first + j].
    fn run(&self, first: usize, m: usize, out: &mut [f32]) {
        let last = first + out.len() / m;
        let mut i = 0;
        while i < m {
            let step = match m - i {
                1 => self.block::<1, 8>(first..last, i, m, out),
                2 | 3 => self.block::<2, 8>(first..last, i, m, out),
                _ => self.block::<4, 4>(first..last, i, m, out),
            };
            i += step;
        }
    }

    fn block<const MR: usize, const NR: usize>(
        &self,
        columns: std::ops::Range<usize>,
        i: usize,
        m: usize,
        out: &mut [f32],
    ) -> usize {
        let (k, words) = (self.k, self.k.div_ceil(32));
        let x: [&[f32]; MR] = std::array::from_fn(|r| &self.x[(i + r) * k..][..k]);
        for j in columns.clone().step_by(NR) {
            // Tiles that reach over the edge repeat the last column; what that makes is not stored.
            let at = |c: usize| (j + c).min(self.n - 1);
            let values: [&[T]; NR] = std::array::from_fn(|c| &self.values[at(c) * k / 2..][..k / 2]);
            let meta: [&[u32]; NR] = std::array::from_fn(|c| &self.meta[at(c) * words..][..words]);
            let sums = tile(x, values, meta);
            for c in 0..NR.min(columns.end - j) {
                for r in 0..MR {
                    let bias = self.bias.map_or(0.0, |b| b[j + c]);
                    out[(j + c - columns.start) * m + i + r] = sums[r][c] + bias;
                }
            }
        }
        MR
    }
}

/// x[i] . w[j] with w[j] compressed; every x row has k elements, every values row k/2, every meta row ceil(k/32).
fn tile<T: Float, const MR: usize, const NR: usize>(
    x: [&[f32]; MR],
    values: [&[T]; NR],
    meta: [&[u32]; NR],
) -> [[f32; NR]; MR] {
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        let k = x[0].len();
        let fits = x.iter().all(|x| x.len() == k)
            && values.iter().all(|v| v.len() >= k / 2)
            && meta.iter().all(|m| m.len() >= k.div_ceil(32));
        assert!(fits, "rows of one length");
        // SAFETY: the features were found; the rows have the lengths that the tile reads.
        return unsafe { expand::tile(x, values, meta) };
    }
    std::array::from_fn(|i| std::array::from_fn(|j| gathered(x[i], values[j], meta[j], 0)))
}

/// The product from group `first` on, by gathering from x.
fn gathered<T: Float>(x: &[f32], values: &[T], meta: &[u32], first: usize) -> f32 {
    let mut sum = 0.0;
    for group in first..x.len() / 4 {
        let [a, b] = places(meta, group);
        sum += values[2 * group].load() * x[4 * group + a] + values[2 * group + 1].load() * x[4 * group + b];
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod expand {
    use std::arch::x86_64::*;

    use super::gathered;
    use crate::dtype::{DType, Float};
    use crate::sparse24::column_bits;

    /// Eight values as f32 in the low half.
    ///
    /// # Safety
    /// AVX-512 F and F16C are present; `p` starts eight elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    #[inline]
    unsafe fn load8<T: Float>(p: *const T) -> __m512 {
        // SAFETY: eight elements of T's size are read.
        let low = unsafe {
            match T::DTYPE {
                DType::F32 => _mm256_loadu_ps(p.cast()),
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
            }
        };
        _mm512_zextps256_ps512(low)
    }

    /// # Safety
    /// The features are present; x rows have k elements, values k/2, meta ceil(k/32), k a multiple of 4.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    #[allow(clippy::needless_range_loop)] // the index names the register
    pub(super) unsafe fn tile<T: Float, const MR: usize, const NR: usize>(
        x: [&[f32]; MR],
        values: [&[T]; NR],
        meta: [&[u32]; NR],
    ) -> [[f32; NR]; MR] {
        let k = x[0].len();
        let mut acc = [[_mm512_setzero_ps(); NR]; MR];
        let mut at = 0;
        // 64 columns: two words of meta, four registers of weights.
        while at + 64 <= k {
            for j in 0..NR {
                // SAFETY: words at/32 and at/32 + 1 exist.
                let bits = column_bits(unsafe { meta[j].as_ptr().add(at / 32).cast::<u64>().read_unaligned() });
                for q in 0..4 {
                    // SAFETY: values at/2 + 8q .. + 8 and columns at + 16q .. + 16 exist.
                    unsafe {
                        let pair = load8(values[j].as_ptr().add(at / 2 + 8 * q));
                        let w = _mm512_maskz_expand_ps((bits >> (16 * q)) as u16, pair);
                        for i in 0..MR {
                            acc[i][j] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x[i].as_ptr().add(at + 16 * q)), acc[i][j]);
                        }
                    }
                }
            }
            at += 64;
        }
        let mut sums = [[0.0; NR]; MR];
        for i in 0..MR {
            for j in 0..NR {
                sums[i][j] = _mm512_reduce_add_ps(acc[i][j]) + gathered(x[i], values[j], meta[j], at / 4);
            }
        }
        sums
    }
}

/// Parameters: m, n, k, bias.
pub fn matmul_sparse24_int8(args: &Args) -> Result<()> {
    let bias = (args.u(3) == 1).then(|| args.read::<f32>(5));
    let (x, x_sums) = (args.read(0), int8::sums(args.read(0), args.u(2)));
    let product = Product {
        x,
        x_scale: args.read(1),
        x_sums: &x_sums,
        w: Weights::Sparse24 { values: args.read(2), meta: args.read(3) },
        w_scale: args.read(4),
        bias,
        relu: false,
        m: args.u(0),
        n: args.u(1),
        k: args.u(2),
    };
    product.run(args, |i| i, args.write(args.len() - 1));
    Ok(())
}
