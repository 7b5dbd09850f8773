//! One training life-cycle with four hooks (BMCook's idea): quantization changes how a weight enters an output,
//! distillation adds to the loss, pruning acts at the update, conversion into experts comes after. Any subset composes.

use std::collections::BTreeMap;

use super::optimizer::Optimizer;
use crate::error::Result;
use crate::nn::{Batch, Model, OutputHook, Pass, Source, Tap};
use crate::shape::Meta;
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
    /// Its largest logits, where those are what is kept of it.
    pub top: Option<Top>,
}

/// The k largest logits of each row, softened, and what is known of the others: that they share the rest of the
/// probability, as the cached log-sum-exp says.
#[derive(Clone)]
pub struct Top {
    /// u32 `[N, k]`: (row modulo [`super::trainer::LOSS_CHUNK`]) V + token.
    pub slots: Tensor,
    /// f32 `[N, k]`: z / T less the logit that an even share of the rest amounts to.
    pub values: Tensor,
}

/// Whether gold labels count, and the type and extents of every tensor: micro-batches alike in it make the same launches.
pub type MicroShape = (bool, [Option<Meta>; Micro::PLACES]);

impl Micro {
    /// Tensors that it may have.
    pub const PLACES: usize = 16;

    /// Its tensors, each in its place.
    pub fn tensors(&self) -> [Option<&Tensor>; Self::PLACES] {
        let (batch, teacher) = (&self.batch, self.teacher.as_ref());
        [
            Some(&batch.tokens),
            Some(&batch.positions),
            batch.block_positions.as_ref(),
            batch.context.as_ref(),
            batch.lengths.as_ref(),
            Some(&self.targets),
            Some(&self.weights),
            teacher.map(|t| &t.hidden),
            teacher.map(|t| &t.hidden_weights),
            teacher.map(|t| &t.soft_weights),
            teacher.map(|t| &t.hard_targets),
            teacher.map(|t| &t.hard_weights),
            teacher.and_then(|t| t.top.as_ref()).map(|t| &t.slots),
            teacher.and_then(|t| t.top.as_ref()).map(|t| &t.values),
            batch.source.as_ref().map(|s| &s.tokens),
            batch.source.as_ref().map(|s| &s.lengths),
        ]
    }

    pub fn shape(&self) -> MicroShape {
        (self.gold, self.tensors().map(|tensor| tensor.map(Tensor::meta)))
    }

    /// A copy in memory of its own.
    pub fn duplicate(&self) -> Result<Self> {
        self.map(|_, tensor| tensor.duplicate())
    }

    /// The same with every tensor put through `change`, which is also told its place in [`Micro::tensors`].
    pub fn map(&self, change: impl Fn(usize, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let maybe = |at: usize, tensor: &Option<Tensor>| tensor.as_ref().map(|t| change(at, t)).transpose();
        let top = |t: &Top| -> Result<Top> { Ok(Top { slots: change(12, &t.slots)?, values: change(13, &t.values)? }) };
        let source = |s: &Source| -> Result<Source> {
            Ok(Source { tokens: change(14, &s.tokens)?, lengths: change(15, &s.lengths)? })
        };
        let teacher = |t: &Teacher| -> Result<Teacher> {
            Ok(Teacher {
                hidden: change(7, &t.hidden)?,
                hidden_weights: change(8, &t.hidden_weights)?,
                soft_weights: change(9, &t.soft_weights)?,
                hard_targets: change(10, &t.hard_targets)?,
                hard_weights: change(11, &t.hard_weights)?,
                top: t.top.as_ref().map(top).transpose()?,
            })
        };
        Ok(Self {
            batch: Batch {
                tokens: change(0, &self.batch.tokens)?,
                positions: change(1, &self.batch.positions)?,
                block_positions: maybe(2, &self.batch.block_positions)?,
                context: maybe(3, &self.batch.context)?,
                lengths: maybe(4, &self.batch.lengths)?,
                source: self.batch.source.as_ref().map(source).transpose()?,
            },
            targets: change(5, &self.targets)?,
            weights: change(6, &self.weights)?,
            teacher: self.teacher.as_ref().map(teacher).transpose()?,
            ..*self
        })
    }

    /// Takes over the contents of one of the same shape.
    pub fn assign(&mut self, from: &Micro) -> Result<()> {
        (self.weight, self.tokens) = (from.weight, from.tokens);
        let pairs = self.tensors().into_iter().zip(from.tensors());
        pairs.filter_map(|(to, from)| to.zip(from)).try_for_each(|(to, from)| to.assign(from))
    }
}

/// A promise of a method and what was measured; a broken one stops the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Invariant {
    pub rule: String,
    pub measured: String,
    pub holds: bool,
}

/// A compression method as hooks on training.
///
/// What the first two hooks queue is captured where the device can, and replayed for other micro-batches of the same shape:
/// numbers that differ between those must reach it as tensors. A hook that reads a tensor's values there keeps the training
/// from being captured. A method that queues something else from a step on says so by `Optimizer::invalidate`.
pub trait Method {
    fn name(&self) -> &'static str;

    /// Computing outputs: how a weight enters its product.
    fn on_output(&self) -> Option<&dyn OutputHook> {
        None
    }

    /// Intermediate states that [`Method::on_loss`] reads of the pass.
    fn taps(&self) -> Vec<Tap> {
        Vec::new()
    }

    /// Computing the loss: a scalar added to it, in the unit of `Micro::weights` (a sum over rows).
    fn on_loss(&self, _pass: &mut Pass, _hidden: &Var, _micro: &Micro) -> Result<Option<Var>> {
        Ok(None)
    }

    /// Before the first update and after each: masks, schedules.
    fn on_update(&mut self, _step: u64, _model: &Model, _optimizer: &mut Optimizer) -> Result<()> {
        Ok(())
    }

    /// What a resumed training needs beside parameters and the optimizer's state, by names of its own.
    fn state(&self) -> BTreeMap<String, Tensor> {
        BTreeMap::new()
    }

    /// Goes on from what [`Method::state`] gave after `step` steps, before `on_update` is called for that step again;
    /// `state` holds the other methods' tensors too.
    fn restore(&mut self, _state: &BTreeMap<String, Tensor>, _step: u64) -> Result<()> {
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
