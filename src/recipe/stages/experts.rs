//! Dense FFNs become routed experts; nothing is trained but the routers.

use super::{Context, Outcome, Student, calibration, text};
use crate::compress::experts;
use crate::error::Result;
use crate::nn::{self, Model};
use crate::recipe::flow::Flow;
use crate::recipe::schema::Experts;
use crate::train::lifecycle::Invariant;

pub fn run(flow: &mut Flow, settings: &Experts, student: &Student) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "experts"];
    flow.stage("experts", &parts, false, |context| converted(context, student, settings))
}

/// Splits the FFNs into experts; promises on FFN tensors move to the expert tensors.
fn converted(context: &Context, student: &Student, settings: &Experts) -> Result<Outcome> {
    let batches: Vec<nn::Batch> =
        calibration(context, &student.model, settings.calibration_batches)?.into_iter().map(|m| m.batch).collect();
    let conversion = experts::Settings {
        expert_size: settings.expert_size,
        share: settings.share,
        router_steps: settings.router_steps,
        router_rate: settings.router_rate,
    };
    let (model, reports) = experts::convert(&student.model, conversion, &batches)?;
    let notes = reports.iter().map(|r| {
        format!(
            "block {}: {} of {} experts per token; {:.1} % of positive activation mass captured by the router, {:.1} % by the oracle; {:.0} % of neurons active",
            r.block,
            r.selected,
            r.experts,
            100.0 * r.captured,
            100.0 * r.captured_by_oracle,
            100.0 * r.active
        )
    });
    let mut notes: Vec<String> = notes.collect();
    let difference = experts::difference_with_all_experts(&student.model, &model, &batches[0])?;
    let equal = Invariant {
        rule: "experts(k = all) equals the dense FFN".into(),
        measured: format!("largest relative difference of hidden states {difference:.1e}"),
        holds: difference < 1e-4,
    };
    let partition = partition(&student.model, &model)?;
    let state = student
        .state
        .renamed(|name| Some(name.replace(".ffn.in", ".ffn.experts.in").replace(".ffn.out", ".ffn.experts.out")));
    if !state.sparse.is_empty() {
        notes.push("expert weights keep their 2:4 zeros but run on the dense grouped kernels".into());
    }
    Ok(Outcome { model, state, curves: Vec::new(), notes, invariants: vec![equal, partition], earlier_seconds: 0.0 })
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
