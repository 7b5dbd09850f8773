//! CPU kernels of `ops/softmax.rs`.

use super::simd::{self, exp, largest, multiversion, sums, sums2, widened};
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Float};
use crate::error::Result;
/// A target of this value takes no part: loss 0, gradient 0.
pub const IGNORE: u32 = u32::MAX;

pub fn softmax(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

pub fn softmax_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

pub fn cross_entropy(args: &Args) -> Result<()> {
    float_kernel!(args, entropy)
}

pub fn cross_entropy_backward(args: &Args) -> Result<()> {
    float_kernel!(args, entropy_backward)
}

/// Elements whose maximum is taken before their exponentials are summed: they stay in the first-level cache.
const BLOCK: usize = 2048;

/// Maximum and sum of exp(scale x - maximum) of one row in one pass over memory, a block at a time.
#[inline(always)]
fn online(x: &[f32], scale: f32, state: (f32, f32)) -> (f32, f32) {
    let (mut most, mut sum) = state;
    for block in x.chunks(BLOCK) {
        let block_most = scale * largest(block);
        if block_most > most {
            sum *= exp(most - block_most);
            most = block_most;
        }
        sum += sums(block, |v| [exp(scale * v - most)])[0];
    }
    (most, sum)
}

multiversion! {
    /// Running (maximum, sum of exponentials) of `scale` times the elements seen so far, continued over `x`.
    /// `scale` is positive; a row starts from (f32::MIN, 0).
    pub(super) fn online_exp_sum(x: &[f32], scale: f32, state: (f32, f32)) -> (f32, f32) {
        online(x, scale, state)
    }

    fn softmax_row(x: &[f32], y: &mut [f32]) {
        let most = largest(x);
        // Blocks are summed on their own: one sum over a vocabulary would lose too many bits.
        let blocks = x.chunks(BLOCK).zip(y.chunks_mut(BLOCK));
        let total: f32 = blocks.map(|(x, y)| simd::map_sum(x, y, |v| exp(v - most))).sum();
        let factor = 1.0 / total;
        for y in y {
            *y *= factor;
        }
    }

    fn log_softmax_row(x: &[f32], y: &mut [f32]) {
        let (most, sum) = online(x, 1.0, (f32::MIN, 0.0));
        let log = sum.ln();
        for (y, x) in y.iter_mut().zip(x) {
            *y = (x - most) - log;
        }
    }

    fn softmax_row_backward(y: &[f32], dy: &[f32], dx: &mut [f32]) {
        let [total] = sums2(y, dy, |y, dy| [y * dy]);
        for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
            *dx = y * (dy - total);
        }
    }

    fn log_softmax_row_backward(y: &[f32], dy: &[f32], dx: &mut [f32]) {
        let [total] = sums(dy, |dy| [dy]);
        for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
            *dx = dy - exp(*y) * total;
        }
    }

    pub(super) fn row_sum(x: &[f32]) -> f32 {
        sums(x, |v| [v])[0]
    }

    /// dz = factor (exp(z - lse) - shift), in the place of z.
    pub(super) fn entropy_row_backward(lse: f32, factor: f32, shift: f32, z: &mut [f32]) {
        for z in z {
            *z = factor * (exp(*z - lse) - shift);
        }
    }
}

fn room<T: Float>(row: usize) -> Vec<f32> {
    vec![0.0; if T::DTYPE == DType::F32 { 0 } else { row }]
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    let (v, log) = (args.u(1), args.u(2) != 0);
    args.rows(y, v, grain(v), |first, y| {
        let (mut xs, mut ys) = (room::<T>(v), room::<T>(v));
        for (y, x) in y.chunks_exact_mut(v).zip(x[first * v..].chunks_exact(v)) {
            let x = widened(x, &mut xs);
            simd::write_row(y, &mut ys, |y| if log { log_softmax_row(x, y) } else { softmax_row(x, y) });
        }
    });
    Ok(())
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let (y, dy, dx) = (args.read::<T>(0), args.read::<T>(1), args.write::<T>(2));
    let (v, log) = (args.u(1), args.u(2) != 0);
    args.rows(dx, v, grain(v), |first, dx| {
        let (mut ys, mut dys, mut dxs) = (room::<T>(v), room::<T>(v), room::<T>(v));
        let rows = y[first * v..].chunks_exact(v).zip(dy[first * v..].chunks_exact(v));
        for (dx, (y, dy)) in dx.chunks_exact_mut(v).zip(rows) {
            let (y, dy) = (widened(y, &mut ys), widened(dy, &mut dys));
            simd::write_row(dx, &mut dxs, |dx| {
                if log { log_softmax_row_backward(y, dy, dx) } else { softmax_row_backward(y, dy, dx) }
            });
        }
    });
    Ok(())
}

fn entropy<T: Float>(args: &Args) -> Result<()> {
    let (z, targets) = (args.read::<T>(0), args.read::<u32>(1));
    let (loss, lse) = (args.write::<f32>(2), args.write::<f32>(3));
    let (v, smoothing) = (args.u(1), args.f(3));
    args.rows2((loss, lse), (1, 1), grain(v), |first, loss, lse| {
        let mut zs = room::<T>(v);
        for (offset, (loss, lse)) in loss.iter_mut().zip(lse).enumerate() {
            let row = first + offset;
            let target = targets[row];
            if target == IGNORE {
                (*loss, *lse) = (0.0, 0.0);
                continue;
            }
            let z = widened(&z[row * v..(row + 1) * v], &mut zs);
            let (most, sum) = online_exp_sum(z, 1.0, (f32::MIN, 0.0));
            *lse = most + sum.ln();
            let mean = if smoothing > 0.0 { row_sum(z) / v as f32 } else { 0.0 };
            let scored = z.get(target as usize).copied().unwrap_or(f32::NAN);
            *loss = *lse - (1.0 - smoothing) * scored - smoothing * mean;
        }
    });
    Ok(())
}

fn entropy_backward<T: Float>(args: &Args) -> Result<()> {
    let (z, targets) = (args.read::<T>(0), args.read::<u32>(1));
    let (lse, dloss, dz) = (args.read::<f32>(2), args.read::<f32>(3), args.write::<T>(4));
    let (v, smoothing) = (args.u(1), args.f(3));
    args.rows(dz, v, grain(v), |first, dz| {
        let mut dzs = room::<T>(v);
        for (offset, dz) in dz.chunks_exact_mut(v).enumerate() {
            let row = first + offset;
            let (target, factor) = (targets[row], dloss[row]);
            if target == IGNORE {
                dz.fill(T::store(0.0));
                continue;
            }
            simd::write_row(dz, &mut dzs, |dz| {
                simd::widen(&z[row * v..(row + 1) * v], dz);
                entropy_row_backward(lse[row], factor, smoothing / v as f32, dz);
                if let Some(dz) = dz.get_mut(target as usize) {
                    *dz -= factor * (1.0 - smoothing);
                }
            });
        }
    });
    Ok(())
}
