//! Blocks that lose heads, neurons or whole sublayers, each its own.

use std::collections::BTreeMap;

use espalier::compress::structure::select::{Count, choose};
use espalier::compress::structure::sites::{Kind, Site};
use espalier::compress::structure::{Heads, Keep, Neurons, Objective, Order, Plan, Progress};
use espalier::compress::structure::{prune, prune_vocabulary, shrink};
use espalier::data::split::Fractions;
use espalier::data::terms::TermSet;
use espalier::data::tokenizer::Tokenizer;
use espalier::data::vocabulary::VocabularyMap;
use espalier::nn::Model;
use espalier::nn::config::Size;
use espalier::train::store;

use super::{Draw, holds};
use crate::model::{VOCABULARY, examples, laid_out};
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

/// Scores with ties, zeros and very different sizes, of sites that differ in units.
fn scores(draw: &mut Draw) -> Vec<Vec<f64>> {
    let sites = draw.size(4);
    let of = |draw: &mut Draw| {
        let units = 2 + draw.below(12);
        draw.values(units).into_iter().map(|s| f64::from(s.abs())).collect()
    };
    (0..sites).map(|_| of(draw)).collect()
}

#[test]
fn chosen_units_are_exactly_so_many_in_whole_tiles_above_the_floor() {
    holds("chosen units", |draw| {
        let scores = scores(draw);
        let group = draw.size(2);
        let most: Vec<usize> = scores.iter().map(|s| s.len() / group).collect();
        let total: usize = most.iter().sum();
        let floor = draw.size(*most.iter().min().unwrap());
        let groups = scores.len() * floor + draw.below(total + 1 - scores.len() * floor);
        let chosen = choose(&scores, groups, false, floor, group);
        assert_eq!(chosen.iter().map(Vec::len).sum::<usize>(), groups * group);
        for (units, scores) in chosen.iter().zip(&scores) {
            assert!(units.len() >= floor * group && units.len().is_multiple_of(group));
            assert!(units.windows(2).all(|pair| pair[0] < pair[1]));
            let gone = (0..scores.len()).filter(|u| !units.contains(u));
            for gone in gone {
                // Within a site the better unit stays, among equals the lower one.
                let beats =
                    |&kept: &usize| scores[kept] > scores[gone] || (scores[kept] == scores[gone] && kept < gone);
                assert!(units.iter().all(beats));
            }
        }
        let least = *most.iter().min().unwrap();
        let each = draw.size(least);
        let even = choose(&scores, each * scores.len(), true, 1, group);
        assert!(even.iter().all(|units| units.len() == each * group));
    });
}

#[test]
fn rounds_only_remove_and_end_at_the_target() {
    holds("rounds", |draw| {
        let (sites, each, rounds) = (draw.size(4), 1 + draw.size(8), draw.size(9));
        let target = draw.size(each);
        let even = draw.below(2) == 0;
        let count = Count { total: sites * each, target: sites * target, sites, even };
        let most = [None, Some(draw.size(4))][draw.below(2)].filter(|_| !even);
        for progress in [Progress::Linear, Progress::Cubic] {
            let left: Vec<usize> = (1..=rounds).map(|r| count.after(r, rounds, progress, most)).collect();
            assert_eq!(*left.last().unwrap(), count.target);
            assert!(left.windows(2).all(|pair| pair[1] <= pair[0]) && left[0] <= count.total);
            assert!(!even || left.iter().all(|n| n.is_multiple_of(sites)));
            if let (None, Progress::Linear) = (most, progress) {
                let gone = |i: usize| if i == 0 { count.total } else { left[i - 1] } - left[i];
                let steps: Vec<usize> = (0..rounds).map(gone).collect();
                let unit = if even { sites } else { 1 };
                assert!(steps.windows(2).all(|s| s[0] >= s[1]) && steps[0] - steps[rounds - 1] <= unit, "{steps:?}");
            }
        }
    });
}

#[test]
fn shrunk_models_have_the_declared_sizes() {
    holds("shrunk models", |draw| {
        let whole = any(draw);
        let least = |kind| Site::of(&whole.config, kind).iter().map(|site| site.units).min().unwrap();
        let heads: Heads =
            toml::from_str(&format!("keep = {}\nscore = \"random\"", draw.size(least(Kind::Heads)))).unwrap();
        let tiles = draw.size(least(Kind::Neurons) / 4);
        let even = draw.below(2) == 0;
        let text = format!("keep = {}\nfloor = 4\nmultiple_of = 4\nscore = \"random\"\neven = {even}", 4 * tiles);
        let ffn: Neurons = toml::from_str(&text).unwrap();
        let order = [Order::Together, Order::HeadsFirst, Order::FfnFirst][draw.below(3)];
        let (rounds, progress) = (draw.size(3), [Progress::Linear, Progress::Cubic][draw.below(2)]);
        let objective = Objective::Labels;
        let plan = Plan { heads: Some(heads), ffn: Some(ffn), rounds, progress, order, objective, seed: 5 };
        let keep = shrink(&whole, &[], &plan).unwrap();
        let small = prune(&whole, &keep).unwrap();
        let units = |kind| Site::of(&small.config, kind).iter().map(|site| site.units).collect::<Vec<_>>();
        let (own, neurons) = (units(Kind::Heads), units(Kind::Neurons));
        assert_eq!(own.iter().sum::<usize>(), heads.keep * own.len());
        assert_eq!(neurons.iter().sum::<usize>(), ffn.keep * neurons.len());
        assert!(own.iter().all(|&n| n >= 1) && neurons.iter().all(|&n| n >= 4 && n % 4 == 0));
        assert!(!even || neurons.iter().all(|&n| n == ffn.keep));
    });
}

#[test]
fn a_smaller_vocabulary_gives_the_logits_of_its_tokens() {
    holds("smaller vocabulary", |draw| {
        let whole = any(draw);
        // The tokens of the batch are among them.
        let kept: Vec<u32> = (0..VOCABULARY as u32).filter(|_| draw.below(4) > 0).collect();
        let map = VocabularyMap { before: VOCABULARY, kept };
        let examples = examples(2, 7).into_iter().map(|mut e| {
            let stays = |t: &u32| *t < 5 || map.id(*t).is_some();
            e.context.retain(stays);
            e.labels.retain(stays);
            e
        });
        let mut map = map.clone();
        map.kept = (0..VOCABULARY as u32).filter(|t| *t < 5 || map.id(*t).is_some()).collect();
        let old: Vec<_> = examples.collect();
        let new: Vec<_> = old
            .iter()
            .map(|e| espalier::data::batch::Example { context: map.ids(&e.context, 1), labels: map.ids(&e.labels, 1) })
            .collect();
        let small = prune_vocabulary(&whole, &map.kept).unwrap();
        small.config.check_tensors(std::path::Path::new("small"), &small.tensors).unwrap();
        let logits = |model: &Model, examples: &[espalier::data::batch::Example]| {
            let batch = laid_out(examples, espalier::recipe::schema::layout(&model.config));
            let batch = espalier::recipe::corpus::upload(model.device(), &batch).unwrap();
            let mut pass = espalier::nn::Pass::inference(model);
            let hidden = pass.hidden(&batch).unwrap();
            pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
        };
        let (want, have) = (logits(&whole, &old), logits(&small, &new));
        let tagger = matches!(whole.config.head, espalier::nn::Head::Tagging { .. });
        let of_kept = |row: &[f64]| map.kept.iter().map(|&id| row[id as usize]).collect::<Vec<_>>();
        let want = if tagger { want } else { want.chunks(VOCABULARY).flat_map(of_kept).collect() };
        assert!(largest_difference(&want, &have) < 1e-5);
        for (new, &old) in map.kept.iter().enumerate() {
            assert_eq!((map.id(old), map.before(new as u32)), (Some(new as u32), Some(old)));
        }
    });
}

#[test]
fn text_of_kept_tokens_has_the_mapped_ids() {
    let sentences = TermSet::embedded().unwrap().expand(1, 2000, Fractions::default()).unwrap();
    let all: Vec<&str> = sentences.iter().flat_map(|s| [s.pair.source.as_str(), s.pair.target.as_str()]).collect();
    let tokenizer = Tokenizer::train(all.iter().copied(), 1200, &["en", "zh"]).unwrap();
    holds("vocabulary of a text", |draw| {
        let lines: Vec<&str> = (0..draw.size(30)).map(|_| all[draw.below(all.len())]).collect();
        let counts = tokenizer.counts(lines.iter().copied()).unwrap();
        let (small, map) = tokenizer.narrowed(&counts, draw.size(3)).unwrap();
        assert_eq!((small.vocabulary(), map.before), (map.kept.len(), tokenizer.vocabulary()));
        for line in lines.iter().copied().chain((0..3).map(|_| all[draw.below(all.len())])) {
            let (old, new) = (tokenizer.encode(line).unwrap(), small.encode(line).unwrap());
            assert_eq!(small.decode(&new).unwrap(), line);
            if old.iter().all(|&id| map.id(id).is_some()) {
                assert_eq!(map.ids(&old, 1), new);
            }
        }
    });
}
