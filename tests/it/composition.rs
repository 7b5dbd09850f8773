//! Stages in other orders than the usual one: each keeps what those before it promised.

use espalier::nn::Model;
use espalier::recipe::run_folder::State;
use espalier::recipe::{self, Recipe};
use espalier::report::{self, RunReport};
use espalier::train::store;

use crate::model::cpu;
use crate::training::{options, tiny};

/// What a run reports, the model of its last stage in training form, and what holds on it.
fn composed(recipe: &Recipe) -> (RunReport, Model, State) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let html = recipe::run(recipe, &cpu(), &options(&out)).unwrap();
    let report = report::read(html.with_file_name("report.json")).unwrap();
    let stage = out.join("stages").join(&report.stages.last().unwrap().name);
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(stage.join("stage.json")).unwrap()).unwrap();
    let state = serde_json::from_value(record["record"]["state"].clone()).unwrap();
    (report, store::load_model(&stage.join("model"), &cpu()).unwrap(), state)
}

#[test]
fn a_grid_made_first_is_carried_through_pruning_masks_and_experts() {
    let order = "order=[\"hybrid\", \"quantize\", \"structure\", \"sparsify\", \"experts\"]";
    let (report, model, state) = composed(&tiny(&[order, "structure.layers=1"]));
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(
        names,
        ["teacher", "hybrid-teacher", "hybrid", "quantize", "random", "structure", "sparsify", "experts"]
    );
    for stage in &report.stages {
        assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
    }
    // One block is left: promises go by its new number, and on the FFN by its experts.
    let mut want = ["query", "key", "value", "output"].map(|part| format!("blocks.0.attention.{part}")).to_vec();
    want.extend(["in", "out"].map(|part| format!("blocks.0.ffn.experts.{part}")));
    assert_eq!(state.int8, want);
    want.sort();
    assert_eq!(
        Vec::from_iter(state.sparse.keys().cloned()),
        want.iter().map(|l| format!("{l}.weight")).collect::<Vec<_>>()
    );
    assert_eq!(state.kept.len(), model.config.width);
    assert!(state.kept.is_sorted() && state.kept.iter().all(|&c| c < 32));
    let last = report.stages.last().unwrap();
    let rule = |part: &str| last.invariants.iter().any(|i| i.name.contains(part));
    for part in ["stays zero", "config describes", "deployed form gives", "channels", "in one expert"] {
        assert!(rule(part), "{part}: {:?}", last.invariants);
    }
    assert!(rule("2:4") && rule("integer 0") && rule("k = all") && rule("reloads"), "{:?}", last.invariants);
    assert!(last.sparsity.iter().all(|(_, share)| *share >= 0.5), "{:?}", last.sparsity);
}

#[test]
fn stages_after_hybrid_tuning_follow_from_the_tuned_teacher() {
    let sets = ["structure=false", "quantize=false", "experts=false", "order=[\"hybrid\", \"sparsify\"]"];
    let (report, ..) = composed(&tiny(&sets));
    assert_eq!(report.stages.iter().map(|s| s.name.as_str()).collect::<Vec<_>>()[2..], ["hybrid", "sparsify"]);
    let zeros = |stage: usize| report.stages[stage].sparsity.iter().map(|(_, share)| share).sum::<f64>();
    assert!(zeros(2) < 0.01 && zeros(3) >= 0.5 * report.stages[3].sparsity.len() as f64);
}
