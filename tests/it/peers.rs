//! The comparison with other libraries: our side of its protocol, and a judge that no cheat gets past.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// Our side, asked line by line.
struct Ours(std::process::Child, BufReader<std::process::ChildStdout>);

impl Ours {
    fn start(device: &str, sizes: &str, op: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_espalier"))
            .args(["kernels", "bench", "--serve", "--device", device, "--sizes", sizes, "--op", op])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self(child, answers)
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.0.stdin.as_mut().unwrap(), "{request}").unwrap();
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

#[test]
fn our_side_takes_inputs_runs_and_hands_results_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let mut ours = Ours::start("cpu:1", "table", "relu");
    assert_eq!(ours.ask(&json!({"do": "hello"}))["name"], "espalier");
    let case = json!({"op": "relu", "params": "Unary(Relu) f32[1024,3072]", "flops": 0});
    let before = ours.ask(&json!({"do": "run", "first": 0, "runs": 1}));
    assert!(before["error"].as_str().unwrap().contains("an open case"), "{before}");
    let drawn = ours.ask(&json!({"do": "draw", "case": case, "seed": 3, "inputs": [path("x")]}));
    assert_eq!(drawn["ok"], true, "{drawn}");
    let open = ours.ask(&json!({"do": "open", "case": case, "peer": "", "slots": 2}));
    assert_eq!(open["outputs"], json!([0]), "{open}");
    assert_eq!(ours.ask(&json!({"do": "fill", "slot": 1, "inputs": [path("x")]}))["ok"], true);
    let read = json!({"do": "read", "slot": 1, "outputs": [path("y")]});
    // Poison, until something ran.
    assert_eq!(ours.ask(&read)["ok"], true);
    assert!(std::fs::read(path("y")).unwrap().iter().all(|&b| b == 0xFF));
    assert_eq!(ours.ask(&json!({"do": "run", "first": 1, "runs": 1}))["ok"], true);
    assert_eq!(ours.ask(&read)["ok"], true);
    let floats = |name: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(&std::fs::read(path(name)).unwrap()) };
    let (x, y) = (floats("x"), floats("y"));
    assert!(x.len() == 1024 * 3072 && x.iter().zip(&y).all(|(x, y)| *y == x.max(0.0)));
    let unknown = ours.ask(&json!({"do": "open", "case": {"op": "relu", "params": "?"}, "peer": "", "slots": 2}));
    assert!(unknown["error"].as_str().unwrap().contains("kernels bench --list"), "{unknown}");
    drop(ours.0.stdin.take());
    assert!(ours.0.wait().unwrap().success());
}

#[test]
fn our_side_takes_a_training_step_from_the_weights_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let listed = Command::new(env!("CARGO_BIN_EXE_espalier"))
        .args(["kernels", "bench", "--list", "--sizes", "cpu", "--op", "training_step", "--format", "json"])
        .output()
        .unwrap();
    let case: Value = serde_json::from_slice(listed.stdout.split(|b| *b == b'\n').next().unwrap()).unwrap();
    let names: Vec<&str> = case["inputs"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    let at = |name: &str| names.iter().position(|n| *n == name).unwrap();
    let paths = |kind: &str, count: usize| -> Vec<String> {
        (0..count).map(|i| folder.path().join(format!("{kind}-{i}")).to_str().unwrap().to_string()).collect()
    };
    let (inputs, outputs) = (paths("in", names.len()), paths("out", names.len() - 1));
    let floats = |path: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(&std::fs::read(path).unwrap()) };
    let mut ours = Ours::start("cpu:1", "cpu", "training_step");
    assert_eq!(ours.ask(&json!({"do": "draw", "case": case, "seed": 1, "inputs": inputs}))["ok"], true);
    let open = ours.ask(&json!({"do": "open", "case": case, "peer": "", "slots": 1}));
    assert_eq!(open["outputs"].as_array().unwrap().len(), outputs.len(), "{open}");
    let mut steps = Vec::new();
    for _ in 0..2 {
        assert_eq!(ours.ask(&json!({"do": "fill", "slot": 0, "inputs": inputs}))["ok"], true);
        assert_eq!(ours.ask(&json!({"do": "read", "slot": 0, "outputs": outputs}))["ok"], true);
        assert!(floats(&outputs[0])[0].is_nan(), "no step was taken yet");
        assert_eq!(ours.ask(&json!({"do": "run", "first": 0, "runs": 1}))["ok"], true);
        assert_eq!(ours.ask(&json!({"do": "read", "slot": 0, "outputs": outputs}))["ok"], true);
        steps.push(outputs.iter().map(|path| floats(path)).collect::<Vec<_>>());
    }
    // Nothing is left of a step in the next one.
    assert_eq!(steps[0], steps[1]);
    // Weights without meaning guess among all words.
    let loss = steps[0][0][0];
    assert!((loss - 4096f32.ln()).abs() < 1.0, "{loss}");
    for name in ["embedding.tokens", "blocks.0.attention.query.weight", "blocks.3.ffn.out.bias"] {
        let (before, after) = (floats(&inputs[at(name)]), &steps[0][1 + at(name)]);
        let largest = before.iter().zip(after).map(|(b, a)| (b - a).abs()).fold(0.0, f32::max);
        // A first update is at most the rate, but for the decay.
        assert!(largest > 1e-3 && largest < 1.01e-2, "{name}: {largest}");
    }
}

#[test]
fn on_an_adapter_our_side_names_it_and_runs_the_naive_rung_when_asked() {
    if crate::device::wgpu("peers").is_none() {
        return;
    }
    let mut ours = Ours::start("wgpu", "table", "softmax");
    let hello = ours.ask(&json!({"do": "hello"}));
    assert!(["device", "driver"].iter().all(|field| !hello[*field].as_str().unwrap().is_empty()), "{hello}");
    let case = json!({"op": "softmax", "params": "Softmax f32[4096,256]"});
    let mut kernel = |peer: &str| {
        let open = ours.ask(&json!({"do": "open", "case": case, "peer": peer, "slots": 1}));
        open["kernel"].as_str().unwrap_or_else(|| panic!("{open}")).to_string()
    };
    assert_eq!(kernel("naive rung"), "softmax_fwd");
    kernel("");
}

/// Ten kernels that are fast because they do not do the work, three honest ones: `benches/peers/cpu/test_cheats.py`; and what the page and
/// the references of whole models are held to.
#[test]
fn cheating_kernels_are_caught() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has_numpy = Command::new(&python).args(["-c", "import numpy"]).output().is_ok_and(|o| o.status.success());
    if !has_numpy || !cfg!(target_os = "linux") {
        println!("skipped: the judge needs Linux and a Python with numpy");
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/cpu");
    let output = Command::new(&python)
        .args(["-B", "-m", "unittest", "test_cheats", "test_page", "test_results", "test_models", "test_field"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
