//! What linears see on calibration data: one pass over the model, or block by block, where a block may be changed and the
//! next one then sees what the changed one gives. No activations are kept but the states between two blocks.

use std::cell::RefCell;

use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Model, OutputHook, Pass, States};
use crate::ops::layout::GatherRows;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::trainer::go_on;

/// What a linear of a block takes in.
pub struct Seen<'s> {
    pub linear: &'s str,
    /// `[tokens, k]`, padding left out.
    pub rows: &'s Tensor,
    /// `[n, k]`; of experts `[E, n, k]`, and then the rows are those of their tokens.
    pub weight: &'s Tensor,
    /// Tokens of each sequence of the batch.
    pub lengths: &'s [usize],
}

pub type Visit<'v> = dyn FnMut(&Seen) -> Result<()> + 'v;

struct Recorder<'v, 'f> {
    lengths: Vec<usize>,
    /// Rows of the flattened batch that hold tokens; `None`: all.
    valid: Option<Tensor>,
    visit: RefCell<&'v mut Visit<'f>>,
}

impl OutputHook for Recorder<'_, '_> {
    fn on_output(&self, _: &mut Pass, linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        // Routers read a block's input too, but are neither pruned nor quantized.
        if !linear.contains(".router.") && linear.starts_with("blocks.") {
            let mut rows = x.tensor.reshape(&[x.tensor.shape().rows(), x.tensor.shape().last()])?;
            // Experts see rows of their own, whose padding is not known any more.
            if let Some(valid) = self.valid.as_ref().filter(|_| x.dims().len() > 2) {
                rows = dispatch::run_one(&GatherRows, &[&rows, valid])?;
            }
            if rows.count() > 0 {
                let seen = Seen { linear, rows: &rows, weight: &weight.tensor, lengths: &self.lengths };
                (self.visit.borrow_mut())(&seen)?;
            }
        }
        Ok((x, weight))
    }
}

impl<'v, 'f> Recorder<'v, 'f> {
    fn new(batch: &Batch, visit: &'v mut Visit<'f>) -> Result<Self> {
        let (b, t) = (batch.tokens.dims()[0], batch.tokens.dims()[1]);
        let lengths: Vec<usize> = match &batch.lengths {
            Some(lengths) => lengths.to_vec::<u32>()?.iter().map(|&length| (length as usize).min(t)).collect(),
            None => vec![t; b],
        };
        let rows = lengths.iter().enumerate().flat_map(|(i, &length)| (0..length).map(move |j| (i * t + j) as u32));
        let rows: Vec<u32> = rows.collect();
        let padded = rows.len() < b * t;
        let valid = padded.then(|| Tensor::from_slice(batch.tokens.device(), &[rows.len()], &rows)).transpose()?;
        Ok(Self { lengths, valid, visit: RefCell::new(visit) })
    }
}

fn needs_data(batches: &[Batch]) -> Result<()> {
    if batches.is_empty() {
        let (parameter, value) = ("calibration_batches", "0".into());
        return Err(Error::Parameter { op: "calibration", parameter, value, allowed: "at least 1" });
    }
    Ok(())
}

/// Shows `visit` the inputs of every linear of the blocks.
pub fn pass(model: &Model, batches: &[Batch], visit: &mut Visit) -> Result<()> {
    needs_data(batches)?;
    for batch in batches {
        go_on()?;
        let recorder = Recorder::new(batch, visit)?;
        Pass::inference(model).hooks([&recorder as &dyn OutputHook]).hidden(batch)?;
    }
    Ok(())
}

/// As [`pass`], block by block: `each(i)` follows when `visit` has seen all inputs of block i, and may change the block's
/// tensors in place.
pub fn walk(
    model: &Model,
    batches: &[Batch],
    visit: &mut Visit,
    each: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<()> {
    needs_data(batches)?;
    let mut entered = Vec::with_capacity(batches.len());
    for batch in batches {
        entered.push(Pass::inference(model).enter(batch)?);
    }
    let copy = |s: &States| States { normed: s.normed.clone(), residual: s.residual.clone() };
    for block in 0..model.config.blocks.len() {
        for (batch, states) in batches.iter().zip(&entered) {
            let recorder = Recorder::new(batch, visit)?;
            Pass::inference(model).hooks([&recorder as &dyn OutputHook]).pass_block(block, copy(states), batch)?;
        }
        each(block)?;
        for (batch, states) in batches.iter().zip(&mut entered) {
            *states = Pass::inference(model).pass_block(block, copy(states), batch)?;
        }
    }
    Ok(())
}
