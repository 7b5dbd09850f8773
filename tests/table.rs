//! The table, case by case: each a named test per device. `cargo test --test table -- cpu/softmax` runs one op's cases
//! on the CPU; `grad/` in a name marks the gradient checks.
//!
//! A device that is absent, or has no kernel for a case, shows as ignored, by name. Where `ESPALIER_REQUIRE` names the
//! device, its absence is a failure.

use std::collections::BTreeSet;
use std::sync::Arc;

use espalier::device::{self, Device, WgpuDevice};
use espalier::kernel::{Kernel, Problem};
use espalier::op::{Case, Input};
use espalier::ops::FAMILIES;
use espalier::shape::Meta;
use espalier::verify::{self, Verdict};
use espalier::{DType, Error, Tensor, dispatch};
use libtest_mimic::{Arguments, Failed, Trial};

const SEED: u64 = 1;
/// Bytes of a binding where windows are tested: a page.
const WINDOW: u64 = 4096;

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
            Ok(device) => {
                trials.extend(on(name, &device));
                if name == "wgpu" {
                    trials.extend(in_windows(&device));
                    trials.extend(of_any_indices(&device));
                }
            }
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
        let test = move || if never.is_empty() { Ok(()) } else { Err(format!("no case runs {never:#?}").into()) };
        trials.push(Trial::test("wgpu/every_rung_runs", test).with_ignored_flag(other));
    }
    trials
}

/// What a device with little memory to a binding and loops of any length would be given, of cases whose plans differ there.
fn in_windows(device: &Arc<dyn Device>) -> Vec<Trial> {
    let Ok(mut small) = WgpuDevice::open(None) else { return Vec::new() };
    small.plan_for(WINDOW, None);
    let small: Arc<dyn Device> = Arc::new(small);
    let plans = |case: &Case, device: &Arc<dyn Device>| -> Vec<String> {
        let plan = |problem: &Problem, kernel: &&Kernel| format!("{} {:?}", kernel.name, (kernel.plan)(problem));
        with(case, device, |problem| dispatch::candidates(problem).iter().map(|k| plan(problem, k)).collect())
    };
    let differ = |case: &Case| ![Vec::new(), plans(case, device)].contains(&plans(case, &small));
    let cases = FAMILIES.iter().flat_map(|f| (f.cases)()).filter(differ);
    let trial = |case: Case| {
        let (name, device) = (format!("wgpu/windows/{}/{}", case.op.name(), case.label()), small.clone());
        // Not every rung has windows; what has none is refused before it runs.
        let refused =
            |verdict: &Verdict| matches!(verdict, Verdict::Failed(why) if why.contains("bytes of one binding"));
        let judge = move |o: verify::Outcome| if refused(&o.verdict) { Ok(()) } else { verdict(o.verdict) };
        Trial::test(name, move || verify::forward(&case, &device, SEED).into_iter().try_for_each(judge))
    };
    cases.map(trial).collect()
}

/// Cases with indices, lengths or masks among their inputs, which are data and may be anything: whatever comes out, no access goes
/// past the end of an array.
fn of_any_indices(device: &Arc<dyn Device>) -> Vec<Trial> {
    let indexed = |case: &Case| case.inputs.iter().any(|input| input.meta.dtype == DType::U32);
    let trial = |case: Case| {
        let (name, device) = (format!("wgpu/indices/{}/{}", case.op.name(), case.label()), device.clone());
        let test = move || {
            let tensor = |(i, input): (usize, &Input)| {
                let (count, meta) = (input.meta.count(), input.meta);
                let any = |at: usize| [u32::MAX, 0x7fff_ffff, at as u32, 1 << 20, 0x8000_0000][(at + at / 5) % 5];
                match meta.dtype {
                    DType::U32 => Tensor::from_slice(&device, meta.dims(), &(0..count).map(any).collect::<Vec<_>>()),
                    _ => Tensor::from_f64(&device, meta.dims(), meta.dtype, &verify::draw(input, SEED, i)),
                }
            };
            let inputs: Vec<Tensor> = case.inputs.iter().enumerate().map(tensor).collect::<Result<_, _>>()?;
            let inputs: Vec<&Tensor> = inputs.iter().collect();
            let run = |kernel: &Kernel| {
                let empty = |meta: &Meta| Tensor::zeros(&device, *meta);
                let outputs: Vec<Tensor> = case.op.infer(&case.metas())?.iter().map(empty).collect::<Result<_, _>>()?;
                dispatch::run_with(kernel, case.op.as_ref(), &inputs, &outputs)
            };
            candidates(&case, &device).into_iter().try_for_each(|kernel| match run(kernel) {
                Err(e @ Error::Bounds { .. }) => Err(Failed::from(e.to_string())),
                _ => Ok(()),
            })
        };
        Trial::test(name, test)
    };
    FAMILIES.iter().flat_map(|f| (f.cases)()).filter(indexed).map(trial).collect()
}

/// WGSL rungs, with what is fixed when they are compiled, that no case of the table runs here; without those for matrix units that this
/// adapter does not have.
fn never_run(device: &Arc<dyn Device>) -> BTreeSet<String> {
    let cases: Vec<Case> = FAMILIES.iter().flat_map(|f| (f.cases)()).collect();
    let name = |k: &'static Kernel, element: DType| {
        k.wgsl().map(|entry| format!("{} {:?} of {element}", k.name, entry.constants))
    };
    let all = cases.iter().flat_map(|c| c.op.kernels()).flat_map(|k| k.dtypes.iter().filter_map(move |d| name(k, *d)));
    let all: BTreeSet<String> = all.collect();
    let run = |case: &Case| -> Vec<String> {
        with(case, device, |p| dispatch::candidates(p).into_iter().filter_map(|k| name(k, p.element)).collect())
    };
    let run: BTreeSet<String> = cases.iter().flat_map(run).collect();
    // Subgroups of eight, as this test asks for, take one record alone.
    let units = device.info().features.cooperative_matrix;
    let others = |rung: &&String| {
        let own = format!("matmul_coop_{units} [(\"COOP_THREADS\", 32.0)]");
        ["matmul_coop_16", "matmul_coop_8"].iter().any(|name| rung.starts_with(name)) && !rung.starts_with(&own)
    };
    all.difference(&run).filter(|rung| !others(rung)).cloned().collect()
}

/// Shapes that the op refuses are a failure, not an absence: the test shows them.
fn supported(case: &Case, device: &Arc<dyn Device>) -> bool {
    case.op.infer(&case.metas()).is_err() || !candidates(case, device).is_empty()
}

fn candidates(case: &Case, device: &Arc<dyn Device>) -> Vec<&'static Kernel> {
    with(case, device, dispatch::candidates)
}

/// What `take` makes of a case as the device's problem; nothing of a case that the op refuses.
fn with<T: Default>(case: &Case, device: &Arc<dyn Device>, take: impl FnOnce(&Problem) -> T) -> T {
    let inputs = case.metas();
    let Ok(outputs) = case.op.infer(&inputs) else { return T::default() };
    let element = case.op.element(&inputs, &outputs);
    take(&Problem { op: case.op.as_ref(), inputs: &inputs, outputs: &outputs, element, info: device.info() })
}

fn verdict(verdict: Verdict) -> Result<(), Failed> {
    match verdict {
        Verdict::Passed => Ok(()),
        Verdict::Failed(reason) => Err(reason.into()),
        Verdict::Skipped(reason) => Err(format!("skipped at run time: {reason}").into()),
    }
}
