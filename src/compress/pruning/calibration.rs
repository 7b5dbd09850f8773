//! What linears see on calibration data, block by block: statistics of a block's inputs are taken, the block may be
//! changed, and the next block sees what the changed one gives. Only one block's inputs are held at a time.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Model, OutputHook, Pass, States};
use crate::ops::layout::GatherRows;
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;

/// What is summed over the calibration tokens X `[rows, k]` of a linear; padding does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// sum of x_j^2 per column: `[k]`.
    Squares,
    /// X^T X: `[k, k]`.
    Gram,
    /// sum over sequences of (mean over tokens of |x_j|)^2 (Minitron): `[k]`, and the same of the outputs: `[n]`.
    MeanActivation,
}

/// Sums of one linear.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    pub rows: usize,
    pub inputs: Vec<f64>,
    /// With `Statistic::MeanActivation`.
    pub outputs: Vec<f64>,
}

/// Sums of the linears of one block, by name.
pub type BlockSums = BTreeMap<String, Sums>;

struct Recorder<'m> {
    model: &'m Model,
    statistic: Statistic,
    /// Rows of the flattened batch that hold tokens, u32; `None`: all.
    valid: Option<Tensor>,
    /// Valid tokens of each sequence.
    lengths: Vec<usize>,
    sums: RefCell<BlockSums>,
}

fn add(into: &mut Vec<f64>, values: &[f64]) {
    into.resize(values.len(), 0.0);
    into.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

impl Recorder<'_> {
    fn record(&self, linear: &str, x: &Tensor, weight: &Tensor) -> Result<()> {
        let tokens: usize = self.lengths.iter().sum();
        let mut rows = x.reshape(&[x.shape().rows(), x.shape().last()])?;
        if let Some(valid) = self.valid.as_ref().filter(|_| x.dims().len() > 2) {
            rows = dispatch::run_one(&GatherRows, &[&rows, valid])?;
        }
        if rows.count() == 0 {
            return Ok(());
        }
        let mut sums = self.sums.borrow_mut();
        let sums = sums.entry(linear.to_string()).or_default();
        sums.rows += rows.shape().rows();
        match self.statistic {
            Statistic::Squares => {
                let op = Reduce { function: ReduceFunction::SumSquares, axis: Axis::Rows };
                add(&mut sums.inputs, &dispatch::run_one(&op, &[&rows])?.to_f64()?);
            }
            Statistic::Gram => {
                add(&mut sums.inputs, &dispatch::run_one(&Matmul::plain(true, false), &[&rows, &rows])?.to_f64()?);
            }
            Statistic::MeanActivation => {
                if rows.shape().rows() != tokens {
                    let got = format!("{} rows of {linear} for {tokens} tokens", rows.shape().rows());
                    return Err(Error::Shape { op: "activation", rule: "one row per token: no experts", got });
                }
                add(&mut sums.inputs, &self.mean_activation(&rows)?);
                let outputs = match self.model.tensors.get(&format!("{linear}.bias")) {
                    Some(bias) => dispatch::run_one(&Matmul::linear_bias(), &[&rows, weight, bias])?,
                    None => dispatch::run_one(&Matmul::linear(), &[&rows, weight])?,
                };
                add(&mut sums.outputs, &self.mean_activation(&outputs)?);
            }
        }
        Ok(())
    }

    /// Of rows that hold tokens only, sequence by sequence.
    fn mean_activation(&self, rows: &Tensor) -> Result<Vec<f64>> {
        let (values, columns) = (rows.to_f64()?, rows.shape().last());
        let (mut sums, mut rest) = (vec![0.0; columns], &values[..]);
        for &length in self.lengths.iter().filter(|&&length| length > 0) {
            let (sequence, others) = rest.split_at(length * columns);
            let mut means = vec![0.0; columns];
            sequence.chunks(columns).for_each(|row| means.iter_mut().zip(row).for_each(|(m, x)| *m += x.abs()));
            sums.iter_mut().zip(&means).for_each(|(sum, mean)| *sum += (mean / length as f64).powi(2));
            rest = others;
        }
        Ok(sums)
    }
}

impl OutputHook for Recorder<'_> {
    fn on_output(&self, _: &mut Pass, linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        // Routers read a block's input too, but are not pruned.
        if !linear.contains(".router.") {
            self.record(linear, &x.tensor, &weight.tensor)?;
        }
        Ok((x, weight))
    }
}

/// Sequence lengths of a batch `[B, T]`, and where its tokens lie among the B T rows when some rows are padding.
fn tokens(batch: &Batch) -> Result<(Vec<usize>, Option<Tensor>)> {
    let (b, t) = (batch.tokens.dims()[0], batch.tokens.dims()[1]);
    let Some(lengths) = &batch.lengths else {
        return Ok((vec![t; b], None));
    };
    let lengths: Vec<usize> = lengths.to_vec::<u32>()?.iter().map(|&length| (length as usize).min(t)).collect();
    if lengths.iter().all(|&length| length == t) {
        return Ok((lengths, None));
    }
    let rows = lengths.iter().enumerate().flat_map(|(i, &length)| (0..length).map(move |j| (i * t + j) as u32));
    let rows: Vec<u32> = rows.collect();
    let valid = Tensor::from_slice(batch.tokens.device(), &[rows.len()], &rows)?;
    Ok((lengths, Some(valid)))
}

/// Takes `statistic` of every linear of one block after the other; `each` may change the block's weights in place (their
/// tensors are shared with `model`), and later blocks then see its effect.
///
/// # Errors
/// What the passes and `each` give; `Error::Recipe` without calibration data.
pub fn walk(
    model: &Model,
    micros: &[Micro],
    statistic: Statistic,
    each: &mut dyn FnMut(BlockSums) -> Result<()>,
) -> Result<()> {
    if micros.is_empty() {
        let (key, value) = ("calibration_batches".into(), "0".into());
        return Err(Error::Recipe {
            key,
            value,
            allowed: "at least 1 for a criterion that looks at activations".into(),
        });
    }
    let mut entered = Vec::with_capacity(micros.len());
    for micro in micros {
        entered.push(Pass::inference(model).enter(&micro.batch)?);
    }
    for block in 0..model.config.blocks.len() {
        let mut sums = BlockSums::new();
        for (micro, states) in micros.iter().zip(&entered) {
            let (lengths, valid) = tokens(&micro.batch)?;
            let recorder = Recorder { model, statistic, valid, lengths, sums: RefCell::new(sums) };
            let states = States { normed: states.normed.clone(), residual: states.residual.clone() };
            Pass::inference(model).hooks([&recorder as &dyn OutputHook]).pass_block(block, states, &micro.batch)?;
            sums = recorder.sums.into_inner();
        }
        each(sums)?;
        for (micro, states) in micros.iter().zip(&mut entered) {
            let before = States { normed: states.normed.clone(), residual: states.residual.clone() };
            *states = Pass::inference(model).pass_block(block, before, &micro.batch)?;
        }
    }
    Ok(())
}
