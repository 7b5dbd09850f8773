//! A step as a trace that Perfetto and Chrome's tracing page open (the Trace Event Format): one thread per stage, a complete
//! event for each piece of work, an arrow from each result to the stage that takes it.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::schedule::{Event, Work};
use super::simulate::{Span, Timeline};
use crate::atomic::write_atomic;
use crate::error::{Error, Result};

/// Events at most: a viewer holds all of them in memory.
pub const MAX_EVENTS: usize = 2_000_000;

/// Microseconds, the format's unit.
fn micros(seconds: f64) -> f64 {
    seconds * 1e6
}

fn category(work: Option<Work>) -> &'static str {
    match work {
        Some(Work::Forward) => "forward",
        Some(Work::Backward) => "backward",
        Some(Work::BackwardInput) => "backward_input",
        Some(Work::BackwardWeight) => "backward_weight",
        Some(_) => "message",
        None => "update",
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
        let name = format!("stage {stage}");
        line(json!({ "ph": "M", "name": "thread_name", "pid": 0, "tid": stage, "args": { "name": name } }));
        line(
            json!({ "ph": "M", "name": "thread_sort_index", "pid": 0, "tid": stage, "args": { "sort_index": stage } }),
        );
        for span in spans {
            let mut event = json!({
                "ph": "X", "pid": 0, "tid": stage, "cat": category(span.event.map(|e| e.work)),
                "name": span.event.map_or("update".into(), |e| e.to_string()),
                "ts": micros(span.start), "dur": micros(span.end - span.start),
            });
            if let Some(e) = span.event {
                event["args"] = json!({ "chunk": e.chunk, "micro_batch": e.micro });
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

/// Stage and time where a result is made, stage and time where the next chunk's work on another stage begins.
fn arrows(timeline: &Timeline) -> Vec<(usize, f64, usize, f64)> {
    // Backward is one event or the first of two; both give the gradient that the chunk before waits for.
    let way = |event: Event| match event.work {
        Work::Forward => Some(true),
        Work::Backward | Work::BackwardInput => Some(false),
        _ => None,
    };
    let mut takes: HashMap<(bool, u32, u32), (usize, f64)> = HashMap::new();
    let spans = || {
        let of_stage =
            |(stage, spans): (usize, &'_ Vec<Span>)| spans.iter().map(move |s| (stage, *s)).collect::<Vec<_>>();
        timeline.spans.iter().enumerate().flat_map(of_stage)
    };
    for (stage, span) in spans() {
        if let Some((event, way)) = span.event.and_then(|e| Some((e, way(e)?))) {
            takes.insert((way, event.chunk, event.micro), (stage, span.start));
        }
    }
    let arrow = |(stage, span): (usize, Span)| {
        let event = span.event?;
        let way = way(event)?;
        let next = if way { event.chunk.checked_add(1) } else { event.chunk.checked_sub(1) }?;
        let (taker, start) = *takes.get(&(way, next, event.micro))?;
        // The arrow leaves from inside the event, so that viewers find it.
        let leaves = span.start + (span.end - span.start) * 0.999;
        (taker != stage).then_some((stage, leaves, taker, start))
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
        let nothing = Timeline { name: "\"".into(), spans: Vec::new(), stages: Vec::new(), seconds: 0.0 };
        let trace: Value = serde_json::from_str(&render(&nothing).unwrap()).unwrap();
        assert_eq!(trace["traceEvents"][0]["args"]["name"], "\"");
    }
}
