//! The family's rows of the table.

use super::{Relation, RelationBackward, RelationLoss};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::ops::attention::Mask;
use crate::ops::distill::WEIGHTS;

/// B, T, S, H, D, E.
type Size = [usize; 6];

const KINDS: [(Mask, bool); 6] = [
    (Mask::None, false),
    (Mask::Causal, false),
    (Mask::Prefix, false),
    (Mask::None, true),
    (Mask::Causal, true),
    (Mask::Prefix, true),
];
const LOSSES: [RelationLoss; 2] = [RelationLoss::Divergence, RelationLoss::SquaredError];

fn op(loss: RelationLoss, (mask, lengths): (Mask, bool), dim: usize, teacher_dim: usize) -> Relation {
    // The teacher's relation is the sharper one.
    let [scale, teacher_scale] = [(dim, 1.0), (teacher_dim, 1.5)].map(|(d, factor)| factor / (d as f32).sqrt());
    Relation { loss, mask, lengths, scale, teacher_scale }
}

/// Contexts and lengths run from 0 (nothing) to one beyond the number of keys; every third row weighs nothing.
fn inputs(case: Case, op: &Relation, [b, t, s, h, d, e]: Size, dtype: DType) -> Case {
    let bounds = || Fill::Integers { low: 0, high: s as i64 + 1 };
    let mut case = case.normal(&[b, t, h, d], dtype).normal(&[b, s, h, d], dtype);
    case = case.normal(&[b, t, h, e], dtype).normal(&[b, s, h, e], dtype);
    for _ in op.optional().into_iter().flatten() {
        case = case.input(&[b], DType::U32, bounds());
    }
    case.input(&[b, t], DType::F32, WEIGHTS)
}

/// Size of a score.
const SCORE: f64 = 2.0;

fn forward(op: Relation, size: Size, dtype: DType) -> Case {
    let [_, _, s, _, d, e] = size;
    inputs(Case::new(op, Tolerance::Contraction { k: s + d + e }), &op, size, dtype).terms(SCORE)
}

/// The log-sum-exps are drawn on their own, near those of such scores: backward is a function of them as given.
fn backward(op: Relation, size: Size, dtype: DType) -> Case {
    let [b, t, s, h, d, e] = size;
    let case = Case::new(RelationBackward(op), Tolerance::Contraction { k: s.max(t) + 4 * (d + e) });
    let lse = Fill::Normal { mean: (s as f64).ln() + 0.8, deviation: 0.2 };
    inputs(case, &op, size, dtype).input(&[b, h, t, 2], DType::F32, lse).normal(&[b, h, t], DType::F32)
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for loss in LOSSES {
        let mut both = |op: Relation, size: Size, dtype: DType, grad: bool| {
            let case = forward(op, size, dtype);
            cases.push(if grad { case.grad() } else { case });
            cases.push(backward(op, size, dtype));
        };
        for kind in KINDS {
            // Smallest, odd with more keys than queries and a wider teacher, an edge of every block.
            both(op(loss, kind, 1, 1), [1, 1, 1, 1, 1, 1], DType::F32, true);
            both(op(loss, kind, 5, 7), [2, 3, 7, 3, 5, 7], DType::F32, true);
            both(op(loss, kind, 8, 12), [1, 6, 6, 2, 8, 12], DType::F32, true);
            for dtype in DType::FLOATS {
                both(op(loss, kind, 16, 24), [2, 33, 33, 3, 16, 24], *dtype, false);
            }
            both(op(loss, kind, 17, 33), [1, 65, 63, 2, 17, 33], DType::F32, false);
            both(op(loss, kind, 24, 64), [1, 70, 135, 1, 24, 64], DType::F32, false);
        }
        // Little enough in 16 bits for the rung on tiles, also where barriers are slow.
        both(op(loss, (Mask::Prefix, true), 8, 12), [1, 6, 6, 2, 8, 12], DType::F16, false);
        // One head over the whole width: the range of dimensions that one launch sums is 128.
        both(op(loss, (Mask::Prefix, true), 130, 257), [1, 9, 9, 1, 130, 257], DType::F32, false);
        both(op(loss, (Mask::None, true), 312, 768), [1, 40, 40, 1, 312, 768], DType::Bf16, false);
        // A student of TinyBERT's width beside BERT-base, 128 tokens.
        let real = [8, 128, 128, 12, 26, 64];
        cases.push(forward(op(loss, (Mask::None, true), 26, 64), real, DType::F32).bench());
        cases.push(backward(op(loss, (Mask::None, true), 26, 64), real, DType::F32).bench());
    }
    cases
}
