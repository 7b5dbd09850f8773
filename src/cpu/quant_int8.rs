//! CPU kernel of `ops/quant_int8.rs`.

use super::quant_int4::product;
use super::simd::multiversion;
use super::{Args, float_kernel};
use crate::dtype::Float;
use crate::error::Result;

multiversion! {
    fn scaled(q: &[i8], scale: f32, out: &mut [f32]) {
        for (out, &q) in out.iter_mut().zip(q) {
            *out = f32::from(q) * scale;
        }
    }
}

/// Parameters: m, n, k, group, bias.
pub fn matmul_int8_groups(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (k, group) = (args.u(2), args.u(3));
    let (q, scales) = (args.read::<i8>(1), args.read::<f32>(2));
    product::<T>(args, &|j, out| {
        let scales = &scales[j * (k / group)..][..k / group];
        for ((q, &scale), out) in q[j * k..][..k].chunks(group).zip(scales).zip(out.chunks_mut(group)) {
            scaled(q, scale, out);
        }
    })
}
