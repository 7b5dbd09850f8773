//! The family's rows of the table.

use super::{Attention, AttentionBackward, Mask};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};

/// B, T, S, H, D.
type Size = [usize; 5];

/// Masks and optional inputs: mask, lengths, bias.
const KINDS: [(Mask, bool, bool); 8] = [
    (Mask::None, false, false),
    (Mask::Causal, false, false),
    (Mask::Prefix, false, false),
    (Mask::None, true, false),
    (Mask::Prefix, true, false),
    (Mask::None, false, true),
    (Mask::Causal, true, true),
    (Mask::Prefix, true, true),
];

fn op((mask, lengths, bias): (Mask, bool, bool), dim: usize, query_offset: usize) -> Attention {
    Attention { mask, lengths, bias, scale: 1.0 / (dim as f32).sqrt(), query_offset }
}

/// Inputs up to the bias. Contexts and lengths run from 0 (nothing) to one beyond the number of keys.
fn inputs(case: Case, op: &Attention, [b, t, s, h, d]: Size, dtype: DType) -> Case {
    let bounds = || Fill::Integers { low: 0, high: s as i64 + 1 };
    let mut case = case.normal(&[b, t, h, d], dtype).normal(&[b, s, h, d], dtype).normal(&[b, s, h, d], dtype);
    if op.mask == Mask::Prefix {
        case = case.input(&[b], DType::U32, bounds());
    }
    if op.lengths {
        case = case.input(&[b], DType::U32, bounds());
    }
    if op.bias {
        case = case.normal(&[h, t, s], dtype);
    }
    case
}

fn forward(op: Attention, size: Size, dtype: DType) -> Case {
    // A score is a sum over D, a value of y one over S.
    let case = Case::new(op, Tolerance::Contraction { k: size[2] + size[4] });
    // y by way of P.
    inputs(case, &op, size, dtype).rounded_between(&[0])
}

/// y, lse and dy are drawn on their own: the backward is a function of them as given. lse near ln S keeps rows of P
/// summing to about 1.
fn backward(op: Attention, size: Size, dtype: DType) -> Case {
    let [b, t, s, h, d] = size;
    let tolerance = Tolerance::Contraction { k: s.max(t) + 4 * d };
    let case = inputs(Case::new(AttentionBackward(op), tolerance), &op, size, dtype);
    let lse = Fill::Normal { mean: (s as f64).ln() + if op.bias { 1.0 } else { 0.5 }, deviation: 0.3 };
    let case = case.normal(&[b, t, h, d], dtype).input(&[b, h, t], DType::F32, lse).normal(&[b, t, h, d], dtype);
    // dq and dk by way of dS, dv of P.
    case.rounded_between(&[0, 1, 2])
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut both = |op: Attention, size: Size, dtype: DType, grad: bool| {
        let case = forward(op, size, dtype);
        cases.push(if grad { case.grad() } else { case });
        cases.push(backward(op, size, dtype));
    };
    for kind in KINDS {
        // Smallest, odd with more keys than queries, and an edge of every block.
        both(op(kind, 1, 0), [1, 1, 1, 1, 1], DType::F32, true);
        both(op(kind, 5, 0), [2, 3, 7, 3, 5], DType::F32, true);
        both(op(kind, 8, 0), [2, 6, 6, 2, 8], DType::F32, true);
        // Decoding: one query behind cached keys; a chunk of queries behind them.
        both(op(kind, 16, 12), [3, 1, 13, 2, 16], DType::F32, true);
        both(op(kind, 6, 4), [1, 5, 9, 2, 6], DType::F32, true);
        for dtype in DType::FLOATS {
            both(op(kind, 16, 0), [2, 33, 33, 3, 16], *dtype, false);
            both(op(kind, 17, 0), [1, 31, 65, 2, 17], *dtype, false);
        }
        both(op(kind, 32, 0), [1, 129, 127, 2, 32], DType::F32, false);
        both(op(kind, 64, 0), [1, 64, 64, 2, 64], DType::F32, false);
    }
    // Head sizes around vector and block widths.
    for dim in [2, 15, 24, 48, 63, 80, 96, 127, 128] {
        both(op((Mask::Causal, false, false), dim, 0), [1, 19, 19, 2, dim], DType::F32, false);
    }
    // Tiles of lanes: their edges, rows by fours, with and without a rest of three fours.
    for dtype in DType::FLOATS {
        for kind in KINDS {
            both(op(kind, 20, 0), [2, 35, 36, 3, 20], *dtype, false);
        }
        both(op((Mask::Prefix, true, true), 64, 25), [2, 70, 100, 2, 64], *dtype, false);
        both(op((Mask::Prefix, true, false), 64, 25), [2, 70, 100, 2, 64], *dtype, false);
        both(op((Mask::Causal, true, false), 12, 0), [3, 101, 36, 2, 12], *dtype, false);
    }
    // Blocks of tensor instructions: their edges, several of them in both directions, every layout of registers.
    for dtype in [DType::F16, DType::Bf16] {
        for kind in KINDS {
            both(op(kind, 64, 0), [2, 131, 139, 1, 64], dtype, false);
            both(op(kind, 128, 70), [1, 66, 136, 1, 128], dtype, false);
        }
        for dim in [8, 24, 32, 40, 72, 80, 96, 104] {
            both(op((Mask::Causal, true, true), dim, 0), [2, 70, 67, 2, dim], dtype, false);
        }
        both(op((Mask::Causal, true, false), 48, 40), [2, 1, 41, 3, 48], dtype, false);
        // Rings of tiles go round, for queries and for keys.
        both(op((Mask::Causal, true, false), 64, 50), [1, 600, 650, 1, 64], dtype, false);
        both(op((Mask::None, false, true), 128, 0), [1, 330, 410, 1, 128], dtype, false);
    }
    // Several blocks of keys, and loops beyond the 65,535 iterations that one driver allows.
    both(op((Mask::Prefix, true, false), 8, 0), [1, 300, 300, 1, 8], DType::F32, false);
    let many = op((Mask::None, false, false), 2, 0);
    let cancels = "sums of 140,001 terms of both signs, of which next to nothing may be left";
    cases.push(forward(many, [1, 140_001, 1, 1, 2], DType::F32));
    cases.push(backward(many, [1, 140_001, 1, 1, 2], DType::F32).loosened(16.0, cancels));
    cases.push(backward(many, [1, 1, 140_001, 1, 2], DType::F32).loosened(16.0, cancels));
    let mut long = forward(op((Mask::None, false, false), 2, 0), [1, 1, 140_001, 1, 2], DType::F32);
    // Values of one sign: the mean of 140,001 normal ones is nearly nothing, and says more of cancellation than of loops.
    long.inputs[2].fill = Fill::Uniform { low: 0.5, high: 1.5 };
    cases.push(long);
    // BERT-base over 128 tokens, GPT-2 small's heads over 512.
    for dtype in DType::FLOATS {
        let size = [1, 128, 128, 12, 64];
        cases.push(forward(op((Mask::None, true, false), 64, 0), size, *dtype).bench());
        cases.push(backward(op((Mask::None, true, false), 64, 0), size, *dtype).bench());
    }
    let size = [1, 512, 512, 4, 64];
    cases.push(forward(op((Mask::None, false, false), 64, 0), size, DType::F32).bench());
    cases.push(forward(op((Mask::Causal, false, false), 64, 0), size, DType::F32).bench());
    cases.push(backward(op((Mask::Causal, false, false), 64, 0), size, DType::F32).bench());
    cases
}
