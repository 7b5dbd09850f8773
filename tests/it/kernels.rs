//! `espalier kernels` and `espalier doctor` as a user runs them: output, JSON, exit codes.

use std::path::Path;

use assert_cmd::Command;
use espalier::device::Class;
use espalier::report::bench;
use serde_json::Value;

fn espalier(arguments: &[&str]) -> std::process::Output {
    Command::cargo_bin("espalier").unwrap().args(arguments).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = espalier(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str], exit: i32, code: &str) {
    let output = espalier(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {text}");
    assert!(text.contains(&format!("error[{code}]")) && text.trim().lines().count() == 1, "{arguments:?}: {text}");
}

#[test]
fn the_support_page_is_what_the_records_say() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/support.md")).unwrap();
    let listed = stdout(&["kernels", "list", "--format", "markdown"]);
    assert!(page == listed, "docs/support.md is old: espalier kernels list --format markdown > docs/support.md");
}

#[test]
fn verify_ends_with_one_object() {
    for extra in [&[][..], &["--grad"]] {
        let mut arguments = vec!["kernels", "verify", "--device", "cpu", "--op", "relu", "--format", "json"];
        arguments.extend(extra);
        let text = stdout(&arguments);
        let object: Value = serde_json::from_str(text.trim().lines().last().unwrap()).unwrap();
        let number = |key: &str| object[key].as_u64().unwrap_or_else(|| panic!("{key} in {object}"));
        assert_eq!(object["device"], "cpu");
        assert!(number("cases") > 1 && number("passed") == number("cases"), "{object}");
        assert_eq!((number("failed"), number("skipped")), (0, 0));
        assert!(object["seconds"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn verify_runs_the_case_that_a_failure_names() {
    let text = stdout(&[
        "kernels",
        "verify",
        "--device",
        "cpu:1",
        "--op",
        "relu",
        "--case",
        "Unary(Relu) f32[7]",
        "--seed",
        "9",
    ]);
    assert!(text.contains("1 cases, 1 passed"), "{text}");
}

#[test]
fn verify_leaves_large_cases_out() {
    let cases = |largest: &str| {
        let arguments =
            ["kernels", "verify", "--device", "cpu", "--op", "relu", "--format", "json", "--largest", largest];
        let object: Value = serde_json::from_str(stdout(&arguments).trim().lines().last().unwrap()).unwrap();
        object["cases"].as_u64().unwrap()
    };
    assert!(cases("7") >= 1 && cases("7") < cases("1000000000"));
}

#[test]
fn mistakes_have_their_exit_codes() {
    refused(&["kernels", "verify", "--device", "cpu", "--op", "nosuch"], 2, "E-USAGE");
    refused(&["kernels", "verify", "--device", "gpu"], 2, "E-USAGE");
    refused(&["doctor", "--format", "markdown"], 2, "E-USAGE");
    refused(&["kernels", "verify", "--device", "cuda"], 4, "E-NO-DEVICE");
    refused(&["kernels", "verify", "--device", "wgpu:no such adapter"], 4, "E-NO-DEVICE");
    refused(&["kernels", "compare", "no such file", "none"], 3, "E-IO");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.jsonl");
    std::fs::write(&file, "{\"op\": 3}\n").unwrap();
    let name = file.to_str().unwrap();
    refused(&["kernels", "compare", name, name], 3, "E-FILE");
    assert_eq!(espalier(&["kernels", "verify", "--no-such-flag"]).status.code(), Some(2));
}

#[test]
fn bench_checks_times_and_compares() {
    let arguments = ["kernels", "bench", "--device", "cpu", "--op", "argmax", "--samples", "5", "--seconds", "0.05"];
    let text = stdout(&[&arguments[..], &["--format", "json"]].concat());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.jsonl");
    std::fs::write(&file, &text).unwrap();
    let records = bench::read(&file).unwrap();
    assert!(!records.is_empty());
    for r in &records {
        assert!(r.supported && r.passed && r.median_us > 0.0 && r.samples_us.len() >= 5, "{r:?}");
        assert!(r.ceiling.unwrap() > 0.0 && r.bytes > 0 && !r.output_hash.is_empty());
        assert_eq!(r.naive_ratio.map(|x| x >= 0.0), Some(true));
    }
    let name = file.to_str().unwrap();
    assert!(stdout(&["kernels", "compare", name, name]).contains("argmax"));
    let lines = stdout(&arguments);
    assert!(lines.contains("ceilings of this run") && lines.contains("argmax"), "{lines}");
}

#[test]
fn dispatch_takes_what_was_tuned_and_names_a_table_that_it_cannot_use() {
    let Some(device) = crate::device::wgpu("tuning") else { return };
    if device.info().class != Class::Cpu {
        eprintln!("skipped tuning: {} has one kernel of sigmoid", device.info().name);
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let call = |arguments: &[&str]| -> (Vec<Value>, String) {
        let arguments =
            [&["kernels"], arguments, &["--op", "sigmoid", "--device", "wgpu", "--format", "json"]].concat();
        let call =
            Command::cargo_bin("espalier").unwrap().args(&arguments).env("ESPALIER_CACHE", cache.path()).output();
        let output = call.unwrap();
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {errors}");
        (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), errors.into_owned())
    };
    let dispatched = || {
        let (records, errors) = call(&["bench", "--samples", "5", "--seconds", "0.05"]);
        (records[0]["kernel"].as_str().unwrap().to_string(), errors)
    };
    let fitting = ["unary_fwd_wide KIND=5", "unary_fwd_fours KIND=5", "unary_fwd"];
    let (planned, _) = call(&["tune", "--dry-run"]);
    assert!(!planned.is_empty() && !cache.path().join("tuned").exists());
    let (compared, _) = call(&["tune"]);
    assert_eq!(compared.len(), planned.len());
    assert_eq!(compared[0]["fit"], fitting.len());
    let times = compared[0]["timed"].as_array().unwrap();
    assert!(!times.is_empty() && times.iter().all(|t| t["us"].as_f64().unwrap() > 0.0), "{compared:?}");
    let file = std::fs::read_dir(cache.path().join("tuned")).unwrap().next().unwrap().unwrap().path();
    let table: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let (kind, choice) = table["choices"].as_object().unwrap().iter().next().unwrap();
    assert_eq!(choice["kernel"], compared[0]["kernel"]);
    for kernel in fitting {
        let mut other = table.clone();
        other["choices"][kind]["kernel"] = kernel.into();
        std::fs::write(&file, other.to_string()).unwrap();
        assert_eq!(dispatched().0, kernel);
    }
    std::fs::write(&file, "{").unwrap();
    let (first, errors) = dispatched();
    assert_eq!(first, fitting[0]);
    assert!(errors.contains("ignored") && errors.contains(file.to_str().unwrap()), "{errors}");
    refused(&["kernels", "tune", "--device", "reference"], 2, "E-USAGE");
}

/// What the driver compiled is kept with a checksum; a damaged file counts as none and is written anew.
#[test]
fn pipelines_are_kept_between_processes() {
    let Some(device) = crate::device::wgpu("pipelines_are_kept_between_processes") else { return };
    let cache = tempfile::tempdir().unwrap();
    let run = || {
        let arguments = ["kernels", "verify", "--op", "relu", "--largest", "4096", "--device", "wgpu", "--quiet"];
        Command::cargo_bin("espalier").unwrap().args(arguments).env("ESPALIER_CACHE", cache.path()).assert().success();
        let file = std::fs::read_dir(cache.path().join("pipelines")).ok()?.next()?.unwrap().path();
        Some((std::fs::read(&file).unwrap(), file))
    };
    let Some((bytes, file)) = run() else {
        assert!(!device.info().driver.contains("Vulkan"), "Vulkan has such a cache, other interfaces need not");
        return;
    };
    let whole = |bytes: &[u8]| blake3::hash(&bytes[32..]).as_bytes()[..] == bytes[..32];
    assert!(whole(&bytes));
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let (mended, _) = run().unwrap();
    assert!(whole(&mended));
}

/// The checks compiled into shaders hide a loop that goes one too far; asked to report, they name its place.
#[test]
fn an_access_past_the_end_is_named() {
    if crate::device::wgpu("an_access_past_the_end_is_named").is_none() {
        return;
    }
    let shaders = tempfile::tempdir().unwrap();
    let own = include_str!("../../shaders/softmax.wgsl");
    let (good, bad) = ("i < softmax.v; i += step) { most", "i <= softmax.v; i += step) { most");
    let line = 1 + own.lines().position(|line| line.contains(good)).expect("the loop is there");
    std::fs::write(shaders.path().join("softmax.wgsl"), own.replacen(good, bad, 1)).unwrap();
    let verify = |checks: &str, folder: Option<&Path>| {
        let mut command = Command::cargo_bin("espalier").unwrap();
        command.args(["kernels", "verify", "--op", "softmax", "--largest", "4096", "--device", "wgpu", "--quiet"]);
        command.env("ESPALIER_SHADER_CHECKS", checks).envs(folder.map(|folder| ("ESPALIER_SHADERS", folder)));
        command.output().unwrap()
    };
    let found = verify("report", Some(shaders.path()));
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    let named = format!("softmax.wgsl:{line}: kernel softmax_fwd goes 1 past the end of softmax_x");
    assert!(!found.status.success() && text.contains(&named), "{text}");
    for checks in ["0", "1", "report"] {
        assert!(verify(checks, None).status.success(), "{checks}");
    }
    let refused = verify("some", None);
    assert_eq!(refused.status.code(), Some(2), "{}", String::from_utf8_lossy(&refused.stderr));
}

/// Of the host thread's own processor time, so that what else the machine does is left out.
#[test]
fn the_way_to_a_kernel_takes_three_microseconds() {
    const TEST: &str = "the_way_to_a_kernel_takes_three_microseconds";
    let mut devices = vec!["cpu"];
    devices.extend(crate::device::wgpu(TEST).map(|_| "wgpu"));
    for device in devices {
        let text = stdout(&["kernels", "bench", "--overhead", "--device", device, "--format", "json"]);
        let found: Value = serde_json::from_str(&text).unwrap();
        let host = found["host_us"].as_f64().unwrap();
        assert!(host > 0.0 && host <= 3.0, "{device}: {host} microseconds of host time per dispatched op");
    }
}

#[test]
fn the_cases_can_be_listed_without_a_device() {
    let list = |extra: &[&str]| -> Vec<Value> {
        // No machine has this device: listing opens none.
        let arguments = ["kernels", "bench", "--list", "--device", "wgpu:no such adapter", "--format", "json"];
        let text = stdout(&[&arguments[..], extra].concat());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let gpu = list(&["--sizes", "gpu"]);
    assert!(gpu.len() > 100, "{}", gpu.len());
    for case in gpu.iter().chain(&list(&[])) {
        let text = |key: &str| case[key].as_str().unwrap_or_else(|| panic!("{key} in {case}"));
        assert!(!text("group").is_empty() && !text("name").is_empty() && text("params").contains('['), "{case}");
        assert_eq!(text("mode") == "backward", text("op").contains("_bwd"), "{case}");
        assert!(case["bytes"].as_u64().unwrap() > 0 && !case["outputs"].as_array().unwrap().is_empty(), "{case}");
        for tensor in case["inputs"].as_array().unwrap() {
            assert!(tensor["dims"].is_array() && tensor["dtype"].is_string(), "{case}");
        }
    }
    // The published comparisons' sizes are there, each under one name in both directions.
    let named = |name: &str| gpu.iter().filter(|c| c["name"] == name).count();
    assert_eq!(named("NN 8192 x 8192 x 8192 bf16"), 1);
    assert_eq!(named("cross-entropy 8192 x 131072"), 2);
    let products = list(&["--sizes", "gpu", "--op", "matmul"]);
    assert!(!products.is_empty() && products.iter().all(|c| c["op"] == "matmul"));
}

#[test]
fn a_large_case_is_checked_in_parts_and_timed() {
    let arguments = ["kernels", "bench", "--sizes", "gpu", "--op", "moe_gate", "--device", "cpu", "--format", "json"];
    let text = stdout(&[&arguments[..], &["--samples", "5", "--seconds", "0.05"]].concat());
    let record: bench::BenchRecord = serde_json::from_str(text.trim()).unwrap();
    assert!(record.passed && record.median_us > 0.0, "{record:?}");
    assert_eq!(record.error_value, Some(0.0));
    assert!(record.error_metric.contains("sampled parts"), "{record:?}");
    // What is skipped is not run.
    let none = stdout(&[&arguments[..], &["--skip", "1"]].concat());
    assert!(none.trim().is_empty(), "{none}");
}

#[test]
fn the_host_cost_of_a_tiny_op_is_measured() {
    let object: Value =
        serde_json::from_str(&stdout(&["kernels", "bench", "--overhead", "--device", "cpu", "--format", "json"]))
            .unwrap();
    let host = object["host_us"].as_f64().unwrap();
    // The bar is 5 µs in a release build on a quiet machine; this only catches a change of kind.
    assert!(host > 0.0 && host < 100.0, "{object}");
}

#[test]
fn doctor_finds_the_devices_and_says_what_is_missing() {
    let object: Value = serde_json::from_str(&stdout(&["doctor", "--format", "json"])).unwrap();
    let devices = object["devices"].as_array().unwrap();
    assert_eq!(devices[0]["id"], "cpu");
    let wgpu = devices.iter().filter(|d| d["kind"] == "wgpu");
    let missing = object["missing"].as_array().unwrap();
    let driver_missing = missing.iter().any(|m| m["package"].as_str().unwrap().contains("mesa-vulkan-drivers"));
    for device in wgpu.clone() {
        assert!(
            device["probes"].as_array().unwrap().len() >= 10 && device["limits"]["binding_bytes"].as_u64().unwrap() > 0
        );
    }
    assert_eq!(wgpu.count() == 0, driver_missing, "{object}");
    let text = stdout(&["doctor"]);
    assert!(text.contains("cpu:") && text.contains("data:"), "{text}");
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(&["completions", shell]);
        assert!(script.contains("doctor") && script.contains("kernels"), "{shell}");
    }
}
