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
    assert_eq!(state.quantized, want);
    want.sort();
    assert_eq!(
        Vec::from_iter(state.sparse.keys().cloned()),
        want.iter().map(|l| format!("{l}.weight")).collect::<Vec<_>>()
    );
    assert_eq!(state.kept.len(), model.config.width);
    assert!(state.kept.is_sorted() && state.kept.iter().all(|&c| c < 32));
    let last = report.stages.last().unwrap();
    let rule = |part: &str| last.invariants.iter().any(|i| i.name.contains(part));
    for part in ["stays zero", "config describes", "deployed", "channels", "in one expert"] {
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

/// `[quantize]` of a method that does not train, in a recipe with nothing else but the teacher unless told so.
fn quantized(section: &str, more: &[&str]) -> (RunReport, Model, State) {
    let section = format!("quantize={section}");
    let alone = ["structure=false", "sparsify=false", "experts=false", "hybrid=false", &section];
    composed(&tiny(&[&alone[..], more].concat()))
}

#[test]
fn every_method_of_quantization_runs_from_a_recipe_and_keeps_its_promises() {
    let training = "training = { steps = 8, batch = 8, learning_rate = 1e-3 }";
    for section in [
        "{ method = \"dynamic\", levels = \"ternary\" }".to_string(),
        "{ method = \"static\", observer = \"entropy\", smooth = 0.5, calibration_batches = 2 }".into(),
        "{ method = \"data_free\", calibration_batches = 1 }".into(),
        "{ method = \"data_free\", inputs = \"self_generated\", observer = \"percentile\", calibration_batches = 1 }"
            .into(),
        "{ method = \"gptq\", bits = 4, calibration_batches = 2 }".into(),
        "{ method = \"awq\", bits = 3, groups = 16, calibration_batches = 2 }".into(),
        "{ method = \"weight_only\", bits = 8 }".into(),
        format!("{{ bits = 4, learned_steps = true, observer = \"mse\", calibration_batches = 1, {training} }}"),
        format!("{{ bits = 6, observer = \"moving_average\", schedule = {{ start = 8, period = 2 }}, {training} }}"),
        format!("{{ levels = \"binary\", observer = \"none\", groups = 8, {training} }}"),
    ] {
        let (report, model, state) = quantized(&section, &[]);
        let stage = report.stages.last().unwrap();
        assert!(stage.invariants.iter().all(|i| i.ok), "{section}: {:?}", stage.invariants);
        let rule = |part: &str| stage.invariants.iter().any(|i| i.name.contains(part));
        assert!(
            rule("integer 0") && rule("times their steps") && rule("deployed logits") && rule("reloads"),
            "{section}"
        );
        assert!(stage.activated_bytes * 2 < report.stages[0].activated_bytes, "{section}: {}", stage.activated_bytes);
        assert_eq!(state.quantized.len(), 6 * model.config.blocks.len());
        assert_eq!(state.phase, None, "{section}");
    }
}

#[test]
fn learned_steps_survive_experts_and_later_training() {
    let training = "training = { steps = 6, batch = 8, learning_rate = 1e-3 }";
    let section = format!("quantize={{ bits = 4, learned_steps = true, observer = \"min_max\", {training} }}");
    let (report, model, state) = composed(&tiny(&[&section]));
    for stage in &report.stages {
        assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
    }
    assert_eq!(state.format.bits, 4);
    for name in ["experts.in.step", "experts.out.step", "experts.in.input_step", "experts.out.input_step"] {
        assert!(model.tensors.contains_key(&format!("blocks.0.ffn.{name}")), "{name}");
    }
    assert!(!model.tensors.keys().any(|n| n.contains("ffn.in.step") || n.contains("ffn.out.step")));
}

#[test]
fn quantize_sections_that_cannot_hold_are_refused_with_their_key() {
    let training = "training = { steps = 10, batch = 8, learning_rate = 1e-3 }";
    for (section, key) in [
        (
            "{ method = \"static\", training = { steps = 1, batch = 1, learning_rate = 1e-3 } }".to_string(),
            "quantize.training",
        ),
        ("{ method = \"qat\" }".into(), "quantize.training"),
        ("{ method = \"dynamic\", bits = 1 }".into(), "quantize.bits"),
        ("{ method = \"dynamic\", groups = 8 }".into(), "quantize.groups"),
        ("{ method = \"weight_only\", groups = 40 }".into(), "quantize.groups"),
        ("{ method = \"weight_only\", observer = \"token\" }".into(), "quantize.observer"),
        ("{ method = \"static\", observer = \"token\" }".into(), "quantize.observer"),
        ("{ method = \"static\", smooth = 2.0 }".into(), "quantize.smooth"),
        ("{ method = \"static\", calibration_batches = 0 }".into(), "quantize.calibration_batches"),
        ("{ method = \"gptq\", levels = \"binary\" }".into(), "quantize.levels"),
        ("{ method = \"data_free\", inputs = \"data\" }".into(), "quantize.inputs"),
        ("{ method = \"dynamic\", learned_steps = true }".into(), "quantize.learned_steps"),
        (format!("{{ bits = 4, schedule = {{ start = 8, period = 5 }}, {training} }}"), "quantize.schedule.period"),
    ] {
        let sets = ["experts=false".to_string(), format!("quantize={section}")];
        match Recipe::load(None, &sets) {
            Err(espalier::Error::Recipe { key: found, .. }) => assert_eq!(found, key, "{section}"),
            other => panic!("{section}: {other:?}"),
        }
    }
    let awq = "quantize={ method = \"awq\", bits = 4 }".to_string();
    let error = Recipe::load(None, std::slice::from_ref(&awq)).unwrap_err().to_string();
    assert!(error.contains("experts") && error.contains("reorder"), "{error}");
    let order = "order=[\"quantize\", \"structure\", \"sparsify\", \"hybrid\"]".to_string();
    let error = Recipe::load(None, &[awq, "experts=false".into(), order]).unwrap_err().to_string();
    assert!(error.contains("structure before quantize"), "{error}");
}

/// Every way of listening and of tuning, on what pruning, masks and grids have made.
#[test]
fn layers_are_listened_to_and_tuning_keeps_what_was_promised() {
    let training = "training = { steps = 4, batch = 8, learning_rate = 1e-3 }";
    let lora = format!("tune={{ method = {{ kind = \"lora\", rank = 2, linears = [\"attention\"] }}, {training} }}");
    let sets = [
        "structure.layers=1",
        "structure.compare_random=false",
        "structure.distil={ preset = \"tiny_bert\" }",
        "sparsify.distil={ top_k = 8, logits = { loss = \"reverse\", schedule = \"linear_decay\" } }",
        "quantize.distil={ preset = \"mini_lm\", gold = 0.5, logits = { probability_shift = true } }",
        "hybrid=false",
        lora.as_str(),
    ];
    let (report, model, state) = composed(&tiny(&sets));
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["teacher", "structure", "sparsify", "quantize", "experts", "tune"]);
    for stage in &report.stages {
        assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
    }
    let (before, after) = (&report.stages[4], &report.stages[5]);
    assert!(after.invariants.iter().any(|i| i.name.contains("merging 4 low-rank")), "{:?}", after.invariants);
    // To the weight: what was zero is zero, nothing else is.
    assert_eq!(before.sparsity, after.sparsity);
    assert!(!model.tuned() && !state.sparse.is_empty() && !state.quantized.is_empty());
    assert!(!model.tensors.keys().any(|name| name.starts_with("distil.")));
}

/// What cannot be merged stays beside the deployed weights, saved with them.
#[test]
fn adapters_and_prefixes_are_deployed_with_the_model() {
    for method in ["{ kind = \"adapter\", width = 4 }", "{ kind = \"prefix\", length = 3 }"] {
        let tune = format!(
            "tune={{ method = {method}, distil = {{ preset = \"bmcook\" }}, training = {{ steps = 4, batch = 8, learning_rate = 1e-3 }} }}"
        );
        let sets = ["structure=false", "experts=false", "hybrid=false", tune.as_str()];
        let (report, model, _) = composed(&tiny(&sets));
        let last = report.stages.last().unwrap();
        assert!(last.name == "tune" && last.invariants.iter().all(|i| i.ok), "{:?}", last.invariants);
        assert!(last.invariants.iter().any(|i| i.name.contains("reloads")));
        assert!(model.tuned(), "{method}");
        assert!(last.activated_bytes > report.stages[2].activated_bytes, "{method} is counted");
    }
    let last = ["tune={ method = { kind = \"adapter\" }, training = { steps = 1, batch = 8, learning_rate = 1e-3 } }"];
    let order = "order=[\"structure\", \"sparsify\", \"quantize\", \"experts\", \"tune\", \"hybrid\"]";
    let sets: Vec<String> = last.iter().chain([&order]).map(|s| s.to_string()).collect();
    let refused = Recipe::load(None, &sets).unwrap_err().to_string();
    assert!(refused.contains("tune last"), "{refused}");
}

/// As low-rank updates on quantized weights are used: few bits, or zeros, and what is learned beside them.
#[test]
fn updates_that_stay_learn_beside_the_weights_that_are_stored() {
    let tune = "tune={ merge = false, method = { kind = \"lora\", rank = 4, linears = [\"attention\", \"ffn\"] }, \
                training = { steps = 30, batch = 8, learning_rate = 1e-2 } }";
    for sets in [
        &["experts=false", "sparsify=false", "quantize={ method = \"weight_only\", bits = 4, groups = 8 }"][..],
        &["experts=false", "sparsify=false", "quantize.bits=2"],
        &["experts=false", "quantize=false"],
        &["experts=false", "sparsify.pattern=unstructured", "sparsify.sparsity=0.8", "quantize.bits=3"],
        &["experts=false", "sparsify.pattern=unstructured", "sparsify.sparsity=0.8", "quantize=false"],
        // Too few zeros for a bitmap: stored as f32.
        &["experts=false", "sparsify.pattern=unstructured", "sparsify.sparsity=0.05", "quantize=false"],
        &["tune.method.linears=[\"attention\"]", "sparsify=false", "quantize.bits=8"],
        &[
            "tune.method.linears=[\"attention\"]",
            "sparsify=false",
            "quantize={ method = \"weight_only\", bits = 8, groups = 8 }",
        ],
    ] {
        let sets: Vec<&str> =
            ["structure=false", "hybrid=false", tune].into_iter().chain(sets.iter().copied()).collect();
        let (report, model, state) = composed(&tiny(&sets));
        let last = report.stages.last().unwrap();
        assert!(last.name == "tune" && last.invariants.iter().all(|i| i.ok), "{sets:?}: {:?}", last.invariants);
        assert!(last.invariants.iter().any(|i| i.name.contains("as it was")));
        assert!(model.tuned() && state.sparse.is_empty() && state.quantized.is_empty());
        assert!(!model.tensors.keys().any(|name| name.ends_with(".lora.mask")), "{sets:?}");
        // Zeros are told of whatever form they are stored in; few levels make more of them.
        assert!(!last.sparsity.is_empty(), "{sets:?}");
        if let Some(before) = report.stages.iter().find(|s| s.name == "sparsify") {
            let fewer = |((name, before), (own, now)): (&(String, f64), &(String, f64))| name != own || now < before;
            assert_eq!(before.sparsity.len(), last.sparsity.len(), "{sets:?}");
            assert!(!before.sparsity.iter().zip(&last.sparsity).any(fewer), "{:?}", last.sparsity);
        }
    }
}
