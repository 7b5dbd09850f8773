//! `[sparsify]` of a recipe: every method through the flow, its promise held by the stages after it, and refusals.

use espalier::compress::pruning::Scope;
use espalier::recipe::{self, Recipe};
use espalier::report::{self, RunReport};

use crate::model::cpu;
use crate::training::{options, tiny};

fn run(recipe: &Recipe) -> RunReport {
    let folder = tempfile::tempdir().unwrap();
    let html = recipe::run(recipe, &cpu(), &options(&folder.path().join("run"))).unwrap();
    report::read(html.with_file_name("report.json")).unwrap()
}

/// Share of zeros of the pruned weights after the last stage.
fn sparsity(sets: &[&str]) -> (f64, RunReport) {
    let short = ["structure=false", "hybrid=false", "evaluate.decoded=1", "sparsify.calibration_batches=2"];
    let report = run(&tiny(&[&short, sets].concat()));
    for stage in &report.stages {
        assert!(stage.invariants.iter().all(|i| i.ok), "{sets:?}, {}: {:?}", stage.name, stage.invariants);
    }
    let last = report.stages.last().unwrap();
    let shares: Vec<f64> = last.sparsity.iter().map(|(_, share)| *share).collect();
    (shares.iter().sum::<f64>() / shares.len().max(1) as f64, report)
}

#[test]
fn every_method_runs_from_a_recipe() {
    let alone = ["quantize=false", "experts=false"];
    let grown =
        ["sparsify.pattern=unstructured", "sparsify.sparsity=0.75", "sparsify.every=1", "sparsify.window=[0.25, 0.75]"];
    for sets in [
        &["sparsify.method=random"][..],
        &["sparsify.method=magnitude", "sparsify.mask=two_dimensional"],
        &["sparsify.method=wanda"],
        &["sparsify.method=obs", "sparsify.obs.update=group"],
        &["sparsify.method=sparse_gpt"],
        &["sparsify.method=learned", "sparsify.window=[0, 0.5]"],
    ] {
        let (share, _) = sparsity(&[&alone, sets].concat());
        assert!((share - 0.5).abs() < 0.01, "{sets:?}: {share}");
    }
    for sets in [
        &["sparsify.method=magnitude", "sparsify.curve=linear", "sparsify.cycle_floor=0.1"][..],
        &["sparsify.method=first_order", "sparsify.scope=row"],
        &["sparsify.method=movement", "sparsify.pattern={ block = { rows = 4, columns = 4 } }"],
        &["sparsify.method=wanda", "sparsify.scope=row"],
        &["sparsify.method=obs", "sparsify.scope=layer"],
    ] {
        let (share, _) = sparsity(&[&alone[..], &grown, sets].concat());
        assert!((share - 0.75).abs() < 0.01, "{sets:?}: {share}");
    }
    let rows = ["sparsify.method=activation", "sparsify.pattern=row", "sparsify.sparsity=0.25"];
    assert!((sparsity(&[&alone[..], &rows].concat()).0 - 0.25).abs() < 0.01);
}

fn load(sets: &[&str]) -> espalier::Result<Recipe> {
    Recipe::load(None, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>())
}

#[test]
fn wanda_compares_within_rows_unless_told_otherwise() {
    let scope = |sets: &[&str]| {
        let recipe = load(&[&["sparsify.pattern=unstructured"], sets].concat()).unwrap();
        let again = Recipe::parse(std::path::Path::new("again"), &recipe.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(recipe, again);
        recipe.sparsify.unwrap().settings().scope
    };
    assert_eq!(scope(&["sparsify.method=wanda"]), Scope::Row);
    assert_eq!(scope(&["sparsify.method=wanda", "sparsify.scope=layer"]), Scope::Layer);
    assert_eq!(scope(&["sparsify.method=wanda", "sparsify.pattern=row"]), Scope::Layer);
    for method in ["magnitude", "obs", "sparse_gpt"] {
        assert_eq!(scope(&[&format!("sparsify.method={method}")]), Scope::Layer, "{method}");
    }
}

/// Weights that SparseGPT rounds stay on their grid through every training after it, and are stored by it.
#[test]
fn joint_quantization_stays_on_its_grid() {
    let joint = ["sparsify.method=sparse_gpt", "sparsify.sparse_gpt.bits=4", "quantize=false"];
    let (share, report) = sparsity(&joint);
    assert!((share - 0.5).abs() < 0.1, "{share}");
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["teacher", "sparsify", "experts"]);
    for stage in &report.stages[1..] {
        let held = |rule: &str| stage.invariants.iter().any(|i| i.name.contains(rule));
        assert!(held("stored integers times their steps") && held("declared sparsity"), "{:?}", stage.invariants);
    }
    let [dense, joint_bytes] = [0, 1].map(|i: usize| report.stages[i].activated_bytes);
    assert!(4 * joint_bytes < dense, "four bits are stored as four: {joint_bytes} of {dense} bytes");
    for (sets, key) in [
        (&["quantize.bits=8"][..], "sparsify.sparse_gpt.bits"),
        (&["quantize=false", "sparsify.linears=[\"ffn\"]"], "sparsify.sparse_gpt.bits"),
        (&["quantize=false", "sparsify.window=[0, 0.5]"], "sparsify.window"),
    ] {
        let error = load(&[&joint[..2], sets].concat()).unwrap_err().to_string();
        assert!(error.contains(key), "{sets:?}: {error}");
    }
}

#[test]
fn refusals_name_the_key_in_the_recipes_words() {
    let qat = "quantize.method=gptq";
    for (sets, said) in [
        (&["data.max_length=65"][..], "data.max_length: 65 is not allowed; allowed: 8 to 64 (model.max_positions)"),
        (&["sparsify.method=learned", "sparsify.pattern=unstructured"], "sparsify.pattern: \"unstructured\" is"),
        (&["sparsify.method=sparse_gpt", "sparsify.pattern={ block = { rows = 2, columns = 4 } }"], "{ block = {"),
        (&["sparsify.method=movement", "sparsify.window=[0, 0]"], "sparsify.window: [0.0, 0.0]"),
        (&[qat], "quantize.training: a table is not allowed; allowed: nothing: \"gptq\" does not train (--set"),
        (&[qat, "quantize.training=false", "quantize.levels=binary"], "quantize.levels: \"binary\""),
        (&["quantize.schedule={ start = 9, period = 1 }"], "quantize.schedule.start: 9"),
        (&["hybrid.stream_weights=[0.0, 1.0]"], "hybrid.stream_weights: [0.0, 1.0]"),
        (&["structure.layers=9"], "structure.layers: 9"),
        (&["structure.distil={ gold = -1.0 }"], "structure.distil.gold: -1"),
    ] {
        let error = load(sets).unwrap_err().to_string();
        assert!(error.contains(said), "{sets:?}: {error}");
    }
    let whole = ["structure=false", "model.family=t5"];
    for (sets, key) in [
        (&["sparsify.distil={ preset = \"mini_lm\" }"][..], "sparsify.distil.preset"),
        (&["quantize.distil={ logits = {} }"], "quantize.distil.logits"),
        (&["sparsify.method=wanda"], "sparsify.method: \"wanda\""),
        (&["quantize.smooth=0.5"], "quantize.smooth: 0.5"),
        (&["quantize.observer=mse"], "quantize.observer: \"mse\""),
    ] {
        let error = load(&[&whole, sets].concat()).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("t5"), "{sets:?}: {error}");
    }
    let error = load(&["model.family=t5"]).unwrap_err().to_string();
    assert!(error.contains("structure.layers: 3") && error.contains("t5"), "{error}");
}

/// Of a decoder behind an encoder: its blocks come behind the encoder's, and look at the source too.
#[test]
fn every_linear_of_an_encoder_decoder_can_be_named() {
    let t5 = ["structure=false", "experts=false", "hybrid=false", "model.family=t5"];
    for part in ["cross", "blocks.7.ffn"] {
        let linears = format!("sparsify.linears=[\"{part}\"]");
        let training = "training = { steps = 1, batch = 1, learning_rate = 1.0 }";
        let tune = format!("tune={{ method = {{ kind = \"lora\", linears = [\"{part}\"] }}, {training} }}");
        load(&[&t5[..], &[&linears, &tune]].concat()).unwrap();
        for set in [&linears, &tune] {
            let error = load(&["structure=false", "experts=false", set]).unwrap_err().to_string();
            assert!(error.contains("linears"), "{error}");
        }
    }
}

/// Unstructured zeros of every weight, unevenly spread, are held through quantization and the split into experts.
#[test]
fn later_stages_hold_the_zeros() {
    let sets = [
        "sparsify.method=magnitude",
        "sparsify.pattern=unstructured",
        "sparsify.scope=global",
        "sparsify.sparsity=0.8",
        "sparsify.window=[0, 0]",
    ];
    let (share, report) = sparsity(&sets);
    assert!((share - 0.8).abs() < 0.1, "{share}");
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["teacher", "sparsify", "quantize", "experts"]);
    let held = |stage: &report::model::StageRow| stage.invariants.iter().any(|i| i.name.contains("declared sparsity"));
    assert!(report.stages[1..].iter().all(held));
}

#[test]
fn what_cannot_be_pruned_is_refused_with_its_key() {
    for (sets, key) in [
        (&["sparsify.sparsity=0.6"][..], "sparsify.sparsity"),
        (&["sparsify.pattern=unstructured", "sparsify.sparsity=1.0"], "sparsify.sparsity"),
        (&["sparsify.pattern={ block = { rows = 0, columns = 4 } }"], "sparsify.pattern"),
        (&["sparsify.method=activation"], "sparsify.pattern"),
        (&["sparsify.method=sparse_gpt", "sparsify.pattern=row"], "sparsify.pattern"),
        (&["sparsify.method=sparse_gpt", "sparsify.scope=global"], "sparsify.scope"),
        (&["sparsify.method=sparse_gpt", "sparsify.sparse_gpt.bits=1"], "sparsify.sparse_gpt.bits"),
        (&["sparsify.method=sparse_gpt", "sparsify.sparse_gpt.block=6"], "sparsify.sparse_gpt.block"),
        (&["sparsify.method=learned", "sparsify.pattern=unstructured"], "sparsify.pattern"),
        (&["sparsify.method=learned", "sparsify.window=[0, 0]"], "sparsify.window"),
        (&["sparsify.method=movement", "sparsify.pattern=two_four_2d"], "sparsify.pattern"),
        (&["sparsify.method=movement", "sparsify.movement.rate=0.0"], "sparsify.movement.rate"),
        (&["sparsify.method=first_order", "sparsify.window=[0, 0]"], "sparsify.window"),
        (&["sparsify.pattern=row", "sparsify.scope=row"], "sparsify.pattern"),
        (&["sparsify.method=obs", "sparsify.obs.block=129"], "sparsify.obs.block"),
        (&["sparsify.method=obs", "sparsify.obs.damping=0.0"], "sparsify.obs.damping"),
        (&["sparsify.window=[0.5, 0.2]"], "sparsify.window"),
        (&["sparsify.window=[0.5, 1.2]"], "sparsify.window"),
        (&["sparsify.every=0"], "sparsify.every"),
        (&["sparsify.cycle_floor=2.0"], "sparsify.cycle_floor"),
        (&["sparsify.calibration_batches=0"], "sparsify.calibration_batches"),
        (&["sparsify.initial=0.7"], "sparsify.initial"),
    ] {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        let error = Recipe::load(None, &sets).unwrap_err();
        assert!(error.to_string().contains(key), "{sets:?}: {error}");
        assert_eq!(error.exit_code(), 2);
    }
    let text =
        std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quick.toml")).unwrap();
    let staged = format!("{text}\n[pipeline]\nstages = 2\n");
    let sets = ["sparsify.pattern=unstructured".to_string()];
    let error = Recipe::parse(std::path::Path::new("r.toml"), &staged, &sets).unwrap_err();
    assert!(error.to_string().contains("sparsify.window"), "{error}");
}
