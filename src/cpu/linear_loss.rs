//! CPU kernels of `ops/linear_loss.rs`: tiles of logits by the packed product, then the row kernels of the losses.

use super::distill::{Form, Online, jsd_sums, kl_online, kl_slopes, kl_value};
use super::gemm::{Product, View, gemm_threaded};
use super::scratch::{scratch, zeros};
use super::simd::{self, narrow};
use super::softmax::{BLOCK, IGNORE, entropy_slopes, online_exp_sum, row_sum};
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Words of a tile: a chunk of 256 tokens against them is 2 MB of logits.
const TILE: usize = 2048;

pub fn linear_cross_entropy(args: &Args) -> Result<()> {
    float_kernel!(args, entropy)
}

pub fn linear_cross_entropy_backward(args: &Args) -> Result<()> {
    float_kernel!(args, entropy_backward)
}

pub fn linear_predict(args: &Args) -> Result<()> {
    float_kernel!(args, predict)
}

pub fn linear_kl(args: &Args) -> Result<()> {
    float_kernel!(args, kl)
}

pub fn linear_kl_backward(args: &Args) -> Result<()> {
    float_kernel!(args, kl_backward)
}

/// One side's hidden states `[n, d]` and head `[v, d]`.
struct Head<'a, T> {
    hidden: &'a [T],
    weight: &'a [T],
    d: usize,
}

/// A range of tokens against a range of words.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    rows: usize,
    word: usize,
    words: usize,
}

impl Tile {
    fn len(&self) -> usize {
        self.rows * self.words
    }
}

/// Tiles of `n` tokens by `v` words, the words of one range of tokens together.
fn by_tokens(n: usize, v: usize, chunk: usize) -> impl Iterator<Item = Tile> {
    (0..n).step_by(chunk).flat_map(move |row| {
        (0..v).step_by(TILE).map(move |word| Tile { row, rows: chunk.min(n - row), word, words: TILE.min(v - word) })
    })
}

impl<T: Float> Head<'_, T> {
    fn hidden(&self, t: Tile) -> &[T] {
        &self.hidden[t.row * self.d..(t.row + t.rows) * self.d]
    }

    fn weight(&self, t: Tile) -> &[T] {
        &self.weight[t.word * self.d..(t.word + t.words) * self.d]
    }

    /// z = hidden weightᵀ of one tile.
    fn logits(&self, args: &Args, t: Tile, z: &mut [f32]) {
        let (hidden, weight) = (View::rows(self.hidden(t), self.d), View::transposed(self.weight(t), self.d));
        gemm_threaded(args, &Product::new([t.rows, t.words, self.d], hidden, weight), z, t.words);
    }

    /// dhidden and dweight, where `slopes` turns each tile's logits into their gradient. Words outside, tokens inside:
    /// a tile of dweight is finished before the next, and dhidden is summed in the order of the words.
    fn gradients(
        &self,
        args: &Args,
        chunk: usize,
        slopes: &mut dyn FnMut(Tile, &mut [f32]),
        dhidden: &mut [T],
        dweight: &mut [T],
    ) {
        // Of two bf16 a product is twice as fast; f16 would be widened again.
        match T::DTYPE {
            DType::Bf16 => self.gradients_by::<T>(args, chunk, slopes, dhidden, dweight),
            _ => self.gradients_by::<f32>(args, chunk, slopes, dhidden, dweight),
        }
    }

    /// With the slopes multiplied as S.
    fn gradients_by<S: Float>(
        &self,
        args: &Args,
        chunk: usize,
        slopes: &mut dyn FnMut(Tile, &mut [f32]),
        dhidden: &mut [T],
        dweight: &mut [T],
    ) {
        let (d, n, v) = (self.d, self.hidden.len() / self.d, self.weight.len() / self.d);
        let mut z = scratch::<f32>(chunk.min(n) * TILE.min(v));
        let mut narrow_z = scratch::<S>(if S::DTYPE == DType::F32 { 0 } else { z.len() });
        let mut sums = zeros::<f32>(n * d);
        let mut room = scratch::<f32>(if T::DTYPE == DType::F32 { 0 } else { TILE.min(v) * d });
        for word in (0..v).step_by(TILE) {
            let words = TILE.min(v - word);
            simd::write_row(&mut dweight[word * d..(word + words) * d], &mut room, |dweight| {
                dweight.fill(0.0);
                for row in (0..n).step_by(chunk) {
                    let t = Tile { row, rows: chunk.min(n - row), word, words };
                    let z = &mut z[..t.len()];
                    self.logits(args, t, z);
                    slopes(t, z);
                    let z = simd::narrowed(z, &mut narrow_z);
                    let dz = View::rows(z, words);
                    let back = Product::new([t.rows, d, words], dz, View::rows(self.weight(t), d)).accumulate();
                    gemm_threaded(args, &back, &mut sums[row * d..(row + t.rows) * d], d);
                    let dz = View::transposed(z, words);
                    let back = Product::new([words, d, t.rows], dz, View::rows(self.hidden(t), d)).accumulate();
                    gemm_threaded(args, &back, dweight, d);
                }
            });
        }
        narrow(&sums, dhidden);
    }
}

/// What a pass over the logits of a row keeps for cross-entropy.
#[derive(Clone, Copy)]
struct Score {
    most: f32,
    exps: f32,
    sum: f32,
    target: f32,
    best: u32,
}

impl Score {
    // A target outside the vocabulary is never met: its score stays NaN.
    const START: Self = Self { most: f32::MIN, exps: 0.0, sum: 0.0, target: f32::NAN, best: 0 };

    fn lse(&self) -> f32 {
        self.most + self.exps.ln()
    }
}

/// Scores of all rows; `look` sees each row's logits of each tile. Rows with an ignored target are passed over unless `all`.
fn scores<T: Float>(
    args: &Args,
    head: &Head<T>,
    targets: &[u32],
    chunk: usize,
    all: bool,
    look: impl Fn(&mut Score, usize, &[f32]) + Sync + Send,
) -> Vec<Score> {
    let (n, v) = (targets.len(), head.weight.len() / head.d);
    let mut scores = vec![Score::START; n];
    let mut z = scratch::<f32>(chunk.min(n) * TILE.min(v));
    for t in by_tokens(n, v, chunk) {
        let z = &mut z[..t.len()];
        head.logits(args, t, z);
        args.rows(&mut scores[t.row..t.row + t.rows], 1, grain(t.words), |first, scores| {
            for (offset, score) in scores.iter_mut().enumerate() {
                let row = first + offset;
                let target = targets[t.row + row];
                if target == IGNORE && !all {
                    continue;
                }
                let z = &z[row * t.words..(row + 1) * t.words];
                look(score, t.word, z);
                (score.most, score.exps) = online_exp_sum(z, 1.0, (score.most, score.exps));
                if let Some(z) = (target as usize).checked_sub(t.word).and_then(|j| z.get(j)) {
                    score.target = *z;
                }
            }
        });
    }
    scores
}

/// Puts what `work` (start, logits, gradient) makes of a block of a row into its place.
fn replace(row: &mut [f32], work: impl Fn(usize, &[f32], &mut [f32])) {
    let mut logits = [0.0; BLOCK];
    for (index, block) in row.chunks_mut(BLOCK).enumerate() {
        let logits = &mut logits[..block.len()];
        logits.copy_from_slice(block);
        work(index * BLOCK, logits, block);
    }
}

fn head<'a, T: Float>(args: &Args<'a>, first: usize, d: usize) -> Head<'a, T> {
    Head { hidden: args.read::<T>(first), weight: args.read::<T>(first + 1), d }
}

fn entropy<T: Float>(args: &Args) -> Result<()> {
    let (head, targets) = (head::<T>(args, 0, args.u(1)), args.read::<u32>(2));
    let (loss, lse) = (args.write::<f32>(3), args.write::<f32>(4));
    let (v, chunk, smoothing) = (args.u(2), args.u(3), args.f(4));
    let look = |score: &mut Score, _: usize, z: &[f32]| {
        if smoothing > 0.0 {
            score.sum += row_sum(z);
        }
    };
    let scores = scores(args, &head, targets, chunk, false, look);
    for ((score, &target), (loss, lse)) in scores.iter().zip(targets).zip(loss.iter_mut().zip(lse)) {
        if target == IGNORE {
            (*loss, *lse) = (0.0, 0.0);
            continue;
        }
        *lse = score.lse();
        *loss = *lse - (1.0 - smoothing) * score.target - smoothing * (score.sum / v as f32);
    }
    Ok(())
}

fn predict<T: Float>(args: &Args) -> Result<()> {
    let (head, targets) = (head::<T>(args, 0, args.u(1)), args.read::<u32>(2));
    let (prediction, probability) = (args.write::<u32>(3), args.write::<f32>(4));
    let look = |score: &mut Score, word: usize, z: &[f32]| {
        let most = simd::largest(z);
        // Only a strictly larger logit moves the prediction: the lowest index wins ties.
        if (most > score.most || word == 0)
            && let Some(j) = z.iter().position(|z| *z == most)
        {
            score.best = (word + j) as u32;
        }
    };
    let scores = scores(args, &head, targets, args.u(3), true, look);
    for ((score, &target), (prediction, probability)) in
        scores.iter().zip(targets).zip(prediction.iter_mut().zip(probability))
    {
        *prediction = score.best;
        *probability = if target == IGNORE { 0.0 } else { score.target - score.lse() };
    }
    Ok(())
}

fn entropy_backward<T: Float>(args: &Args) -> Result<()> {
    let (head, targets) = (head::<T>(args, 0, args.u(1)), args.read::<u32>(2));
    let (lse, dloss) = (args.read::<f32>(3), args.read::<f32>(4));
    let (v, chunk, smoothing) = (args.u(2), args.u(3), args.f(4));
    let mut slopes = |t: Tile, z: &mut [f32]| {
        args.rows(z, t.words, grain(t.words), |first, z| {
            for (offset, z) in z.chunks_exact_mut(t.words).enumerate() {
                let row = t.row + first + offset;
                let (target, factor) = (targets[row], dloss[row]);
                if target == IGNORE {
                    z.fill(0.0);
                    continue;
                }
                replace(z, |_, z, dz| entropy_slopes(z, lse[row], factor, smoothing / v as f32, dz));
                if let Some(z) = (target as usize).checked_sub(t.word).and_then(|j| z.get_mut(j)) {
                    *z -= factor * (1.0 - smoothing);
                }
            }
        });
    };
    head.gradients(args, chunk, &mut slopes, args.write::<T>(5), args.write::<T>(6));
    Ok(())
}

fn kl<T: Float>(args: &Args) -> Result<()> {
    let (student, teacher) = (head::<T>(args, 0, args.u(1)), head::<T>(args, 2, args.u(2)));
    let weight = args.read::<f32>(4);
    let [loss, lse_s, lse_t, expectation] = [5, 6, 7, 8].map(|i| args.write::<f32>(i));
    let (n, v, chunk, form) = (weight.len(), args.u(3), args.u(4), Form::at(args, 5));
    let room = chunk.min(n) * TILE.min(v);
    let (mut zs, mut zt) = (scratch::<f32>(room), scratch::<f32>(room));
    let mut states = vec![(Online::START, [0.0f32; 2]); n];
    // The mixture of the Jensen-Shannon divergence needs both log sum exps: a second pass over the words.
    for pass in 0..if form.is_jsd() { 2 } else { 1 } {
        for t in by_tokens(n, v, chunk) {
            let (zs, zt) = (&mut zs[..t.len()], &mut zt[..t.len()]);
            student.logits(args, t, zs);
            teacher.logits(args, t, zt);
            args.rows(&mut states[t.row..t.row + t.rows], 1, grain(t.words), |first, states| {
                for (offset, (state, jsd)) in states.iter_mut().enumerate() {
                    let at = (first + offset) * t.words..(first + offset + 1) * t.words;
                    if pass == 0 {
                        *state = kl_online(&zs[at.clone()], &zt[at], form, *state);
                    } else {
                        let (s, t) = state.lse();
                        let [p, q] = jsd_sums(&zs[at.clone()], &zt[at], form, s, t);
                        *jsd = [jsd[0] + p, jsd[1] + q];
                    }
                }
            });
        }
    }
    for (row, (state, jsd)) in states.iter().enumerate() {
        let (value, e) = kl_value(&form, state, *jsd);
        (loss[row], expectation[row]) = (weight[row] * value, e);
        (lse_s[row], lse_t[row]) = state.lse();
    }
    Ok(())
}

fn kl_backward<T: Float>(args: &Args) -> Result<()> {
    let (student, teacher) = (head::<T>(args, 0, args.u(1)), head::<T>(args, 2, args.u(2)));
    let [weight, lse_s, lse_t, expectation, dloss] = [4, 5, 6, 7, 8].map(|i| args.read::<f32>(i));
    let (n, v, chunk, form) = (weight.len(), args.u(3), args.u(4), Form::at(args, 5));
    let mut zt = scratch::<f32>(chunk.min(n) * TILE.min(v));
    let mut slopes = |t: Tile, zs: &mut [f32]| {
        let zt = &mut zt[..t.len()];
        teacher.logits(args, t, zt);
        args.rows(zs, t.words, grain(t.words), |first, zs| {
            for (offset, zs) in zs.chunks_exact_mut(t.words).enumerate() {
                let (local, row) = (first + offset, t.row + first + offset);
                let zt = &zt[local * t.words..(local + 1) * t.words];
                let saved = [lse_s[row], lse_t[row], expectation[row]];
                replace(zs, |start, zs, dz| kl_slopes(zs, &zt[start..], form, saved, weight[row] * dloss[row], dz));
            }
        });
    };
    student.gradients(args, chunk, &mut slopes, args.write::<T>(9), args.write::<T>(10));
    Ok(())
}
