//! Structures that are gone: the smaller model gives what the whole one gives with them gated to zero, in every family, in
//! every form that a model is stored in, in generation and behind a saved file.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier::compress::experts::{self, Settings as ExpertSettings};
use espalier::compress::freeze::{Form, freeze};
use espalier::compress::quantization::Format;
use espalier::compress::structure::{Keep, KeepHeads, prune};
use espalier::compress::tuning::{Adapter, Lora, Prefix, Tuning};
use espalier::data::layout::Layout;
use espalier::device::{self, Device};
use espalier::nn::config::Size;
use espalier::nn::generate::{Decoding, generate};
use espalier::nn::tuning::TUNING;
use espalier::nn::{Batch, Config, Model, Pass, Positions};
use espalier::recipe::corpus::upload;
use espalier::recipe::schema::layout;
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::optimizer::Optimizer;
use espalier::train::store;
use espalier::train::trainer::step;

use crate::model::{SPECIAL, VOCABULARY, cpu, examples, full_pass, laid_out, micro, settings};

/// A small model of each family.
pub fn families(size: Size) -> [Config; 4] {
    let relative = Positions::Relative { buckets: 8, farthest: 6 };
    let labels = ["O", "B", "I"].map(str::to_string).to_vec();
    [
        Config::glm(size, VOCABULARY),
        Config::gpt(size, VOCABULARY),
        Config::bert_tagger(size, VOCABULARY, labels),
        Config { positions: relative, ..Config::t5(size, VOCABULARY) },
    ]
}

pub fn batch(model: &Model) -> Batch {
    let layout: Layout = layout(&model.config);
    upload(model.device(), &laid_out(&examples(3, 7), layout)).unwrap()
}

pub fn logits(model: &Model) -> Vec<f64> {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&batch(model)).unwrap();
    pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
}

/// Some of so many, at least one, ascending.
fn some(stream: &mut Stream, n: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    stream.shuffle(&mut all);
    all.truncate(1 + stream.below(n));
    all.sort_unstable();
    all
}

/// Some heads and neurons of every block; one sublayer in five is gone whole.
pub fn drawn(config: &Config, stream: &mut Stream) -> Keep {
    let mut keep = Keep::all(config);
    for kept in &mut keep.blocks {
        let block = &config.blocks[kept.index];
        for attention in [&mut kept.attention, &mut kept.cross] {
            let gone = stream.below(5) == 0;
            *attention = attention.take().filter(|_| !gone).map(|all| {
                let heads: Vec<usize> = some(stream, all.heads.len());
                KeepHeads::whole(&heads, block.head_size)
            });
        }
        let gone = stream.below(5) == 0;
        kept.neurons = kept.neurons.take().filter(|_| !gone).map(|all| some(stream, all.len()));
    }
    keep
}

/// The whole model with what goes at a gate of 0: columns behind it are, and the bias of a sublayer that goes whole.
pub fn gated(model: &Model, keep: &Keep) -> Model {
    let mut gated = model.duplicate().unwrap();
    let mut zero = |name: &str, goes: &dyn Fn(usize) -> bool| {
        let tensor = gated.get(name).unwrap();
        let (dims, width) = (tensor.dims().to_vec(), *tensor.dims().last().unwrap());
        let mut values = tensor.to_f64().unwrap();
        values.iter_mut().enumerate().filter(|(at, _)| goes(at % width)).for_each(|(_, w)| *w = 0.0);
        let tensor = Tensor::from_f64(model.device(), &dims, espalier::DType::F32, &values).unwrap();
        gated.tensors.insert(name.into(), tensor);
    };
    for kept in &keep.blocks {
        let (i, size) = (kept.index, model.config.blocks[kept.index].head_size);
        let across = model.config.cross(i).is_some();
        for (part, kept, has) in [("attention", &kept.attention, true), ("cross", &kept.cross, across)] {
            let name = format!("blocks.{i}.{part}.output");
            match kept {
                Some(kept) => zero(&format!("{name}.weight"), &|column| !kept.heads.contains(&(column / size))),
                None if has => ["weight", "bias"].iter().for_each(|end| zero(&format!("{name}.{end}"), &|_| true)),
                None => {}
            }
        }
        let name = format!("blocks.{i}.ffn.out");
        match &kept.neurons {
            Some(neurons) => zero(&format!("{name}.weight"), &|column| !neurons.contains(&column)),
            None => ["weight", "bias"].iter().for_each(|end| zero(&format!("{name}.{end}"), &|_| true)),
        }
    }
    gated
}

pub fn largest_difference(want: &[f64], have: &[f64]) -> f64 {
    assert_eq!(want.len(), have.len());
    let scale = want.iter().fold(1e-30f64, |most, y| most.max(y.abs()));
    want.iter().zip(have).fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / scale
}

const SIZE: Size = Size { layers: 3, heads: 3, head_size: 8, ffn_width: 32, max_positions: 40 };

/// A model whose biases are not zero: those of what goes must go too.
pub fn model(config: Config, device: &Arc<dyn Device>, seed: u64) -> Model {
    let mut model = Model::init(config, device, seed).unwrap();
    let biases: Vec<String> = model.tensors.keys().filter(|name| name.ends_with(".bias")).cloned().collect();
    for (site, name) in biases.iter().enumerate() {
        let mut stream = Stream::new(seed, 900 + site as u32);
        let dims = model.get(name).unwrap().dims().to_vec();
        let values: Vec<f32> = (0..dims[0]).map(|_| 0.1 * stream.normal() as f32).collect();
        model.tensors.insert(name.clone(), Tensor::from_slice(device, &dims, &values).unwrap());
    }
    model
}

#[test]
fn removed_structures_are_gated_ones_in_every_family_to_the_oracle() {
    let device = device::open("reference").unwrap();
    for (family, config) in families(SIZE).into_iter().enumerate() {
        for seed in 0..6 {
            let whole = model(config.clone(), &device, seed);
            let keep = drawn(&whole.config, &mut Stream::new(seed, family as u32));
            let small = prune(&whole, &keep).unwrap();
            small.config.check(std::path::Path::new("small")).unwrap();
            small.config.check_tensors(std::path::Path::new("small"), &small.tensors).unwrap();
            let error = largest_difference(&logits(&gated(&whole, &keep)), &logits(&small));
            assert!(error < 1e-6, "family {family}, seed {seed}: {error:e}");
        }
    }
}

/// What both models have gets the same gradients: those of norms and embeddings flow past the sublayers that are gone.
#[test]
fn gradients_flow_past_what_is_gone() {
    let device = device::open("reference").unwrap();
    for config in families(SIZE) {
        let whole = model(config, &device, 4);
        let keep = uneven(&whole.config);
        let (small, gated) = (prune(&whole, &keep).unwrap(), gated(&whole, &keep));
        let gradients = |model: &Model| {
            let mut pass = Pass::training(model);
            let hidden = pass.hidden(&batch(model)).unwrap();
            let logits = pass.logits(&hidden).unwrap();
            let mut stream = Stream::new(5, 0);
            let seed: Vec<f64> = (0..logits.tensor.count()).map(|_| stream.normal()).collect();
            let seed = Tensor::from_f64(&device, logits.dims(), espalier::DType::F32, &seed).unwrap();
            let (tape, leaves) = pass.into_leaves();
            let grads = tape.backward(&[(&logits, &seed)]).unwrap();
            let of = |(name, leaf): (&String, &espalier::tape::Var)| {
                Some((name.clone(), grads.of(leaf)?.unwrap().to_f64().unwrap()))
            };
            leaves.iter().filter_map(of).collect::<BTreeMap<_, _>>()
        };
        let (want, have) = (gradients(&gated), gradients(&small));
        let shared = |name: &&String| name.contains("norm") || name.starts_with("embedding");
        let mut compared = 0;
        for name in have.keys().filter(shared) {
            let (want, have) = (&want[name], &have[name]);
            let most = want.iter().fold(0.0f64, |most, y| most.max(y.abs()));
            assert!(want.iter().zip(have).all(|(a, b)| (a - b).abs() <= 1e-6 * most.max(1e-9)), "{name}");
            compared += 1;
        }
        assert!(compared > 8, "{compared}");
    }
}

/// Norms that nothing reads any more get no gradient and stop no training.
#[test]
fn uneven_models_learn() {
    for config in families(SIZE).into_iter().filter(|c| matches!(c.head, espalier::nn::Head::Language { .. })) {
        let whole = model(config, &cpu(), 4);
        let mut small = prune(&whole, &uneven(&whole.config)).unwrap();
        let micro = micro(small.device(), &laid_out(&examples(12, 4), layout(&small.config)));
        let mut optimizer = Optimizer::new(&mut small, settings(5e-3), |_| true).unwrap();
        let mut loss = || step(&small, &mut optimizer, std::slice::from_ref(&micro), &[], (0.1, 1, 40)).unwrap().0;
        let first = loss();
        let last = (1..40).fold(first, |_, _| loss());
        assert!(last < 0.9 * first, "{first} to {last}");
    }
}

/// The uneven models below: a block without attention, one without FFN, and one with a third of everything.
fn uneven(config: &Config) -> Keep {
    let mut keep = Keep::all(config);
    let size = config.blocks[0].head_size;
    let encoder = config.encoder;
    for first in [0, encoder] {
        keep.blocks[first].attention = None;
        keep.blocks[first + 1].neurons = None;
        keep.blocks[first + 1].attention = Some(KeepHeads::whole(&[0, 2], size));
        keep.blocks[first + 2].attention = Some(KeepHeads::whole(&[1], size));
        keep.blocks[first + 2].neurons = Some((0..16).map(|n| 2 * n).collect());
    }
    if encoder > 0 {
        keep.blocks[encoder].cross = Some(KeepHeads::whole(&[1, 2], size));
        keep.blocks[encoder + 1].cross = None;
    }
    keep
}

#[test]
fn generation_with_a_cache_copes_with_uneven_blocks() {
    for config in families(SIZE).into_iter().filter(|c| matches!(c.head, espalier::nn::Head::Language { .. })) {
        let whole = model(config, &cpu(), 4);
        let keep = uneven(&whole.config);
        let (small, gated) = (prune(&whole, &keep).unwrap(), gated(&whole, &keep));
        let contexts: Vec<Vec<u32>> = examples(4, 9).into_iter().map(|e| e.context).collect();
        let prompts: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
        for beams in [1, 3] {
            let decoding = Decoding { begin: SPECIAL.bos, end: SPECIAL.eos, max_tokens: 7, beams, length_penalty: 1.0 };
            let [want, have] = [&gated, &small].map(|model| generate(model, &prompts, &decoding).unwrap());
            for (want, have) in want.iter().zip(&have) {
                assert_eq!(want.tokens, have.tokens);
                assert!((want.log_probability - have.log_probability).abs() < 1e-3);
            }
        }
    }
}

/// Two of every four weights of a row, the larger ones.
fn masked(model: &Model) -> Model {
    let mut masked = model.duplicate().unwrap();
    for linear in model.config.all_linears() {
        let name = format!("{linear}.weight");
        let dims = model.get(&name).unwrap().dims().to_vec();
        let mut values = model.values(&name).unwrap();
        for group in values.chunks_mut(4) {
            let mut order: Vec<usize> = (0..group.len()).collect();
            order.sort_by(|&a, &b| group[a].abs().total_cmp(&group[b].abs()));
            order[..2].iter().for_each(|&at| group[at] = 0.0);
        }
        masked.tensors.insert(name, Tensor::from_slice(model.device(), &dims, &values).unwrap());
    }
    masked
}

/// Every form of an uneven model computes what the same form of the gated one does; it is smaller on disk and reloads to the
/// bit.
#[test]
fn stored_forms_of_uneven_models_are_smaller_and_reload() {
    let folder = tempfile::tempdir().unwrap();
    for (family, config) in families(SIZE).into_iter().enumerate() {
        let whole = masked(&model(config, &cpu(), 6));
        let keep = uneven(&whole.config);
        let (small, gated) = (prune(&whole, &keep).unwrap(), gated(&whole, &keep));
        let forms = [
            Form::default(),
            Form { sparse: true, quantized: None },
            Form { sparse: false, quantized: Some(Format::default()) },
            Form { sparse: true, quantized: Some(Format::default()) },
        ];
        for (number, form) in forms.into_iter().enumerate() {
            let [dense, gated, stored] = [&whole, &gated, &small].map(|model| freeze(model, form).unwrap());
            stored.config.check_tensors(std::path::Path::new("stored"), &stored.tensors).unwrap();
            // Integer inputs see other ranges where columns are gone.
            let most = if form.quantized.is_some() { 5e-2 } else { 1e-4 };
            let error = largest_difference(&logits(&gated), &logits(&stored));
            assert!(error < most, "family {family}, {form:?}: {error:e}");
            let paths = [("dense", &dense), ("stored", &stored)].map(|(name, model)| {
                let path = folder.path().join(format!("{family}-{number}-{name}"));
                store::save(&path, &store::model_files(model).unwrap(), BTreeMap::new()).unwrap();
                path
            });
            let bytes = |path: &std::path::Path| std::fs::metadata(path.join(store::WEIGHTS)).unwrap().len();
            assert!(bytes(&paths[1]) < bytes(&paths[0]));
            let reloaded = store::load_model(&paths[1], &cpu()).unwrap();
            assert_eq!(reloaded.config, stored.config);
            assert_eq!(logits(&reloaded), logits(&stored));
        }
    }
}

#[test]
fn experts_of_uneven_blocks_are_the_dense_ffns() {
    let whole = model(Config::glm(SIZE, VOCABULARY), &cpu(), 6);
    let small = prune(&whole, &uneven(&whole.config)).unwrap();
    let settings =
        ExpertSettings { expert_size: 16, share: 1.0, router_steps: 2, router_rate: 0.01, ..ExpertSettings::default() };
    let (converted, reports) = experts::convert(&small, settings, &[batch(&small)]).unwrap();
    assert_eq!(reports.iter().map(|r| (r.block, r.experts)).collect::<Vec<_>>(), [(0, 2), (2, 1)]);
    assert!(largest_difference(&logits(&small), &logits(&converted)) < 1e-4);
}

/// What is tuned beside an uneven model skips what it lacks; it learns, and generation sees prefixes as a full pass does.
#[test]
fn uneven_blocks_are_tuned() {
    let whole = model(Config::glm(SIZE, VOCABULARY), &cpu(), 6);
    let small = prune(&whole, &uneven(&whole.config)).unwrap();
    let micro = micro(small.device(), &laid_out(&examples(6, 4), layout(&small.config)));
    let lora = Lora { rank: 2, alpha: 4.0, linears: ["attention", "ffn"].map(str::to_string).to_vec() };
    let methods = [Tuning::Lora(lora), Tuning::Adapter(Adapter { width: 4 }), Tuning::Prefix(Prefix { length: 3 })];
    for tuning in methods {
        let mut tuned = small.duplicate().unwrap();
        tuning.add(&mut tuned, 3).unwrap();
        if !matches!(tuning, Tuning::Prefix(_)) {
            assert_eq!(logits(&tuned), logits(&small));
        }
        let mut optimizer = Optimizer::new(&mut tuned, settings(5e-2), |name| name.starts_with(TUNING)).unwrap();
        let mut loss = || step(&tuned, &mut optimizer, std::slice::from_ref(&micro), &[], (0.0, 1, 40)).unwrap().0;
        let first = loss();
        let last = (1..40).fold(first, |_, _| loss());
        assert!(last < first, "{tuning:?}: {first} to {last}");
        let contexts: Vec<Vec<u32>> = examples(3, 9).into_iter().map(|e| e.context).collect();
        let prompts: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
        let decoding = Decoding { begin: SPECIAL.bos, end: SPECIAL.eos, max_tokens: 5, beams: 1, length_penalty: 1.0 };
        for (context, g) in prompts.iter().zip(generate(&tuned, &prompts, &decoding).unwrap()) {
            let want = full_pass(&tuned, context, &g.tokens, g.finished);
            assert!((want - g.log_probability).abs() < 1e-3, "{tuning:?}: {} for {want}", g.log_probability);
        }
    }
}

#[test]
fn what_a_model_does_not_have_is_refused() {
    let whole = model(Config::glm(SIZE, VOCABULARY), &cpu(), 1);
    let refused = |change: &dyn Fn(&mut Keep), parameter: &str| {
        let mut keep = Keep::all(&whole.config);
        change(&mut keep);
        let error = prune(&whole, &keep).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(parameter), "{error}");
    };
    refused(&|k| k.channels.clear(), "channels");
    refused(&|k| k.channels.push(99), "channels");
    refused(&|k| k.blocks.clear(), "blocks");
    refused(&|k| k.blocks.swap(0, 1), "blocks");
    refused(&|k| k.blocks[1].attention = Some(KeepHeads::whole(&[3], 8)), "heads");
    refused(&|k| k.blocks[1].attention = Some(KeepHeads::whole(&[], 8)), "heads");
    refused(&|k| k.blocks[1].attention.as_mut().unwrap().value[0] = 9, "heads");
    refused(&|k| k.blocks[0].cross = Some(KeepHeads::whole(&[0], 8)), "heads");
    refused(&|k| k.blocks[2].neurons = Some(vec![1, 1]), "neurons");
    let t5 = model(families(SIZE)[3].clone(), &cpu(), 1);
    let mut keep = Keep::all(&t5.config);
    keep.blocks.truncate(3);
    assert!(prune(&t5, &keep).is_err(), "an encoder alone decodes nothing");
}
