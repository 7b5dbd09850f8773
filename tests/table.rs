//! The table, case by case: each a named test per device. `cargo test --test table -- cpu/softmax` runs one op's cases
//! on the CPU; `grad/` in a name marks the gradient checks.
//!
//! A device that is absent, or has no kernel for a case, shows as ignored, by name. Where `ESPALIER_REQUIRE` names the
//! device, its absence is a failure.

use std::collections::BTreeSet;
use std::sync::Arc;

use espalier::device::{self, Device};
use espalier::dispatch;
use espalier::kernel::{Kernel, Problem};
use espalier::op::Case;
use espalier::ops::FAMILIES;
use espalier::verify::{self, Verdict};
use libtest_mimic::{Arguments, Failed, Trial};

const SEED: u64 = 1;

fn main() {
    // What the drivers and the checks in shaders hide is a failure here: release builds have no checks.
    if std::env::var_os("ESPALIER_SHADER_CHECKS").is_none() {
        // SAFETY: no other thread has been started.
        unsafe { std::env::set_var("ESPALIER_SHADER_CHECKS", "report") };
    }
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for name in ["cpu", "wgpu", "cuda-host"] {
        match device::open(name) {
            Ok(device) => trials.extend(on(name, &device)),
            Err(e) => {
                let required = std::env::var("ESPALIER_REQUIRE").unwrap_or_default();
                let required = required.split(',').any(|r| r == name);
                let reason = e.to_string();
                eprintln!("{}{name}: {reason}", if required { "" } else { "skipped " });
                let trial = Trial::test(format!("{name}/present"), move || Err(Failed::from(reason)));
                trials.push(trial.with_ignored_flag(!required));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn on(name: &str, device: &Arc<dyn Device>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for case in FAMILIES.iter().flat_map(|f| (f.cases)()) {
        let (op, label) = (case.op.name(), case.label());
        let absent = !supported(&case, device);
        if case.grad {
            let (case, device) = (case.clone(), device.clone());
            let test = move || verdict(verify::gradient(&case, &device, SEED).verdict);
            trials.push(Trial::test(format!("{name}/grad/{op}/{label}"), test).with_ignored_flag(absent));
        }
        let device = device.clone();
        let test = move || verify::forward(&case, &device, SEED).into_iter().try_for_each(|o| verdict(o.verdict));
        trials.push(Trial::test(format!("{name}/{op}/{label}"), test).with_ignored_flag(absent));
    }
    if name == "wgpu" {
        let never = never_run(device);
        // Rungs on subgroups are written for eight lanes; a driver with others cannot run them.
        let other = device.info().features.subgroup_size != 8;
        let test = move || if never.is_empty() { Ok(()) } else { Err(format!("no case runs {never:?}").into()) };
        trials.push(Trial::test("wgpu/every_rung_runs", test).with_ignored_flag(other));
    }
    trials
}

/// WGSL rungs that no case of the table runs here.
fn never_run(device: &Arc<dyn Device>) -> BTreeSet<&'static str> {
    let cases: Vec<Case> = FAMILIES.iter().flat_map(|f| (f.cases)()).collect();
    let wgsl = |k: &&Kernel| k.wgsl().is_some();
    let all: BTreeSet<_> = cases.iter().flat_map(|c| c.op.kernels().iter().filter(wgsl).map(|k| k.name)).collect();
    let run: BTreeSet<_> = cases.iter().flat_map(|c| candidates(c, device)).map(|k| k.name).collect();
    all.difference(&run).copied().collect()
}

/// Shapes that the op refuses are a failure, not an absence: the test shows them.
fn supported(case: &Case, device: &Arc<dyn Device>) -> bool {
    case.op.infer(&case.metas()).is_err() || !candidates(case, device).is_empty()
}

fn candidates(case: &Case, device: &Arc<dyn Device>) -> Vec<&'static Kernel> {
    let inputs = case.metas();
    let Ok(outputs) = case.op.infer(&inputs) else { return Vec::new() };
    let element = case.op.element(&inputs, &outputs);
    let problem = Problem { op: case.op.as_ref(), inputs: &inputs, outputs: &outputs, element, info: device.info() };
    dispatch::candidates(&problem)
}

fn verdict(verdict: Verdict) -> Result<(), Failed> {
    match verdict {
        Verdict::Passed => Ok(()),
        Verdict::Failed(reason) => Err(reason.into()),
        Verdict::Skipped(reason) => Err(format!("skipped at run time: {reason}").into()),
    }
}
