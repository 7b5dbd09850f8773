//! Criteria of activations: Wanda's per weight, Minitron's per row or column.

use std::collections::BTreeMap;

use super::calibration::{Statistic, Sums, walk};
use super::pattern::{Pattern, absolute};
use super::pruner::{Criterion, Work};
use super::selection::Scope;
use crate::compress::written;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::ops::binary::MUL;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;

/// |W_ij| ||X_j||_2 (Sun et al. 2023), over calibration tokens. Block by block: the inputs of a block are those that the
/// pruned blocks before it give; with `Scope::Global`, those of the dense model.
pub struct Wanda {
    pub micros: Vec<Micro>,
}

/// Column norms become scores of weights.
fn weighted(weight: &Tensor, sums: &Sums) -> Result<Tensor> {
    let norms: Vec<f32> = sums.inputs.iter().map(|squares| squares.sqrt() as f32).collect();
    let norms = Tensor::from_slice(weight.device(), &[norms.len()], &norms)?;
    dispatch::run_one(&MUL, &[&absolute(weight)?, &norms])
}

/// Scores each weight from the sums of its linear, and prunes block by block where the scope is no wider than a layer.
fn prune_by(
    work: &Work,
    micros: &[Micro],
    statistic: Statistic,
    score: &dyn Fn(&Tensor, &Sums) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let mut found: BTreeMap<usize, Tensor> = BTreeMap::new();
    let missing = |name: &str| Error::file("calibration", name, "is the weight of no linear that calibration passes");
    walk(work.model, micros, statistic, &mut |block| {
        for (index, name) in work.weights.iter().enumerate() {
            let Some(sums) = name.strip_suffix(".weight").and_then(|linear| block.get(linear)) else {
                continue;
            };
            let mut units = score(&work.matrix(name)?, sums)?;
            if work.scope != Scope::Global {
                units = work.select_one(index, &units)?;
                work.apply(name, &units)?;
            }
            found.insert(index, units);
        }
        Ok(())
    })?;
    if let Some(index) = (0..work.weights.len()).find(|index| !found.contains_key(index)) {
        return Err(missing(&work.weights[index]));
    }
    let found: Vec<Tensor> = found.into_values().collect();
    if work.scope == Scope::Global { work.select(&found) } else { Ok(found) }
}

impl Criterion for Wanda {
    fn name(&self) -> &'static str {
        "Wanda pruning"
    }

    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        prune_by(work, &self.micros, Statistic::Squares, &|weight, sums| work.pool(&weighted(weight, sums)?))
    }
}

/// sqrt(sum over sequences of (mean over tokens |a|)^2) (Minitron, Muralidharan et al. 2024) with a the input of a column
/// or the output of a row.
pub struct Activation {
    pub micros: Vec<Micro>,
}

impl Criterion for Activation {
    fn name(&self) -> &'static str {
        "activation-based pruning"
    }

    /// # Errors
    /// `Error::Recipe` for a pattern other than rows and columns: single weights have no activation.
    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        if !matches!(work.pattern, Pattern::Row | Pattern::Column) {
            let (key, value) = ("pattern".into(), written(&work.pattern));
            return Err(Error::Recipe { key, value, allowed: "row or column with activation-based scores".into() });
        }
        let rows = work.pattern == Pattern::Row;
        prune_by(work, &self.micros, Statistic::MeanActivation, &|weight, sums| {
            let squares = if rows { &sums.outputs } else { &sums.inputs };
            let scores: Vec<f32> = squares.iter().map(|sum| sum.sqrt() as f32).collect();
            let grid = if rows { [scores.len(), 1] } else { [1, scores.len()] };
            Tensor::from_slice(weight.device(), &grid, &scores)
        })
    }
}
