//! `[structure]` by gates that learn: a training under gates, whose end is the small model.

use std::path::Path;

use super::{Context, Outcome, Student, recover_with, text};
use crate::atomic::write_atomic;
use crate::compress::distillation::TeacherCache;
use crate::compress::gates::{Cofi, Costs, LatencyTable, Layout, Settings};
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::recipe::evaluate::latency;
use crate::recipe::flow::Flow;
use crate::recipe::schema::{GateCost, L0, Structure};

/// So that the training under gates draws other batches than the one after it.
const SALT: u64 = 0x9a7e;

pub fn run(flow: &mut Flow, settings: &Structure, l0: &L0, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "gates"];
    flow.stage("gates", &parts, false, |context| learned(context, settings, l0, student, cache))
}

fn learned(
    context: &Context,
    settings: &Structure,
    l0: &L0,
    student: &Student,
    cache: &TeacherCache,
) -> Result<Outcome> {
    let mut model = student.model.duplicate()?;
    let layout = Layout::of(&model.config)?;
    let costs = match l0.cost {
        GateCost::Parameters => Costs::parameters(&layout),
        GateCost::Latency => Costs::latency(&layout, &table(context, l0, &model)?)?,
    };
    let warm_up = (l0.warm_up * l0.training.steps as f64).round() as u64;
    let learning = Settings {
        target: l0.target,
        initial: l0.initial,
        warm_up,
        rate: l0.rate,
        levels: l0.gated(),
        multiple: l0.multiple_of,
        seed: context.recipe.seed,
    };
    let cofi = Cofi::new(&mut model, learning, costs)?;
    let result = cofi.result();
    let taught = (&l0.training, &settings.distil);
    let mut outcome = recover_with(context, (model, student.state.clone()), taught, cache, SALT, vec![Box::new(cofi)])?;
    let small = result.get().ok_or_else(|| Error::file("gates", "result", "the training ended without one"))?;
    outcome.state = super::structure::followed(&student.state, &outcome.model, &small.keep)?;
    let note = super::structure::note(&small.blocks(), &outcome.model, &student.model);
    outcome.notes.push(format!("{note}; {:.1} % of the cost stays", 100.0 * small.share));
    Ok(outcome)
}

/// The recipe's table, or one measured now and kept in the stage's folder: a resumed stage goes on with it.
fn table(context: &Context, l0: &L0, model: &Model) -> Result<LatencyTable> {
    let own = context.folder.join("latency.json");
    let path = l0.table.as_ref().map_or(own.as_path(), Path::new);
    if l0.table.is_some() || path.exists() {
        return LatencyTable::read(path);
    }
    let settings = &context.recipe.evaluate;
    let batch = settings.latency_batches.first().copied().unwrap_or(1);
    let note = format!("{}, batch {batch}, length {}", model.device().info().name, settings.latency_length);
    let time = |model: &Model| Ok(latency(model, batch, settings.latency_length)?.p50_ms);
    let table = LatencyTable::measure(model, &note, time)?;
    let bytes = serde_json::to_vec_pretty(&table).map_err(|e| Error::file(path, "table", e))?;
    write_atomic(path, &bytes)?;
    Ok(table)
}
