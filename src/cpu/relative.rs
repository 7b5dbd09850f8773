//! CPU kernels of `ops/relative.rs`.

use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

pub fn relative_bias(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

pub fn relative_bias_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

/// Parameter words of `Span::params`, and the bucket of each diagonal `s - t + queries - 1`.
struct Problem {
    queries: usize,
    keys: usize,
    count: usize,
    of_diagonal: Vec<usize>,
}

impl Problem {
    fn of(args: &Args) -> Self {
        let (queries, keys, count) = (args.u(1), args.u(2), args.u(3));
        let ids = args.read::<u32>(1);
        let (last, offset, both_sides) = (args.u(4) - 1, args.u(5), args.u(6) != 0);
        let bucket = |diagonal: usize| {
            let behind = queries - 1 + offset;
            let (reach, side) = match (diagonal > behind, both_sides) {
                (false, _) => (behind - diagonal, 0),
                (true, true) => (diagonal - behind, count / 2),
                (true, false) => (0, 0),
            };
            (ids[reach.min(last)] as usize + side).min(count - 1)
        };
        Self { queries, keys, count, of_diagonal: (0..queries + keys - 1).map(bucket).collect() }
    }
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let p = Problem::of(args);
    let (table, bias) = (args.read::<T>(0), args.write::<T>(2));
    args.rows(bias, p.keys, grain(p.keys), |first, chunk| {
        for (i, row) in chunk.chunks_exact_mut(p.keys).enumerate() {
            let (head, t) = ((first + i) / p.queries, (first + i) % p.queries);
            let table = &table[head * p.count..][..p.count];
            for (out, &bucket) in row.iter_mut().zip(&p.of_diagonal[p.queries - 1 - t..]) {
                *out = table[bucket];
            }
        }
    });
    Ok(())
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let p = Problem::of(args);
    let (dbias, table) = (args.read::<T>(0), args.write::<T>(2));
    args.rows(table, p.count, 1, |head, out| {
        let mut diagonals = vec![0.0f32; p.of_diagonal.len()];
        let rows = dbias[head * p.queries * p.keys..][..p.queries * p.keys].chunks_exact(p.keys);
        for (t, row) in rows.enumerate() {
            for (sum, x) in diagonals[p.queries - 1 - t..].iter_mut().zip(row) {
                *sum += x.load();
            }
        }
        let mut sums = vec![0.0f32; p.count];
        for (&bucket, sum) in p.of_diagonal.iter().zip(&diagonals) {
            sums[bucket] += sum;
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::store(sum);
        }
    });
    Ok(())
}
