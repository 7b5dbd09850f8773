//! CPU kernel of `ops/select.rs`: the smallest kept key by quickselect, then one pass that writes.

use super::Args;
use crate::error::Result;

/// A number's place among all f32: larger numbers have larger keys, -0 that of 0, NaN the smallest.
fn key(x: f32, magnitude: bool) -> u32 {
    if x.is_nan() {
        return 0;
    }
    let bits = if x == 0.0 { 0 } else { x.to_bits() };
    match (magnitude, bits >> 31) {
        (true, _) => (bits & 0x7fff_ffff) + 1,
        (false, 0) => bits | 0x8000_0000,
        (false, _) => !bits,
    }
}

/// Parameters: rows, n, keep, magnitude. Arguments: x, mask.
pub fn keep_largest(args: &Args) -> Result<()> {
    let (n, keep, magnitude) = (args.u(1), args.u(2), args.u(3) == 1);
    let (x, mask) = (args.read::<f32>(0), args.write::<f32>(1));
    if n == 0 {
        return Ok(());
    }
    args.rows(mask, n, (1 << 14) / n.max(1), |first, chunk| {
        let mut keys = Vec::with_capacity(n);
        for (r, mask) in chunk.chunks_mut(n).enumerate() {
            let x = &x[(first + r) * n..][..n];
            if keep == 0 {
                mask.fill(0.0);
                continue;
            }
            keys.clear();
            keys.extend(x.iter().map(|&x| key(x, magnitude)));
            let threshold = *keys.select_nth_unstable(n - keep).1;
            let above = keys[n - keep..].iter().filter(|&&k| k > threshold).count();
            let mut equals = keep - above;
            for (mask, &x) in mask.iter_mut().zip(x) {
                let key = key(x, magnitude);
                let kept = key > threshold || (key == threshold && equals > 0);
                equals -= usize::from(kept && key == threshold);
                *mask = f32::from(u8::from(kept));
            }
        }
    });
    Ok(())
}

/// Parameters: count, threshold. Arguments: x, mask.
pub fn above(args: &Args) -> Result<()> {
    let threshold = args.f(1);
    let (x, mask) = (args.read::<f32>(0), args.write::<f32>(1));
    args.rows(mask, 1, 1 << 14, |first, mask| {
        for (mask, &x) in mask.iter_mut().zip(&x[first..]) {
            *mask = f32::from(u8::from(x > threshold));
        }
    });
    Ok(())
}
