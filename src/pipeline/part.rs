//! A stage's part of the model: runs its chunks forward and backward, one tape per chunk and micro-batch.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::cut;
use super::reads::Reads;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::pieces;
use crate::nn::{Model, Pass, Residual, States};
use crate::tape::{Deferred, Grads, Tape, Var};
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::Optimizer;
use crate::train::trainer;

/// How a stage trains.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    /// Type of products and activations; `None` for f32.
    pub compute: Option<DType>,
    /// Probability and seed; the site is the micro-batch's.
    pub dropout: f32,
    pub seed: u64,
    /// Keep a chunk's inputs only and run it again in backward.
    pub recompute: bool,
    /// Backward comes in two parts.
    pub split: bool,
}

/// What forward leaves for backward.
struct Taped {
    tape: Tape,
    leaves: BTreeMap<String, Var>,
    inputs: Vec<Var>,
    outputs: Vec<Var>,
}

enum Held {
    Taped(Taped),
    /// To be run again.
    Inputs(Vec<Tensor>),
    Deferred(Deferred, BTreeMap<String, Var>),
}

pub struct Part {
    /// The whole config, this stage's tensors.
    pub model: Model,
    pub methods: Vec<Box<dyn Method>>,
    /// Pieces of each of this stage's chunks.
    chunks: BTreeMap<u32, Range<usize>>,
    held: HashMap<(u32, u32), Held>,
    /// Where the optimizer of these parameters keeps the step that random draws are keyed by, and the loss scale.
    counter: Tensor,
    loss_scale: Tensor,
}

/// Gradients of one chunk and micro-batch by parameter.
pub struct Gradients {
    pub leaves: BTreeMap<String, Var>,
    pub grads: Grads,
}

impl Part {
    /// `model`: what [`Part::model_of`] gave for the same chunks.
    pub fn new(model: Model, chunks: BTreeMap<u32, Range<usize>>, optimizer: &Optimizer) -> Result<Self> {
        let (counter, loss_scale) = (optimizer.counter().clone(), optimizer.loss_scale(&[1])?);
        Ok(Self { model, methods: Vec::new(), chunks, held: HashMap::new(), counter, loss_scale })
    }

    /// The whole config with the tensors that `chunks` need, on `device`, in memory of their own.
    pub fn model_of(whole: &Model, device: &Arc<dyn Device>, chunks: &BTreeMap<u32, Range<usize>>) -> Result<Model> {
        let mut tensors = BTreeMap::new();
        for pieces in chunks.values() {
            for name in cut::tensors_of(whole, pieces) {
                let tensor = whole.get(&name)?;
                let own =
                    if Arc::ptr_eq(tensor.device(), device) { tensor.duplicate() } else { tensor.to_device(device) };
                tensors.insert(name, own?);
            }
        }
        Model::new(whole.config.clone(), tensors, device)
    }

    /// What its chunks read of a micro-batch.
    pub fn reads(&self) -> Reads {
        Reads::of(&self.model.config, self.chunks.values())
    }

    fn pieces(&self, chunk: u32) -> Result<Range<usize>> {
        self.chunks.get(&chunk).cloned().ok_or_else(|| Error::Parameter {
            op: "pipeline",
            parameter: "chunk",
            value: chunk.to_string(),
            allowed: "a chunk of this stage",
        })
    }

    /// Tensors of a chunk's input and of its output.
    pub fn crossings(&self, chunk: u32) -> Result<(usize, usize)> {
        let pieces = self.pieces(chunk)?;
        Ok((crossing(&self.model, pieces.start), crossing(&self.model, pieces.end)))
    }

    /// Runs a chunk. Returns its outputs, or for the last chunk the loss (a scalar sum, to be divided by the step's weight).
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &mut self,
        (chunk, micro): (u32, u32),
        data: &Micro,
        inputs: Vec<Tensor>,
        training: Training,
    ) -> Result<Vec<Tensor>> {
        let taped = self.run((chunk, micro), data, &inputs, training, !training.recompute)?;
        let outputs = taped.outputs.iter().map(|v| v.tensor.clone()).collect();
        let held = if training.recompute { Held::Inputs(inputs) } else { Held::Taped(taped) };
        self.held.insert((chunk, micro), held);
        Ok(outputs)
    }

    fn run(
        &self,
        (chunk, micro): (u32, u32),
        data: &Micro,
        inputs: &[Tensor],
        training: Training,
        recording: bool,
    ) -> Result<Taped> {
        let pieces = self.pieces(chunk)?;
        let end = pieces.end;
        let dropout = trainer::dropout(training.dropout, training.seed, micro);
        let hooks = self.methods.iter().filter_map(|m| m.on_output());
        let pass = if recording { Pass::training(&self.model) } else { Pass::inference(&self.model) };
        let mut pass =
            pass.computing(training.compute).hooks(hooks).dropout(dropout, &self.counter).split_ffn(training.split);
        let inputs: Vec<Var> = inputs.iter().map(|t| pass.tape.leaf(t)).collect();
        let mut states = entering(&inputs);
        let head = pieces::pieces(&self.model.config) - 1;
        let mut loss = None;
        for piece in pieces {
            states = match (piece, states) {
                (0, _) => Some(pass.enter(&data.batch)?),
                (_, None) => return Err(no_input()),
                (p, Some(states)) if p == head => {
                    loss = Some(trainer::loss_of(&mut pass, &states.normed, data, &self.methods)?);
                    Some(states)
                }
                (p, Some(states)) => Some(pass.pass_block(p - 1, states, &data.batch)?),
            };
        }
        let outputs = match (loss, states) {
            (Some(loss), _) => vec![loss],
            (None, Some(states)) => leaving(states, crossing(&self.model, end)),
            (None, None) => Vec::new(),
        };
        let (tape, leaves) = pass.into_leaves();
        Ok(Taped { tape, leaves, inputs, outputs })
    }

    /// A chunk forward alone, for a teacher: the last one ends with the final hidden states.
    pub fn infer(
        model: &Model,
        pieces: Range<usize>,
        data: &Micro,
        inputs: &[Tensor],
        compute: Option<DType>,
    ) -> Result<Vec<Tensor>> {
        let mut pass = Pass::inference(model).computing(compute);
        let mut states = entering(inputs.iter().cloned().map(Var::constant).collect::<Vec<_>>().as_slice());
        let end = pieces.end;
        for piece in pieces {
            states = match (piece, states) {
                (0, _) => Some(pass.enter(&data.batch)?),
                (p, Some(states)) => Some(pass.pass_block(p - 1, states, &data.batch)?),
                (_, None) => return Err(no_input()),
            };
        }
        let outputs = states.map(|s| leaving(s, crossing(model, end))).unwrap_or_default();
        Ok(outputs.into_iter().map(|v| v.tensor).collect())
    }

    fn take(&mut self, (chunk, micro): (u32, u32), data: &Micro, training: Training) -> Result<Taped> {
        match self.held.remove(&(chunk, micro)) {
            Some(Held::Taped(taped)) => Ok(taped),
            Some(Held::Inputs(inputs)) => self.run((chunk, micro), data, &inputs, training, true),
            _ => Err(Error::Shape { op: "pipeline", rule: "forward before backward", got: format!("{chunk}B{micro}") }),
        }
    }

    /// Gradients of the chunk's inputs and parameters; `flowed`: those of its outputs, nothing for the last chunk.
    pub fn backward(
        &mut self,
        at: (u32, u32),
        data: &Micro,
        flowed: Vec<Tensor>,
        training: Training,
    ) -> Result<(Vec<Tensor>, Gradients)> {
        let taped = self.take(at, data, training)?;
        let flowed = self.seeds(&taped, flowed)?;
        let grads = taped.tape.backward(&pairs(&taped.outputs, &flowed))?;
        Ok((of_inputs(&taped.inputs, &grads)?, Gradients { leaves: taped.leaves, grads }))
    }

    /// Gradients of the chunk's inputs; those of its parameters wait for [`Part::backward_weight`].
    pub fn backward_input(
        &mut self,
        at: (u32, u32),
        data: &Micro,
        flowed: Vec<Tensor>,
        training: Training,
    ) -> Result<Vec<Tensor>> {
        let taped = self.take(at, data, training)?;
        let flowed = self.seeds(&taped, flowed)?;
        let inputs: Vec<&Var> = taped.inputs.iter().collect();
        let (grads, deferred) = taped.tape.backward_input(&pairs(&taped.outputs, &flowed), &inputs)?;
        self.held.insert(at, Held::Deferred(deferred, taped.leaves));
        of_inputs(&taped.inputs, &grads)
    }

    pub fn backward_weight(&mut self, at: (u32, u32)) -> Result<Gradients> {
        match self.held.remove(&at) {
            Some(Held::Deferred(deferred, leaves)) => Ok(Gradients { leaves, grads: deferred.backward_weight()? }),
            _ => Err(Error::Shape { op: "pipeline", rule: "input gradients first", got: format!("{}W{}", at.0, at.1) }),
        }
    }

    fn seeds(&self, taped: &Taped, flowed: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if !flowed.is_empty() {
            return Ok(flowed);
        }
        taped.outputs.iter().map(|loss| self.loss_scale.reshape(loss.dims())).collect()
    }
}

/// Tensors that cross a cut in front of `piece`: a head needs no residual, and where the model adds to normalised states it is
/// the normalised states.
pub fn crossing(model: &Model, piece: usize) -> usize {
    let same = matches!(model.config.residual, Residual::Normalised { .. });
    if same || piece + 1 == pieces::pieces(&model.config) { 1 } else { 2 }
}

fn no_input() -> Error {
    Error::Shape { op: "pipeline", rule: "a chunk has inputs", got: "none".into() }
}

/// What a chunk begins with, from the tensors that crossed the cut.
fn entering(inputs: &[Var]) -> Option<States> {
    match inputs {
        [] => None,
        [both] => Some(States { normed: both.clone(), residual: both.clone() }),
        [normed, residual, ..] => Some(States { normed: normed.clone(), residual: residual.clone() }),
    }
}

/// What a chunk ends with, as the tensors that cross the cut.
fn leaving(states: States, count: usize) -> Vec<Var> {
    if count == 1 { vec![states.normed] } else { vec![states.normed, states.residual] }
}

fn pairs<'a>(outputs: &'a [Var], flowed: &'a [Tensor]) -> Vec<(&'a Var, &'a Tensor)> {
    outputs.iter().zip(flowed).collect()
}

fn of_inputs(inputs: &[Var], grads: &Grads) -> Result<Vec<Tensor>> {
    let missing = || Error::NoGradient { op: "pipeline: a chunk's input" };
    inputs.iter().map(|v| grads.of(v).ok_or_else(missing)?).collect()
}
