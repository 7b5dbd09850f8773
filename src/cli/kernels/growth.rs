//! `kernels bench --growth`: the times of an op at sizes that double, all sizes taking turns, and whether they grow as they must.

use std::cell::RefCell;
use std::sync::Arc;

use serde::Serialize;

use super::bench::problem;
use super::measure::{self, Ring};
use crate::cli::{Global, say, say_json};
use crate::device::turns::take_turns;
use crate::device::{Device, Kind};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::ops::large::growth::{Law, Rule, Scale, laws};
use crate::verify;

/// What a law came to.
#[derive(Serialize)]
struct Row {
    device: String,
    name: &'static str,
    op: &'static str,
    variable: &'static str,
    kernel: Vec<&'static str>,
    sizes: Vec<f64>,
    /// The least of the rounds: what others on the machine add is no part of growth.
    us: Vec<f64>,
    /// A slope, or the shares of the first time.
    found: Vec<f64>,
    least: Vec<f64>,
    most: Vec<f64>,
    holds: bool,
}

pub fn run(global: &Global, op: &str, rounds: usize, seed: u64) -> Result<()> {
    let device = global.open()?;
    let info = device.info();
    let scale = match info.kind {
        _ if measure::hardware(&device) => Scale::Large,
        Kind::Cpu => Scale::Medium,
        _ => Scale::Small,
    };
    let wanted: Vec<Law> =
        laws(scale).into_iter().filter(|law| verify::glob_match(op, law.cases[0].1.op.name())).collect();
    if wanted.is_empty() {
        let rule = "an op of a law, such as matmul or softmax".into();
        return Err(Error::Usage { argument: "--op", value: op.into(), rule });
    }
    if !global.json() {
        say(format!("{} ({}): how times grow, least of {rounds} rounds in turn", info.id, info.name));
        say(format!("{:<32} {:<28} {:>17} {:>13}  us at rising sizes", "law", "variable", "found", "must be"));
    }
    let progress = global.progress(wanted.len());
    let (mut broken, total) = (0, wanted.len());
    for law in &wanted {
        progress.set_message(law.name);
        let row = measured(&device, law, rounds, seed)?;
        broken += usize::from(!row.holds);
        progress.suspend(|| if global.json() { say_json(&row) } else { say(line(&row)) });
        progress.inc(1);
    }
    progress.finish_and_clear();
    if broken > 0 { Err(Error::Failed { what: "laws of growth", failed: broken, total }) } else { Ok(()) }
}

fn measured(device: &Arc<dyn Device>, law: &Law, rounds: usize, seed: u64) -> Result<Row> {
    let mut rings = Vec::new();
    for (_, case) in &law.cases {
        let metas = case.metas();
        let outputs = case.op.infer(&metas)?;
        let Some(kernel) = dispatch::candidates(&problem(case, &metas, &outputs, device)).first().copied() else {
            let (op, device) = (case.op.name(), device.info().name.clone());
            let shapes = metas.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            return Err(Error::Unsupported { op, device, dtype: metas[0].dtype.name(), shapes });
        };
        rings.push((kernel, case, RefCell::new(Ring::new(case, device, &measure::inputs(case, seed))?)));
    }
    let works: Vec<_> = rings.iter().map(|(kernel, case, ring)| || ring.borrow_mut().run(kernel, case, 1)).collect();
    let works: Vec<&dyn Fn() -> Result<()>> = works.iter().map(|work| work as &dyn Fn() -> Result<()>).collect();
    let times = take_turns(device, &works, rounds)?;
    let least = |times: &Vec<f64>| times.iter().copied().fold(f64::INFINITY, f64::min);
    let us: Vec<f64> = times.iter().map(|times| 1e6 * least(times)).collect();
    let sizes: Vec<f64> = law.cases.iter().map(|(size, _)| *size).collect();
    let (found, bounds) = match &law.rule {
        Rule::Slope(bounds) => (vec![slope(&sizes, &us)], vec![bounds.clone()]),
        Rule::Share(bounds) => (us[1..].iter().map(|us_of| us_of / us[0]).collect(), bounds.clone()),
    };
    let holds = found.iter().zip(&bounds).all(|(found, bounds)| bounds.contains(found));
    Ok(Row {
        device: device.info().id.clone(),
        name: law.name,
        op: law.cases[0].1.op.name(),
        variable: law.variable,
        kernel: rings.iter().map(|(kernel, ..)| kernel.name).collect(),
        sizes,
        us,
        found,
        least: bounds.iter().map(|bounds| *bounds.start()).collect(),
        most: bounds.iter().map(|bounds| *bounds.end()).collect(),
        holds,
    })
}

/// Least squares over the logarithms of the three largest sizes.
fn slope(sizes: &[f64], times: &[f64]) -> f64 {
    let first = sizes.len().saturating_sub(3);
    let points: Vec<(f64, f64)> = sizes[first..].iter().zip(&times[first..]).map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = points.len() as f64;
    let (mx, my) = points.iter().fold((0.0, 0.0), |(sx, sy), (x, y)| (sx + x / n, sy + y / n));
    let (above, below) =
        points.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + (x - mx) * (y - my), b + (x - mx) * (x - mx)));
    above / below
}

fn line(row: &Row) -> String {
    let list = |values: &[f64], digits: usize| {
        values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>().join(" ")
    };
    let must = match row.found.len() {
        1 => format!("{:.2} to {:.2}", row.least[0], row.most[0]),
        _ => format!("<= {}", list(&row.most, 2)),
    };
    let verdict = if row.holds { "" } else { "  BROKEN" };
    format!(
        "{:<32} {:<28} {:>17} {must:>13}  {}{verdict}",
        row.name,
        row.variable,
        list(&row.found, 2),
        list(&row.us, 0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_exponents() {
        let sizes = [1.0, 256.0, 512.0, 1024.0];
        assert!((slope(&sizes, &sizes.map(|n| 7.0 * f64::powf(n, 2.5))) - 2.5).abs() < 1e-12);
        // The smallest size, where starting costs most, is not looked at.
        let mut times = sizes.map(|n| n * n);
        times[0] = 1e9;
        assert!((slope(&sizes, &times) - 2.0).abs() < 1e-12);
    }
}
