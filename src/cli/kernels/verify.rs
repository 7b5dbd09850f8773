//! `kernels verify`: every case of the table on one device.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::cli::{Global, say, say_json};
use crate::device::{Device, MAX_THREADS};
use crate::error::{Error, Result};
use crate::op::Case;
use crate::verify::{self, Outcome, Verdict};

#[derive(clap::Args)]
pub struct Args {
    /// Only ops whose name fits (`*` and `?`)
    #[arg(long, default_value = "*", value_name = "GLOB")]
    op: String,
    /// Gradients against central differences of the reference, then the device's against the reference device's
    #[arg(long)]
    grad: bool,
    /// Only the case with this label, as a failure prints it
    #[arg(long, value_name = "LABEL")]
    case: Option<String>,
    /// Only cases none of whose inputs has more elements: what a memory checker can go through
    #[arg(long, value_name = "ELEMENTS")]
    largest: Option<usize>,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Cases at a time; 0 takes every core
    #[arg(long, default_value_t = 0, value_parser = jobs)]
    jobs: usize,
}

fn jobs(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n <= MAX_THREADS).ok_or_else(|| format!("0 to {MAX_THREADS}"))
}

#[derive(Serialize)]
struct Failure {
    op: &'static str,
    kernel: String,
    case: String,
    seed: u64,
    reason: String,
    replay: String,
}

/// What is printed at the end. A case counts as failed when any of its records fails, as skipped when none fits.
#[derive(Serialize)]
struct Summary {
    device: String,
    adapter: String,
    mode: &'static str,
    seed: u64,
    cases: usize,
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Kernel records run, each on every case it fits.
    checks: usize,
    seconds: f64,
    failures: Vec<Failure>,
}

/// One case, with a panic of a kernel or reference as a failure of that case alone.
fn check(case: &Case, device: &Arc<dyn Device>, args: &Args) -> Vec<Outcome> {
    let run = || {
        if args.grad {
            vec![verify::gradient(case, device, args.seed)]
        } else {
            verify::forward(case, device, args.seed)
        }
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let verdict = Verdict::Failed(format!("panicked: {}", text.unwrap_or("without a message")));
        vec![Outcome { op: case.op.name(), kernel: "any".into(), label: case.label(), seed: args.seed, verdict }]
    })
}

/// The command that repeats a case, with the variables that say which kernels run and how they are watched.
fn replay(device: &str, outcome: &Outcome, grad: bool) -> String {
    let grad = if grad { " --grad" } else { "" };
    let quoted = |value: String| value.replace('\'', r"'\''");
    let set = |name: &&str| std::env::var(name).ok().map(|value| format!("{name}='{}' ", quoted(value)));
    let variables: String =
        ["ESPALIER_SHADERS", "ESPALIER_SHADER_CHECKS", "ESPALIER_CUDA"].iter().filter_map(set).collect();
    let Outcome { op, label, seed, .. } = outcome;
    format!("{variables}espalier kernels verify --device {device} --op {op} --case '{label}' --seed {seed}{grad}")
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    let device = global.open()?;
    let label = |case: &Case| args.case.as_ref().is_none_or(|wanted| *wanted == case.label());
    let largest = args.largest.unwrap_or(usize::MAX);
    let small = |case: &Case| case.inputs.iter().all(|i| i.meta.count() <= largest);
    let cases: Vec<Case> =
        verify::select(&args.op).into_iter().filter(|c| (!args.grad || c.grad) && label(c) && small(c)).collect();
    if cases.is_empty() {
        let value = args.case.clone().unwrap_or_else(|| args.op.clone());
        return Err(Error::Usage { argument: "--op, --case", value, rule: "an op and case of `kernels list`".into() });
    }
    let start = Instant::now();
    let progress = global.progress(cases.len());
    let workers = rayon::ThreadPoolBuilder::new().num_threads(args.jobs).build();
    let workers =
        workers.map_err(|e| Error::NotAvailable { device: "worker threads".into(), reason: e.to_string() })?;
    let id = &device.info().id;
    let one = |case: &Case| {
        let outcomes = check(case, &device, args);
        progress.suspend(|| report(global, id, &outcomes, args.grad));
        progress.set_message(case.op.name());
        progress.inc(1);
        outcomes
    };
    let outcomes: Vec<Vec<Outcome>> = workers.install(|| cases.par_iter().map(one).collect());
    progress.finish_and_clear();
    let summary = summarize(device.as_ref(), args, &outcomes, start.elapsed().as_secs_f64());
    let (failed, total) = (summary.failed, summary.cases);
    if global.json() {
        say_json(&summary);
    } else {
        let Summary { device, adapter, passed, skipped, checks, seconds, .. } = &summary;
        say(format!(
            "{device} ({adapter}): {total} cases, {passed} passed, {failed} failed, {skipped} skipped; {checks} kernel runs in {seconds:.1} s"
        ));
    }
    if failed > 0 {
        return Err(Error::Failed { what: "kernel cases", failed, total });
    }
    if summary.passed == 0 {
        // A script that asks whether the kernels are right must not read "yes" where none was run.
        let rule = format!("a device with kernels for these ops: all {total} cases were skipped, nothing was checked");
        return Err(Error::Usage { argument: "--device, --op", value: format!("{id}, {}", args.op), rule });
    }
    Ok(())
}

/// Prints what went wrong as it happens; JSON gets the same at the end.
fn report(global: &Global, device: &str, outcomes: &[Outcome], grad: bool) {
    if global.json() {
        return;
    }
    for outcome in outcomes {
        match &outcome.verdict {
            Verdict::Passed => {}
            Verdict::Skipped(reason) => say(format!("skipped {} {}: {reason}", outcome.op, outcome.label)),
            Verdict::Failed(reason) => {
                let Outcome { op, kernel, label, seed, .. } = outcome;
                say(format!("FAILED {op} [{kernel}] {label} seed {seed}: {reason}"));
                say(format!("       {}", replay(device, outcome, grad)));
            }
        }
    }
}

fn summarize(device: &dyn Device, args: &Args, outcomes: &[Vec<Outcome>], seconds: f64) -> Summary {
    let info = device.info();
    let mut summary = Summary {
        device: info.id.clone(),
        adapter: info.name.clone(),
        mode: if args.grad { "gradient" } else { "forward" },
        seed: args.seed,
        cases: outcomes.len(),
        passed: 0,
        failed: 0,
        skipped: 0,
        checks: 0,
        seconds,
        failures: Vec::new(),
    };
    for case in outcomes {
        let failed = |o: &&Outcome| matches!(o.verdict, Verdict::Failed(_));
        let skipped = |o: &Outcome| matches!(o.verdict, Verdict::Skipped(_));
        summary.checks += case.iter().filter(|o| !skipped(o)).count();
        match case.iter().find(failed) {
            Some(_) => summary.failed += 1,
            None if case.iter().all(skipped) => summary.skipped += 1,
            None => summary.passed += 1,
        }
        for outcome in case.iter().filter(failed) {
            let Verdict::Failed(reason) = &outcome.verdict else { continue };
            summary.failures.push(Failure {
                op: outcome.op,
                kernel: outcome.kernel.clone(),
                case: outcome.label.clone(),
                seed: outcome.seed,
                reason: reason.clone(),
                replay: replay(&info.id, outcome, args.grad),
            });
        }
    }
    summary
}
