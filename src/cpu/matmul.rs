//! CPU kernel of `ops/matmul.rs`.

use super::gemm::{Activation, Product, View, gemm, gemm_threaded};
use super::{Args, float_kernel, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub fn matmul(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

/// Multiply-adds per parallel task of a batch of small products.
const TASK: usize = 1 << 20;

fn forward<T: Float>(args: &Args) -> Result<()> {
    let [m, n, k, batch] = [0, 1, 2, 3].map(|i| args.u(i));
    let activation = match args.u(10) {
        1 => Activation::Relu,
        2 => Activation::Gelu,
        _ => Activation::None,
    };
    let steps: [usize; 6] = std::array::from_fn(|i| args.u(4 + i));
    let (has_bias, accumulate) = (args.u(11) == 1, args.u(12) == 1);
    let (a, b) = (args.read::<T>(0), args.read::<T>(1));
    let mut widened = Vec::new();
    let bias = has_bias.then(|| floats(args.read::<T>(2), &mut widened));
    let c = args.write::<T>(args.len() - 1);
    let product = move |g: usize| {
        let a = View { data: a.get(g * steps[0]..).unwrap_or(&[]), row: steps[1], column: steps[2] };
        let b = View { data: b.get(g * steps[3]..).unwrap_or(&[]), row: steps[4], column: steps[5] };
        Product { accumulate, bias, activation, ..Product::new([m, n, k], a, b) }
    };
    let size = m * n;
    if batch < 2 * args.threads() {
        for (g, c) in c.chunks_mut(size.max(1)).enumerate() {
            gemm_threaded(args, &product(g), c, n);
        }
    } else {
        args.rows(c, size, (TASK / (size * k).max(1)).max(1), |first, part| {
            for (g, c) in part.chunks_mut(size.max(1)).enumerate() {
                gemm(&product(first + g), c, n);
            }
        });
    }
    Ok(())
}

/// A row as f32: the memory itself, or a copy in `buffer`.
pub(super) fn floats<'a, T: Float>(row: &'a [T], buffer: &'a mut Vec<f32>) -> &'a [f32] {
    if T::DTYPE != DType::F32 {
        buffer.resize(row.len(), 0.0);
    }
    simd::widened(row, buffer)
}
