//! Cases of `ops/quant.rs`.

use super::{
    FakeQuant, FakeQuantBackward, Granularity, GridFrom, Observe, Quantize, Scheme, Statistic, StepSlope, TrackStep,
};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::rng::Stream;
use crate::shape::Shape;

/// Ranges that leave some elements outside.
fn tight_ranges(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x9a9e);
    (0..shape.count()).map(|i| (0.5 + stream.uniform()) * if i % 2 == 0 { -1.0 } else { 1.0 }).collect()
}

/// Draws with groups of zeros, of tiny and of huge magnitude among ordinary ones.
fn spread(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x59ad);
    let magnitude = |row: usize| [1.0, 0.0, 1e-25, 1e-36, 3e4, 1e30, 1e37][row % 7];
    (0..shape.count()).map(|i| stream.normal() * magnitude(i / shape.last().max(1))).collect()
}

/// A NaN in the third row.
fn poisoned(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x0a0);
    (0..shape.count()).map(|i| if i == 2 * shape.last() + 1 { f64::NAN } else { stream.normal() }).collect()
}

/// Two of three are 0; the whole first row is.
fn pruned(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x0a1);
    let kept = |i: usize| i.is_multiple_of(3) && i >= shape.last();
    (0..shape.count()).map(|i| if kept(i) { stream.normal() } else { 0.0 }).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let granularities = |k: usize| [Granularity::Tensor, Granularity::Channel, Granularity::Group(k)];
    for (dims, group) in [(&[1usize, 1][..], 1), (&[3, 7], 7), (&[5, 96], 32), (&[65, 64], 64), (&[2, 3, 128], 64)] {
        for granularity in granularities(group) {
            for statistic in [Statistic::MinMax, Statistic::AbsMax] {
                cases.push(Case::new(Observe { granularity, statistic }, Tolerance::Exact).normal(dims, DType::F32));
            }
            for (scheme, bits) in Scheme::ALL.into_iter().zip([8, 4, 8]).chain([(Scheme::SymmetricNarrow, 2)]) {
                let op = FakeQuant { bits, scheme, granularity, from: GridFrom::Own };
                cases.push(Case::new(op, Tolerance::Exact).normal(dims, DType::F32));
                let groups =
                    granularity.groups("case", &Case::new(op, Tolerance::Exact).normal(dims, DType::F32).metas()[0]);
                let range = [groups.map_or(1, |(groups, _)| groups), 2];
                let fixed = FakeQuant { from: GridFrom::Range, ..op };
                let tight = Fill::Custom(tight_ranges);
                cases.push(Case::new(fixed, Tolerance::Exact).normal(dims, DType::F32).input(
                    &range,
                    DType::F32,
                    tight.clone(),
                ));
                let backward = FakeQuantBackward { bits, scheme, granularity, from: GridFrom::Range };
                cases.push(
                    Case::new(backward, Tolerance::Exact)
                        .normal(dims, DType::F32)
                        .input(&range, DType::F32, tight)
                        .normal(dims, DType::F32),
                );
            }
        }
    }
    // Every width of every scheme, and 16-bit storage.
    for scheme in Scheme::ALL {
        for bits in 2..=8 {
            let op = FakeQuant { bits, scheme, granularity: Granularity::Token, from: GridFrom::Own };
            let dtype = DType::FLOATS[bits as usize % 3];
            cases.push(Case::new(op, Tolerance::Exact).normal(&[7, 33], dtype));
            cases.push(Case::new(op, Tolerance::Exact).input(&[14, 65], DType::F32, Fill::Custom(spread)));
        }
        let op = FakeQuant { bits: 8, scheme, granularity: Granularity::Token, from: GridFrom::Own };
        cases.push(Case::new(op, Tolerance::Exact).input(&[4, 9], DType::F32, Fill::Custom(poisoned)));
        // Longer than one part: ranges are folded in two steps.
        let tensor = FakeQuant { granularity: Granularity::Tensor, ..op };
        cases.push(Case::new(tensor, Tolerance::Exact).normal(&[67, 1001], DType::F32));
        for dtype in [DType::F16, DType::Bf16] {
            let backward =
                FakeQuantBackward { bits: 4, scheme, granularity: Granularity::Group(16), from: GridFrom::Range };
            let tight = Fill::Custom(tight_ranges);
            let case = Case::new(backward, Tolerance::Exact).normal(&[9, 48], dtype).input(&[27, 2], DType::F32, tight);
            cases.push(case.normal(&[9, 48], dtype));
        }
    }
    for dtype in [DType::F16, DType::Bf16] {
        let op = Observe { granularity: Granularity::Tensor, statistic: Statistic::MinMax };
        cases.push(Case::new(op, Tolerance::Exact).normal(&[70, 997], dtype));
    }
    // GPT-2 small's first FFN weight per channel, and activations of 1,024 tokens.
    for (granularity, dims) in [(Granularity::Channel, [3072, 768]), (Granularity::Token, [1024, 768])] {
        let op = FakeQuant { bits: 8, scheme: Scheme::SymmetricNarrow, granularity, from: GridFrom::Own };
        cases.push(Case::new(op, Tolerance::Exact).normal(&dims, DType::F32).bench());
    }
    cases.extend(super::super::quantize::cases());
    cases.extend(given_steps());
    cases.extend(means());
    cases
}

/// Steps of ordinary size, one too small to divide by, one below 0 and one that is not a number.
fn steps(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0x57e9);
    let step = |i: usize, drawn: f64| match i % 11 {
        7 => 1e-36,
        8 => -0.1,
        9 if shape.count() > 20 => f64::NAN,
        _ => 0.01 + 0.3 * drawn,
    };
    (0..shape.count()).map(|i| step(i, stream.uniform())).collect()
}

fn given_steps() -> Vec<Case> {
    let mut cases = Vec::new();
    let given = || Fill::Custom(steps);
    for (dims, groups, granularity) in [
        (&[1usize, 1][..], 1, Granularity::Channel),
        (&[3, 7], 1, Granularity::Tensor),
        (&[65, 63], 65, Granularity::Channel),
        (&[24, 40], 24, Granularity::Token),
        (&[5, 96], 15, Granularity::Group(32)),
        (&[2, 3, 128], 1, Granularity::Token),
        (&[4, 3, 40], 1, Granularity::Tensor),
    ] {
        for (bits, scheme, dtype) in [
            (8, Scheme::SymmetricNarrow, DType::F32),
            (4, Scheme::SymmetricFull, DType::F16),
            (2, Scheme::SymmetricNarrow, DType::Bf16),
            (2, Scheme::Ternary, DType::F32),
        ] {
            let from = GridFrom::Step;
            let fake = FakeQuant { bits, scheme, granularity, from };
            let step = [groups];
            cases.push(Case::new(fake, Tolerance::Exact).normal(dims, dtype).input(&step, DType::F32, given()));
            let stored = Quantize { bits, scheme, granularity, from };
            cases.push(Case::new(stored, Tolerance::Exact).normal(dims, dtype).input(&step, DType::F32, given()));
            let backward = FakeQuantBackward { bits, scheme, granularity, from };
            let case = Case::new(backward, Tolerance::Exact).normal(dims, dtype).input(&step, DType::F32, given());
            cases.push(case.normal(dims, dtype));
            let slope = StepSlope { bits, scheme, granularity, factor: 0.125 };
            let highest = f64::from(scheme.levels(bits).high);
            let case = Case::new(slope, Tolerance::Transcendental).terms(highest);
            cases.push(case.normal(dims, dtype).input(&step, DType::F32, given()).normal(dims, dtype));
        }
    }
    for groups in [1, 21, 130] {
        for (bits, scheme) in [(8, Scheme::SymmetricNarrow), (3, Scheme::SymmetricFull)] {
            let op = TrackStep { bits, scheme, rate: 0.01 };
            let ranges = Fill::Custom(|seed, shape| {
                let sizes = [1.0, 0.0, 1e-36, f64::NAN, 1e37];
                tight_ranges(seed, shape).iter().enumerate().map(|(i, r)| r * sizes[i / 2 % 5]).collect()
            });
            let seen = Fill::Custom(|seed, shape| {
                let drawn = steps(seed, shape).into_iter().enumerate();
                drawn.map(|(i, s)| if i % 3 == 0 || s.is_nan() { 0.0 } else { s.abs() }).collect()
            });
            let case = Case::new(op, Tolerance::Transcendental).input(&[groups], DType::F32, seen);
            cases.push(case.input(&[groups, 2], DType::F32, ranges));
        }
    }
    let (scheme, granularity, from) = (Scheme::SymmetricNarrow, Granularity::Channel, GridFrom::Step);
    let fake = FakeQuant { bits: 8, scheme, granularity, from };
    let case = Case::new(fake, Tolerance::Exact).normal(&[3072, 768], DType::F32);
    cases.push(case.input(&[3072], DType::F32, given()).bench());
    cases
}

fn means() -> Vec<Case> {
    let mut cases = Vec::new();
    for (dims, granularity) in [
        (&[1usize, 1][..], Granularity::Channel),
        (&[3, 7], Granularity::Tensor),
        (&[14, 65], Granularity::Channel),
        (&[5, 96], Granularity::Group(32)),
    ] {
        for scheme in Scheme::MEANS {
            let from = GridFrom::Own;
            for dtype in DType::FLOATS {
                let op = FakeQuant { bits: 2, scheme, granularity, from };
                cases.push(Case::new(op, Tolerance::Exact).normal(dims, *dtype));
                let op = Quantize { bits: 2, scheme, granularity, from };
                cases.push(Case::new(op, Tolerance::Exact).normal(dims, *dtype));
            }
        }
    }
    for scheme in Scheme::MEANS {
        let op = Quantize { bits: 2, scheme, granularity: Granularity::Channel, from: GridFrom::Own };
        let draws: [(fn(u64, &Shape) -> Vec<f64>, _); 3] = [(spread, "spread"), (poisoned, "nan"), (pruned, "pruned")];
        for (fill, variant) in draws {
            let case = Case::new(op, Tolerance::Exact).input(&[14, 33], DType::F32, Fill::Custom(fill));
            cases.push(case.variant(variant));
        }
    }
    let op = FakeQuant { bits: 2, scheme: Scheme::Ternary, granularity: Granularity::Channel, from: GridFrom::Own };
    cases.push(Case::new(op, Tolerance::Exact).normal(&[3072, 768], DType::F32).bench());
    cases
}
