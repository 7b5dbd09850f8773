//! The model against its f64 oracle, generation against full passes, both presets trained.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier::DType;
use espalier::data::batch::{Batch, Example, GmaskPosition, IGNORE};
use espalier::data::layout::Layout;
use espalier::data::tokenizer::SpecialIds;
use espalier::device::{self, Class, Device, Kind, Limits, NullDevice};
use espalier::nn::config::Size;
use espalier::nn::generate::{Decoding, generate};
use espalier::nn::{self, Activation, Config, Model, Pass};
use espalier::recipe::corpus::upload;
use espalier::rng::Stream;
use espalier::shape::Meta;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::Micro;
use espalier::train::optimizer::{Optimizer, Rule, Settings};
use espalier::train::precision::Precision;
use espalier::train::schedule::{Schedule, Shape};
use espalier::train::trainer::{step, weighted_cross_entropy};

use crate::device::wgpu;

pub const SPECIAL: SpecialIds = SpecialIds { pad: 0, unk: 1, bos: 2, eos: 3, gmask: 4 };
pub const SIZE: Size = Size { layers: 2, heads: 2, head_size: 8, ffn_width: 32, max_positions: 32 };
pub const VOCABULARY: usize = 37;

pub fn cpu() -> Arc<dyn Device> {
    device::open("cpu").unwrap()
}

/// Examples of a task that can be learned: the target repeats the context's tokens.
pub fn examples(count: usize, seed: u64) -> Vec<Example> {
    let mut stream = Stream::new(seed, 0);
    let mut example = || {
        let tokens: Vec<u32> = (0..2 + stream.below(5)).map(|_| 5 + stream.below(VOCABULARY - 5) as u32).collect();
        let context = tokens.iter().copied().chain([SPECIAL.gmask]).collect();
        Example { context, labels: tokens.into_iter().chain([SPECIAL.eos]).collect() }
    };
    (0..count).map(|_| example()).collect()
}

pub fn micro(device: &Arc<dyn Device>, batch: &Batch) -> Micro {
    let n = batch.targets.len();
    let weights: Vec<f32> = batch.targets.iter().map(|&t| f32::from(t != IGNORE)).collect();
    Micro {
        batch: upload(device, batch).unwrap(),
        targets: Tensor::from_slice(device, &[n], &batch.targets).unwrap(),
        weights: Tensor::from_slice(device, &[n], &weights).unwrap(),
        weight: batch.token_count as f64,
        gold: true,
        tokens: batch.token_count,
        teacher: None,
    }
}

pub fn assemble(examples: &[Example]) -> Batch {
    laid_out(examples, Layout::Prefix(GmaskPosition::MaskIndex))
}

pub fn laid_out(examples: &[Example], layout: Layout) -> Batch {
    layout.assemble(&examples.iter().collect::<Vec<_>>(), SPECIAL)
}

/// Loss and all parameter gradients of one micro-batch.
fn gradients(model: &Model, batch: &Batch) -> (f64, BTreeMap<String, Vec<f64>>) {
    let micro = micro(model.device(), batch);
    let mut pass = Pass::training(model);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
    let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0]).unwrap();
    let (tape, leaves) = pass.into_leaves();
    let grads = tape.backward(&[(&loss, &seed)]).unwrap();
    let values = leaves.iter().filter_map(|(n, v)| Some((n.clone(), grads.of(v)?.unwrap().to_f64().unwrap())));
    (loss.tensor.to_f64().unwrap()[0], values.collect())
}

pub fn nmse(want: &[f64], have: &[f64]) -> f64 {
    let error: f64 = want.iter().zip(have).map(|(w, h)| (w - h).powi(2)).sum();
    error / want.iter().map(|w| w * w).sum::<f64>().max(1e-20)
}

pub fn check_against_oracle(config: Config, layout: Layout) {
    check_on(&cpu(), config, layout);
}

fn check_on(device: &Arc<dyn Device>, config: Config, layout: Layout) {
    let oracle = device::open("reference").unwrap();
    let model = Model::init(config, device, 3).unwrap();
    let truth = model.to_device(&oracle).unwrap();
    let batch = laid_out(&examples(3, 1), layout);
    let (loss, grads) = gradients(&model, &batch);
    let (want_loss, want) = gradients(&truth, &batch);
    assert!((loss - want_loss).abs() < 1e-5 * want_loss.abs(), "{loss} where the oracle has {want_loss}");
    assert_eq!(grads.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    // Key biases shift all scores of a query alike, so their gradient is zero but for rounding.
    for (name, want) in want.iter().filter(|(n, _)| !n.ends_with("key.bias")) {
        let error = nmse(want, &grads[name]);
        assert!(error < 1e-8, "{name}: {error:e}");
    }
}

#[test]
fn glm_gradients_equal_the_f64_oracle() {
    check_against_oracle(Config::glm(SIZE, VOCABULARY), Layout::Prefix(GmaskPosition::MaskIndex));
}

#[test]
fn gpt_gradients_equal_the_f64_oracle() {
    check_against_oracle(Config::gpt(SIZE, VOCABULARY), Layout::Prefix(GmaskPosition::MaskIndex));
}

/// Ops that a pass records for the FFN of a block, and for the loss of a language head over that many rows and words.
fn recorded(device: &Arc<dyn Device>, compute: Option<DType>, rows: usize, words: usize) -> [usize; 2] {
    let model = Model::init(Config::gpt(SIZE, words), device, 3).unwrap();
    let mut pass = Pass::training(&model).computing(compute);
    let zeros = |dims: &[usize], dtype| Tensor::zeros(device, Meta::new(dims, dtype).unwrap()).unwrap();
    let x = pass.constant(&zeros(&[rows, model.config.width], DType::F32)).unwrap();
    // A weight enters a product in 16 bits by a cast that is recorded too.
    for part in ["in.weight", "in.bias", "out.weight", "out.bias"] {
        pass.parameter(&format!("blocks.0.ffn.{part}")).unwrap();
    }
    pass.parameter("embedding.tokens").unwrap();
    let before = pass.tape.len();
    pass.ffn(0, &x).unwrap();
    let between = pass.tape.len();
    let (targets, weights) = (zeros(&[rows], DType::U32), zeros(&[rows], DType::F32));
    weighted_cross_entropy(&mut pass, &x, &targets, &weights).unwrap();
    [between - before, pass.tape.len() - between]
}

#[test]
fn only_a_software_adapter_takes_fused_ops_apart_and_only_in_f32() {
    let null = |kind, class| -> Arc<dyn Device> { Arc::new(NullDevice::new(kind, class, Limits::webgpu())) };
    // One FFN, or two products around an activation; a loss of logits that are never held, or a product and a loss; with the
    // rows' weights and their sum.
    let (fused, apart) = ([1, 3], [3, 4]);
    let software = null(Kind::Wgpu, Class::Cpu);
    assert_eq!(recorded(&software, None, 24, VOCABULARY), apart);
    for other in [null(Kind::Wgpu, Class::Simt), null(Kind::Wgpu, Class::Coop), null(Kind::Cuda, Class::Simt), cpu()] {
        assert_eq!(recorded(&other, None, 24, VOCABULARY), fused, "{}", other.info().id);
    }
    assert_eq!(recorded(&software, Some(DType::Bf16), 24, VOCABULARY), fused);
    // Logits beyond what a binding holds.
    assert_eq!(recorded(&software, None, 8192, 4096), apart);
    assert_eq!(recorded(&software, None, 8193, 4096), [3, 3]);
}

#[test]
fn products_on_an_adapter_give_the_gradients_that_fused_ops_have_in_f64() {
    let Some(device) = wgpu("products on an adapter") else { return };
    for (activation, vocabulary) in [(Activation::Gelu, 40), (Activation::Geglu, VOCABULARY), (Activation::Relu, 40)] {
        let mut config = Config::gpt(SIZE, vocabulary);
        config.blocks.iter_mut().for_each(|block| block.activation = activation);
        check_on(&device, config, Layout::Prefix(GmaskPosition::MaskIndex));
    }
}

/// Log-probability of `tokens` and the end mark after `context`, from one full pass.
pub fn full_pass(model: &Model, context: &[u32], tokens: &[u32], finished: bool) -> f64 {
    let mut labels = tokens.to_vec();
    if finished {
        labels.push(SPECIAL.eos);
    }
    let example = Example { context: context.to_vec(), labels: labels.clone() };
    let batch = assemble(&[example]);
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&upload(model.device(), &batch).unwrap()).unwrap();
    let logits = pass.logits(&hidden).unwrap().tensor.to_f64().unwrap();
    let row = |t: usize| &logits[t * VOCABULARY..(t + 1) * VOCABULARY];
    let log_sum = |row: &[f64]| row.iter().map(|x| x.exp()).sum::<f64>().ln();
    labels.iter().enumerate().map(|(i, &l)| row(context.len() + i)[l as usize] - log_sum(row(context.len() + i))).sum()
}

#[test]
fn generation_with_a_cache_equals_full_passes() {
    let model = Model::init(Config::glm(SIZE, VOCABULARY), &cpu(), 5).unwrap();
    // Prompts of different lengths share a batch.
    let contexts: Vec<Vec<u32>> = examples(4, 9).into_iter().map(|e| e.context).collect();
    let prompts: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
    for beams in [1, 3] {
        let decoding = Decoding { begin: SPECIAL.bos, end: SPECIAL.eos, max_tokens: 6, beams, length_penalty: 1.0 };
        for (context, g) in prompts.iter().zip(generate(&model, &prompts, &decoding).unwrap()) {
            let want = full_pass(&model, context, &g.tokens, g.finished);
            assert!(
                (want - g.log_probability).abs() < 1e-3,
                "{beams} beams: {} where a full pass gives {want}",
                g.log_probability
            );
        }
    }
}

#[test]
fn a_beam_finds_at_least_what_greedy_search_finds() {
    let model = Model::init(Config::glm(SIZE, VOCABULARY), &cpu(), 6).unwrap();
    let contexts: Vec<Vec<u32>> = examples(6, 2).into_iter().map(|e| e.context).collect();
    let prompts: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
    let run = |beams| {
        let decoding = Decoding { begin: SPECIAL.bos, end: SPECIAL.eos, max_tokens: 5, beams, length_penalty: 0.0 };
        generate(&model, &prompts, &decoding).unwrap().iter().map(|g| g.log_probability).sum::<f64>()
    };
    assert!(run(8) >= run(1) - 1e-6);
}

pub fn settings(peak: f64) -> Settings {
    let schedule = Schedule { peak, warmup: 5, shape: Shape::Constant };
    Settings { schedule, rule: Rule::default(), weight_decay: 0.0, clip: 1.0, precision: Precision::F32 }
}

#[test]
fn the_glm_preset_learns_to_copy() {
    let device = cpu();
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 1).unwrap();
    let mut optimizer = Optimizer::new(&mut model, settings(5e-3), |_| true).unwrap();
    let micro = micro(&device, &assemble(&examples(24, 4)));
    let mut losses = Vec::new();
    for _ in 0..80 {
        losses.push(step(&model, &mut optimizer, std::slice::from_ref(&micro), &[], (0.0, 1, 80)).unwrap().0);
    }
    assert!(losses[79] < 0.5 * losses[0], "{} to {}", losses[0], losses[79]);
}

/// 16-bit products and activations over f32 parameters lose no more than rounding.
#[test]
fn mixed_precision_learns_as_f32_does() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(24, 4)));
    let last = |precision: Precision| {
        let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 1).unwrap();
        let mut optimizer = Optimizer::new(&mut model, Settings { precision, ..settings(5e-3) }, |_| true).unwrap();
        let mut loss = 0.0;
        for _ in 0..80 {
            loss = step(&model, &mut optimizer, std::slice::from_ref(&micro), &[], (0.1, 1, 80)).unwrap().0;
        }
        assert!(model.tensors.values().all(|t| t.dtype() == DType::F32));
        loss
    };
    let exact = last(Precision::F32);
    for precision in [Precision::Bf16, Precision::F16] {
        let loss = last(precision);
        assert!((loss - exact).abs() < 0.1 * exact, "{precision:?}: {loss} where f32 has {exact}");
        assert!(loss != exact, "{precision:?} computed in f32");
    }
}

fn scale_of(optimizer: &Optimizer) -> f32 {
    optimizer.loss_scale(&[]).unwrap().to_vec::<f32>().unwrap()[0]
}

#[test]
fn an_overflow_in_f16_costs_a_step_and_halves_the_scale() {
    let device = cpu();
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 1).unwrap();
    let settings = Settings { precision: Precision::F16, ..settings(1e-2) };
    let mut optimizer = Optimizer::new(&mut model, settings, |_| true).unwrap();
    let mut micro = micro(&device, &assemble(&examples(4, 4)));
    let rows = micro.weights.count();
    let before = model.get("embedding.tokens").unwrap().to_bytes().unwrap();
    let scale = scale_of(&optimizer);
    // 64 times the scale is above the largest f16.
    micro.weights = Tensor::from_slice(&device, &[rows], &vec![64.0f32; rows]).unwrap();
    let (_, norm) = step(&model, &mut optimizer, std::slice::from_ref(&micro), &[], (0.0, 1, 10)).unwrap();
    assert_eq!((norm, scale_of(&optimizer), optimizer.steps()), (0.0, scale / 2.0, 1));
    assert_eq!(model.get("embedding.tokens").unwrap().to_bytes().unwrap(), before);
    for _ in 1..12 {
        step(&model, &mut optimizer, std::slice::from_ref(&micro), &[], (0.0, 1, 12)).unwrap();
    }
    assert!(model.get("embedding.tokens").unwrap().to_bytes().unwrap() != before, "a smaller scale gets through");
    // The scale is part of what a checkpoint keeps.
    let (state, last) = (optimizer.state().unwrap(), scale_of(&optimizer));
    let mut resumed = Optimizer::new(&mut model, settings, |_| true).unwrap();
    resumed.restore(&state, 12).unwrap();
    assert_eq!(scale_of(&resumed), last);
}

/// Splitting a batch into micro-batches changes the update only by rounding: token counts weigh it.
#[test]
fn gradient_accumulation_equals_the_whole_batch() {
    let device = cpu();
    let all = examples(8, 11);
    let run = |parts: &[&[Example]]| {
        let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 1).unwrap();
        let mut optimizer = Optimizer::new(&mut model, settings(1e-2), |_| true).unwrap();
        let micros: Vec<Micro> = parts.iter().map(|p| micro(&device, &assemble(p))).collect();
        let (loss, norm) = step(&model, &mut optimizer, &micros, &[], (0.0, 1, 10)).unwrap();
        (loss, norm)
    };
    // The parts hold different numbers of tokens.
    let (whole, split) = (run(&[&all]), run(&[&all[..3], &all[3..4], &all[4..]]));
    assert!((whole.0 - split.0).abs() < 1e-5 * whole.0, "{} {}", whole.0, split.0);
    assert!((whole.1 - split.1).abs() < 1e-4 * whole.1, "{} {}", whole.1, split.1);
}

#[test]
fn a_gradient_that_is_not_finite_names_its_layer_and_changes_nothing() {
    let device = cpu();
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 1).unwrap();
    let mut values = model.values("blocks.1.ffn.in.weight").unwrap();
    values[7] = f32::NAN;
    let poisoned = Tensor::from_slice(&device, &[32, 16], &values).unwrap();
    model.tensors.insert("blocks.1.ffn.in.weight".into(), poisoned);
    let mut optimizer = Optimizer::new(&mut model, settings(1e-2), |_| true).unwrap();
    let before = model.get("embedding.tokens").unwrap().to_bytes().unwrap();
    let micro = micro(&device, &assemble(&examples(4, 4)));
    let error = step(&model, &mut optimizer, &[micro], &[], (0.0, 1, 10)).unwrap_err();
    assert!(matches!(error, espalier::Error::NonFinite { step: 1, .. }), "{error}");
    assert_eq!(model.get("embedding.tokens").unwrap().to_bytes().unwrap(), before);
}

/// Hidden states do not depend on the padding that a batch's longest row brings.
#[test]
fn padding_changes_nothing() {
    let model = Model::init(Config::glm(SIZE, VOCABULARY), &cpu(), 8).unwrap();
    let all = examples(6, 21);
    let hidden = |batch: &Batch| {
        let inputs: nn::Batch = upload(model.device(), batch).unwrap();
        Pass::inference(&model).hidden(&inputs).unwrap().tensor.to_f64().unwrap()
    };
    let together = assemble(&all);
    let states = hidden(&together);
    for (row, example) in all.iter().enumerate() {
        let alone = hidden(&assemble(std::slice::from_ref(example)));
        let n = example.length() * model.config.width;
        let start = row * together.columns * model.config.width;
        assert!(nmse(&alone[..n], &states[start..start + n]) < 1e-10);
    }
}

/// A recomputed segment keeps only its inputs and gives the gradients of the plain tape, to the bit.
#[test]
fn recomputed_segments_give_the_same_gradients() {
    use espalier::ops::matmul::Matmul;
    use espalier::ops::unary::{Function, Unary};
    use espalier::tape::{Tape, Var};

    let device = cpu();
    let mut stream = Stream::new(3, 0);
    let mut draw = |dims: &[usize]| {
        let values: Vec<f64> = (0..dims.iter().product()).map(|_| stream.normal()).collect();
        Tensor::from_f64(&device, dims, DType::F32, &values).unwrap()
    };
    let (x, w, dy) = (draw(&[5, 8]), draw(&[8, 8]), draw(&[5, 8]));
    let block = |tape: &mut Tape, v: &[Var]| -> espalier::Result<Vec<Var>> {
        let h = tape.first(Matmul::linear(), &[&v[0], &v[1]])?;
        let h = tape.first(Unary(Function::GeluTanh), &[&h])?;
        Ok(vec![tape.first(Matmul::linear(), &[&h, &v[1]])?])
    };
    let run = |recompute: bool| {
        let mut tape = Tape::new();
        let leaves = [tape.leaf(&x), tape.leaf(&w)];
        let y = if recompute {
            tape.segment(Arc::new(block), &[&leaves[0], &leaves[1]]).unwrap()
        } else {
            block(&mut tape, &leaves).unwrap()
        };
        let nodes = tape.len();
        let grads = tape.backward(&[(&y[0], &dy)]).unwrap();
        (nodes, leaves.map(|l| grads.of(&l).unwrap().unwrap().to_bytes().unwrap()))
    };
    let (plain, segment) = (run(false), run(true));
    assert_eq!((plain.0, segment.0), (3, 1));
    assert!(plain.1 == segment.1);
}
