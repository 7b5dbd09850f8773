//! CPU kernels of `ops/embed.rs`.

use super::simd::{multiversion, widened, write_row};
use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

pub fn embed(args: &Args) -> Result<()> {
    float_kernel!(args, lookup)
}

pub fn embed_backward(args: &Args) -> Result<()> {
    float_kernel!(args, scatter)
}

fn lookup<T: Float>(args: &Args) -> Result<()> {
    let dim = args.u(1);
    let (table, ids, y) = (args.read::<T>(0), args.read::<u32>(1), args.write::<T>(2));
    args.rows(y, dim, grain(dim), |first, chunk| {
        for (y, &id) in chunk.chunks_exact_mut(dim).zip(&ids[first..]) {
            match table.get(id as usize * dim..).and_then(|rest| rest.get(..dim)) {
                Some(row) => y.copy_from_slice(row),
                None => y.fill(T::zeroed()),
            }
        }
    });
    Ok(())
}

/// Tokens sorted by (id, position): each row of the table sums its own stretch in the order of the tokens.
fn scatter<T: Float>(args: &Args) -> Result<()> {
    let (dim, rows) = (args.u(1), args.u(2));
    let (dy, ids, table) = (args.read::<T>(0), args.read::<u32>(1), args.write::<T>(2));
    let known = ids.iter().enumerate().filter(|(_, id)| (**id as usize) < rows);
    let mut order: Vec<u64> = known.map(|(i, id)| u64::from(*id) << 32 | i as u64).collect();
    order.sort_unstable();
    args.rows(table, dim, grain(dim), |first, chunk| {
        let (mut sums, mut staging) = (vec![0.0; dim], vec![0.0; dim]);
        chunk.fill(T::zeroed());
        let mut next = order.partition_point(|key| ((key >> 32) as usize) < first);
        while let Some(row) = order.get(next).map(|key| (key >> 32) as usize) {
            let Some(out) = chunk.get_mut((row - first) * dim..).and_then(|rest| rest.get_mut(..dim)) else { break };
            write_row(out, &mut sums, |sums| {
                sums.fill(0.0);
                while let Some(key) = order.get(next).filter(|key| (*key >> 32) as usize == row) {
                    let token = (key & 0xffff_ffff) as usize;
                    add(widened(&dy[token * dim..][..dim], &mut staging), sums);
                    next += 1;
                }
            });
        }
    });
    Ok(())
}

multiversion! {
    fn add(x: &[f32], sums: &mut [f32]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x;
        }
    }
}
