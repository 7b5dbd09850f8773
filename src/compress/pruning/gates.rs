//! Trained numbers beside weights: how methods that learn their masks keep them in the model while they train.

use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::model::GATE;
use crate::nn::{Model, Pass};
use crate::ops::binary::MUL;
use crate::ops::unary::Cast;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::train::optimizer::Optimizer;

/// Name of a weight's gates.
pub fn of(weight: &str) -> String {
    format!("{weight}{GATE}")
}

/// The gates of a weight as a variable of a pass.
pub fn variable(pass: &mut Pass, weight: &str) -> Result<Var> {
    pass.parameter(&of(weight))
}

/// w m with the mask in the weight's shape and type.
pub fn masked(tape: &mut Tape, weight: &Var, mask: &Var) -> Result<Var> {
    let mut mask = mask.reshape(weight.dims())?;
    if weight.tensor.dtype() != mask.tensor.dtype() {
        mask = tape.first(Cast { to: weight.tensor.dtype() }, &[&mask])?;
    }
    tape.first(MUL, &[weight, &mask])
}

/// Adds gates to a model that has none yet; a resumed training brings them with its checkpoint.
pub fn add(model: &mut Model, weight: &str, gates: Tensor) {
    model.tensors.entry(of(weight)).or_insert(gates);
}

pub fn remove(model: &mut Model, weights: &[String]) {
    weights.iter().for_each(|weight| drop(model.tensors.remove(&of(weight))));
}

/// Ends the learning of a mask: the optimizer holds it from here on, in the weight's shape.
pub fn freeze(model: &Model, optimizer: &mut Optimizer, weight: &str, mask: &Tensor) -> Result<()> {
    let values = model.get(weight)?;
    let mask = mask.reshape(values.dims())?;
    optimizer.set_mask(weight, &mask)?;
    values.assign(&dispatch::run_one(&MUL, &[values, &mask])?)
}

/// The error of a training that ended before its window did.
pub fn unfinished(end: u64) -> Error {
    let allowed = "an end within the training's steps: masks are learned until then".into();
    Error::Recipe { key: "pruning window".into(), value: format!("its end at step {end}"), allowed }
}
