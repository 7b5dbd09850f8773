//! Cases of softmax, log-softmax and cross-entropy.

use super::{CrossEntropy, CrossEntropyBackward, IGNORE, LogSoftmax, Softmax, SoftmaxBackward};
use crate::dtype::DType;
use crate::op::{Case, Fill, Op, Tolerance};
use crate::rng::Stream;
use crate::shape::Shape;

/// Smallest, primes, lane edges, several leading axes, many rows.
const SHAPES: [&[usize]; 8] = [&[1], &[3, 1], &[7, 13], &[2, 3, 17], &[5, 63], &[65, 64], &[9, 129], &[257, 31]];
const LOGITS: [[usize; 2]; 7] = [[1, 1], [3, 2], [7, 13], [5, 63], [65, 65], [4, 129], [130, 50]];

const WIDE: Fill = Fill::Normal { mean: 0.0, deviation: 3.0 };
/// The maximum must be taken off before anything is exponentiated.
const HUGE: Fill = Fill::Normal { mean: 500.0, deviation: 30.0 };

/// Target indices that any extent takes: 0 and, for every fifth row, the ignore mark.
pub(crate) fn targets(v: usize) -> Fill {
    match v {
        1 => Fill::Custom(|seed, shape| draw(seed, shape, 1)),
        2..13 => Fill::Custom(|seed, shape| draw(seed, shape, 2)),
        13..50 => Fill::Custom(|seed, shape| draw(seed, shape, 13)),
        50..1000 => Fill::Custom(|seed, shape| draw(seed, shape, 50)),
        1000..30_000 => Fill::Custom(|seed, shape| draw(seed, shape, 1000)),
        _ => Fill::Custom(|seed, shape| draw(seed, shape, 30_000)),
    }
}

fn draw(seed: u64, shape: &Shape, below: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x7a6);
    let mut row = |i: usize| if i % 5 == 4 { f64::from(IGNORE) } else { stream.below(below) as f64 };
    (0..shape.count()).map(&mut row).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::FLOATS {
        for dims in SHAPES {
            let small = dims.iter().product::<usize>() < 400 && dtype == DType::F32;
            let mut push = |case: Case| cases.push(if small { case.grad() } else { case });
            push(one(Softmax, dims, dtype, WIDE));
            push(one(LogSoftmax, dims, dtype, WIDE));
            cases.push(backward(false, dims, dtype));
            cases.push(backward(true, dims, dtype));
        }
        for [n, v] in LOGITS {
            for smoothing in [0.0, 0.1] {
                if v == 1 && smoothing > 0.0 {
                    // z - 0.9 z - 0.1 z: a loss of exactly 0 has no relative error to bound.
                    continue;
                }
                let small = n * v < 400 && dtype == DType::F32;
                let case = entropy(smoothing, [n, v], dtype);
                cases.push(if small { case.grad() } else { case });
                cases.push(entropy_backward(smoothing, [n, v], dtype));
            }
        }
    }
    cases.push(one(Softmax, &[6, 40], DType::F32, HUGE));
    // The longest row that is summed without blocks of sums, nearly.
    cases.push(one(Softmax, &[3, 8188], DType::F32, WIDE));
    cases.push(one(Softmax, &[2, 8], DType::F32, Fill::Values(vec![-1e30; 16])));
    // Rows longer than one invocation's loop budget on drivers that cut loops: XLM-R's vocabulary.
    const VOCABULARY: usize = 250_002;
    cases.push(one(Softmax, &[2, VOCABULARY], DType::F32, WIDE));
    cases.push(backward(false, &[2, VOCABULARY], DType::F32));
    cases.push(entropy(0.1, [2, VOCABULARY], DType::F32));
    cases.push(entropy_backward(0.1, [2, VOCABULARY], DType::F32));
    // A row of a block, and of a large one; 16-bit rows longer than a block keeps.
    for dims in [&[3usize, 4099][..], &[2, 12_345], &[2, 24_000]] {
        cases.push(one(Softmax, dims, DType::F32, WIDE));
        cases.push(backward(true, dims, DType::F32));
        cases.push(one(LogSoftmax, dims, DType::Bf16, WIDE));
        cases.push(backward(false, dims, DType::F16));
        cases.push(entropy(0.1, [dims[0], dims[1]], DType::F16));
        cases.push(entropy_backward(0.1, [dims[0], dims[1]], DType::Bf16));
    }
    cases.push(one(Softmax, &[2, 40_001], DType::Bf16, WIDE));
    // Attention-like rows, and GPT-2's vocabulary over 64 tokens.
    cases.push(one(Softmax, &[4096, 256], DType::F32, WIDE).bench());
    cases.push(one(LogSoftmax, &[64, 50_257], DType::F32, WIDE).bench());
    for dtype in [DType::F32, DType::Bf16] {
        cases.push(entropy(0.0, [64, 50_257], dtype).bench());
        cases.push(entropy_backward(0.0, [64, 50_257], dtype).bench());
    }
    cases
}

fn one(op: impl Op, dims: &[usize], dtype: DType, fill: Fill) -> Case {
    Case::new(op, Tolerance::Transcendental).input(dims, dtype, fill)
}

/// y is drawn like probabilities, or like their logarithms.
fn backward(log: bool, dims: &[usize], dtype: DType) -> Case {
    let k = 16 + dims[dims.len() - 1];
    let y = if log { Fill::Uniform { low: -6.0, high: 0.0 } } else { Fill::Uniform { low: 0.0, high: 1.0 } };
    Case::new(SoftmaxBackward { log }, Tolerance::Contraction { k }).input(dims, dtype, y).normal(dims, dtype)
}

fn entropy(smoothing: f32, [n, v]: [usize; 2], dtype: DType) -> Case {
    let case = Case::new(CrossEntropy { smoothing }, Tolerance::Transcendental).input(&[n, v], dtype, WIDE);
    case.input(&[n], DType::U32, targets(v))
}

fn entropy_backward(smoothing: f32, [n, v]: [usize; 2], dtype: DType) -> Case {
    let op = CrossEntropyBackward { smoothing };
    let case = Case::new(op, Tolerance::Transcendental).input(&[n, v], dtype, WIDE).input(&[n], DType::U32, targets(v));
    // A log sum exp of such logits, and the loss's gradient.
    case.input(&[n], DType::F32, Fill::Normal { mean: 6.0, deviation: 0.5 }).normal(&[n], DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Array;

    #[test]
    fn a_target_outside_the_row_is_loud() {
        let array = |dims: &[usize], data: Vec<f64>| Array { shape: Shape::new(dims).unwrap(), data };
        let inputs = [array(&[2, 3], vec![0.0; 6]), array(&[2], vec![3.0, 2.0])];
        let outputs = CrossEntropy { smoothing: 0.0 }.reference(&inputs);
        assert!(outputs[0][0].is_nan());
        approx::assert_abs_diff_eq!(outputs[0][1], 3f64.ln(), epsilon = 1e-12);
        let device = crate::device::open("cpu").unwrap();
        let logits = crate::Tensor::from_f64(&device, &[2, 3], DType::F32, &[0.0; 6]).unwrap();
        let ids = crate::Tensor::from_slice(&device, &[2], &[3u32, 2]).unwrap();
        let got = crate::dispatch::run(&CrossEntropy { smoothing: 0.0 }, &[&logits, &ids]).unwrap();
        let loss = got[0].to_f64().unwrap();
        assert!(loss[0].is_nan() && (loss[1] - 3f64.ln()).abs() < 1e-6);
    }
}
