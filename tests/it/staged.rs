//! Recipes whose trainings run in stages: what is the same as on one device, where one device is better, and what a killed run
//! goes on from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use espalier::device;
use espalier::pipeline::profile::Profile;
use espalier::recipe::{self, Recipe};

use crate::run_folder::teacher;
use crate::training::{options, tiny};

/// The stages that train students, without clipping: a norm is summed in another order in stages.
fn unclipped(sets: &[&str]) -> Recipe {
    let mut all = vec!["experts=false", "hybrid=false", "structure.distil={ projection = \"learned\" }"];
    all.extend(["teacher.clip=0", "structure.training.clip=0", "sparsify.training.clip=0", "quantize.training.clip=0"]);
    all.extend(sets);
    tiny(&all)
}

fn run(recipe: &Recipe, device: &str, out: &Path) {
    recipe::run(recipe, &device::open(device).unwrap(), &options(out)).unwrap();
}

/// Weights of every stage.
fn weights(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let stages = fs::read_dir(out.join("stages")).unwrap().map(|entry| entry.unwrap());
    let read = |path: PathBuf| fs::read(path.join("model/model.safetensors")).unwrap();
    stages.map(|stage| (stage.file_name().into_string().unwrap(), read(stage.path()))).collect()
}

/// Logged losses of a stage by split and step.
fn losses(out: &Path, stage: &str) -> Vec<(String, u64, f64)> {
    let text = fs::read_to_string(out.join("stages").join(stage).join("metrics.jsonl")).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let losses = events.filter(|e| e["name"] == "loss");
    losses.map(|e| (e["split"].to_string(), e["step"].as_u64().unwrap(), e["value"].as_f64().unwrap())).collect()
}

/// Masks, fake quantization, a teacher's cached states and a learned projection: each goes with its stage.
#[test]
fn students_in_stages_are_those_of_one_device_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    run(&unclipped(&["pipeline={ stages = 1, micro_batches = 3 }"]), "cpu:2", &one);
    run(&unclipped(&["pipeline={ stages = 2, micro_batches = 3 }"]), "cpu:2", &two);
    let (one, two) = (weights(&one), weights(&two));
    assert_eq!(one.keys().collect::<Vec<_>>(), ["quantize", "random", "sparsify", "structure", "teacher"]);
    for (stage, weights) in &one {
        assert!(*weights == two[stage], "{stage}: other weights in stages");
    }
}

/// Blocks with other heads and neurons each, in fewer tokens.
#[test]
fn uneven_students_in_stages_are_those_of_one_device_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        "structure.head_size=16",
        "structure.heads={ keep = 1 }",
        "structure.ffn={ keep = 32 }",
        "structure.vocabulary={ min_count = 20 }",
        "data.max_length=64",
        "data.vocabulary=1500",
        "sparsify=false",
    ];
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    run(&unclipped(&[&sets[..], &["pipeline={ stages = 1, micro_batches = 3 }"]].concat()), "cpu:2", &one);
    run(&unclipped(&[&sets[..], &["pipeline={ stages = 2, micro_batches = 3 }"]].concat()), "cpu:2", &two);
    let (one, two) = (weights(&one), weights(&two));
    assert_eq!(one.keys().collect::<Vec<_>>(), ["quantize", "random", "structure", "teacher", "vocabulary"]);
    for (stage, weights) in &one {
        assert!(*weights == two[stage], "{stage}: other weights in stages");
    }
}

const BESIDE: &str = "pipeline={ stages = 2, micro_batches = 3, replicas = [2, 1], teacher = true }";

#[test]
fn a_teacher_beside_replicas_teaches_what_its_cached_states_do() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    run(&unclipped(&["sparsify=false", "quantize=false"]), "cpu:2", &one);
    run(&unclipped(&["sparsify=false", "quantize=false", BESIDE]), "cpu:2", &two);
    let (want, have) = (losses(&one, "structure"), losses(&two, "structure"));
    assert!(want.len() >= 4 && want.len() == have.len(), "{want:?}, {have:?}");
    for (want, have) in want.iter().zip(&have) {
        assert!((want.0 == have.0) && want.1 == have.1, "{want:?}, {have:?}");
        assert!((want.2 - have.2).abs() <= 1e-3 * want.2, "{have:?} where {want:?} is right");
    }
    let chart = fs::read_to_string(two.join("stages/structure/pipeline-measured.svg")).unwrap();
    assert!(chart.contains("stage 0 replica 1"), "{chart}");
}

/// A training whose stages follow from profiles that are there already.
fn by_profiles(recipe: &Recipe, out: &Path, made: &Path, change: impl Fn(usize) -> f64) {
    let stage = out.join("stages/teacher");
    fs::create_dir_all(&stage).unwrap();
    fs::copy(made.join("recipe.resolved.toml"), out.join("recipe.resolved.toml")).unwrap();
    for devices in [1, 2] {
        let name = format!("pipeline-profile-{devices}.json");
        let mut profile = Profile::read(made.join("stages/teacher").join(&name)).unwrap();
        for piece in &mut profile.pieces {
            let factor = change(devices);
            for cost in [Some(&mut piece.cost), piece.split.as_mut()].into_iter().flatten() {
                cost.forward *= factor;
                cost.backward_input *= factor;
                cost.backward_weight *= factor;
            }
        }
        profile.write(&stage.join(name)).unwrap();
    }
    run(recipe, "cpu:2", out);
}

#[test]
fn auto_is_a_plain_training_where_one_device_is_better() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let auto = teacher(&["teacher.dropout=0.1", "pipeline={ stages = \"auto\", micro_batches = 4 }"]);
    run(&teacher(&["teacher.dropout=0.1"]), "cpu:2", &path("plain"));
    // One thread is no choice at all.
    run(&auto, "cpu:1", &path("one"));
    assert!(weights(&path("plain")) == weights(&path("one")), "one thread: other weights than without stages");
    run(&auto, "cpu:2", &path("measured"));
    by_profiles(&auto, &path("better"), &path("measured"), |devices| if devices == 1 { 1.0 } else { 100.0 });
    assert!(weights(&path("plain")) == weights(&path("better")), "other weights than without stages");
    by_profiles(&auto, &path("worse"), &path("measured"), |devices| if devices == 1 { 100.0 } else { 1.0 });
    assert!(weights(&path("plain")) != weights(&path("worse")), "batches in parts draw another dropout");
    let drawn = |name: &str| path(name).join("stages/teacher/pipeline-measured.svg").exists();
    assert_eq!(["plain", "one", "better", "worse"].map(drawn), [false, false, false, true]);
}

/// Starts a run and kills it in the middle of a stage.
fn killed_in(stage: &str, recipe: &Path, out: &Path) {
    let mut child = command(recipe, out).spawn().unwrap();
    let folder = out.join("stages").join(stage);
    let began = Instant::now();
    // What is being written has another name.
    let whole = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("step-");
    let saved = || fs::read_dir(folder.join("checkpoints")).is_ok_and(|all| all.flatten().any(|entry| whole(&entry)));
    while !saved() {
        assert!(
            child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(120),
            "{stage}: not saved"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!folder.join("stage.json").exists(), "{stage} was finished before it was killed");
}

fn command(recipe: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    let arguments: [&std::ffi::OsStr; 6] =
        ["run".as_ref(), recipe.as_ref(), "--device".as_ref(), "cpu:2".as_ref(), "--out".as_ref(), out.as_ref()];
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn a_killed_run_in_stages_goes_on_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut sets = vec![BESIDE];
    let long: Vec<String> = ["structure", "quantize"]
        .iter()
        .flat_map(|stage| ["steps=60", "checkpoint_every=4"].map(|set| format!("{stage}.training.{set}")))
        .collect();
    sets.extend(long.iter().map(String::as_str));
    let recipe = folder.path().join("recipe.toml");
    fs::write(&recipe, unclipped(&sets).to_toml().unwrap()).unwrap();
    let [whole, broken] = ["whole", "broken"].map(|name| folder.path().join(name));
    assert!(command(&recipe, &whole).status().unwrap().success());
    // With replicas a block's gradients are summed in the order of its stage's, so both runs must be cut in the same places.
    fs::create_dir_all(&broken).unwrap();
    fs::copy(whole.join("recipe.resolved.toml"), broken.join("recipe.resolved.toml")).unwrap();
    for stage in fs::read_dir(whole.join("stages")).unwrap().flatten() {
        let (from, to) = (stage.path(), broken.join("stages").join(stage.file_name()));
        fs::create_dir_all(&to).unwrap();
        let profiles = fs::read_dir(&from).unwrap().flatten().map(|entry| entry.file_name());
        for profile in profiles.filter(|name| name.to_string_lossy().starts_with("pipeline-profile-")) {
            fs::copy(from.join(&profile), to.join(&profile)).unwrap();
        }
    }
    killed_in("structure", &recipe, &broken);
    let first = |out: &Path| {
        let log = fs::read_to_string(out.join("stages/structure/metrics.jsonl")).unwrap();
        log.lines().next().unwrap().to_string()
    };
    let before = first(&broken);
    killed_in("quantize", &recipe, &broken);
    assert!(command(&recipe, &broken).status().unwrap().success());
    // What was logged before stays: the stage went on and was not trained anew.
    assert_eq!(first(&broken), before);
    let (whole, broken) = (weights(&whole), weights(&broken));
    for (stage, weights) in &whole {
        assert!(*weights == broken[stage], "{stage}: other weights after resuming");
    }
}
