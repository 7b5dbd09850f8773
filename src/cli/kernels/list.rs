//! `kernels list`: op x device x storage type, as the records and their predicates have it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::cli::{Format, Global, say, say_json};
use crate::device::{Class, Device, Kind, Limits, NullDevice};
use crate::dispatch;
use crate::dtype::DType;
use crate::kernel::Problem;
use crate::op::Case;
use crate::ops::FAMILIES;
use crate::report::{Alignment, Table};
use crate::verify::glob_match;

#[derive(clap::Args)]
pub struct Args {
    /// Only ops whose name fits (`*` and `?`)
    #[arg(long, default_value = "*", value_name = "GLOB")]
    op: String,
}

/// What one op can do.
#[derive(Debug, Default, Serialize)]
struct Support {
    family: &'static str,
    op: &'static str,
    /// Rows of the table.
    cases: usize,
    /// Whether a gradient is differenced.
    gradient: bool,
    /// Storage types by device kind.
    devices: BTreeMap<&'static str, Vec<&'static str>>,
    /// Kernel records by device kind.
    kernels: BTreeMap<&'static str, BTreeSet<&'static str>>,
}

/// Device kinds that kernels are written for.
const KINDS: [Kind; 2] = [Kind::Cpu, Kind::Wgpu];

/// The type a case stands for in the table: int8 where integers are multiplied, else the op's element type.
fn storage(case: &Case, element: DType) -> DType {
    if case.inputs.iter().any(|i| i.meta.dtype == DType::I8) { DType::I8 } else { element }
}

/// Support of every op whose name fits `glob`, in the order of the families.
fn support(glob: &str) -> Vec<Support> {
    let devices = KINDS.map(|kind| NullDevice::new(kind, Class::Cpu, Limits::webgpu()));
    let mut found: Vec<Support> = Vec::new();
    for family in FAMILIES {
        for case in (family.cases)() {
            let op = case.op.name();
            if !glob_match(glob, op) {
                continue;
            }
            let index = found.iter().position(|s| s.op == op).unwrap_or_else(|| {
                found.push(Support { family: family.name, op, ..Support::default() });
                found.len() - 1
            });
            let entry = &mut found[index];
            entry.cases += 1;
            entry.gradient |= case.grad;
            let metas = case.metas();
            let Ok(out_metas) = case.op.infer(&metas) else { continue };
            let element = case.op.element(&metas, &out_metas);
            for device in &devices {
                let info = device.info();
                let problem = Problem { op: case.op.as_ref(), inputs: &metas, outputs: &out_metas, element, info };
                let kernels = dispatch::candidates(&problem);
                if kernels.is_empty() {
                    continue;
                }
                let kind = info.kind.name();
                entry.kernels.entry(kind).or_default().extend(kernels.iter().map(|k| k.name));
                let types = entry.devices.entry(kind).or_default();
                let name = storage(&case, element).name();
                if !types.contains(&name) {
                    types.push(name);
                }
            }
        }
    }
    let order = |name: &&'static str| ["f32", "f16", "bf16", "i8", "u32"].iter().position(|n| n == name);
    found.iter_mut().flat_map(|s| s.devices.values_mut()).for_each(|types| types.sort_by_key(order));
    found
}

fn table(support: &[Support]) -> Table {
    let mut columns = vec![("family", Alignment::Left), ("op", Alignment::Left), ("gradient", Alignment::Left)];
    columns.extend(KINDS.map(|k| (k.name(), Alignment::Left)));
    columns.push(("cases", Alignment::Right));
    let mut table = Table::new(&columns);
    for s in support {
        let mut row = vec![s.family.to_string(), s.op.to_string(), if s.gradient { "yes" } else { "" }.to_string()];
        row.extend(KINDS.map(|k| s.devices.get(k.name()).map_or("-".to_string(), |types| types.join(" "))));
        row.push(s.cases.to_string());
        table.row(row);
    }
    table
}

pub fn run(global: &Global, args: &Args) {
    let support = support(&args.op);
    match global.format {
        Format::Json => say_json(&support),
        Format::Markdown => say(table(&support).markdown().trim_end()),
        Format::Text => say(table(&support).terminal()),
    }
}
