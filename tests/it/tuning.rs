//! Adapters, low-rank updates and prefixes on dense, sparse and quantized weights: what learns, what stays, what merging
//! keeps.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier::compress::experts;
use espalier::compress::freeze::{Form, freeze, skip_zeros};
use espalier::compress::quantization::Format;
use espalier::compress::tuning::{Adapter, Lora, Merged, Prefix, Tuning, lora, parameter_count};
use espalier::device::{self, Device};
use espalier::dispatch;
use espalier::nn::config::Activation;
use espalier::nn::generate::{Decoding, generate};
use espalier::nn::tuning::TUNING;
use espalier::nn::{Config, Model, Pass};
use espalier::ops::quant_int4::PackInt4;
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::Micro;
use espalier::train::optimizer::{Optimizer, Settings};
use espalier::train::store;
use espalier::train::trainer::{step, weighted_cross_entropy};
use espalier::{DType, Error};

use crate::distillation::enlivened;
use crate::model::{SIZE, SPECIAL, VOCABULARY, assemble, cpu, examples, full_pass, micro, settings};

fn lora(linears: &[&str]) -> Tuning {
    Tuning::Lora(Lora { rank: 3, alpha: 6.0, linears: linears.iter().map(|l| l.to_string()).collect() })
}

fn all() -> [Tuning; 3] {
    [lora(&["attention", "ffn"]), Tuning::Adapter(Adapter { width: 5 }), Tuning::Prefix(Prefix { length: 3 })]
}

fn dense(device: &Arc<dyn Device>) -> Model {
    enlivened(Config::glm(SIZE, VOCABULARY), device, 4)
}

fn logits(model: &Model, micro: &Micro) -> Vec<f64> {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&micro.batch).unwrap();
    pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    let scale = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / scale
}

fn bits(model: &Model, own: bool) -> BTreeMap<String, Vec<u8>> {
    let wanted = |name: &&String| name.starts_with(TUNING) != own;
    model.tensors.keys().filter(wanted).map(|n| (n.clone(), model.get(n).unwrap().to_bytes().unwrap())).collect()
}

fn learn(model: &mut Model, micro: &Micro, steps: u64, settings: Settings) -> Vec<f64> {
    let mut optimizer = Optimizer::new(model, settings, |_| true).unwrap();
    let run = |_| step(model, &mut optimizer, std::slice::from_ref(micro), &[], (0.0, 1, steps)).unwrap().0;
    (0..steps).map(run).collect()
}

#[test]
fn only_what_was_added_learns() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(16, 4)));
    for tuning in all() {
        let mut model = dense(&device);
        let before = logits(&model, &micro);
        tuning.add(&mut model, 7).unwrap();
        if !matches!(tuning, Tuning::Prefix(_)) {
            // An update of zeros; the FFN runs as two linears.
            assert!(apart(&before, &logits(&model, &micro)) < 1e-5, "{tuning:?}");
        }
        let (own, added) = (bits(&model, true), bits(&model, false));
        let losses = learn(&mut model, &micro, 60, settings(2e-2));
        // Three keys more to attend to are little among random blocks.
        let bar = if matches!(tuning, Tuning::Prefix(_)) { 0.99 } else { 0.9 };
        assert!(losses[59] < bar * losses[0], "{tuning:?}: {} to {}", losses[0], losses[59]);
        assert!(own == bits(&model, true), "{tuning:?}: the model's own parameters changed");
        for (name, was) in added {
            let constant = [".factor", ".mask", ".counts"].iter().any(|end| name.ends_with(end));
            assert_eq!(was == model.get(&name).unwrap().to_bytes().unwrap(), constant, "{name}");
        }
        assert!(parameter_count(&model) < model.parameter_count() / 2);
    }
}

/// Slopes of the added parameters against differences in f64; the model's own get none.
#[test]
fn added_parameters_have_the_slopes_of_their_differences() {
    let device = device::open("reference").unwrap();
    let micro = micro(&device, &assemble(&examples(3, 1)));
    let loss = |model: &Model| {
        let mut pass = Pass::training(model);
        let hidden = pass.hidden(&micro.batch).unwrap();
        let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
        let (tape, leaves) = pass.into_leaves();
        (loss, tape, leaves)
    };
    for masked in [false, true] {
        for tuning in all() {
            let mut model = dense(&device);
            if masked {
                prune(&mut model, "blocks.1.ffn.in.weight", 0.6, 3);
            }
            tuning.add(&mut model, 7).unwrap();
            // Away from the zeros that updates start from.
            for (site, name) in model.tensors.keys().cloned().collect::<Vec<_>>().iter().enumerate() {
                if name.starts_with(TUNING) && model.learns(name) && !name.ends_with(".counts") {
                    let tensor = model.get(name).unwrap();
                    let mut stream = Stream::new(2, site as u32);
                    let values: Vec<f64> = (0..tensor.count()).map(|_| 0.3 * stream.normal()).collect();
                    let changed = Tensor::from_f64(&device, tensor.dims(), DType::F32, &values).unwrap();
                    model.tensors.insert(name.clone(), changed);
                }
            }
            let (value, tape, leaves) = loss(&model);
            let seed = Tensor::from_f64(&device, value.dims(), DType::F32, &[1.0]).unwrap();
            let grads = tape.backward(&[(&value, &seed)]).unwrap();
            let mut slope = 0.0;
            let (mut ahead, mut behind) = (model.clone(), model.clone());
            let by = 1e-6;
            for (name, var) in &leaves {
                let Some(grad) = grads.of(var) else { continue };
                assert!(name.starts_with(TUNING), "{tuning:?}: {name} has a gradient");
                let grad = grad.unwrap().to_f64().unwrap();
                let mut stream = Stream::new(9, grad.len() as u32);
                let direction: Vec<f64> = grad.iter().map(|_| stream.normal()).collect();
                slope += grad.iter().zip(&direction).map(|(g, d)| g * d).sum::<f64>();
                for (model, sign) in [(&mut ahead, by), (&mut behind, -by)] {
                    let tensor = model.get(name).unwrap();
                    let values: Vec<f64> =
                        tensor.to_f64().unwrap().iter().zip(&direction).map(|(x, d)| x + sign * d).collect();
                    let moved = Tensor::from_f64(&device, tensor.dims(), DType::F32, &values).unwrap();
                    model.tensors.insert(name.clone(), moved);
                }
            }
            let at = |model: &Model| loss(model).0.tensor.to_f64().unwrap()[0];
            let difference = (at(&ahead) - at(&behind)) / (2.0 * by);
            assert!(
                slope != 0.0 && (slope - difference).abs() < 1e-5 * slope.abs(),
                "{tuning:?}: {slope} {difference}"
            );
        }
    }
}

/// Zeroes a share of a weight's elements, exactly as many as that is; returns their places.
fn prune(model: &mut Model, name: &str, share: f64, seed: u64) -> Vec<usize> {
    let tensor = model.get(name).unwrap().clone();
    let mut values = tensor.to_vec::<f32>().unwrap();
    let mut order: Vec<usize> = (0..values.len()).collect();
    let mut stream = Stream::new(seed, 77);
    for i in (1..order.len()).rev() {
        order.swap(i, stream.below(i + 1));
    }
    order.truncate((share * values.len() as f64).round() as usize);
    order.sort_unstable();
    order.iter().for_each(|&i| values[i] = 0.0);
    model.tensors.insert(name.into(), Tensor::from_slice(model.device(), tensor.dims(), &values).unwrap());
    order
}

fn zeros(model: &Model, name: &str) -> Vec<usize> {
    let values = model.values(name).unwrap();
    (0..values.len()).filter(|&i| values[i] == 0.0).collect()
}

/// The two largest of each four stay.
fn prune_24(model: &mut Model, name: &str) -> Vec<usize> {
    let tensor = model.get(name).unwrap().clone();
    let mut values = tensor.to_vec::<f32>().unwrap();
    for group in values.chunks_mut(4) {
        let mut order: Vec<usize> = (0..4).collect();
        order.sort_by(|a, b| group[*b].abs().total_cmp(&group[*a].abs()));
        order[2..].iter().for_each(|&i| group[i] = 0.0);
    }
    model.tensors.insert(name.into(), Tensor::from_slice(model.device(), tensor.dims(), &values).unwrap());
    zeros(model, name)
}

#[test]
fn a_thousand_steps_and_a_merge_keep_the_declared_sparsity_exactly() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(4, 4)));
    let mut model = dense(&device);
    let mut declared = BTreeMap::new();
    for (i, (part, share)) in [("ffn.in", 0.9), ("ffn.out", 0.5), ("attention.output", 0.8)].into_iter().enumerate() {
        let name = format!("blocks.0.{part}.weight");
        let places = prune(&mut model, &name, share, i as u64);
        declared.insert(name, places);
    }
    for part in ["query", "key", "value"] {
        let name = format!("blocks.1.attention.{part}.weight");
        let places = prune_24(&mut model, &name);
        declared.insert(name, places);
    }
    let own = bits(&model, true);
    lora(&["attention", "ffn"]).add(&mut model, 7).unwrap();
    let losses = learn(&mut model, &micro, 1000, Settings { weight_decay: 0.05, ..settings(5e-3) });
    assert!(losses[999] < 0.5 * losses[0], "{} to {}", losses[0], losses[999]);
    assert!(own == bits(&model, true));
    let tuned = logits(&model, &micro);
    let report = lora::merge(&mut model).unwrap();
    assert!(!model.tuned() && report.len() == 12 && Merged::invariant(&report).holds, "{report:?}");
    for (name, places) in &declared {
        assert_eq!(&zeros(&model, name), places, "{name}");
        assert_ne!(own[name], model.get(name).unwrap().to_bytes().unwrap(), "{name} learned nothing");
    }
    // What was trained is what is merged.
    assert!(apart(&tuned, &logits(&model, &micro)) < 1e-5);
}

/// Any mask, any update: 256 of them.
#[test]
fn merging_keeps_any_mask() {
    let device = cpu();
    let name = "blocks.0.attention.query.weight";
    let shape = dense(&device);
    for seed in 0..256u64 {
        let mut stream = Stream::new(seed, 1);
        let mut model = shape.clone();
        // From nothing to everything.
        let places = prune(&mut model, name, [0.0, 0.3, 0.5, 0.97, 1.0][seed as usize % 5], seed);
        let lora =
            Lora { rank: 1 + stream.below(8), alpha: 1.0 + stream.below(30) as f32, linears: vec!["query".into()] };
        Tuning::Lora(lora).add(&mut model, seed).unwrap();
        let up = format!("{TUNING}blocks.0.attention.query.lora.up");
        let tensor = model.get(&up).unwrap().clone();
        let scale = [1e-6, 1.0, 1e4][seed as usize % 3];
        let values: Vec<f32> = (0..tensor.count()).map(|_| (scale * stream.normal()) as f32).collect();
        model.tensors.insert(up, Tensor::from_slice(&device, tensor.dims(), &values).unwrap());
        let report = lora::merge(&mut model).unwrap();
        assert!(report.iter().all(|m| m.kept), "{seed}: {report:?}");
        assert_eq!(zeros(&model, name), places, "{seed}");
    }
}

/// Zeroes a share of the fours along k.
fn prune_words(model: &mut Model, name: &str, share: f64, seed: u64) {
    let tensor = model.get(name).unwrap().clone();
    let mut values = tensor.to_vec::<f32>().unwrap();
    let mut stream = Stream::new(seed, 78);
    for word in values.chunks_mut(4).filter(|_| stream.uniform() < share) {
        word.fill(0.0);
    }
    model.tensors.insert(name.into(), Tensor::from_slice(model.device(), tensor.dims(), &values).unwrap());
}

#[test]
fn updates_beside_integer_and_compressed_weights_learn_and_merge_onto_their_grid() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(16, 4)));
    let int8 = Some(Format::default());
    let plain = Form { sparse: false, quantized: int8 };
    for (form, scattered) in [
        (plain, false),
        (Form { sparse: true, quantized: None }, false),
        (Form { sparse: true, quantized: int8 }, false),
        (Form::default(), true),
        (plain, true),
    ] {
        let mut model = dense(&device);
        if scattered {
            // Whole words of four, so that integers are left out too.
            (0..2).flat_map(Config::linears).enumerate().for_each(|(i, linear)| {
                prune_words(&mut model, &format!("{linear}.weight"), 0.8, i as u64);
            });
        } else if form.sparse {
            (0..2).flat_map(Config::linears).for_each(|linear| {
                prune_24(&mut model, &format!("{linear}.weight"));
            });
        }
        let mut model = freeze(&model, form).unwrap();
        if scattered {
            model.config.all_linears().iter().for_each(|linear| skip_zeros(&mut model, linear, 2.0).unwrap());
        }
        lora(&["attention", "ffn"]).add(&mut model, 7).unwrap();
        // The product that gradients go through is the integer one.
        let mut pass = Pass::training(&model);
        let hidden = pass.hidden(&micro.batch).unwrap();
        let twin = pass.logits(&hidden).unwrap().tensor.to_f64().unwrap();
        // The last digits of a sum decide on which side a rounding falls: one step of 1/127 of a token's largest activation.
        let apart = apart(&twin, &logits(&model, &micro));
        assert!(apart < if form.quantized.is_some() { 5e-3 } else { 1e-5 }, "{form:?}: {apart}");
        let before = bits(&model, true);
        let losses = learn(&mut model, &micro, 60, settings(1e-2));
        assert!(losses[59] < 0.9 * losses[0], "{form:?}: {} to {}", losses[0], losses[59]);
        assert!(before == bits(&model, true), "{form:?}");
        let report = lora::merge(&mut model).unwrap();
        assert_eq!(report.len(), 12);
        let after = bits(&model, true);
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        let mut moved = 0;
        for (name, was) in &before {
            let levels = [".int8", ".values", ".kept"].iter().any(|part| name.ends_with(part));
            assert!(levels || was == &after[name], "{form:?}: {name} changed");
            moved += usize::from(levels && was != &after[name]);
        }
        assert!(moved > 6, "{form:?}: {moved} weights took up their update");
        let merged = weighted(&model, &micro);
        assert!(merged < losses[0], "{form:?}: {merged} where the untuned model has {}", losses[0]);
    }
}

/// What is tuned before integer experts gets its gradient through them: nearly that of the same experts in f32.
#[test]
fn updates_before_integer_experts_learn_through_them() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(16, 4)));
    for threshold in [None, Some(0.02)] {
        let mut config = Config::glm(SIZE, VOCABULARY);
        config.blocks.iter_mut().for_each(|block| block.activation = Activation::Relu);
        let conversion = experts::Settings { expert_size: 16, share: 0.5, ..experts::Settings::default() };
        let dense = enlivened(config, &device, 4);
        let (mut split, _) = experts::convert(&dense, conversion, std::slice::from_ref(&micro.batch)).unwrap();
        split.config.blocks.iter_mut().filter_map(|b| b.experts.as_mut()).for_each(|e| e.threshold = threshold);
        let mut model = freeze(&split, Form { sparse: false, quantized: Some(Format::default()) }).unwrap();
        for model in [&mut split, &mut model] {
            lora(&["attention"]).add(model, 7).unwrap();
        }
        let mut pass = Pass::training(&model);
        let hidden = pass.hidden(&micro.batch).unwrap();
        let twin = pass.logits(&hidden).unwrap().tensor.to_f64().unwrap();
        let difference = apart(&twin, &logits(&model, &micro));
        assert!(difference < 5e-3, "{threshold:?}: {difference}");
        let [float, integer] = [&split, &model].map(|model| slope(model, &micro, "blocks.0.attention.output.lora.up"));
        assert!(apart(&float, &integer) < 0.1, "{threshold:?}: {}", apart(&float, &integer));
        // With experts that give nothing it is another one.
        let mut silent = split.clone();
        for (name, tensor) in split.tensors.iter().filter(|(name, _)| name.ends_with("ffn.experts.out.weight")) {
            silent.tensors.insert(name.clone(), Tensor::zeros(&device, tensor.meta()).unwrap());
        }
        assert!(apart(&float, &slope(&silent, &micro, "blocks.0.attention.output.lora.up")) > 0.2, "{threshold:?}");
        let before = bits(&model, true);
        let losses = learn(&mut model, &micro, 60, settings(1e-2));
        assert!(losses[59] < 0.9 * losses[0], "{threshold:?}: {} to {}", losses[0], losses[59]);
        assert!(before == bits(&model, true), "{threshold:?}");
    }
}

/// The loss's gradient of the parameter whose name ends so.
fn slope(model: &Model, micro: &Micro, name: &str) -> Vec<f64> {
    let mut pass = Pass::training(model);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
    let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0]).unwrap();
    let (tape, leaves) = pass.into_leaves();
    let gradients = tape.backward(&[(&loss, &seed)]).unwrap();
    let (_, leaf) = leaves.iter().find(|(own, _)| own.ends_with(name)).unwrap();
    gradients.of(leaf).unwrap().unwrap().to_f64().unwrap()
}

fn weighted(model: &Model, micro: &Micro) -> f64 {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
    loss.tensor.to_f64().unwrap()[0] / micro.weight
}

#[test]
fn int4_groups_keep_their_scales() {
    let device = cpu();
    let mut model = dense(&device);
    let linear = "blocks.0.attention.query";
    let weight = model.tensors.remove(&format!("{linear}.weight")).unwrap();
    let packed = dispatch::run(&PackInt4 { group: 8 }, &[&weight]).unwrap();
    model.tensors.insert(format!("{linear}.int4"), packed[0].clone());
    model.tensors.insert(format!("{linear}.scale"), packed[1].clone());
    let before = bits(&model, true);
    lora(&["query"]).add(&mut model, 7).unwrap();
    let micro = micro(&device, &assemble(&examples(16, 4)));
    let losses = learn(&mut model, &micro, 40, settings(2e-2));
    assert!(losses[39] < losses[0]);
    lora::merge(&mut model).unwrap();
    let after = bits(&model, true);
    assert_eq!(before[&format!("{linear}.scale")], after[&format!("{linear}.scale")]);
    assert_ne!(before[&format!("{linear}.int4")], after[&format!("{linear}.int4")]);
    // Every nibble is a level from -7 to 7.
    let words = model.get(&format!("{linear}.int4")).unwrap().to_vec::<u32>().unwrap();
    assert!(words.iter().all(|w| (0..8).all(|i| (1..=15).contains(&(w >> (4 * i) & 15)))));
}

/// Keys and values of a prefix stand in the cache once, whoever decodes.
#[test]
fn a_tuned_model_decodes_as_its_full_passes_say_and_survives_a_file() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(12, 4)));
    let contexts: Vec<Vec<u32>> = examples(4, 9).into_iter().map(|e| e.context).collect();
    let prompts: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
    for tuning in all() {
        let mut model = dense(&device);
        tuning.add(&mut model, 7).unwrap();
        learn(&mut model, &micro, 20, settings(2e-2));
        for beams in [1, 3] {
            let decoding = Decoding { begin: SPECIAL.bos, end: SPECIAL.eos, max_tokens: 6, beams, length_penalty: 1.0 };
            for (context, g) in prompts.iter().zip(generate(&model, &prompts, &decoding).unwrap()) {
                let want = full_pass(&model, context, &g.tokens, g.finished);
                let have = g.log_probability;
                assert!((want - have).abs() < 2e-3, "{tuning:?}, {beams} beams: {have} where a full pass gives {want}");
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        store::save(&path, &store::model_files(&model).unwrap(), Default::default()).unwrap();
        let again = store::load_model(&path, &device).unwrap();
        assert!(logits(&model, &micro) == logits(&again, &micro), "{tuning:?}");
    }
}

#[test]
fn low_rank_updates_reach_a_decoders_look_at_its_source() {
    let mut model = Model::init(Config::t5(SIZE, VOCABULARY), &cpu(), 1).unwrap();
    lora(&["cross.value"]).add(&mut model, 1).unwrap();
    let named = |block: usize| model.tensors.contains_key(&format!("{TUNING}blocks.{block}.cross.value.lora.up"));
    let blocks: Vec<usize> = (0..2 * SIZE.layers).filter(|&block| named(block)).collect();
    assert_eq!(blocks, (SIZE.layers..2 * SIZE.layers).collect::<Vec<_>>());
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let device = cpu();
    let refused = |tuning: Tuning, word: &str| {
        let error = tuning.add(&mut dense(&device), 1).unwrap_err();
        assert!(matches!(&error, Error::Parameter { .. }) && error.to_string().contains(word), "{tuning:?}: {error}");
    };
    let lora = |rank, alpha, part: &str| Tuning::Lora(Lora { rank, alpha, linears: vec![part.to_string()] });
    refused(lora(0, 1.0, "query"), "rank");
    refused(lora(17, 1.0, "query"), "rank");
    refused(lora(2, f32::NAN, "query"), "alpha");
    refused(lora(2, 1.0, "nothing"), "linears");
    refused(lora(2, 1.0, ""), "linears");
    refused(Tuning::Adapter(Adapter { width: 0 }), "width");
    refused(Tuning::Adapter(Adapter { width: 1000 }), "width");
    refused(Tuning::Prefix(Prefix { length: 0 }), "length");
    refused(Tuning::Prefix(Prefix { length: 33 }), "length");
    let mut model = dense(&device);
    Tuning::Adapter(Adapter { width: 2 }).add(&mut model, 1).unwrap();
    assert!(matches!(lora(2, 1.0, "query").add(&mut model, 1), Err(Error::Parameter { .. })));
    assert!(matches!(lora::merge(&mut model), Err(Error::Parameter { .. })));
}
