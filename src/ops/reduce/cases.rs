//! The reduce family's rows of the table.

use super::{ArgMax, Axis, CountNonFinite, Reduce, ReduceBackward, ReduceFunction};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::rng::Stream;
use crate::shape::Shape;

const FUNCTIONS: [ReduceFunction; 4] =
    [ReduceFunction::Sum, ReduceFunction::Mean, ReduceFunction::Max, ReduceFunction::SumSquares];

fn tolerance(function: ReduceFunction, n: usize) -> Tolerance {
    if function == ReduceFunction::Max { Tolerance::Exact } else { Tolerance::Contraction { k: n } }
}

/// Distinct values at least 1/8 apart, shuffled: no ties, and no differencing step changes which is the largest.
fn distinct(seed: u64, shape: &Shape) -> Vec<f64> {
    let n = shape.count();
    let mut values: Vec<f64> = (0..n).map(|i| (i as f64 - n as f64 / 2.0) / 8.0).collect();
    Stream::new(seed, 0).shuffle(&mut values);
    values
}

/// Few distinct values: the lowest index among equals must win.
fn ties(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 1);
    (0..shape.count()).map(|_| stream.below(3) as f64 - 1.0).collect()
}

/// Normal draws with NaN and infinities strewn in.
fn broken(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 2);
    let value = |stream: &mut Stream| match stream.below(50) {
        0 => f64::NAN,
        1 => f64::INFINITY,
        2 => f64::NEG_INFINITY,
        _ => stream.normal(),
    };
    (0..shape.count()).map(|_| value(&mut stream)).collect()
}

/// One NaN, in the last place.
fn broken_at_the_end(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 3);
    let mut values: Vec<f64> = (0..shape.count()).map(|_| stream.normal()).collect();
    if let Some(last) = values.last_mut() {
        *last = f64::NAN;
    }
    values
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes: [&[usize]; 8] = [&[1], &[7], &[3, 5, 17], &[1, 64], &[63, 1], &[65, 64], &[2, 1025], &[300, 130]];
    for function in FUNCTIONS {
        let fill = if function == ReduceFunction::Max { Fill::Custom(distinct) } else { Fill::NORMAL };
        for axis in [Axis::Last, Axis::Rows, Axis::All] {
            for &dtype in DType::FLOATS {
                for dims in shapes {
                    let Ok(shape) = Shape::new(dims) else { continue };
                    let (_, n, _) = axis.extents(&shape);
                    let op = Reduce { function, axis };
                    let case = Case::new(op, tolerance(function, n)).input(dims, dtype, fill.clone());
                    let small = shape.count() < 300 && dtype == DType::F32;
                    cases.push(if small { case.grad() } else { case });
                }
            }
            for (dtype, dims) in [(DType::F32, &[3usize, 5, 17][..]), (DType::Bf16, &[65, 64]), (DType::F16, &[1025])] {
                cases.push(backward(function, axis, dims, dtype));
            }
        }
    }
    // Axes that are split into several passes, down to one result, and a row longer than a cut loop.
    for axis in [Axis::All, Axis::Last] {
        let sum = Reduce { function: ReduceFunction::SumSquares, axis };
        cases.push(Case::new(sum, Tolerance::Contraction { k: 512 }).normal(&[2, 70_001], DType::F32));
        let sum = Reduce { function: ReduceFunction::Sum, axis };
        cases.push(Case::new(sum, Tolerance::Contraction { k: 70_001 }).normal(&[2, 70_001], DType::F32));
    }
    let rows = Reduce { function: ReduceFunction::Sum, axis: Axis::Rows };
    cases.push(Case::new(rows, Tolerance::Contraction { k: 70_001 }).normal(&[70_001, 2], DType::F32));
    // A bias gradient of GPT-2 small, the norm of one of its weight gradients, a non-finite check of the same.
    cases.push(Case::new(rows, Tolerance::Contraction { k: 1024 }).normal(&[1024, 768], DType::F32).bench());
    let norm = Reduce { function: ReduceFunction::SumSquares, axis: Axis::All };
    cases.push(Case::new(norm, Tolerance::Contraction { k: 512 }).normal(&[768 * 3072], DType::F32).bench());
    cases.push(Case::new(CountNonFinite, Tolerance::Exact).normal(&[768 * 3072], DType::F32).bench());
    cases.push(Case::new(ArgMax, Tolerance::Exact).normal(&[8, 50_257], DType::F32).bench());
    for &dtype in DType::FLOATS {
        for dims in [&[2][..], &[3, 5, 17], &[64, 64], &[65, 33], &[2, 4097], &[300, 3]] {
            cases.push(Case::new(ArgMax, Tolerance::Exact).input(dims, dtype, Fill::Custom(ties)));
        }
        for dims in [&[1][..], &[31, 127], &[1, 9_001]] {
            cases.push(Case::new(ArgMax, Tolerance::Exact).normal(dims, dtype));
        }
        for dims in [&[1][..], &[513], &[64, 64]] {
            cases.push(Case::new(CountNonFinite, Tolerance::Exact).normal(dims, dtype));
        }
        for dims in [&[63][..], &[5, 103], &[700, 401]] {
            cases.push(Case::new(CountNonFinite, Tolerance::Exact).input(dims, dtype, Fill::Custom(broken)));
        }
        for dims in [&[2][..], &[512], &[3, 1031]] {
            let fill = Fill::Custom(broken_at_the_end);
            cases.push(Case::new(CountNonFinite, Tolerance::Exact).input(dims, dtype, fill));
        }
    }
    cases.push(Case::new(ArgMax, Tolerance::Exact).input(&[5, 70], DType::F32, Fill::Custom(broken)));
    cases
}

fn backward(function: ReduceFunction, axis: Axis, dims: &[usize], dtype: DType) -> Case {
    let shape = Shape::new(dims).unwrap_or(Shape::scalar());
    let (outer, n, inner) = axis.extents(&shape);
    let case = Case::new(ReduceBackward { function, axis, shape }, Tolerance::Transcendental);
    let places: &[usize] = &[outer * inner];
    match function {
        ReduceFunction::Sum | ReduceFunction::Mean => case.normal(places, dtype),
        ReduceFunction::SumSquares => case.normal(dims, dtype).normal(places, dtype),
        ReduceFunction::Max => {
            let index = Fill::Integers { low: 0, high: n as i64 - 1 };
            case.input(places, DType::U32, index).normal(places, dtype)
        }
    }
}
