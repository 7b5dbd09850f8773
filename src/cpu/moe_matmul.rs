//! CPU kernels of `ops/moe_matmul.rs`: each expert's rows are one dense product; experts without rows are not touched.

use std::ops::Range;

use super::dot_tile;
use super::gemm::{Activation, Product as Dense, View, gemm};
use super::int8::{self, Product, Weights};
use super::matmul::floats;
use super::{Args, float_kernel};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Sorted rows of one parallel task. Fixed, so that sums do not depend on the number of threads.
const TASK: usize = 64;
/// Rows of one expert up to which dot products against its weight as it lies beat packing it.
const FEW: usize = 64;
/// Sorted rows of a task where there are few: weights are then what is read, and each expert's go to one thread.
const FINE: usize = 4;

/// Parameters of every kernel here: rows, n, d, k, gather, experts (, relu, bias).
struct Grouped<'a> {
    n: usize,
    d: usize,
    k: usize,
    gather: bool,
    order: &'a [u32],
    offsets: &'a [u32],
}

impl<'a> Grouped<'a> {
    fn new(args: &Args, order: &'a [u32], offsets: &'a [u32]) -> Self {
        Self { n: args.u(1), d: args.u(2), k: args.u(3), gather: args.u(4) == 1, order, offsets }
    }

    /// The row of x that sorted row r takes.
    fn row(&self, r: usize) -> usize {
        if self.gather { self.order[r] as usize / self.k } else { r }
    }

    /// Calls `work(expert, rows)` for the parts of `rows` that belong to one expert.
    fn segments(&self, rows: Range<usize>, mut work: impl FnMut(usize, Range<usize>)) {
        let mut at = rows.start;
        let mut expert = self.offsets.partition_point(|&o| o as usize <= at).saturating_sub(1);
        while at < rows.end && expert + 1 < self.offsets.len() {
            let end = (self.offsets[expert + 1] as usize).min(rows.end);
            if end > at {
                work(expert, at..end);
                at = end;
            }
            expert += 1;
        }
    }

    /// The rows of x behind sorted rows, as they lie or copied together.
    fn rows_of<'x, T: Float>(&self, x: &'x [T], rows: Range<usize>, buffer: &'x mut Vec<T>) -> &'x [T] {
        if !self.gather {
            return &x[rows.start * self.d..rows.end * self.d];
        }
        buffer.clear();
        for r in rows {
            buffer.extend_from_slice(&x[self.row(r) * self.d..][..self.d]);
        }
        buffer
    }
}

pub fn grouped_matmul(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (relu, has_bias) = (args.u(6) == 1, args.u(7) == 1);
    let last = args.len() - 1;
    let (x, weight) = (args.read::<T>(0), args.read::<T>(1));
    let mut wide = Vec::new();
    let bias = has_bias.then(|| floats(args.read::<T>(2), &mut wide));
    let g = Grouped::new(args, args.read(last - 2), args.read(last - 1));
    let (n, d) = (g.n, g.d);
    let task = if g.order.len() < TASK && n * d >= 4096 { FINE } else { TASK };
    args.rows(args.write::<T>(last), n, task, |first, out| {
        let mut buffer = Vec::new();
        g.segments(first..first + out.len() / n.max(1), |e, rows| {
            let y = &mut out[(rows.start - first) * n..(rows.end - first) * n];
            let w = &weight[e * n * d..][..n * d];
            let bias = bias.map(|b| &b[e * n..][..n]);
            if rows.len() <= FEW && T::DTYPE == DType::F32 {
                let (x, w): (&[f32], &[f32]) = (bytemuck::cast_slice(x), bytemuck::cast_slice(w));
                let y: &mut [f32] = bytemuck::cast_slice_mut(y);
                dot_tile::product(|i| &x[g.row(rows.start + i) * d..][..d], rows.len(), w, n, y);
                y.chunks_mut(n.max(1)).for_each(|y| finish(y, bias, relu));
                return;
            }
            let a = g.rows_of(x, rows.clone(), &mut buffer);
            let activation = if relu { Activation::Relu } else { Activation::None };
            let shape = [rows.len(), n, d];
            let product = Dense { bias, activation, ..Dense::new(shape, View::rows(a, d), View::transposed(w, d)) };
            gemm(&product, y, n);
        });
    });
    Ok(())
}

fn finish(y: &mut [f32], bias: Option<&[f32]>, relu: bool) {
    if let Some(bias) = bias {
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
    if relu {
        y.iter_mut().for_each(|y| *y = if *y < 0.0 { 0.0 } else { *y });
    }
}

pub fn grouped_backward_input(args: &Args) -> Result<()> {
    float_kernel!(args, backward_input)
}

fn backward_input<T: Float>(args: &Args) -> Result<()> {
    let (dz, weight) = (args.read::<T>(0), args.read::<T>(1));
    let g = Grouped::new(args, &[], args.read(2));
    let (n, d) = (g.n, g.d);
    args.rows(args.write::<T>(3), d, TASK, |first, out| {
        g.segments(first..first + out.len() / d.max(1), |e, rows| {
            let a = View::rows(&dz[rows.start * n..rows.end * n], n);
            let product = Dense::new([rows.len(), d, n], a, View::rows(&weight[e * n * d..][..n * d], d));
            gemm(&product, &mut out[(rows.start - first) * d..(rows.end - first) * d], d);
        });
    });
    Ok(())
}

pub fn grouped_backward_weight(args: &Args) -> Result<()> {
    float_kernel!(args, backward_weight)
}

fn backward_weight<T: Float>(args: &Args) -> Result<()> {
    let (dz, x) = (args.read::<T>(0), args.read::<T>(1));
    let g = Grouped::new(args, args.read(2), args.read(3));
    let (n, d) = (g.n, g.d);
    args.rows2((args.write::<T>(4), args.write::<T>(5)), (n * d, n), 1, |first, dw, db| {
        let mut buffer = Vec::new();
        for ((e, dw), db) in (first..).zip(dw.chunks_mut((n * d).max(1))).zip(db.chunks_mut(n.max(1))) {
            let rows = g.offsets[e] as usize..g.offsets[e + 1] as usize;
            let dz = &dz[rows.start * n..rows.end * n];
            if rows.is_empty() {
                dw.fill(T::store(0.0));
                db.fill(T::store(0.0));
                continue;
            }
            for (j, db) in db.iter_mut().enumerate() {
                *db = T::store(dz.chunks(n).map(|row| row[j].load()).sum());
            }
            let count = rows.len();
            let b = View::rows(g.rows_of(x, rows, &mut buffer), d);
            gemm(&Dense::new([n, d, count], View::transposed(dz, n), b), dw, d);
        }
    });
    Ok(())
}

/// Parameters as the float form.
pub fn grouped_matmul_int8(args: &Args) -> Result<()> {
    let (relu, has_bias) = (args.u(6) == 1, args.u(7) == 1);
    let last = args.len() - 1;
    let (x, x_scale) = (args.read::<i8>(0), args.read::<f32>(1));
    let (w, w_scale) = (args.read::<i8>(2), args.read::<f32>(3));
    let bias = has_bias.then(|| args.read::<f32>(4));
    let g = Grouped::new(args, args.read(last - 2), args.read(last - 1));
    let (n, d) = (g.n, g.d);
    let x_sums = int8::sums(x, d);
    // Integer sums are exact, so tasks may follow the threads.
    let task = g.order.len().div_ceil(args.threads()).max(TASK);
    args.rows(args.write::<f32>(last), n, task, |first, y| {
        g.segments(first..first + y.len() / n.max(1), |e, rows| {
            let product = Product {
                x,
                x_scale,
                x_sums: &x_sums,
                w: Weights::Dense(&w[e * n * d..][..n * d]),
                w_scale: &w_scale[e * n..][..n],
                bias: bias.map(|b| &b[e * n..][..n]),
                relu,
                m: rows.len(),
                n,
                k: d,
            };
            let y = &mut y[(rows.start - first) * n..(rows.end - first) * n];
            product.run_alone(|i| [g.row(rows.start + i), i], y);
        });
    });
    Ok(())
}
