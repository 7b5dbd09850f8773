//! CPU kernels of `ops/ceiling.rs`.

use super::Args;
use super::simd::multiversion;
use crate::error::Result;

/// Independent chains: eight AVX-512 registers hide a latency of four cycles on two units.
const LANES: usize = 128;

pub fn multiply_add_chain(args: &Args) -> Result<()> {
    let (x, y, steps) = (args.read::<f32>(0), args.write::<f32>(1), args.u(1));
    args.rows(y, 1, 8 * LANES, |first, part| {
        for (i, y) in part.chunks_mut(LANES).enumerate() {
            let from = first + i * LANES;
            let mut block = [0.0; LANES];
            block[..y.len()].copy_from_slice(&x[from..from + y.len()]);
            chain(&mut block, steps);
            y.copy_from_slice(&block[..y.len()]);
        }
    });
    Ok(())
}

multiversion! {
    fn chain(x: &mut [f32; LANES], steps: usize) {
        let mut y = [0.0f32; LANES];
        for _ in 0..steps {
            for l in 0..LANES {
                y[l] = y[l].mul_add(0.5, x[l]);
            }
        }
        *x = y;
    }
}
