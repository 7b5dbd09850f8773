//! Cases of the distillation losses.

use super::{Cosine, CosineBackward, Direction, HiddenMse, HiddenMseBackward, Kl, KlBackward, Reduction};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::rng::Stream;
use crate::shape::Shape;

/// Smallest, primes, lane edges, many rows.
const SHAPES: [[usize; 2]; 7] = [[1, 2], [3, 5], [7, 13], [5, 63], [64, 65], [3, 129], [300, 24]];

/// Weights of every kind: 0 for every third row.
pub(crate) const WEIGHTS: Fill = Fill::Custom(weights);
const ZEROS: Fill = Fill::Normal { mean: 0.0, deviation: 0.0 };
pub(crate) const DIRECTIONS: [Direction; 4] =
    [Direction::Forward, Direction::Reverse, Direction::Jsd { beta: 0.5 }, Direction::Jsd { beta: 0.1 }];

fn weights(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x3e1);
    (0..shape.count()).map(|i| if i % 3 == 2 { 0.0 } else { 0.25 + stream.uniform() }).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::FLOATS {
        for dims in SHAPES {
            let small = dims[0] * dims[1] < 400 && dtype == DType::F32;
            let mut push = |case: Case| cases.push(if small { case.grad() } else { case });
            for normalised in [false, true] {
                for reduction in [Reduction::HalfSum, Reduction::Mean] {
                    push(mse(reduction, normalised, dims, dtype, WEIGHTS));
                }
            }
            for (i, direction) in DIRECTIONS.into_iter().enumerate() {
                let (temperature, squared) = [(1.0, false), (2.0, true), (0.7, false), (4.0, true)][i];
                push(kl(direction, temperature, squared, dims, dtype));
            }
            push(cosine(dims, dtype));
            backward(&mut cases, dims, dtype);
        }
    }
    // Every row masked: nothing, not 0 / 0.
    for reduction in [Reduction::HalfSum, Reduction::Mean] {
        cases.push(mse(reduction, true, [4, 6], DType::F32, ZEROS));
    }
    // Rows longer than one invocation's loop budget on drivers that cut loops.
    cases.push(kl(Direction::Forward, 1.0, false, [2, 50_257], DType::F32));
    cases.push(kl(Direction::Jsd { beta: 0.5 }, 1.0, false, [2, 50_257], DType::F32));
    // Rows of a block.
    for (direction, dtype) in DIRECTIONS.into_iter().zip([DType::F32, DType::Bf16, DType::F16, DType::F32]) {
        cases.push(kl(direction, 2.0, true, [3, 4099], dtype));
        cases.push(kl_backward(direction, 2.0, [3, 4099], dtype));
    }
    // BERT-base states of 1,024 tokens; a 32,000 vocabulary over 64 tokens.
    cases.push(mse(Reduction::Mean, false, [1024, 768], DType::F32, WEIGHTS).bench());
    cases.push(mse(Reduction::Mean, true, [1024, 768], DType::Bf16, WEIGHTS).bench());
    cases.push(cosine([1024, 768], DType::F32).bench());
    cases.push(kl(Direction::Forward, 2.0, true, [64, 32_000], DType::F32).bench());
    cases.push(kl_backward(Direction::Forward, 2.0, [64, 32_000], DType::F32).bench());
    cases
}

fn backward(cases: &mut Vec<Case>, dims: [usize; 2], dtype: DType) {
    for normalised in [false, true] {
        let op = HiddenMseBackward { reduction: Reduction::Mean, normalised };
        let case = pair(Case::new(op, Tolerance::Contraction { k: dims[1] + 16 }), dims, dtype, WEIGHTS);
        let statistics = Fill::Values(vec![0.6 * dims[0] as f64, 4.0, 5.0, 3.0]);
        cases.push(case.input(&[4], DType::F32, statistics).input(&[], DType::F32, Fill::Values(vec![-1.3])));
    }
    for direction in DIRECTIONS {
        cases.push(kl_backward(direction, 2.0, dims, dtype));
    }
    let [n, d] = dims;
    let case = pair(Case::new(CosineBackward, Tolerance::Contraction { k: d + 16 }), dims, dtype, WEIGHTS);
    let case = case.normal(&[n], DType::F32);
    // Two parallel vectors of two have next to no gradient, left over from terms of order 1.
    cases.push(if dims == [1, 2] { case.terms(1.0) } else { case });
}

fn pair(case: Case, dims: [usize; 2], dtype: DType, weights: Fill) -> Case {
    case.normal(&dims, dtype).normal(&dims, dtype).input(&[dims[0]], DType::F32, weights)
}

fn mse(reduction: Reduction, normalised: bool, dims: [usize; 2], dtype: DType, weights: Fill) -> Case {
    let k = dims[1] + dims[0] + 16;
    pair(Case::new(HiddenMse { reduction, normalised }, Tolerance::Contraction { k }), dims, dtype, weights)
}

fn cosine(dims: [usize; 2], dtype: DType) -> Case {
    pair(Case::new(Cosine, Tolerance::Transcendental), dims, dtype, WEIGHTS).terms(1.0)
}

/// Logits that differ: a divergence of near-equal distributions is a small difference of large terms.
const LOGITS: Fill = Fill::Normal { mean: 1.0, deviation: LOGIT };
/// Size of a logit.
const LOGIT: f64 = 4.0;
const CANCELS: &str = "the divergence is a difference of terms of the logits' size, whose roundings it keeps";

fn logits(case: Case, dims: [usize; 2], dtype: DType) -> Case {
    case.input(&dims, dtype, LOGITS).input(&dims, dtype, LOGITS).input(&[dims[0]], DType::F32, WEIGHTS)
}

fn kl(direction: Direction, temperature: f32, squared: bool, dims: [usize; 2], dtype: DType) -> Case {
    let op = Kl { direction, temperature, squared };
    logits(Case::new(op, Tolerance::Transcendental), dims, dtype).loosened(8.0, CANCELS).terms(LOGIT)
}

fn kl_backward(direction: Direction, temperature: f32, dims: [usize; 2], dtype: DType) -> Case {
    let op = KlBackward { direction, temperature, squared: true };
    let mut case = logits(Case::new(op, Tolerance::Transcendental), dims, dtype);
    let [n, v] = dims;
    // About the log sum exp of such logits, then the expectation and the loss's gradient.
    let lse = Fill::Normal { mean: 2.5 + (v as f64).ln(), deviation: 0.1 };
    for fill in [lse.clone(), lse, Fill::Uniform { low: 0.0, high: 0.3 }, Fill::NORMAL] {
        case = case.input(&[n], DType::F32, fill);
    }
    case
}
