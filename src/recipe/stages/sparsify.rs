//! Zeros in weights: made at once and then recovered from, or grown while training.

use std::collections::BTreeMap;

use super::{Context, Outcome, Student, calibration, linears, recover, recover_with, text};
use crate::compress::distillation::TeacherCache;
use crate::compress::pruning::score::{FirstOrder, Magnitude, Random};
use crate::compress::pruning::sparsegpt::{self, SparseGpt};
use crate::compress::pruning::wanda::{Activation, Wanda};
use crate::compress::pruning::{Binariser, Criterion, Learned24, Movement, Pruner, fisher, prunable};
use crate::compress::quantization::STEP;
use crate::compress::written;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{PruningMethod, Sparsify};
use crate::tensor::Tensor;
use crate::train::lifecycle::Method;

pub fn run(flow: &mut Flow, settings: &Sparsify, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "sparsify"];
    flow.stage("sparsify", &parts, false, |context| sparsified(context, settings, student, cache))
}

fn sparsified(context: &Context, settings: &Sparsify, student: &Student, cache: &TeacherCache) -> Result<Outcome> {
    let mut model = student.model.duplicate()?;
    let weights = prunable(&model, &linears(&model.config, &settings.linears), settings.pattern);
    if weights.is_empty() {
        let (key, value) = ("sparsify.pattern".into(), written(&settings.pattern));
        return Err(Error::Recipe { key, value, allowed: "a pattern whose units make up at least one weight".into() });
    }
    let (training, state) = (settings.training(), student.state.clone());
    let mut outcome = if settings.at_once() {
        let mut pruner = pruner(context, settings, &model, &weights)?;
        pruner.once(&model)?;
        let invariants = pruner.invariants(&model)?;
        let mut state = promised(&model, &weights, settings, state)?;
        if let Some(format) = settings.grid() {
            (state.quantized, state.format) = (linears(&model.config, &[]), format);
            put_steps(&mut model, pruner.steps())?;
        }
        let mut outcome = recover(context, (model, state), &training, &settings.distil, cache, 2)?;
        outcome.invariants.extend(invariants);
        outcome
    } else {
        let method: Box<dyn Method> = match settings.method {
            PruningMethod::Movement => {
                let binariser = match settings.movement.penalty {
                    Some(penalty) => Binariser::Threshold { penalty },
                    None => Binariser::TopK,
                };
                let rate = settings.movement.rate;
                Box::new(Movement::new(&mut model, weights.clone(), settings.settings(), binariser, rate)?)
            }
            PruningMethod::Learned => {
                let (sharpness, rate) = (settings.learned.sharpness, settings.learned.rate);
                Box::new(Learned24::new(&mut model, weights.clone(), settings.timing(), sharpness, rate)?)
            }
            _ => Box::new(pruner(context, settings, &model, &weights)?),
        };
        let mut outcome = recover_with(context, (model, state), (&training, &settings.distil), cache, 2, vec![method])?;
        outcome.state = promised(&outcome.model, &weights, settings, outcome.state)?;
        outcome
    };
    outcome.notes.push(shares(&outcome, &weights)?);
    Ok(outcome)
}

/// The grids that weights were rounded to, as every later stage keeps them.
fn put_steps(model: &mut Model, steps: BTreeMap<String, Vec<f64>>) -> Result<()> {
    for (weight, steps) in steps {
        let name = format!("{}.{STEP}", weight.trim_end_matches(".weight"));
        let steps = Tensor::from_f64(model.device(), &[steps.len()], DType::F32, &steps)?;
        model.tensors.insert(name, steps);
    }
    Ok(())
}

/// The zeros as they are now become a promise.
fn promised(model: &Model, weights: &[String], settings: &Sparsify, state: State) -> Result<State> {
    let count = |name: &String| Ok((name.clone(), model.values(name)?.iter().filter(|w| **w == 0.0).count()));
    let sparse = weights.iter().map(count).collect::<Result<_>>()?;
    Ok(State { sparse, pattern: settings.pattern, ..state })
}

/// How sparse the weights are: with global scope they differ.
fn shares(outcome: &Outcome, weights: &[String]) -> Result<String> {
    let (mut least, mut most, mut zeros, mut all) = ((1.0, ""), (0.0, ""), 0, 0);
    for name in weights {
        let (gone, count) = (outcome.state.sparse.get(name).copied().unwrap_or(0), outcome.model.get(name)?.count());
        let share = gone as f64 / count.max(1) as f64;
        (zeros, all) = (zeros + gone, all + count);
        if share <= least.0 {
            least = (share, name);
        }
        if share >= most.0 {
            most = (share, name);
        }
    }
    let percent = 100.0 * zeros as f64 / all.max(1) as f64;
    let ((least, sparest), (most, densest)) = (least, most);
    let (least, most) = (100.0 * least, 100.0 * most);
    Ok(format!(
        "{percent:.1} % of {} weights are zero, from {least:.1} % of {sparest} to {most:.1} % of {densest}",
        weights.len()
    ))
}

fn pruner(context: &Context, settings: &Sparsify, model: &Model, weights: &[String]) -> Result<Pruner> {
    let micros = || calibration(context, model, settings.calibration_batches);
    let criterion: Box<dyn Criterion> = match settings.method {
        PruningMethod::Random => Box::new(Random { seed: context.recipe.seed }),
        PruningMethod::FirstOrder => Box::new(FirstOrder::new(settings.first_order.momentum)),
        PruningMethod::Wanda => Box::new(Wanda { micros: micros()? }),
        PruningMethod::Activation => Box::new(Activation { micros: micros()? }),
        PruningMethod::Obs => {
            let own = settings.obs;
            let (block, damping) = (own.block, own.damping);
            let settings = fisher::Settings { block, damping, update: own.update, recomputations: own.recomputations };
            Box::new(fisher::SecondOrder { settings, micros: micros()? })
        }
        PruningMethod::SparseGpt => {
            let own = settings.sparse_gpt;
            let settings = sparsegpt::Settings { damping: own.damping, block: own.block, bits: own.bits };
            Box::new(SparseGpt::new(settings, micros()?))
        }
        // Learned masks are methods of their own.
        PruningMethod::Magnitude | PruningMethod::Movement | PruningMethod::Learned => Box::new(Magnitude),
    };
    Pruner::new(model, weights.to_vec(), settings.settings(), criterion)
}
