//! Blocks that lose heads, neurons or whole sublayers, each its own.

use std::collections::BTreeMap;

use espalier::compress::structure::{Keep, prune};
use espalier::nn::Model;
use espalier::nn::config::Size;
use espalier::train::store;

use super::{Draw, holds};
use crate::structure::{drawn, families, gated, largest_difference, logits, model};

fn any(draw: &mut Draw) -> Model {
    let size = Size {
        layers: draw.size(2),
        heads: draw.size(3),
        head_size: 4 * draw.size(2),
        ffn_width: 4 * draw.size(6),
        max_positions: 32,
    };
    let family = draw.below(4);
    model(families(size)[family].clone(), &draw.device, u64::from(draw.stream.word()))
}

#[test]
fn removed_structures_are_gated_ones() {
    holds("removed structures", |draw| {
        let whole = any(draw);
        let keep = drawn(&whole.config, &mut draw.stream);
        let small = prune(&whole, &keep).unwrap();
        assert!(largest_difference(&logits(&gated(&whole, &keep)), &logits(&small)) < 1e-4);
    });
}

#[test]
fn sizes_are_those_of_what_is_left() {
    holds("sizes of what is left", |draw| {
        let whole = any(draw);
        let keep = drawn(&whole.config, &mut draw.stream);
        let small = prune(&whole, &keep).unwrap();
        let config = &whole.config;
        let gone: usize = keep
            .blocks
            .iter()
            .map(|kept| {
                let (block, d) = (&config.blocks[kept.index], config.width);
                let attention = |kept: Option<usize>, heads: usize| {
                    let head = block.head_size * (4 * d + 3);
                    (heads - kept.unwrap_or(0)) * head + if kept.is_none() && heads > 0 { d } else { 0 }
                };
                let own = attention(kept.attention.as_ref().map(|k| k.heads.len()), block.heads);
                let across = if config.decodes(kept.index) { block.heads_across() } else { 0 };
                let cross = attention(kept.cross.as_ref().map(|k| k.heads.len()), across);
                let left = kept.neurons.as_ref().map_or(0, Vec::len);
                own + cross + (block.ffn_width - left) * (2 * d + 1) + if left == 0 { d } else { 0 }
            })
            .sum();
        let without = |model: &Model| {
            let tables = model.tensors.iter().filter(|(name, _)| name.ends_with(".distances"));
            model.parameter_count() - tables.map(|(_, table)| table.count()).sum::<usize>()
        };
        assert_eq!(without(&small), without(&whole) - gone);
    });
}

#[test]
fn uneven_models_reload_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    holds("uneven models reload", |draw| {
        let whole = any(draw);
        let small = prune(&whole, &drawn(&whole.config, &mut draw.stream)).unwrap();
        let path = folder.path().join("model");
        store::save(&path, &store::model_files(&small).unwrap(), BTreeMap::new()).unwrap();
        let reloaded = store::load_model(&path, &draw.device).unwrap();
        assert_eq!(reloaded.config, small.config);
        assert_eq!(logits(&reloaded), logits(&small));
    });
}

#[test]
fn pruning_twice_is_pruning_once() {
    holds("pruned twice", |draw| {
        let whole = any(draw);
        let first = drawn(&whole.config, &mut draw.stream);
        let once = prune(&whole, &first).unwrap();
        let second = prune(&once, &Keep::all(&once.config)).unwrap();
        assert_eq!(second.config, once.config);
        assert_eq!(logits(&second), logits(&once));
    });
}
