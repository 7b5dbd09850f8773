//! CPU kernel of `ops/requantize.rs`: an int8 product whose activated rows are stored as int8 again.

use std::sync::atomic::{AtomicU32, Ordering};

use super::int8::{Product, Weights};
use super::quant::{Scheme, store_row};
use super::scratch::scratch;
use super::simd::multiversion;
use super::unary::gelu_gate;
use super::{Args, grain};
use crate::error::Result;

/// Elements between the rows of the hidden layer beyond their own: rows that are a multiple of 4 KB apart would all fall into
/// one set of the first-level cache, which holds fewer than a panel has.
const APART: usize = 16;
/// Elements of the hidden layer at a time (16 MB): more rows than they pay the packing of the weights anew.
const HIDDEN: usize = 4 << 20;
/// Rows at a time however long they are.
const FEWEST: usize = 64;

// Magnitudes as integers, which order them as floats do and put NaN on top.
multiversion! {
    fn largest(x: &[f32]) -> u32 {
        x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff))
    }

    /// GELU in place, and the largest magnitude of what it gives.
    fn gelu(x: &mut [f32]) -> u32 {
        let mut most = 0;
        for x in x {
            *x *= gelu_gate(*x);
            most = most.max(x.to_bits() & 0x7fff_ffff);
        }
        most
    }
}

/// Parameters: m, n, k, bias, activation (0 ReLU, 1 GELU), largest level, scale of a unit of width.
pub fn matmul_int8_requantized(args: &Args) -> Result<()> {
    let [m, n, k] = [0, 1, 2].map(|i| args.u(i));
    let (inputs, relu) = (args.len() - 2, args.u(4) == 0);
    let (x, x_scale): (&[i8], &[f32]) = (args.read(0), args.read(1));
    let product = Product {
        x,
        x_scale,
        x_sums: &[],
        w: Weights::Dense(args.read(2)),
        w_scale: args.read(3),
        bias: (args.u(3) == 1).then(|| args.read::<f32>(4)),
        relu,
        m,
        n,
        k,
    };
    let scheme = Scheme::symmetric(args.f(5), args.f(6));
    let (q, scales) = (args.write::<i8>(inputs), args.write::<f32>(inputs + 1));
    let most = (HIDDEN / (n + APART)).max(FEWEST).min(m);
    let block = m.div_ceil(m.div_ceil(most));
    let mut hidden = scratch::<f32>(block * (n + APART));
    for (b, (q, scales)) in q.chunks_mut(block * n).zip(scales.chunks_mut(block)).enumerate() {
        let (first, m) = (b * block, scales.len());
        let rows = Product { x: &x[first * k..], x_scale: &x_scale[first..], m, ..product };
        requantize(args, &rows, &mut hidden, &scheme, q, scales);
    }
    Ok(())
}

/// Some rows, by way of `hidden`.
fn requantize(args: &Args, product: &Product, hidden: &mut [f32], scheme: &Scheme, q: &mut [i8], scales: &mut [f32]) {
    let (m, n) = (product.m, product.n);
    let activate = |x: &mut [f32]| if product.relu { largest(x) } else { gelu(x) };
    let most: Vec<AtomicU32> = (0..m).map(|_| AtomicU32::new(0)).collect();
    // Of a row, or of a strip's part of it while that is in a near cache.
    let finish = |row: usize, values: &mut [f32]| {
        most[row].fetch_max(activate(values), Ordering::Relaxed);
    };
    let mut stride = n + APART;
    if !product.run_strips(args, hidden, stride, &finish) {
        stride = n;
        product.run(args, hidden);
        args.rows(&mut hidden[..m * n], n, grain(n), |first, rows| {
            rows.chunks_mut(n).zip(first..).for_each(|(values, row)| finish(row, values));
        });
    }
    let hidden = &*hidden;
    args.rows2((q, scales), (n, 1), grain(n), |first, q, scales| {
        for ((row, q), scale) in (first..).zip(q.chunks_mut(n)).zip(scales) {
            let grid = scheme.grid([f32::from_bits(most[row].load(Ordering::Relaxed)); 2]);
            *scale = grid.scale;
            store_row(&hidden[row * stride..][..n], q, &grid, 0.0);
        }
    });
}
