//! CPU kernels of `ops/norm.rs`.

use super::scratch::{Scratch, zeros};
use super::simd::{self, multiversion, narrow, sums, sums3, widened};
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Float};
use crate::error::Result;
/// Rows per partial sum of dweight and dbias.
pub const CHUNK: usize = 64;

pub fn layernorm(args: &Args) -> Result<()> {
    float_kernel!(args, layer)
}

pub fn rmsnorm(args: &Args) -> Result<()> {
    float_kernel!(args, rms)
}

pub fn add_layernorm(args: &Args) -> Result<()> {
    float_kernel!(args, add_layer)
}

pub fn add_rmsnorm(args: &Args) -> Result<()> {
    float_kernel!(args, add_rms)
}

pub fn norm_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

pub fn add_norm_backward(args: &Args) -> Result<()> {
    float_kernel!(args, add_backward)
}

multiversion! {
    /// y of one row; gives mean and rstd. Without a bias it is RMS normalisation: mean 0.
    fn normalise(x: &[f32], weight: &[f32], bias: Option<&[f32]>, epsilon: f32, y: &mut [f32]) -> (f32, f32) {
        let d = x.len() as f32;
        let mean = if bias.is_some() { sums(x, |v| [v])[0] / d } else { 0.0 };
        let squares = sums(x, |v| [(v - mean) * (v - mean)])[0];
        let rstd = 1.0 / (squares / d + epsilon).sqrt();
        match bias {
            Some(bias) => {
                for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                    *y = (x - mean) * rstd * w + b;
                }
            }
            None => {
                for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * rstd * w;
                }
            }
        }
        (mean, rstd)
    }

    fn add_scaled(x: &[f32], r: &[f32], scale: f32, h: &mut [f32]) {
        for ((h, x), r) in h.iter_mut().zip(x).zip(r) {
            *h = x + scale * r;
        }
    }

    /// dx of one row, and the row's share of dweight and dbias added to theirs.
    fn row_backward(
        x: &[f32], weight: &[f32], dy: &[f32], mean: f32, rstd: f32, rms: bool, dx: &mut [f32], dweight: &mut [f32], dbias: &mut [f32],
    ) {
        let d = x.len() as f32;
        let [g, gn] = sums3(x, weight, dy, |x, w, dy| [dy * w, dy * w * ((x - mean) * rstd)]);
        let (g, gn) = (if rms { 0.0 } else { g / d }, gn / d);
        let sums = dweight.iter_mut().zip(dbias);
        for ((((dx, x), w), dy), (dweight, dbias)) in dx.iter_mut().zip(x).zip(weight).zip(dy).zip(sums) {
            let n = (x - mean) * rstd;
            *dx = rstd * (dy * w - g - n * gn);
            *dweight += dy * n;
            *dbias += dy;
        }
    }

    fn add_to(sum: &mut [f32], x: &[f32]) {
        for (s, x) in sum.iter_mut().zip(x) {
            *s += x;
        }
    }

    fn scaled(x: &[f32], scale: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = scale * x;
        }
    }
}

/// f32 room for one row of a type: none where the storage is f32 itself.
fn room<T: Float>(row: usize) -> Vec<f32> {
    vec![0.0; if T::DTYPE == DType::F32 { 0 } else { row }]
}

fn layer<T: Float>(args: &Args) -> Result<()> {
    let (x, weight, bias) = (args.read::<T>(0), args.read::<T>(1), args.read::<T>(2));
    let (y, mean, rstd) = (args.write::<T>(3), args.write::<f32>(4), args.write::<f32>(5));
    forward(args, x, weight, Some(bias), (y, Some(mean), rstd));
    Ok(())
}

fn rms<T: Float>(args: &Args) -> Result<()> {
    let (x, weight) = (args.read::<T>(0), args.read::<T>(1));
    forward(args, x, weight, None, (args.write::<T>(2), None, args.write::<f32>(3)));
    Ok(())
}

type Outputs<'o, T> = (&'o mut [T], Option<&'o mut [f32]>, &'o mut [f32]);

fn forward<T: Float>(args: &Args, x: &[T], weight: &[T], bias: Option<&[T]>, (y, mean, rstd): Outputs<T>) {
    let (d, epsilon) = (args.u(1), args.f(2));
    let rows = grain(d);
    // RMS normalisation has no mean to write: its chunks are then never looked at.
    let mut means = mean.map(|m| m.chunks_mut(rows));
    let parts = y
        .chunks_mut(rows * d)
        .zip(rstd.chunks_mut(rows))
        .map(|(y, rstd)| (y, rstd, means.as_mut().and_then(Iterator::next)));
    args.parts(parts, |index, (y, rstd, mut mean)| {
        let (mut xs, mut ys, mut ws, mut bs) = (room::<T>(d), room::<T>(d), room::<T>(d), room::<T>(d));
        let weight = widened(weight, &mut ws);
        let bias = bias.map(|b| widened(b, &mut bs));
        let x = &x[index * rows * d..];
        for (row, (y, x)) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
            let x = widened(x, &mut xs);
            simd::write_row(y, &mut ys, |y| {
                let (m, r) = normalise(x, weight, bias, epsilon, y);
                rstd[row] = r;
                if let Some(mean) = mean.as_deref_mut() {
                    mean[row] = m;
                }
            });
        }
    });
}

fn add_layer<T: Float>(args: &Args) -> Result<()> {
    let inputs = [args.read::<T>(0), args.read::<T>(1), args.read::<T>(2), args.read::<T>(3)];
    let outputs = (args.write::<T>(4), args.write::<T>(5));
    add_forward(args, &inputs, outputs, (Some(args.write::<f32>(6)), args.write::<f32>(7)));
    Ok(())
}

fn add_rms<T: Float>(args: &Args) -> Result<()> {
    let inputs = [args.read::<T>(0), args.read::<T>(1), args.read::<T>(2)];
    let outputs = (args.write::<T>(3), args.write::<T>(4));
    add_forward(args, &inputs, outputs, (None, args.write::<f32>(5)));
    Ok(())
}

/// `inputs`: x, r, weight and, for layer normalisation, bias.
fn add_forward<T: Float>(
    args: &Args,
    inputs: &[&[T]],
    (y, h): (&mut [T], &mut [T]),
    (mean, rstd): (Option<&mut [f32]>, &mut [f32]),
) {
    let (d, epsilon, scale) = (args.u(1), args.f(2), args.f(3));
    let rows = grain(d);
    let mut means = mean.map(|m| m.chunks_mut(rows));
    let outputs = y.chunks_mut(rows * d).zip(h.chunks_mut(rows * d)).zip(rstd.chunks_mut(rows));
    let parts = outputs.map(|((y, h), rstd)| (y, h, rstd, means.as_mut().and_then(Iterator::next)));
    args.parts(parts, |index, (y, h, rstd, mut mean)| {
        let (mut xs, mut rs, mut ys) = (room::<T>(d), room::<T>(d), room::<T>(d));
        let (mut ws, mut bs, mut sum) = (room::<T>(d), room::<T>(d), vec![0.0; d]);
        let weight = widened(inputs[2], &mut ws);
        let bias = inputs.get(3).map(|b| widened(b, &mut bs));
        let first = index * rows * d;
        let ins = inputs[0][first..].chunks_exact(d).zip(inputs[1][first..].chunks_exact(d));
        let outs = y.chunks_exact_mut(d).zip(h.chunks_exact_mut(d));
        for (row, ((y, h), (x, r))) in outs.zip(ins).enumerate() {
            // y is made of the sum before it is rounded to storage.
            add_scaled(widened(x, &mut xs), widened(r, &mut rs), scale, &mut sum);
            narrow(&sum, h);
            simd::write_row(y, &mut ys, |y| {
                let (m, r) = normalise(&sum, weight, bias, epsilon, y);
                rstd[row] = r;
                if let Some(mean) = mean.as_deref_mut() {
                    mean[row] = m;
                }
            });
        }
    });
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let partial = gradients(args, args.write::<T>(5), None, None);
    totals(&partial, args.write::<T>(6), args.write::<T>(7));
    Ok(())
}

fn add_backward<T: Float>(args: &Args) -> Result<()> {
    let dh = if args.u(5) != 0 { Some(args.read::<T>(5)) } else { None };
    let partial = gradients(args, args.write::<T>(6), Some(args.write::<T>(7)), dh);
    totals(&partial, args.write::<T>(8), args.write::<T>(9));
    Ok(())
}

/// Writes dx (and dr); gives per chunk of rows the sums for dweight, then those for dbias.
fn gradients<T: Float>(args: &Args, dx: &mut [T], dr: Option<&mut [T]>, dh: Option<&[T]>) -> Scratch<f32> {
    let (x, weight, dy) = (args.read::<T>(0), args.read::<T>(1), args.read::<T>(4));
    let (mean, rstd) = (args.read::<f32>(2), args.read::<f32>(3));
    let (d, scale, rms) = (args.u(1), args.f(3), args.u(4) != 0);
    let mut partial = zeros::<f32>(rstd.len().div_ceil(CHUNK) * 2 * d);
    let mut drs = dr.map(|dr| dr.chunks_mut(CHUNK * d));
    let parts = dx.chunks_mut(CHUNK * d).zip(partial.chunks_mut(2 * d));
    let parts = parts.map(|(dx, sums)| (dx, sums, drs.as_mut().and_then(Iterator::next)));
    args.parts(parts, |index, (dx, sums, mut dr)| {
        let (mut xs, mut ys, mut ws, mut hs) = (room::<T>(d), room::<T>(d), room::<T>(d), room::<T>(d));
        let (weight, mut values, mut scaled_values) = (widened(weight, &mut ws), vec![0.0; d], room::<T>(d));
        let (dweight, dbias) = sums.split_at_mut(d);
        for (offset, dx) in dx.chunks_exact_mut(d).enumerate() {
            let row = index * CHUNK + offset;
            let at = row * d..(row + 1) * d;
            let (x, dy) = (widened(&x[at.clone()], &mut xs), widened(&dy[at.clone()], &mut ys));
            let mean = if rms { 0.0 } else { mean[row] };
            row_backward(x, weight, dy, mean, rstd[row], rms, &mut values, dweight, dbias);
            if let Some(dh) = dh {
                add_to(&mut values, widened(&dh[at], &mut hs));
            }
            narrow(&values, dx);
            if let Some(dr) = dr.as_deref_mut() {
                let dr = &mut dr[offset * d..(offset + 1) * d];
                simd::write_row(dr, &mut scaled_values, |dr| scaled(&values, scale, dr));
            }
        }
    });
    partial
}

/// The chunks' sums, added in order.
fn totals<T: Float>(partial: &[f32], dweight: &mut [T], dbias: &mut [T]) {
    let d = dweight.len();
    let mut total = vec![0.0; 2 * d];
    partial.chunks_exact(2 * d).for_each(|p| add_to(&mut total, p));
    narrow(&total[..d], dweight);
    narrow(&total[d..], dbias);
}
