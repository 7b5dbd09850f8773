//! A step as a trace that Perfetto and Chrome's tracing page open (the Trace Event Format): one thread per worker, a complete
//! event for each piece of work, an arrow from each result to the worker that takes it.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::schedule::Work;
use super::simulate::{Activity, Span, Timeline};
use crate::atomic::write_atomic;
use crate::error::{Error, Result};

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
    fn an_empty_step_is_a_trace_too() {
        let nothing =
            Timeline { name: "\"".into(), workers: Vec::new(), spans: Vec::new(), stages: Vec::new(), seconds: 0.0 };
        let trace: Value = serde_json::from_str(&render(&nothing).unwrap()).unwrap();
        assert_eq!(trace["traceEvents"][0]["args"]["name"], "\"");
    }
}
