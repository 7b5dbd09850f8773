//! What linears see on calibration data, block by block: statistics of a block's inputs are taken, the block may be
//! changed, and the next block sees what the changed one gives. Only one block's inputs are held at a time.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::compress::inputs::{self, Seen};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Model};
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
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

fn add(into: &mut Vec<f64>, values: &[f64]) {
    into.resize(values.len(), 0.0);
    into.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// Adds what a linear has seen to its sums.
fn record(model: &Model, statistic: Statistic, seen: &Seen, sums: &mut BlockSums) -> Result<()> {
    let Seen { linear, rows, weight, lengths } = *seen;
    let sums = sums.entry(linear.to_string()).or_default();
    sums.rows += rows.shape().rows();
    match statistic {
        Statistic::Squares => {
            let op = Reduce { function: ReduceFunction::SumSquares, axis: Axis::Rows };
            add(&mut sums.inputs, &dispatch::run_one(&op, &[rows])?.to_f64()?);
        }
        Statistic::Gram => {
            add(&mut sums.inputs, &dispatch::run_one(&Matmul::plain(true, false), &[rows, rows])?.to_f64()?);
        }
        Statistic::MeanActivation => {
            let tokens: usize = lengths.iter().sum();
            if rows.shape().rows() != tokens {
                let got = format!("{} rows of {linear} for {tokens} tokens", rows.shape().rows());
                return Err(Error::Shape { op: "activation", rule: "one row per token: no experts", got });
            }
            add(&mut sums.inputs, &mean_activation(rows, lengths)?);
            let outputs = match model.tensors.get(&format!("{linear}.bias")) {
                Some(bias) => dispatch::run_one(&Matmul::linear_bias(), &[rows, weight, bias])?,
                None => dispatch::run_one(&Matmul::linear(), &[rows, weight])?,
            };
            add(&mut sums.outputs, &mean_activation(&outputs, lengths)?);
        }
    }
    Ok(())
}

/// Of rows that hold tokens only, sequence by sequence.
fn mean_activation(rows: &Tensor, lengths: &[usize]) -> Result<Vec<f64>> {
    let (values, columns) = (rows.to_f64()?, rows.shape().last());
    let (mut sums, mut rest) = (vec![0.0; columns], &values[..]);
    for &length in lengths.iter().filter(|&&length| length > 0) {
        let (sequence, others) = rest.split_at(length * columns);
        let mut means = vec![0.0; columns];
        sequence.chunks(columns).for_each(|row| means.iter_mut().zip(row).for_each(|(m, x)| *m += x.abs()));
        sums.iter_mut().zip(&means).for_each(|(sum, mean)| *sum += (mean / length as f64).powi(2));
        rest = others;
    }
    Ok(sums)
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
    let batches: Vec<Batch> = micros.iter().map(|micro| micro.batch.clone()).collect();
    let sums = RefCell::new(BlockSums::new());
    let mut visit = |seen: &Seen| record(model, statistic, seen, &mut sums.borrow_mut());
    inputs::walk(model, &batches, &mut visit, &mut |_| each(sums.take()))
}
