//! Losses over a vocabulary: from logits, and fused with the head.

use super::{BF16, Cut, F32, Large, POSITIVE, Part, Pick, below};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::ops::distill::{Direction, HiddenMse, HiddenMseBackward, Kl, KlBackward, Reduction};
use crate::ops::linear_loss::{LinearCrossEntropy, LinearCrossEntropyBackward, LinearKl, LinearKlBackward};
use crate::ops::softmax::{CrossEntropy, CrossEntropyBackward};

const ROWS: &[Cut] = &[(0, Pick::Spread(4))];
const DIFFERENCE: &str = "the divergence is a difference of terms of the logits' size, whose roundings it keeps";

pub(super) fn entropies() -> Vec<Large> {
    let wide = Fill::Normal { mean: 0.0, deviation: 3.0 };
    let mut cases = Vec::new();
    for [n, v] in [[8192, 32_768], [8192, 131_072], [16_384, 50_304]] {
        let name = format!("cross-entropy {n} x {v}");
        let inputs = |case: Case| case.input(&[n, v], BF16, wide.clone()).input(&[n], DType::U32, below(v));
        let forward = inputs(Case::new(CrossEntropy { smoothing: 0.0 }, Tolerance::Transcendental));
        let part = Part::new(&[ROWS, ROWS], &[Some(ROWS), Some(ROWS)]);
        cases.push(Large::new("softmax", name.clone(), forward, vec![part]));
        let backward = inputs(Case::new(CrossEntropyBackward { smoothing: 0.0 }, Tolerance::Transcendental));
        // About a log sum exp of such logits.
        let lse = Fill::Normal { mean: (v as f64).ln() + 4.5, deviation: 0.5 };
        let backward = backward.input(&[n], F32, lse).normal(&[n], F32);
        cases.push(Large::new("softmax", name, backward, vec![Part::new(&[ROWS; 4], &[Some(ROWS)])]));
    }
    cases
}

fn mse(dims: [usize; 2]) -> [Large; 2] {
    let [n, d] = dims;
    let name = format!("mse {n} x {d}");
    let pair = |case: Case| case.normal(&dims, BF16).normal(&dims, BF16).input(&[n], F32, POSITIVE);
    let op = HiddenMse { reduction: Reduction::Mean, normalised: false };
    let forward = pair(Case::new(op, Tolerance::Contraction { k: d + n + 16 }));
    // One number out of everything: the reference sums it all.
    let whole = Part::new(&[&[], &[], &[]], &[Some(&[]), Some(&[])]);
    let op = HiddenMseBackward { reduction: Reduction::Mean, normalised: false };
    let statistics = Fill::Values(vec![0.75 * n as f64, 1.0, 1.0, 0.0]);
    let backward = pair(Case::new(op, Tolerance::Contraction { k: d + 16 })).input(&[4], F32, statistics);
    let backward = backward.input(&[], F32, Fill::Values(vec![-1.3]));
    let part = Part::new(&[ROWS, ROWS, ROWS, &[], &[]], &[Some(ROWS)]);
    [Large::new("distill", name.clone(), forward, vec![whole]), Large::new("distill", name, backward, vec![part])]
}

/// "kl T=2", "jsd T=1".
fn divergence(direction: Direction, temperature: f32) -> String {
    let what = if matches!(direction, Direction::Jsd { .. }) { "jsd" } else { "kl" };
    format!("{what} T={temperature}")
}

fn kl(direction: Direction, temperature: f32, dims: [usize; 2]) -> [Large; 2] {
    let [n, v] = dims;
    let name = format!("{} {n} x {v}", divergence(direction, temperature));
    let spread = Fill::Normal { mean: 1.0, deviation: 4.0 };
    let logits = |op: Case| {
        let pair = op.input(&dims, BF16, spread.clone()).input(&dims, BF16, spread.clone());
        pair.input(&[n], F32, POSITIVE).loosened(8.0, DIFFERENCE)
    };
    let op = Kl { direction, temperature, squared: true };
    let forward = logits(Case::new(op, Tolerance::Transcendental));
    let op = KlBackward { direction, temperature, squared: true };
    let mut backward = logits(Case::new(op, Tolerance::Transcendental));
    let deviation = 4.0 / f64::from(temperature);
    let mean = 1.0 / f64::from(temperature) + (v as f64).ln() + deviation * deviation / 2.0;
    let lse = Fill::Normal { mean, deviation: 0.1 };
    for fill in [lse.clone(), lse, Fill::Uniform { low: 0.0, high: 0.3 }, Fill::NORMAL] {
        backward = backward.input(&[n], F32, fill);
    }
    [
        Large::new("distill", name.clone(), forward, vec![Part::new(&[ROWS; 3], &[Some(ROWS); 4])]),
        Large::new("distill", name, backward, vec![Part::new(&[ROWS; 7], &[Some(ROWS)])]),
    ]
}

pub(super) fn distillation() -> Vec<Large> {
    let half = Direction::Jsd { beta: 0.5 };
    [
        mse([16_384, 4096]),
        mse([65_536, 768]),
        kl(Direction::Forward, 1.0, [8192, 32_768]),
        kl(Direction::Forward, 1.0, [8192, 131_072]),
        kl(Direction::Forward, 2.0, [8192, 131_072]),
        kl(half, 1.0, [8192, 131_072]),
    ]
    .concat()
}

/// Tokens whose logits exist at a time.
const CHUNK: usize = 4096;
/// Words whose head rows are computed again; the first ones, so that targets keep their meaning.
const WORDS: &[Cut] = &[(0, Pick::First(8))];
const TOKENS: &[Cut] = &[(0, Pick::Spread(2))];

fn head(case: Case, [n, d, v]: [usize; 3]) -> Case {
    let scaled = Fill::Normal { mean: 0.0, deviation: 1.0 / (d as f64).sqrt() };
    case.input(&[n, d], BF16, Fill::Normal { mean: 0.0, deviation: 2.0 }).input(&[v, d], BF16, scaled)
}

fn linear_entropy([n, d, v]: [usize; 3]) -> [Large; 2] {
    let name = format!("linear cross-entropy {n} x {d} x {v}");
    let (smoothing, chunk) = (0.0, CHUNK);
    let scored = |op: Case| head(op, [n, d, v]).input(&[n], DType::U32, below(v));
    let forward = Case::new(LinearCrossEntropy { smoothing, chunk }, Tolerance::Contraction { k: d + 64 });
    let part = Part::new(&[TOKENS, &[], TOKENS], &[Some(TOKENS), Some(TOKENS)]);
    let k = d + n + 264;
    let backward = scored(Case::new(LinearCrossEntropyBackward { smoothing, chunk }, Tolerance::Contraction { k }));
    let lse = Fill::Normal { mean: 2.0 + (v as f64).ln(), deviation: 0.3 };
    let backward = backward.input(&[n], F32, lse).normal(&[n], F32);
    let parts = vec![
        Part::new(&[TOKENS, &[], TOKENS, TOKENS, TOKENS], &[Some(TOKENS), None]),
        Part::new(&[&[], WORDS, &[], &[], &[]], &[None, Some(WORDS)]),
    ];
    [
        Large::new("linear_loss", name.clone(), scored(forward), vec![part]),
        Large::new("linear_loss", name, backward, parts),
    ]
}

fn linear_kl(direction: Direction, [n, d, e, v]: [usize; 4]) -> [Large; 2] {
    let temperature = 1.0;
    let name = format!("linear {} {n} x {d}, {e} x {v}", divergence(direction, temperature));
    let (squared, chunk) = (true, CHUNK);
    let heads = |op: Case| head(head(op, [n, d, v]), [n, e, v]).input(&[n], F32, POSITIVE).loosened(4.0, DIFFERENCE);
    let op = LinearKl { direction, temperature, squared, chunk };
    let forward = heads(Case::new(op, Tolerance::Contraction { k: d + e + 64 }));
    let part = Part::new(&[TOKENS, &[], TOKENS, &[], TOKENS], &[Some(TOKENS); 4]);
    let op = LinearKlBackward { direction, temperature, squared, chunk };
    let mut backward = heads(Case::new(op, Tolerance::Contraction { k: d + e + n + 264 }));
    let near = Fill::Normal { mean: 2.0 + (v as f64).ln(), deviation: 0.1 };
    for fill in [near.clone(), near, Fill::Uniform { low: 0.0, high: 0.3 }, Fill::NORMAL] {
        backward = backward.input(&[n], F32, fill);
    }
    let parts = vec![
        Part::new(&[TOKENS, &[], TOKENS, &[], TOKENS, TOKENS, TOKENS, TOKENS, TOKENS], &[Some(TOKENS), None]),
        Part::new(&[&[], WORDS, &[], WORDS, &[], &[], &[], &[], &[]], &[None, Some(WORDS)]),
    ];
    [Large::new("linear_loss", name.clone(), forward, vec![part]), Large::new("linear_loss", name, backward, parts)]
}

pub(super) fn linear() -> Vec<Large> {
    let mut cases: Vec<Large> =
        [1024, 4096, 16_384].into_iter().flat_map(|n| linear_entropy([n, 768, 50_304])).collect();
    cases.extend([1024, 8192].into_iter().flat_map(|n| linear_entropy([n, 4096, 128_256])));
    let half = Direction::Jsd { beta: 0.5 };
    cases.extend(linear_kl(Direction::Forward, [4096, 768, 1024, 50_304]));
    cases.extend([1024, 8192].into_iter().flat_map(|n| linear_kl(half, [n, 4096, 4096, 128_256])));
    cases
}
