//! A step as a trace that Perfetto and Chrome's tracing page open (the Trace Event Format): one thread per worker, a complete
//! event for each piece of work, an arrow from each result to the worker that takes it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::schedule::Work;
use super::simulate::{Activity, Place, Span, StageUse, Timeline};
use crate::atomic::write_atomic;
use crate::error::{Error, Result};

/// Names of a training's traces in its folder.
pub const MEASURED: &str = "pipeline-trace.json";
pub const PREDICTED: &str = "pipeline-predicted-trace.json";

/// Events at most: a viewer holds all of them in memory.
pub const MAX_EVENTS: usize = 2_000_000;

/// Microseconds, the format's unit.
fn micros(seconds: f64) -> f64 {
    seconds * 1e6
}

fn category(activity: Activity) -> &'static str {
    match activity {
        Activity::Event(event) => match event.work {
            Work::Forward => "forward",
            Work::Backward => "backward",
            Work::BackwardInput => "backward_input",
            Work::BackwardWeight => "backward_weight",
            _ => "message",
        },
        Activity::Update => "update",
        Activity::Teacher { .. } => "teacher",
    }
}

/// Chunk and micro-batch of what belongs to one.
fn place(activity: Activity) -> Option<(u32, u32)> {
    match activity {
        Activity::Event(event) => Some((event.chunk, event.micro)),
        Activity::Update => None,
        Activity::Teacher { chunk, micro } => Some((chunk, micro)),
    }
}

/// One JSON document, an event a line.
///
/// # Errors
/// `Parameter` for more than two million events.
pub fn render(timeline: &Timeline) -> Result<String> {
    let events: usize = timeline.spans.iter().map(Vec::len).sum();
    if events > MAX_EVENTS {
        let (parameter, allowed) = ("events", "at most 2000000; simulate fewer stages or micro-batches");
        return Err(Error::Parameter { op: "trace", parameter, value: events.to_string(), allowed });
    }
    let mut out = String::from("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
    let mut line = |event: Value| {
        out.push_str(&event.to_string());
        out.push_str(",\n");
    };
    for (stage, spans) in timeline.spans.iter().enumerate() {
        let name = timeline.workers.get(stage).map_or_else(String::new, ToString::to_string);
        line(json!({ "ph": "M", "name": "thread_name", "pid": 0, "tid": stage, "args": { "name": name } }));
        line(
            json!({ "ph": "M", "name": "thread_sort_index", "pid": 0, "tid": stage, "args": { "sort_index": stage } }),
        );
        for span in spans {
            let mut event = json!({
                "ph": "X", "pid": 0, "tid": stage, "cat": category(span.activity), "name": span.activity.to_string(),
                "ts": micros(span.start), "dur": micros(span.end - span.start),
            });
            if let Some((chunk, micro)) = place(span.activity) {
                event["args"] = json!({ "chunk": chunk, "micro_batch": micro });
            }
            line(event);
        }
    }
    for (id, (from, start, to, end)) in arrows(timeline).into_iter().enumerate() {
        let arrow = |phase: &str, stage: usize, time: f64| json!({ "ph": phase, "id": id, "pid": 0, "tid": stage, "ts": micros(time), "cat": "message", "name": "message" });
        line(arrow("s", from, start));
        let mut end = arrow("f", to, end);
        // Bound to the event that it points into, not to the next one.
        end["bp"] = json!("e");
        line(end);
    }
    // The last line carries the name, and no comma.
    out.push_str(
        &json!({ "ph": "M", "name": "process_name", "pid": 0, "args": { "name": timeline.name } }).to_string(),
    );
    out.push_str("\n]}\n");
    Ok(out)
}

/// Which way a result goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    Forward,
    Backward,
    Teacher,
}

fn way(activity: Activity) -> Option<Way> {
    match activity {
        Activity::Event(event) => match event.work {
            Work::Forward => Some(Way::Forward),
            // Backward is one event or the first of two; both give the gradient that the chunk before waits for.
            Work::Backward | Work::BackwardInput => Some(Way::Backward),
            _ => None,
        },
        Activity::Update => None,
        Activity::Teacher { .. } => Some(Way::Teacher),
    }
}

/// Row and time where a result is made, row and time where the next chunk's work on another row begins.
fn arrows(timeline: &Timeline) -> Vec<(usize, f64, usize, f64)> {
    let mut takes: HashMap<(Way, u32, u32), (usize, f64)> = HashMap::new();
    let spans = || {
        let of_row = |(row, spans): (usize, &'_ Vec<Span>)| spans.iter().map(move |s| (row, *s)).collect::<Vec<_>>();
        timeline.spans.iter().enumerate().flat_map(of_row)
    };
    for (row, span) in spans() {
        if let Some((way, (chunk, micro))) = way(span.activity).zip(place(span.activity)) {
            takes.insert((way, chunk, micro), (row, span.start));
        }
    }
    let arrow = |(row, span): (usize, Span)| {
        let (way, (chunk, micro)) = way(span.activity).zip(place(span.activity))?;
        let next = if way == Way::Backward { chunk.checked_sub(1) } else { chunk.checked_add(1) }?;
        let (taker, start) = *takes.get(&(way, next, micro))?;
        // The arrow leaves from inside the event, so that viewers find it.
        let leaves = span.start + (span.end - span.start) * 0.999;
        (taker != row).then_some((row, leaves, taker, start))
    };
    spans().filter_map(arrow).collect()
}

/// Writes the trace; open it at ui.perfetto.dev or chrome://tracing.
///
/// # Errors
/// As [`render`], and `Io`.
pub fn write(path: impl AsRef<Path>, timeline: &Timeline) -> Result<()> {
    write_atomic(path, render(timeline)?.as_bytes())
}

/// Reads a trace that [`write`] wrote. What was held in memory is not in it.
///
/// # Errors
/// `Io`, and `File` for another file.
pub fn read(path: impl AsRef<Path>) -> Result<Timeline> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let trace: Trace = crate::json::read(path, &bytes)?;
    let wrong =
        |event: &Entry, rule: String| Error::file(path, format!("event {:?} of row {}", event.name, event.tid), rule);
    let mut name = String::new();
    let mut rows: BTreeMap<u64, (Option<Place>, Vec<Span>)> = BTreeMap::new();
    for event in &trace.events {
        let said = event.args.as_ref().and_then(|args| args["name"].as_str()).unwrap_or_default();
        match (event.ph.as_str(), event.name.as_str()) {
            ("M", "process_name") => name = said.into(),
            ("M", "thread_name") => {
                let place = said.parse().map_err(|rule| wrong(event, rule))?;
                rows.entry(event.tid).or_default().0 = Some(place);
            }
            ("X", _) => {
                let activity = event.name.parse().map_err(|rule| wrong(event, rule))?;
                if !(event.ts >= 0.0 && event.dur >= 0.0) {
                    return Err(wrong(event, format!("times from 0 on, not {} and {}", event.ts, event.dur)));
                }
                let (start, end) = (event.ts / 1e6, (event.ts + event.dur) / 1e6);
                rows.entry(event.tid).or_default().1.push(Span { activity, start, end });
            }
            _ => {}
        }
    }
    let (mut workers, mut spans) = (Vec::new(), Vec::new());
    for (row, (place, own)) in rows {
        let rule = "every row has a thread_name such as \"stage 0\"";
        workers.push(place.ok_or_else(|| Error::file(path, format!("row {row}"), rule))?);
        spans.push(own);
    }
    if workers.is_empty() {
        return Err(Error::file(path, "traceEvents", "a row for each worker of a step"));
    }
    let stages: Vec<StageUse> = spans.iter().map(|own| StageUse::of(own)).collect();
    let seconds = stages.iter().map(|s| s.last).fold(0.0, f64::max);
    Ok(Timeline { name, workers, spans, stages, seconds })
}

/// The part of the format that is written here.
#[derive(Deserialize)]
struct Trace {
    #[serde(rename = "traceEvents")]
    events: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    ph: String,
    name: String,
    #[serde(default)]
    tid: u64,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Option<Value>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{Costs, Kind, Schedule, simulate};

    #[test]
    fn a_trace_has_a_thread_per_stage_and_an_arrow_per_message() {
        for kind in [Kind::OneForwardOneBackward, Kind::ZeroBubbleV] {
            let schedule = Schedule::new(kind, 3, 4).unwrap();
            let mut costs = Costs::uniform(schedule.chunks(), 1e-3, 1e-3, 1e-3);
            costs.updates = vec![2e-3; 3];
            let timeline = simulate(&schedule, &costs).unwrap();
            let trace: Value = serde_json::from_str(&render(&timeline).unwrap()).unwrap();
            let events = trace["traceEvents"].as_array().unwrap();
            let phase = |phase: &str| events.iter().filter(|e| e["ph"] == phase).count();
            let spans: usize = timeline.spans.iter().map(Vec::len).sum();
            assert_eq!((phase("X"), phase("M")), (spans, 2 * 3 + 1));
            let messages = schedule.with_messages();
            let sends = messages.stages.iter().flatten();
            let sends = sends.filter(|e| matches!(e.work, Work::SendForward | Work::SendBackward)).count();
            assert_eq!((phase("s"), phase("f")), (sends, sends), "{kind}");
            let end = events
                .iter()
                .filter(|e| e["ph"] == "X")
                .map(|e| e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap());
            assert!((end.fold(0.0, f64::max) - timeline.seconds * 1e6).abs() < 1e-6);
        }
    }

    #[test]
    fn traces_come_back_and_other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let schedule = Schedule::new(Kind::ZeroBubbleH1, 3, 4).unwrap();
        let mut costs = Costs::uniform(3, 1e-3, 2e-3, 3e-3);
        costs.updates = vec![2e-3; 3];
        let mut timeline = simulate(&schedule, &costs).unwrap();
        timeline.spans[1].push(Span { activity: Activity::Teacher { chunk: 1, micro: 3 }, start: 0.1, end: 0.2 });
        timeline.stages = timeline.spans.iter().map(|own| StageUse::of(own)).collect();
        write(&path, &timeline).unwrap();
        let back = read(&path).unwrap();
        assert_eq!((&back.name, &back.workers), (&timeline.name, &timeline.workers));
        for (back, own) in back.spans.iter().flatten().zip(timeline.spans.iter().flatten()) {
            assert!(back.activity == own.activity && (back.start - own.start).abs() < 1e-12);
        }
        assert!((back.seconds - 0.2).abs() < 1e-12);
        let whole = std::fs::read_to_string(&path).unwrap();
        for (from, to) in
            [("stage 1", "stage x"), ("\"0F0\"", "\"0Q0\""), ("\"dur\":", "\"dur\":-"), ("traceEvents", "events")]
        {
            std::fs::write(&path, whole.replace(from, to)).unwrap();
            assert!(read(&path).is_err(), "{from} as {to}");
        }
        std::fs::write(&path, "{\"traceEvents\":[]}").unwrap();
        assert!(read(&path).is_err());
    }

    #[test]
    fn an_empty_step_is_a_trace_too() {
        let nothing =
            Timeline { name: "\"".into(), workers: Vec::new(), spans: Vec::new(), stages: Vec::new(), seconds: 0.0 };
        let trace: Value = serde_json::from_str(&render(&nothing).unwrap()).unwrap();
        assert_eq!(trace["traceEvents"][0]["args"]["name"], "\"");
    }
}
