//! What the shapes alone say about a recipe: stages that could not end as declared are refused before anything trains.

use std::path::Path;

use super::Step;
use crate::compress::gates::{Costs, LatencyTable, Layout, out_of_reach};
use crate::compress::written;
use crate::error::{Error, Result};
use crate::nn::Config;
use crate::recipe::check::refuse;
use crate::recipe::schema::{GateCost, L0, Recipe};
use crate::recipe::stages::linears;

/// Refuses gates that cannot take away what they should, and patterns that no weight can hold.
pub fn check_shapes(recipe: &Recipe) -> Result<()> {
    let teacher = recipe.model.size();
    let config = recipe.model.config(teacher, recipe.data.vocabulary, &[]);
    if let Some(l0) = recipe.structure.as_ref().and_then(|s| s.l0.as_ref()) {
        check_gates(l0, &config)?;
    }
    let steps = recipe.steps();
    let before = |step: &Step| steps.iter().take_while(|s| **s != Step::Sparsify).any(|s| s == step);
    let config = match &recipe.structure {
        // What gates leave is not known before.
        Some(structure) if before(&Step::Structure) && structure.l0.is_none() => {
            let config = recipe.model.config(structure.pruned(teacher), recipe.data.vocabulary, &[]);
            Config { width: structure.width(teacher), ..config }
        }
        Some(_) if before(&Step::Structure) => return Ok(()),
        _ => config,
    };
    let Some(sparsify) = &recipe.sparsify else { return Ok(()) };
    let names: Vec<String> = linears(&config, &sparsify.linears).iter().map(|l| format!("{l}.weight")).collect();
    let weights: Vec<_> = config.parameters().into_iter().filter(|(name, _)| names.contains(name)).collect();
    // Uneven sublayers may hold what even ones do not.
    let even = recipe
        .structure
        .as_ref()
        .is_none_or(|s| s.ffn.as_ref().is_none_or(|ffn| ffn.even) && s.heads.as_ref().is_none_or(|heads| heads.even));
    let holds = |dims: &[usize]| matches!(dims, &[n, k] if sparsify.pattern.divides([n, k]));
    match weights.first() {
        Some((name, dims)) if even && !weights.iter().any(|(_, dims)| holds(dims)) => {
            let allowed = format!("units that make up at least one weight, such as {name} {dims:?}");
            refuse("sparsify.pattern", written(&sparsify.pattern), allowed)
        }
        _ => Ok(()),
    }
}

fn check_gates(l0: &L0, config: &Config) -> Result<()> {
    let layout = Layout::of(config)?;
    let costs = match (l0.cost, &l0.table) {
        (GateCost::Parameters, _) => Costs::parameters(&layout),
        (GateCost::Latency, Some(path)) => {
            let path = Path::new(path);
            Costs::latency(&layout, &LatencyTable::read(path)?)
                .map_err(|e| Error::file(path, "structure.l0.table", e.to_string()))?
        }
        // Measured by the stage, which asks then.
        (GateCost::Latency, None) => return Ok(()),
    };
    if let Some(most) = out_of_reach(l0.target, &layout, &l0.gated(), &costs, l0.multiple_of) {
        let allowed = format!("at most {most}, which is all that gates of these levels can take away");
        return refuse("structure.l0.target", l0.target, allowed);
    }
    Ok(())
}
