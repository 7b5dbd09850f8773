//! Structured pruning, then recovery by distillation.

use super::{Context, Objective, Student, calibration, fit, recover, text, trained};
use crate::compress::distillation::TeacherCache;
use crate::compress::structure::sites::{Kind, Site};
use crate::compress::structure::{self, Heads, Keep, Neurons, Plan, Score, Target, importance, largest, prune};
use crate::error::Result;
use crate::nn::{Config, Model};
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{Selection, Structure};
use crate::recipe::source::Draw;
use crate::rng::Stream;
use crate::train::lifecycle::Invariant;

pub fn run(flow: &mut Flow, settings: &Structure, student: &Student, cache: &TeacherCache) -> Result<Student> {
    // Blocks are numbered anew and weights are cut: masks are held by their own counts.
    flow.forget();
    if let Some(l0) = &settings.l0 {
        let small = super::gates::run(flow, settings, l0, student, cache)?;
        let parts = [&small.fingerprint, &text(settings)?, "structure"];
        return flow.stage("structure", &parts, false, |context| {
            let small = (small.model.duplicate()?, small.state.clone());
            recover(context, small, &settings.training, &settings.distil, cache, 0)
        });
    }
    if settings.compare_random && settings.selection == Selection::Importance {
        at_random(flow, settings, student)?;
    }
    if settings.selection == Selection::Random {
        return at_random(flow, settings, student);
    }
    let parts = [&student.fingerprint, &text(settings)?, "structure"];
    flow.stage("structure", &parts, false, |context| {
        let (pruned, note) = cut(context, settings, student, false)?;
        let mut outcome = recover(context, pruned, &settings.training, &settings.distil, cache, 0)?;
        outcome.notes.push(note);
        outcome.invariants.extend(declared(context, &outcome.model, settings, &student.model));
        Ok(outcome)
    })
}

/// That the model has exactly the structures that the recipe asks for, and nothing of the others.
fn declared(context: &Context, model: &Model, settings: &Structure, before: &Model) -> Vec<Invariant> {
    let (config, size) = (&model.config, context.recipe.model.size());
    let mut all = Vec::new();
    let mut state = |rule: String, measured: String, holds: bool| all.push(Invariant { rule, measured, holds });
    let layers = if config.encoder > 0 { before.config.blocks.len() } else { settings.layers(size) };
    let head_size = settings.head_size(size);
    let sizes: Vec<usize> = config.blocks.iter().map(|block| block.head_size).collect();
    state(
        format!("{layers} blocks with heads of {head_size}, {} channels", settings.width(size)),
        format!("{} blocks with heads of {sizes:?}, {} channels", config.blocks.len(), config.width),
        config.blocks.len() == layers
            && sizes.iter().all(|&size| size == head_size)
            && config.width == settings.width(size),
    );
    let units = |kind| Site::of(config, kind).iter().map(|site| site.units).collect::<Vec<_>>();
    if let Some(heads) = &settings.heads {
        let counts = units(Kind::Heads);
        let even = !heads.even || counts.iter().all(|&n| n == heads.keep);
        state(
            format!("{} heads in each attention on average, at least {}", heads.keep, heads.floor),
            format!("{counts:?}"),
            even && counts.iter().sum::<usize>() == heads.keep * counts.len()
                && counts.iter().all(|&n| n >= heads.floor),
        );
    }
    if let Some(ffn) = &settings.ffn {
        let counts = units(Kind::Neurons);
        let even = !ffn.even || counts.iter().all(|&n| n == ffn.keep);
        let whole = counts.iter().all(|&n| n >= ffn.floor && n.is_multiple_of(ffn.multiple_of));
        state(
            format!("{} neurons in each FFN on average, multiples of {}", ffn.keep, ffn.multiple_of),
            format!("{counts:?}"),
            even && whole && counts.iter().sum::<usize>() == ffn.keep * counts.len(),
        );
    }
    let counted: usize = config.parameters().iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    state(
        "nothing is stored of what went".into(),
        format!("{} parameters of {} before", model.parameter_count(), before.parameter_count()),
        model.parameter_count() == counted && counted <= before.parameter_count(),
    );
    all
}

/// The baseline: the same shapes chosen at random, learning from the labels alone as the papers' does.
fn at_random(flow: &mut Flow, settings: &Structure, student: &Student) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "random"];
    flow.stage("random", &parts, true, |context| {
        let recipe = context.recipe;
        let ((mut model, state), note) = cut(context, settings, student, true)?;
        let draw = Draw::mixed(context.corpus, &settings.training, recipe.seed, recipe.data.max_length)?;
        let objective = Objective { draw, gold: 1.0, soft_on_target: false, teacher: None };
        let summary = fit(context, &mut model, &state, &settings.training, objective)?;
        let mut outcome = trained(context.name, model, state, summary);
        outcome.notes.push(note);
        outcome.invariants.extend(declared(context, &outcome.model, settings, &student.model));
        Ok(outcome)
    })
}

/// The smaller model and what of the promises holds on it, and what stays in words.
fn cut(context: &Context, settings: &Structure, student: &Student, random: bool) -> Result<((Model, State), String)> {
    let mut left = (student.model.clone(), student.state.clone());
    let mut blocks: Vec<usize> = (0..left.0.config.blocks.len()).collect();
    let apply = |blocks: &mut Vec<usize>, left: &mut (Model, State), keep: &Keep| -> Result<()> {
        *blocks = keep.blocks.iter().map(|kept| blocks[kept.index]).collect();
        *left = pruned(left, keep)?;
        Ok(())
    };
    let micros = if random { Vec::new() } else { calibration(context, &left.0, settings.calibration_batches)? };
    let (size, seed) = (context.recipe.model.size(), context.recipe.seed);
    let all = left.0.config.blocks.len();
    let target = Target {
        // The stacks of an encoder-decoder keep their depth.
        layers: if left.0.config.encoder > 0 { all } else { settings.layers(size) },
        head_size: settings.head_size(size),
        width: Some(settings.width(size)),
        scale_ffn: settings.ffn.is_none(),
    };
    let narrower = |config: &Config| {
        config.blocks.iter().any(|block| block.head_size > target.head_size) || settings.width(size) < config.width
    };
    let units = settings.heads.is_some() || settings.ffn.is_some();
    if random && !units && left.0.config.encoder == 0 {
        let keep = structure::at_random(&left.0.config, target, seed)?;
        apply(&mut blocks, &mut left, &keep)?;
        return Ok((left.clone(), note(&blocks, &left.0, &student.model)));
    }
    let kept = if random {
        let mut stream = Stream::new(seed, 0x5eed_1a7e);
        largest(&(0..all).map(|_| stream.uniform()).collect::<Vec<_>>(), target.layers)
    } else {
        settings.layers_method.choose(&left.0, target.layers, &micros)?
    };
    // Without whole heads and neurons to judge in between, depth and width go by the scores of one model.
    if units {
        let keep = Keep::blocks(&left.0.config, &kept);
        apply(&mut blocks, &mut left, &keep)?;
        let keep = structure::shrink(&left.0, &micros, &plan(settings, seed, random))?;
        apply(&mut blocks, &mut left, &keep)?;
    }
    let kept: Vec<usize> = if units { (0..left.0.config.blocks.len()).collect() } else { kept };
    if narrower(&left.0.config) {
        let target = Target { layers: kept.len(), ..target };
        let keep = if random {
            structure::at_random(&left.0.config, target, seed)?
        } else {
            structure::by_importance(&left.0.config, &importance::score(&left.0, &micros)?, &kept, target)?
        };
        apply(&mut blocks, &mut left, &keep)?;
    } else if !units {
        let keep = Keep::blocks(&left.0.config, &kept);
        apply(&mut blocks, &mut left, &keep)?;
    }
    let note = note(&blocks, &left.0, &student.model);
    Ok((left, note))
}

fn plan(settings: &Structure, seed: u64, random: bool) -> Plan {
    let score = |score: Score| if random { Score::Random } else { score };
    Plan {
        heads: settings.heads.map(|heads| Heads { score: score(heads.score), ..heads }),
        ffn: settings.ffn.map(|ffn| Neurons { score: score(ffn.score), ..ffn }),
        rounds: if random { 1 } else { settings.rounds },
        progress: settings.progress,
        order: settings.order,
        objective: settings.loss,
        seed,
    }
}

/// What a change did to blocks, channels, heads and neurons.
pub(super) fn note(blocks: &[usize], model: &Model, before: &Model) -> String {
    let (config, old) = (&model.config, &before.config);
    let mut note = format!("blocks kept {blocks:?}, {} of {} channels", config.width, old.width);
    for (kind, name) in [(Kind::Heads, "heads"), (Kind::Neurons, "neurons")] {
        let units = |config: &Config| Site::of(config, kind).iter().map(|site| site.units).collect::<Vec<_>>();
        let (left, most) = (units(config), units(old).into_iter().max().unwrap_or(0));
        if left.iter().any(|&n| n < most) {
            note += &format!(", {name} {left:?} of {most}");
        }
    }
    note
}

/// The smaller model and what of the promises holds on it: channels count as the teacher's, blocks are numbered anew.
fn pruned((model, state): &(Model, State), keep: &Keep) -> Result<(Model, State)> {
    let pruned = prune(model, keep)?;
    let state = followed(state, &pruned, keep)?;
    Ok((pruned, state))
}

/// What of the promises holds on a model that is pruned so.
pub(super) fn followed(state: &State, pruned: &Model, keep: &Keep) -> Result<State> {
    let renamed = state.renamed(|name| {
        let (block, part) = name.strip_prefix("blocks.")?.split_once('.')?;
        let place = keep.blocks.iter().position(|kept| kept.index.to_string() == block)?;
        Some(format!("blocks.{place}.{part}"))
    });
    let kept = keep.channels.iter().map(|&c| state.kept[c]).collect();
    // Masks go with the weights; their zeros are counted anew.
    let mut sparse = renamed.sparse;
    sparse.retain(|name, _| pruned.tensors.contains_key(name));
    for (name, zeros) in &mut sparse {
        *zeros = pruned.values(name)?.iter().filter(|w| **w == 0.0).count();
    }
    Ok(State { kept, sparse, ..renamed })
}
