//! CPU kernels of `ops/cache.rs`.

use super::{Args, float_kernel};
use crate::dtype::Float;
use crate::error::Result;

pub fn write_rows(args: &Args) -> Result<()> {
    float_kernel!(args, write)
}

/// A few rows at a time: not worth a thread.
fn write<T: Float>(args: &Args) -> Result<()> {
    let (rows, ids, table) = (args.read::<T>(1), args.read::<u32>(2), args.write::<T>(0));
    let d = args.u(1).max(1);
    for (row, &id) in rows.chunks_exact(d).zip(ids) {
        if let Some(target) = table.chunks_exact_mut(d).nth(id as usize) {
            target.copy_from_slice(row);
        }
    }
    Ok(())
}
