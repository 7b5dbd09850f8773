//! Parameter-efficient tuning under everything that was promised before.

use std::collections::{BTreeMap, BTreeSet};

use super::{Context, Objective, Outcome, Student, fit, listening, text, trained};
use crate::compress::distillation::TeacherCache;
use crate::compress::freeze::deployable;
use crate::compress::tuning::{Merged, Tuning, lora, parameter_count};
use crate::error::Result;
use crate::nn::Model;
use crate::nn::tuning::{DISTILLED, TUNING};
use crate::recipe::flow::Flow;
use crate::recipe::schema::Tune;
use crate::recipe::source::Draw;
use crate::train::lifecycle::Invariant;

pub fn run(flow: &mut Flow, settings: &Tune, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "tune"];
    flow.stage("tune", &parts, false, |context| tuned(context, settings, student, cache))
}

fn tuned(context: &Context, settings: &Tune, student: &Student, cache: &TeacherCache) -> Result<Outcome> {
    let recipe = context.recipe;
    let (mut model, mut state) = (student.model.duplicate()?, student.state.clone());
    let whole = model.parameter_count();
    if matches!(settings.method, Tuning::Lora(_)) && !settings.merges() {
        // Updates that stay beside the weights learn beside those that will be stored: nothing is rounded or masked after them.
        model = deployable(&model, state.form())?;
        (state.sparse, state.quantized) = Default::default();
    }
    let stored = own_bits(&model)?;
    settings.method.add(&mut model, recipe.seed)?;
    if !settings.merges() {
        // What stays beside a weight need not keep its zeros.
        model.tensors.retain(|name, _| !name.ends_with(".lora.mask"));
    }
    let added = parameter_count(&model);
    let draw = Draw::mixed(context.corpus, &settings.training, recipe.seed ^ 5, recipe.data.max_length)?;
    let objective = match &settings.distil {
        Some(distil) => listening(&model, &state, (draw, distil), cache)?,
        None => Objective { draw, gold: 1.0, soft_on_target: false, teacher: None },
    };
    let summary = fit(context, &mut model, &state, &settings.training, objective)?;
    let now = own_bits(&model)?;
    let names: BTreeSet<&String> = stored.keys().chain(now.keys()).collect();
    let changed: Vec<_> = names.into_iter().filter(|name| stored.get(*name) != now.get(*name)).collect();
    let mut outcome = trained(context.name, model, state, summary);
    outcome.invariants.push(Invariant {
        rule: "what was there before the tuning is as it was".into(),
        measured: match changed.first() {
            None => format!("{} tensors are equal to the bit", stored.len()),
            Some(first) => format!("{} of {} tensors are not, the first {first}", changed.len(), stored.len()),
        },
        holds: changed.is_empty(),
    });
    let share = 100.0 * added as f64 / whole as f64;
    outcome.notes.push(format!("{added} parameters learned, {share:.2} % of the model's {whole}"));
    if settings.merges() {
        let merged = lora::merge(&mut outcome.model)?;
        outcome.invariants.push(Merged::invariant(&merged));
    }
    Ok(outcome)
}

/// Hashes of the tensors that tuning leaves alone.
fn own_bits(model: &Model) -> Result<BTreeMap<String, blake3::Hash>> {
    let own = model.tensors.iter().filter(|(name, _)| ![TUNING, DISTILLED].iter().any(|added| name.starts_with(added)));
    own.map(|(name, tensor)| Ok((name.clone(), blake3::hash(&tensor.to_bytes()?)))).collect()
}
