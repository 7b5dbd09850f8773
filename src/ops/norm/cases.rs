//! Cases of the normalisations.

use super::{AddNorm, AddNormBackward, LayerNorm, NormBackward, RmsNorm};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};

/// Smallest, primes, around the lanes of CPU and GPU rungs (63 to 65, 127 to 129), several leading axes, many chunks of rows.
const SHAPES: [&[usize]; 9] =
    [&[1], &[1, 1], &[7, 13], &[3, 5, 17], &[2, 63], &[65, 64], &[64, 129], &[2, 4, 8, 33], &[257, 40]];

/// GPT-2 small: 1,024 tokens of width 768.
const MODEL: [usize; 2] = [1024, 768];

const EPSILON: f32 = 1e-5;

/// Rows whose mean is far from 0: a variance from raw moments would cancel.
const SHIFTED: Fill = Fill::Normal { mean: 100.0, deviation: 2.0 };
const WEIGHT: Fill = Fill::Normal { mean: 1.0, deviation: 0.3 };
/// What 1/sqrt(variance) looks like.
const RSTD: Fill = Fill::Uniform { low: 0.5, high: 2.0 };

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::FLOATS {
        for dims in SHAPES {
            forward(&mut cases, dims, dtype);
            backward(&mut cases, dims, dtype);
        }
    }
    // Widths that a warp, a small and a large block hold in registers, whole and not.
    for dims in [[3usize, 1024], [5, 1032], [2, 4096], [3, 9600], [2, 16_384], [1, 32_768]] {
        for dtype in [DType::F32, DType::Bf16] {
            cases.push(layer(&dims, dtype, Fill::NORMAL));
            cases.push(add(&dims, dtype, 4.5, true));
            cases.push(plain_backward(&dims, dtype, true));
            cases.push(add_backward(&dims, dtype, (false, true)));
        }
    }
    let wide = &[2, 20_001];
    // Rows too long for one invocation's loop budget.
    cases.push(layer(wide, DType::F32, Fill::NORMAL));
    cases.push(rms(wide, DType::F32));
    cases.push(
        layer(&[9, 50], DType::F32, SHIFTED)
            .loosened(60.0, "f32 cannot hold 100 + 2 z nearer than 4e-6: the mean's rounding shows"),
    );
    cases.push(layer(&[5, 16], DType::F32, Fill::Values(vec![3.0; 80])));
    for dtype in [DType::F32, DType::Bf16] {
        cases.push(layer(&MODEL, dtype, Fill::NORMAL).bench());
        cases.push(rms(&MODEL, dtype).bench());
        cases.push(add(&MODEL, dtype, 4.5, false).bench());
        cases.push(plain_backward(&MODEL, dtype, false).bench());
        cases.push(add_backward(&MODEL, dtype, (true, true)).bench());
    }
    cases
}

fn forward(cases: &mut Vec<Case>, dims: &[usize], dtype: DType) {
    let elements: usize = dims.iter().product();
    let small = elements < 300 && dtype == DType::F32;
    // One element over its own root mean square is its sign: in f32 the gradient is rounding alone.
    let flat = dims.last() == Some(&1);
    let mut push = |case: Case, rms: bool| cases.push(if small && !(flat && rms) { case.grad() } else { case });
    push(layer(dims, dtype, Fill::NORMAL), false);
    push(rms(dims, dtype), true);
    for rms in [false, true] {
        push(add(dims, dtype, 1.0, rms), rms);
        push(add(dims, dtype, 4.898_979_5, rms), rms);
    }
}

fn backward(cases: &mut Vec<Case>, dims: &[usize], dtype: DType) {
    for rms in [false, true] {
        cases.push(plain_backward(dims, dtype, rms));
        cases.push(add_backward(dims, dtype, (rms, true)));
    }
    cases.push(add_backward(dims, dtype, (false, false)));
}

fn layer(dims: &[usize], dtype: DType, x: Fill) -> Case {
    let d = dims[dims.len() - 1];
    let case = Case::new(LayerNorm { epsilon: EPSILON }, Tolerance::Transcendental).input(dims, dtype, x);
    case.input(&[d], dtype, WEIGHT).normal(&[d], dtype)
}

fn rms(dims: &[usize], dtype: DType) -> Case {
    let d = dims[dims.len() - 1];
    let case = Case::new(RmsNorm { epsilon: EPSILON }, Tolerance::Transcendental).normal(dims, dtype);
    case.input(&[d], dtype, WEIGHT)
}

fn add(dims: &[usize], dtype: DType, scale: f32, rms: bool) -> Case {
    let d = dims[dims.len() - 1];
    let op = AddNorm { epsilon: EPSILON, scale, rms };
    let case =
        Case::new(op, Tolerance::Transcendental).normal(dims, dtype).normal(dims, dtype).input(&[d], dtype, WEIGHT);
    if rms { case } else { case.normal(&[d], dtype) }
}

fn statistics(case: Case, dims: &[usize], dtype: DType) -> Case {
    let (d, rows) = (dims[dims.len() - 1], &dims[..dims.len() - 1]);
    let case = case.normal(dims, dtype).input(&[d], dtype, WEIGHT);
    case.input(rows, DType::F32, Fill::Normal { mean: 0.0, deviation: 0.1 })
        .input(rows, DType::F32, RSTD)
        .normal(dims, dtype)
}

/// Sums over a row and over all rows.
fn sums(dims: &[usize]) -> Tolerance {
    let d = dims[dims.len() - 1];
    Tolerance::Contraction { k: 16 + d.max(dims.iter().product::<usize>() / d) }
}

fn plain_backward(dims: &[usize], dtype: DType, rms: bool) -> Case {
    statistics(Case::new(NormBackward { rms }, sums(dims)), dims, dtype)
}

fn add_backward(dims: &[usize], dtype: DType, (rms, joined): (bool, bool)) -> Case {
    let op = AddNormBackward { scale: 4.898_979_5, rms, joined };
    statistics(Case::new(op, sums(dims)), dims, dtype).normal(dims, dtype)
}
