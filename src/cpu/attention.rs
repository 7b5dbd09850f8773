//! CPU kernels of `ops/attention.rs`: tiles that stay in the L2 cache, one task per (batch, head, block of queries)
//! forward and per (batch, head) backward. A task's order of summation depends on the problem alone.

mod backward;
mod forward;
pub(crate) mod tile;

use std::cell::RefCell;

use super::{Args, float_kernel};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub(crate) fn attention(args: &Args) -> Result<()> {
    float_kernel!(args, run_forward)
}

pub(crate) fn attention_backward(args: &Args) -> Result<()> {
    float_kernel!(args, run_backward)
}

fn run_forward<T: Float>(args: &Args) -> Result<()> {
    forward::run::<T>(args);
    Ok(())
}

fn run_backward<T: Float>(args: &Args) -> Result<()> {
    backward::run::<T>(args);
    Ok(())
}

/// Parameter words of `Attention::params`, and the optional inputs.
struct Problem<'a, T> {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
    mask: usize,
    offset: usize,
    scale: f32,
    /// Number of inputs before y: 3 and the optional ones.
    inputs: usize,
    context: Option<&'a [u32]>,
    lengths: Option<&'a [u32]>,
    bias: Option<&'a [T]>,
}

impl<'a, T: Float> Problem<'a, T> {
    fn of(args: &Args<'a>) -> Self {
        let flags = args.u(5);
        let mut inputs = 3;
        let mut position = |present: bool| {
            inputs += usize::from(present);
            present.then_some(inputs - 1)
        };
        let context = position(flags & 3 == 2).map(|i| args.read(i));
        let lengths = position(flags & 4 != 0).map(|i| args.read(i));
        let bias = position(flags & 8 != 0).map(|i| args.read(i));
        Self {
            batch: args.u(0),
            queries: args.u(1),
            keys: args.u(2),
            heads: args.u(3),
            dim: args.u(4),
            mask: flags & 3,
            offset: args.u(6),
            scale: args.f(7),
            inputs,
            context,
            lengths,
            bias,
        }
    }

    /// Every mask leaves a prefix of the keys visible: how many, for query row `t`. It never falls as `t` grows.
    #[inline(always)]
    fn visible(&self, b: usize, t: usize) -> usize {
        let mut n = self.keys;
        if self.mask != 0 {
            n = n.min((t + self.offset + 1).max(self.context.map_or(0, |c| c[b] as usize)));
        }
        n.min(self.lengths.map_or(n, |l| l[b] as usize))
    }

    /// Distance between two rows of one head.
    fn stride(&self) -> usize {
        self.heads * self.dim
    }

    /// Start of row (b, n, h) of a tensor with `extent` rows per batch element.
    fn row(&self, b: usize, n: usize, h: usize, extent: usize) -> usize {
        ((b * extent + n) * self.heads + h) * self.dim
    }
}

/// An output that tasks write in disjoint parts.
#[derive(Clone, Copy)]
struct Shared<T> {
    base: *mut T,
    len: usize,
}

// SAFETY: each task writes rows of its own (batch, head) and block alone; see the callers of `slice`.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    fn of(data: &mut [T]) -> Self {
        Self { base: data.as_mut_ptr(), len: data.len() }
    }

    /// # Safety
    /// No two live slices overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len);
        // SAFETY: in range by the assertion, unaliased by the caller's promise; the memory outlives the kernel call.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }
}

/// Hands out a thread's own scratch memory, kept between calls: contents are whatever was left there.
fn with_workspace(len: usize, work: impl FnOnce(&mut [f32])) {
    thread_local!(static MEMORY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    MEMORY.with(|memory| {
        let mut memory = memory.borrow_mut();
        if memory.len() < len {
            memory.resize(len, 0.0);
        }
        work(&mut memory[..len]);
    });
}

/// Takes `len` elements off the front of a workspace.
fn take<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, back) = std::mem::take(rest).split_at_mut(len);
    *rest = back;
    front
}

/// Packed extents are multiples of this: whole vectors on every instruction set.
const PAD: usize = 16;

/// `rows` rows of a `[.., H, D]` tensor as f32 `[rows, padded]`, zero beyond D.
#[inline(always)]
fn pack<T: Float>(
    source: &[T],
    (stride, dim): (usize, usize),
    rows: usize,
    padded: usize,
    factor: f32,
    out: &mut [f32],
) {
    for (i, out) in out.chunks_exact_mut(padded).take(rows).enumerate() {
        super::simd::widen(&source[i * stride..][..dim], &mut out[..dim]);
        out[dim..].fill(0.0);
        for x in &mut out[..dim] {
            *x *= factor;
        }
    }
}

/// As [`pack`], transposed to `[D, padded]`, zero beyond `rows`. Where storage is not f32 the rows go through `staging`.
#[inline(always)]
fn pack_transposed<T: Float>(
    source: &[T],
    (stride, dim): (usize, usize),
    rows: usize,
    padded: usize,
    staging: &mut [f32],
    out: &mut [f32],
) {
    if T::DTYPE == DType::F32 {
        return transpose(bytemuck::cast_slice(source), (stride, dim), rows, padded, out);
    }
    pack(source, (stride, dim), rows, dim, 1.0, staging);
    transpose(staging, (dim, dim), rows, padded, out);
}

#[inline(always)]
fn transpose(source: &[f32], (stride, dim): (usize, usize), rows: usize, padded: usize, out: &mut [f32]) {
    // Blocks of 16 x 16 keep both sides in cache lines that are used whole.
    for d0 in (0..dim).step_by(16) {
        for i0 in (0..rows).step_by(16) {
            for i in i0..rows.min(i0 + 16) {
                let row = &source[i * stride + d0..][..(dim - d0).min(16)];
                for (d, x) in row.iter().enumerate() {
                    out[(d0 + d) * padded + i] = *x;
                }
            }
        }
    }
    for out in out.chunks_exact_mut(padded).take(dim) {
        out[rows..].fill(0.0);
    }
}

/// Tasks per chunk so that a chunk is worth a thread: about a million multiply-adds.
fn tasks_per_chunk(flops: usize) -> usize {
    (2_000_000 / flops.max(1)).max(1)
}
