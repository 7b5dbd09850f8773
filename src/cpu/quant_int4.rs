//! CPU kernels of `ops/quant_int4.rs`, and the product of weight-only layers.

use super::gemm::{Product as Dense, View, gemm_threaded};
use super::matmul::floats;
use super::quant::{Scheme, extent_of};
use super::scratch::scratch;
use super::simd::{self, multiversion};
use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

/// Rows of x up to which each unpacked weight row is used from the first-level cache.
const FEW: usize = 4;
/// Weight rows unpacked at a time for many rows of x.
const STRIP: usize = 256;
/// Weight rows of one parallel task.
const TASK: usize = 64;

multiversion! {
    /// Weights of whole words that share one scale.
    fn unpack_group(words: &[u32], scale: f32, out: &mut [f32]) {
        for (out, &word) in out.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            for (b, out) in out.iter_mut().enumerate() {
                *out = ((word >> (4 * b) & 15) as i32 - 8) as f32 * scale;
            }
        }
    }

    fn dot(x: &[f32], w: &[f32]) -> f32 {
        simd::sums2(x, w, |a, b| [a * b])[0]
    }
}

/// One row of packed weights as f32.
fn unpack_row(words: &[u32], scales: &[f32], group: usize, out: &mut [f32]) {
    for ((words, &scale), out) in words.chunks(group / 8).zip(scales).zip(out.chunks_mut(group)) {
        unpack_group(words, scale, out);
    }
}

/// Parameters: count, group, scheme words.
pub fn pack_int4(args: &Args) -> Result<()> {
    float_kernel!(args, pack)
}

fn pack<T: Float>(args: &Args) -> Result<()> {
    let (group, scheme) = (args.u(1), Scheme::of(args));
    let w = args.read::<T>(0);
    let outputs = (args.write::<u32>(1), args.write::<f32>(2));
    args.rows2(outputs, (group / 8, 1), grain(group), |first, words, scales| {
        let groups = w[first * group..].chunks(group);
        for ((w, words), scale) in groups.zip(words.chunks_mut(group / 8)).zip(scales) {
            let grid = scheme.grid(extent_of(w));
            *scale = grid.scale;
            for (word, w) in words.iter_mut().zip(w.chunks(8)) {
                // NaN becomes level 0, as the cast has it.
                let nibble = |x: &T| (grid.level(x.load()) as i32 + 8) as u32;
                *word = w.iter().enumerate().fold(0, |word, (b, x)| word | nibble(x) << (4 * b));
            }
        }
    });
    Ok(())
}

/// Parameters: n, 1, k, group.
pub fn unpack_int4(args: &Args) -> Result<()> {
    let (k, group) = (args.u(2), args.u(3));
    let (packed, scales) = (args.read::<u32>(0), args.read::<f32>(1));
    args.rows(args.write::<f32>(2), k, grain(k), |first, w| {
        for (j, w) in (first..).zip(w.chunks_mut(k.max(1))) {
            unpack_row(&packed[j * k / 8..][..k / 8], &scales[j * (k / group)..][..k / group], group, w);
        }
    });
    Ok(())
}

/// Parameters: m, n, k, group, bias.
pub fn matmul_int4(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (k, group) = (args.u(2), args.u(3));
    let (packed, scales) = (args.read::<u32>(1), args.read::<f32>(2));
    product::<T>(args, &|j, out| {
        unpack_row(&packed[j * k / 8..][..k / 8], &scales[j * (k / group)..][..k / group], group, out);
    })
}

/// x W^T (+ bias) for weights whose row j `row` writes. Parameters: m, n, k, group, bias.
pub(super) fn product<T: Float>(args: &Args, row: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
    let [m, n, k] = [0, 1, 2].map(|i| args.u(i));
    let (mut wide_x, mut wide_bias) = (Vec::new(), Vec::new());
    let x = floats(args.read::<T>(0), &mut wide_x);
    let bias = (args.u(4) == 1).then(|| floats(args.read::<T>(3), &mut wide_bias));
    let y = args.write::<T>(args.len() - 1);
    if m <= FEW {
        // Transposed, so that tasks own whole columns of y.
        let mut columns = scratch::<f32>(n * m);
        args.rows(&mut columns, m, TASK, |first, out| {
            let mut w = scratch::<f32>(k);
            for (j, out) in (first..).zip(out.chunks_mut(m)) {
                row(j, &mut w);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = dot(&x[i * k..][..k], &w) + bias.map_or(0.0, |b| b[j]);
                }
            }
        });
        for (j, column) in columns.chunks(m.max(1)).enumerate() {
            column.iter().enumerate().for_each(|(i, &v)| y[i * n + j] = T::store(v));
        }
        return Ok(());
    }
    let mut dense = scratch::<f32>(STRIP.min(n) * k);
    for first in (0..n).step_by(STRIP) {
        let count = STRIP.min(n - first);
        let strip = &mut dense[..count * k];
        args.rows(strip, k, grain(k), |start, part| {
            for (j, w) in (first + start..).zip(part.chunks_mut(k.max(1))) {
                row(j, w);
            }
        });
        let bias = bias.map(|b| &b[first..first + count]);
        let product = Dense { bias, ..Dense::new([m, count, k], View::rows(x, k), View::transposed(strip, k)) };
        gemm_threaded(args, &product, &mut y[first..], n);
    }
    Ok(())
}
