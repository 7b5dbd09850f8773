//! `kernels cuda-check`: every CUDA kernel compiled by NVRTC, for GPUs that this machine need not have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::cli::{Global, say, say_json};
use crate::device::cuda::compile::{Usage, compile, nvrtc, target, usage};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::cuda::{ARCHS, assemble};
use crate::kernel::{Code, Entry, Kernel};
use crate::ops::FAMILIES;
use crate::report::{Alignment, Table};
use crate::verify::glob_match;

#[derive(clap::Args)]
pub struct Args {
    /// Only kernel files whose name fits (`*` and `?`), such as `matmul.cu`
    #[arg(long, default_value = "*", value_name = "GLOB")]
    file: String,
    /// Compute capabilities times 10
    #[arg(long, value_delimiter = ',', default_values_t = ARCHS)]
    arch: Vec<u32>,
}

/// One kernel file for one element type and set of constants.
type Module = (&'static str, DType, String);

/// What a record declares about its entry.
#[derive(Clone, Copy)]
struct Declared {
    arch: u32,
    tensor: &'static [&'static str],
    dtypes: &'static [DType],
}

/// One entry as compiled for one element type and architecture.
#[derive(Clone, Serialize)]
struct Compiled {
    file: &'static str,
    entry: String,
    element: &'static str,
    arch: String,
    registers: u32,
    shared_bytes: u32,
    stack_bytes: u32,
    spill_bytes: u32,
    /// What breaks a rule; empty for a sound kernel.
    failures: Vec<String>,
}

#[derive(Serialize)]
struct Summary {
    nvrtc: String,
    modules: usize,
    /// Modules that were compiled before: what is said of them is from the disk cache.
    cached: usize,
    kernels: usize,
    failed: usize,
    seconds: f64,
    entries: Vec<Compiled>,
    /// Modules that do not compile at all.
    errors: Vec<String>,
}

/// The table's CUDA modules, and what its records say of each entry.
fn modules(glob: &str) -> (BTreeMap<Module, Entry>, BTreeMap<(&'static str, &'static str), Declared>) {
    let mut modules = BTreeMap::new();
    let mut declared = BTreeMap::new();
    let mut add = |kernel: &Kernel| {
        let Some(entry) = kernel.cuda().filter(|e| glob_match(glob, e.file.name)) else { return };
        let tensor = if let Code::Cuda { tensor, .. } = kernel.code { tensor } else { &[] };
        declared
            .insert((entry.file.name, entry.entry), Declared { arch: kernel.arch(), tensor, dtypes: kernel.dtypes });
        for &element in kernel.dtypes {
            modules.insert((entry.file.name, element, format!("{:?}", entry.constants)), entry);
        }
    };
    let cases = FAMILIES.iter().flat_map(|f| (f.cases)());
    cases.for_each(|case| case.op.kernels().iter().for_each(&mut add));
    (modules, declared)
}

/// The part of a module's PTX that belongs to one entry.
fn body<'a>(ptx: &'a str, entry: &str) -> &'a str {
    let head = format!(".entry {entry}(");
    let start = ptx.find(&head).unwrap_or(ptx.len());
    let rest = &ptx[start..];
    let end = rest[1.min(rest.len())..].find(".entry ").map_or(rest.len(), |at| at + 1);
    &rest[..end]
}

/// A rung above v1 may not spill, and must contain the instructions that its record declares.
fn judge(
    file: &'static str,
    element: DType,
    arch: u32,
    usage: Usage,
    ptx: &str,
    declared: Option<&Declared>,
) -> Compiled {
    let mut failures = Vec::new();
    let above = declared.is_some_and(|d| d.arch > crate::kernel::cuda::LOWEST_ARCH) || usage.entry.contains("mma");
    if above && usage.spills > 0 {
        failures.push(format!("{} bytes spilled", usage.spills));
    }
    for instruction in declared.map_or(&[][..], |d| d.tensor) {
        if !body(ptx, &usage.entry).contains(instruction) {
            failures.push(format!("no {instruction}"));
        }
    }
    Compiled {
        file,
        entry: usage.entry,
        element: element.name(),
        arch: target(arch),
        registers: usage.registers,
        shared_bytes: usage.shared,
        stack_bytes: usage.stack,
        spill_bytes: usage.spills,
        failures,
    }
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    let (major, minor) = nvrtc()?;
    let start = Instant::now();
    let (modules, declared) = modules(&args.file);
    if modules.is_empty() {
        let rule = "a file of cuda/, such as matmul.cu".into();
        return Err(Error::Usage { argument: "--file", value: args.file.clone(), rule });
    }
    let jobs: Vec<_> =
        modules.iter().flat_map(|(key, entry)| args.arch.iter().map(move |&arch| (key, *entry, arch))).collect();
    let progress = global.progress(jobs.len());
    let one = |&((file, element, _), entry, arch): &(&Module, Entry, u32)| {
        let compiled =
            assemble(entry.file, *element, entry.constants, arch).and_then(|source| compile(file, &source, arch));
        progress.set_message(*file);
        progress.inc(1);
        let compiled = compiled.map_err(|e| format!("{file} for {element} on {}: {e}", target(arch)))?;
        // What a record declares of an entry holds from its architecture on; wgmma stays with the generation it was made for.
        let fits = |d: &&Declared| d.arch <= arch && (d.arch < 90 || d.arch == arch) && d.dtypes.contains(element);
        let judged = usage(&compiled.log).into_iter().map(|u| {
            let declared = declared.iter().find(|((f, e), _)| f == file && *e == u.entry).map(|(_, d)| d).filter(fits);
            judge(file, *element, arch, u, &compiled.ptx, declared)
        });
        Ok::<_, String>((compiled.cached, judged.collect::<Vec<_>>()))
    };
    let outcomes: Vec<_> = jobs.par_iter().map(one).collect();
    progress.finish_and_clear();
    let (mut entries, mut errors, mut cached) = (Vec::new(), Vec::new(), 0);
    for outcome in outcomes {
        match outcome {
            Ok((known, judged)) => {
                cached += usize::from(known);
                entries.extend(judged);
            }
            Err(error) => errors.push(error),
        }
    }
    let missing = declared.iter().filter(|((file, entry), d)| {
        let wanted = args.arch.iter().any(|&a| d.arch <= a && (d.arch < 90 || d.arch == a));
        wanted && !entries.iter().any(|c| c.file == *file && c.entry == *entry)
    });
    errors.extend(missing.map(|((file, entry), _)| format!("cuda/{file} has no entry {entry}")));
    let failed = errors.len() + entries.iter().filter(|c| !c.failures.is_empty()).count();
    let (kernels, total) = (entries.len(), entries.len() + errors.len());
    let seconds = start.elapsed().as_secs_f64();
    let (nvrtc, modules) = (format!("{major}.{minor}"), jobs.len());
    let summary = Summary { nvrtc, modules, cached, kernels, failed, seconds, entries, errors };
    if global.json() {
        say_json(&summary);
    } else {
        print(&summary, &args.arch);
    }
    if failed > 0 { Err(Error::Failed { what: "compiled kernels", failed, total }) } else { Ok(()) }
}

/// One line per entry, the worst over its element types.
fn print(summary: &Summary, archs: &[u32]) {
    let mut columns = vec![("file", Alignment::Left), ("entry", Alignment::Left), ("types", Alignment::Left)];
    let registers: Vec<String> = archs.iter().map(|&a| format!("registers {}", target(a))).collect();
    columns.extend(registers.iter().map(|r| (r.as_str(), Alignment::Right)));
    columns.extend([("shared", Alignment::Right), ("stack", Alignment::Right), ("spills", Alignment::Right)]);
    let mut table = Table::new(&columns);
    let names: BTreeSet<(&str, &str)> = summary.entries.iter().map(|c| (c.file, c.entry.as_str())).collect();
    for (file, entry) in names {
        let of: Vec<&Compiled> = summary.entries.iter().filter(|c| c.file == file && c.entry == entry).collect();
        let most = |f: fn(&Compiled) -> u32| of.iter().map(|c| f(c)).max().unwrap_or(0).to_string();
        let types: BTreeSet<&str> = of.iter().map(|c| c.element).collect();
        let mut row = vec![file.to_string(), entry.to_string(), types.into_iter().collect::<Vec<_>>().join(" ")];
        row.extend(archs.iter().map(|&a| {
            let here = of.iter().filter(|c| c.arch == target(a)).map(|c| c.registers).max();
            here.map_or("-".to_string(), |r| r.to_string())
        }));
        row.extend([most(|c| c.shared_bytes), most(|c| c.stack_bytes), most(|c| c.spill_bytes)]);
        table.row(row);
    }
    say(table.terminal());
    for c in summary.entries.iter().filter(|c| !c.failures.is_empty()) {
        say(format!("FAILED {} {} {} {}: {}", c.file, c.entry, c.element, c.arch, c.failures.join(", ")));
    }
    for error in &summary.errors {
        say(format!("FAILED {error}"));
    }
    let Summary { nvrtc, modules, cached, kernels, failed, seconds, .. } = summary;
    say(format!(
        "NVRTC {nvrtc}: {kernels} kernels of {modules} modules, {} compiled, {cached} from the cache; {failed} failed, in \
         {seconds:.1} s",
        modules - cached
    ));
}
