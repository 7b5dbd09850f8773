//! Median latency per batch size, one panel each, with the spread as a whisker.

use super::scale::Scale;
use super::svg::{Anchor, Rect, Svg};
use super::{FULL, NAMES, ROW};
use crate::report::model::{Latency, StageRow};
use crate::report::quantity::milliseconds;

const HEAD: f64 = 30.0;
const BAR: f64 = 18.0;
const VALUE: f64 = 124.0;

/// Bars for every stage that was timed; `None` when none was. Each panel has its own axis from zero, in milliseconds.
pub fn latency(stages: &[StageRow]) -> Option<String> {
    let timed: Vec<&StageRow> = stages.iter().filter(|stage| !stage.latency.is_empty()).collect();
    let mut batches: Vec<u32> = timed.iter().flat_map(|stage| stage.latency.iter().map(|l| l.batch)).collect();
    batches.sort_unstable();
    batches.dedup();
    // More panels than fit side by side would be unreadable; the table has them all.
    batches.truncate(4);
    if batches.is_empty() {
        return None;
    }
    let mut svg = Svg::new(FULL, HEAD + timed.len() as f64 * ROW + 4.0, "Latency by batch size after every stage");
    for (index, stage) in timed.iter().enumerate() {
        let class = if stage.baseline { "name muted" } else { "name" };
        svg.name(class, (0.0, HEAD + index as f64 * ROW + 20.0), NAMES - 8.0, &stage.name);
    }
    let width = (FULL - NAMES) / batches.len() as f64;
    for (index, &batch) in batches.iter().enumerate() {
        panel(&mut svg, &timed, batch, NAMES + index as f64 * width, width - 20.0);
    }
    Some(svg.finish())
}

fn panel(svg: &mut Svg, stages: &[&StageRow], batch: u32, left: f64, width: f64) {
    let find = |stage: &StageRow| stage.latency.iter().find(|latency| latency.batch == batch).cloned();
    let found: Vec<Option<Latency>> = stages.iter().map(|stage| find(stage)).collect();
    let highest = found.iter().flatten().map(|latency| latency.p95_ms.max(latency.p50_ms)).fold(0.0, f64::max);
    let scale = Scale::from_zero(highest, left, left + width - VALUE);
    svg.text("panel", (left, 14.0), Anchor::Start, &format!("Batch {batch}"));
    let teacher = found.first().and_then(Option::as_ref).map(|latency| latency.p50_ms);
    for (index, (stage, latency)) in stages.iter().zip(&found).enumerate() {
        let top = HEAD + index as f64 * ROW;
        let (bar_top, baseline) = (top + (ROW - BAR) / 2.0 - 2.0, top + 20.0);
        let Some(latency) = latency else {
            svg.text("value muted", (left, baseline), Anchor::Start, "not measured");
            continue;
        };
        let end = scale.at(latency.p50_ms);
        let tooltip = format!(
            "{}, batch {batch}, length {}: p50 {}, p5 {}, p95 {}, {} samples",
            stage.name,
            latency.length,
            milliseconds(latency.p50_ms),
            milliseconds(latency.p5_ms),
            milliseconds(latency.p95_ms),
            latency.samples
        );
        let class = if stage.baseline { "bar baseline" } else { "bar" };
        svg.shade(class, Rect { x: left, y: bar_top, width: end - left, height: BAR }, 2.0, None, &tooltip);
        let (low, high, middle) = (scale.at(latency.p5_ms), scale.at(latency.p95_ms), bar_top + BAR / 2.0);
        svg.line("whisker", (low, middle), (high, middle));
        svg.line("whisker", (low, middle - 3.0), (low, middle + 3.0));
        svg.line("whisker", (high, middle - 3.0), (high, middle + 3.0));
        svg.text("value", (end.max(high) + 8.0, baseline), Anchor::Start, &milliseconds(latency.p50_ms));
        if let Some(teacher) = teacher.filter(|_| index > 0 && latency.p50_ms > 0.0) {
            let speedup = format!("{:.2}×", teacher / latency.p50_ms);
            svg.text("value muted", (left + width, baseline), Anchor::End, &speedup);
        }
    }
}
