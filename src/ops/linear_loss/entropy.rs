//! Cross-entropy of a linear head.

use std::any::Any;

use super::plan::Rung;
use super::{check_chunk, check_heads, check_rows, groups, logits, plan, row, through};
use crate::cpu;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::ops::softmax::{CrossEntropy, CrossEntropyBackward, check_smoothing};
use crate::shape::Meta;
use crate::tensor::Tensor;

/// [`CrossEntropy`] of the logits hidden weightᵀ, `chunk` tokens at a time.
///
/// Inputs: hidden `[n, d]` and weight `[v, d]` of one float type, targets u32 `[n]` with `IGNORE`. Outputs, f32 `[n]`:
/// loss and log sum exp of the logits. Buffers: at most `chunk` tokens times 2,048 words.
#[derive(Clone, Copy, Debug)]
pub struct LinearCrossEntropy {
    pub smoothing: f32,
    /// Tokens whose logits exist at a time.
    pub chunk: usize,
}

/// dhidden and dweight of [`LinearCrossEntropy`], from logits computed again tile by tile.
/// Inputs: hidden, weight, targets, lse and dloss f32 `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct LinearCrossEntropyBackward {
    pub smoothing: f32,
    pub chunk: usize,
}

const RULE: &str = "hidden [n, d], weight [v, d], targets [n] (and lse and dloss [n]); d and v above 0";

/// Parameter words of the CPU kernels: n, d, v, chunk, smoothing.
fn words(inputs: &[Meta], chunk: usize, smoothing: f32) -> Params {
    let (hidden, weight) = (inputs[0].shape, inputs[1].shape);
    Params::new().u(hidden.rows()).u(hidden.last()).u(weight.rows()).u(chunk).f(smoothing)
}

/// `products` times the work of the logits, and an exponential or so per logit.
pub(super) fn cost(inputs: &[Meta], outputs: &[Meta], products: f64) -> Cost {
    let [n, d, v] = [inputs[0].shape.rows(), inputs[0].shape.last(), inputs[1].shape.rows()].map(|x| x as f64);
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    Cost { flops: n * v * (2.0 * d * products + 5.0), bytes }
}

impl Op for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_smoothing(self.name(), self.smoothing)?;
        check_chunk(self.name(), self.chunk)?;
        let n = check_heads(self.name(), RULE, inputs, &[[0, 1]])?;
        check_rows(self.name(), RULE, inputs, n, &[(2, DType::U32)])?;
        Ok(vec![row(n)?, row(n)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let Ok(z) = logits(&inputs[0], &inputs[1]) else {
            return Vec::new();
        };
        CrossEntropy { smoothing: self.smoothing }.reference(&[z, inputs[2].clone()])
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("linear_cross_entropy_fwd", DType::FLOATS, cpu::linear_cross_entropy),
            groups::forward("linear_cross_entropy_fwd_wgmma", "entropy_tiles_wgmma", groups::entropy),
            plan::tensor("linear_cross_entropy_fwd_mma", |p| plan::entropy(p, Rung::Large)),
            plan::tensor_small("linear_cross_entropy_fwd_small_mma", |p| plan::entropy(p, Rung::Small)),
            plan::kernel("linear_cross_entropy_fwd", |p| plan::entropy(p, Rung::Registers)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs, self.chunk, self.smoothing)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let op = LinearCrossEntropyBackward { smoothing: self.smoothing, chunk: self.chunk };
        let inputs = [g.input(0)?, g.input(1)?, g.input(2)?, g.output(1)?, g.grad(0)?];
        Ok(g.run(&op, &inputs)?.into_iter().map(Some).chain([None]).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, 1.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for LinearCrossEntropyBackward {
    fn name(&self) -> &'static str {
        "linear_cross_entropy_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_smoothing(self.name(), self.smoothing)?;
        check_chunk(self.name(), self.chunk)?;
        let n = check_heads(self.name(), RULE, inputs, &[[0, 1]])?;
        check_rows(self.name(), RULE, inputs, n, &[(2, DType::U32), (3, DType::F32), (4, DType::F32)])?;
        Ok(vec![inputs[0], inputs[1]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let Ok(z) = logits(&inputs[0], &inputs[1]) else {
            return Vec::new();
        };
        let op = CrossEntropyBackward { smoothing: self.smoothing };
        let dz = op.reference(&[z, inputs[2].clone(), inputs[3].clone(), inputs[4].clone()]);
        through(&inputs[0], &inputs[1], &dz[0])
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("linear_cross_entropy_bwd", DType::FLOATS, cpu::linear_cross_entropy_backward),
            groups::backward("linear_cross_entropy_bwd_wgmma", "entropy_planes_wgmma", groups::entropy_backward),
            plan::tensor("linear_cross_entropy_bwd_mma", |p| plan::entropy_backward(p, Rung::Large)),
            plan::tensor_small("linear_cross_entropy_bwd_small_mma", |p| plan::entropy_backward(p, Rung::Small)),
            plan::kernel("linear_cross_entropy_bwd", |p| plan::entropy_backward(p, Rung::Registers)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs, self.chunk, self.smoothing)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, 3.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
