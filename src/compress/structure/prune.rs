//! Physical removal: every parameter of the smaller config is cut out of the teacher's, along the axes that went.

use std::collections::BTreeMap;

use super::keep::{Keep, KeepBlock, KeepHeads};
use crate::error::Result;
use crate::nn::{Config, Model};
use crate::tensor::Tensor;

/// Rows and columns of a parameter that stay; `None`: all. A vector is one row.
type Cut = (Option<Vec<usize>>, Option<Vec<usize>>);

/// Values of a tensor `dims` at these rows and columns, and its extents.
pub(super) fn select(values: &[f32], dims: &[usize], (rows, columns): &Cut) -> (Vec<f32>, Vec<usize>) {
    let width = dims.last().copied().unwrap_or(1);
    let all = |n: usize| (0..n).collect::<Vec<_>>();
    let rows = rows.clone().unwrap_or_else(|| all(values.len() / width.max(1)));
    let columns = columns.clone().unwrap_or_else(|| all(width));
    let row = |&r: &usize| columns.iter().map(move |&c| values[r * width + c]);
    let cut = rows.iter().flat_map(row).collect();
    (cut, if dims.len() == 1 { vec![columns.len()] } else { vec![rows.len(), columns.len()] })
}

/// Builds the student that `keep` describes, on the teacher's device.
///
/// # Errors
/// Those of [`Keep::config`]; `Error::File` for weights that are not dense.
pub fn prune(teacher: &Model, keep: &Keep) -> Result<Model> {
    let config = keep.config(&teacher.config)?;
    let mut tensors = BTreeMap::new();
    for (name, _) in config.parameters() {
        let (from, cut) = origin(&teacher.config, keep, &name);
        let tensor = teacher.get(&from)?;
        let (values, dims) = select(&tensor.to_vec()?, tensor.dims(), &cut);
        tensors.insert(name, Tensor::from_slice(teacher.device(), &dims, &values)?);
    }
    Model::new(config, tensors, teacher.device())
}

/// The teacher's tensor that a parameter of the student is cut out of, and where.
fn origin(teacher: &Config, keep: &Keep, name: &str) -> (String, Cut) {
    let channels = || Some(keep.channels.clone());
    let block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    let kept = block.and_then(|(place, part)| Some((keep.blocks.get(place.parse::<usize>().ok()?)?, part)));
    let Some((kept, part)) = kept else {
        // A tagging head's bias runs over labels, everything else outside the blocks ends in the residual stream.
        return (name.to_string(), (None, if name == "head.bias" { None } else { channels() }));
    };
    let from = format!("blocks.{}.{part}", kept.index);
    if part == "attention.distances" {
        let shared = !teacher.blocks[kept.index].own_distances;
        let owner = if shared { teacher.stack(kept.index) } else { kept.index };
        let heads = kept.attention.as_ref().map(|kept| kept.heads.clone());
        return (format!("blocks.{owner}.attention.distances"), (heads, None));
    }
    (from, cut_of(teacher, kept, part, channels()))
}

fn cut_of(teacher: &Config, kept: &KeepBlock, part: &str, channels: Option<Vec<usize>>) -> Cut {
    let attention = if part.starts_with("cross.") { &kept.cross } else { &kept.attention };
    let rows = |of: fn(&KeepHeads) -> &Vec<usize>| attention.as_ref().map(|kept| of(kept).clone());
    let neurons = || kept.neurons.clone();
    let (linear, is_weight) = match part.rsplit_once('.') {
        Some((linear, "weight")) => (linear, true),
        Some((linear, _)) => (linear, false),
        None => (part, false),
    };
    let (outputs, inputs) = match linear.split_once('.').map_or(linear, |(_, which)| which) {
        "query" | "key" => (rows(|kept| &kept.query_key), channels),
        "value" => (rows(|kept| &kept.value), channels),
        "output" => (channels, rows(|kept| &kept.value)),
        "in" => (neurons().map(|neurons| gated_rows(teacher, kept.index, &neurons)), channels),
        "out" => (channels, neurons()),
        // Norms.
        _ => return (None, channels),
    };
    if is_weight { (outputs, inputs) } else { (None, outputs) }
}

/// Rows of the in-projection that belong to these neurons.
fn gated_rows(config: &Config, block: usize, neurons: &[usize]) -> Vec<usize> {
    let block = &config.blocks[block];
    let copies = Config::ffn_rows(block) / block.ffn_width.max(1);
    (0..copies).flat_map(|part| neurons.iter().map(move |n| part * block.ffn_width + n)).collect()
}

/// The same model without block `index`: what its importance in depth is measured with.
pub fn without_block(model: &Model, index: usize) -> Result<Model> {
    let others: Vec<usize> = (0..model.config.blocks.len()).filter(|i| *i != index).collect();
    prune(model, &Keep::blocks(&model.config, &others))
}
