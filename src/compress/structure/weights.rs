//! TextPruner's importance: |sum of w dL/dw| over a unit's weights, of each batch (Yang et al. 2022).

use super::importance::{add, fold_gated, products};
use super::judge::Judge;
use super::sites::{Kind, Site};
use crate::error::Result;
use crate::nn::{Model, Pass};
use crate::train::lifecycle::Micro;
use crate::train::trainer::go_on;

/// Heads: over their columns of the output projection. Neurons: over their column of the second weight and, with `rows`, their
/// row and bias of the first one, as a second term (TextPruner's even mode). Divided by the number of examples.
///
/// # Errors
/// Those of the passes.
pub fn scores(model: &Model, micros: &[Micro], sites: &[Site], judge: &Judge, rows: bool) -> Result<Vec<Vec<f64>>> {
    let mut totals: Vec<Vec<f64>> = sites.iter().map(|site| vec![0.0; site.units]).collect();
    let mut examples = 0;
    for micro in micros {
        go_on()?;
        let judged = judge.backward(Pass::training(model), micro)?;
        let of = |name: &str| products(&judged.leaves, &judged.grads, name);
        for (site, total) in sites.iter().zip(&mut totals) {
            if let Some(out) = of(&format!("{}.weight", site.output()))? {
                for (total, unit) in total.iter_mut().zip(out.column_sums().chunks(site.size)) {
                    *total += unit.iter().sum::<f64>().abs();
                }
            }
            if site.kind == Kind::Neurons && rows {
                let weight = of(&format!("blocks.{}.ffn.in.weight", site.block))?.map(|p| p.row_sums());
                let bias = of(&format!("blocks.{}.ffn.in.bias", site.block))?.map(|p| p.values);
                let mut terms = vec![0.0; site.units];
                for rows in weight.iter().chain(&bias) {
                    add(&mut terms, &fold_gated(rows, site.units));
                }
                total.iter_mut().zip(&terms).for_each(|(total, term)| *total += term.abs());
            }
        }
        examples += micro.batch.tokens.dims()[0];
    }
    totals.iter_mut().flatten().for_each(|total| *total /= examples.max(1) as f64);
    Ok(totals)
}
