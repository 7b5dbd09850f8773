//! `espalier run` and what works on its folder, as a user's shell calls them: output, exit codes, files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use crate::run_folder::teacher;

fn espalier() -> Command {
    Command::new(env!("CARGO_BIN_EXE_espalier"))
}

fn call(arguments: &[&str]) -> Output {
    espalier().args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The call ends with this exit code and says this on standard error.
fn refused(arguments: &[&str], exit: i32, words: &[&str]) {
    let output = call(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {message}");
    assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
}

/// A recipe's file and a finished run of it.
static RUN: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("tiny.toml");
    fs::write(&recipe, teacher(&[]).to_toml().unwrap()).unwrap();
    let out = folder.path().join("run");
    let output = call(&["run", recipe.to_str().unwrap(), "--device", "cpu", "--out", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    (folder, out)
});

fn finished() -> &'static str {
    RUN.1.to_str().unwrap()
}

#[cfg(unix)]
#[test]
fn a_run_survives_a_reader_that_goes_away_and_a_name_that_is_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let recipe = RUN.0.path().join("tiny.toml");
    let out = RUN.0.path().join(std::ffi::OsStr::from_bytes(b"it's \xff"));
    let mut child = espalier()
        .args(["run", recipe.to_str().unwrap(), "--device", "cpu", "--out"])
        .arg(&out)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let report = espalier::report::read(out.join("report.json")).unwrap();
    assert!(report.reproduce.contains(r"it'\''s "), "{}", report.reproduce);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_standard_output_is_an_error() {
    for arguments in [&["kernels", "list"][..], &["completions", "bash"], &["info", finished()]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = espalier().args(arguments).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{arguments:?}");
        assert!(text(&output.stderr).contains("error[E-IO]: standard output"), "{}", text(&output.stderr));
    }
}

#[test]
fn numbers_without_sense_are_usage_errors() {
    for arguments in [
        &["kernels", "bench", "--seconds", "nan"][..],
        &["kernels", "bench", "--seconds", "-1"],
        &["kernels", "bench", "--seconds", "inf"],
        &["kernels", "bench", "--samples", "0"],
        &["kernels", "verify", "--jobs", "1000000000"],
        &["kernels", "verify", "--device", "cpu:1000000", "--op", "relu"],
        &["kernels", "verify", "--device", "reference", "--op", "relu"],
        &["kernels", "list", "--op", "nomatch"],
        &["run", "--seed", "18446744073709551615"],
        &["translate", finished(), "text", "--beams", "1000000000000"],
        &["eval", finished(), "--beams", "0"],
        &["train-tagger", "--steps", "0"],
    ] {
        refused(arguments, 2, &[]);
    }
}

#[test]
fn what_a_command_does_not_use_is_refused() {
    for command in [&["kernels", "list"][..], &["pipeline", "simulate"], &["pipeline", "schedule", "1f1b"], &["doctor"]]
    {
        refused(&[command, &["--device", "nope"]].concat(), 2, &["--device", "no device"]);
    }
    let help = text(&call(&["pipeline", "simulate", "--help"]).stdout);
    assert!(help.contains("cuda:ORDINAL") && help.contains("cuda-host:90") && !help.contains("markdown"), "{help}");
    assert!(text(&call(&["kernels", "list", "--help"]).stdout).contains("--format markdown"));
    assert!(text(&call(&["kernels", "list", "--format", "markdown", "--op", "relu"]).stdout).contains("| relu"));
}

#[test]
fn a_trace_is_shown_in_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("structure").join("pipeline-trace.json");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let path = path.to_str().unwrap();
    assert!(call(&["pipeline", "simulate", "--stages", "2", "--costs", "1,1,1", "--trace", path]).status.success());
    let (svg, folder) = (folder.path().join("step.svg"), folder.path().to_str().unwrap());
    let shown = text(&call(&["pipeline", "trace", folder, "--svg", svg.to_str().unwrap()]).stdout);
    // 8 forwards of 1 s, 8 backwards of 2 s, and a bubble of 3 s.
    assert!(shown.contains("structure: a step took 27") && shown.contains("stage 1"), "{shown}");
    assert!(std::fs::read_to_string(&svg).unwrap().contains("<svg"));
    let json: serde_json::Value =
        serde_json::from_slice(&call(&["pipeline", "trace", path, "--format", "json"]).stdout).unwrap();
    let worker = &json[0]["workers"][1];
    let seconds = |key: &str| worker[key].as_f64().unwrap().round();
    assert_eq!((seconds("forward"), seconds("backward"), seconds("idle")), (8.0, 16.0, 3.0), "{json}");
    refused(&["pipeline", "trace", RUN.0.path().to_str().unwrap()], 3, &["pipeline-trace.json", "[pipeline]"]);
    refused(&["pipeline", "trace", "no such run"], 3, &["no such run"]);
}

#[test]
fn a_dry_run_plans_the_stages_and_refuses_what_the_run_would() {
    let recipe = RUN.0.path().join("tiny.toml");
    let recipe = recipe.to_str().unwrap();
    let dry = |set: &str| call(&["run", recipe, "--dry-run", "--device", "cpu", "--set", set]);
    let plain = text(&dry("seed=3").stdout);
    assert!(plain.contains("teacher") && !plain.contains("pipeline"), "{plain}");
    let spread =
        text(&dry("pipeline={ stages = 2, micro_batches = 4, schedule = \"gpipe\", replicas = [1, 2] }").stdout);
    assert!(spread.contains("2 stages on [1, 2] devices, gpipe") && spread.contains("iB, "), "{spread}");
    let auto = text(&dry("pipeline={}").stdout);
    assert!(auto.contains("as many stages as pay, 1f1b"), "{auto}");
    for (devices, word) in [("[\"cpu:1\"]", "1 devices for 2 workers"), ("[\"cpu:1\", \"wgpu:nosuch\"]", "nosuch")] {
        let output = dry(&format!("pipeline={{ stages = 2, devices = {devices} }}"));
        assert!(!output.status.success() && text(&output.stderr).contains(word), "{}", text(&output.stderr));
    }
    let training = "training = { steps = 1, batch = 1, learning_rate = 1.0 }";
    for (set, key) in [
        ("data.corpus={ folder = { path = \"no such\" } }".to_string(), "data.corpus.folder.path"),
        ("data.corpus={ catalogs = { root = \"no such\" } }".into(), "data.corpus.catalogs.root"),
        (format!("structure={{ vocabulary = {{ text = \"no such\" }}, {training} }}"), "structure.vocabulary.text"),
        (
            format!(
                "structure={{ method = \"l0\", {training}, l0 = {{ target = 0.5, cost = \"latency\", table = \"no such\", {training} }} }}"
            ),
            "structure.l0.table",
        ),
    ] {
        let output = dry(&set);
        let message = text(&output.stderr);
        assert!(output.status.code() == Some(2) && message.contains(key) && message.contains("no such"), "{message}");
    }
    let json: serde_json::Value = serde_json::from_slice(
        &call(&["run", recipe, "--dry-run", "--format", "json", "--set", "pipeline={ stages = 2 }"]).stdout,
    )
    .unwrap();
    assert_eq!(json[0]["pipeline"]["memory"].as_array().unwrap().len(), 2, "{json}");
}

#[test]
fn a_recipe_that_cannot_be_read_is_a_usage_error() {
    let folder = RUN.0.path();
    refused(&["run", "no such recipe.toml"], 2, &["E-USAGE", "no such recipe.toml"]);
    refused(&["run", folder.to_str().unwrap()], 2, &["regular file"]);
    let file = folder.join("latin1.toml");
    fs::write(&file, b"name = \"\xe9\"\n").unwrap();
    refused(&["run", file.to_str().unwrap()], 2, &["UTF-8"]);
    refused(&["run", "--out", file.to_str().unwrap()], 2, &["is no folder"]);
    // The estimate is held against this machine before anything is written.
    let out = folder.join("huge");
    let sets = ["--set", "model.heads=512", "--set", "model.head_size=128", "--set", "model.ffn_width=1048576"];
    let huge = [&["run", "--device", "cpu", "--out", out.to_str().unwrap(), "--set", "structure=false"][..], &sets];
    refused(&huge.concat(), 4, &["E-MEMORY", "teacher"]);
    assert!(!out.exists());
}

#[test]
fn a_folder_without_a_model_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    refused(&["info", path], 3, &["no model and no run"]);
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    refused(&["info", file.to_str().unwrap()], 3, &["is no folder"]);
    // Half a run: the recipe and one finished stage.
    let half = folder.path().join("half");
    fs::create_dir_all(half.join("stages")).unwrap();
    fs::copy(Path::new(finished()).join("recipe.resolved.toml"), half.join("recipe.resolved.toml")).unwrap();
    fs::create_dir_all(half.join("stages/teacher")).unwrap();
    fs::copy(Path::new(finished()).join("stages/teacher/stage.json"), half.join("stages/teacher/stage.json")).unwrap();
    for command in ["info", "eval", "report"] {
        refused(&[command, half.to_str().unwrap()], 3, &["is not finished", "teacher"]);
    }
}

#[test]
fn a_bad_line_costs_its_own_translation_only() {
    use std::io::Write;
    let mut child = espalier()
        .args(["translate", finished(), "--device", "cpu"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = [&b"The file is open."[..], b"", b"\xff\xfe", "word ".repeat(400).as_bytes(), b"The disk is full."]
        .join(&b'\n');
    child.stdin.take().unwrap().write_all(&lines).unwrap();
    let output = child.wait_with_output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(message.contains("line 3") && message.contains("line 4") && message.contains("2 of 5"), "{message}");
    assert_eq!(text(&output.stdout).lines().count(), 5);
    refused(&["translate", finished(), "text", "--from", "zh", "--to", "zh"], 2, &["--to", "two different"]);
    refused(&["translate", finished(), "text", "--to", "fr"], 2, &["en, zh"]);
}

#[test]
fn a_tagger_of_a_run_is_measured_and_translates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let recipe = teacher(&["model.family=tagger"]);
    espalier::recipe::run(&recipe, &crate::model::cpu(), &crate::training::options(&out)).unwrap();
    let out = out.to_str().unwrap();
    let output = call(&["eval", out, "--device", "cpu", "--sentences", "5"]);
    let shown = text(&output.stdout);
    assert!(["F1", "en", "zh", "Batch 1"].iter().all(|word| shown.contains(word)), "{shown}{}", text(&output.stderr));
    refused(&["eval", out, "--data", "pairs.tsv"], 2, &["--data", "tagger"]);
    refused(&["translate", out, "text"], 3, &["head", "tagger", "espalier eval"]);
}

#[test]
fn eval_shows_all_it_measured_and_refuses_nothing_to_measure() {
    let file = RUN.0.path().join("pairs.tsv");
    fs::write(&file, "source\ttarget\n").unwrap();
    refused(&["eval", finished(), "--data", file.to_str().unwrap()], 3, &["rows", "0 pairs"]);
    fs::write(&file, "source\ttarget\nThe file is open.\t文件已打开。\n").unwrap();
    let output = call(&["eval", finished(), "--data", file.to_str().unwrap(), "--device", "cpu"]);
    let shown = text(&output.stdout);
    assert!(["BLEU", "chrF", "Batch 1", "en-zh", "zh-en"].iter().all(|word| shown.contains(word)), "{shown}");
}
