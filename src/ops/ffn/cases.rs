//! Rows of the table for the feed-forward block.

use super::{Ffn, FfnActivation, FfnBackward};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};

/// Weights scaled so that z and y are of order one.
fn weight(columns: usize) -> Fill {
    Fill::Normal { mean: 0.0, deviation: 1.0 / (columns.max(1) as f64).sqrt() }
}

fn forward(activation: FfnActivation, lead: &[usize], [d, f]: [usize; 2], dtype: DType) -> Case {
    let hidden = f * activation.halves();
    Case::new(Ffn { activation }, Tolerance::Contraction { k: d + f })
        .normal(&[lead, &[d]].concat(), dtype)
        .input(&[hidden, d], dtype, weight(d))
        .normal(&[hidden], dtype)
        .input(&[d, f], dtype, weight(f))
        .normal(&[d], dtype)
        // y by way of h.
        .rounded_between(&[0])
}

/// Sums of one or two terms of order one, whose own size may be next to nothing.
fn terms(case: Case, [d, f]: [usize; 2]) -> Case {
    if d * f == 1 { case.terms(1.0) } else { case }
}

fn backward(activation: FfnActivation, lead: &[usize], [d, f]: [usize; 2], dtype: DType) -> Case {
    let hidden = f * activation.halves();
    let rows: usize = lead.iter().product();
    Case::new(FfnBackward { activation }, Tolerance::Contraction { k: d + f + rows })
        .normal(&[lead, &[d]].concat(), dtype)
        .input(&[hidden, d], dtype, weight(d))
        .input(&[d, f], dtype, weight(f))
        .normal(&[lead, &[hidden]].concat(), dtype)
        .normal(&[lead, &[d]].concat(), dtype)
        // dx, dw1 and db1 by way of dz, dw2 of h.
        .rounded_between(&[0, 1, 2, 3])
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for activation in [FfnActivation::Relu, FfnActivation::Gelu, FfnActivation::Geglu] {
        for (lead, size) in [(&[1][..], [1, 1]), (&[3], [5, 7]), (&[2, 4], [8, 12]), (&[7], [13, 31])] {
            cases.push(forward(activation, lead, size, DType::F32).grad());
            cases.push(backward(activation, lead, size, DType::F32));
        }
        for (lead, size) in [(&[64][..], [63, 65]), (&[65], [64, 96]), (&[2, 130], [17, 33])] {
            cases.push(forward(activation, lead, size, DType::F32));
            cases.push(backward(activation, lead, size, DType::F32));
        }
        // Above the CPU kernel's block of 256 tokens, for two threads and more, with a short last block.
        cases.push(forward(activation, &[1100], [9, 10], DType::F32));
        cases.push(backward(activation, &[1100], [9, 10], DType::F32));
        for dtype in [DType::F16, DType::Bf16] {
            for (lead, size) in [(&[1][..], [1, 1]), (&[3, 5], [13, 31]), (&[300], [16, 24])] {
                cases.push(terms(forward(activation, lead, size, dtype), size));
                cases.push(terms(backward(activation, lead, size, dtype), size));
            }
        }
        // Several tiles of 128 along each axis, with ragged edges.
        cases.push(forward(activation, &[140], [136, 152], DType::F16));
        cases.push(backward(activation, &[140], [136, 152], DType::Bf16));
        // And of 256, with rings that go round, for the wide tiles.
        cases.push(forward(activation, &[270], [328, 280], DType::Bf16));
        cases.push(backward(activation, &[270], [328, 280], DType::F16));
        // Where groups no longer take tiles in turns, on the host.
        cases.push(forward(activation, &[270], [400, 264], DType::F16));
        // GPT-2 small's block over 64 tokens, and the demo model's over 512.
        cases.push(forward(activation, &[64], [768, 3072], DType::F32).bench());
        cases.push(backward(activation, &[64], [768, 3072], DType::F32).bench());
        cases.push(forward(activation, &[512], [128, 512], DType::F32).bench());
        cases.push(backward(activation, &[512], [128, 512], DType::F32).bench());
    }
    cases
}
