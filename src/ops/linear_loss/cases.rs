//! Cases of the losses fused with a linear head.

use super::{LinearCrossEntropy, LinearCrossEntropyBackward, LinearKl, LinearKlBackward, LinearPredict};
use crate::dtype::DType;
use crate::op::{Case, Fill, Op, Tolerance};
use crate::ops::distill::{DIRECTIONS, Direction, WEIGHTS};
use crate::ops::softmax::targets;

/// (tokens, width, words, chunk): smallest, odd, chunks that divide and that do not, more than one tile of words.
const SHAPES: [[usize; 4]; 6] =
    [[1, 1, 2, 1], [3, 5, 7, 2], [9, 13, 17, 4], [33, 8, 65, 16], [6, 16, 129, 64], [5, 4, 2049, 3]];

/// For tensor tiles, whose widths are multiples of eight: several tiles each way in two chunks, and two tiles of words.
const TENSOR_SHAPES: [[usize; 4]; 2] = [[140, 136, 300, 135], [3, 8, 2061, 2]];

/// Hidden states and heads whose logits have a deviation of about 2.
const HEAD: Fill = Fill::Normal { mean: 0.0, deviation: LOGIT };
/// Size of a logit: losses are differences of such terms.
const LOGIT: f64 = 2.0;
const DIFFERENCE: &str = "the divergence is a difference of terms of the logits' size, whose roundings it keeps";

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::FLOATS {
        for shape in SHAPES {
            let [n, d, v, chunk] = shape;
            let small = n * v < 300 && dtype == DType::F32;
            let mut push = |case: Case| cases.push(if small { case.grad() } else { case });
            for smoothing in [0.0, 0.1] {
                push(entropy(smoothing, shape, dtype));
            }
            for (i, direction) in DIRECTIONS.into_iter().enumerate() {
                push(kl(direction, [1.0, 2.0, 0.7, 2.0][i], [n, d, d + 3, v, chunk], dtype));
            }
            for direction in DIRECTIONS {
                cases.push(kl_backward(direction, [n, d, d + 3, v, chunk], dtype));
            }
            cases.push(entropy_backward(0.1, shape, dtype));
            cases.push(predict(shape, dtype));
        }
        for shape in TENSOR_SHAPES.into_iter().filter(|_| dtype != DType::F32) {
            let [n, d, v, chunk] = shape;
            cases.extend([entropy(0.1, shape, dtype), entropy_backward(0.1, shape, dtype), predict(shape, dtype)]);
            for direction in DIRECTIONS {
                cases.push(kl(direction, 2.0, [n, d, d + 8, v, chunk], dtype));
                cases.push(kl_backward(direction, [n, d, d + 8, v, chunk], dtype));
            }
        }
    }
    // A small model's head: 256 tokens of width 256, 8,000 words.
    let model = [256, 256, 8000, 256];
    cases.push(entropy(0.0, model, DType::F32).bench());
    cases.push(entropy_backward(0.0, model, DType::F32).bench());
    cases.push(kl(Direction::Forward, 2.0, [256, 128, 256, 8000, 256], DType::F32).bench());
    cases.push(kl_backward(Direction::Forward, [256, 128, 256, 8000, 256], DType::F32).bench());
    cases
}

fn head(case: Case, [n, d, v]: [usize; 3], dtype: DType) -> Case {
    let scaled = Fill::Normal { mean: 0.0, deviation: 1.0 / (d as f64).sqrt() };
    case.input(&[n, d], dtype, HEAD).input(&[v, d], dtype, scaled)
}

fn scored(op: impl Op, [n, d, v]: [usize; 3], dtype: DType, k: usize) -> Case {
    head(Case::new(op, Tolerance::Contraction { k }), [n, d, v], dtype).input(&[n], DType::U32, targets(v))
}

fn entropy(smoothing: f32, [n, d, v, chunk]: [usize; 4], dtype: DType) -> Case {
    scored(LinearCrossEntropy { smoothing, chunk }, [n, d, v], dtype, d + 64).terms(LOGIT)
}

fn predict([n, d, v, chunk]: [usize; 4], dtype: DType) -> Case {
    scored(LinearPredict { chunk }, [n, d, v], dtype, d + 64).terms(LOGIT)
}

/// A log sum exp of such logits.
fn lse(v: usize) -> Fill {
    Fill::Normal { mean: 2.0 + (v as f64).ln(), deviation: 0.3 }
}

fn entropy_backward(smoothing: f32, [n, d, v, chunk]: [usize; 4], dtype: DType) -> Case {
    let case = scored(LinearCrossEntropyBackward { smoothing, chunk }, [n, d, v], dtype, d + n + v.min(200) + 64);
    // Both by way of the logits' slopes.
    case.input(&[n], DType::F32, lse(v)).normal(&[n], DType::F32).rounded_between(&[0, 1])
}

fn heads(op: impl Op, [n, d, e, v]: [usize; 4], dtype: DType, k: usize) -> Case {
    let case = head(Case::new(op, Tolerance::Contraction { k }), [n, d, v], dtype);
    head(case, [n, e, v], dtype).input(&[n], DType::F32, WEIGHTS)
}

fn kl(direction: Direction, temperature: f32, [n, d, e, v, chunk]: [usize; 5], dtype: DType) -> Case {
    let op = LinearKl { direction, temperature, squared: true, chunk };
    heads(op, [n, d, e, v], dtype, d + e + 64).loosened(4.0, DIFFERENCE).terms(LOGIT)
}

fn kl_backward(direction: Direction, [n, d, e, v, chunk]: [usize; 5], dtype: DType) -> Case {
    let op = LinearKlBackward { direction, temperature: 2.0, squared: true, chunk };
    let mut case = heads(op, [n, d, e, v], dtype, d + e + n + v.min(200) + 64);
    let expectation = Fill::Uniform { low: 0.0, high: 0.3 };
    let near = Fill::Normal { mean: 0.6 + (v as f64).ln(), deviation: 0.1 };
    for fill in [near.clone(), near, expectation, Fill::NORMAL] {
        case = case.input(&[n], DType::F32, fill);
    }
    case.rounded_between(&[0, 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Array;
    use crate::shape::Shape;

    fn array(dims: &[usize], data: &[f64]) -> Array {
        Array { shape: Shape::new(dims).unwrap(), data: data.to_vec() }
    }

    /// Heads that are the identity make hidden states the logits: KL of [0, 0] from [ln 3, 0] is 0.130812.
    #[test]
    fn two_words_by_hand_on_the_kernel() {
        let device = crate::device::open("cpu").unwrap();
        let tensor = |dims: &[usize], v: &[f64]| crate::Tensor::from_f64(&device, dims, DType::F32, v).unwrap();
        let identity = tensor(&[2, 2], &[1.0, 0.0, 0.0, 1.0]);
        let (student, teacher) = (tensor(&[1, 2], &[0.0, 0.0]), tensor(&[1, 2], &[3f64.ln(), 0.0]));
        let op = LinearKl { direction: Direction::Forward, temperature: 1.0, squared: true, chunk: 8 };
        let one = tensor(&[1], &[1.0]);
        let inputs = [&student, &identity, &teacher, &identity, &one];
        let outputs = crate::dispatch::run(&op, &inputs).unwrap();
        approx::assert_abs_diff_eq!(outputs[0].to_f64().unwrap()[0], 0.130_812, epsilon = 1e-6);
        let op = LinearKlBackward { direction: Direction::Forward, temperature: 1.0, squared: true, chunk: 8 };
        let all: Vec<&crate::Tensor> = inputs.into_iter().chain(&outputs[1..]).chain([&one]).collect();
        let slopes = crate::dispatch::run(&op, &all).unwrap()[0].to_f64().unwrap();
        approx::assert_abs_diff_eq!(slopes[0], -0.25, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(slopes[1], 0.25, epsilon = 1e-6);
    }

    /// Ties go to the lowest index, within a tile and across tiles.
    #[test]
    fn prediction_ties() {
        let op = LinearPredict { chunk: 2 };
        let mut weight = vec![0.0; 5000];
        for word in [7, 9, 2100, 4999] {
            weight[word] = 1.0;
        }
        let hidden = [1.0, -1.0];
        let inputs = [array(&[2, 1], &hidden), array(&[5000, 1], &weight), array(&[2], &[9.0, 4_294_967_295.0])];
        let want = op.reference(&inputs);
        assert_eq!(want[0], [7.0, 0.0]);
        let device = crate::device::open("cpu").unwrap();
        let tensor = |a: &Array, dtype| crate::Tensor::from_f64(&device, a.dims(), dtype, &a.data).unwrap();
        let [h, w, t] = [0, 1, 2].map(|i| tensor(&inputs[i], if i == 2 { DType::U32 } else { DType::F32 }));
        let got = crate::dispatch::run(&op, &[&h, &w, &t]).unwrap();
        assert_eq!(got[0].to_f64().unwrap(), want[0]);
        approx::assert_abs_diff_eq!(got[1].to_f64().unwrap()[0], want[1][0], epsilon = 1e-5);
        assert_eq!(got[1].to_f64().unwrap()[1], 0.0);
    }

    #[test]
    fn a_chunk_of_no_tokens_is_refused() {
        let case = entropy(0.0, [3, 5, 7, 0], DType::F32);
        assert_eq!(case.op.infer(&case.metas()).unwrap_err().code(), "E-PARAMETER");
    }
}
