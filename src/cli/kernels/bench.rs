//! `kernels bench`: the table's real-model sizes, each checked, timed, and held against this run's measured ceiling.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::break_even;
use super::growth;
use super::measure::{self, Ceiling, Effort};
use super::whole::{self, Whole};
use super::{sampled, serve};
use crate::cli::{Global, say, say_json};
use crate::device::{Device, Kind};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Problem};
use crate::op::Case;
use crate::ops::large::{self, Large};
use crate::report::bench::{BenchDevice, BenchRecord};
use crate::report::{milliseconds, percent};
use crate::shape::Meta;
use crate::verify::{self, Verdict};

/// Every tensor of every case is packed row-major.
const LAYOUT: &str = "contiguous";

/// Which sizes are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sizes {
    /// The table's: small models, checked whole
    Table,
    /// Large models, checked in f64 on parts of the result: gigabytes, meant for a GPU
    Gpu,
    /// Those at which `make peers` compares libraries for CPUs
    Cpu,
}

#[derive(clap::Args)]
pub struct Args {
    /// Only ops whose name fits (`*` and `?`)
    #[arg(long, default_value = "*", value_name = "GLOB")]
    op: String,
    /// Which sizes
    #[arg(long, value_enum, default_value_t = Sizes::Table)]
    sizes: Sizes,
    /// Leave out this many cases at the start: how a run goes on after a kernel took the device down
    #[arg(long, default_value_t = 0)]
    skip: usize,
    /// Print the cases instead of timing them; no device is opened
    #[arg(long)]
    list: bool,
    /// Answer the requests of a program that times (JSON lines on standard input) instead of timing; see benches/peers
    #[arg(long, conflicts_with = "list")]
    serve: bool,
    /// Every rung, not only the one that dispatch takes
    #[arg(long)]
    rungs: bool,
    /// Every case of the table, not only real-model sizes
    #[arg(long)]
    all: bool,
    /// Samples per kernel
    #[arg(long, default_value_t = 30, value_parser = samples)]
    samples: usize,
    /// Seconds of sampling per kernel at most
    #[arg(long, default_value_t = 1.0, value_parser = seconds, allow_negative_numbers = true)]
    seconds: f64,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instead of the table: what dispatching one tiny op costs the host
    #[arg(long, conflicts_with_all = ["op", "sizes", "skip", "list", "rungs", "all", "seconds", "serve"])]
    overhead: bool,
    /// Instead of the table: feed-forward blocks as 2:4, unstructured zeros and experts against the dense one
    #[arg(long, conflicts_with_all = ["op", "sizes", "skip", "list", "rungs", "all", "overhead", "seconds", "serve"])]
    break_even: bool,
    /// Instead of the table: how times grow with sizes, against how they must
    #[arg(long, conflicts_with_all = ["sizes", "skip", "list", "rungs", "all", "overhead", "seconds", "serve", "break_even"])]
    growth: bool,
}

/// A case as `--list` prints it: what another program needs to time the same work and to file it under the same name.
#[derive(Serialize)]
struct Listed {
    group: String,
    /// For people; a forward case and its backward have the same.
    name: String,
    op: &'static str,
    params: String,
    mode: &'static str,
    dtype: &'static str,
    layout: &'static str,
    inputs: Vec<ListedTensor>,
    outputs: Vec<ListedTensor>,
    flops: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct ListedTensor {
    /// Of a model's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    dims: Vec<usize>,
    dtype: &'static str,
}

/// Longest sampling of one kernel.
const MAX_SECONDS: f64 = 3600.0;
const MAX_SAMPLES: usize = 1_000_000;

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let value = text.parse().ok().filter(|s: &f64| *s > 0.0 && *s <= MAX_SECONDS);
    value.ok_or_else(|| format!("seconds above 0, at most {MAX_SECONDS}"))
}

fn samples(text: &str) -> std::result::Result<usize, String> {
    let value = text.parse().ok().filter(|n| (1..=MAX_SAMPLES).contains(n));
    value.ok_or_else(|| format!("1 to {MAX_SAMPLES}"))
}

#[derive(Serialize)]
struct Overhead {
    device: String,
    op: &'static str,
    case: String,
    /// Until the call is back.
    host_us: f64,
    /// With the device's own work, waited for once per block.
    whole_us: f64,
}

/// The cases of ops that fit `op`; of the table those for benches, or all. Those are checked whole: they have no parts.
pub(super) fn cases(sizes: Sizes, op: &str, all: bool) -> Result<Vec<Large>> {
    let named = |case: &Case| verify::glob_match(op, case.op.name());
    let cases: Vec<Large> = match sizes {
        Sizes::Gpu => large::cases().into_iter().filter(|l| named(&l.case)).collect(),
        Sizes::Cpu => large::cpu_cases().into_iter().filter(|l| named(&l.case)).collect(),
        Sizes::Table => {
            let wanted = verify::select(op).into_iter().filter(|c| c.bench || all);
            wanted.map(|case| Large { group: "table", name: case.label(), case, parts: Vec::new() }).collect()
        }
    };
    if cases.is_empty() && wholes(sizes, op)?.is_empty() {
        let rule = "an op of `kernels list` with a bench case".into();
        return Err(Error::Usage { argument: "--op", value: op.into(), rule });
    }
    Ok(cases)
}

/// Whole models, which are listed and served but not timed here: their references are the judge's.
fn wholes(sizes: Sizes, op: &str) -> Result<Vec<Whole>> {
    let all = if sizes == Sizes::Cpu { whole::cases()? } else { Vec::new() };
    Ok(all.into_iter().filter(|whole| verify::glob_match(op, whole.op)).collect())
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    if args.list {
        return list(global, args);
    }
    if args.break_even {
        return break_even::run(global, args.samples, args.seed);
    }
    if args.growth {
        return growth::run(global, &args.op, args.samples, args.seed);
    }
    let cases = cases(args.sizes, &args.op, args.all)?;
    if args.skip > cases.len() {
        let rule = format!("at most the number of cases, {}", cases.len());
        return Err(Error::Usage { argument: "--skip", value: args.skip.to_string(), rule });
    }
    let device = global.open()?;
    if args.serve {
        return serve::run(&device, &cases, &wholes(args.sizes, &args.op)?);
    }
    if args.overhead {
        return overhead(global, &device);
    }
    let effort = Effort { samples: args.samples, time: Duration::from_secs_f64(args.seconds.max(0.01)) };
    let ceiling = ceilings(&device)?;
    if !global.json() {
        let Ceiling { gflops, bandwidth_gb } = ceiling;
        say(format!(
            "{} ({}): ceilings of this run {gflops:.1} GFLOP/s, {bandwidth_gb:.1} GB/s",
            device.info().id,
            device.info().name
        ));
        say(header());
    }
    let progress = global.progress(cases.len().saturating_sub(args.skip));
    let (mut failed, mut total) = (0, 0);
    for case in cases.iter().skip(args.skip) {
        progress.set_message(case.case.op.name());
        // One case that cannot run takes no other with it, unless it took the device.
        let (records, lost) = match bench(case, &device, args, effort, ceiling) {
            Ok(records) => (records, None),
            Err(e) => {
                let record =
                    BenchRecord { supported: true, error: Some(e.to_string()), ..blank(&case.case, &device, args)? };
                (vec![record], matches!(e, Error::DeviceLost { .. }).then_some(e))
            }
        };
        for record in records {
            total += 1;
            failed += usize::from(record.supported && !record.passed);
            progress.suspend(|| if global.json() { say_json(&record) } else { say(line(&record)) });
        }
        if let Some(e) = lost {
            return Err(e);
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    if failed > 0 { Err(Error::Failed { what: "benchmarked kernels", failed, total }) } else { Ok(()) }
}

fn mode(case: &Case) -> &'static str {
    if case.op.name().contains("_bwd") { "backward" } else { "forward" }
}

fn list(global: &Global, args: &Args) -> Result<()> {
    let tensors = |metas: &[Meta]| metas.iter().map(|m| listed(None, m)).collect::<Vec<_>>();
    for Large { group, name, case, .. } in cases(args.sizes, &args.op, args.all)? {
        let inputs = case.metas();
        let outputs = case.op.infer(&inputs)?;
        let cost = case.op.cost(&inputs, &outputs);
        let listed = Listed {
            group: group.into(),
            name,
            op: case.op.name(),
            params: case.label(),
            mode: mode(&case),
            dtype: case.op.element(&inputs, &outputs).name(),
            layout: LAYOUT,
            inputs: tensors(&inputs),
            outputs: tensors(&outputs),
            flops: cost.flops as u64,
            bytes: cost.bytes as u64,
        };
        show(global, &listed);
    }
    for whole in wholes(args.sizes, &args.op)? {
        let named = whole.inputs.into_iter().map(|(name, input)| listed(Some(name), &input.meta));
        let listed = Listed {
            group: "models".into(),
            name: whole.name,
            op: whole.op,
            params: whole.params,
            mode: "forward",
            dtype: whole.dtype.name(),
            layout: LAYOUT,
            inputs: named.collect(),
            outputs: tensors(&whole.outputs),
            flops: whole.flops,
            bytes: whole.bytes,
        };
        show(global, &listed);
    }
    Ok(())
}

fn listed(name: Option<String>, meta: &Meta) -> ListedTensor {
    ListedTensor { name, dims: meta.dims().to_vec(), dtype: meta.dtype.name() }
}

fn show(global: &Global, listed: &Listed) {
    if global.json() {
        say_json(listed);
    } else {
        say(format!("{:<22} {}", listed.op, listed.params));
    }
}

/// What this device reaches on work that does nothing else: the table's multiply-add chain, and the better of the
/// device's copy and the table's plainest elementwise kernels.
fn ceilings(device: &Arc<dyn Device>) -> Result<Ceiling> {
    let effort = Effort { samples: 40, time: Duration::from_millis(800) };
    // A large GPU is not even filled by the table's sizes.
    let large = if device.info().kind == Kind::Cuda && measure::hardware(device) { large::cases() } else { Vec::new() };
    let best = |op: &str| -> Result<BenchRecord> {
        let mut record = BenchRecord { seed: 1, passed: true, ..BenchRecord::default() };
        let (case, encoded) = match large.iter().find(|l| l.case.op.name() == op) {
            Some(large) => (large.case.clone(), sampled::inputs(large, 1)),
            None => {
                let Some(case) = verify::select(op).into_iter().find(|c| c.bench) else { return Ok(record) };
                let encoded = measure::inputs(&case, 1);
                (case, encoded)
            }
        };
        let metas = case.metas();
        let outputs = case.op.infer(&metas)?;
        let cost = case.op.cost(&metas, &outputs);
        (record.flops, record.bytes) = (cost.flops as u64, cost.bytes as u64);
        let problem = problem(&case, &metas, &outputs, device);
        if let Some(kernel) = dispatch::candidates(&problem).first() {
            measure::measure(&mut record, &case, &encoded, kernel, device, effort)?;
            // A ceiling is what was reached once, not what is usual.
            record.samples_us.sort_by(f64::total_cmp);
            record.samples_us.truncate(1);
        }
        record.summarize();
        Ok(record)
    };
    // Writing new memory reads it first on most processors, which nobody counts: work in place shows the true rate.
    let rates = [best("scale")?.bandwidth_gb, best("accumulate_scaled")?.bandwidth_gb, measure::copy_rate(device)?];
    let bandwidth_gb = rates.into_iter().fold(0.0, f64::max);
    Ok(Ceiling { gflops: best("multiply_add_chain")?.gflops, bandwidth_gb })
}

pub(super) fn problem<'a>(
    case: &'a Case,
    inputs: &'a [Meta],
    outputs: &'a [Meta],
    device: &'a Arc<dyn Device>,
) -> Problem<'a> {
    Problem { op: case.op.as_ref(), inputs, outputs, element: case.op.element(inputs, outputs), info: device.info() }
}

/// The record of a case that nothing was measured of yet.
fn blank(case: &Case, device: &Arc<dyn Device>, args: &Args) -> Result<BenchRecord> {
    let inputs = case.metas();
    let outputs = case.op.infer(&inputs)?;
    Ok(BenchRecord {
        version: env!("CARGO_PKG_VERSION").into(),
        device: describe(device.as_ref()),
        op: case.op.name().into(),
        params: case.label(),
        mode: mode(case).into(),
        dtype: case.op.element(&inputs, &outputs).name().into(),
        layout: LAYOUT.into(),
        kernel: "none".into(),
        seed: args.seed,
        ..BenchRecord::default()
    })
}

pub(super) fn drawn(large: &Large, seed: u64) -> Vec<Vec<u8>> {
    if large.parts.is_empty() { measure::inputs(&large.case, seed) } else { sampled::inputs(large, seed) }
}

/// Records of one case: the kernel that dispatch takes, or every rung. For the table's sizes the naive one is timed along
/// for the ratio; for large ones it would take the time of all the others.
fn bench(
    large: &Large,
    device: &Arc<dyn Device>,
    args: &Args,
    effort: Effort,
    ceiling: Ceiling,
) -> Result<Vec<BenchRecord>> {
    let case = &large.case;
    let inputs = case.metas();
    let outputs = case.op.infer(&inputs)?;
    let kernels = dispatch::candidates(&problem(case, &inputs, &outputs, device));
    let Some((first, naive)) = kernels.first().zip(kernels.last()) else {
        return Ok(vec![blank(case, device, args)?]);
    };
    let sampled = !large.parts.is_empty();
    let encoded = drawn(large, args.seed);
    let verdicts = if sampled { Vec::new() } else { verify::forward(case, device, args.seed) };
    let time = |kernel: &'static Kernel| -> Result<BenchRecord> {
        let mut record = blank(case, device, args)?;
        record.supported = true;
        record.kernel = kernel.label();
        record.kernel_hash = source_hash(kernel, device.info().kind);
        record.error_metric = "verified against the f64 reference".into();
        let verdict = if sampled {
            Some(sampled::check(&mut record, large, &encoded, kernel, device)?)
        } else {
            verdicts.iter().find(|o| o.kernel == kernel.label()).map(|o| o.verdict.clone())
        };
        if let Some(Verdict::Failed(reason)) = verdict {
            // A wrong kernel has no time.
            record.error = Some(reason);
            return Ok(record);
        }
        record.passed = true;
        measure::measure(&mut record, case, &encoded, kernel, device, effort)?;
        rate(&mut record, case, (&inputs, &outputs), device, ceiling);
        Ok(record)
    };
    let mut records = vec![time(first)?];
    let rungs = kernels.iter().skip(1).filter(|k| args.rungs || (!sampled && std::ptr::eq(**k, *naive)));
    for kernel in rungs {
        records.push(time(kernel)?);
    }
    let last = records.last().filter(|r| r.passed && r.kernel == naive.label());
    let slowest = last.map(|r| r.median_us);
    for record in &mut records {
        record.naive_ratio =
            slowest.filter(|_| record.passed && record.median_us > 0.0).map(|us| us / record.median_us);
    }
    Ok(records)
}

/// Counted work, and the ceiling that binds it.
fn rate(
    record: &mut BenchRecord,
    case: &Case,
    (inputs, outputs): (&[Meta], &[Meta]),
    device: &Arc<dyn Device>,
    ceiling: Ceiling,
) {
    let cost = case.op.cost(inputs, outputs);
    (record.flops, record.bytes) = (cost.flops as u64, cost.bytes as u64);
    let compute = cost.flops / (ceiling.gflops * 1e9).max(1.0);
    let memory = cost.bytes / (ceiling.bandwidth_gb * 1e9).max(1.0);
    // The measured ceiling is one of f32: integer units, and the matrix units of a GPU, have their own, which nothing
    // here measures.
    let integers = case.inputs.iter().any(|i| i.meta.dtype == DType::I8);
    let matrix_units = device.info().kind == Kind::Cuda && case.op.element(inputs, outputs) != DType::F32;
    if memory >= compute {
        (record.ceiling, record.ceiling_unit) = (Some(ceiling.bandwidth_gb), "GB/s".into());
    } else if !integers && !matrix_units {
        (record.ceiling, record.ceiling_unit) = (Some(ceiling.gflops), "GFLOP/s".into());
    }
    record.summarize();
}

/// Of the kernel's file for a kind of device; empty for Rust functions, which change with the program.
fn source_hash(kernel: &Kernel, kind: Kind) -> String {
    let entry = if kind == Kind::Cuda { kernel.cuda() } else { kernel.wgsl() };
    entry.map_or_else(String::new, |e| blake3::hash(e.file.text.as_bytes()).to_hex().to_string())
}

fn describe(device: &dyn Device) -> BenchDevice {
    let info = device.info();
    BenchDevice {
        backend: info.kind.name().into(),
        name: info.name.clone(),
        driver: info.driver.clone(),
        vendor_id: 0,
        device_id: 0,
        software: info.software,
        limits: measure::limits(device),
        registry: vec!["cpu".into(), "wgpu".into(), "cuda".into()],
    }
}

fn header() -> String {
    format!(
        "{:<22} {:<22} {:>10} {:>19} {:>15} {:>9} {:>8}  case",
        "op", "kernel", "p50", "p5 to p95", "rate", "ceiling", "x naive"
    )
}

/// One aligned line.
fn line(r: &BenchRecord) -> String {
    if !r.passed {
        let reason = r.error.as_deref().unwrap_or(if r.supported { "not timed" } else { "no kernel fits" });
        return format!(
            "{:<22} {:<22} {:>10} {reason}  {}",
            r.op,
            r.kernel,
            if r.supported { "WRONG" } else { "-" },
            r.params
        );
    }
    let time = |us: f64| milliseconds(us / 1e3);
    let rate = if r.ceiling_unit == "GB/s" {
        format!("{:.1} GB/s", r.bandwidth_gb)
    } else {
        format!("{:.1} GFLOP/s", r.gflops)
    };
    let share = r.ceiling_share.map_or("-".to_string(), percent);
    let naive = r.naive_ratio.map_or("-".to_string(), |x| format!("{x:.2}"));
    let mark = match (r.suspect(), &r.error) {
        (true, _) => "  SUSPECT: above this run's ceiling".to_string(),
        (false, Some(reason)) => format!("  VOID: {reason}"),
        (false, None) => String::new(),
    };
    format!(
        "{:<22} {:<22} {:>10} {:>19} {rate:>15} {share:>9} {naive:>8}  {}{mark}",
        r.op,
        r.kernel,
        time(r.median_us),
        format!("{} to {}", time(r.p5_us), time(r.p95_us)),
        r.params
    )
}

fn overhead(global: &Global, device: &Arc<dyn Device>) -> Result<()> {
    // The smallest case of the plainest op: all that is left is the way there.
    let smallest =
        verify::select("relu").into_iter().min_by_key(|c| c.inputs.iter().map(|i| i.meta.count()).sum::<usize>());
    let Some(case) = smallest else {
        return Err(Error::Usage { argument: "--overhead", value: "relu".into(), rule: "an op of the table".into() });
    };
    let (host, whole) = measure::overhead(device, &case)?;
    let (host_us, whole_us) = (host * 1e6, whole * 1e6);
    if global.json() {
        let id = device.info().id.clone();
        say_json(&Overhead { device: id, op: case.op.name(), case: case.label(), host_us, whole_us });
    } else {
        let Case { op, .. } = &case;
        say(format!(
            "{}: {} {}: host {host_us:.2} µs per dispatched op, {whole_us:.2} µs with the device's work",
            device.info().id,
            op.name(),
            case.label()
        ));
    }
    Ok(())
}
