//! One training life-cycle with four hooks (BMCook's idea): quantization changes how a weight enters an output,
//! distillation adds to the loss, pruning acts at the update, conversion into experts comes after. Any subset composes.

use super::optimizer::Optimizer;
use crate::error::Result;
use crate::nn::{Batch, Model, OutputHook, Pass};
use crate::tape::Var;
use crate::tensor::Tensor;

/// One micro-batch. N = B T rows of the flattened hidden states.
#[derive(Clone)]
pub struct Micro {
    pub batch: Batch,
    /// u32 `[N]`, `softmax::IGNORE` where nothing is predicted.
    pub targets: Tensor,
    /// f32 `[N]`: what each row's cross-entropy counts.
    pub weights: Tensor,
    /// What the step's loss is divided by, summed over its micro-batches: the labels' count or weighted count.
    pub weight: f64,
    /// Whether gold labels count at all.
    pub gold: bool,
    /// Rows with a target: for tokens per second.
    pub tokens: usize,
    /// Which teacher states belong to it.
    pub teacher: Option<Teacher>,
}

/// A teacher's view of a micro-batch.
#[derive(Clone)]
pub struct Teacher {
    /// Last hidden states f32 `[N, d_teacher]`.
    pub hidden: Tensor,
    /// f32 `[N]`: rows of the hidden-state loss.
    pub hidden_weights: Tensor,
    /// f32 `[N]`: rows of the soft-label loss (source-language stream).
    pub soft_weights: Tensor,
    /// u32 `[N]`: the teacher's arg-max on the target-language stream, else `IGNORE`.
    pub hard_targets: Tensor,
    /// f32 `[N]`: rows of the hard-label loss.
    pub hard_weights: Tensor,
}

/// A promise of a method and what was measured; a broken one stops the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Invariant {
    pub rule: String,
    pub measured: String,
    pub holds: bool,
}

/// A compression method as hooks on training.
pub trait Method {
    fn name(&self) -> &'static str;

    /// Computing outputs: how a weight enters its product.
    fn on_output(&self) -> Option<&dyn OutputHook> {
        None
    }

    /// Computing the loss: a scalar added to it, in the unit of `Micro::weights` (a sum over rows).
    fn on_loss(&self, _pass: &mut Pass, _hidden: &Var, _micro: &Micro) -> Result<Option<Var>> {
        Ok(None)
    }

    /// Before the first update and after each: masks, schedules.
    fn on_update(&mut self, _step: u64, _model: &Model, _optimizer: &mut Optimizer) -> Result<()> {
        Ok(())
    }

    /// After the last update.
    fn on_finish(&mut self, _model: &mut Model) -> Result<()> {
        Ok(())
    }

    /// Checked after the stage.
    fn invariants(&self, _model: &Model) -> Result<Vec<Invariant>> {
        Ok(Vec::new())
    }
}
