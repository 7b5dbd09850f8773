//! CPU kernels of `ops/softmax.rs`.

use super::simd::{self, LANES, add_terms, exp, fold_lanes, largest, last_block, multiversion, sums, sums2, widened};
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

/// Elements of a row that are looked at together: they stay in the first-level cache.
pub(super) const BLOCK: usize = 2048;

/// Elements whose maxima are taken before their exponentials are summed: few enough for the processor to be fetching the
/// next ones meanwhile.
const PART: usize = 16 * LANES;

/// Maximum and sum of exp(scale x - maximum) of one row in one pass over memory. Every lane has a maximum of its own until
/// the end, and sums a part on its own: one sum over a vocabulary would lose too many bits.
#[inline(always)]
fn online(x: &[f32], scale: f32, (most, sum): (f32, f32)) -> (f32, f32) {
    let pick = |a: f32, b: f32| if b > a { b } else { a };
    let (mut high, mut total) = ([most; LANES], [0.0f32; LANES]);
    total[0] = sum;
    for part in x.chunks(PART) {
        let (blocks, tail) = part.as_chunks::<LANES>();
        let mut room = [0.0; LANES];
        let last = (!tail.is_empty()).then(|| last_block(part, &mut room));
        let mut next = high;
        for x in blocks {
            for l in 0..LANES {
                next[l] = pick(next[l], scale * x[l]);
            }
        }
        if let Some(x) = last {
            for l in 0..LANES {
                next[l] = pick(next[l], scale * x[l]);
            }
        }
        let mut sums = [[0.0; LANES]];
        for x in blocks {
            add_terms(&mut sums, 0, |l| [exp(x[l].mul_add(scale, -next[l]))]);
        }
        if let Some(x) = last {
            add_terms(&mut sums, LANES - tail.len(), |l| [exp(x[l].mul_add(scale, -next[l]))]);
        }
        for l in 0..LANES {
            total[l] = total[l].mul_add(exp(high[l] - next[l]), sums[0][l]);
        }
        high = next;
    }
    let most = fold_lanes(high, pick);
    for l in 0..LANES {
        total[l] *= exp(high[l] - most);
    }
    (most, fold_lanes(total, |a, b| a + b))
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
        let mut total = 0.0;
        for (x, y) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)) {
            total += simd::map_sum(x, y, |v| exp(v - most));
        }
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

    /// dz = factor (exp(z - lse) - shift).
    pub(super) fn entropy_slopes(z: &[f32], lse: f32, factor: f32, shift: f32, dz: &mut [f32]) {
        for (dz, z) in dz.iter_mut().zip(z) {
            *dz = factor * (exp(z - lse) - shift);
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
    let shift = smoothing / v as f32;
    args.rows(dz, v, grain(v), |first, dz| {
        let (mut zs, mut dzs) = (room::<T>(BLOCK), room::<T>(BLOCK));
        for (offset, dz) in dz.chunks_exact_mut(v).enumerate() {
            let row = first + offset;
            let (target, factor) = (targets[row], dloss[row]);
            if target == IGNORE {
                dz.fill(T::store(0.0));
                continue;
            }
            let blocks = z[row * v..(row + 1) * v].chunks(BLOCK).zip(dz.chunks_mut(BLOCK));
            for (block, (z, dz)) in blocks.enumerate() {
                let z = widened(z, &mut zs);
                simd::write_row(dz, &mut dzs, |dz| {
                    entropy_slopes(z, lse[row], factor, shift, dz);
                    if let Some(dz) = (target as usize).checked_sub(block * BLOCK).and_then(|j| dz.get_mut(j)) {
                        *dz -= factor * (1.0 - smoothing);
                    }
                });
            }
        }
    });
    Ok(())
}
