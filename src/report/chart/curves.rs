//! Training and validation loss over the steps of one stage.

use super::HALF;
use super::scale::{Scale, tick_text};
use super::svg::{Anchor, Svg};
use crate::report::model::{LossCurve, LossPoint};
use crate::report::quantity::number;

const HEIGHT: f64 = 232.0;
const LEFT: f64 = 40.0;
const RIGHT: f64 = 64.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 26.0;
/// More training points than this are drawn as means of equal shares of steps, with their range as a band.
const POINTS: usize = 160;

/// The chart of one stage; `None` when nothing finite was recorded. Gaps are left out, not joined with zero.
pub fn loss_curve(curve: &LossCurve) -> Option<String> {
    let series = |pick: fn(&LossPoint) -> Option<f64>| -> Vec<(f64, f64)> {
        let value = |point| pick(point).filter(|value| value.is_finite());
        curve.points.iter().filter_map(|point| Some((point.0 as f64, value(point)?))).collect()
    };
    let (train, validation) = (series(|point| point.1), series(|point| point.2));
    let binned = bin(&train);
    let all = || train.iter().chain(&validation);
    let first = all().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let last = all().map(|point| point.0).fold(f64::NEG_INFINITY, f64::max);
    if first > last {
        return None;
    }
    let x = Scale::exact(first, last, LEFT, HALF - RIGHT);
    // The axis follows what is drawn as lines; a single spike in the band may leave the top.
    let lines = binned.iter().map(|bin| bin.mean).chain(validation.iter().map(|point| point.1));
    let y = Scale::around(lines, HEIGHT - BOTTOM, TOP);
    let clip = |value: f64| y.at(value).clamp(TOP - 6.0, HEIGHT - BOTTOM);

    let mut svg = Svg::new(HALF, HEIGHT, &format!("Loss of {} in {}", curve.stage, curve.unit));
    for tick in y.ticks(4) {
        svg.line("grid", (LEFT, y.at(tick)), (HALF - RIGHT, y.at(tick)));
        svg.text("tick", (LEFT - 8.0, y.at(tick) + 4.0), Anchor::End, &tick_text(tick));
    }
    for tick in x.ticks(5) {
        svg.text("tick", (x.at(tick), HEIGHT - BOTTOM + 18.0), Anchor::Middle, &tick_text(tick));
    }
    if binned.len() < train.len() {
        let upper = binned.iter().map(|bin| (x.at(bin.step), clip(bin.high)));
        let lower = binned.iter().rev().map(|bin| (x.at(bin.step), clip(bin.low)));
        svg.path("band", &upper.chain(lower).collect::<Vec<_>>(), true);
    }
    let points: Vec<_> = binned.iter().map(|bin| (x.at(bin.step), clip(bin.mean))).collect();
    svg.path("train", &points, false);
    let checked: Vec<_> = validation.iter().map(|&(step, value)| (x.at(step), clip(value))).collect();
    svg.path("validation", &checked, false);
    for (&at, (step, value)) in checked.iter().zip(&validation) {
        svg.dot("validation-dot", at, 3.0, &format!("step {step}: validation {}", number(*value)));
    }
    let end = |name, line: &[(f64, f64)], values: &[(f64, f64)]| Some((name, line.last()?.1, values.last()?.1));
    label_ends(&mut svg, [end("train", &points, &train), end("validation", &checked, &validation)]);
    Some(svg.finish())
}

/// Name, height and value of every line: last values beside the ends of their lines, pushed apart where they would overlap.
fn label_ends(svg: &mut Svg, ends: [Option<(&str, f64, f64)>; 2]) {
    let mut labels: Vec<(&str, f64, f64)> = ends.into_iter().flatten().collect();
    labels.sort_by(|a, b| a.1.total_cmp(&b.1));
    if let [(_, upper, _), (_, lower, _)] = labels.as_mut_slice() {
        let overlap = 15.0 - (*lower - *upper);
        if overlap > 0.0 {
            *upper -= overlap / 2.0;
            *lower += overlap / 2.0;
        }
    }
    for (name, y, value) in labels {
        svg.text(&format!("end {name}-text"), (HALF - RIGHT + 8.0, y + 4.0), Anchor::Start, &number(value));
    }
}

struct Bin {
    step: f64,
    mean: f64,
    low: f64,
    high: f64,
}

fn bin(points: &[(f64, f64)]) -> Vec<Bin> {
    let size = points.len().div_ceil(POINTS).max(1);
    points
        .chunks(size)
        .map(|chunk| {
            let count = chunk.len() as f64;
            Bin {
                step: chunk.iter().map(|point| point.0).sum::<f64>() / count,
                mean: chunk.iter().map(|point| point.1).sum::<f64>() / count,
                low: chunk.iter().map(|point| point.1).fold(f64::INFINITY, f64::min),
                high: chunk.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_becomes_a_bounded_picture_and_an_empty_one_none() {
        let points = (0..100_000).map(|step| (step, Some(1.0 / (1.0 + step as f64)), None)).collect();
        let curve = LossCurve { stage: "s".into(), unit: "nats".into(), points };
        assert!(loss_curve(&curve).unwrap().len() < 12_000);
        let nothing = LossCurve { points: vec![(1, Some(f64::NAN), None), (2, None, None)], ..curve };
        assert_eq!(loss_curve(&nothing), None);
    }

    #[test]
    fn one_point_is_still_a_chart() {
        let curve = LossCurve { points: vec![(5, Some(2.0), Some(2.0))], ..LossCurve::default() };
        assert!(loss_curve(&curve).unwrap().contains("step 5: validation 2.000"));
    }
}
