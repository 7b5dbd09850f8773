//! Hybrid-data fine-tuning: the teacher first, then the student under the tuned teacher.

use super::{Context, Listening, Objective, Student, distillation, fit, text, trained};
use crate::compress::distillation::TeacherCache;
use crate::compress::distillation::Weights;
use crate::compress::hybrid::{self, StudentLoss};
use crate::data::mixture;
use crate::error::Result;
use crate::nn::Model;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{Distil, HiddenProjection, Hybrid};
use crate::recipe::source::{Draw, teacher_cache};

/// Gives the tuned teacher and the tuned student.
pub fn run(flow: &mut Flow, settings: &Hybrid, teacher: &Student, student: &Student) -> Result<(Student, Student)> {
    let corpus = flow.corpus;
    let (n_s, n_d) = (corpus.source.examples.len(), corpus.target.examples.len());
    let alpha = match settings.alpha {
        Some(alpha) => alpha,
        None => mixture::alpha(n_s, n_d, settings.stream_weights.0, settings.stream_weights.1)?,
    };
    let settings_text = text(settings)?;
    let parts = [&teacher.fingerprint, &settings_text, "hybrid teacher"];
    let tuned = flow.stage("hybrid-teacher", &parts, true, |context| {
        let mut model = teacher.model.duplicate()?;
        let objective = teacher_objective(context, settings, alpha)?;
        let summary = fit(context, &mut model, &State::default(), &settings.teacher, objective)?;
        let mut outcome = trained(context.name, model, State::default(), summary);
        outcome.notes.push(format!("alpha {alpha:.4} from {n_s} and {n_d} examples (Eq 11)"));
        Ok(outcome)
    })?;
    let cache = teacher_cache(&tuned.model, corpus);
    let parts = [&student.fingerprint, &tuned.fingerprint, &settings_text, "hybrid"];
    let student = flow.stage("hybrid", &parts, false, |context| {
        let mut model = student.model.duplicate()?;
        let objective = student_objective(context, &model, &cache, settings, alpha)?;
        let summary = fit(context, &mut model, &student.state, &settings.student, objective)?;
        Ok(trained(context.name, model, student.state.clone(), summary))
    })?;
    drop(cache);
    Ok((tuned, student))
}

/// Eq 12: both streams, weighted by alpha.
fn teacher_objective(context: &Context, settings: &Hybrid, alpha: f64) -> Result<Objective<'static>> {
    let max_length = context.recipe.data.max_length;
    let draw = Draw::two_streams(context.corpus, &settings.teacher, alpha, context.recipe.seed, max_length)?;
    Ok(Objective { draw, gold: 1.0, soft_on_target: false, teacher: None })
}

/// Eq 13. Corrected: lambda CE + (1 - lambda) T^2 KL(tuned teacher || student), on both streams weighted as in Eq 12, because
/// the target-language stream alone forgets the other direction. Literal: the target-language stream alone, where the
/// teacher's term is constant.
fn student_objective<'a>(
    context: &Context,
    student: &Model,
    teacher: &'a TeacherCache<'a>,
    settings: &Hybrid,
    alpha: f64,
) -> Result<Objective<'a>> {
    let (soft, gold) = hybrid::student_factors(settings.student_loss, settings.lambda);
    let (seed, max_length) = (context.recipe.seed, context.recipe.data.max_length);
    let draw = match settings.student_loss {
        StudentLoss::Corrected => Draw::two_streams(context.corpus, &settings.student, alpha, seed, max_length)?,
        StudentLoss::Literal => Draw::target(context.corpus, &settings.student, seed, max_length)?,
    };
    let distil = Distil {
        weights: Weights { hidden: 0.0, soft: soft as f32, hard: 0.0 },
        temperature: settings.temperature,
        projection: HiddenProjection::Kept,
        ..Distil::default()
    };
    let all: Vec<usize> = (0..teacher.width()).collect();
    let distillation = distillation(student, teacher.teacher(), &all, &distil)?;
    let teacher = (soft > 0.0).then_some((teacher, Listening::LastLayer(Box::new(distillation))));
    Ok(Objective { draw, gold: gold as f32, soft_on_target: true, teacher })
}
