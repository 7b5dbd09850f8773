//! The encoder-decoder against its f64 oracle, its generation against full passes; it and the tagger as families of a recipe.

use espalier::data::layout::Layout;
use espalier::dispatch;
use espalier::nn::generate::{Decoding, generate};
use espalier::nn::{Config, Model, Pass, Positions};
use espalier::ops::relative;
use espalier::recipe::corpus::upload;
use espalier::recipe::{self, Recipe};
use espalier::report::{self, RunReport};
use espalier::tensor::Tensor;
use espalier::train::optimizer::Optimizer;
use espalier::train::store;
use espalier::train::trainer::step;

use crate::model::{SIZE, SPECIAL, VOCABULARY, check_against_oracle, cpu, examples, laid_out, micro, nmse, settings};
use crate::training::{options, tiny};

const LAYOUT: Layout = Layout::EncoderDecoder;

/// Buckets that a row of a few tokens reaches all of.
fn config() -> Config {
    Config { positions: Positions::Relative { buckets: 8, farthest: 6 }, ..Config::t5(SIZE, VOCABULARY) }
}

#[test]
fn t5_gradients_equal_the_f64_oracle() {
    check_against_oracle(config(), LAYOUT);
}

/// The model computed by hand: attention with the bias of the definition, in f64 from the stored weights.
#[test]
fn one_attention_of_the_encoder_equals_the_formula() {
    let model = Model::init(config(), &cpu(), 3).unwrap();
    let batch = laid_out(&examples(1, 5), LAYOUT);
    let source = batch.source.as_ref().unwrap();
    let (n, d, size) = (source.lengths[0] as usize, 16, SIZE.head_size);
    let value = |name: &str| -> Vec<f64> { model.values(name).unwrap().into_iter().map(f64::from).collect() };
    let (embedding, table) = (value("embedding.tokens"), value("blocks.0.attention.distances"));
    // RMS norm with weights of 1.
    let rows: Vec<Vec<f64>> = source.tokens[..n]
        .iter()
        .map(|&token| {
            let row = &embedding[token as usize * d..][..d];
            let scale = (row.iter().map(|x| x * x).sum::<f64>() / d as f64 + 1e-6).sqrt();
            row.iter().map(|x| x / scale).collect()
        })
        .collect();
    let project = |part: &str, row: &[f64]| -> Vec<f64> {
        let weight = value(&format!("blocks.0.attention.{part}.weight"));
        weight.chunks(d).map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum()).collect()
    };
    let [q, k, v] = ["query", "key", "value"].map(|part| rows.iter().map(|r| project(part, r)).collect::<Vec<_>>());
    let ids = relative::buckets(4, 6);
    let bucket = |t: usize, s: usize| ids[t.abs_diff(s).min(6)] as usize + if s > t { 4 } else { 0 };
    let mut want = Vec::new();
    for t in 0..n {
        let mut context = Vec::new();
        for h in 0..SIZE.heads {
            let head = h * size..(h + 1) * size;
            let dot = |s: usize| q[t][head.clone()].iter().zip(&k[s][head.clone()]).map(|(a, b)| a * b).sum::<f64>();
            let weights: Vec<f64> = (0..n).map(|s| (dot(s) + table[h * 8 + bucket(t, s)]).exp()).collect();
            let total: f64 = weights.iter().sum();
            let column = |j: usize| weights.iter().zip(&v).map(|(w, v)| w * v[j]).sum::<f64>() / total;
            context.extend(head.clone().map(column));
        }
        want.extend(project("output", &context));
    }
    // The encoder's first sublayer, read off a model that ends there: its FFN gives nothing.
    let mut cut = model.duplicate().unwrap();
    for name in ["blocks.0.ffn.out.weight", "blocks.1.attention.output.weight", "blocks.1.ffn.out.weight"] {
        let dims = cut.get(name).unwrap().dims().to_vec();
        let zeros = vec![0.0f32; dims.iter().product()];
        cut.tensors.insert(name.into(), Tensor::from_slice(model.device(), &dims, &zeros).unwrap());
    }
    let inputs = upload(model.device(), &batch).unwrap();
    let states = Pass::inference(&cut).encoded(&inputs).unwrap().tensor.to_f64().unwrap();
    for (t, sum) in want.chunks(d).enumerate() {
        let h: Vec<f64> = sum.iter().zip(&embedding[source.tokens[t] as usize * d..]).map(|(a, x)| a + x).collect();
        let scale = (h.iter().map(|x| x * x).sum::<f64>() / d as f64 + 1e-6).sqrt();
        let want: Vec<f64> = h.iter().map(|x| x / scale).collect();
        assert!(nmse(&want, &states[t * d..(t + 1) * d]) < 1e-10, "position {t}");
    }
}

/// Neither padding of the source nor of the target reaches a state, and what comes later reaches none before it.
#[test]
fn padding_and_the_future_change_nothing() {
    let model = Model::init(config(), &cpu(), 8).unwrap();
    let all = examples(5, 21);
    let hidden = |batch: &espalier::data::batch::Batch| {
        Pass::inference(&model).hidden(&upload(model.device(), batch).unwrap()).unwrap().tensor.to_f64().unwrap()
    };
    let together = laid_out(&all, LAYOUT);
    let states = hidden(&together);
    for (row, example) in all.iter().enumerate() {
        let alone = hidden(&laid_out(std::slice::from_ref(example), LAYOUT));
        let (n, start) = (example.labels.len() * 16, row * together.columns * 16);
        assert!(nmse(&alone[..n], &states[start..start + n]) < 1e-10);
        let mut other = example.clone();
        let last = other.labels.len() - 2;
        other.labels[last] = 5 + (other.labels[last] - 4) % 30;
        let changed = hidden(&laid_out(&[other], LAYOUT));
        assert_eq!(changed[..(last + 1) * 16], alone[..(last + 1) * 16]);
        assert_ne!(changed[(last + 1) * 16..n], alone[(last + 1) * 16..n]);
    }
}

#[test]
fn generation_equals_full_passes() {
    let model = Model::init(config(), &cpu(), 5).unwrap();
    let contexts: Vec<Vec<u32>> = examples(4, 9).into_iter().map(|e| e.context).collect();
    let prompts: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
    for beams in [1, 3] {
        let decoding = Decoding { begin: SPECIAL.bos, end: SPECIAL.eos, max_tokens: 7, beams, length_penalty: 1.0 };
        for (context, g) in contexts.iter().zip(generate(&model, &prompts, &decoding).unwrap()) {
            let mut labels = g.tokens.clone();
            if g.finished {
                labels.push(SPECIAL.eos);
            }
            let example = espalier::data::batch::Example { context: context.clone(), labels: labels.clone() };
            let mut pass = Pass::inference(&model);
            let hidden = pass.hidden(&upload(model.device(), &laid_out(&[example], LAYOUT)).unwrap()).unwrap();
            let logits = pass.logits(&hidden).unwrap().tensor.to_f64().unwrap();
            let rows = logits.chunks(VOCABULARY).zip(&labels);
            let log =
                |(row, label): (&[f64], &u32)| row[*label as usize] - row.iter().map(|x| x.exp()).sum::<f64>().ln();
            let want: f64 = rows.map(log).sum();
            assert!((want - g.log_probability).abs() < 1e-3, "{beams} beams: {} for {want}", g.log_probability);
        }
    }
}

#[test]
fn the_t5_preset_learns_to_copy() {
    let mut model = Model::init(Config::t5(SIZE, VOCABULARY), &cpu(), 1).unwrap();
    let mut optimizer = Optimizer::new(&mut model, settings(5e-3), |_| true).unwrap();
    let micro = micro(model.device(), &laid_out(&examples(24, 4), LAYOUT));
    let mut loss = || step(&model, &mut optimizer, std::slice::from_ref(&micro), &[], (0.1, 1, 150)).unwrap().0;
    let first = loss();
    let last = (1..150).fold(first, |_, _| loss());
    assert!(last < 0.4 * first, "{first} to {last}");
}

fn run(recipe: &Recipe) -> (RunReport, Model) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let html = recipe::run(recipe, &cpu(), &options(&out)).unwrap();
    let report = report::read(html.with_file_name("report.json")).unwrap();
    for stage in &report.stages {
        assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
    }
    (report, store::load_model(&out.join("model"), &cpu()).unwrap())
}

#[test]
fn an_encoder_decoder_is_pruned_quantized_split_and_tuned() {
    let (report, model) = run(&tiny(&["model.family=t5", "structure=false"]));
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["teacher", "sparsify", "quantize", "experts", "hybrid-teacher", "hybrid"]);
    assert_eq!((model.config.encoder, model.config.blocks.len()), (2, 4));
    // Cross-attention is stored as the other linears are.
    for name in ["blocks.2.cross.query", "blocks.3.cross.output", "blocks.0.attention.key"] {
        assert!(model.tensors.contains_key(&format!("{name}.metadata")), "{name}");
    }
    assert!(model.tensors.contains_key("blocks.3.ffn.experts.in.int8"));
    assert!(report.stages[5].activated_bytes * 3 < report.stages[0].activated_bytes);
    for set in [
        "structure={ layers = 1, head_size = 12, training = { steps = 1, batch = 2, learning_rate = 1e-3 } }",
        "pipeline={}",
        "sparsify.method=wanda",
        "quantize.smooth=0.5",
    ] {
        let toml = tiny(&["model.family=t5", "structure=false"]).to_toml().unwrap();
        let error = Recipe::parse(std::path::Path::new("r.toml"), &toml, &[set.to_string()]).unwrap_err();
        assert!(error.to_string().contains("t5"), "{error}");
    }
}

#[test]
fn a_tagger_goes_through_every_stage() {
    let (report, model) = run(&tiny(&["model.family=tagger", "model.activation=relu"]));
    let last = report.stages.last().unwrap();
    assert_eq!((report.stages.len(), last.name.as_str()), (8, "hybrid"));
    let directions: Vec<&str> = last.directions.iter().map(|d| d.direction.as_str()).collect();
    assert_eq!(directions, ["en", "zh"]);
    assert!(last.directions.iter().all(|d| d.entity_f1.is_some() && d.bleu.is_none() && d.token_accuracy.is_some()));
    assert!(model.tensors.contains_key("head.bias") && model.config.width == 24);
    let gelu = tiny(&["model.family=tagger", "model.activation=relu"])
        .to_toml()
        .unwrap()
        .replace("activation = \"relu\"\n", "");
    let error = Recipe::parse(std::path::Path::new("r.toml"), &gelu, &[]).unwrap_err();
    assert!(error.to_string().contains("model.activation"), "{error}");
}

/// A block's own table of distances comes before its stack's.
#[test]
fn a_block_may_have_its_own_distances() {
    let mut model = Model::init(config(), &cpu(), 5).unwrap();
    let batch = upload(model.device(), &laid_out(&examples(2, 4), LAYOUT)).unwrap();
    let hidden = |model: &Model| Pass::inference(model).hidden(&batch).unwrap().tensor.to_f64().unwrap();
    let before = hidden(&model);
    let shared = model.get("blocks.2.attention.distances").unwrap().clone();
    model.tensors.insert("blocks.3.attention.distances".into(), shared.clone());
    assert_eq!(hidden(&model), before);
    let doubled =
        dispatch::run_one(&espalier::ops::unary::Unary(espalier::ops::unary::Function::Scale(50.0)), &[&shared]);
    model.tensors.insert("blocks.3.attention.distances".into(), doubled.unwrap());
    assert_ne!(hidden(&model), before);
}
