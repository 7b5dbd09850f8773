//! What holds after every stage, whatever its method: measured on the model as trained and as deployed.

use std::collections::BTreeMap;
use std::path::Path;

use super::corpus::Corpus;
use super::run_folder::State;
use super::stages;
use crate::error::{Error, Result};
use crate::nn::{Batch, Model, Pass};
use crate::train::lifecycle::Invariant;

/// Which weights are zero, by name: what the next stage may not bring back.
#[derive(Default)]
pub struct Pruned(BTreeMap<String, Vec<bool>>);

impl Pruned {
    /// Of the weights that `state` promises sparse.
    pub fn of(model: &Model, state: &State) -> Result<Self> {
        let zeros = |name: &String| -> Result<(String, Vec<bool>)> {
            Ok((name.clone(), model.values(name)?.iter().map(|w| *w == 0.0).collect()))
        };
        Ok(Self(state.sparse.keys().map(zeros).collect::<Result<_>>()?))
    }

    /// That all of them still are zero. Weights under other names are another stage's: experts answer for themselves.
    fn held(&self, model: &Model) -> Result<Option<Invariant>> {
        let (mut pruned, mut back, mut weights) = (0usize, 0usize, 0usize);
        for (name, zeros) in &self.0 {
            let Some(weight) = model.tensors.get(name).filter(|weight| weight.count() == zeros.len()) else { continue };
            weights += 1;
            for (zero, w) in zeros.iter().zip(weight.to_vec::<f32>()?) {
                pruned += usize::from(*zero);
                back += usize::from(*zero && w != 0.0);
            }
        }
        Ok((weights > 0).then(|| Invariant {
            rule: format!("what was pruned before stays zero, in {weights} weights"),
            measured: format!("{back} of {pruned} came back"),
            holds: back == 0,
        }))
    }
}

fn logits(model: &Model, probe: &Batch) -> Result<Vec<f64>> {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(probe)?;
    pass.logits(&hidden)?.tensor.to_f64()
}

/// Sums in another order, as a share of the largest logit.
const ROUNDING: f64 = 1e-4;

/// That the deployed form computes what was trained: compressed weights are the masked ones, and quantized ones answer for
/// themselves.
fn deploys(model: &Model, state: &State, deployed: &Model, probe: &Batch) -> Result<Invariant> {
    if let Some(invariant) = stages::quantize::deployed(model, state, deployed, probe)? {
        return Ok(invariant);
    }
    let (trained, real) = (logits(model, probe)?, logits(deployed, probe)?);
    let scale = trained.iter().fold(f64::MIN_POSITIVE, |most, x| most.max(x.abs()));
    let worst = trained.iter().zip(&real).fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / scale;
    Ok(Invariant {
        rule: "the deployed form gives the logits of the trained one".into(),
        measured: format!("largest difference {worst:.1e} of the largest logit"),
        // Not-a-number holds nothing.
        holds: worst <= ROUNDING && trained.iter().chain(&real).all(|x| x.is_finite()),
    })
}

/// That names, types and shapes of all tensors are those that the config describes.
fn describes(model: &Model, deployed: &Model) -> Result<Invariant> {
    let mut wrong = Vec::new();
    for (form, model) in [("trained", model), ("deployed", deployed)] {
        match model
            .config
            .check(Path::new(form))
            .and_then(|()| model.config.check_tensors(Path::new(form), &model.tensors))
        {
            Ok(()) => {}
            Err(Error::File { position, rule, .. }) => wrong.push(format!("{form}: {position}: {rule}")),
            Err(other) => return Err(other),
        }
    }
    Ok(Invariant {
        rule: "all tensors have the shapes that the model's config describes".into(),
        measured: if wrong.is_empty() {
            format!("{} tensors, {} deployed", model.tensors.len(), deployed.tensors.len())
        } else {
            wrong.join("; ")
        },
        holds: wrong.is_empty(),
    })
}

/// That the student's channels are so many different ones of the teacher's, in their order.
fn channels(model: &Model, state: &State) -> Option<Invariant> {
    (!state.kept.is_empty()).then(|| Invariant {
        rule: "the channels are the teacher's, each once".into(),
        measured: format!("{} names for {} channels", state.kept.len(), model.config.width),
        holds: state.kept.len() == model.config.width && state.kept.windows(2).all(|pair| pair[0] < pair[1]),
    })
}

/// Everything that holds on a model after a stage: its state's promises and what is true of every model.
pub fn checked(
    corpus: &Corpus,
    (model, state): (&Model, &State),
    deployed: &Model,
    before: Option<&Pruned>,
) -> Result<Vec<Invariant>> {
    let probe = stages::probe(corpus, model)?;
    let mut all = stages::invariants(model, state)?;
    if let Some(before) = before {
        all.extend(before.held(model)?);
    }
    all.extend(channels(model, state));
    all.push(describes(model, deployed)?);
    all.push(deploys(model, state, deployed, &probe)?);
    Ok(all)
}
