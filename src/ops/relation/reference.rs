//! Relations in f64, from the formula: one query at a time, its whole row of scores in view.

use super::{Relation, RelationLoss};
use crate::op::Array;
use crate::ops::attention::{MASKED, Mask};

/// Reads the inputs by their places.
struct View<'a> {
    op: &'a Relation,
    inputs: &'a [Array],
}

impl View<'_> {
    /// B, T, S, H.
    fn extents(&self) -> [usize; 4] {
        let (a, b) = (self.inputs[0].dims(), self.inputs[1].dims());
        [a[0], a[1], b[1], a[2]]
    }

    fn visible(&self, b: usize, t: usize) -> Vec<usize> {
        let [context, lengths] = self.op.optional().map(|i| i.map(|i| self.inputs[i].data[b]));
        let seen = |s: &usize| {
            let masked_in = match self.op.mask {
                Mask::None => true,
                Mask::Causal => *s <= t,
                Mask::Prefix => *s <= t || context.is_some_and(|c| (*s as f64) < c),
            };
            masked_in && lengths.is_none_or(|l| (*s as f64) < l)
        };
        (0..self.extents()[2]).filter(seen).collect()
    }

    /// Row (b, n, h) of input `index`.
    fn row(&self, index: usize, [b, n, h]: [usize; 3]) -> &[f64] {
        let dims = self.inputs[index].dims();
        let start = ((b * dims[1] + n) * dims[2] + h) * dims[3];
        &self.inputs[index].data[start..start + dims[3]]
    }

    /// Scores of the student and of the teacher.
    fn scores(&self, [b, t, h]: [usize; 3], keys: &[usize]) -> [Vec<f64>; 2] {
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        [(0, self.op.scale), (2, self.op.teacher_scale)].map(|(first, scale)| {
            let query = self.row(first, [b, t, h]);
            keys.iter().map(|&s| f64::from(scale) * dot(query, self.row(first + 1, [b, s, h]))).collect()
        })
    }
}

fn log_sum_exp(z: &[f64]) -> f64 {
    let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + z.iter().map(|z| (z - most).exp()).sum::<f64>().ln()
}

/// Losses, and both log-sum-exps.
pub fn forward(op: &Relation, inputs: &[Array]) -> Vec<Vec<f64>> {
    let view = View { op, inputs };
    let [batch, queries, _, heads] = view.extents();
    let (mut losses, mut sums) = (Vec::new(), Vec::new());
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..queries {
                let keys = view.visible(b, t);
                let [student, teacher] = view.scores([b, t, h], &keys);
                let pairs = student.iter().zip(&teacher);
                let (loss, lse) = match (op.loss, keys.is_empty()) {
                    (RelationLoss::Divergence, true) => (0.0, [f64::from(MASKED); 2]),
                    (RelationLoss::SquaredError, true) => (0.0, [0.0; 2]),
                    (RelationLoss::Divergence, false) => {
                        let lse = [log_sum_exp(&student), log_sum_exp(&teacher)];
                        let term = |(s, t): (&f64, &f64)| (t - lse[1]).exp() * ((t - lse[1]) - (s - lse[0]));
                        (pairs.map(term).sum(), lse)
                    }
                    (RelationLoss::SquaredError, false) => {
                        let squares: f64 = pairs.map(|(s, t)| (s - t).powi(2)).sum();
                        (squares / keys.len() as f64, [0.0; 2])
                    }
                };
                losses.push(inputs[op.weights()].data[b * queries + t] * loss);
                sums.extend(lse);
            }
        }
    }
    vec![losses, sums]
}

/// da and db, as a function of the log-sum-exps as they are given.
pub fn backward(op: &Relation, inputs: &[Array]) -> Vec<Vec<f64>> {
    let view = View { op, inputs };
    let [batch, queries, keys, heads] = view.extents();
    let dim = inputs[0].shape.last();
    let [weights, sums, dloss] = [0, 1, 2].map(|i| &inputs[op.weights() + i].data);
    let (mut da, mut db) = (vec![0.0; inputs[0].data.len()], vec![0.0; inputs[1].data.len()]);
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..queries {
                let seen = view.visible(b, t);
                let [student, teacher] = view.scores([b, t, h], &seen);
                let row = (b * heads + h) * queries + t;
                let factor = f64::from(op.scale) * weights[b * queries + t] * dloss[row];
                for (i, &s) in seen.iter().enumerate() {
                    let slope = factor
                        * match op.loss {
                            RelationLoss::Divergence => {
                                (student[i] - sums[2 * row]).exp() - (teacher[i] - sums[2 * row + 1]).exp()
                            }
                            RelationLoss::SquaredError => 2.0 * (student[i] - teacher[i]) / seen.len() as f64,
                        };
                    let (at, from) = (((b * queries + t) * heads + h) * dim, ((b * keys + s) * heads + h) * dim);
                    for d in 0..dim {
                        da[at + d] += slope * inputs[1].data[from + d];
                        db[from + d] += slope * inputs[0].data[at + d];
                    }
                }
            }
        }
    }
    vec![da, db]
}
