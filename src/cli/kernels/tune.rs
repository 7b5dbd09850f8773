//! `kernels tune`: times every record that fits the table's real-model sizes on one device, and keeps which is fastest for
//! dispatch (`tuned`).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::bench::{Sizes, cases, drawn, problem};
use super::measure::{Slot, slot};
use crate::cli::{Global, say, say_json};
use crate::console;
use crate::device::turns::{median, take_turns};
use crate::device::{Device, Kind};
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::op::Case;
use crate::ops::large::Large;
use crate::tuned::{self, Choice, Table};
use crate::verify::{self, Verdict};

/// Rounds of a comparison.
const ROUNDS: usize = 7;
/// What another record must save: less is the measurement's own noise.
const GAIN: f64 = 0.05;
/// A record this many times slower than the fastest takes no turns: no load of the machine makes up for that.
const HOPELESS: f64 = 8.0;

#[derive(clap::Args)]
pub struct Args {
    /// Only ops whose name fits (`*` and `?`)
    #[arg(long, default_value = "*", value_name = "GLOB")]
    op: String,
    /// Which sizes; what earlier calls found for others stays
    #[arg(long, value_enum, default_value_t = Sizes::Table)]
    sizes: Sizes,
    /// Print what was measured and keep nothing
    #[arg(long)]
    dry_run: bool,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A comparison of the records that fit a case, as `--format json` prints it.
#[derive(Serialize)]
struct Compared {
    op: &'static str,
    case: String,
    kind: String,
    #[serde(flatten)]
    choice: Choice,
    /// Records that fit.
    fit: usize,
    /// Those that took turns, in the table's order; the first runs without tuning.
    timed: Vec<Timed>,
}

#[derive(Serialize)]
struct Timed {
    kernel: String,
    /// Median.
    us: f64,
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    let cases = cases(args.sizes, &args.op, false)?;
    let device = global.open()?;
    let info = device.info();
    if matches!(info.kind, Kind::Reference | Kind::Null) || info.id.starts_with("cuda-host") {
        let rule = "a device whose time says something".into();
        return Err(Error::Usage { argument: "--device", value: info.id.clone(), rule });
    }
    let path = tuned::file(info);
    // What cannot be used was named when the device was opened.
    let mut table = tuned::read(&path, info).ok().flatten().unwrap_or_else(|| Table::new(info));
    let (mut seen, mut failed) = (BTreeSet::new(), 0);
    let progress = global.progress(cases.len());
    for large in &cases {
        progress.set_message(large.case.op.name());
        match compare(large, &device, args.seed, &mut seen) {
            Ok(Some(compared)) => {
                progress.suspend(|| if global.json() { say_json(&compared) } else { say(line(&compared)) });
                table.choices.insert(compared.kind, compared.choice);
                if !args.dry_run {
                    // Each as it comes: a run that is cut short loses nothing.
                    tuned::write(&path, &table)?;
                }
            }
            Ok(None) => {}
            Err(e @ Error::DeviceLost { .. }) => return Err(e),
            // One case that cannot run takes no other with it.
            Err(e) => {
                failed += 1;
                progress.suspend(|| console::warn(format_args!("{}: {e}", large.case.label())));
            }
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    if !global.json() {
        let kept = if args.dry_run { "that would be kept in" } else { "in" };
        let choices = match table.choices.len() {
            0 => "nothing to choose: one kernel fits each case".into(),
            n => format!("choices {kept} {}: {n}", path.display()),
        };
        say(choices);
    }
    if failed > 0 { Err(Error::Failed { what: "tuned cases", failed, total: cases.len() }) } else { Ok(()) }
}

fn line(compared: &Compared) -> String {
    let Compared { op, case, fit, choice: Choice { kernel, us, first_us }, .. } = compared;
    let gain = if us < first_us { format!(", {:.2} x as fast as the first", first_us / us) } else { String::new() };
    format!("{op} {case}: {kernel} of {fit}, {us:.0} us{gain}")
}

/// `None` where there is nothing to choose, or a case before was of the same kind.
fn compare(
    large: &Large,
    device: &Arc<dyn Device>,
    seed: u64,
    seen: &mut BTreeSet<String>,
) -> Result<Option<Compared>> {
    let case = &large.case;
    let metas = case.metas();
    let outputs = case.op.infer(&metas)?;
    let problem = problem(case, &metas, &outputs, device);
    let fitting: Vec<&'static Kernel> = problem.fitting().collect();
    let Some(kind) = tuned::kind(&problem).filter(|kind| fitting.len() > 1 && seen.insert(kind.clone())) else {
        return Ok(None);
    };
    let encoded = drawn(large, seed);
    let slot = slot(case, device, &encoded)?;
    let agreeing = agreeing(case, device, &slot, &encoded, &fitting)?;
    let quickest = agreeing.iter().map(|(_, seconds)| *seconds).fold(f64::INFINITY, f64::min);
    // The first stays, whatever it takes: it is what others are held against.
    let worth = agreeing.iter().enumerate().filter(|(i, (_, seconds))| *i == 0 || *seconds < HOPELESS * quickest);
    let worth: Vec<&'static Kernel> = worth.map(|(_, (kernel, _))| *kernel).collect();
    let works: Vec<_> = worth.iter().map(|kernel| || slot.run(kernel, case)).collect();
    let works: Vec<&dyn Fn() -> Result<()>> = works.iter().map(|work| work as &dyn Fn() -> Result<()>).collect();
    let times = take_turns(device, &works, ROUNDS)?;
    let gain = |i: usize| {
        let ratios: Vec<f64> = times[0].iter().zip(&times[i]).map(|(first, own)| first / own).collect();
        median(&ratios)
    };
    let best = (1..worth.len()).max_by(|&a, &b| gain(a).total_cmp(&gain(b))).unwrap_or(0);
    let taken = if gain(best) * (1.0 - GAIN) > 1.0 { best } else { 0 };
    let timed = worth.iter().zip(&times).map(|(k, times)| Timed { kernel: k.label(), us: 1e6 * median(times) });
    let timed: Vec<Timed> = timed.collect();
    let choice = Choice { kernel: timed[taken].kernel.clone(), us: timed[taken].us, first_us: timed[0].us };
    Ok(Some(Compared { op: case.op.name(), case: case.label(), kind, choice, fit: fitting.len(), timed }))
}

/// The records that give the first one's results, within twice the case's bounds for both, and the seconds of one run; others
/// are named and never chosen.
fn agreeing(
    case: &Case,
    device: &Arc<dyn Device>,
    slot: &Slot,
    encoded: &[Vec<u8>],
    kernels: &[&'static Kernel],
) -> Result<Vec<(&'static Kernel, f64)>> {
    let once = |kernel: &Kernel| -> Result<f64> {
        let start = Instant::now();
        slot.run(kernel, case)?;
        device.sync()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let results = |kernel: &Kernel| -> Result<Vec<Vec<f64>>> {
        slot.refill(encoded)?;
        slot.run(kernel, case)?;
        slot.outputs.iter().map(|y| Ok(y.dtype().decode(&y.to_bytes()?))).collect()
    };
    let metas: Vec<_> = slot.outputs.iter().map(|y| y.meta()).collect();
    let wanted = results(kernels[0])?;
    let factor = 2.0 * case.loosened.map_or(1.0, |(factor, _)| factor);
    let case = case.clone().loosened(factor, "two kernels, each with its own error");
    let mut agreeing = vec![(kernels[0], once(kernels[0])?)];
    for &kernel in &kernels[1..] {
        match verify::compare(&case, case.tolerance, &metas, &wanted, &results(kernel)?) {
            Verdict::Passed => agreeing.push((kernel, once(kernel)?)),
            Verdict::Failed(reason) | Verdict::Skipped(reason) => {
                console::warn(format_args!("{} [{}]: {reason}", case.label(), kernel.label()));
            }
        }
    }
    Ok(agreeing)
}
