//! Attention in f64, from the formula: one query at a time, the whole row of scores in view.

use super::{Attention, MASKED, Mask};
use crate::op::Array;

/// Reads `[B, N, H, D]` and the optional inputs by their indices.
struct View<'a> {
    op: &'a Attention,
    inputs: &'a [Array],
}

impl View<'_> {
    /// B, T, S, H, D.
    fn extents(&self) -> (usize, usize, usize, usize, usize) {
        let (q, k) = (self.inputs[0].dims(), self.inputs[1].dims());
        (q[0], q[1], k[1], q[2], q[3])
    }

    fn visible(&self, b: usize, t: usize, s: usize) -> bool {
        let [context, lengths, _] = self.op.optional();
        let position = t + self.op.query_offset;
        let masked_in = match self.op.mask {
            Mask::None => true,
            Mask::Causal => s <= position,
            Mask::Prefix => s <= position || context.is_some_and(|i| (s as f64) < self.inputs[i].data[b]),
        };
        masked_in && lengths.is_none_or(|i| (s as f64) < self.inputs[i].data[b])
    }

    /// Start of row (b, n, h) in a `[B, N, H, D]` tensor.
    fn row(&self, b: usize, n: usize, h: usize, extent: usize) -> usize {
        let (_, _, _, heads, dim) = self.extents();
        ((b * extent + n) * heads + h) * dim
    }

    fn score(&self, b: usize, t: usize, s: usize, h: usize) -> f64 {
        let (_, queries, keys, _, dim) = self.extents();
        let q = &self.inputs[0].data[self.row(b, t, h, queries)..][..dim];
        let k = &self.inputs[1].data[self.row(b, s, h, keys)..][..dim];
        let bias = self.op.optional()[2].map_or(0.0, |i| self.inputs[i].data[(h * queries + t) * keys + s]);
        f64::from(self.op.scale) * q.iter().zip(k).map(|(x, y)| x * y).sum::<f64>() + bias
    }
}

/// y and lse.
pub fn forward(op: &Attention, inputs: &[Array]) -> Vec<Vec<f64>> {
    let view = View { op, inputs };
    let (batch, queries, keys, heads, dim) = view.extents();
    let mut y = vec![0.0; batch * queries * heads * dim];
    let mut lse = vec![f64::from(MASKED); batch * heads * queries];
    for b in 0..batch {
        for t in 0..queries {
            for h in 0..heads {
                let seen: Vec<usize> = (0..keys).filter(|&s| view.visible(b, t, s)).collect();
                let scores: Vec<f64> = seen.iter().map(|&s| view.score(b, t, s, h)).collect();
                if seen.is_empty() {
                    continue;
                }
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|x| (x - largest).exp()).sum();
                lse[(b * heads + h) * queries + t] = largest + total.ln();
                let out = view.row(b, t, h, queries);
                for (&s, score) in seen.iter().zip(&scores) {
                    let p = (score - largest).exp() / total;
                    let v = view.row(b, s, h, keys);
                    for d in 0..dim {
                        y[out + d] += p * inputs[2].data[v + d];
                    }
                }
            }
        }
    }
    vec![y, lse]
}

/// dq, dk, dv and dbias, as a function of y and lse as they are given.
pub fn backward(op: &Attention, inputs: &[Array]) -> Vec<Vec<f64>> {
    let view = View { op, inputs };
    let (batch, queries, keys, heads, dim) = view.extents();
    let scale = f64::from(op.scale);
    let [q, k, v] = [0, 1, 2].map(|i| &inputs[i].data);
    let [y, lse, dy] = [0, 1, 2].map(|i| &inputs[op.inputs() + i].data);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let mut dbias = vec![0.0; if op.bias { heads * queries * keys } else { 0 }];
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..queries {
                let at = view.row(b, t, h, queries);
                let delta: f64 = (0..dim).map(|d| dy[at + d] * y[at + d]).sum();
                for s in (0..keys).filter(|&s| view.visible(b, t, s)) {
                    let from = view.row(b, s, h, keys);
                    let p = (view.score(b, t, s, h) - lse[(b * heads + h) * queries + t]).exp();
                    let dp: f64 = (0..dim).map(|d| dy[at + d] * v[from + d]).sum();
                    let ds = p * (dp - delta);
                    for d in 0..dim {
                        dv[from + d] += p * dy[at + d];
                        dq[at + d] += scale * ds * k[from + d];
                        dk[from + d] += scale * ds * q[at + d];
                    }
                    if op.bias {
                        dbias[(h * queries + t) * keys + s] += ds;
                    }
                }
            }
        }
    }
    let mut outputs = vec![dq, dk, dv];
    if op.bias {
        outputs.push(dbias);
    }
    outputs
}
