//! CPU kernels of `ops/ffn.rs`: blocks of tokens go through both matrices while their hidden layer is in the cache.

use super::gemm::{Product, View, gelu, gemm, gemm_threaded};
use super::matmul::floats;
use super::scratch::{Scratch, scratch, zeros};
use super::{Args, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub fn ffn(args: &Args) -> Result<()> {
    match args.element {
        DType::F16 => forward::<half::f16, f32>(args),
        DType::Bf16 => forward::<half::bf16, half::bf16>(args),
        _ => forward::<f32, f32>(args),
    }
}

pub fn ffn_backward(args: &Args) -> Result<()> {
    match args.element {
        DType::F16 => backward::<half::f16, f32>(args),
        DType::Bf16 => backward::<half::bf16, half::bf16>(args),
        _ => backward::<f32, f32>(args),
    }
}

/// Tokens per block: long enough to pay for packing the weights again, short enough for the hidden layer of a block
/// (256 x 3072 f32 = 3 MB) to stay in the last-level cache. Fixed, because the sums over tokens follow it.
const BLOCK: usize = 256;

const RELU: usize = 0;
const GEGLU: usize = 2;

/// h from rows of z; z holds twice as many columns for GEGLU.
fn activate(kind: usize, z: &[f32], f: usize, h: &mut [f32]) {
    match kind {
        RELU => h.iter_mut().zip(z).for_each(|(h, z)| *h = if *z < 0.0 { 0.0 } else { *z }),
        GEGLU => h.chunks_exact_mut(f).zip(z.chunks_exact(2 * f)).for_each(|(h, z)| geglu_row(&z[..f], &z[f..], h)),
        _ => gelu_row(z, h),
    }
}

/// h and dz (over dh) from rows of z and dh.
fn slopes(kind: usize, z: &[f32], f: usize, dh: &[f32], h: &mut [f32], dz: &mut [f32]) {
    activate(kind, z, f, h);
    match kind {
        RELU => dz.iter_mut().zip(z).zip(dh).for_each(|((dz, z), dh)| *dz = if *z > 0.0 { *dh } else { 0.0 }),
        GEGLU => {
            let rows = dz.chunks_exact_mut(2 * f).zip(z.chunks_exact(2 * f)).zip(dh.chunks_exact(f));
            for ((dz, z), dh) in rows {
                let (dgate, dvalue) = dz.split_at_mut(f);
                geglu_slope_row(&z[..f], &z[f..], dh, dgate, dvalue);
            }
        }
        _ => gelu_slope_row(z, dh, dz),
    }
}

/// d gelu / dx with s = sigmoid(2 u): s + x s (1 - s) 2 u'.
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    let s = 1.0 / (1.0 + simd::exp(-2.0 * u));
    s + x * s * (1.0 - s) * (2.0 * 0.797_884_6) * (1.0 + 0.134_145 * x * x)
}

simd::multiversion! {
    fn gelu_row(z: &[f32], h: &mut [f32]) {
        h.iter_mut().zip(z).for_each(|(h, z)| *h = gelu(*z));
    }

    fn geglu_row(gate: &[f32], value: &[f32], h: &mut [f32]) {
        h.iter_mut().zip(gate).zip(value).for_each(|((h, g), v)| *h = gelu(*g) * v);
    }

    fn gelu_slope_row(z: &[f32], dh: &[f32], dz: &mut [f32]) {
        dz.iter_mut().zip(z).zip(dh).for_each(|((dz, z), dh)| *dz = dh * gelu_slope(*z));
    }

    fn geglu_slope_row(gate: &[f32], value: &[f32], dh: &[f32], dgate: &mut [f32], dvalue: &mut [f32]) {
        for ((o, g), (v, d)) in dgate.iter_mut().zip(gate).zip(value.iter().zip(dh)) {
            *o = d * v * gelu_slope(*g);
        }
        dvalue.iter_mut().zip(gate).zip(dh).for_each(|((o, g), d)| *o = d * gelu(*g));
    }

    fn add_row(sum: &mut [f32], row: &[f32]) {
        sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    }
}

/// `sum` += the rows of `x`, first to last.
fn add_rows(sum: &mut [f32], x: &[f32]) {
    if !sum.is_empty() {
        x.chunks_exact(sum.len()).for_each(|row| add_row(sum, row));
    }
}

/// H: what the layer between is multiplied as. Of two bf16 a product is twice as fast; f16 would be widened again.
fn forward<T: Float, H: Float>(args: &Args) -> Result<()> {
    let [rows, d, f, d2, kind] = [0, 1, 2, 3, 4].map(|i| args.u(i));
    let hidden = if kind == GEGLU { 2 * f } else { f };
    let (x, w1, w2) = (args.read::<T>(0), args.read::<T>(1), args.read::<T>(3));
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let (b1, b2) = (floats(args.read::<T>(2), &mut first), floats(args.read::<T>(4), &mut second));
    let (y, z) = (args.write::<T>(5), args.write::<T>(6));
    let up = |start: usize, rows: usize| {
        let product = Product::new([rows, hidden, d], View::rows(&x[start * d..], d), View::transposed(w1, d));
        Product { bias: Some(b1), ..product }
    };
    let down = |h: &[H], rows: usize, y: &mut [T], args: Option<&Args>| {
        let product =
            Product { bias: Some(b2), ..Product::new([rows, d2, f], View::rows(h, f), View::transposed(w2, f)) };
        match args {
            Some(args) => gemm_threaded(args, &product, y, d2),
            None => gemm(&product, y, d2),
        }
    };
    // Few blocks: threads share each product. Many: each block is a task of its own.
    if rows < BLOCK * args.threads() || f == 0 || d2 == 0 {
        let mut h = scratch::<H>(rows * f);
        simd::write_row(z, &mut room::<T>(rows * hidden), |z| {
            gemm_threaded(args, &up(0, rows), z, hidden);
            args.rows(&mut h, f, super::grain(f), |start, part| {
                let z = &z[start * hidden..][..part.len() / f.max(1) * hidden];
                simd::write_row(part, &mut room::<H>(part.len()), |h| activate(kind, z, f, h));
            });
        });
        down(&h, rows, y, Some(args));
        return Ok(());
    }
    args.rows2((y, z), (d2, hidden), BLOCK, |start, y, z| {
        let rows = BLOCK.min(rows - start);
        let mut h = scratch::<H>(rows * f);
        simd::write_row(z, &mut room::<T>(rows * hidden), |z| {
            gemm(&up(start, rows), z, hidden);
            simd::write_row(&mut h, &mut room::<H>(rows * f), |h| activate(kind, z, f, h));
        });
        down(&h, rows, y, None);
    });
    Ok(())
}

fn backward<T: Float, H: Float>(args: &Args) -> Result<()> {
    let [rows, d, f, d2, kind] = [0, 1, 2, 3, 4].map(|i| args.u(i));
    let hidden = if kind == GEGLU { 2 * f } else { f };
    let [x, w1, w2, z, dy] = [0, 1, 2, 3, 4].map(|i| args.read::<T>(i));
    let [dx, dw1, db1, dw2, db2] = [5, 6, 7, 8, 9].map(|i| args.write::<T>(i));
    // Weight gradients are summed over blocks in f32, in the output itself where that is its type.
    let (mut sum1, mut sum2) = (sums(dw1), sums(dw2));
    let (mut bias1, mut bias2) = (zeros::<f32>(hidden), zeros::<f32>(d2));
    let block = BLOCK.min(rows);
    let (mut h, mut dh) = (scratch::<H>(block * f), scratch::<f32>(block * f));
    let (mut dz, mut wide) = (scratch::<H>(block * hidden), scratch::<f32>(block * hidden.max(d2)));
    for start in (0..rows).step_by(BLOCK) {
        let rows = BLOCK.min(rows - start);
        let (x, dy) = (&x[start * d..][..rows * d], &dy[start * d2..][..rows * d2]);
        let (h, dh, dz) = (&mut h[..rows * f], &mut dh[..rows * f], &mut dz[..rows * hidden]);
        gemm_threaded(args, &Product::new([rows, f, d2], View::rows(dy, d2), View::rows(w2, f)), dh, f);
        let z = simd::widened(&z[start * hidden..][..rows * hidden], &mut wide);
        args.rows2((h, dz), (f, hidden), super::grain(f), |first, h, dz| {
            let (z, dh) = (&z[first * hidden..][..dz.len()], &dh[first * f..][..h.len()]);
            let (mut wide_h, mut wide_dz) = (room::<H>(h.len()), room::<H>(dz.len()));
            simd::write_row(h, &mut wide_h, |h| {
                simd::write_row(dz, &mut wide_dz, |dz| slopes(kind, z, f, dh, h, dz));
            });
        });
        let dx = &mut dx[start * d..][..rows * d];
        gemm_threaded(args, &Product::new([rows, d, hidden], View::rows(dz, hidden), View::rows(w1, d)), dx, d);
        let dz_turned = View::transposed(&*dz, hidden);
        let first = Product::new([hidden, d, rows], dz_turned, View::rows(x, d)).accumulate();
        gemm_threaded(args, &first, target(&mut sum1, dw1), d);
        let second = Product::new([d2, f, rows], View::transposed(dy, d2), View::rows(&*h, f)).accumulate();
        gemm_threaded(args, &second, target(&mut sum2, dw2), f);
        add_rows(&mut bias1, simd::widened(dz, &mut wide));
        add_rows(&mut bias2, simd::widened(dy, &mut wide));
    }
    if let Some(sums) = sum1 {
        simd::narrow(&sums, dw1);
    }
    if let Some(sums) = sum2 {
        simd::narrow(&sums, dw2);
    }
    simd::narrow(&bias1, db1);
    simd::narrow(&bias2, db2);
    Ok(())
}

/// Room for f32 values of an output that is stored in 16 bits.
fn room<T: Float>(len: usize) -> Scratch<f32> {
    scratch(if T::DTYPE == DType::F32 { 0 } else { len })
}

/// f32 sums beside a 16-bit output; an f32 output is its own, and starts at zero.
fn sums<T: Float>(out: &mut [T]) -> Option<Scratch<f32>> {
    if T::DTYPE == DType::F32 {
        bytemuck::cast_slice_mut::<T, f32>(out).fill(0.0);
        return None;
    }
    Some(zeros(out.len()))
}

fn target<'a, T: Float>(sums: &'a mut Option<Scratch<f32>>, out: &'a mut [T]) -> &'a mut [f32] {
    match sums {
        Some(sums) => sums,
        None => bytemuck::cast_slice_mut(out),
    }
}
