//! CPU kernels of `ops/binary.rs`.

use super::simd::{self, multiversion};
use super::{Args, float_kernel};
use crate::dtype::Float;
use crate::error::Result;

/// Elements handled at a time: widened blocks of all three operands stay in the first-level cache.
const BLOCK: usize = 1024;
/// Elements per parallel chunk: below this one thread is done before another would have woken up.
const GRAIN: usize = 64 * BLOCK;

multiversion! {
    fn add(a: &[f32], b: &[f32], y: &mut [f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    }

    fn sub(a: &[f32], b: &[f32], y: &mut [f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a - b;
        }
    }

    fn mul(a: &[f32], b: &[f32], y: &mut [f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a * b;
        }
    }

    fn axpy(factor: f32, x: &[f32], target: &mut [f32]) {
        for (t, x) in target.iter_mut().zip(x) {
            *t += factor * x;
        }
    }
}

/// Parameters: count, function, unused, period of b.
pub fn binary(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

/// Parameters: count, unused, unused, unused, factor.
pub fn accumulate_scaled(args: &Args) -> Result<()> {
    float_kernel!(args, accumulate)
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (a, b, y) = (args.read::<T>(0), args.read::<T>(1), args.write::<T>(2));
    let apply = match args.u(1) {
        0 => add,
        1 => sub,
        _ => mul,
    };
    if args.u(3) == a.len() {
        args.rows(y, 1, GRAIN, |first, chunk| {
            let (mut wide_a, mut wide_b, mut out) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
            for (c, y) in chunk.chunks_mut(BLOCK).enumerate() {
                let at = first + c * BLOCK;
                let range = at..at + y.len();
                let (a, b) = (simd::widened(&a[range.clone()], &mut wide_a), simd::widened(&b[range], &mut wide_b));
                simd::write_row(y, &mut out, |y| apply(a, b, y));
            }
        });
        return Ok(());
    }
    // A short row or a scalar is repeated to a whole block, so that the inner loop stays long.
    let repeats = (BLOCK / b.len().max(1)).max(1);
    let pattern: Vec<f32> = (0..repeats).flat_map(|_| b.iter().map(|x| x.load())).collect();
    let period = pattern.len();
    args.rows(y, period, (GRAIN / period).max(1), |first, chunk| {
        let (mut wide_a, mut out) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (r, row) in chunk.chunks_mut(period).enumerate() {
            for (c, y) in row.chunks_mut(BLOCK).enumerate() {
                let at = (first + r) * period + c * BLOCK;
                let a = simd::widened(&a[at..at + y.len()], &mut wide_a);
                simd::write_row(y, &mut out, |y| apply(a, &pattern[c * BLOCK..], y));
            }
        }
    });
    Ok(())
}

fn accumulate<T: Float>(args: &Args) -> Result<()> {
    let (target, x, factor) = (args.write::<T>(0), args.read::<T>(1), args.f(4));
    args.rows(target, 1, GRAIN, |first, chunk| {
        let (mut wide_x, mut wide) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (c, target) in chunk.chunks_mut(BLOCK).enumerate() {
            let at = first + c * BLOCK;
            let x = simd::widened(&x[at..at + target.len()], &mut wide_x);
            if T::DTYPE == crate::dtype::DType::F32 {
                axpy(factor, x, bytemuck::cast_slice_mut(target));
            } else {
                let values = &mut wide[..target.len()];
                simd::widen(target, values);
                axpy(factor, x, values);
                simd::narrow(values, target);
            }
        }
    });
    Ok(())
}
