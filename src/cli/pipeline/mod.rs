//! `espalier pipeline`: what pieces of a model cost, and what a cut and a schedule of them will.

mod plan;
mod profile;
mod simulate;
mod trace;

use clap::Subcommand;

use super::{Global, say};
use crate::error::{Error, Result};
use crate::pipeline::profile::MAX_SECONDS;
use crate::pipeline::{Costs, Event, Kind, Schedule, simulate as price};
use crate::report::Alignment;
use crate::report::Table;

#[derive(Subcommand)]
pub enum Pipeline {
    /// Measure what each piece of a recipe's model costs on a device
    Profile(profile::Args),
    /// Where to cut a model, over how many devices to spread its stages, and whether one device is better
    Plan(plan::Args),
    /// Time, idle share and memory of a schedule, with a chart and a trace of it
    Simulate(simulate::Args),
    /// What a step of a run's trainings took, stage by stage, beside what was predicted
    Trace(trace::Args),
    /// A schedule as a grid: a line per time step, a column per stage
    Schedule(Grid),
}

pub fn run(global: &Global, command: Pipeline) -> Result<()> {
    match command {
        Pipeline::Profile(args) => profile::run(global, &args),
        Pipeline::Plan(args) => plan::run(global, &args),
        Pipeline::Simulate(args) => simulate::run(global, &args),
        Pipeline::Trace(args) => trace::run(global, &args),
        Pipeline::Schedule(args) => grid(global, &args),
    }
}

/// A schedule's name on the command line.
fn kind(text: &str) -> std::result::Result<Kind, String> {
    text.parse()
}

#[derive(clap::Args)]
pub struct Grid {
    /// sequential, gpipe, 1f1b, dapple-a[:CAP], dapple-b[:CAP], interleaved[:CHUNKS], zb-h1, zb-h2, zb-v, v-half or v-min
    #[arg(value_parser = kind)]
    kind: Kind,
    /// Stages, each on a device of its own
    #[arg(long, default_value_t = 4, value_name = "N")]
    stages: usize,
    /// Parts that the batch of a step is cut into
    #[arg(long, default_value_t = 8, value_name = "N")]
    micro_batches: usize,
}

/// Wider grids fit no terminal and no eye; their CSV is for programs.
const MAX_GRID: usize = 100_000;

fn grid(global: &Global, args: &Grid) -> Result<()> {
    let schedule = Schedule::new(args.kind, args.stages, args.micro_batches)?;
    let cells: usize = schedule.stages.iter().map(Vec::len).sum();
    if global.json() {
        let rows: Vec<Vec<String>> = schedule.stages.iter().map(|s| s.iter().map(Event::to_string).collect()).collect();
        let (name, micros) = (&schedule.name, schedule.micros);
        let value =
            serde_json::json!({ "schedule": name, "micro_batches": micros, "homes": schedule.homes, "stages": rows });
        super::say_json(&value);
        return Ok(());
    }
    if cells > MAX_GRID {
        let rule = format!("a grid of at most {MAX_GRID} events; `pipeline simulate --write-csv` writes larger ones");
        return Err(Error::Usage { argument: "--stages, --micro-batches", value: format!("{cells} events"), rule });
    }
    // Each event one step long, as in PyTorch's grid; a whole backward is one event.
    let (input, weight) = if args.kind.splits_backward() { (1.0, 1.0) } else { (0.5, 0.5) };
    let timeline = price(&schedule, &Costs::uniform(schedule.chunks(), 1.0, input, weight))?;
    let steps = timeline.seconds.round() as usize;
    let names: Vec<String> = (0..args.stages).map(|stage| format!("stage {stage}")).collect();
    let columns = names.iter().map(|name| (name.as_str(), Alignment::Left));
    let columns: Vec<_> = [("step", Alignment::Right)].into_iter().chain(columns).collect();
    let mut rows: Vec<Vec<String>> = (0..steps)
        .map(|step| [step.to_string()].into_iter().chain(vec![String::new(); args.stages]).collect())
        .collect();
    for (stage, spans) in timeline.spans.iter().enumerate() {
        for span in spans {
            if let Some(row) = rows.get_mut(span.start.round() as usize) {
                row[stage + 1] = span.activity.to_string();
            }
        }
    }
    let mut table = Table::new(&columns);
    rows.into_iter().for_each(|row| table.row(row));
    say(table.terminal());
    Ok(())
}

/// Values with commas between them, of what a profile may hold.
fn numbers<const N: usize>(text: &str) -> std::result::Result<[f64; N], String> {
    let rule = || format!("{N} numbers from 0 to 1e9, with commas between them");
    let values: Vec<f64> = text.split(',').map(|v| v.trim().parse().map_err(|_| rule())).collect::<Result<_, _>>()?;
    let values: [f64; N] = values.try_into().map_err(|_| rule())?;
    if values.iter().all(|v| (0.0..=MAX_SECONDS).contains(v)) { Ok(values) } else { Err(rule()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_kind() {
        use clap::CommandFactory;
        let mut command = crate::cli::Cli::command();
        let command = command.find_subcommand_mut("pipeline").and_then(|c| c.find_subcommand_mut("schedule")).unwrap();
        assert!(command.render_long_help().to_string().contains(crate::pipeline::schedule::KINDS));
    }

    #[test]
    fn numbers_are_read_strictly() {
        assert_eq!(numbers::<3>("1, 2.5,0"), Ok([1.0, 2.5, 0.0]));
        for wrong in ["", "1,2", "1,2,3,4", "1,2,x", "1,2,-3", "1,2,nan", "1,2,inf", "1,2,1e308"] {
            assert!(numbers::<3>(wrong).is_err(), "{wrong}");
        }
    }
}
