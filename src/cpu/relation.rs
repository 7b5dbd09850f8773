//! CPU kernels of `ops/relation.rs`: scores of student and teacher for a block of keys and a panel of queries side by side
//! in vector lanes, one task per (batch, head). A task's order of summation depends on the problem alone.

use super::attention::tile::{Left, Vector, Work, best, product};
use super::attention::{MASKED, PAD, PANEL, Shared, pack, take, tasks_per_chunk, transpose, with_workspace};
use super::{Args, float_kernel, simd};
use crate::dtype::Float;
use crate::error::Result;

pub fn relation(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

pub fn relation_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

/// Keys whose scores exist at a time.
const KEYS: usize = 128;

/// Parameter words of `Relation::params`, and the optional inputs.
struct Problem<'a, T> {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    /// Of student and teacher.
    dims: [usize; 2],
    mask: usize,
    squared: bool,
    scales: [f32; 2],
    /// Queries and keys of student and teacher.
    pairs: [[&'a [T]; 2]; 2],
    context: Option<&'a [u32]>,
    lengths: Option<&'a [u32]>,
    weights: &'a [f32],
    /// Number of inputs of the forward op.
    inputs: usize,
}

impl<'a, T: Float> Problem<'a, T> {
    fn of(args: &Args<'a>) -> Self {
        let flags = args.u(6);
        let mut inputs = 4;
        let mut position = |present: bool| {
            inputs += usize::from(present);
            present.then_some(inputs - 1)
        };
        let context = position(flags & 3 == 2).map(|i| args.read(i));
        let lengths = position(flags & 4 != 0).map(|i| args.read(i));
        Self {
            batch: args.u(0),
            queries: args.u(1),
            keys: args.u(2),
            heads: args.u(3),
            dims: [args.u(4), args.u(5)],
            mask: flags & 3,
            squared: flags & 8 != 0,
            scales: [args.f(7), args.f(8)],
            pairs: [[args.read(0), args.read(1)], [args.read(2), args.read(3)]],
            context,
            lengths,
            weights: args.read(inputs),
            inputs: inputs + 1,
        }
    }

    /// Every mask leaves a prefix of the keys visible: how many, for query `t`.
    fn visible(&self, b: usize, t: usize) -> usize {
        let mut n = self.keys;
        if self.mask != 0 {
            n = n.min((t + 1).max(self.context.map_or(0, |c| c[b] as usize)));
        }
        n.min(self.lengths.map_or(n, |l| l[b] as usize))
    }

    /// Start of row (b, n, h) of a tensor with `extent` rows of `dim` per batch element and head.
    fn row(&self, [b, n, h]: [usize; 3], extent: usize, dim: usize) -> usize {
        ((b * extent + n) * self.heads + h) * dim
    }

    fn padded(&self, model: usize) -> usize {
        self.dims[model].next_multiple_of(PAD)
    }

    fn task_flops(&self) -> usize {
        2 * self.queries * self.keys * (self.dims[0] + self.dims[1])
    }
}

/// One panel of queries against one block of keys.
struct Scores<'w> {
    /// Queries of student and teacher, transposed `[D, PANEL]`; keys `[keys, padded]`.
    panels: [&'w mut [f32]; 2],
    keys: [&'w mut [f32]; 2],
    /// `[KEYS, PANEL]` each.
    scores: [&'w mut [f32]; 2],
    /// A panel of queries by rows, `[PANEL, padded]`.
    packed: &'w mut [f32],
}

impl<'w> Scores<'w> {
    fn len<T: Float>(p: &Problem<T>) -> usize {
        let widest = p.padded(0).max(p.padded(1));
        let of = |m: usize| p.padded(m) * (PANEL + p.keys) + KEYS * PANEL;
        of(0) + of(1) + PANEL * widest
    }

    fn of<T: Float>(p: &Problem<T>, memory: &mut &'w mut [f32]) -> Self {
        let mut each = |len: [usize; 2]| len.map(|len| take(memory, len));
        let padded = [p.padded(0), p.padded(1)];
        Self {
            panels: each(padded.map(|n| n * PANEL)),
            keys: each(padded.map(|n| n * p.keys)),
            scores: each([KEYS * PANEL; 2]),
            packed: take(memory, PANEL * padded[0].max(padded[1])),
        }
    }

    /// All keys of one batch element and head.
    fn load_keys<T: Float>(&mut self, p: &Problem<T>, b: usize, h: usize) {
        for model in 0..2 {
            let dim = p.dims[model];
            let source = &p.pairs[model][1][p.row([b, 0, h], p.keys, dim)..];
            pack(source, (p.heads * dim, dim), p.keys, p.padded(model), 1.0, self.keys[model]);
        }
    }

    /// Queries `t..t + rows`, scaled. The student's come last, so that `packed` keeps them.
    fn load_queries<T: Float>(&mut self, p: &Problem<T>, [b, t, h]: [usize; 3], rows: usize) {
        for model in [1, 0] {
            let (dim, padded) = (p.dims[model], p.padded(model));
            let source = &p.pairs[model][0][p.row([b, t, h], p.queries, dim)..];
            pack(source, (p.heads * dim, dim), rows, padded, p.scales[model], self.packed);
            transpose(&self.packed[..rows * padded], (padded, dim), self.panels[model]);
        }
    }

    /// Scores of keys `start..start + count`.
    fn compute<V: Vector, T: Float>(&mut self, p: &Problem<T>, start: usize, count: usize) {
        for model in 0..2 {
            let padded = p.padded(model);
            let left = Left { data: &self.keys[model][start * padded..], row: padded, column: 1 };
            let panel = (&*self.panels[model], PANEL);
            product::<V>((count, PANEL, p.dims[model]), left, panel, (self.scores[model], PANEL), false);
        }
    }
}

/// Keys of the block from `start` that each lane's query sees; lanes without a query see none.
fn counts<T: Float>(p: &Problem<T>, [b, t]: [usize; 2], rows: usize, start: usize, count: usize) -> [u32; PANEL] {
    let seen = |lane: usize| if lane < rows { p.visible(b, t + lane).saturating_sub(start).min(count) } else { 0 };
    std::array::from_fn(|lane| seen(lane) as u32)
}

struct Forward<'a, T> {
    p: &'a Problem<'a, T>,
    loss: Shared<f32>,
    sums: Shared<f32>,
    b: usize,
    h: usize,
    memory: &'a mut [f32],
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let p = Problem::<T>::of(args);
    let (loss, sums) = (Shared::of(args.write::<f32>(p.inputs)), Shared::of(args.write::<f32>(p.inputs + 1)));
    args.ranges(p.batch * p.heads, tasks_per_chunk(p.task_flops()), |tasks| {
        with_workspace(Scores::len(&p), |memory| {
            for task in tasks.clone() {
                best(Forward { p: &p, loss, sums, b: task / p.heads, h: task % p.heads, memory });
            }
        });
    });
    Ok(())
}

/// What is summed of a panel's rows, a lane each.
struct Running {
    /// Largest score of student and teacher so far, and the sums of exponentials against it.
    largest: [[f32; PANEL]; 2],
    total: [[f32; PANEL]; 2],
    /// Sum of the teacher's exponentials times the difference of the scores; or of squared differences.
    apart: [f32; PANEL],
}

impl Running {
    fn new() -> Self {
        Self { largest: [[MASKED; PANEL]; 2], total: [[0.0; PANEL]; 2], apart: [0.0; PANEL] }
    }

    /// Takes in a block of keys: online softmax of both models at once.
    #[inline(always)]
    fn divergence(&mut self, scores: &[&mut [f32]; 2], counts: &[u32; PANEL], most: usize) {
        let rows = [0, 1].map(|m| scores[m].as_chunks::<PANEL>().0);
        for m in 0..2 {
            let mut high = self.largest[m];
            for (key, row) in rows[m].iter().enumerate().take(most) {
                for lane in 0..PANEL {
                    let x = if (key as u32) < counts[lane] { row[lane] } else { MASKED };
                    high[lane] = if x > high[lane] { x } else { high[lane] };
                }
            }
            for lane in 0..PANEL {
                // A NaN or an infinity must get through, not 0 x infinity where nothing was summed yet.
                let correction = simd::exp(self.largest[m][lane] - high[lane]);
                self.total[m][lane] *= correction;
                if m == 1 {
                    self.apart[lane] *= correction;
                }
            }
            self.largest[m] = high;
        }
        for (key, (s, t)) in rows[0].iter().zip(rows[1]).enumerate().take(most) {
            for lane in 0..PANEL {
                let live = (key as u32) < counts[lane];
                let q = simd::exp(s[lane] - self.largest[0][lane]);
                let p = simd::exp(t[lane] - self.largest[1][lane]);
                let apart = p * (t[lane] - s[lane]);
                self.total[0][lane] += if live { q } else { 0.0 };
                self.total[1][lane] += if live { p } else { 0.0 };
                self.apart[lane] += if live { apart } else { 0.0 };
            }
        }
    }

    #[inline(always)]
    fn squares(&mut self, scores: &[&mut [f32]; 2], counts: &[u32; PANEL], most: usize) {
        let rows = [0, 1].map(|m| scores[m].as_chunks::<PANEL>().0);
        for (key, (s, t)) in rows[0].iter().zip(rows[1]).enumerate().take(most) {
            for lane in 0..PANEL {
                let square = (s[lane] - t[lane]) * (s[lane] - t[lane]);
                self.apart[lane] += if (key as u32) < counts[lane] { square } else { 0.0 };
            }
        }
    }
}

impl<T: Float> Work for Forward<'_, T> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let (p, b, h) = (self.p, self.b, self.h);
        let mut memory = std::mem::take(&mut self.memory);
        let mut w = Scores::of(p, &mut memory);
        w.load_keys(p, b, h);
        for t in (0..p.queries).step_by(PANEL) {
            let rows = (p.queries - t).min(PANEL);
            w.load_queries(p, [b, t, h], rows);
            let mut running = Running::new();
            for start in (0..p.keys).step_by(KEYS) {
                let count = (p.keys - start).min(KEYS);
                let counts = counts(p, [b, t], rows, start, count);
                let most = counts.iter().copied().max().unwrap_or(0) as usize;
                if most == 0 {
                    break;
                }
                w.compute::<V, T>(p, start, most);
                if p.squared {
                    running.squares(&w.scores, &counts, most);
                } else {
                    running.divergence(&w.scores, &counts, most);
                }
            }
            self.store(&running, t, rows);
        }
    }
}

impl<T: Float> Forward<'_, T> {
    fn store(&self, running: &Running, t: usize, rows: usize) {
        let (p, first) = (self.p, (self.b * self.p.heads + self.h) * self.p.queries + t);
        // SAFETY: rows of (b, h) belong to this task alone.
        let (loss, sums) = unsafe { (self.loss.slice(first, rows), self.sums.slice(2 * first, 2 * rows)) };
        for lane in 0..rows {
            let weight = p.weights[self.b * p.queries + t + lane];
            let seen = p.visible(self.b, t + lane);
            let lse = [0, 1].map(|m| match (p.squared, seen) {
                (true, _) => 0.0,
                (false, 0) => MASKED,
                _ => running.largest[m][lane] + running.total[m][lane].ln(),
            });
            loss[lane] = match (p.squared, seen) {
                (_, 0) => 0.0,
                (true, seen) => weight * running.apart[lane] / seen as f32,
                (false, _) => weight * (running.apart[lane] / running.total[1][lane] - lse[1] + lse[0]),
            };
            sums[2 * lane..2 * lane + 2].copy_from_slice(&lse);
        }
    }
}

struct Backward<'a, T> {
    p: &'a Problem<'a, T>,
    sums: &'a [f32],
    dloss: &'a [f32],
    da: Shared<T>,
    db: Shared<T>,
    b: usize,
    h: usize,
    memory: &'a mut [f32],
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let p = Problem::<T>::of(args);
    let (sums, dloss) = (args.read::<f32>(p.inputs), args.read::<f32>(p.inputs + 1));
    let (da, db) = (Shared::of(args.write::<T>(p.inputs + 2)), Shared::of(args.write::<T>(p.inputs + 3)));
    let memory = Scores::len(&p) + (PANEL + p.keys) * p.padded(0);
    args.ranges(p.batch * p.heads, tasks_per_chunk(2 * p.task_flops()), |tasks| {
        with_workspace(memory, |memory| {
            for task in tasks.clone() {
                best(Backward { p: &p, sums, dloss, da, db, b: task / p.heads, h: task % p.heads, memory });
            }
        });
    });
    Ok(())
}

impl<T: Float> Backward<'_, T> {
    /// Slopes of the loss in the student's scores, in their place; zero where a lane does not see the key.
    #[inline(always)]
    fn slopes(&self, scores: &mut [&mut [f32]; 2], counts: &[u32; PANEL], t: usize, (rows, keys): (usize, usize)) {
        let p = self.p;
        let (mut lse, mut factor) = ([[0.0f32; PANEL]; 2], [0.0f32; PANEL]);
        for lane in 0..rows {
            let row = (self.b * p.heads + self.h) * p.queries + t + lane;
            factor[lane] = p.weights[self.b * p.queries + t + lane] * self.dloss[row];
            if p.squared {
                factor[lane] *= 2.0 / p.visible(self.b, t + lane).max(1) as f32;
            }
            lse = [0, 1].map(|m| {
                let mut lse = lse[m];
                lse[lane] = self.sums[2 * row + m];
                lse
            });
        }
        let [students, teachers] = scores;
        let (students, teachers) = (students.as_chunks_mut::<PANEL>().0, teachers.as_chunks::<PANEL>().0);
        for (key, (s, t)) in students.iter_mut().zip(teachers).enumerate().take(keys) {
            for lane in 0..PANEL {
                let apart = if p.squared {
                    s[lane] - t[lane]
                } else {
                    simd::exp(s[lane] - lse[0][lane]) - simd::exp(t[lane] - lse[1][lane])
                };
                s[lane] = if (key as u32) < counts[lane] { factor[lane] * apart } else { 0.0 };
            }
        }
    }
}

impl<T: Float> Work for Backward<'_, T> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let (p, b, h) = (self.p, self.b, self.h);
        let (dim, padded) = (p.dims[0], p.padded(0));
        let mut memory = std::mem::take(&mut self.memory);
        let mut w = Scores::of(p, &mut memory);
        let da = take(&mut memory, PANEL * padded);
        let db = take(&mut memory, p.keys * padded);
        db.fill(0.0);
        w.load_keys(p, b, h);
        for t in (0..p.queries).step_by(PANEL) {
            let rows = (p.queries - t).min(PANEL);
            w.load_queries(p, [b, t, h], rows);
            da.fill(0.0);
            for start in (0..p.keys).step_by(KEYS) {
                let count = (p.keys - start).min(KEYS);
                let counts = counts(p, [b, t], rows, start, count);
                let most = counts.iter().copied().max().unwrap_or(0) as usize;
                if most == 0 {
                    break;
                }
                w.compute::<V, T>(p, start, most);
                self.slopes(&mut w.scores, &counts, t, (rows, most));
                let slopes = &*w.scores[0];
                let by_query = Left { data: slopes, row: 1, column: PANEL };
                product::<V>(
                    (rows, padded, most),
                    by_query,
                    (&w.keys[0][start * padded..], padded),
                    (da, padded),
                    true,
                );
                // The packed queries carry the scale already.
                let by_key = Left { data: slopes, row: PANEL, column: 1 };
                let out = (&mut db[start * padded..], padded);
                product::<V>((most, padded, rows), by_key, (w.packed, padded), out, true);
            }
            for (row, sums) in da.chunks_exact_mut(padded).take(rows).enumerate() {
                let sums = &mut sums[..dim];
                sums.iter_mut().for_each(|x| *x *= p.scales[0]);
                // SAFETY: rows of (b, h) belong to this task alone.
                simd::narrow(sums, unsafe { self.da.slice(p.row([b, t + row, h], p.queries, dim), dim) });
            }
        }
        for (key, sums) in db.chunks_exact(padded).enumerate() {
            // SAFETY: as above.
            simd::narrow(&sums[..dim], unsafe { self.db.slice(p.row([b, key, h], p.keys, dim), dim) });
        }
    }
}
