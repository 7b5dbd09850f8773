//! CPU kernels of `ops/quant_matmul.rs`.

use super::Args;
use super::int8::{Product, Weights};
use crate::error::Result;

/// Parameters: m, n, k, bias.
pub fn matmul_int8(args: &Args) -> Result<()> {
    let bias = (args.u(3) == 1).then(|| args.read::<f32>(4));
    let product = Product {
        x: args.read(0),
        x_scale: args.read(1),
        x_sums: &[],
        w: Weights::Dense(args.read(2)),
        w_scale: args.read(3),
        bias,
        relu: false,
        m: args.u(0),
        n: args.u(1),
        k: args.u(2),
    };
    product.run(args, args.write(args.len() - 1));
    Ok(())
}
