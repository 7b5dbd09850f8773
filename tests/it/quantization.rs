//! Quantization: simulated against stored on every device, deployed models against trained ones, methods against plain
//! rounding.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use espalier::compress::freeze::{Form, freeze};
use espalier::compress::quantization::calibrate::{self, Calibrator};
use espalier::compress::quantization::data_free::{self, Request};
use espalier::compress::quantization::{
    Activations, BitSchedule, Format, INPUT_STEP, Levels, Phase, QuantizationAware, STEP, awq, gptq, learned_step,
    smooth, stored,
};
use espalier::device::{self, Device};
use espalier::nn::config::{Activation, NormKind};
use espalier::nn::{self, Config, Model, OutputHook, Pass};
use espalier::op::Op;
use espalier::ops::matmul::Matmul;
use espalier::ops::quant::{FakeQuant, Granularity, GridFrom, MatmulInt8, Quantize, Scheme, StepSlope};
use espalier::recipe::corpus::upload;
use espalier::rng::Stream;
use espalier::shape::Meta;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::Method;
use espalier::train::optimizer::{Optimizer, Rule, Settings};
use espalier::train::precision::Precision;
use espalier::train::schedule::{Schedule, Shape};
use espalier::train::trainer::step;
use espalier::{DType, dispatch};

use crate::model::{SIZE, SPECIAL, assemble, examples, micro};

const VOCABULARY: usize = 37;

/// One device for a test's models and batches.
pub fn cpu() -> Arc<dyn Device> {
    static DEVICE: OnceLock<Arc<dyn Device>> = OnceLock::new();
    DEVICE.get_or_init(crate::model::cpu).clone()
}

pub fn devices(test: &str) -> Vec<Arc<dyn Device>> {
    let mut all = vec![cpu()];
    all.extend(crate::device::wgpu(test));
    match device::open("cuda-host") {
        Ok(device) => all.push(device),
        Err(e) => eprintln!("{test}: cuda-host left out: {e}"),
    }
    all
}

fn model(config: Config, seed: u64) -> Model {
    // Larger weights than a fresh model has, so that rounding shows.
    let mut model = Model::init(config, &cpu(), seed).unwrap();
    let names: Vec<String> = model.tensors.keys().filter(|n| n.ends_with(".weight")).cloned().collect();
    for name in names.iter().filter(|n| n.starts_with("blocks.") && !n.contains("norm")) {
        let tensor = &model.tensors[name];
        let values: Vec<f32> = tensor.to_vec::<f32>().unwrap().iter().map(|w| 8.0 * w).collect();
        model.tensors.insert(name.clone(), Tensor::from_slice(model.device(), tensor.dims(), &values).unwrap());
    }
    model
}

fn linears(model: &Model) -> Vec<String> {
    (0..model.config.blocks.len()).flat_map(Config::linears).collect()
}

fn batches(device: &Arc<dyn Device>, count: u64) -> Vec<nn::Batch> {
    (0..count).map(|i| upload(device, &assemble(&examples(6, 100 + i))).unwrap()).collect()
}

fn logits(model: &Model, batch: &nn::Batch, hook: Option<&QuantizationAware>) -> Vec<f64> {
    let mut pass = Pass::inference(model).hooks(hook.map(|h| h as &dyn OutputHook));
    let hidden = pass.hidden(batch).unwrap();
    pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
}

pub fn nmse(want: &[f64], have: &[f64]) -> f64 {
    let error: f64 = want.iter().zip(have).map(|(w, h)| (w - h).powi(2)).sum();
    error / want.iter().map(|w| w * w).sum::<f64>().max(1e-20)
}

/// With steps that are powers of two every f32 product and sum of simulated operands is exact, so the float product of
/// training must be the integer kernel's output to the bit: one rounding, one scale, one int32 sum.
#[test]
fn the_simulated_product_is_the_integer_kernels_to_the_bit_on_every_device() {
    let (m, n, k) = (9, 21, 200);
    let mut stream = Stream::new(3, 0);
    let mut draw = |count: usize| (0..count).map(|_| stream.normal() as f32).collect::<Vec<f32>>();
    let (x, w) = (draw(m * k), draw(n * k));
    for device in devices("simulated product") {
        let tensor = |dims: &[usize], v: &[f32]| Tensor::from_slice(&device, dims, v).unwrap();
        let (x, w) = (tensor(&[m, k], &x), tensor(&[n, k], &w));
        for bits in 2..=8 {
            let input_step = tensor(&[1], &[0.03125]);
            let steps: Vec<f32> = (0..n).map(|j| 0.5f32.powi(3 + (j % 4) as i32)).collect();
            let steps = tensor(&[n], &steps);
            let (scheme, from) = (Scheme::SymmetricNarrow, GridFrom::Step);
            let of_x = (8, Granularity::Token);
            let of_w = (bits, Granularity::Channel);
            let fake = |(bits, granularity), v: &Tensor, step: &Tensor| {
                dispatch::run_one(&FakeQuant { bits, scheme, granularity, from }, &[v, step]).unwrap()
            };
            let real = |(bits, granularity), v: &Tensor, step: &Tensor| {
                dispatch::run(&Quantize { bits, scheme, granularity, from }, &[v, step]).unwrap()
            };
            let (fake_x, fake_w) = (fake(of_x, &x, &input_step), fake(of_w, &w, &steps));
            let simulated = dispatch::run_one(&Matmul::linear(), &[&fake_x, &fake_w]).unwrap();
            let (qx, qw) = (real(of_x, &x, &input_step), real(of_w, &w, &steps));
            let op = MatmulInt8 { bias: false };
            let kernel = dispatch::run_one(&op, &[&qx[0], &qx[1], &qw[0], &qw[1]]).unwrap();
            let id = &device.info().id;
            assert_eq!(simulated.to_vec::<f32>().unwrap(), kernel.to_vec::<f32>().unwrap(), "{id}, {bits} bits");
            assert!(kernel.to_vec::<f32>().unwrap().iter().any(|y| *y != 0.0));
        }
    }
}

/// Every form of weights and inputs, on a model with pruned weights, keeps its promises on every device.
#[test]
fn promises_hold_for_every_format_on_every_device() {
    let mut model = model(Config::glm(SIZE, VOCABULARY), 3);
    prune(&mut model);
    let names = linears(&model);
    calibrate::input_steps(&mut model, &names, &batches(&cpu(), 2), Calibrator::MinMax).unwrap();
    for device in devices("promises") {
        let model = model.to_device(&device).unwrap();
        for format in formats() {
            let method = QuantizationAware::new(linears(&model), format, None);
            for promise in method.invariants(&model).unwrap() {
                assert!(promise.holds, "{} {format:?}: {promise:?}", device.info().id);
            }
        }
    }
}

/// Zeroes two of every four weights of the first block's linears.
fn prune(model: &mut Model) {
    for linear in Config::linears(0) {
        let name = format!("{linear}.weight");
        let tensor = &model.tensors[&name];
        let values = tensor.to_vec::<f32>().unwrap();
        let values: Vec<f32> = values.iter().enumerate().map(|(i, w)| if i % 4 < 2 { 0.0 } else { *w }).collect();
        let pruned = Tensor::from_slice(model.device(), tensor.dims(), &values).unwrap();
        model.tensors.insert(name, pruned);
    }
}

fn formats() -> Vec<Format> {
    let mut all = Vec::new();
    for activations in [Activations::Token, Activations::Static, Activations::Float] {
        for bits in 2..=8 {
            all.push(Format { bits, activations, ..Format::default() });
        }
        for levels in [Levels::Ternary, Levels::Binary] {
            all.push(Format { levels, activations, ..Format::default() });
        }
    }
    for (bits, group) in [(8, 8), (4, 16), (3, 8), (5, 16)] {
        all.push(Format { bits, group, activations: Activations::Float, ..Format::default() });
    }
    all
}

/// What freezing promises: NMSE of logits against the model under simulated quantization. Sums differ in their roundings
/// alone, but a rounding that falls to the other side moves a later input by a step of 1/127 of its row.
const DEPLOYED: f64 = 1e-4;

#[test]
fn deployed_models_give_the_logits_of_simulated_ones_and_survive_saving() {
    let mut source = model(Config::glm(SIZE, VOCABULARY), 5);
    prune(&mut source);
    let batch = &batches(&cpu(), 1)[0];
    let names = linears(&source);
    calibrate::input_steps(&mut source, &names, &batches(&cpu(), 2), Calibrator::MinMax).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let dense = freeze(&source, Form::default()).unwrap().total_bytes();
    for (index, format) in formats().into_iter().enumerate() {
        let mut model = source.duplicate().unwrap();
        if format.activations != Activations::Static {
            linears(&model).iter().for_each(|l| drop(model.tensors.remove(&format!("{l}.{INPUT_STEP}"))));
        }
        if index % 2 == 1 && format.levels == Levels::Uniform {
            learned_step::begin(&mut model, &names, &Format { activations: Activations::Float, ..format }, &[])
                .unwrap();
        }
        let hook = QuantizationAware::new(linears(&model), format, None);
        let want = logits(&model, batch, Some(&hook));
        for sparse in [false, true] {
            let frozen = freeze(&model, Form { sparse, quantized: Some(format) }).unwrap();
            let have = logits(&frozen, batch, None);
            assert!(nmse(&want, &have) < DEPLOYED, "{format:?} sparse {sparse}: {:e}", nmse(&want, &have));
            assert!(frozen.total_bytes() * 3 < dense * 2, "{format:?}: {} of {dense}", frozen.total_bytes());
            let path = folder.path().join(format!("{index}-{sparse}"));
            let files = espalier::train::store::model_files(&frozen).unwrap();
            espalier::train::store::save(&path, &files, BTreeMap::new()).unwrap();
            let reloaded = espalier::train::store::load_model(&path, &cpu()).unwrap();
            assert_eq!(have, logits(&reloaded, batch, None), "{format:?}");
        }
    }
}

/// 256 random matrices and formats: zeros are the integer 0, integers are levels, and stored times step is what is simulated.
#[test]
fn random_weights_keep_the_promises() {
    let mut stream = Stream::new(17, 0);
    let device = cpu();
    for case in 0..256 {
        let all = formats();
        let format = all[stream.below(all.len())];
        let (n, k) = (1 + stream.below(9), 16 * (1 + stream.below(6)));
        let magnitude = 10f64.powi(stream.below(12) as i32 - 6);
        let zeros = stream.uniform();
        let values: Vec<f32> = (0..n * k)
            .map(|_| if stream.uniform() < zeros { 0.0 } else { (magnitude * stream.normal()) as f32 })
            .collect();
        let mut model = model(Config::glm(SIZE, VOCABULARY), 1);
        model.tensors.insert("a.weight".into(), Tensor::from_slice(&device, &[n, k], &values).unwrap());
        if stream.below(2) == 0 {
            let float = Format { activations: Activations::Float, ..format };
            learned_step::begin(&mut model, &["a".to_string()], &float, &[]).unwrap();
        }
        if format.activations == Activations::Static {
            let step = Tensor::from_slice(&device, &[1], &[0.01f32 + stream.uniform() as f32]).unwrap();
            model.tensors.insert(format!("a.{INPUT_STEP}"), step);
        }
        let method = QuantizationAware::new(vec!["a".into()], format, None);
        for promise in method.invariants(&model).unwrap() {
            assert!(promise.holds, "case {case}: {format:?} {promise:?}");
        }
        let (q, _) = stored(&model, "a", &format).unwrap();
        let highest = format.highest() as i8;
        assert!(q.to_vec::<i8>().unwrap().iter().all(|q| (-highest..=highest).contains(q)), "case {case}");
    }
}

#[test]
fn degenerate_weights_are_defined() {
    let device = cpu();
    for format in formats() {
        for (fill, want) in [(0.0f32, true), (f32::NAN, false)] {
            let mut model = model(Config::glm(SIZE, VOCABULARY), 1);
            let weight = Tensor::from_slice(&device, &[3, 16], &[fill; 48]).unwrap();
            model.tensors.insert("a.weight".into(), weight);
            let (q, scale) = stored(&model, "a", &format).unwrap();
            assert!(q.to_vec::<i8>().unwrap().iter().all(|q| *q == 0), "{format:?} {fill}");
            assert_eq!(scale.to_vec::<f32>().unwrap().iter().all(|s| s.is_finite()), want, "{format:?} {fill}");
        }
    }
    let refused = |format: Format| format.check().unwrap_err().code();
    assert_eq!(refused(Format { bits: 1, ..Format::default() }), "E-PARAMETER");
    assert_eq!(refused(Format { bits: 9, ..Format::default() }), "E-PARAMETER");
    assert_eq!(refused(Format { group: 32, ..Format::default() }), "E-PARAMETER");
    let float = Format { group: 24, activations: Activations::Float, ..Format::default() };
    let model = model(Config::glm(SIZE, VOCABULARY), 1);
    assert_eq!(float.check_model(&model, &linears(&model)).unwrap_err().code(), "E-SHAPE");
    let error = gptq::quantize(&mut model.duplicate().unwrap(), &linears(&model), &Format::default(), &[]).unwrap_err();
    assert_eq!(error.code(), "E-PARAMETER", "{error}");
}

/// What a straight-through estimator is the gradient of: with the rounding's residue held, y = s (x / s + r) inside the
/// levels and s q outside (Esser et al. 2020, section 2.1). Differences of that in f64.
#[test]
fn learned_step_gradients_equal_differences_of_their_definition() {
    let device = device::open("reference").unwrap();
    let mut stream = Stream::new(8, 0);
    let (n, k) = (5, 24);
    for (bits, scheme) in
        [(8, Scheme::SymmetricNarrow), (3, Scheme::SymmetricNarrow), (4, Scheme::SymmetricFull), (2, Scheme::Ternary)]
    {
        for shared in [false, true] {
            let x: Vec<f64> = (0..n * k).map(|_| stream.normal()).collect();
            let dy: Vec<f64> = (0..n * k).map(|_| stream.normal()).collect();
            let high = if bits == 2 { 1.0 } else { f64::from((1 << (bits - 1)) - 1) };
            let low = if scheme == Scheme::SymmetricFull { -high - 1.0 } else { -high };
            let steps: Vec<f64> = (0..if shared { 1 } else { n })
                .map(|_| f64::from((0.5 + stream.uniform()) as f32 * 1.6 / high as f32))
                .collect();
            let granularity = if shared { Granularity::Token } else { Granularity::Channel };
            let tensor = |dims: &[usize], v: &[f64]| Tensor::from_f64(&device, dims, DType::F32, v).unwrap();
            let mut tape = espalier::tape::Tape::new();
            let (vx, vs) = (tape.leaf(&tensor(&[n, k], &x)), tape.leaf(&tensor(&[steps.len()], &steps)));
            let op = FakeQuant { bits, scheme, granularity, from: GridFrom::Step };
            let y = tape.first(op, &[&vx, &vs]).unwrap();
            let grads = tape.backward(&[(&y, &tensor(&[n, k], &dy))]).unwrap();
            let ds = grads.of(&vs).unwrap().unwrap().to_f64().unwrap();
            let dx = grads.of(&vx).unwrap().unwrap().to_f64().unwrap();
            let row_steps = |i: usize| steps[if shared { 0 } else { i / k }];
            let level = |i: usize| (x[i] / row_steps(i)).round_ties_even();
            let surrogate = |i: usize, x_i: f64, s: f64| {
                let q = level(i);
                if (low..=high).contains(&q) {
                    s * (x_i / s + (q - x[i] / row_steps(i)))
                } else {
                    s * q.clamp(low, high)
                }
            };
            let factor = 1.0 / (k as f64 * high).sqrt();
            for (g, have) in ds.iter().enumerate() {
                let elements: Vec<usize> = (0..n * k).filter(|i| shared || i / k == g).collect();
                let h = 1e-4 * steps[g];
                let loss = |s: f64| elements.iter().map(|&i| dy[i] * surrogate(i, x[i], s)).sum::<f64>();
                let want = factor * (loss(steps[g] + h) - loss(steps[g] - h)) / (2.0 * h);
                assert!(
                    (want - have).abs() < 1e-5 * (1.0 + want.abs()),
                    "{bits} bits, shared {shared}: {have} for {want}"
                );
            }
            for (i, have) in dx.iter().enumerate() {
                let h = 1e-4;
                let want =
                    dy[i] * (surrogate(i, x[i] + h, row_steps(i)) - surrogate(i, x[i] - h, row_steps(i))) / (2.0 * h);
                assert!((want - have).abs() < 1e-6, "element {i}: {have} for {want}");
            }
        }
    }
    // A step of activations counts features, not tokens.
    let op = StepSlope { bits: 8, scheme: Scheme::SymmetricNarrow, granularity: Granularity::Channel, factor: 1.0 };
    let meta = |dims: &[usize]| Meta::new(dims, DType::F32).unwrap();
    assert_eq!(op.infer(&[meta(&[2, 8]), meta(&[3]), meta(&[2, 8])]).unwrap_err().code(), "E-SHAPE");
}

/// Every kind of block: the float function stays what it was, in f64.
#[test]
fn smoothing_leaves_the_float_function_unchanged() {
    let oracle = device::open("reference").unwrap();
    let mut configs = vec![Config::glm(SIZE, VOCABULARY), Config::gpt(SIZE, VOCABULARY)];
    for activation in [Activation::Relu, Activation::Gelu, Activation::Geglu] {
        for norm in [NormKind::Layer, NormKind::Rms] {
            let mut config = Config::gpt(SIZE, VOCABULARY);
            config.norm = norm;
            config.blocks.iter_mut().for_each(|b| b.activation = activation);
            configs.push(config);
        }
    }
    for config in configs {
        let device = cpu();
        let truth = model(config.clone(), 4).to_device(&oracle).unwrap();
        let batch = &batches(&oracle, 1)[0];
        let want = logits(&truth, batch, None);
        for alpha in [0.0, 0.5, 0.9] {
            let mut smoothed = truth.duplicate().unwrap();
            smooth::smooth(&mut smoothed, &batches(&oracle, 2), alpha).unwrap();
            let weight = "blocks.1.ffn.out.weight";
            assert_ne!(smoothed.tensors[weight].to_f64().unwrap(), truth.tensors[weight].to_f64().unwrap());
            let error = nmse(&want, &logits(&smoothed, batch, None));
            assert!(error < 1e-20, "{:?} {:?} alpha {alpha}: {error:e}", config.norm, config.blocks[0].activation);
        }
        // In f32 up to roundings, on the fused FFN's way and on that of its two linears.
        let mut smoothed = model(config, 4);
        let want = logits(&smoothed, &batches(&device, 1)[0], None);
        smooth::smooth(&mut smoothed, &batches(&device, 2), 0.5).unwrap();
        assert!(nmse(&want, &logits(&smoothed, &batches(&device, 1)[0], None)) < 1e-9);
    }
    let mut refused = model(Config::gpt(SIZE, VOCABULARY), 1);
    assert_eq!(smooth::smooth(&mut refused, &[], 0.5).unwrap_err().code(), "E-PARAMETER");
    assert_eq!(smooth::smooth(&mut refused, &batches(&cpu(), 1), 1.5).unwrap_err().code(), "E-PARAMETER");
}

/// One channel of every block's inputs far above the others, as large models have: per-token int8 loses the small ones, and
/// smoothing brings them back.
#[test]
fn smoothing_helps_where_inputs_have_outliers() {
    let mut plain = model(Config::gpt(SIZE, VOCABULARY), 6);
    for i in 0..2 {
        for norm in ["norm_attention", "norm_ffn"] {
            let name = format!("blocks.{i}.{norm}.weight");
            let mut values = plain.values(&name).unwrap();
            values[3] *= 60.0;
            let scaled = Tensor::from_slice(plain.device(), &[values.len()], &values).unwrap();
            plain.tensors.insert(name, scaled);
        }
    }
    let batch = &batches(&cpu(), 1)[0];
    let want = logits(&plain, batch, None);
    let error = |model: &Model| {
        nmse(&want, &logits(model, batch, Some(&QuantizationAware::new(linears(model), Format::default(), None))))
    };
    let mut smoothed = plain.duplicate().unwrap();
    smooth::smooth(&mut smoothed, &batches(&cpu(), 3), 0.5).unwrap();
    assert!(error(&smoothed) < 0.5 * error(&plain), "{:e} where plain has {:e}", error(&smoothed), error(&plain));
}

#[test]
fn gptq_and_awq_beat_plain_rounding_and_keep_zeros() {
    let float = model(Config::glm(SIZE, VOCABULARY), 9);
    let data = batches(&cpu(), 8);
    let names = linears(&float);
    for (bits, group) in [(3, 0), (4, 8), (3, 16)] {
        let format = Format { bits, group, activations: Activations::Float, ..Format::default() };
        let hook = QuantizationAware::new(names.clone(), format, None);
        let mut pruned = float.duplicate().unwrap();
        prune(&mut pruned);
        let want = logits(&pruned, &data[0], None);
        let nearest = nmse(&want, &logits(&pruned, &data[0], Some(&hook)));
        for (name, quantize) in [("gptq", gptq::quantize as fn(&mut _, &_, &_, &_) -> _), ("awq", awq::quantize)] {
            let mut model = pruned.duplicate().unwrap();
            quantize(&mut model, &names, &format, &data).unwrap();
            let error = nmse(&want, &logits(&model, &data[0], Some(&hook)));
            println!("{name} {bits} bits, group {group}: {error:e} where rounding to nearest has {nearest:e}");
            assert!(error < nearest, "{name} {bits} bits, group {group}: {error:e} for {nearest:e}");
            for linear in Config::linears(0) {
                let weight = model.values(&format!("{linear}.weight")).unwrap();
                // Later stages read the mask off the zeros: no more of them than there were.
                let zeros = weight.iter().enumerate().all(|(i, w)| (i % 4 < 2) == (*w == 0.0));
                assert!(zeros, "{name} {linear}: a pruned weight came back, or a kept one became 0");
            }
            assert!(hook.invariants(&model).unwrap().iter().all(|i| i.holds));
            let frozen = freeze(&model, Form { sparse: false, quantized: Some(format) }).unwrap();
            let deployed = nmse(&logits(&model, &data[0], Some(&hook)), &logits(&frozen, &data[0], None));
            assert!(deployed < DEPLOYED, "{name}: {deployed:e}");
        }
    }
}

#[test]
fn calibration_finds_steps_with_and_without_data() {
    let source = model(Config::glm(SIZE, VOCABULARY), 11);
    let names = linears(&source);
    let data = batches(&cpu(), 6);
    let want = logits(&source, &data[0], None);
    let request = Request { tokens: 5..VOCABULARY as u32, mark: SPECIAL.gmask, examples: 6, lengths: (5, 4), seed: 3 };
    let made = |examples: &[espalier::data::batch::Example]| upload(&cpu(), &assemble(examples));
    let random = data_free::random(&request);
    let own = data_free::self_generated(&source, &request, &made).unwrap();
    assert!(own.iter().all(|e| e.labels.len() == 4 && e.labels.iter().all(|t| request.tokens.contains(t))));
    assert_ne!(own, random);
    let again = data_free::self_generated(&source, &request, &made).unwrap();
    assert_eq!(own, again);
    let format = Format { activations: Activations::Static, ..Format::default() };
    let hook = QuantizationAware::new(names.clone(), format, None);
    for (kind, batches) in
        [("data", data.clone()), ("random", vec![made(&random).unwrap()]), ("own", vec![made(&own).unwrap()])]
    {
        for calibrator in [
            Calibrator::MinMax,
            Calibrator::MovingAverage,
            Calibrator::Percentile,
            Calibrator::Entropy,
            Calibrator::Mse,
        ] {
            let mut model = source.duplicate().unwrap();
            calibrate::input_steps(&mut model, &names, &batches, calibrator).unwrap();
            assert!(names.iter().all(|l| model.values(&format!("{l}.{INPUT_STEP}")).unwrap()[0] > 0.0));
            let error = nmse(&want, &logits(&model, &data[0], Some(&hook)));
            assert!(error < 0.05, "{kind} {calibrator:?}: {error:e}");
        }
    }
    let error = calibrate::input_steps(&mut source.duplicate().unwrap(), &names, &[], Calibrator::Mse).unwrap_err();
    assert_eq!(error.code(), "E-PARAMETER");
    // Static inputs without a step are refused where they are used.
    let mut pass = Pass::inference(&source).hooks([&hook as &dyn OutputHook]);
    assert!(pass.hidden(&data[0]).unwrap_err().to_string().contains("calibrate"));
}

struct Trained {
    model: Model,
    losses: Vec<f64>,
    /// A step of an input and of a weight after every update.
    steps: Vec<[f32; 2]>,
}

fn train(format: Format, phase: Phase) -> Trained {
    let device = cpu();
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 2).unwrap();
    let names = linears(&model);
    if phase.learned {
        let begin = Format { bits: phase.bits.map_or(format.bits, |b| b.start), ..format };
        learned_step::begin(&mut model, &names, &begin, &batches(&device, 2)).unwrap();
    } else if format.activations == Activations::Static {
        for linear in &names {
            let unseen = Tensor::from_slice(&device, &[1], &[0.0f32]).unwrap();
            model.tensors.insert(format!("{linear}.{INPUT_STEP}"), unseen);
        }
    }
    let schedule = Schedule { peak: 1e-2, warmup: 4, shape: Shape::Constant };
    let rule = Rule::default();
    let settings = Settings { schedule, rule, weight_decay: 0.0, clip: 1.0, precision: Precision::F32 };
    let mut optimizer = Optimizer::new(&mut model, settings, |_| true).unwrap();
    let mut methods: Vec<Box<dyn Method>> = vec![Box::new(QuantizationAware::new(names, format, Some(phase)))];
    let one = |model: &Model, name: String| model.tensors.get(&name).map_or(0.0, |t| t.to_vec::<f32>().unwrap()[0]);
    let (mut losses, mut steps) = (Vec::new(), Vec::new());
    methods[0].on_update(0, &model, &mut optimizer).unwrap();
    for i in 0..phase.steps {
        let micros = [micro(&device, &assemble(&examples(16, i % 8)))];
        let (loss, _) = step(&model, &mut optimizer, &micros, &methods, (0.0, 1, phase.steps)).unwrap();
        methods[0].on_update(i + 1, &model, &mut optimizer).unwrap();
        losses.push(loss);
        let linear = "blocks.0.ffn.in";
        steps.push([one(&model, format!("{linear}.{INPUT_STEP}")), one(&model, format!("{linear}.{STEP}"))]);
    }
    Trained { model, losses, steps }
}

const PLAIN: Phase = Phase { steps: 60, learned: false, tracking: 0.0, bits: None };

fn learns(losses: &[f64], what: &str) {
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[losses.len() - 5..]));
    assert!(last < 0.95 * first, "{what}: {first} to {last}");
}

#[test]
fn observers_follow_inputs_and_rest_in_the_last_quarter() {
    let format = Format { activations: Activations::Static, ..Format::default() };
    let trained = train(format, Phase { tracking: 0.1, ..PLAIN });
    learns(&trained.losses, "moving average");
    let steps: Vec<f32> = trained.steps.iter().map(|s| s[0]).collect();
    assert!(steps[0] > 0.0 && steps[..45].windows(2).all(|w| w[0] != w[1]), "{steps:?}");
    assert!(steps[44..].windows(2).all(|w| w[0] == w[1]), "{steps:?}");
}

#[test]
fn learned_steps_learn_down_to_ternary() {
    for (format, phase) in [
        (Format { bits: 4, activations: Activations::Static, ..Format::default() }, Phase { learned: true, ..PLAIN }),
        (Format { bits: 2, ..Format::default() }, Phase { learned: true, ..PLAIN }),
        (Format { levels: Levels::Ternary, ..Format::default() }, PLAIN),
        (Format { levels: Levels::Binary, activations: Activations::Float, ..Format::default() }, PLAIN),
        (
            Format { bits: 3, group: 8, activations: Activations::Float, ..Format::default() },
            Phase { learned: true, ..PLAIN },
        ),
    ] {
        let trained = train(format, phase);
        learns(&trained.losses, &format!("{format:?}"));
        if phase.learned {
            assert!(trained.steps.windows(2).any(|w| w[0][1] != w[1][1]), "{format:?}");
        }
        let hook = QuantizationAware::new(linears(&trained.model), format, None);
        assert!(hook.invariants(&trained.model).unwrap().iter().all(|i| i.holds), "{format:?}");
        let batch = &batches(&cpu(), 1)[0];
        let frozen = freeze(&trained.model, Form { sparse: false, quantized: Some(format) }).unwrap();
        let error = nmse(&logits(&trained.model, batch, Some(&hook)), &logits(&frozen, batch, None));
        assert!(error < DEPLOYED, "{format:?}: {error:e}");
    }
}

/// When the bits fall, learned steps widen so that their range stays.
#[test]
fn bit_schedules_lower_the_bits_and_keep_ranges() {
    let bits = Some(BitSchedule { start: 8, period: 10, doubling: false });
    let format = Format { bits: 4, ..Format::default() };
    let trained = train(format, Phase { bits, learned: true, ..PLAIN });
    learns(&trained.losses, "schedule");
    let ratio = |at: usize| trained.steps[at][1] / trained.steps[at - 1][1];
    for (at, want) in [(9, 127.0 / 63.0), (19, 63.0 / 31.0), (29, 31.0 / 15.0), (39, 15.0 / 7.0)] {
        assert!((ratio(at) / want - 1.0).abs() < 0.3, "after {at}: {} for {want}", ratio(at));
    }
    assert!((ratio(15) - 1.0).abs() < 0.3 && (ratio(50) - 1.0).abs() < 0.3);
    let plain = train(format, Phase { bits, ..PLAIN });
    learns(&plain.losses, "schedule without steps");
}
