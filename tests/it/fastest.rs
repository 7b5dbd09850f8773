//! Ways to compute a layer: each is the stored form's function on every device, and the one that is taken was measured.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier::compress::experts::{Settings, convert};
use espalier::compress::fastest::{self, Choice};
use espalier::compress::freeze::{Form, freeze};
use espalier::compress::quantization::{Activations, Format};
use espalier::device::Device;
use espalier::nn::config::Activation;
use espalier::nn::ways::{Way, Ways};
use espalier::nn::{self, Config, Model, Pass};
use espalier::recipe::corpus::upload;
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

fn formats() -> [Option<Format>; 4] {
    let only = |bits, group| Format { bits, group, activations: Activations::Float, ..Format::default() };
    [None, Some(Format::default()), Some(only(8, 8)), Some(only(4, 16))]
}

fn logits(model: &Model) -> Vec<f64> {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&batch(model.device())).unwrap();
    pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
}

#[test]
fn every_way_is_the_stored_forms_function_on_every_device() {
    let mut seen = std::collections::BTreeSet::new();
    for device in devices("every_way_is_the_stored_forms_function_on_every_device") {
        for (source, format) in [pruned(), split()].iter().flat_map(|m| formats().map(|f| (m, f))) {
            let stored = freeze(source, Form { sparse: true, quantized: format }).unwrap().to_device(&device).unwrap();
            let want = logits(&stored);
            let (_, choices) = fastest::fastest(&stored, &[1]).unwrap();
            for Choice { layer, form, .. } in choices {
                for way in fastest::ways(&stored, &layer).unwrap().split_off(1) {
                    let mut other = stored.clone();
                    other.set_ways(&layer, Ways { all: vec![way.clone()], taken: vec![(1, 0)] });
                    let have = logits(&other);
                    let error = nmse(&want, &have);
                    // Roundings that fall to the other side move an input by a step of its grid.
                    let bound = if format.is_some() { 1e-4 } else { 1e-10 };
                    assert!(error < bound, "{} {layer} ({form}) as {}: {error:e}", device.info().id, way.name());
                    if matches!(way, Way::Int8 { .. }) {
                        assert_eq!(want, have, "integer sums are exact: {layer}");
                    }
                    seen.insert((form.clone(), way.name()));
                }
            }
        }
    }
    let forms: Vec<&str> = seen.iter().map(|(form, _)| form.as_str()).collect();
    assert!(["2:4", "2:4 int8", "int8", "int4", "experts"].iter().all(|f| forms.contains(f)), "{seen:?}");
}

#[test]
fn what_is_taken_was_faster_and_is_kept_with_the_model() {
    let stored = freeze(&pruned(), Form { sparse: true, quantized: None }).unwrap();
    let (fast, choices) = fastest::fastest(&stored, &[1, 64]).unwrap();
    assert_eq!(choices.len(), 2 * stored.config.all_linears().len());
    for choice in &choices {
        assert!(choice.way == "stored" || choice.taken_us < 0.95 * choice.stored_us, "{choice:?}");
        let ways = fast.ways().get(&choice.layer);
        assert_eq!(ways.and_then(|w| w.at(choice.rows)).map_or("stored", Way::name), choice.way);
    }
    // As if dense were faster at 64 rows throughout.
    let dense = |c: &Choice| {
        let way = if c.rows == 64 { "dense f32" } else { "stored" };
        Choice { way: way.into(), stored_us: 3.0, taken_us: if c.rows == 64 { 2.0 } else { 3.0 }, ..c.clone() }
    };
    let choices: Vec<Choice> = choices.iter().map(dense).collect();
    let linears = stored.config.all_linears().len();
    assert_eq!(
        fastest::notes(&choices),
        [format!("at 64 tokens {linears} of {linears} 2:4 layers run as dense f32 here, 1.50 x as fast")]
    );
    let folder = tempfile::tempdir().unwrap();
    let mut files = espalier::train::store::model_files(&stored).unwrap();
    files.extend(fastest::file(&cpu(), &choices).unwrap());
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
    // A damaged file is named.
    files.pop();
    files.push((fastest::FILE, b"{\"device\": 3}".to_vec()));
    espalier::train::store::save(&folder.path().join("damaged"), &files, BTreeMap::new()).unwrap();
    let error = fastest::load(&folder.path().join("damaged"), &cpu()).err().unwrap().to_string();
    assert!(error.contains(fastest::FILE), "{error}");
}
