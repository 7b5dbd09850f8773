//! Structured pruning, then recovery by distillation.

use std::collections::BTreeSet;

use super::{Context, Objective, Student, calibration, fit, recover, text, trained};
use crate::compress::distillation::TeacherCache;
use crate::compress::structure::importance;
use crate::compress::structure::{self, Keep, Target};
use crate::error::Result;
use crate::nn::Model;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{Selection, Structure};
use crate::recipe::source::Draw;
use crate::train::lifecycle::Invariant;

pub fn run(flow: &mut Flow, settings: &Structure, student: &Student, cache: &TeacherCache) -> Result<Student> {
    if settings.compare_random && settings.selection == Selection::Importance {
        at_random(flow, settings, student)?;
    }
    if settings.selection == Selection::Random {
        return at_random(flow, settings, student);
    }
    let parts = [&student.fingerprint, &text(settings)?, "structure"];
    flow.stage("structure", &parts, false, |context| {
        let keep = by_importance(context, &student.model, settings)?;
        let pruned = pruned(student, &keep)?;
        let mut outcome = recover(context, pruned, &settings.training, &settings.distil, cache, 0)?;
        outcome.notes.push(note(&keep, student));
        outcome.invariants.push(declared(&outcome.model, settings));
        Ok(outcome)
    })
}

/// That the model has exactly the structures that the recipe asks for.
fn declared(model: &Model, settings: &Structure) -> Invariant {
    let blocks = &model.config.blocks;
    let sizes: BTreeSet<usize> = blocks.iter().map(|block| block.head_size).collect();
    Invariant {
        rule: format!("{} blocks with heads of {}", settings.layers, settings.head_size),
        measured: format!("{} blocks with heads of {sizes:?}", blocks.len()),
        holds: blocks.len() == settings.layers && sizes == BTreeSet::from([settings.head_size]),
    }
}

/// The baseline: the same shapes chosen at random, learning from the labels alone as the papers' does.
fn at_random(flow: &mut Flow, settings: &Structure, student: &Student) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "random"];
    flow.stage("random", &parts, true, |context| {
        let recipe = context.recipe;
        let keep = structure::at_random(&student.model.config, target(settings), recipe.seed)?;
        let (mut model, state) = pruned(student, &keep)?;
        let draw = Draw::mixed(context.corpus, &settings.training, recipe.seed, recipe.data.max_length)?;
        let objective = Objective { draw, gold: 1.0, soft_on_target: false, teacher: None };
        let summary = fit(context, &mut model, &state, &settings.training, objective)?;
        let mut outcome = trained(context.name, model, state, summary);
        outcome.notes.push(note(&keep, student));
        outcome.invariants.push(declared(&outcome.model, settings));
        Ok(outcome)
    })
}

fn target(settings: &Structure) -> Target {
    Target { layers: settings.layers, head_size: settings.head_size }
}

fn note(keep: &Keep, student: &Student) -> String {
    let kept: Vec<usize> = keep.blocks.iter().map(|b| b.index).collect();
    format!("blocks kept {kept:?}, {} of {} channels", keep.channels.len(), student.model.config.width)
}

/// The smaller model and what of the promises holds on it: channels count as the teacher's, blocks are numbered anew.
fn pruned(student: &Student, keep: &Keep) -> Result<(Model, State)> {
    let model = structure::prune(&student.model, keep)?;
    let state = student.state.renamed(|name| {
        let (block, part) = name.strip_prefix("blocks.")?.split_once('.')?;
        let place = keep.blocks.iter().position(|kept| kept.index.to_string() == block)?;
        Some(format!("blocks.{place}.{part}"))
    });
    let kept = keep.channels.iter().map(|&c| student.state.kept[c]).collect();
    Ok((model, State { kept, ..state }))
}

fn by_importance(context: &Context, model: &Model, settings: &Structure) -> Result<Keep> {
    let micros = calibration(context, model, settings.calibration_batches)?;
    let scores = importance::score(model, &micros)?;
    let blocks = model.config.blocks.len();
    // Judged on training text: the validation text is what the comparison with random pruning is read from.
    // Where all blocks stay there is nothing to judge, and a model of one block cannot be run without it.
    let judge = |i: usize| importance::loss(&structure::without_block(model, i)?, &micros);
    let losses: Vec<f64> =
        if settings.layers < blocks { (0..blocks).map(judge).collect::<Result<_>>()? } else { vec![0.0; blocks] };
    structure::by_importance(&model.config, &scores, &losses, target(settings))
}
