//! What a run may touch in its folder, what it goes on from, and what it refuses.

use std::fs;
use std::path::Path;

use espalier::device::{self, Device};
use espalier::recipe::run_folder::RunFolder;
use espalier::recipe::tagger::{self, TaggerOptions};
use espalier::recipe::{self, Options, Recipe};
use espalier::report::{self, RunReport};
use std::sync::Arc;

use crate::model::cpu;
use crate::training::{options, tiny};

/// A teacher alone.
pub fn teacher(sets: &[&str]) -> Recipe {
    let alone = ["structure=false", "sparsify=false", "quantize=false", "experts=false", "hybrid=false"];
    tiny(&[&alone[..], sets].concat())
}

fn run(recipe: &Recipe, device: &Arc<dyn Device>, out: &Path) -> espalier::Result<RunReport> {
    report::read(recipe::run(recipe, device, &options(out))?.with_file_name("report.json"))
}

fn overwrite(recipe: &Recipe, out: &Path) -> espalier::Result<RunReport> {
    let options = Options { overwrite: true, ..options(out) };
    report::read(recipe::run(recipe, &cpu(), &options)?.with_file_name("report.json"))
}

#[test]
fn overwriting_removes_what_a_run_wrote_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    run(&teacher(&[]), &cpu(), &out).unwrap();
    let own = ["thesis.tex", "data/mine.tsv", "model/notes.txt", "stages/teacher/mine.txt", "stages/tried/mine.txt"];
    for name in own {
        fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
        fs::write(out.join(name), "mine").unwrap();
    }
    fs::write(out.join("stages/teacher/metrics.jsonl"), "old\n").unwrap();
    let report = overwrite(&teacher(&["seed=5"]), &out).unwrap();
    assert!(report.recipe.contains("seed = 5"));
    for name in own {
        assert_eq!(fs::read(out.join(name)).unwrap(), b"mine", "{name}");
    }
    let log = fs::read_to_string(out.join("stages/teacher/metrics.jsonl")).unwrap();
    assert!(!log.contains("old"), "{log}");
}

#[cfg(unix)]
#[test]
fn a_linked_run_folder_stays_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let (real, link) = (folder.path().join("real"), folder.path().join("link"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    run(&teacher(&[]), &cpu(), &link).unwrap();
    overwrite(&teacher(&["seed=5"]), &link).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink() && real.join("report.json").exists());
}

#[test]
fn a_run_goes_on_with_another_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["cpu:1", "cpu:2"].map(|name| device::open(name).unwrap());
    let first = run(&teacher(&[]), &one, folder.path()).unwrap();
    let second = run(&teacher(&[]), &two, folder.path()).unwrap();
    assert_eq!(first.stages, second.stages, "the stage was trained again");
    assert!(second.seconds > first.stages[0].seconds.unwrap(), "the earlier session counts");
    assert_eq!(first.curves, second.curves);
}

#[test]
fn how_a_run_is_carried_out_may_change_between_sessions() {
    let folder = tempfile::tempdir().unwrap();
    let first = run(&teacher(&[]), &cpu(), folder.path()).unwrap();
    let spread = teacher(&["pipeline={ stages = 2, heartbeat = 7.0 }", "teacher.checkpoint_every=3"]);
    let second = run(&spread, &cpu(), folder.path()).unwrap();
    assert_eq!(first.stages, second.stages, "the stage was trained again");
    assert!(second.recipe.contains("heartbeat = 7.0"));
    let error = run(&teacher(&["teacher.steps=31"]), &cpu(), folder.path()).unwrap_err().to_string();
    assert!(error.contains("teacher.steps was ") && error.contains(" and is 31"), "{error}");
}

/// Stages are cut by a measurement, so each of these runs has cuts of its own, and gradients are clipped.
#[test]
fn a_killed_run_goes_on_in_other_stages_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let call = |out: &str, stages: usize, checkpoint_every: u64| {
        let steps = ["teacher.steps=80".to_string(), "teacher.clip=0.1".into(), "teacher.validate_every=0".into()];
        let pipeline = format!("pipeline={{ stages = {stages}, micro_batches = 4 }}");
        let sets = steps.into_iter().chain([pipeline, format!("teacher.checkpoint_every={checkpoint_every}")]);
        let sets: Vec<String> = sets.collect();
        let path = folder.path().join(format!("{out}-{stages}.toml"));
        fs::write(&path, teacher(&sets.iter().map(String::as_str).collect::<Vec<_>>()).to_toml().unwrap()).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_espalier"));
        let out = folder.path().join(out);
        command.args(["run".as_ref(), path.as_os_str(), "--quiet".as_ref(), "--out".as_ref(), out.as_os_str()]);
        command.args(["--device", "cpu"]).stdout(std::process::Stdio::null());
        command
    };
    assert!(call("whole", 2, 0).status().unwrap().success());
    let mut child = call("parted", 2, 10).spawn().unwrap();
    let checkpoints = folder.path().join("parted/stages/teacher/checkpoints");
    while !fs::read_dir(&checkpoints).is_ok_and(|mut found| found.next().is_some()) {
        assert!(child.try_wait().unwrap().is_none(), "it ended without a checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!folder.path().join("parted/model").exists());
    assert!(call("parted", 3, 7).status().unwrap().success());
    let weights = |out: &str| fs::read(folder.path().join(out).join("model/model.safetensors")).unwrap();
    assert!(weights("whole") == weights("parted"), "other weights");
}

/// A folder of pairs as `data collect` writes it, but with no card.
fn write_corpus(folder: &Path, test: &str) {
    let rows = |n: usize, word: &str| {
        let pairs: String = (0..n).map(|i| format!("{word} number {i}\t第{i}个{word}\n")).collect();
        format!("source\ttarget\n{pairs}")
    };
    for (name, text) in [("train", rows(60, "file")), ("validation", rows(8, "disk")), ("test", rows(8, test))] {
        fs::write(folder.join(format!("{name}.tsv")), text).unwrap();
    }
}

#[test]
fn another_test_text_is_not_mixed_into_the_results_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    fs::create_dir(&data).unwrap();
    write_corpus(&data, "window");
    let set = format!("data.corpus={{ folder = {{ path = {:?} }} }}", data.to_str().unwrap());
    let recipe = teacher(&[&set]);
    let first = run(&recipe, &cpu(), &out).unwrap();
    write_corpus(&data, "printer");
    let second = run(&recipe, &cpu(), &out).unwrap();
    assert_ne!(first.stages[0].directions, second.stages[0].directions);
    assert_ne!(first.stages[0].seconds, second.stages[0].seconds, "the stage was not trained again");
}

#[test]
fn text_that_is_too_long_names_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    write_corpus(&data, &"window ".repeat(30));
    let set = format!("data.corpus={{ folder = {{ path = {:?} }} }}", data.to_str().unwrap());
    let out = folder.path().join("run");
    let error = run(&teacher(&[&set]), &cpu(), &out).unwrap_err();
    assert!(error.to_string().contains("data.max_length") && error.to_string().contains("8 test pairs"), "{error}");
    let shortest =
        error.to_string().split("at least ").nth(1).and_then(|rest| rest.split(':').next()?.parse::<usize>().ok());
    assert!(shortest.is_some_and(|tokens| tokens > 64), "{error}");
    // A run that ended before any result is no obstacle to the corrected recipe.
    write_corpus(&data, "window");
    run(&teacher(&[&set, "seed=2"]), &cpu(), &out).unwrap();
}

#[test]
fn one_run_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = teacher(&[]);
    let held = RunFolder::open(folder.path(), &recipe.to_toml().unwrap(), false).unwrap();
    for error in [run(&recipe, &cpu(), folder.path()).unwrap_err(), overwrite(&recipe, folder.path()).unwrap_err()] {
        assert!(error.to_string().contains("in use by another run"), "{error}");
    }
    drop(held);
    run(&recipe, &cpu(), folder.path()).unwrap();
}

#[test]
fn an_edited_record_is_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = teacher(&[]);
    run(&recipe, &cpu(), folder.path()).unwrap();
    let stage = folder.path().join("stages").join("teacher");
    let record = stage.join("stage.json");
    let text = fs::read_to_string(&record).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["record"]["row"]["token_accuracy"] = 0.99.into();
    fs::write(&record, json.to_string()).unwrap();
    let error = run(&recipe, &cpu(), folder.path()).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("was changed") && message.contains("delete") && message.contains("--overwrite"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 3);
    fs::remove_dir_all(&stage).unwrap();
    run(&recipe, &cpu(), folder.path()).unwrap();
}

#[test]
fn a_tagger_writes_over_no_run_and_into_no_foreign_folder() {
    let folder = tempfile::tempdir().unwrap();
    let train = |out: &Path, steps, overwrite| {
        let options = TaggerOptions { steps, sentences: 400, overwrite, ..TaggerOptions::default() };
        tagger::run(&cpu(), out, &options)
    };
    let refused = |out: &Path, overwrite, word: &str| {
        let error = train(out, 2, overwrite).unwrap_err();
        assert!(error.to_string().contains(word) && error.exit_code() == 2, "{error}");
    };
    let out = folder.path().join("run");
    run(&teacher(&[]), &cpu(), &out).unwrap();
    let model = fs::read(out.join("model/model.safetensors")).unwrap();
    refused(&out, false, "holds a run");
    refused(&out, true, "holds a run");
    assert!(fs::read(out.join("model/model.safetensors")).unwrap() == model);
    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), "mine").unwrap();
    refused(&foreign, false, "--overwrite");
    train(&foreign, 2, true).unwrap();
    train(&foreign, 2, false).unwrap();
    let error = train(&foreign, 3, false).unwrap_err();
    assert!(error.to_string().contains("other settings"), "{error}");
    train(&foreign, 3, true).unwrap();
    assert_eq!(fs::read(foreign.join("thesis.tex")).unwrap(), b"mine");
}

#[test]
fn a_single_block_can_be_pruned_in_width() {
    let folder = tempfile::tempdir().unwrap();
    let sets = ["sparsify=false", "quantize=false", "experts=false", "hybrid=false"];
    let recipe = tiny(&[&sets[..], &["model.layers=1", "structure.layers=1"]].concat());
    assert_eq!(run(&recipe, &cpu(), folder.path()).unwrap().stages.len(), 3);
}

#[test]
fn finished_stages_of_another_run_are_taken_where_all_they_follow_from_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second, other] = ["first", "second", "other"].map(|name| folder.path().join(name));
    let begun = run(&teacher(&[]), &cpu(), &first).unwrap();
    let reusing = |out: &Path| Options { reuse: vec![first.clone()], ..options(out) };
    let more = teacher(&["quantize={ method = \"dynamic\" }"]);
    let went_on = report::read(recipe::run(&more, &cpu(), &reusing(&second)).unwrap().with_file_name("report.json"));
    let went_on = went_on.unwrap();
    assert_eq!(went_on.stages.len(), 2);
    assert_eq!(went_on.stages[0], begun.stages[0], "taken as it is, with its times");
    for model in ["model", "deployed"] {
        let weights = |run: &Path| fs::read(run.join("stages/teacher").join(model).join("model.safetensors")).unwrap();
        assert_eq!(weights(&first), weights(&second), "{model}");
    }
    recipe::run(&teacher(&["seed=5"]), &cpu(), &reusing(&other)).unwrap();
    let weights = |run: &Path| fs::read(run.join("stages/teacher/model/model.safetensors")).unwrap();
    assert_ne!(weights(&first), weights(&other));
}

#[test]
fn what_a_killed_process_left_half_written_goes_when_the_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    run(&teacher(&[]), &cpu(), &out).unwrap();
    let torn = [".write-a1.tmp", "stages/teacher/.write-b2.tmp", "model/.espalier-c3/new/model.safetensors"];
    let own = ["notes.tmp", "stages/teacher/write.tmp"];
    for name in torn.iter().chain(&own) {
        fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
        fs::write(out.join(name), "half").unwrap();
    }
    run(&teacher(&[]), &cpu(), &out).unwrap();
    assert!(torn.iter().all(|name| !out.join(name).exists()) && !out.join("model/.espalier-c3").exists());
    assert!(own.iter().all(|name| out.join(name).exists()));
}
