//! What a linear head predicts, for evaluation.

use std::any::Any;

use super::entropy::cost;
use super::plan::Rung;
use super::{check_chunk, check_heads, check_rows, groups, logits, plan, row};
use crate::cpu;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Op};
use crate::ops::softmax::{CrossEntropy, IGNORE};
use crate::shape::Meta;

/// The most probable word and the log probability of the target, without the logits of all words.
///
/// Inputs: hidden `[n, d]` and weight `[v, d]` of one float type, targets u32 `[n]`. Outputs: prediction u32 `[n]` (the
/// lowest index wins ties) and log p(target) f32 `[n]`, 0 where the target is `IGNORE`.
#[derive(Clone, Copy, Debug)]
pub struct LinearPredict {
    /// Tokens whose logits exist at a time.
    pub chunk: usize,
}

const RULE: &str = "hidden [n, d], weight [v, d], targets [n]; d and v above 0";

impl Op for LinearPredict {
    fn name(&self) -> &'static str {
        "linear_predict"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_chunk(self.name(), self.chunk)?;
        let n = check_heads(self.name(), RULE, inputs, &[[0, 1]])?;
        check_rows(self.name(), RULE, inputs, n, &[(2, DType::U32)])?;
        Ok(vec![Meta::new(&[n], DType::U32)?, row(n)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let Ok(z) = logits(&inputs[0], &inputs[1]) else {
            return Vec::new();
        };
        let best = |row: &[f64]| (1..row.len()).fold(0, |best, j| if row[j] > row[best] { j } else { best }) as f64;
        let predictions = z.data.chunks(z.shape.last()).map(best).collect();
        let loss = CrossEntropy { smoothing: 0.0 }.reference(&[z, inputs[2].clone()]);
        let ignored = |t: f64| t == f64::from(IGNORE);
        let scores = loss[0].iter().zip(&inputs[2].data).map(|(l, &t)| if ignored(t) { 0.0 } else { -l }).collect();
        vec![predictions, scores]
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("linear_predict_fwd", DType::FLOATS, cpu::linear_predict),
            groups::forward("linear_predict_fwd_wgmma", "entropy_tiles_wgmma", groups::predict),
            plan::tensor("linear_predict_fwd_mma", |p| plan::predict(p, Rung::Large)),
            plan::tensor_small("linear_predict_fwd_small_mma", |p| plan::predict(p, Rung::Small)),
            plan::kernel("linear_predict_fwd", |p| plan::predict(p, Rung::Registers)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let (hidden, weight) = (inputs[0].shape, inputs[1].shape);
        Params::new().u(hidden.rows()).u(hidden.last()).u(weight.rows()).u(self.chunk)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, 1.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
