//! Parameter-efficient tuning under everything that was promised before.

use super::{Context, Objective, Outcome, Student, fit, listening, text, trained};
use crate::compress::distillation::TeacherCache;
use crate::compress::tuning::{Merged, lora, parameter_count};
use crate::error::Result;
use crate::recipe::flow::Flow;
use crate::recipe::schema::Tune;
use crate::recipe::source::Draw;

pub fn run(flow: &mut Flow, settings: &Tune, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "tune"];
    flow.stage("tune", &parts, false, |context| tuned(context, settings, student, cache))
}

fn tuned(context: &Context, settings: &Tune, student: &Student, cache: &TeacherCache) -> Result<Outcome> {
    let recipe = context.recipe;
    let mut model = student.model.duplicate()?;
    let whole = model.parameter_count();
    settings.method.add(&mut model, recipe.seed)?;
    let added = parameter_count(&model);
    let draw = Draw::mixed(context.corpus, &settings.training, recipe.seed ^ 5, recipe.data.max_length)?;
    let objective = match &settings.distil {
        Some(distil) => listening(&model, &student.state, (draw, distil), cache)?,
        None => Objective { draw, gold: 1.0, soft_on_target: false, teacher: None },
    };
    let summary = fit(context, &mut model, &student.state, &settings.training, objective)?;
    let mut outcome = trained(context.name, model, student.state.clone(), summary);
    let share = 100.0 * added as f64 / whole as f64;
    outcome.notes.push(format!("{added} parameters learned, {share:.2} % of the model's {whole}"));
    if settings.merges() {
        let merged = lora::merge(&mut outcome.model)?;
        outcome.invariants.push(Merged::invariant(&merged));
    }
    Ok(outcome)
}
