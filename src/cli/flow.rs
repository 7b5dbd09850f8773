//! `espalier run`, and `report` on what it leaves.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Global, ranks, say, say_json};
use crate::console;
use crate::error::{Error, Result};
use crate::pipeline::post::Post;
use crate::recipe::{Options, Recipe, plan, run_folder};
use crate::report::{self, Alignment, RunReport, Table};
use crate::train::trainer;

/// Train, compress, fine-tune, measure: the whole flow of a recipe
#[derive(clap::Args)]
pub struct Run {
    /// A recipe file; without one the embedded quick recipe runs
    recipe: Option<PathBuf>,
    /// Override a key, for example --set teacher.steps=100; --set experts=false leaves a stage out
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print the plan with shapes, parameters, bytes and estimated memory; touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Run folder [default: runs/NAME]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Start anew where a run stands already: removes what that run wrote, and nothing else
    #[arg(long)]
    overwrite: bool,
    /// Take finished stages of the same settings, text and predecessors from another run's folder; may be repeated
    #[arg(long, value_name = "RUN")]
    reuse: Vec<PathBuf>,
    /// Seed of weights, batches and splits; the same as --set seed=N
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=crate::recipe::schema::MAX_SEED))]
    seed: Option<u64>,
}

pub fn run(global: &Global, args: Run) -> Result<()> {
    let mut sets = args.sets;
    sets.extend(args.seed.map(|s| format!("seed={s}")));
    let recipe = Recipe::load(args.recipe.as_deref(), &sets);
    // A mistake in it is for one of several processes to say.
    let heartbeat = recipe.as_ref().map_or(Duration::from_secs(10), Recipe::heartbeat);
    ranks::among(heartbeat, |others| {
        let recipe = recipe?;
        if args.dry_run {
            return dry_run(global, &recipe, others.map(|post| post.ranks()));
        }
        whole(global, &recipe, (args.out, args.overwrite, args.reuse), others)
    })
}

/// The flow itself, which the first process alone runs.
fn whole(
    global: &Global,
    recipe: &Recipe,
    (out, overwrite, reuse): (Option<PathBuf>, bool, Vec<PathBuf>),
    ranks: Option<Arc<Post>>,
) -> Result<()> {
    let device = global.open()?;
    let out = out.unwrap_or_else(|| Path::new("runs").join(&recipe.name));
    if let Some(run) = reuse.iter().find(|run| !run.join(run_folder::RECIPE).is_file()) {
        let rule = "folders of runs".into();
        return Err(Error::Usage { argument: "--reuse", value: run.display().to_string(), rule });
    }
    let options = Options { out, overwrite, reuse, progress: !global.quiet, command: command_line(), ranks };
    let html = crate::recipe::run(recipe, &device, &options)?;
    let report = report::read(html.with_file_name("report.json"))?;
    if global.json() {
        say_json(&report);
    } else {
        say(report::table::stages(&report));
        say(&report.summary);
        say(format!("report: {}", html.display()));
    }
    Ok(())
}

/// Ctrl-C, a termination or a closed terminal: the training saves after its step and ends.
///
/// To be called before the first thread is started.
pub fn stop_on_signal() {
    #[cfg(unix)]
    keep_hangup_ignored();
    // A second signal finds the default handler's job done by the flag: stop at once.
    let _ = ctrlc::set_handler(|| {
        if trainer::STOP.swap(true, std::sync::atomic::Ordering::SeqCst) {
            std::process::exit(5);
        }
        console::tell("stopping after this step or batch; once more stops at once");
    });
}

/// `nohup` ignores the hang-up so that a closed terminal changes nothing. The handler would undo that; a signal that is
/// blocked here, and so in every thread that comes later, does not reach it.
#[cfg(unix)]
fn keep_hangup_ignored() {
    use nix::sys::signal::{SigSet, Signal};
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    if ignored.is_some_and(|mask| mask >> (Signal::SIGHUP as u32 - 1) & 1 == 1) {
        let mut hangup = SigSet::empty();
        hangup.add(Signal::SIGHUP);
        let _ = hangup.thread_block();
    }
}

/// This process's command line, so that a shell reads the same arguments from it.
fn command_line() -> String {
    let arguments = std::env::args_os().map(|a| quoted(&a.to_string_lossy()));
    arguments.collect::<Vec<_>>().join(" ")
}

fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_string();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

/// The trainings in stages, with what a device of each stage holds.
fn say_spread(planned: &[plan::PlannedStage]) {
    use Alignment::{Left, Right};
    let mut table =
        Table::new(&[("training", Left), ("pipeline", Left), ("micro-batches", Right), ("memory of a stage", Left)]);
    let mut spread = false;
    for stage in planned {
        let Some(pipeline) = &stage.pipeline else { continue };
        spread = true;
        let schedule = pipeline.schedule;
        let replicas = &pipeline.replicas;
        let stages = match replicas.len() {
            0 => format!("as many stages as pay, {schedule}"),
            n if replicas.iter().all(|r| *r == 1) => format!("{n} stages, {schedule}"),
            n => format!("{n} stages on {replicas:?} devices, {schedule}"),
        };
        let memory: Vec<String> = pipeline.memory.iter().map(|bytes| report::bytes(*bytes as u64)).collect();
        let memory = if memory.is_empty() { "known once measured".into() } else { memory.join(", ") };
        table.row(vec![stage.stage.clone(), stages, pipeline.micro_batches.to_string(), memory]);
    }
    if spread {
        say(table.terminal());
        say("memory is that of even cuts; a run cuts by what the pieces take, which it measures");
    }
}

/// `ranks`: processes, where there are several.
fn dry_run(global: &Global, recipe: &Recipe, ranks: Option<usize>) -> Result<()> {
    plan::check_files(recipe)?;
    plan::check_shapes(recipe)?;
    let mut stages = plan::plan(recipe);
    plan::plan_spread(recipe, &mut stages)?;
    if recipe.pipeline.is_some() {
        plan::check_devices(recipe, &global.open()?, ranks)?;
    }
    if global.json() {
        say_json(&stages);
        return Ok(());
    }
    use Alignment::{Left, Right};
    let columns = [("stage", Left), ("shape", Left), ("steps", Right), ("parameters", Right), ("weights", Right)];
    let mut table = Table::new(&[&columns[..], &[("memory while training", Right)]].concat());
    for s in &stages {
        table.row(vec![
            s.stage.clone(),
            s.shape.clone(),
            s.steps.to_string(),
            report::count(s.parameters as u64),
            report::bytes(s.bytes as u64),
            report::bytes(s.estimated_memory as u64),
        ]);
    }
    say(table.terminal());
    say_spread(&stages);
    let largest = stages.iter().map(|s| s.estimated_memory as u64).max().unwrap_or(0);
    if let Some(memory) = plan::physical_memory().filter(|memory| largest > *memory) {
        let (largest, memory) = (report::bytes(largest), report::bytes(memory));
        console::warn(format_args!("up to {largest} are estimated; this machine has {memory}"));
    }
    Ok(())
}

/// Put finished runs side by side
#[derive(clap::Args)]
pub struct Report {
    /// Run folders
    #[arg(required = true)]
    runs: Vec<PathBuf>,
}

pub fn compare_runs(global: &Global, args: Report) -> Result<()> {
    for path in &args.runs {
        let file = path.join("report.json");
        if !file.exists() {
            return Err(super::model::without_result(path, "report"));
        }
        let stages = report::read(file)?.stages;
        if global.json() {
            say_json(&serde_json::json!({ "run": path.to_string_lossy(), "stages": stages }));
            continue;
        }
        say(path.display());
        say(report::table::stages(&RunReport { stages, ..RunReport::default() }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_shell_reads_the_same_arguments() {
        let pairs = [
            ("--set", "--set"),
            ("data.corpus={ terms = { pairs = 600 } }", "'data.corpus={ terms = { pairs = 600 } }'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("$HOME", "'$HOME'"),
        ];
        for (argument, text) in pairs {
            assert_eq!(quoted(argument), text);
        }
    }
}
