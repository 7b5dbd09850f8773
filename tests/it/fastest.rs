//! Ways to compute a layer: each is the stored form's function on every device, and the one that is taken was measured.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier::DType;
use espalier::compress::experts::{Settings, convert};
use espalier::compress::fastest::{self, Choice, Measured};
use espalier::compress::freeze::{Form, deployable, freeze};
use espalier::compress::quantization::{Activations, Format, INPUT_STEP};
use espalier::compress::tuning::{Lora, Tuning};
use espalier::device::Device;
use espalier::nn::config::Activation;
use espalier::nn::ways::{Way, Ways, dense_weight};
use espalier::nn::{self, Config, Model, Pass};
use espalier::recipe::corpus::upload;
use espalier::rng::Stream;
use espalier::tape::Var;
use espalier::tensor::Tensor;

use crate::model::{SIZE, assemble, examples};
use crate::quantization::{cpu, devices, nmse};

/// Half of the weights of each group of four are zero.
fn pruned() -> Model {
    let mut config = Config::glm(SIZE, 37);
    config.blocks.iter_mut().for_each(|block| block.activation = Activation::Relu);
    let mut model = Model::init(config, &cpu(), 3).unwrap();
    let names: Vec<String> = model.config.all_linears().iter().map(|l| format!("{l}.weight")).collect();
    for name in names {
        let tensor = model.get(&name).unwrap();
        let values = tensor.to_vec::<f32>().unwrap();
        let zeroed: Vec<f32> = values
            .iter()
            .enumerate()
            .map(|(i, w)| if [i / 4 % 4, (i / 4 + 1) % 4].contains(&(i % 4)) { 0.0 } else { 8.0 * w })
            .collect();
        let tensor = Tensor::from_slice(&cpu(), tensor.dims(), &zeroed).unwrap();
        model.tensors.insert(name, tensor);
    }
    model
}

fn batch(device: &Arc<dyn Device>) -> nn::Batch {
    upload(device, &assemble(&examples(6, 11))).unwrap()
}

fn split() -> Model {
    let settings = Settings { expert_size: 16, share: 0.5, ..Settings::default() };
    convert(&pruned(), settings, &[batch(&cpu())]).unwrap().0
}

/// Of a router's scores: some of the selected are above it.
const BOUND: f32 = 0.05;

/// Experts of which a token runs those of the selected that the router scores above a bound.
fn above(threshold: f32) -> Model {
    let mut model = split();
    model.config.blocks.iter_mut().filter_map(|b| b.experts.as_mut()).for_each(|e| e.threshold = Some(threshold));
    model
}

/// Seven of eight weights are zero, in no pattern of four: whole blocks of four are.
fn scattered() -> Model {
    let mut model = pruned();
    for (i, linear) in model.config.all_linears().iter().enumerate() {
        let name = format!("{linear}.weight");
        let tensor = model.get(&name).unwrap();
        // Another count in each layer.
        let mut stream = Stream::new(4, i as u32);
        let keep: Vec<bool> = (0..tensor.count().div_ceil(4)).map(|_| stream.below(4) == 0).collect();
        let values: Vec<f32> =
            (0..tensor.count()).map(|i| if keep[i / 4] && i % 4 != 3 { stream.normal() as f32 } else { 0.0 }).collect();
        let tensor = Tensor::from_slice(&cpu(), tensor.dims(), &values).unwrap();
        model.tensors.insert(name, tensor);
    }
    model
}

#[test]
fn unstructured_zeros_are_left_out_of_what_is_deployed() {
    let model = scattered();
    for quantized in [None, Some(Format::default())] {
        let form = Form { sparse: false, quantized };
        let (dense, small) = (freeze(&model, form).unwrap(), deployable(&model, form).unwrap());
        let linears = model.config.all_linears();
        // Bitmaps of whole blocks of 64 words are too much beside 16 bytes a row.
        let left_out = linears.iter().filter(|l| small.tensors.contains_key(&format!("{l}.kept"))).count();
        let (wanted, share) = if quantized.is_some() { (1, 1.0) } else { (linears.len(), 0.5) };
        assert!(left_out >= wanted, "{quantized:?}: {left_out}");
        assert!((small.activated_bytes() as f64) < share * dense.activated_bytes() as f64, "{quantized:?}");
        let bits = |model: &Model, l: &str| dense_weight(model, l).unwrap().to_bytes().unwrap();
        assert!(linears.iter().all(|l| bits(&dense, l) == bits(&small, l)), "{quantized:?}");
        assert!(nmse(&logits(&dense), &logits(&small)) < 1e-10);
        // Saved, checked on reading, and the same.
        let files = espalier::train::store::model_files(&small).unwrap();
        let mut files: BTreeMap<String, Vec<u8>> = files.into_iter().map(|(n, bytes)| (n.to_string(), bytes)).collect();
        let again = espalier::train::store::model_from(std::path::Path::new("memory"), &files, &cpu()).unwrap();
        assert_eq!(logits(&small), logits(&again));
        let listed = linears.iter().find(|l| small.tensors.contains_key(&format!("{l}.kept"))).unwrap();
        let lists = format!("{listed}.lists");
        let whole = small.get(&lists).unwrap();
        let mut elsewhere = whole.to_vec::<u32>().unwrap();
        elsewhere[3 * 2 + 2] = 1 << 20;
        // Kernels would read where these say.
        for (dims, values) in [(&[1, 1, 3][..], &[0u32; 3][..]), (whole.dims(), &elsewhere)] {
            let mut broken = small.clone();
            broken.tensors.insert(lists.clone(), Tensor::from_slice(&cpu(), dims, values).unwrap());
            let broken = espalier::train::store::model_files(&broken).unwrap();
            files.extend(broken.into_iter().map(|(n, b)| (n.to_string(), b)));
            let path = std::path::Path::new("memory");
            let error = espalier::train::store::model_from(path, &files, &cpu()).err().unwrap();
            assert!(error.to_string().contains(&lists), "{error}");
        }
    }
    // Nothing to leave out.
    let whole = Model::init(Config::glm(SIZE, 37), &cpu(), 3).unwrap();
    assert_eq!(deployable(&whole, Form::default()).unwrap().total_bytes(), whole.total_bytes());
}

/// A deployed model also computes in 16 bits, as a teacher of a mixed precision run does.
#[test]
fn what_is_left_out_is_left_out_in_16_bits_too() {
    let small = deployable(&scattered(), Form::default()).unwrap();
    assert!(small.tensors.keys().any(|name| name.ends_with(".kept")));
    let want = logits(&small);
    for to in [DType::Bf16, DType::F16] {
        let mut pass = Pass::inference(&small).computing(Some(to));
        let hidden = pass.hidden(&batch(small.device())).unwrap();
        let have = pass.logits(&hidden).unwrap().tensor.to_f64().unwrap();
        assert!(nmse(&want, &have) < 1e-3, "{to}: {}", nmse(&want, &have));
    }
}

/// Low-rank updates under a mask that stay beside the weights: deployed, the model computes what was trained.
#[test]
fn updates_under_a_mask_are_deployed_as_they_were_trained() {
    for source in [pruned(), scattered()] {
        let mut tuned = source;
        let linears = ["attention", "ffn"].map(String::from).to_vec();
        Tuning::Lora(Lora { linears, ..Lora::default() }).add(&mut tuned, 1).unwrap();
        let names: Vec<String> = tuned.tensors.keys().filter(|n| n.ends_with(".lora.up")).cloned().collect();
        for name in names {
            let up = tuned.get(&name).unwrap();
            let ones = Tensor::from_slice(&cpu(), up.dims(), &vec![0.01f32; up.count()]).unwrap();
            tuned.tensors.insert(name, ones);
        }
        let sparse = deployable(&tuned, Form { sparse: true, quantized: None }).unwrap();
        assert!(sparse.tensors.keys().any(|n| n.ends_with(".values") || n.ends_with(".kept")));
        assert!(nmse(&logits(&tuned), &logits(&sparse)) < 1e-10);
    }
}

/// The pruned model with a step for each linear's inputs and factors in front of it.
fn prepared() -> Model {
    let mut model = pruned();
    for linear in model.config.all_linears() {
        let k = model.get(&format!("{linear}.weight")).unwrap().shape().last();
        let factors: Vec<f32> = (0..k).map(|i| 0.5 + (i % 3) as f32).collect();
        let put = |values: &[f32]| Tensor::from_slice(&cpu(), &[values.len()], values).unwrap();
        model.tensors.insert(format!("{linear}.smooth"), put(&factors));
        model.tensors.insert(format!("{linear}.{INPUT_STEP}"), put(&[0.03]));
    }
    model
}

fn formats() -> [Option<Format>; 4] {
    let only = |bits, group| Format { bits, group, activations: Activations::Float, ..Format::default() };
    [None, Some(Format::default()), Some(only(8, 8)), Some(only(4, 16))]
}

fn logits(model: &Model) -> Vec<f64> {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&batch(model.device())).unwrap();
    pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
}

/// What a layer gives for five rows; its block where it is one of experts.
fn output(model: &Model, layer: &str) -> Vec<f64> {
    let block = layer.strip_prefix("blocks.").and_then(|l| l.strip_suffix(".ffn")).map(|i| i.parse().unwrap());
    let width = match block {
        Some(_) => model.config.width,
        None => dense_weight(model, layer).unwrap().shape().last(),
    };
    let mut stream = Stream::new(9, 0);
    let values: Vec<f32> = (0..5 * width).map(|_| stream.normal() as f32).collect();
    let x = Var::constant(Tensor::from_slice(model.device(), &[5, width], &values).unwrap());
    let mut pass = Pass::inference(model);
    let y = match block {
        Some(i) => pass.ffn(i, &x),
        None => pass.linear(layer, &x),
    };
    y.unwrap().tensor.to_f64().unwrap()
}

fn only(model: &Model, layer: &str, way: Way) -> Model {
    let mut other = model.clone();
    other.set_ways(layer, Ways { all: vec![way], taken: vec![(1, 0)] });
    other
}

/// Else the tests below say nothing of a bound, nor of the dense way under one.
#[test]
fn a_bound_leaves_some_of_the_selected_experts_out() {
    let runs = |bound| output(&above(bound), "blocks.0.ffn");
    let names: Vec<_> = fastest::ways(&above(BOUND), "blocks.0.ffn").unwrap().iter().map(Way::name).collect();
    assert_eq!(names, ["stored", "sorted", "dense f32 with the others set to 0"]);
    let all = runs(f32::MIN);
    assert_eq!(all, output(&split(), "blocks.0.ffn"));
    let lost = nmse(&all, &runs(BOUND));
    assert!((0.1..0.9).contains(&lost), "{lost} of the output is lost");
}

/// Layer by layer, so that no rounding behind it hides or adds anything.
#[test]
fn every_way_is_the_stored_forms_function_on_every_device() {
    let mut seen = std::collections::BTreeSet::new();
    let static_inputs = Some(Format { activations: Activations::Static, ..Format::default() });
    let sources = [pruned(), split(), above(BOUND)];
    let cases = sources.iter().flat_map(|m| formats().map(|f| (m.clone(), f))).chain([(prepared(), static_inputs)]);
    let scattered = [None, Some(Format::default())].map(|f| (scattered(), f));
    for (source, format) in cases.chain(scattered) {
        for device in devices("every_way_is_the_stored_forms_function_on_every_device") {
            let form = Form { sparse: true, quantized: format };
            let stored = deployable(&source, form).unwrap().to_device(&device).unwrap();
            let mut layers = fastest::layers(&stored);
            // The first block has every kind of layer.
            layers.retain(|(layer, _)| layer.starts_with("blocks.0."));
            for (layer, form) in layers {
                let want = output(&stored, &layer);
                for way in fastest::ways(&stored, &layer).unwrap().split_off(1) {
                    let have = output(&only(&stored, &layer, way.clone()), &layer);
                    let error = nmse(&want, &have);
                    assert!(error < 1e-10, "{} {layer} ({form}) as {}: {error:e}", device.info().id, way.name());
                    if matches!(way, Way::Int8 { .. }) {
                        assert_eq!(want, have, "integer sums are exact: {layer}");
                    }
                    seen.insert((form, way.name()));
                }
            }
        }
    }
    let forms: Vec<&str> = seen.iter().map(|(form, _)| *form).collect();
    let all = ["2:4", "2:4 int8", "unstructured", "unstructured int8", "int8", "int4", "experts"];
    assert!(all.iter().all(|f| forms.contains(f)), "{seen:?}");
}

/// Weights of zeros stand where a way's would: whether they are multiplied shows in the output.
#[test]
fn a_way_is_what_runs_and_not_where_something_learns_or_is_hooked() {
    let zeros = |like: &Tensor| Tensor::zeros(like.device(), like.meta()).unwrap();
    let experts = [split(), above(BOUND)].map(|model| (model, "blocks.0.ffn"));
    for (model, layer) in [(pruned(), "blocks.0.ffn.in")].into_iter().chain(experts) {
        let stored = freeze(&model, Form { sparse: true, quantized: Some(Format::default()) }).unwrap();
        let want = output(&stored, layer);
        for way in fastest::ways(&stored, layer).unwrap().split_off(1) {
            let empty = match way {
                Way::Int8 { weight, scale } => Way::Int8 { weight: zeros(&weight), scale },
                Way::Float { weight } => Way::Float { weight: zeros(&weight) },
                Way::AllExperts { inner, outer } => Way::AllExperts { inner: zeros(&inner), outer },
                Way::Stored | Way::Sorted => continue,
            };
            let other = only(&stored, layer, empty);
            assert_ne!(want, output(&other, layer));
            assert_eq!(want, output(&other.as_stored(), layer));
            assert!(other.ways_bytes() > 0 && other.total_bytes() == stored.total_bytes());
        }
    }
    // What is tuned beside a layer is added on any way.
    let mut tuned = freeze(&pruned(), Form { sparse: true, quantized: Some(Format::default()) }).unwrap();
    Tuning::Lora(Lora { linears: vec!["ffn.in".into()], ..Lora::default() }).add(&mut tuned, 1).unwrap();
    let up = tuned.tensors.iter().find(|(name, _)| name.ends_with("blocks.0.ffn.in.lora.up")).unwrap();
    let (name, ones) = (up.0.clone(), vec![1.0f32; up.1.count()]);
    let ones = Tensor::from_slice(&cpu(), up.1.dims(), &ones).unwrap();
    let before = output(&tuned, "blocks.0.ffn.in");
    tuned.tensors.insert(name, ones);
    let want = output(&tuned, "blocks.0.ffn.in");
    assert!(nmse(&before, &want) > 1e-6);
    for way in fastest::ways(&tuned, "blocks.0.ffn.in").unwrap() {
        assert!(nmse(&want, &output(&only(&tuned, "blocks.0.ffn.in", way), "blocks.0.ffn.in")) < 1e-10);
    }
}

/// One after the other, so that their weights are as cold as in the model.
#[test]
fn layers_of_one_shape_are_timed_together_however_many_zeros_each_has() {
    let small = deployable(&scattered(), Form::default()).unwrap();
    let (_, measured) = fastest::fastest(&small, &[1], "", &batch(&cpu())).unwrap();
    let times = |end: &str| -> Vec<f64> {
        measured.choices.iter().filter(|c| c.layer.ends_with(end)).map(|c| c.stored_us).collect()
    };
    for end in ["attention.query", "ffn.in"] {
        let times = times(end);
        assert!(times.len() == SIZE.layers && times.iter().all(|t| *t == times[0]), "{end}: {times:?}");
    }
}

/// Kernels that skip zeros are slow on GPUs: nothing but a measurement chooses them.
#[test]
fn without_a_measurement_unstructured_layers_run_dense_on_gpus() {
    let small = deployable(&scattered(), Form::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    espalier::train::store::save(&path, &espalier::train::store::model_files(&small).unwrap(), BTreeMap::new())
        .unwrap();
    for device in devices("without_a_measurement_unstructured_layers_run_dense_on_gpus") {
        let (model, _) = fastest::load(&path, &device).unwrap();
        let on_cpu = device.info().id.starts_with("cpu");
        assert_eq!(model.ways().is_empty(), on_cpu);
        assert!(model.ways().values().all(|ways| ways.at(1).unwrap().name() == "dense f32"));
        // Nor does a file of choices that cannot be followed.
        let (_, mut measured) = fastest::fastest(&small, &[1], "blocks.0.attention.query", &batch(&cpu())).unwrap();
        measured.device = device.info().name.clone();
        measured.choices[0].way = "sorted".into();
        let mut files = espalier::train::store::model_files(&small).unwrap();
        files.extend(fastest::file(&measured).unwrap());
        let other = folder.path().join(device.info().id.replace(':', "-"));
        espalier::train::store::save(&other, &files, BTreeMap::new()).unwrap();
        let (model, read) = fastest::load(&other, &device).unwrap();
        assert!(read.is_empty() && model.ways().is_empty() == on_cpu);
    }
}

#[test]
fn what_is_taken_was_faster_and_is_kept_with_the_model() {
    let stored = freeze(&pruned(), Form { sparse: true, quantized: None }).unwrap();
    let (fast, measured) = fastest::fastest(&stored, &[1, 64], "", &batch(&cpu())).unwrap();
    let choices = measured.choices;
    assert_eq!(choices.len(), 2 * stored.config.all_linears().len());
    for choice in &choices {
        // Medians of times and of their ratios need not agree to the last percent.
        assert!(choice.way == "stored" || choice.taken_us < choice.stored_us, "{choice:?}");
        assert!(choice.dense_us.is_some_and(|dense| dense > 0.0), "{choice:?}");
        let ways = fast.ways().get(&choice.layer);
        assert_eq!(ways.and_then(|w| w.at(choice.rows)).map_or("stored", Way::name), choice.way);
    }
    // As if dense were faster at 64 rows throughout.
    let dense = |c: &Choice| {
        let way = if c.rows == 64 { "dense f32" } else { "stored" };
        Choice {
            way: way.into(),
            stored_us: 3.0,
            taken_us: if c.rows == 64 { 2.0 } else { 3.0 },
            dense_us: Some(if c.rows == 64 { 2.0 } else { 1.5 }),
            ..c.clone()
        }
    };
    let choices: Vec<Choice> = choices.iter().map(dense).collect();
    let linears = stored.config.all_linears().len();
    assert_eq!(
        fastest::notes(&choices),
        [
            format!("2:4 layers are slower than dense f32 ones; tokens: 1 ({linears} of {linears}, 0.50 x)"),
            format!("2:4 layers run as dense f32, faster than as stored; tokens: 64 ({linears} of {linears}, 1.50 x)"),
        ]
    );
    let folder = tempfile::tempdir().unwrap();
    let mut files = espalier::train::store::model_files(&stored).unwrap();
    files.extend(fastest::file(&Measured { device: measured.device, choices: choices.clone() }).unwrap());
    espalier::train::store::save(&folder.path().join("here"), &files, BTreeMap::new()).unwrap();
    let (again, read) = fastest::load(&folder.path().join("here"), &cpu()).unwrap();
    assert_eq!(read, choices);
    assert_eq!(again.ways().len(), linears);
    let layer = again.ways().values().next().unwrap();
    assert_eq!(
        [1, 7, 9, 1000].map(|rows| layer.at(rows).unwrap().name()),
        ["stored", "stored", "dense f32", "dense f32"]
    );
    assert_eq!(logits(&again.as_stored()), logits(&stored));
    // Another device was not measured.
    let text = String::from_utf8(files.pop().unwrap().1).unwrap().replace(&cpu().info().name, "another");
    files.push((fastest::FILE, text.into_bytes()));
    espalier::train::store::save(&folder.path().join("elsewhere"), &files, BTreeMap::new()).unwrap();
    let (elsewhere, read) = fastest::load(&folder.path().join("elsewhere"), &cpu()).unwrap();
    assert!(read.is_empty() && elsewhere.ways().is_empty());
    // A way that the layer does not have leaves the whole model as it is stored.
    let foreign = String::from_utf8(files.pop().unwrap().1).unwrap().replace("another", &cpu().info().name);
    files.push((fastest::FILE, foreign.replace("dense f32", "dense int8").into_bytes()));
    espalier::train::store::save(&folder.path().join("foreign"), &files, BTreeMap::new()).unwrap();
    let (as_stored, read) = fastest::load(&folder.path().join("foreign"), &cpu()).unwrap();
    assert!(read.is_empty() && as_stored.ways().is_empty());
    // A damaged file is named.
    files.pop();
    files.push((fastest::FILE, b"{\"device\": 3}".to_vec()));
    espalier::train::store::save(&folder.path().join("damaged"), &files, BTreeMap::new()).unwrap();
    let error = fastest::load(&folder.path().join("damaged"), &cpu()).err().unwrap().to_string();
    assert!(error.contains(fastest::FILE), "{error}");
}
