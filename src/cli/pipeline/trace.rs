//! `pipeline trace`: the step that a run has drawn of each of its trainings, in numbers.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::plan::time;
use crate::atomic::write_atomic;
use crate::cli::{Global, refuse_collisions, say, say_json};
use crate::error::{Error, Result};
use crate::pipeline::simulate::{Activity, Place, Span};
use crate::pipeline::{Timeline, Work, trace};
use crate::report::{self, Alignment, Table};

#[derive(clap::Args)]
pub struct Args {
    /// A run's folder, the folder of one of its stages, or a trace file
    path: PathBuf,
    /// Draws the step, of a single trace
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// One trace, and the prediction beside it.
struct Found {
    name: String,
    measured: Timeline,
    predicted: Option<Timeline>,
}

/// Seconds of a worker by what it did.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    place: Place,
    forward: f64,
    backward: f64,
    messages: f64,
    update: f64,
    teacher: f64,
    idle: f64,
    /// Without the step's prediction: none.
    predicted_idle: Option<f64>,
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    refuse_collisions(&[("PATH", Some(&args.path))], &[("--svg", args.svg.as_deref())])?;
    let found = find(&args.path)?;
    if let Some(svg) = &args.svg {
        let [one] = found.as_slice() else {
            let rule = format!("one of the {} trainings that were traced: name its folder", found.len());
            return Err(Error::Usage { argument: "PATH", value: args.path.display().to_string(), rule });
        };
        write_atomic(svg, report::gantt(&one.measured).as_bytes())?;
    }
    if global.json() {
        let all: Vec<_> = found
            .iter()
            .map(|f| {
                serde_json::json!({
                    "training": f.name, "schedule": f.measured.name, "seconds": f.measured.seconds,
                    "idle_share": f.measured.idle_share(), "predicted_seconds": f.predicted.as_ref().map(|p| p.seconds),
                    "predicted_idle_share": f.predicted.as_ref().map(Timeline::idle_share), "workers": rows(f),
                })
            })
            .collect();
        say_json(&all);
        return Ok(());
    }
    found.iter().for_each(print);
    Ok(())
}

/// Traces of a folder and the folders in it, or a single file.
fn find(path: &Path) -> Result<Vec<Found>> {
    let read = |file: &Path| -> Result<Found> {
        let folder = file.parent().unwrap_or(Path::new("."));
        let beside = folder.join(trace::PREDICTED);
        let own = file.file_name().is_some_and(|n| n == trace::MEASURED);
        let predicted = (own && beside.exists()).then(|| trace::read(&beside)).transpose()?;
        // A trace of its own is called as its file is.
        let named = if own { folder } else { file };
        let name = named.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        Ok(Found { name, measured: trace::read(file)?, predicted })
    };
    if path.is_file() {
        return Ok(vec![read(path)?]);
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
    let inner = entries.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>();
    let mut folders = inner.map_err(|e| Error::io(path, e))?;
    folders.push(path.to_path_buf());
    folders.sort();
    let mut files: Vec<PathBuf> = folders.into_iter().map(|f| f.join(trace::MEASURED)).collect();
    files.retain(|file| file.is_file());
    if files.is_empty() {
        let rule =
            format!("a run with [pipeline] of at least 4 steps: it leaves {} in its stages' folders", trace::MEASURED);
        return Err(Error::file(path, "folder", rule));
    }
    files.iter().map(|file| read(file)).collect()
}

fn rows(found: &Found) -> Vec<Row> {
    let of = |(index, spans): (usize, &Vec<Span>)| {
        let sum = |kind: fn(Activity) -> bool| -> f64 {
            spans.iter().filter(|s| kind(s.activity)).map(|s| s.end - s.start).sum()
        };
        let busy: f64 = spans.iter().map(|s| s.end - s.start).sum();
        let predicted = found.predicted.as_ref().filter(|p| p.workers == found.measured.workers);
        Row {
            place: found.measured.workers[index],
            forward: sum(|a| a.event().is_some_and(|e| e.work == Work::Forward)),
            backward: sum(|a| a.event().is_some_and(|e| e.work.computes() && e.work != Work::Forward)),
            messages: sum(|a| a.event().is_some_and(|e| !e.work.computes())),
            update: sum(|a| a == Activity::Update),
            teacher: sum(|a| matches!(a, Activity::Teacher { .. })),
            idle: (found.measured.seconds - busy).max(0.0),
            predicted_idle: predicted.map(|p| (p.seconds - p.stages[index].busy).max(0.0)),
        }
    };
    found.measured.spans.iter().enumerate().map(of).collect()
}

fn print(found: &Found) {
    let Found { name, measured, predicted } = found;
    let said = |value: fn(&Timeline) -> String| {
        predicted.as_ref().map_or(String::new(), |p| format!(" ({} predicted)", value(p)))
    };
    say(format!(
        "{}: a step took {}{}, idle {}{}",
        report::plain_text(name),
        time(measured.seconds),
        said(|p| time(p.seconds)),
        report::percent(measured.idle_share()),
        said(|p| report::percent(p.idle_share())),
    ));
    use Alignment::{Left, Right};
    let mut table = Table::new(&[
        ("worker", Left),
        ("forward", Right),
        ("backward", Right),
        ("messages", Right),
        ("update", Right),
        ("teacher", Right),
        ("idle", Right),
        ("idle predicted", Right),
    ]);
    for row in rows(found) {
        let times = [row.forward, row.backward, row.messages, row.update, row.teacher, row.idle].map(time);
        let predicted = row.predicted_idle.map_or(String::new(), time);
        table.row([row.place.to_string()].into_iter().chain(times).chain([predicted]).collect());
    }
    say(table.terminal());
}
