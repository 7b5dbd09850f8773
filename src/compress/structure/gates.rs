//! Importance by gates: a factor of 1 on each head's context or neuron's activation, and the loss's gradient there
//! (Michel et al. 2019: I_h = E |dL/d xi_h| = E |ctx_h . dL/d ctx_h|).

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::judge::Judge;
use super::sites::{Kind, Site};
use crate::dispatch;
use crate::error::Result;
use crate::nn::{Model, OutputHook, Pass, Place};
use crate::ops::binary::MUL;
use crate::ops::layout::Fill;
use crate::shape::Shape;
use crate::tape::Var;
use crate::train::lifecycle::Micro;
use crate::train::trainer::go_on;

/// What gradients of a gate are summed over before their absolute value is taken: scores differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Absolute {
    /// Of each token (Michel et al.).
    #[default]
    Token,
    /// Of each sequence.
    Example,
    /// Of each batch (TextPruner).
    Batch,
}

/// Gates of 1, one for every element so that no token's gradient is added to another's.
struct Ones {
    kind: Kind,
    leaves: RefCell<BTreeMap<Place, Var>>,
}

impl OutputHook for Ones {
    fn on_structure(&self, pass: &mut Pass, place: Place, x: Var) -> Result<Var> {
        let wanted = match place {
            Place::Heads(_) | Place::CrossHeads(_) => self.kind == Kind::Heads,
            Place::Neurons(_) => self.kind == Kind::Neurons,
            _ => false,
        };
        if !wanted {
            return Ok(x);
        }
        let ones = Fill { value: 1.0, dims: Shape::new(x.dims())?, dtype: x.tensor.dtype() };
        let ones = dispatch::one(dispatch::run_on(pass.model.device(), &ones, &[])?, "fill")?;
        let gates = pass.tape.leaf(&ones);
        self.leaves.borrow_mut().insert(place, gates.clone());
        pass.tape.first(MUL, &[&x, &gates])
    }
}

/// Sum over calibration batches of |dL/d xi| of each unit of each site, per token, sequence or batch.
///
/// # Errors
/// Those of the passes.
pub fn scores(
    model: &Model,
    micros: &[Micro],
    sites: &[Site],
    (judge, absolute): (&Judge, Absolute),
) -> Result<Vec<Vec<f64>>> {
    let mut totals: Vec<Vec<f64>> = sites.iter().map(|site| vec![0.0; site.units]).collect();
    let Some(kind) = sites.first().map(|site| site.kind) else {
        return Ok(totals);
    };
    for micro in micros {
        go_on()?;
        let ones = Ones { kind, leaves: RefCell::default() };
        let judged = judge.backward(Pass::training(model).hooks([&ones as &dyn OutputHook]), micro)?;
        for (site, total) in sites.iter().zip(&mut totals) {
            let leaves = ones.leaves.borrow();
            let Some(gates) = leaves.get(&site.place()) else { continue };
            let Some(slopes) = judged.grads.of(gates).transpose()? else { continue };
            let elements = gates.tensor.count();
            let run = match absolute {
                Absolute::Token => 1,
                Absolute::Example => elements / (gates.dims()[0] * site.units * site.size).max(1),
                Absolute::Batch => elements / (site.units * site.size).max(1),
            };
            add(total, &slopes.to_f64()?, site.size, run);
        }
    }
    Ok(totals)
}

/// Adds |sum over `run` tokens and a unit's `size` elements|.
fn add(total: &mut [f64], slopes: &[f64], size: usize, run: usize) {
    let row = total.len() * size;
    for tokens in slopes.chunks((run * row).max(1)) {
        for (unit, total) in total.iter_mut().enumerate() {
            let of_unit = |token: &[f64]| token[unit * size..(unit + 1) * size].iter().sum::<f64>();
            *total += tokens.chunks(row).map(of_unit).sum::<f64>().abs();
        }
    }
}
