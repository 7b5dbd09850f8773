//! Cases of `ops/quant.rs`.

use super::{FakeQuant, FakeQuantBackward, Granularity, Observe, Scheme, Statistic};
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

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let granularities = |k: usize| [Granularity::Tensor, Granularity::Channel, Granularity::Group(k)];
    for (dims, group) in [(&[1usize, 1][..], 1), (&[3, 7], 7), (&[5, 96], 32), (&[65, 64], 64), (&[2, 3, 128], 64)] {
        for granularity in granularities(group) {
            for statistic in [Statistic::MinMax, Statistic::AbsMax] {
                cases.push(Case::new(Observe { granularity, statistic }, Tolerance::Exact).normal(dims, DType::F32));
            }
            for (scheme, bits) in Scheme::ALL.into_iter().zip([8, 4, 8]).chain([(Scheme::SymmetricNarrow, 2)]) {
                let op = FakeQuant { bits, scheme, granularity, dynamic: true };
                cases.push(Case::new(op, Tolerance::Exact).normal(dims, DType::F32));
                let groups =
                    granularity.groups("case", &Case::new(op, Tolerance::Exact).normal(dims, DType::F32).metas()[0]);
                let range = [groups.map_or(1, |(groups, _)| groups), 2];
                let fixed = FakeQuant { dynamic: false, ..op };
                let tight = Fill::Custom(tight_ranges);
                cases.push(Case::new(fixed, Tolerance::Exact).normal(dims, DType::F32).input(
                    &range,
                    DType::F32,
                    tight.clone(),
                ));
                let backward = FakeQuantBackward { bits, scheme, granularity };
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
            let op = FakeQuant { bits, scheme, granularity: Granularity::Token, dynamic: true };
            let dtype = DType::FLOATS[bits as usize % 3];
            cases.push(Case::new(op, Tolerance::Exact).normal(&[7, 33], dtype));
            cases.push(Case::new(op, Tolerance::Exact).input(&[14, 65], DType::F32, Fill::Custom(spread)));
        }
        let op = FakeQuant { bits: 8, scheme, granularity: Granularity::Token, dynamic: true };
        cases.push(Case::new(op, Tolerance::Exact).input(&[4, 9], DType::F32, Fill::Custom(poisoned)));
        // Longer than one part: ranges are folded in two steps.
        let tensor = FakeQuant { granularity: Granularity::Tensor, ..op };
        cases.push(Case::new(tensor, Tolerance::Exact).normal(&[67, 1001], DType::F32));
        for dtype in [DType::F16, DType::Bf16] {
            let backward = FakeQuantBackward { bits: 4, scheme, granularity: Granularity::Group(16) };
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
        let op = FakeQuant { bits: 8, scheme: Scheme::SymmetricNarrow, granularity, dynamic: true };
        cases.push(Case::new(op, Tolerance::Exact).normal(&dims, DType::F32).bench());
    }
    cases.extend(super::super::quantize::cases());
    cases
}
