//! CPU kernels of `ops/unary.rs`.

use half::{bf16, f16};

use super::simd::{self, exp, exp_whole, multiversion, widened};
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub fn unary(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

pub fn unary_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

const GELU_SCALE: f32 = 0.797_884_6;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// (1 + tanh u) / 2 written as sigmoid(2 u): no cancellation in the negative tail.
#[inline(always)]
pub(super) fn gelu_gate(x: f32) -> f32 {
    sigmoid(x * (x * x).mul_add(2.0 * GELU_SCALE * 0.044_715, 2.0 * GELU_SCALE))
}

/// Normal distribution's probability of a value below x (tails within 2e-6 of themselves), and density times sqrt(2 pi).
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let (a, density) = (x.abs(), exp(-0.5 * x * x));
    // The tail over its exponential, exp(a^2 / 2) erfc(a / sqrt 2) / 2, is t times a polynomial in t (minimax of relative
    // error 1.3e-7 for a up to 13.5, where the exponential ends): small tails keep their digits.
    let t = 1.0 / a.mul_add(0.3, 1.0);
    let (t2, low, mid) = (t * t, t.mul_add(0.120_798_35, 0.119_626_395), t.mul_add(0.129_468_9, 9.963_759e-2));
    let (high, top) = (t.mul_add(0.208_206_01, -5.539_33e-2), t.mul_add(3.593_167e-2, -0.158_275_7));
    let p = (t2 * t2).mul_add(t2.mul_add(top, high), t2.mul_add(mid, low));
    let tail = p * t * density;
    (if x > 0.0 { 1.0 - tail } else { tail }, density)
}

/// y = f(x) for each name, f a formula of one element.
macro_rules! maps {
    ($($name:ident($x:ident) $formula:expr;)*) => {
        multiversion! {$(
            fn $name(x: &[f32], y: &mut [f32]) {
                for (y, &$x) in y.iter_mut().zip(x) {
                    *y = $formula;
                }
            }
        )*}
    };
}

/// dx = dy f'(x) for each name.
macro_rules! slopes {
    ($($name:ident($x:ident, $dy:ident) $formula:expr;)*) => {
        multiversion! {$(
            fn $name(x: &[f32], dy: &[f32], dx: &mut [f32]) {
                for ((dx, &$x), &$dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = $formula;
                }
            }
        )*}
    };
}

maps! {
    relu(x) if x > 0.0 { x } else { 0.0 };
    gelu_tanh(x) x * gelu_gate(x);
    gelu_erf(x) x * normal(x).0;
    silu(x) x * sigmoid(x);
    tanh(x) simd::tanh(x);
    logistic(x) sigmoid(x);
    exponential(x) exp_whole(x);
    reciprocal(x) 1.0 / x;
}

slopes! {
    relu_slope(x, dy) if x > 0.0 { dy } else { 0.0 };
    gelu_tanh_slope(x, dy) {
        let s = gelu_gate(x);
        dy * (s + x * s * (1.0 - s) * 2.0 * GELU_SCALE * (1.0 + 0.134_145 * x * x))
    };
    gelu_erf_slope(x, dy) {
        let (below, density) = normal(x);
        dy * (below + x * 0.398_942_3 * density)
    };
    silu_slope(x, dy) {
        let s = sigmoid(x);
        dy * s * (1.0 + x * (1.0 - s))
    };
    tanh_slope(x, dy) {
        let t = simd::tanh(x);
        dy * (1.0 - t * t)
    };
    logistic_slope(x, dy) {
        let s = sigmoid(x);
        dy * s * (1.0 - s)
    };
    exponential_slope(x, dy) dy * exp_whole(x);
    reciprocal_slope(x, dy) -dy / (x * x);
}

multiversion! {
    fn scale(x: &[f32], factor: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x * factor;
        }
    }
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (kind, factor) = (args.u(1), args.f(2));
    let scaled = |x: &[f32], y: &mut [f32]| scale(x, factor, y);
    const ROWS: [fn(&[f32], &mut [f32]); 7] = [relu, gelu_tanh, gelu_erf, silu, tanh, logistic, exponential];
    map::<T>(
        args,
        match kind {
            7 => &scaled,
            8 => &reciprocal,
            _ => &ROWS[kind],
        },
    )
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let (kind, factor) = (args.u(1), args.f(2));
    let scaled = |_: &[f32], dy: &[f32], dx: &mut [f32]| scale(dy, factor, dx);
    const ROWS: [fn(&[f32], &[f32], &mut [f32]); 7] =
        [relu_slope, gelu_tanh_slope, gelu_erf_slope, silu_slope, tanh_slope, logistic_slope, exponential_slope];
    zip::<T>(
        args,
        match kind {
            7 => &scaled,
            8 => &reciprocal_slope,
            _ => &ROWS[kind],
        },
    )
}

/// Elements handled at a time: widened blocks of all operands stay in the first-level cache.
const BLOCK: usize = 1024;

fn map<T: Float>(args: &Args, f: &(dyn Fn(&[f32], &mut [f32]) + Sync)) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    args.rows(y, 1, grain(1), |first, chunk| {
        let (mut wide, mut made) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (x, y) in x[first..].chunks(BLOCK).zip(chunk.chunks_mut(BLOCK)) {
            let x = &widened(x, &mut wide)[..y.len()];
            simd::write_row(y, &mut made, |y| f(x, y));
        }
    });
    Ok(())
}

fn zip<T: Float>(args: &Args, f: &(dyn Fn(&[f32], &[f32], &mut [f32]) + Sync)) -> Result<()> {
    let (x, dy, dx) = (args.read::<T>(0), args.read::<T>(1), args.write::<T>(2));
    args.rows(dx, 1, grain(1), |first, chunk| {
        let (mut wide_x, mut wide_dy, mut made) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        for (c, dx) in chunk.chunks_mut(BLOCK).enumerate() {
            let at = first + c * BLOCK;
            let range = at..at + dx.len();
            let (x, dy) = (widened(&x[range.clone()], &mut wide_x), widened(&dy[range], &mut wide_dy));
            simd::write_row(dx, &mut made, |dx| f(x, dy, dx));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_tails_keep_their_digits() {
        // Abramowitz and Stegun, table 26.2.
        for (x, tail) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_9),
            (2.0, 2.275_013_194_8e-2),
            (3.0, 1.349_898_031_6e-3),
            (4.0, 3.167_124_183_3e-5),
            (6.0, 9.865_876_450e-10),
            (8.0, 6.220_960_574e-16),
        ] {
            let (below, above) = (f64::from(normal(-x).0), f64::from(normal(x).0));
            assert!((below / tail - 1.0).abs() < 2e-6, "{x}: {below:e}, not {tail:e}");
            assert!((above - (1.0 - tail)).abs() < 3e-7, "{x}: {above}");
        }
        assert_eq!([normal(-20.0).0, normal(20.0).0, normal(f32::INFINITY).0], [0.0, 1.0, 1.0]);
        assert!(normal(f32::NAN).0.is_nan());
    }
}
