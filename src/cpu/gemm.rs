//! Matrix product on the CPU: C = f((C +) A B + bias) with f32 accumulation, any strides, any float storage. Where both
//! operands are bf16 and the processor multiplies pairs of them, they stay so; else they are widened as they are packed.
//!
//! Blocking after Goto and van de Geijn 2008 and BLIS (Van Zee and van de Geijn 2015): a block of A packed for the
//! second-level cache, a panel of B for the first, a tile of C in registers. The block length along k depends on k
//! alone and each element of C is summed in the order of k, so that the result is the same bits for any split of the
//! rows and columns: for any number of threads.

mod pack;
#[cfg(target_arch = "x86_64")]
pub(super) use pack::turn;
pub(super) use pack::{pack_a, pack_b, pack_columns};
mod tile;

use std::marker::PhantomData;

use rayon::prelude::*;

use super::scratch::scratch;
use super::{Args, simd};
use crate::dtype::{DType, Float};
use tile::{Tiles, tiles};

/// A matrix inside a slice: element (i, j) is `data[i * row + j * column]`.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub column: usize,
}

impl<'a, T> View<'a, T> {
    /// Rows of `columns` contiguous elements.
    pub fn rows(data: &'a [T], columns: usize) -> Self {
        Self { data, row: columns, column: 1 }
    }

    /// The transpose of the matrix whose rows are `columns` contiguous elements.
    pub fn transposed(data: &'a [T], columns: usize) -> Self {
        Self { data, row: 1, column: columns }
    }

    /// Elements that a matrix of `rows` x `columns` reaches.
    fn extent(&self, rows: usize, columns: usize) -> usize {
        if rows == 0 || columns == 0 { 0 } else { (rows - 1) * self.row + (columns - 1) * self.column + 1 }
    }
}

/// What is applied to a finished element.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    #[default]
    None,
    Relu,
    /// The tanh form.
    Gelu,
}

impl Activation {
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Activation::None => x,
            // Not `max`: a NaN must stay one.
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::Gelu => gelu(x),
        }
    }
}

/// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3).
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    x / (1.0 + simd::exp(-2.0 * u))
}

/// One product: A is m x k, B is k x n, C is m x n.
#[derive(Clone, Copy)]
pub struct Product<'a, A, B> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: View<'a, A>,
    pub b: View<'a, B>,
    /// Add to what C holds.
    pub accumulate: bool,
    /// One value per column, added before the activation.
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
}

impl<'a, A: Float, B: Float> Product<'a, A, B> {
    /// C = A B.
    pub fn new([m, n, k]: [usize; 3], a: View<'a, A>, b: View<'a, B>) -> Self {
        Self { m, n, k, a, b, accumulate: false, bias: None, activation: Activation::None }
    }

    /// C += A B.
    #[must_use]
    pub fn accumulate(self) -> Self {
        Self { accumulate: true, ..self }
    }
}

/// Longest block along k, in words (see `tile.rs`): a panel of A of 14 rows is then 28 KB and stays in the first-level
/// cache.
const KC: usize = 512;
/// Most columns packed at a time: a block of B is then 4 MB, in the last-level cache.
const NC: usize = 2048;
/// Columns that one panel of A meets before the next: 512 x 256 words are 512 KB, half of the second-level cache.
const SLICE: usize = 256;
/// Most rows of a packed block of A: 2 MB of which each panel is read once for each slice. Fewer would read B more often
/// from the last-level cache, which costs more; more would touch more pages of C in turn than the processor remembers.
const MC: usize = 1008;
/// Sums held at a time where C is stored in 16 bits and they are added to in turn: 16 MB.
const SUMS: usize = 4 << 20;
/// Work below which threads cost more than they bring: 2 M multiply-adds are about 15 us on one AVX-512 core.
const WORTH_THREADS: usize = 2 << 20;

/// Product of matrices, on the calling thread; for use inside a parallel task. `row`: elements from row to row of C.
pub fn gemm<A: Float, B: Float, C: Float>(p: &Product<A, B>, c: &mut [C], row: usize) {
    run(None, p, c, row);
}

/// Product of matrices on the device's threads: the same bits as [`gemm`].
pub fn gemm_threaded<A: Float, B: Float, C: Float>(args: &Args, p: &Product<A, B>, c: &mut [C], row: usize) {
    let threads = args.threads();
    if threads == 1 || p.m * p.n * p.k < WORTH_THREADS {
        return run(None, p, c, row);
    }
    args.install(|| run(Some(threads), p, c, row));
}

fn run<A: Float, B: Float, C: Float>(threads: Option<usize>, p: &Product<A, B>, c: &mut [C], row: usize) {
    if p.m == 0 || p.n == 0 {
        return;
    }
    assert!(p.a.data.len() >= p.a.extent(p.m, p.k), "A is smaller than its shape");
    assert!(p.b.data.len() >= p.b.extent(p.k, p.n), "B is smaller than its shape");
    assert!(row >= p.n && c.len() >= (p.m - 1) * row + p.n, "C is smaller than its shape");
    assert!(p.bias.is_none_or(|b| b.len() >= p.n), "bias is smaller than a row");
    let tiles = tiles(A::DTYPE == DType::Bf16 && B::DTYPE == DType::Bf16);
    let base = c.as_mut_ptr();
    if C::DTYPE == DType::F32 {
        return blocked(threads, tiles, p, Target::new(base, row, Some((base.cast(), row))));
    }
    // 16-bit storage rounds once, after the whole sum.
    if p.k <= depth(p.k.div_ceil(tiles.word)) * tiles.word {
        return blocked(threads, tiles, p, Target::new(base, row, None));
    }
    let rows = (SUMS / p.n).max(MC);
    let mut sums = scratch::<f32>(p.m.min(rows) * p.n);
    for i0 in (0..p.m).step_by(rows) {
        let a = View { data: p.a.data.get(i0 * p.a.row..).unwrap_or(&[]), ..p.a };
        let part = Product { m: rows.min(p.m - i0), a, ..*p };
        let c = &mut c[i0 * row..];
        blocked(threads, tiles, &part, Target::new(c.as_mut_ptr(), row, Some((sums.as_mut_ptr(), p.n))));
    }
}

/// C as tasks see it: each writes its own rows and columns.
#[derive(Clone, Copy)]
struct Target<'a, C> {
    base: *mut C,
    row: usize,
    /// Where sums lie between blocks of k, and from row to row of them: C itself if it is f32. Without, there is one block.
    sums: Option<(*mut f32, usize)>,
    _memory: PhantomData<&'a mut [C]>,
}

// SAFETY: tasks write disjoint tiles (see `blocked`).
unsafe impl<C> Send for Target<'_, C> {}
// SAFETY: as above.
unsafe impl<C> Sync for Target<'_, C> {}

impl<C> Target<'_, C> {
    fn new(base: *mut C, row: usize, sums: Option<(*mut f32, usize)>) -> Self {
        Self { base, row, sums, _memory: PhantomData }
    }
}

/// `extent` cut into equal parts of at most `most`, each a multiple of `unit` but the last.
fn part(extent: usize, most: usize, unit: usize) -> usize {
    let parts = extent.div_ceil(most).max(1);
    extent.div_ceil(parts).next_multiple_of(unit)
}

/// Length of a block along k, both in words. k alone decides: the order of every sum is the same whatever m, n and the threads are. A
/// multiple of 64, so that blocks start with whole words of 2:4 places.
pub(super) fn depth(k: usize) -> usize {
    part(k, KC, 64).max(1)
}

/// One task: a block of rows against some columns of the packed block of B.
#[derive(Clone, Copy)]
struct Block {
    i0: usize,
    m: usize,
    j0: usize,
    n: usize,
}

fn blocked<A: Float, B: Float, C: Float>(threads: Option<usize>, tiles: &Tiles, p: &Product<A, B>, c: Target<C>) {
    let (columns, word) = (tiles.columns(), tiles.word);
    let kc = depth(p.k.div_ceil(word)) * word;
    let nc = part(p.n, NC, columns);
    let tasks = threads.unwrap_or(1);
    let rows = p.m.div_ceil(p.m.div_ceil(tiles.rows));
    let mc = p.m.div_ceil(p.m.div_ceil(MC).next_multiple_of(tasks)).next_multiple_of(rows);
    let blocks_down = p.m.div_ceil(mc);
    let mut packed = scratch::<f32>(p.n.min(nc).next_multiple_of(columns) * kc.min(p.k).div_ceil(word));
    for j0 in (0..p.n).step_by(nc) {
        let n = nc.min(p.n - j0);
        // Few blocks of rows: columns are shared out too.
        let across = if blocks_down >= tasks { 1 } else { tasks.div_ceil(blocks_down) };
        let slice = part(n, n.div_ceil(across), columns);
        let blocks: Vec<Block> = (0..p.m)
            .step_by(mc)
            .flat_map(|i0| (0..n).step_by(slice).map(move |s| (i0, s)))
            .map(|(i0, s)| Block { i0, m: mc.min(p.m - i0), j0: j0 + s, n: slice.min(n - s) })
            .collect();
        // A product over no k still writes C once.
        for k0 in (0..p.k.max(1)).step_by(kc) {
            let k = (k0, kc.min(p.k - k0));
            let panel = columns * k.1.div_ceil(word);
            let packed = &mut packed[..n.div_ceil(columns) * panel];
            let pack = |start: usize, part: &mut [f32]| {
                let own = (part.len() / panel.max(1) * columns).min(n - start);
                pack::pack_b_words(p.b, (j0 + start, own), k, (columns, word), part);
            };
            let work = |packed: &[f32], at: Block| {
                block(tiles, p, at, rows, k, &packed[(at.j0 - j0) / columns * panel..], c);
            };
            if tasks == 1 {
                pack(0, packed);
                blocks.iter().for_each(|&at| work(packed, at));
            } else {
                let panels = n.div_ceil(columns).div_ceil(4 * tasks);
                let parts = packed.par_chunks_mut((panels * panel).max(1)).enumerate();
                parts.for_each(|(i, part)| pack(i * panels * columns, part));
                blocks.par_iter().with_max_len(1).for_each(|&at| work(packed, at));
            }
        }
    }
}

/// One block of C over k from `k0` on; `b` holds its panels of B.
fn block<A: Float, B: Float, C: Float>(
    tiles: &Tiles,
    p: &Product<A, B>,
    at: Block,
    rows: usize,
    (k0, k): (usize, usize),
    b: &[f32],
    c: Target<C>,
) {
    let (columns, words) = (tiles.columns(), k.div_ceil(tiles.word));
    let (first, last) = (k0 == 0, k0 + k == p.k);
    let mut packed = scratch::<f32>(at.m * words);
    let mut strip = scratch::<f32>(if c.sums.is_some() { 0 } else { rows * SLICE });
    let narrow = C::DTYPE != DType::F32;
    let finishes = p.bias.is_some() || p.activation != Activation::None;
    for s in (0..at.n).step_by(SLICE) {
        let slice = SLICE.min(at.n - s);
        for i in (0..at.m).step_by(rows) {
            let m = rows.min(at.m - i);
            let (i0, j0) = (at.i0 + i, at.j0 + s);
            let a = &mut packed[i * words..(i + m) * words];
            // Rows that the next panel is packed from: they are asked for while this one is multiplied.
            let mut ahead = 0..0;
            if s == 0 {
                // Just before it is used: it then lies in the first-level cache.
                pack::pack_a(p.a, (i0, m), (k0, k), tiles.word, a);
                ahead = i0 + m..at.i0 + at.m.min(i + m + rows);
            }
            let (sums, stride) = match c.sums {
                // SAFETY: there are as many sums as elements of C.
                Some((sums, row)) => (unsafe { sums.add(i0 * row + j0) }, row),
                None => (strip.as_mut_ptr(), SLICE),
            };
            // SAFETY: `run` checked that C holds m x n elements at this stride; these sums, and these elements where they
            // are not the sums, are this task's.
            let sums_of = |i| unsafe { std::slice::from_raw_parts_mut(sums.add(i * stride), slice) };
            // SAFETY: as above.
            let c_of = |i| unsafe { std::slice::from_raw_parts_mut(c.base.add((i0 + i) * c.row + j0), slice) };
            if narrow && first && p.accumulate {
                (0..m).for_each(|i| simd::widen(c_of(i), sums_of(i)));
            }
            for j in (0..slice).step_by(columns) {
                let (tile, tail) = tiles.pick(m, columns.min(slice - j));
                let b = &b[(s + j) * words..(s + j + columns) * words];
                let ask = [(); 2].map(|()| match ahead.next() {
                    Some(i) => p.a.data.as_ptr().wrapping_add(i * p.a.row + k0 * p.a.column).cast(),
                    None => a.as_ptr(),
                });
                // SAFETY: as above; panels hold k groups; this task alone writes these rows and columns; `tiles` fits
                // the processor.
                unsafe {
                    tile(words, a.as_ptr(), b.as_ptr(), ask, (sums.add(j), stride), p.accumulate || !first, tail)
                };
            }
            for i in 0..if last && (finishes || narrow) { m } else { 0 } {
                // Whole sums, still in the first-level cache.
                if finishes {
                    finish(sums_of(i), p.bias.map(|bias| &bias[j0..]), p.activation);
                }
                if narrow {
                    simd::narrow(sums_of(i), c_of(i));
                }
            }
        }
    }
}

simd::multiversion! {
    pub(super) fn finish(row: &mut [f32], bias: Option<&[f32]>, activation: Activation) {
        if let Some(bias) = bias {
            row.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
        match activation {
            Activation::None => {}
            Activation::Relu => row.iter_mut().for_each(|c| *c = Activation::Relu.apply(*c)),
            Activation::Gelu => row.iter_mut().for_each(|c| *c = gelu(*c)),
        }
    }
}

#[cfg(test)]
mod tests;
