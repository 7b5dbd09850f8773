//! Dense FFNs become routed experts. Nothing is trained but the routers, unless GELU is to become ReLU first.

use super::{Context, Outcome, Student, calibration, recover, text};
use crate::compress::distillation::TeacherCache;
use crate::compress::experts::{self, report};
use crate::compress::fastest::fastest;
use crate::compress::freeze::deployable;
use crate::compress::written;
use crate::error::Result;
use crate::nn::{self, Model};
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{Experts, Slower, Training};
use crate::train::lifecycle::Invariant;

pub fn run(flow: &mut Flow, settings: &Experts, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "experts"];
    flow.stage("experts", &parts, false, |context| {
        let batches: Vec<nn::Batch> =
            calibration(context, &student.model, settings.calibration_batches)?.into_iter().map(|m| m.batch).collect();
        match &settings.training {
            None => {
                let dense = Outcome {
                    model: student.model.duplicate()?,
                    state: student.state.clone(),
                    curves: Vec::new(),
                    notes: Vec::new(),
                    invariants: Vec::new(),
                    earlier_seconds: 0.0,
                };
                split(context, dense, settings, &batches)
            }
            Some(training) => {
                let dense = with_relu(context, student, (settings, training), cache, &batches)?;
                split(context, dense, settings, &batches)
            }
        }
    })
}

/// GELU becomes ReLU, and a training with distillation makes up for it. How sparse activations are is told before and after.
fn with_relu(
    context: &Context,
    student: &Student,
    (settings, training): (&Experts, &Training),
    cache: &TeacherCache,
    batches: &[nn::Batch],
) -> Result<Outcome> {
    let mut model = student.model.duplicate()?;
    let before = report::active_shares(&model, batches)?;
    let blocks = experts::relu::convert(&mut model)?;
    let mut outcome = recover(context, (model, student.state.clone()), training, &settings.distil, cache, 6)?;
    let after = report::active_shares(&outcome.model, batches)?;
    let shares = |shares: &[f64]| shares.iter().map(|s| format!("{:.1}", 100.0 * s)).collect::<Vec<_>>().join(", ");
    outcome.notes.push(format!(
        "{} blocks have ReLU in place of GELU; % of neurons above 0 by block, before the training {}, after {}",
        blocks.len(),
        shares(&before),
        shares(&after)
    ));
    Ok(outcome)
}

/// Splits the FFNs into experts; promises on FFN tensors move to the expert tensors.
fn split(context: &Context, dense: Outcome, settings: &Experts, batches: &[nn::Batch]) -> Result<Outcome> {
    let conversion = settings.settings(context.recipe.seed);
    let (mut model, reports) = experts::convert(&dense.model, conversion, batches)?;
    let mut notes = dense.notes.clone();
    notes.extend(reports.iter().map(experts::BlockReport::note));
    let difference = experts::difference_with_all_experts(&dense.model, &model, &batches[0])?;
    let equal = Invariant {
        rule: "experts(k = all) equals the dense FFN".into(),
        measured: format!("largest relative difference of hidden states {difference:.1e}"),
        holds: difference < 1e-4,
    };
    let partition = partition(&dense.model, &model)?;
    let mut state = dense
        .state
        .renamed(|name| Some(name.replace(".ffn.in", ".ffn.experts.in").replace(".ffn.out", ".ffn.experts.out")));
    if let Some(drop) = settings.drop {
        for dropped in experts::drop::drop_experts(&mut model, drop, batches)? {
            notes.push(format!(
                "block {}: {} of {} experts stay; those that went had {:.1} % of all experts' saliency ({})",
                dropped.block,
                dropped.kept.len(),
                dropped.before,
                100.0 * dropped.lost,
                written(&drop.saliency)
            ));
        }
        recount(&model, &mut state)?;
    }
    if !state.sparse.is_empty() {
        notes.push("expert weights keep their zeros but run on kernels that do not skip them".into());
    }
    let form = state.form();
    let evaluate = &context.recipe.evaluate;
    let rows = evaluate.rows(model.config.max_positions);
    let ffn = model
        .config
        .blocks
        .iter()
        .position(|b| b.experts.is_some())
        .map_or(String::new(), |i| format!("blocks.{i}.ffn"));
    let deployed = |model: &Model, form| -> Result<Model> {
        let stored = deployable(model, form)?;
        if evaluate.fastest { Ok(fastest(&stored, &rows, &ffn, &batches[0])?.0) } else { Ok(stored) }
    };
    let speeds =
        report::speed(&deployed(&dense.model, dense.state.form())?, &deployed(&model, form)?, &rows, &batches[0])?;
    notes.push(report::speed_note(&speeds));
    if settings.slower == Slower::Dense && speeds.iter().all(|s| s.experts > s.dense) {
        notes.push("experts were slower for every measured number of tokens: the FFNs stay dense".into());
        return Ok(Outcome { notes, ..dense });
    }
    let invariants = [dense.invariants, vec![equal, partition]].concat();
    Ok(Outcome { model, state, notes, invariants, ..dense })
}

/// Zeros that are promised of weights whose experts became fewer.
fn recount(model: &Model, state: &mut State) -> Result<()> {
    for (name, zeros) in state.sparse.iter_mut().filter(|(name, _)| name.contains(".ffn.experts.")) {
        *zeros = model.values(name)?.iter().filter(|w| **w == 0.0).count();
    }
    Ok(())
}

/// That every neuron is in exactly one expert: the experts' rows are the dense ones in another order.
fn partition(dense: &Model, split: &Model) -> Result<Invariant> {
    let (mut neurons, mut wrong) = (0, Vec::new());
    for (i, block) in split.config.blocks.iter().enumerate().filter(|(_, block)| block.experts.is_some()) {
        neurons += block.ffn_width;
        let rows = |model: &Model, name: &str| -> Result<Vec<Vec<u32>>> {
            let values = model.values(name)?;
            let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect();
            let mut rows: Vec<Vec<u32>> = values.chunks(split.config.width).map(bits).collect();
            rows.sort_unstable();
            Ok(rows)
        };
        let (before, after) = (format!("blocks.{i}.ffn.in.weight"), format!("blocks.{i}.ffn.experts.in.weight"));
        if rows(dense, &before)? != rows(split, &after)? {
            wrong.push(i);
        }
    }
    Ok(Invariant {
        rule: format!("each of {neurons} neurons is in one expert"),
        measured: if wrong.is_empty() { "all are".into() } else { format!("not in blocks {wrong:?}") },
        holds: wrong.is_empty(),
    })
}
