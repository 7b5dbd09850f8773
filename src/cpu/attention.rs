//! CPU kernels of `ops/attention.rs`: tiles that stay in the L2 cache, one task per (batch, head, block of queries)
//! forward and per (batch, head) backward. A task's order of summation depends on the problem alone.

mod backward;
mod forward;
pub use forward::MASKED;
pub mod tile;

use tile::{Left, Vector, product};

use super::gemm::{View, pack_columns};
use super::scratch::scratch;
use super::{Args, float_kernel};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub fn attention(args: &Args) -> Result<()> {
    float_kernel!(args, run_forward)
}

pub fn attention_backward(args: &Args) -> Result<()> {
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

impl<T: Float> Problem<'_, T> {
    /// Adds the bias of the panel of queries from `t` to scores `[keys, PANEL]` of the keys from `start`.
    #[inline(always)]
    fn add_bias(&self, visible: &Visible, h: usize, t: usize, start: usize, scores: &mut [f32]) {
        let Some(bias) = self.bias else { return };
        for lane in 0..PANEL {
            let count = visible.counts[lane / PAD][lane % PAD] as usize;
            if count > 0 {
                let row = &bias[(h * self.queries + t + lane) * self.keys + start..][..count];
                for (score, bias) in scores[lane..].iter_mut().step_by(PANEL).zip(row) {
                    *score += bias.load();
                }
            }
        }
    }
}

/// An output that tasks write in disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    base: *mut T,
    len: usize,
}

// SAFETY: each task writes rows of its own (batch, head) and block alone; see the callers of `slice`.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn of(data: &mut [T]) -> Self {
        Self { base: data.as_mut_ptr(), len: data.len() }
    }

    /// # Safety
    /// No two live slices overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len);
        // SAFETY: in range by the assertion, unaliased by the caller's promise; the memory outlives the kernel call.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }
}

/// Hands out a thread's own scratch memory, kept between calls: contents are whatever was left there.
pub(crate) fn with_workspace(len: usize, work: impl FnOnce(&mut [f32])) {
    work(&mut scratch(len));
}

/// Takes `len` elements off the front of a workspace.
pub(crate) fn take<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, back) = std::mem::take(rest).split_at_mut(len);
    *rest = back;
    front
}

/// Packed rows are padded to a multiple of this: whole vectors on every instruction set.
pub(crate) const PAD: usize = 16;
/// Queries that are worked on side by side, in the lanes of vectors.
pub(crate) const PANEL: usize = 2 * PAD;
/// Keys of a block: its keys, values and scores stay in the caches next to the core.
const KEYS: usize = 128;

/// `rows` rows of a `[.., H, D]` tensor as f32 `[rows, padded]`, zero beyond D.
#[inline(always)]
pub(crate) fn pack<T: Float>(
    source: &[T],
    (stride, dim): (usize, usize),
    rows: usize,
    padded: usize,
    factor: f32,
    out: &mut [f32],
) {
    for (i, out) in out.chunks_exact_mut(padded).take(rows).enumerate() {
        let (out, rest) = out.split_at_mut(dim);
        load(&source[i * stride..][..dim], factor, out);
        rest.fill(0.0);
    }
}

#[inline(always)]
fn load<T: Float>(row: &[T], factor: f32, out: &mut [f32]) {
    if T::DTYPE == DType::F16 {
        // Hardware conversion works on whole rows only.
        super::simd::widen(row, out);
        for x in out {
            *x *= factor;
        }
    } else {
        for (out, x) in out.iter_mut().zip(row) {
            *out = x.load() * factor;
        }
    }
}

/// Up to [`PANEL`] packed rows `[rows, padded]` transposed to `[D, PANEL]`, zero beyond the rows.
pub(crate) fn transpose(source: &[f32], (padded, dim): (usize, usize), out: &mut [f32]) {
    let rows = source.len() / padded;
    pack_columns(View::transposed(source, padded), (0, rows), dim, PANEL, &mut out[..dim * PANEL]);
}

/// How many keys of the block from `start` each query of a panel sees, the fewest and the most of them by half panel.
struct Visible {
    counts: [[u32; PAD]; 2],
    fewest: [usize; 2],
    most: [usize; 2],
}

impl Visible {
    /// For queries `first..last` and the `count` keys from `start`; lanes without a query see nothing.
    #[inline(always)]
    fn of<T: Float>(p: &Problem<T>, b: usize, (first, last): (usize, usize), (start, count): (usize, usize)) -> Self {
        let mut visible = Self { counts: [[0; PAD]; 2], fewest: [0; 2], most: [0; 2] };
        for half in 0..2 {
            for (lane, seen) in visible.counts[half].iter_mut().enumerate() {
                let t = first + half * PAD + lane;
                *seen = if t < last { p.visible(b, t).saturating_sub(start).min(count) as u32 } else { 0 };
            }
            visible.fewest[half] = visible.counts[half].iter().copied().min().unwrap_or(0) as usize;
            visible.most[half] = visible.counts[half].iter().copied().max().unwrap_or(0) as usize;
        }
        visible
    }

    /// Keys that any query of the panel sees.
    fn keys(&self) -> usize {
        self.most[0].max(self.most[1])
    }
}

/// Scores `[keys, PANEL]` of packed keys `[keys, padded]` and a transposed panel `[D, PANEL]`. Under causal masks the
/// second half of a panel sees more keys than the first: no scores are made where no lane of a half sees the key.
#[inline(always)]
fn scores<V: Vector>(visible: &Visible, keys: &[f32], (padded, dim): (usize, usize), panel: &[f32], out: &mut [f32]) {
    let both = visible.most[0].min(visible.most[1]);
    let left = |key: usize| Left { data: &keys[key * padded..], row: padded, column: 1 };
    product::<V>((both, PANEL, dim), left(0), (panel, PANEL), (out, PANEL), false);
    for half in 0..2 {
        if let Some(more) = visible.most[half].checked_sub(both).filter(|more| *more > 0) {
            let at = both * PANEL + half * PAD;
            product::<V>((more, PAD, dim), left(both), (&panel[half * PAD..], PANEL), (&mut out[at..], PANEL), false);
        }
    }
}

/// Tasks per chunk so that a chunk is worth a thread: about a million multiply-adds.
pub(crate) fn tasks_per_chunk(flops: usize) -> usize {
    (2_000_000 / flops.max(1)).max(1)
}
