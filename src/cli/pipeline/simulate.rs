//! `pipeline simulate`: a schedule in numbers and pictures.

use std::path::PathBuf;

use serde::Serialize;

use super::plan::time;
use super::{kind, numbers};
use crate::atomic::write_atomic;
use crate::cli::{Global, refuse_collisions, say, say_json};
use crate::error::{Error, Result};
use crate::pipeline::profile::Profile;
use crate::pipeline::simulate::{StageUse, simulate_as};
use crate::pipeline::{ChunkCost, Costs, Kind, Link, Schedule, Timeline, csv, trace};
use crate::report::{self, Alignment, Table};

#[derive(clap::Args)]
pub struct Args {
    /// sequential, gpipe, 1f1b, dapple-a[:CAP], dapple-b[:CAP], interleaved[:CHUNKS], zb-h1, zb-h2, zb-v, v-half or v-min
    #[arg(long, value_parser = kind, default_value = "1f1b", value_name = "KIND")]
    schedule: Kind,
    /// A schedule in PyTorch's form instead: a row per stage, cells such as 0F0, 1I2 or 2SEND_F0
    #[arg(long, value_name = "FILE", conflicts_with_all = ["schedule", "stages", "micro_batches", "compare"])]
    csv: Option<PathBuf>,
    /// Stages, each on a device of its own
    #[arg(long, default_value_t = 4, value_name = "N")]
    stages: usize,
    /// Parts that the batch of a step is cut into
    #[arg(long, default_value_t = 8, value_name = "N")]
    micro_batches: usize,
    /// What the model's pieces cost: a file of `pipeline profile`; the pieces are cut so that the slowest chunk is fastest
    #[arg(long, value_name = "FILE", conflicts_with = "costs")]
    profile: Option<PathBuf>,
    /// Seconds of a stage for one micro-batch: forward, gradients of inputs, gradients of weights
    #[arg(long, value_parser = numbers::<3>, default_value = "1,1,1", value_name = "F,I,W")]
    costs: [f64; 3],
    /// Seconds of a message between stages, without a profile
    #[arg(long, value_parser = numbers::<1>, default_value = "0", value_name = "SECONDS", conflicts_with = "profile")]
    message: [f64; 1],
    /// All kinds of schedules beside each other
    #[arg(long)]
    compare: bool,
    /// Draws the step
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Writes the step for ui.perfetto.dev or chrome://tracing
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Writes the schedule in PyTorch's form
    #[arg(long, value_name = "FILE")]
    write_csv: Option<PathBuf>,
}

/// Where a schedule's costs come from.
enum Source<'a> {
    Profile(&'a Profile),
    Stage { costs: [f64; 3], message: f64 },
}

impl Source<'_> {
    fn costs(&self, schedule: &Schedule) -> Result<Costs> {
        match self {
            Self::Profile(profile) => Ok(profile.costs(&profile.cuts(schedule)?, schedule)),
            Self::Stage { costs: [forward, input, weight], message } => {
                // The chunks of a stage share its time and its activations.
                let share = schedule.stages.len() as f64 / schedule.chunks() as f64;
                let chunk = ChunkCost {
                    forward: forward * share,
                    backward_input: input * share,
                    backward_weight: weight * share,
                    activation_bytes: share,
                    output_bytes: *message,
                };
                let link = Link { latency: 0.0, bytes_per_second: 1.0, handling: 0.0 };
                Ok(Costs { chunks: vec![chunk; schedule.chunks()], link, sizes: Vec::new(), updates: Vec::new() })
            }
        }
    }

    /// Activations in bytes, or in those of a stage for one micro-batch.
    fn memory(&self, value: f64) -> String {
        match self {
            Self::Profile(_) => report::bytes(value as u64),
            Self::Stage { .. } => report::number(value),
        }
    }
}

#[derive(Serialize)]
struct Compared {
    kind: Kind,
    seconds: f64,
    idle_share: f64,
    inner_bubble: f64,
    peak_activation_bytes: f64,
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    refuse_collisions(
        &[("--profile", args.profile.as_deref()), ("--csv", args.csv.as_deref())],
        &[
            ("--svg", args.svg.as_deref()),
            ("--trace", args.trace.as_deref()),
            ("--write-csv", args.write_csv.as_deref()),
        ],
    )?;
    let profile = args.profile.as_deref().map(Profile::read).transpose()?;
    let source = match &profile {
        Some(profile) => Source::Profile(profile),
        None => Source::Stage { costs: args.costs, message: args.message[0] },
    };
    let schedule = match &args.csv {
        Some(path) => csv::read(path)?,
        None => Schedule::new(args.schedule, args.stages, args.micro_batches)?,
    };
    let drawn = args.svg.is_some() || args.trace.is_some();
    let timeline = simulate_as(&schedule, &source.costs(&schedule)?, drawn)?;
    let (compared, left_out) = if args.compare { compare(args, &source)? } else { (Vec::new(), Vec::new()) };
    if let Some(path) = &args.svg {
        write_atomic(path, report::gantt(&timeline).as_bytes())?;
    }
    if let Some(path) = &args.trace {
        trace::write(path, &timeline)?;
    }
    if let Some(path) = &args.write_csv {
        csv::write(path, &schedule)?;
    }
    if global.json() {
        say_json(&serde_json::json!({
            "schedule": timeline.name, "stages": timeline.stages, "micro_batches": schedule.micros,
            "seconds": timeline.seconds, "idle_share": timeline.idle_share(), "inner_bubble": timeline.inner_bubble(),
            "compared": compared, "left_out": left_out,
        }));
        return Ok(());
    }
    print(&schedule, &timeline, &source);
    if !compared.is_empty() {
        say(format!("\n{}", comparison(&compared, &source)));
    }
    for (kind, reason) in left_out {
        say(format!("{kind}: {reason}"));
    }
    Ok(())
}

/// Every kind that the profile has pieces enough for, and why the others are left out.
fn compare(args: &Args, source: &Source) -> Result<(Vec<Compared>, Vec<(Kind, String)>)> {
    let (mut compared, mut left_out) = (Vec::new(), Vec::new());
    for kind in Kind::ALL {
        let schedule = Schedule::new(kind, args.stages, args.micro_batches)?;
        let costs = match source.costs(&schedule) {
            Ok(costs) => costs,
            Err(Error::Parameter { .. }) => {
                left_out.push((kind, format!("needs {} pieces", schedule.chunks())));
                continue;
            }
            Err(e) => return Err(e),
        };
        let timeline = simulate_as(&schedule, &costs, false)?;
        compared.push(Compared {
            kind,
            seconds: timeline.seconds,
            idle_share: timeline.idle_share(),
            inner_bubble: timeline.inner_bubble(),
            peak_activation_bytes: timeline.stages.iter().map(|s| s.peak_activation_bytes).fold(0.0, f64::max),
        });
    }
    Ok((compared, left_out))
}

/// More stages are summed up.
const LISTED: usize = 64;

fn print(schedule: &Schedule, timeline: &Timeline, source: &Source) {
    let (stages, micros) = (schedule.stages.len(), schedule.micros);
    let name = report::plain_text(&timeline.name);
    say(format!("{name}: {stages} stages, {} chunks, {micros} micro-batches", schedule.chunks()));
    let idle = report::percent(timeline.idle_share());
    say(format!(
        "step {}, idle {idle}, longest bubble inside {}",
        time(timeline.seconds),
        time(timeline.inner_bubble())
    ));
    use Alignment::Right;
    let mut table = Table::new(&[
        ("stage", Right),
        ("busy", Right),
        ("first", Right),
        ("last", Right),
        ("activations held", Right),
        ("their size", Right),
    ]);
    let row = |index: usize, s: &StageUse| {
        let times = [s.busy, s.first, s.last].map(time);
        let held = [s.peak_activations.to_string(), source.memory(s.peak_activation_bytes)];
        [index.to_string()].into_iter().chain(times).chain(held).collect()
    };
    timeline.stages.iter().enumerate().take(LISTED).for_each(|(index, s)| table.row(row(index, s)));
    say(table.terminal());
    if stages > LISTED {
        let most = timeline.stages.iter().map(|s| s.peak_activation_bytes).fold(0.0, f64::max);
        say(format!("and {} more; the most activations of any are {}", stages - LISTED, source.memory(most)));
    }
}

fn comparison(compared: &[Compared], source: &Source) -> String {
    use Alignment::{Left, Right};
    let mut table = Table::new(&[
        ("schedule", Left),
        ("step", Right),
        ("idle", Right),
        ("bubble inside", Right),
        ("most activations", Right),
        ("speed over 1f1b", Right),
    ]);
    let base = compared.iter().find(|c| c.kind == Kind::OneForwardOneBackward).map_or(f64::NAN, |c| c.seconds);
    for c in compared {
        table.row(vec![
            c.kind.to_string(),
            time(c.seconds),
            report::percent(c.idle_share),
            time(c.inner_bubble),
            source.memory(c.peak_activation_bytes),
            if base > 0.0 { format!("{:.2} x", base / c.seconds) } else { String::new() },
        ]);
    }
    table.terminal()
}
