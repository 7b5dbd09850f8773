//! 2:4 pruning as an update hook: the mask is computed once from the weights and held on gradient, parameter and
//! moments for the rest of training (BMCook masks gradient and parameter; moments too, or momentum revives zeros).

use std::collections::BTreeMap;

use crate::dispatch;
use crate::error::Result;
use crate::nn::Model;
use crate::ops::binary::{Binary, BinaryFunction};
use crate::ops::sparse24::{Form24, Mask24};
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};
use crate::train::optimizer::Optimizer;

/// Weights that can be pruned 2:4: matrices whose reduction dimension is a multiple of 4.
pub fn prunable(model: &Model, linears: &[String]) -> Vec<String> {
    let weight = |name: &String| {
        let name = format!("{name}.weight");
        model.tensors.get(&name).filter(|t| t.shape().last() % 4 == 0).map(|_| name)
    };
    linears.iter().filter_map(weight).collect()
}

pub struct Sparsity24 {
    /// Names of the weights.
    weights: Vec<String>,
    form: Form24,
    masks: BTreeMap<String, Tensor>,
}

impl Sparsity24 {
    /// Masks of the two largest of each four along the reduction dimension. On weights that already are 2:4 this finds
    /// their own mask again, so a later stage holds what an earlier one made.
    pub fn new(model: &Model, weights: Vec<String>, form: Form24) -> Result<Self> {
        let mut masks = BTreeMap::new();
        for name in &weights {
            let weight = model.get(name)?;
            let shape = weight.shape();
            let rows = weight.reshape(&[shape.rows(), shape.last()])?;
            masks.insert(name.clone(), dispatch::run_one(&Mask24 { form }, &[&rows])?.reshape(weight.dims())?);
        }
        Ok(Self { weights, form, masks })
    }

    /// Share of zeros per weight.
    pub fn report(&self, model: &Model) -> Result<Vec<(String, f64)>> {
        self.weights
            .iter()
            .map(|name| Ok((name.clone(), zeros(model, name)? / model.get(name)?.count() as f64)))
            .collect()
    }
}

fn zeros(model: &Model, name: &str) -> Result<f64> {
    Ok(model.values(name)?.iter().filter(|&&w| w == 0.0).count() as f64)
}

impl Method for Sparsity24 {
    fn name(&self) -> &'static str {
        "2:4 sparsity"
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        // The optimizer holds the mask from here on; a resumed run has it in its state but sets the same one again.
        if step == 0 || optimizer.steps() == step {
            for (name, mask) in std::mem::take(&mut self.masks) {
                optimizer.set_mask(&name, &mask)?;
                let weight = model.get(&name)?;
                let masked = dispatch::run_one(&Binary(BinaryFunction::Mul), &[weight, &mask])?;
                weight.assign(&masked)?;
            }
        }
        Ok(())
    }

    /// Exactly half of every weight is zero, at most two of every four along the reduction dimension are not.
    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let mut worst = 0;
        let (mut zero, mut all) = (0usize, 0usize);
        for name in &self.weights {
            let values = model.values(name)?;
            let kept = |group: &[f32]| group.iter().filter(|&&w| w != 0.0).count();
            worst = worst.max(values.chunks(4).map(kept).max().unwrap_or(0));
            zero += values.iter().filter(|&&w| w == 0.0).count();
            all += values.len();
        }
        let form = if self.form == Form24::OneDimensional { "1-D" } else { "2-D" };
        Ok(vec![
            Invariant {
                rule: format!("2:4 ({form}) along the reduction dimension of {} weights", self.weights.len()),
                measured: format!("at most {worst} of 4 non-zero"),
                holds: worst <= 2,
            },
            Invariant {
                rule: "declared sparsity 50 %".into(),
                measured: format!("{zero} of {all} weights are zero"),
                // A kept weight may itself be zero, never the other way round.
                holds: 2 * zero >= all && zero <= all / 2 + all / 1000,
            },
        ])
    }
}
