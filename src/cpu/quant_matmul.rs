//! CPU kernels of `ops/quant_matmul.rs`.

use super::Args;
use super::int8::{self, Product, Weights};
use crate::error::Result;

/// Parameters: m, n, k, bias.
pub fn matmul_int8(args: &Args) -> Result<()> {
    let bias = (args.u(3) == 1).then(|| args.read::<f32>(4));
    let (x, x_sums) = (args.read(0), int8::sums(args.read(0), args.u(2)));
    let product = Product {
        x,
        x_scale: args.read(1),
        x_sums: &x_sums,
        w: Weights::Dense(args.read(2)),
        w_scale: args.read(3),
        bias,
        relu: false,
        m: args.u(0),
        n: args.u(1),
        k: args.u(2),
    };
    product.run(args, |i| i, args.write(args.len() - 1));
    Ok(())
}
