//! CPU kernel of `ops/fisher.rs`: one block after the other, each in cache.

use super::Args;
use super::simd::{self, multiversion};
use crate::error::Result;

multiversion! {
    fn update(f: &mut [f32], g: &[f32], fg: &mut [f32], count: f32) {
        let b = g.len();
        for (row, out) in f.chunks(b).zip(fg.iter_mut()) {
            *out = simd::sums2(row, g, |f, g| [f * g])[0];
        }
        let divisor = count + simd::sums2(fg, g, |a, b| [a * b])[0];
        for (i, row) in f.chunks_mut(b).enumerate() {
            let a = fg[i];
            for (f, x) in row.iter_mut().zip(fg.iter()) {
                // In this order entry (i, j) is entry (j, i) to the bit.
                *f -= a * x / divisor;
            }
        }
    }
}

/// Parameters: blocks, B, count. Arguments: F (in place), g.
pub fn rank_one_inverse(args: &Args) -> Result<()> {
    let (b, count) = (args.u(1), args.f(2));
    let (f, g) = (args.write::<f32>(0), args.read::<f32>(1));
    args.rows(f, b * b, (1 << 14) / (b * b).max(1), |first, chunk| {
        let mut fg = vec![0.0f32; b];
        for (i, f) in chunk.chunks_mut(b * b).enumerate() {
            update(f, &g[(first + i) * b..][..b], &mut fg, count);
        }
    });
    Ok(())
}
