//! CPU kernel of `ops/rope.rs`.

use super::simd::{multiversion, narrow, widened};
use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

pub fn rope(args: &Args) -> Result<()> {
    float_kernel!(args, rotate)
}

fn rotate<T: Float>(args: &Args) -> Result<()> {
    let (heads, dim, span, spans) = (args.u(1), args.u(2), args.u(3), args.u(4));
    let (last, sign) = (args.u(5) - 1, args.f(6));
    let (x, cos, sin) = (args.read::<T>(0), args.read::<f32>(1), args.read::<f32>(2));
    let positions = [args.read::<u32>(3), args.read::<u32>(2 + spans)];
    let y = args.write::<T>(3 + spans);
    // A row is one token: all its heads turn by the same angles.
    args.rows(y, heads * dim, grain(heads * dim), |first, chunk| {
        let (mut input, mut output) = (vec![0.0; dim], vec![0.0; dim]);
        for (i, y) in chunk.chunks_exact_mut(heads * dim).enumerate() {
            let token = first + i;
            let x = &x[token * heads * dim..][..heads * dim];
            for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
                let x = widened(x, &mut input);
                for second in 0..spans {
                    let row = (positions[second][token] as usize).min(last);
                    let angle = row * (dim / 2) + second * span;
                    let pairs = second * 2 * span..(second + 1) * 2 * span;
                    turn(&x[pairs.clone()], &cos[angle..][..span], &sin[angle..][..span], sign, &mut output[pairs]);
                }
                narrow(&output, y);
            }
        }
    });
    Ok(())
}

multiversion! {
    fn turn(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &mut [f32]) {
        let ((a, b), (ya, yb)) = (x.split_at(cos.len()), y.split_at_mut(cos.len()));
        for j in 0..cos.len() {
            let s = sign * sin[j];
            ya[j] = a[j] * cos[j] - b[j] * s;
            yb[j] = b[j] * cos[j] + a[j] * s;
        }
    }
}
