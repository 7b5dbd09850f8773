//! What every stage took from quality and from size, on one row per stage.

use super::scale::Scale;
use super::svg::{Anchor, Rect, Svg};
use super::{FULL, NAMES, ROW};
use crate::report::model::StageRow;
use crate::report::quantity::{bytes, percent};

const HEAD: f64 = 30.0;
const BAR: f64 = 18.0;
/// Room right of the bars for the value and its change.
const VALUE: f64 = 128.0;

/// One of the two panels.
struct Panel {
    title: &'static str,
    left: f64,
    width: f64,
    value: fn(&StageRow) -> Option<f64>,
    text: fn(f64) -> String,
    change: fn(before: f64, after: f64) -> String,
}

/// Token accuracy (left) and activated bytes (right) after every stage. The solid bar is what is there, the hatched end
/// what this stage took away; the dashed line is the teacher. Baselines follow, apart, in grey.
pub fn waterfall(stages: &[StageRow]) -> String {
    let gap = if stages.iter().any(|stage| stage.baseline) { 12.0 } else { 0.0 };
    let height = HEAD + stages.len() as f64 * ROW + gap + 6.0;
    let mut svg = Svg::new(FULL, height, "Token accuracy and activated size after every stage");
    let (steps, baselines): (Vec<_>, Vec<_>) = stages.iter().partition(|stage| !stage.baseline);
    let tops: Vec<(&StageRow, f64)> = steps
        .iter()
        .chain(&baselines)
        .enumerate()
        .map(|(index, stage)| (*stage, HEAD + index as f64 * ROW + if stage.baseline { gap } else { 0.0 }))
        .collect();
    for (stage, top) in &tops {
        let class = if stage.baseline { "name muted" } else { "name" };
        svg.name(class, (0.0, top + 20.0), NAMES - 8.0, &stage.name);
    }
    let width = (FULL - NAMES - 24.0) / 2.0;
    let panels = [
        Panel {
            title: "Token accuracy",
            left: NAMES,
            width,
            value: |stage| stage.token_accuracy,
            text: percent,
            change: |before, after| format!("{:+.1} pt", (after - before) * 100.0),
        },
        Panel {
            title: "Activated bytes",
            left: NAMES + width + 24.0,
            width,
            value: |stage| Some(stage.activated_bytes as f64),
            text: |value| bytes(value as u64),
            change: |before, after| {
                if before > 0.0 { format!("{:+.0} %", (after / before - 1.0) * 100.0) } else { String::new() }
            },
        },
    ];
    for panel in panels {
        draw(&mut svg, &panel, &tops);
    }
    svg.finish()
}

fn draw(svg: &mut Svg, panel: &Panel, rows: &[(&StageRow, f64)]) {
    let highest = rows.iter().filter_map(|(stage, _)| (panel.value)(stage)).fold(0.0, f64::max);
    let scale = Scale::from_zero(highest, panel.left, panel.left + panel.width - VALUE);
    svg.text("panel", (panel.left, 14.0), Anchor::Start, panel.title);
    // First, so that values stand on top of it.
    if let (Some(teacher), Some((_, last))) = (rows.first().and_then(|(stage, _)| (panel.value)(stage)), rows.last()) {
        let x = scale.at(teacher);
        svg.line("reference", (x, HEAD - 4.0), (x, last + ROW));
    }
    let mut before: Option<(f64, f64)> = None;
    for &(stage, top) in rows {
        let (bar_top, baseline) = (top + (ROW - BAR) / 2.0 - 2.0, top + 20.0);
        let Some(value) = (panel.value)(stage).filter(|value| value.is_finite()) else {
            svg.text("value muted", (panel.left, baseline), Anchor::Start, "not measured");
            continue;
        };
        let (left, end) = (panel.left, scale.at(value));
        let bar = |from: f64, to: f64| Rect { x: from, y: bar_top, width: to - from, height: BAR };
        let tooltip = format!("{}: {}", stage.name, (panel.text)(value));
        let class = if stage.baseline { "bar baseline" } else { "bar" };
        let mut label_from = end;
        let previous = before.filter(|_| !stage.baseline);
        let kept = previous.map_or(end, |(previous, _)| end.min(scale.at(previous)));
        svg.shade(class, bar(left, kept), 2.0, None, &tooltip);
        if let Some((previous, previous_bottom)) = previous {
            let previous_end = scale.at(previous);
            svg.line("link", (previous_end, previous_bottom), (previous_end, bar_top));
            svg.rect("gone", bar(end, previous_end), 0.0);
            svg.rect("gained", bar(previous_end, end), 0.0);
            label_from = end.max(previous_end);
        }
        svg.text("value", (label_from + 8.0, baseline), Anchor::Start, &(panel.text)(value));
        if let Some((previous, _)) = previous {
            let change = if previous == value { "no change".into() } else { (panel.change)(previous, value) };
            svg.text("value muted", (panel.left + panel.width, baseline), Anchor::End, &change.replace('-', "−"));
        }
        if !stage.baseline {
            before = Some((value, bar_top + BAR));
        }
    }
}
