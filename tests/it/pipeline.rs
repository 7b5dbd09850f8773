//! `espalier pipeline` as a user's shell calls it: output, files, exit codes.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use espalier::pipeline::profile::{PieceProfile, Profile};
use espalier::pipeline::{ChunkCost, Kind, Link, Schedule, csv};

fn call(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_espalier")).arg("pipeline").args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

fn good(arguments: &[&str]) -> String {
    let (exit, out, message) = call(arguments);
    assert_eq!(exit, 0, "{arguments:?}: {message}");
    out
}

fn json(arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(&good(&[arguments, &["--format", "json"]].concat())).unwrap()
}

fn refused(arguments: &[&str], exit: i32, words: &[&str]) {
    let (code, _, message) = call(arguments);
    assert_eq!(code, exit, "{arguments:?}: {message}");
    assert!(words.iter().all(|word| message.contains(word)) && !message.contains("panicked"), "{message}");
}

/// Eight blocks and a head as heavy as four of them, on links that cost something.
fn profile(folder: &Path) -> String {
    let piece = |name: String, forward: f64| {
        let (activation_bytes, output_bytes) = (32e6, 2e6);
        let cost =
            ChunkCost { forward, backward_input: forward, backward_weight: forward, activation_bytes, output_bytes };
        PieceProfile { name, cost, split: None, parameter_bytes: 100e6 }
    };
    let mut pieces: Vec<PieceProfile> = (0..8).map(|i| piece(format!("block {i}"), 0.002)).collect();
    pieces.push(piece("head".into(), 0.008));
    let link = Link { latency: 1e-5, bytes_per_second: 1e10, handling: 0.0 };
    let (model, device) = ("small".to_string(), "test".to_string());
    let profile = Profile { model, device, rows: 4, columns: 128, pieces, link, update_per_byte: 1e-11 };
    let path = folder.join("profile.json");
    fs::write(&path, serde_json::to_string(&profile).unwrap()).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn a_plan_says_what_it_costs_and_whether_one_device_is_better() {
    let folder = tempfile::tempdir().unwrap();
    let file = profile(folder.path());
    let text = good(&["plan", "--profile", &file, "--devices", "2"]);
    for part in ["small on test, 8 micro-batches", "DAPPLE: L =", "T_update", "1f1b", "is better"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let found = json(&["plan", "--profile", &file, "--machines", "2x2", "--memory", "3", "--between-bandwidth", "100"]);
    let plan = &found["parallelism"]["plan"];
    assert_eq!((&found["cluster"]["machines"], &plan["micro_batches"]), (&serde_json::json!([2, 2]), &16.into()));
    let [one, best] = [&found["parallelism"]["one_device"], &found["parallelism"]["seconds"]].map(|v| v.as_f64());
    // With 3.6 GB of weights, gradients and moments it does not fit on one.
    assert!(one.is_none() && best.unwrap() > 0.0, "{found}");
    // Links so slow that nothing is gained.
    let slow = ["plan", "--profile", &file, "--bandwidth", "0.001", "--latency", "100000"];
    assert!(good(&slow).contains("one device is better than any cut"));
}

#[test]
fn plans_without_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = profile(folder.path());
    let plan = |rest: &[&'static str]| [&["plan", "--profile", &file][..], rest].concat();
    refused(&plan(&["--machines", "2x0"]), 2, &["--machines"]);
    refused(&plan(&["--machines", "9x9"]), 2, &["64 devices"]);
    refused(&plan(&["--devices", "0"]), 2, &["machines"]);
    refused(&plan(&["--bandwidth", "nan"]), 2, &["--bandwidth"]);
    refused(&plan(&["--bandwidth", "1e308"]), 2, &["--bandwidth: 1e308 is not usable", "1e-6 to 1000000000.0"]);
    refused(&plan(&["--micro-batches", "0"]), 2, &["micro_batches"]);
    refused(&plan(&["--memory", "0.001"]), 4, &["E-MEMORY"]);
    refused(&["plan", "--profile", "no such file"], 3, &["E-IO"]);
    let broken = folder.path().join("broken.json");
    fs::write(&broken, "{\"model\": 3}").unwrap();
    refused(&["plan", "--profile", broken.to_str().unwrap()], 3, &["E-FILE", "model"]);
}

#[test]
fn a_simulation_leaves_a_chart_a_trace_and_a_schedule() {
    let folder = tempfile::tempdir().unwrap();
    let [svg, trace, rows] = ["step.svg", "step.json", "step.csv"].map(|n| folder.path().join(n));
    let [svg_name, trace_name, rows_name] = [&svg, &trace, &rows].map(|p| p.to_str().unwrap());
    let text = good(&[
        "simulate",
        "--schedule",
        "1f1b",
        "--costs",
        "1,1,1",
        "--svg",
        svg_name,
        "--trace",
        trace_name,
        "--write-csv",
        rows_name,
        "--compare",
    ]);
    for part in ["step 33.0 s, idle 27.3 %", "zb-v", "interleaved"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(fs::read_to_string(&svg).unwrap().starts_with("<svg xmlns"));
    let trace: serde_json::Value = serde_json::from_str(&fs::read_to_string(&trace).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 64);
    assert_eq!(csv::read(&rows).unwrap().stages, Schedule::new(Kind::OneForwardOneBackward, 4, 8).unwrap().stages);
    // The same from the file, for a program.
    let again = json(&["simulate", "--csv", rows_name]);
    assert_eq!((again["seconds"].as_f64(), &again["micro_batches"]), (Some(33.0), &8.into()));
    fs::write(&rows, "0F0,0B0\n1F0,1B1\n").unwrap();
    refused(&["simulate", "--csv", rows_name], 3, &["line 2, cell 2"]);
    fs::write(&rows, "0B0,0F0\n").unwrap();
    refused(&["simulate", "--csv", rows_name], 3, &["E-SCHEDULE"]);
}

#[test]
fn a_profile_is_cut_for_the_simulation() {
    let folder = tempfile::tempdir().unwrap();
    let file = profile(folder.path());
    let found = json(&["simulate", "--profile", &file, "--stages", "3", "--compare"]);
    assert_eq!(found["stages"].as_array().unwrap().len(), 3);
    assert_eq!(found["compared"].as_array().unwrap().len(), 11);
    // Two chunks for each of five stages are more than there are pieces.
    let found = json(&["simulate", "--profile", &file, "--stages", "5", "--compare"]);
    assert_eq!((found["compared"].as_array().unwrap().len(), found["left_out"].as_array().unwrap().len()), (7, 4));
    refused(&["simulate", "--profile", &file, "--stages", "10"], 2, &["chunks"]);
}

#[test]
fn simulations_without_sense_are_refused() {
    for arguments in [
        &["simulate", "--schedule", "best"][..],
        &["simulate", "--stages", "0"],
        &["simulate", "--micro-batches", "99999999"],
        &["simulate", "--costs", "1,2"],
        &["simulate", "--message", "-1"],
        &["schedule", "none"],
        &["schedule", "1f1b", "--stages", "1000", "--micro-batches", "1000"],
    ] {
        refused(arguments, 2, &[]);
    }
}

#[test]
fn outputs_overwrite_neither_inputs_nor_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let file = profile(folder.path());
    let before = fs::read(&file).unwrap();
    let other = folder.path().join(".").join("profile.json");
    refused(&["simulate", "--profile", &file, "--svg", other.to_str().unwrap()], 2, &["--svg", "--profile"]);
    refused(&["profile", &file, "--out", &file], 2, &["--out", "RECIPE"]);
    let new = folder.path().join("new");
    let new = new.to_str().unwrap();
    refused(&["simulate", "--svg", new, "--trace", new], 2, &["--trace", "--svg"]);
    assert!(fs::read(&file).unwrap() == before && !Path::new(new).exists());
    good(&["simulate", "--svg", "/dev/null", "--trace", "/dev/null"]);
}

#[test]
fn the_grid_is_pytorchs() {
    let text = good(&["schedule", "1f1b", "--stages", "2", "--micro-batches", "2"]);
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows[1..],
        [&["0", "0F0"][..], &["1", "0F1", "1F0"], &["2", "1B0"], &["3", "0B0", "1F1"], &["4", "1B1"], &["5", "0B1"]]
    );
    let found = json(&["schedule", "zb-v", "--stages", "2", "--micro-batches", "1"]);
    assert_eq!(found["homes"], serde_json::json!([0, 1, 1, 0]));
}

#[test]
fn a_thousand_stages_are_simulated() {
    let found = json(&["simulate", "--stages", "1000", "--micro-batches", "200"]);
    assert_eq!(found["seconds"].as_f64(), Some(3.0 * 1199.0));
}
