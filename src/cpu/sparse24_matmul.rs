//! CPU kernels of `ops/sparse24_matmul.rs`.
//!
//! With AVX-512 weights are never expanded: half of the dense product's multiply-adds remain (`sparse24_matmul/lanes.rs`). Elsewhere
//! strips of weights are expanded into the cache and multiplied by the dense kernel. Both give the bits of the dense product of
//! finite inputs that are widened to f32 (a dropped weight times an infinity is NaN where it is multiplied).

#[cfg(target_arch = "x86_64")]
mod lanes;

use super::gemm::{Product as Dense, View, gemm_threaded};
use super::int8::{Product, Weights};
use super::matmul::floats;
use super::scratch::scratch;
use super::sparse24::expand_row;
use super::{Args, float_kernel, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Weight rows expanded at a time: with 768 columns 0.8 MB, in the second-level cache.
const STRIP: usize = 256;

/// A compressed weight, with its bias.
struct Compressed<'a, T> {
    values: &'a [T],
    meta: &'a [u32],
    bias: Option<&'a [f32]>,
    n: usize,
    k: usize,
}

impl<'a, T> Compressed<'a, T> {
    /// The kept values of row j.
    fn values(&self, j: usize) -> &'a [T] {
        &self.values[j * self.k / 2..][..self.k / 2]
    }

    /// The places of row j.
    fn meta(&self, j: usize) -> &'a [u32] {
        let words = self.k.div_ceil(32);
        &self.meta[j * words..][..words]
    }
}

/// Parameters: m, n, k, bias.
pub fn matmul_sparse24(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let [m, n, k] = [0, 1, 2].map(|i| args.u(i));
    let (x, mut wide_bias) = (args.read::<T>(0), Vec::new());
    let bias = (args.u(3) == 1).then(|| floats(args.read::<T>(3), &mut wide_bias));
    let w = Compressed { values: args.read::<T>(1), meta: args.read(2), bias, n, k };
    let y = args.write::<T>(args.len() - 1);
    if m == 0 || n == 0 {
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        let mut wide = scratch::<f32>(if T::DTYPE == DType::F32 { 0 } else { x.len() });
        lanes::run(args, simd::widened(x, &mut wide), m, &w, y);
        return Ok(());
    }
    expanded(args, x, m, &w, y);
    Ok(())
}

/// The dense product with strips of expanded weights.
fn expanded<T: Float>(args: &Args, x: &[T], m: usize, w: &Compressed<T>, y: &mut [T]) {
    let (n, k) = (w.n, w.k);
    let mut dense = scratch::<T>(STRIP.min(n) * k);
    for first in (0..n).step_by(STRIP) {
        let count = STRIP.min(n - first);
        let strip = &mut dense[..count * k];
        args.rows(strip, k, super::grain(k), |row, part| {
            for (j, out) in (first + row..).zip(part.chunks_mut(k.max(1))) {
                expand_row(w.values(j), w.meta(j), out);
            }
        });
        let bias = w.bias.map(|b| &b[first..first + count]);
        let product = Dense { bias, ..Dense::new([m, count, k], View::rows(x, k), View::transposed(strip, k)) };
        gemm_threaded(args, &product, &mut y[first..], n);
    }
}

/// Parameters: m, n, k, bias.
pub fn matmul_sparse24_int8(args: &Args) -> Result<()> {
    let bias = (args.u(3) == 1).then(|| args.read::<f32>(5));
    let product = Product {
        x: args.read(0),
        x_scale: args.read(1),
        x_sums: &[],
        w: Weights::Sparse24 { values: args.read(2), meta: args.read(3) },
        w_scale: args.read(4),
        bias,
        relu: false,
        m: args.u(0),
        n: args.u(1),
        k: args.u(2),
    };
    product.run(args, args.write(args.len() - 1));
    Ok(())
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn same_bits<T: Float>([m, n, k]: [usize; 3]) {
        let mut stream = Stream::new((m * n * k) as u64, 0);
        let mut normal = |count: usize| -> Vec<f32> { (0..count).map(|_| stream.normal() as f32).collect() };
        let mut store = |count: usize| -> Vec<T> { normal(count).into_iter().map(T::store).collect() };
        let (x, values) = (store(m * k), store(n * k / 2));
        let bias = normal(n);
        let nibbles = [0x4, 0x8, 0xc, 0x9, 0xd, 0xe];
        let mut word = || (0..8).fold(0, |w, i| w | nibbles[stream.below(6)] << (4 * i));
        let meta: Vec<u32> = (0..n * k.div_ceil(32)).map(|_| word()).collect();
        let w = Compressed { values: &values, meta: &meta, bias: (n % 2 == 0).then_some(&bias), n, k };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let args = Args::new(&[], T::DTYPE, &pool);
        let (mut wide, mut wide_values) = (vec![0.0; m * k], vec![0.0; n * k / 2]);
        simd::widen(&x, &mut wide);
        simd::widen(&values, &mut wide_values);
        let mut want = vec![f32::NAN; m * n];
        expanded(&args, &wide, m, &Compressed { values: &wide_values, meta: &meta, bias: w.bias, n, k }, &mut want);
        let mut got = vec![T::store(f32::NAN); m * n];
        lanes::run(&args, &wide, m, &w, &mut got);
        for (id, (got, want)) in got.iter().zip(&want).enumerate() {
            let want = T::store(*want).load();
            assert_eq!(got.load().to_bits(), want.to_bits(), "{m} {n} {k} {} at {id}", T::DTYPE);
        }
    }

    #[test]
    fn the_product_has_the_bits_of_the_dense_one() {
        if simd::level() != simd::Level::Avx512 {
            return;
        }
        // Every size of tile; one, two and three blocks along k, whole and ragged.
        for m in [1, 2, 3, 4, 7, 33] {
            for (n, k) in [(1, 4), (16, 36), (17, 128), (33, 132), (64, 512), (63, 516), (130, 1060)] {
                same_bits::<f32>([m, n, k]);
                same_bits::<half::bf16>([m, n, k]);
            }
        }
        same_bits::<half::f16>([9, 100, 260]);
        same_bits::<f32>([130, 200, 1536]);
    }
}
