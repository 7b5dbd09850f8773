//! What a model is worth: held-out quality in both directions, sizes, measured latency and memory.

use std::time::Instant;

use super::corpus::{Corpus, HeldOut, upload};
use super::schema::{self, Evaluate};
use crate::data::batch::{Batch, Example, IGNORE};
use crate::data::layout::Layout;
use crate::dispatch;
use crate::error::Result;
use crate::metrics::{Bleu, BleuTokenizer, Chrf, EntityRule, ExactMatch, SequenceProbability, TokenAccuracy};
use crate::nn::generate::{Decoding, generate};
use crate::nn::{Model, Pass};
use crate::ops::layout::GatherRows;
use crate::ops::reduce::ArgMax;
use crate::ops::softmax::CrossEntropy;
use crate::report::model::{DirectionScores, Latency, Score, StageRow};
use crate::rng::Stream;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::Method;

/// Examples of one teacher-forced pass.
const BATCH: usize = 32;

/// Labels, predictions and log-probabilities of one example.
pub struct Forced {
    pub predicted: Vec<u32>,
    pub log_probabilities: Vec<f32>,
}

/// Runs examples under teacher forcing, with the methods' output hooks where the model is still in training form.
pub fn teacher_forced(
    model: &Model,
    corpus: &Corpus,
    examples: &[&Example],
    methods: &[Box<dyn Method>],
) -> Result<Vec<Forced>> {
    // Equal lengths share a batch; results go back to their own places.
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| (examples[i].length(), i));
    let mut forced: Vec<Option<Forced>> = (0..examples.len()).map(|_| None).collect();
    for chunk in order.chunks(BATCH) {
        let rows: Vec<&Example> = chunk.iter().map(|&i| examples[i]).collect();
        let batch = corpus.assemble(&rows);
        for (&i, f) in chunk.iter().zip(force_batch(model, &batch, methods)?) {
            forced[i] = Some(f);
        }
    }
    Ok(forced.into_iter().flatten().collect())
}

fn force_batch(model: &Model, batch: &Batch, methods: &[Box<dyn Method>]) -> Result<Vec<Forced>> {
    let device = model.device();
    let mut pass = Pass::inference(model).hooks(methods.iter().filter_map(|m| m.on_output()));
    let hidden = pass.hidden(&upload(device, batch)?)?;
    let labelled: Vec<u32> = (0..batch.targets.len() as u32).filter(|&i| batch.targets[i as usize] != IGNORE).collect();
    let targets: Vec<u32> = labelled.iter().map(|&i| batch.targets[i as usize]).collect();
    let ids = Tensor::from_slice(device, &[labelled.len()], &labelled)?;
    let shape = hidden.tensor.shape();
    let flat = hidden.tensor.reshape(&[shape.rows(), shape.last()])?;
    let rows = Var::constant(dispatch::run_one(&GatherRows, &[&flat, &ids])?);
    let logits = pass.logits(&rows)?;
    let predicted = dispatch::run_one(&ArgMax, &[&logits.tensor])?.to_vec::<u32>()?;
    let targets = Tensor::from_slice(device, &[targets.len()], &targets)?;
    let losses = dispatch::run(&CrossEntropy { smoothing: 0.0 }, &[&logits.tensor, &targets])?[0].to_f64()?;
    let mut forced: Vec<Forced> =
        (0..batch.rows).map(|_| Forced { predicted: Vec::new(), log_probabilities: Vec::new() }).collect();
    for ((&i, &p), &loss) in labelled.iter().zip(&predicted).zip(&losses) {
        let row = &mut forced[i as usize / batch.columns];
        row.predicted.push(p);
        row.log_probabilities.push(-loss as f32);
    }
    Ok(forced)
}

/// At most `limit` items (0: all) evenly spread over the list: files are sorted by package, so its head would be a few
/// packages only.
pub fn sample<T>(items: &[T], limit: usize) -> Vec<&T> {
    if limit == 0 || limit >= items.len() {
        return items.iter().collect();
    }
    (0..limit).map(|i| &items[i * items.len() / limit]).collect()
}

/// Mean loss in nats per token over the held-out validation examples, at most `limit` of each direction; NaN without any.
pub fn validation_loss(model: &Model, corpus: &Corpus, limit: usize, methods: &[Box<dyn Method>]) -> Result<f64> {
    let (mut sum, mut tokens) = (0.0, 0usize);
    for held_out in &corpus.held_out {
        let examples = sample(&held_out.validation, limit);
        for f in teacher_forced(model, corpus, &examples, methods)? {
            sum -= f.log_probabilities.iter().map(|&p| f64::from(p)).sum::<f64>();
            tokens += f.log_probabilities.len();
        }
    }
    Ok(if tokens > 0 { sum / tokens as f64 } else { f64::NAN })
}

/// Fills a report row's quality, sizes, latency and memory for `model` as it would be deployed. Quality is that of the stored
/// forms, which are the same bits on any day; latency that of the ways that the model takes.
pub fn evaluate(model: &Model, corpus: &Corpus, settings: &Evaluate, name: &str) -> Result<StageRow> {
    let (fast, model) = (model, &model.as_stored());
    let device = model.device().clone();
    device.reset_peak();
    // Other models of the run are alive too; only what this one adds is its own.
    let live = device.stats().bytes_live;
    let mut all = TokenAccuracy::default();
    let mut exact = ExactMatch::default();
    let mut directions = Vec::new();
    for held_out in &corpus.held_out {
        directions.push(direction(model, corpus, settings, held_out, (&mut all, &mut exact))?);
    }
    let latency =
        settings.latency_batches.iter().map(|&b| latency(fast, b, settings.latency_length)).collect::<Result<_>>()?;
    Ok(StageRow {
        name: name.to_string(),
        parameters: model.parameter_count() as u64,
        activated_bytes: model.activated_bytes() as u64,
        total_bytes: model.total_bytes() as u64,
        token_accuracy: all.value(),
        exact_match: exact.value(),
        validation_loss: Some(validation_loss(model, corpus, settings.sentences, &[])?).filter(|l| l.is_finite()),
        directions,
        latency,
        peak_memory_bytes: Some(
            device.stats().bytes_peak.saturating_sub(live) + (model.total_bytes() + fast.ways_bytes()) as u64,
        ),
        ..StageRow::default()
    })
}

fn direction(
    model: &Model,
    corpus: &Corpus,
    settings: &Evaluate,
    held_out: &HeldOut,
    (all, all_exact): (&mut TokenAccuracy, &mut ExactMatch),
) -> Result<DirectionScores> {
    let sentences = sample(&held_out.test, settings.sentences);
    let examples: Vec<&Example> = sentences.iter().map(|s| &s.example).collect();
    let mut accuracy = TokenAccuracy::default();
    let mut probability = SequenceProbability::default();
    let forced = teacher_forced(model, corpus, &examples, &[])?;
    for (example, f) in examples.iter().zip(&forced) {
        accuracy.add(&f.predicted, &example.labels, None)?;
        all.add(&f.predicted, &example.labels, None)?;
        probability.add(&f.log_probabilities)?;
    }
    let tagging = !corpus.labels.is_empty();
    let decoded = if settings.decoded == 0 || tagging { Vec::new() } else { sample(&sentences, settings.decoded) };
    let hypotheses = decode(model, corpus, decoded.iter().map(|s| &s.example), settings.beams)?;
    let references: Vec<String> = decoded.iter().map(|s| s.reference.clone()).collect();
    let mut exact = ExactMatch::default();
    for (hypothesis, reference) in hypotheses.iter().zip(&references) {
        exact.add_text(hypothesis, reference);
        all_exact.add_text(hypothesis, reference);
    }
    let mut entity_f1 = None;
    if tagging {
        let name = |&tag: &u32| corpus.labels.get(tag as usize).map_or("O", String::as_str);
        let names = |tags: &[u32]| -> Vec<&str> { tags.iter().map(name).collect() };
        let actual: Vec<Vec<&str>> = examples.iter().map(|e| names(&e.labels)).collect();
        let predicted: Vec<Vec<&str>> = forced.iter().map(|f| names(&f.predicted)).collect();
        for (predicted, actual) in predicted.iter().zip(&actual) {
            exact.add_text(&predicted.join(" "), &actual.join(" "));
            all_exact.add_text(&predicted.join(" "), &actual.join(" "));
        }
        entity_f1 = Some(entity_f1_score(&actual, &predicted)?);
    }
    let tokenizer = BleuTokenizer::for_language(&held_out.target_language);
    let (bleu, chrf) = if hypotheses.is_empty() {
        (None, None)
    } else {
        let bleu: Bleu = crate::metrics::bleu(&hypotheses, &references, tokenizer)?;
        let chrf: Chrf = crate::metrics::chrf(&hypotheses, &references, 0)?;
        (
            Some(Score { value: bleu.score, signature: bleu.signature }),
            Some(Score { value: chrf.score, signature: chrf.signature }),
        )
    };
    Ok(DirectionScores {
        direction: held_out.name.clone(),
        sentences: sentences.len() as u64,
        token_accuracy: accuracy.value(),
        exact_match: exact.value(),
        entity_f1,
        bleu,
        chrf,
        sequence_probability: probability.mean(),
        probability_per_token: probability.geometric_mean_per_token(),
        perplexity: probability.perplexity(),
    })
}

/// Micro-averaged F1 over entities, as conlleval reads tags.
fn entity_f1_score(actual: &[Vec<&str>], predicted: &[Vec<&str>]) -> Result<f64> {
    Ok(crate::metrics::entity_f1(actual, predicted, EntityRule::Conlleval)?.micro().f1())
}

/// Translations of examples' contexts.
pub fn decode<'e>(
    model: &Model,
    corpus: &Corpus,
    examples: impl Iterator<Item = &'e Example>,
    beams: usize,
) -> Result<Vec<String>> {
    let contexts: Vec<&[u32]> = examples.map(|e| &e.context[..]).collect();
    translate(model, &corpus.tokenizer, &contexts, beams)
}

/// Continues contexts with the model and decodes what comes out.
pub fn translate(
    model: &Model,
    tokenizer: &crate::data::tokenizer::Tokenizer,
    contexts: &[&[u32]],
    beams: usize,
) -> Result<Vec<String>> {
    let special = tokenizer.special();
    let mut texts = Vec::with_capacity(contexts.len());
    for chunk in contexts.chunks(BATCH) {
        let longest = chunk.iter().map(|c| c.len()).max().unwrap_or(0);
        let max_tokens = model.config.max_positions.saturating_sub(longest).min(2 * longest + 16).max(1);
        let decoding = Decoding { begin: special.bos, end: special.eos, max_tokens, beams, length_penalty: 1.0 };
        for generation in generate(model, chunk, &decoding)? {
            texts.push(tokenizer.decode(&generation.tokens)?);
        }
    }
    Ok(texts)
}

const WARM_UP: usize = 3;
const SAMPLES: usize = 30;

/// Time of one forward pass over random tokens `[batch, length]`: hidden states of all tokens and logits of each row's
/// last one, read back to the host.
pub fn latency(model: &Model, batch: usize, length: usize) -> Result<Latency> {
    let length = length.min(model.config.max_positions);
    let mut stream = Stream::new(1, batch as u32);
    let layout = schema::layout(&model.config);
    // A tagger has no part that is generated.
    let context = if layout == Layout::Tagging { length } else { length / 2 };
    let rows: Vec<Example> = (0..batch)
        .map(|_| Example {
            context: (0..context).map(|_| stream.below(model.config.vocabulary) as u32).collect(),
            labels: (0..length - length / 2).map(|_| stream.below(model.config.vocabulary) as u32).collect(),
        })
        .collect();
    let special = crate::data::tokenizer::SpecialIds { pad: 0, unk: 0, bos: 0, eos: 0, gmask: 0 };
    let plain = layout.assemble(&rows.iter().collect::<Vec<_>>(), special);
    let inputs = upload(model.device(), &plain)?;
    let last: Vec<u32> = (0..batch).map(|row| (row * plain.columns + plain.columns - 1) as u32).collect();
    let last = Tensor::from_slice(model.device(), &[batch], &last)?;
    let mut times = Vec::with_capacity(SAMPLES);
    for sample in 0..WARM_UP + SAMPLES {
        let start = Instant::now();
        let mut pass = Pass::inference(model);
        let hidden = pass.hidden(&inputs)?;
        let flat = hidden.tensor.reshape(&[hidden.tensor.shape().rows(), hidden.tensor.shape().last()])?;
        let rows = Var::constant(dispatch::run_one(&GatherRows, &[&flat, &last])?);
        pass.logits(&rows)?.tensor.to_bytes()?;
        if sample >= WARM_UP {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    Ok(Latency {
        batch: batch as u32,
        length: plain.columns as u32,
        samples: times.len() as u32,
        p5_ms: at(0.05),
        p50_ms: at(0.5),
        p95_ms: at(0.95),
    })
}
