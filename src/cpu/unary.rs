//! CPU kernels of `ops/unary.rs`.

use half::{bf16, f16};

use super::{Args, float_kernel, grain, simd};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub fn unary(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

pub fn unary_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

/// Abramowitz and Stegun style erf in f32 is what `shaders/lib.wgsl` uses too: error below 2e-7.
fn erf(x: f32) -> f32 {
    let a = x.abs();
    if a < 0.5 {
        let z = x * x;
        let tail = -0.026_866_171 + z * (0.005_223_977_6 + z * (-0.000_854_832_7 + z * 0.000_120_553_3));
        return x * (1.128_379_2 + z * (-0.376_126_4 + z * (0.112_837_92 + z * tail)));
    }
    let t = 1.0 / (1.0 + 0.5 * a);
    const C: [f32; 10] = [
        -1.265_512_2,
        1.000_023_7,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_9,
        1.488_515_9,
        -0.822_152_2,
        0.170_872_77,
    ];
    let polynomial = C.iter().rev().fold(0.0, |sum, &c| sum * t + c);
    let y = t * (-a * a + polynomial).exp();
    if x < 0.0 { y - 1.0 } else { 1.0 - y }
}

const GELU_SCALE: f32 = 0.797_884_6;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// (1 + tanh u) / 2 written as sigmoid(2 u): no cancellation in the negative tail.
#[inline(always)]
fn gelu_gate(x: f32) -> f32 {
    sigmoid(2.0 * GELU_SCALE * (x + 0.044_715 * x * x * x))
}

/// f of function code `kind`, chosen outside the loop so that each loop body is one formula.
fn forward<T: Float>(args: &Args) -> Result<()> {
    let (kind, factor) = (args.u(1), args.f(2));
    match kind {
        0 => map::<T>(args, |x| if x > 0.0 { x } else { 0.0 }),
        1 => map::<T>(args, |x| x * gelu_gate(x)),
        2 => map::<T>(args, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
        3 => map::<T>(args, |x| x * sigmoid(x)),
        4 => map_rows::<T>(args, tanh_row),
        5 => map::<T>(args, sigmoid),
        6 => map::<T>(args, f32::exp),
        8 => map::<T>(args, |x| 1.0 / x),
        _ => map::<T>(args, |x| x * factor),
    }
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let (kind, factor) = (args.u(1), args.f(2));
    match kind {
        0 => zip::<T>(args, |x, dy| if x > 0.0 { dy } else { 0.0 }),
        1 => zip::<T>(args, |x, dy| {
            let s = gelu_gate(x);
            dy * (s + x * s * (1.0 - s) * 2.0 * GELU_SCALE * (1.0 + 0.134_145 * x * x))
        }),
        2 => zip::<T>(args, |x, dy| {
            let density = 0.398_942_3 * (-0.5 * x * x).exp();
            dy * (0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density)
        }),
        3 => zip::<T>(args, |x, dy| {
            let s = sigmoid(x);
            dy * s * (1.0 + x * (1.0 - s))
        }),
        4 => zip::<T>(args, |x, dy| {
            let t = x.tanh();
            dy * (1.0 - t * t)
        }),
        5 => zip::<T>(args, |x, dy| {
            let s = sigmoid(x);
            dy * s * (1.0 - s)
        }),
        6 => zip::<T>(args, |x, dy| dy * x.exp()),
        8 => zip::<T>(args, |x, dy| -dy / (x * x)),
        _ => zip::<T>(args, |_, dy| dy * factor),
    }
}

fn map<T: Float>(args: &Args, f: impl Fn(f32) -> f32 + Sync + Send) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    args.rows(y, 1, grain(1), |first, chunk| {
        for (y, x) in chunk.iter_mut().zip(&x[first..]) {
            *y = T::store(f(x.load()));
        }
    });
    Ok(())
}

simd::multiversion! {
    fn tanh_row(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = simd::tanh(*x));
    }
}

/// As [`map`] by a function of many elements.
fn map_rows<T: Float>(args: &Args, f: fn(&[f32], &mut [f32])) -> Result<()> {
    const PART: usize = 256;
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    args.rows(y, 1, grain(1), |first, chunk| {
        let (mut wide, mut made) = ([0.0; PART], [0.0; PART]);
        for (x, y) in x[first..].chunks(PART).zip(chunk.chunks_mut(PART)) {
            let x = &simd::widened(x, &mut wide)[..y.len()];
            simd::write_row(y, &mut made, |y| f(x, y));
        }
    });
    Ok(())
}

fn zip<T: Float>(args: &Args, f: impl Fn(f32, f32) -> f32 + Sync + Send) -> Result<()> {
    let (x, dy, dx) = (args.read::<T>(0), args.read::<T>(1), args.write::<T>(2));
    args.rows(dx, 1, grain(1), |first, chunk| {
        for ((dx, x), dy) in chunk.iter_mut().zip(&x[first..]).zip(&dy[first..]) {
            *dx = T::store(f(x.load(), dy.load()));
        }
    });
    Ok(())
}

/// Parameters: count, source type, target type.
pub fn cast(args: &Args) -> Result<()> {
    const F16: usize = DType::F16 as usize;
    const BF16: usize = DType::Bf16 as usize;
    match args.u(1) {
        F16 => cast_from::<f16>(args),
        BF16 => cast_from::<bf16>(args),
        _ => cast_from::<f32>(args),
    }
}

fn cast_from<A: Float>(args: &Args) -> Result<()> {
    const F16: usize = DType::F16 as usize;
    const BF16: usize = DType::Bf16 as usize;
    match args.u(2) {
        F16 => cast_between::<A, f16>(args),
        BF16 => cast_between::<A, bf16>(args),
        _ => cast_between::<A, f32>(args),
    }
}

fn cast_between<A: Float, B: Float>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<A>(0), args.write::<B>(1));
    args.rows(y, 1, grain(1), |first, chunk| {
        for (y, x) in chunk.iter_mut().zip(&x[first..]) {
            *y = B::store(x.load());
        }
    });
    Ok(())
}
