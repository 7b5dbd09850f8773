//! Training that can be stopped, damaged and resumed, and the flow from recipe to report.

use std::path::Path;
use std::sync::Arc;

use espalier::Error;
use espalier::data::batch::{BatchOptions, Batches, Stream};
use espalier::device::{self, Device};
use espalier::nn::{Config, Model};
use espalier::recipe::{self, Options, Recipe};
use espalier::report;
use espalier::train::lifecycle::{Method, Micro};
use espalier::train::store;
use espalier::train::trainer::{Job, Source, Summary, train};

use crate::model::{SIZE, SPECIAL, cpu, examples, micro, settings};

/// Batches by step; fails at one of them, as a run that is killed there would.
struct Steps<'a> {
    device: &'a Arc<dyn Device>,
    fails_at: Option<u64>,
}

impl Source for Steps<'_> {
    fn micro_batches(&self, step: u64) -> espalier::Result<Vec<Micro>> {
        if self.fails_at == Some(step) {
            return Err(Error::file("source", step, "killed here"));
        }
        let stream = Stream { examples: examples(40, 3), ..Stream::default() };
        let mut batches = Batches::new(stream, SPECIAL, BatchOptions { rows: 6, ..BatchOptions::default() })?;
        Ok(vec![micro(self.device, &batches.batch(step))])
    }
}

const STEPS: u64 = 8;

fn run(
    folder: &Path,
    device: &Arc<dyn Device>,
    fails_at: Option<u64>,
    checkpoint_every: u64,
) -> espalier::Result<Vec<u8>> {
    session(folder, device, fails_at, checkpoint_every).map(|(weights, _)| weights)
}

fn session(
    folder: &Path,
    device: &Arc<dyn Device>,
    fails_at: Option<u64>,
    checkpoint_every: u64,
) -> espalier::Result<(Vec<u8>, Summary)> {
    let mut model = Model::init(Config::glm(SIZE, 37), device, 1)?;
    let validate = |_: &Model, _: &[Box<dyn Method>]| Ok(0.0);
    let job = Job {
        stage: "test",
        steps: STEPS,
        settings: settings(5e-3),
        dropout: 0.1,
        seed: 1,
        source: &Steps { device, fails_at },
        validate: &validate,
        validate_every: 3,
        checkpoint_every,
        graphs: 0,
        keep_checkpoints: 2,
        folder,
        progress: false,
        stepper: None,
    };
    let summary = train(&mut model, &job, &mut [])?;
    Ok((store::encode(&model.tensors)?, summary))
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_to_the_bit() {
    let device = cpu();
    let whole = tempfile::tempdir().unwrap();
    let want = run(whole.path(), &device, None, 0).unwrap();
    for killed in 1..STEPS {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path(), &device, Some(killed), 2).unwrap_err();
        let have = run(folder.path(), &device, None, 2).unwrap();
        assert!(want == have, "killed at step {killed}: the final weights differ");
    }
}

#[test]
fn a_resumed_training_reports_all_its_sessions() {
    let device = cpu();
    let whole = session(tempfile::tempdir().unwrap().path(), &device, None, 0).unwrap().1;
    let folder = tempfile::tempdir().unwrap();
    session(folder.path(), &device, Some(5), 2).unwrap_err();
    let resumed = session(folder.path(), &device, None, 2).unwrap().1;
    assert_eq!(whole.curve.len(), STEPS as usize);
    assert_eq!(resumed.curve, whole.curve);
    assert!(resumed.earlier_seconds > 0.0 && resumed.seconds > resumed.earlier_seconds, "{resumed:?}");
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let one = device::open("cpu:1").unwrap();
    let three = device::open("cpu:3").unwrap();
    let folders = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert!(run(folders.0.path(), &one, None, 0).unwrap() == run(folders.1.path(), &three, None, 0).unwrap());
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let device = cpu();
    let want = run(tempfile::tempdir().unwrap().path(), &device, None, 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), &device, Some(7), 2).unwrap_err();
    let checkpoints = folder.path().join("checkpoints");
    let newest = checkpoints.join("step-6");
    let weights = newest.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let error = store::load(&newest).unwrap_err();
    assert!(matches!(&error, Error::File { rule, .. } if rule.contains("hash")), "{error}");
    assert_eq!(store::latest(&checkpoints).unwrap().unwrap().0, 4);
    assert!(want == run(folder.path(), &device, None, 2).unwrap());
    assert!(newest.exists(), "damaged checkpoints are never deleted by a load");
}

#[test]
fn a_checkpoint_is_what_its_manifest_says_not_its_name() {
    let device = cpu();
    let want = run(tempfile::tempdir().unwrap().path(), &device, None, 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), &device, Some(7), 2).unwrap_err();
    let checkpoints = folder.path().join("checkpoints");
    std::fs::rename(checkpoints.join("step-6"), checkpoints.join("step-99999")).unwrap();
    assert!(want == run(folder.path(), &device, None, 2).unwrap(), "the training was taken for finished");
    assert!(checkpoints.join("step-6").exists(), "what was passed over does not push out what was saved");
}

#[test]
fn what_stands_in_a_checkpoints_place_does_not_block_it() {
    let device = cpu();
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = folder.path().join("checkpoints");
    std::fs::create_dir_all(checkpoints.join("step-2")).unwrap();
    std::fs::write(checkpoints.join("step-2").join("torn"), "x").unwrap();
    std::fs::write(checkpoints.join("step-4"), "a plain file").unwrap();
    run(folder.path(), &device, None, 2).unwrap();
    assert_eq!(store::latest(&checkpoints).unwrap().unwrap().0, 6);
}

#[test]
fn truncated_and_tampered_model_files_are_refused_with_their_place() {
    let device = cpu();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let model = Model::init(Config::glm(SIZE, 37), &device, 1).unwrap();
    store::save(&path, &store::model_files(&model).unwrap(), Default::default()).unwrap();
    let again = store::load_model(&path, &device).unwrap();
    assert!(store::encode(&model.tensors).unwrap() == store::encode(&again.tensors).unwrap());
    let weights = store::encode(&model.tensors).unwrap();
    for length in [0, 1, 7, 8, 100, weights.len() / 2, weights.len() - 1] {
        let error = store::decode(Path::new("m"), &weights[..length], &device).unwrap_err();
        assert_eq!(error.exit_code(), 3, "{length}: {error}");
    }
    // A config that disagrees with the tensors.
    let config = Config { width: 24, ..model.config.clone() };
    let files = [("config.json", serde_json::to_vec(&config).unwrap()), ("model.safetensors", weights)];
    store::save(&path, &files, Default::default()).unwrap();
    let error = store::load_model(&path, &device).err().unwrap();
    assert!(error.to_string().contains("is needed"), "{error}");
    // A manifest that points outside its folder.
    let manifest = std::fs::read_to_string(path.join("manifest.json")).unwrap();
    std::fs::write(path.join("manifest.json"), manifest.replace("config.json", "../config.json")).unwrap();
    assert!(store::load(&path).unwrap_err().to_string().contains("bare file name"));
}

/// Every stage, as small as it can be.
pub fn tiny(sets: &[&str]) -> Recipe {
    let mut all: Vec<String> = [
        "name=tiny",
        "data.corpus={ terms = { pairs = 600 } }",
        "data.vocabulary=600",
        "model.layers=2",
        "model.heads=2",
        "model.head_size=16",
        "model.ffn_width=64",
        "structure.layers=2",
        "structure.head_size=12",
        "structure.calibration_batches=2",
        "experts.expert_size=16",
        "experts.router_steps=10",
        "experts.calibration_batches=2",
        "evaluate.sentences=6",
        "evaluate.decoded=3",
        "evaluate.latency_batches=[1]",
        "evaluate.latency_length=16",
    ]
    .map(String::from)
    .to_vec();
    for training in
        ["teacher", "structure.training", "sparsify.training", "quantize.training", "hybrid.teacher", "hybrid.student"]
    {
        all.extend([
            format!("{training}.steps=4"),
            format!("{training}.batch=8"),
            format!("{training}.validate_every=0"),
        ]);
    }
    all.extend(sets.iter().map(|s| s.to_string()));
    Recipe::load(None, &all).unwrap()
}

pub fn options(out: &Path) -> Options {
    Options {
        out: out.to_path_buf(),
        overwrite: false,
        reuse: Vec::new(),
        progress: false,
        command: "test".into(),
        ranks: None,
    }
}

#[test]
fn the_flow_runs_reports_and_resumes() {
    let device = cpu();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let recipe = tiny(&[]);
    let html = recipe::run(&recipe, &device, &options(&out)).unwrap();
    assert!(std::fs::read_to_string(&html).unwrap().contains("<svg"));
    let first = report::read(html.with_file_name("report.json")).unwrap();
    let names: Vec<&str> = first.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(
        names,
        ["teacher", "random", "structure", "sparsify", "quantize", "experts", "hybrid-teacher", "hybrid"]
    );
    for stage in &first.stages {
        assert!(stage.token_accuracy.is_some() && !stage.latency.is_empty(), "{}", stage.name);
        assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
    }
    let last = first.stages.last().unwrap();
    assert!(last.invariants.iter().any(|i| i.name.contains("2:4")));
    assert!(last.invariants.iter().any(|i| i.name.contains("reloads")));
    assert!(last.activated_bytes * 3 < first.stages[0].activated_bytes);
    // A second call takes every stage from the folder.
    recipe::run(&recipe, &device, &options(&out)).unwrap();
    let second = report::read(out.join("report.json")).unwrap();
    assert_eq!(first.stages, second.stages);
    // Another recipe is refused there.
    let other = tiny(&["teacher.steps=5"]);
    let error = recipe::run(&other, &device, &options(&out)).unwrap_err();
    assert!(error.to_string().contains("--overwrite"), "{error}");
    compressed_model_on_wgpu(&out.join("model"), &device);
}

/// The deployed model gives the same logits on WGSL as on the CPU.
fn compressed_model_on_wgpu(path: &Path, cpu: &Arc<dyn Device>) {
    let Some(wgpu) = crate::device::wgpu("compressed model") else {
        return;
    };
    let logits = |device: &Arc<dyn Device>| {
        let model = store::load_model(path, device).unwrap();
        let batch = crate::model::assemble(&examples(4, 5));
        let mut pass = espalier::nn::Pass::inference(&model);
        let hidden = pass.hidden(&recipe::corpus::upload(device, &batch).unwrap()).unwrap();
        pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
    };
    let (want, have) = (logits(cpu), logits(&wgpu));
    let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let worst = want.iter().zip(&have).fold(0.0f64, |m, (w, h)| m.max((w - h).abs()));
    // int8 activations: one rounding that falls to the other side moves a logit by one step of 1/127 of a row.
    assert!(worst < 0.02 * scale, "largest difference {worst} at scale {scale}");
}

#[test]
fn the_tagger_preset_trains() {
    let folder = tempfile::tempdir().unwrap();
    let options = recipe::tagger::TaggerOptions { steps: 200, ..Default::default() };
    let result = recipe::tagger::run(&cpu(), folder.path(), &options).unwrap();
    // 59 labels, and combinations of terms that no training sentence has: 1.31 after 200 steps, 0.91 after 300.
    assert!(result.validation_loss < 1.5, "{result:?}");
    assert!(folder.path().join("model").join("model.safetensors").exists());
}
