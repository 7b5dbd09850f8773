//! Training of the BERT-like preset: tagging the terms of English computer sentences. The spans are known exactly
//! because the sentences are generated (synthetic slots); every figure says so.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::lock::FolderLock;
use super::{contents, run_folder};
use crate::atomic::write_atomic;
use crate::data::batch::IGNORE;
use crate::data::persist::read_capped;
use crate::data::split::{Fractions, Split};
use crate::data::tagging::{TagBatch, TagBatches, TagExample, examples, tag_names};
use crate::data::terms::TermSet;
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::metrics::{EntityRule, entity_f1};
use crate::nn::config::Size;
use crate::nn::{Batch, Config, Model, Pass};
use crate::ops::reduce::ArgMax;
use crate::tensor::Tensor;
use crate::train::graphs;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::{Rule, Settings};
use crate::train::precision::Precision;
use crate::train::schedule::{Schedule, Shape};
use crate::train::store;
use crate::train::trainer::{Job, Source, Summary, train, weighted_cross_entropy};

/// What is trained and for how long.
#[derive(Clone, Copy, Debug)]
pub struct TaggerOptions {
    pub size: Size,
    pub sentences: usize,
    pub vocabulary: usize,
    pub steps: u64,
    pub batch: usize,
    pub learning_rate: f64,
    pub seed: u64,
    /// Train anew where another tagger stands, or among other files.
    pub overwrite: bool,
    pub progress: bool,
}

impl Default for TaggerOptions {
    fn default() -> Self {
        Self {
            size: Size { layers: 3, heads: 4, head_size: 16, ffn_width: 256, max_positions: 64 },
            sentences: 4000,
            vocabulary: 1200,
            steps: 300,
            batch: 32,
            learning_rate: 1e-3,
            seed: 1,
            overwrite: false,
            progress: false,
        }
    }
}

/// Entity scores on held-out sentences (conlleval's reading), and what training did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TaggerResult {
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    pub sentences: usize,
    pub train_loss: f64,
    pub validation_loss: f64,
    pub seconds: f64,
}

/// A killed training loses at most the steps since.
const CHECKPOINT_EVERY: u64 = 100;

struct TagSource {
    batches: Mutex<TagBatches>,
    device: Arc<dyn Device>,
}

impl Source for TagSource {
    fn micro_batches(&self, step: u64) -> Result<Vec<Micro>> {
        let batch = self.batches.lock().unwrap_or_else(PoisonError::into_inner).batch(step);
        Ok(vec![micro(&self.device, &batch)?])
    }
}

fn micro(device: &Arc<dyn Device>, batch: &TagBatch) -> Result<Micro> {
    let n = batch.tags.len();
    let weights: Vec<f32> = batch.tags.iter().map(|&t| f32::from(t != IGNORE)).collect();
    Ok(Micro {
        batch: upload(device, batch)?,
        targets: Tensor::from_slice(device, &[n], &batch.tags)?,
        weights: Tensor::from_slice(device, &[n], &weights)?,
        weight: batch.token_count as f64,
        gold: true,
        tokens: batch.token_count,
        teacher: None,
    })
}

fn upload(device: &Arc<dyn Device>, batch: &TagBatch) -> Result<Batch> {
    let (b, t) = (batch.rows, batch.columns);
    let positions: Vec<u32> = (0..b * t).map(|i| (i % t) as u32).collect();
    Ok(Batch {
        tokens: Tensor::from_slice(device, &[b, t], &batch.tokens)?,
        positions: Tensor::from_slice(device, &[b, t], &positions)?,
        block_positions: None,
        context: None,
        lengths: Some(Tensor::from_slice(device, &[b], &batch.lengths)?),
        source: None,
    })
}

/// What decides a training; kept in its folder.
const RECORD: &str = "tagger.json";
const MAX_RECORD: u64 = 1 << 20;

/// Makes the folder this training's and holds it. A run's model is never written over; another tagger's, or among files
/// of a user, only where that is asked for.
fn open(folder: &Path, options: &TaggerOptions, device: &Arc<dyn Device>) -> Result<FolderLock> {
    let refused = |rule: &str| {
        Err(Error::Usage { argument: "--out", value: folder.display().to_string(), rule: rule.to_string() })
    };
    if folder.symlink_metadata().is_ok() && !folder.is_dir() {
        return refused("is no folder");
    }
    if folder.join(run_folder::RECIPE).exists() {
        return refused("holds a run of a recipe; name another folder");
    }
    let TaggerOptions { size, sentences, vocabulary, steps, batch, learning_rate, seed, .. } = options;
    let decided = serde_json::json!({
        "size": size, "sentences": sentences, "vocabulary": vocabulary, "steps": steps, "batch": batch,
        "learning_rate": learning_rate, "seed": seed, "device": device.info().arithmetic(),
    });
    let record = folder.join(RECORD);
    if !record.exists() && folder.is_dir() && !options.overwrite && !contents::is_blank(folder)? {
        return refused("is not empty and holds no tagger; name another folder, or write into it with --overwrite");
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let lock = FolderLock::take(folder)?;
    if record.exists() {
        let old: Option<serde_json::Value> = serde_json::from_slice(&read_capped(&record, MAX_RECORD)?).ok();
        if old.as_ref() != Some(&decided) && !options.overwrite {
            return refused("holds a tagger of other settings; name another folder, or start anew with --overwrite");
        }
    }
    if options.overwrite {
        contents::remove_training(folder)?;
        contents::remove_model(&folder.join(run_folder::MODEL))?;
    }
    let text = serde_json::to_vec_pretty(&decided).map_err(|e| Error::io(&record, e.into()))?;
    write_atomic(&record, &text)?;
    Ok(lock)
}

/// Trains the tagger and saves it under `folder/model`.
pub fn run(device: &Arc<dyn Device>, folder: &Path, options: &TaggerOptions) -> Result<TaggerResult> {
    let _lock = open(folder, options, device)?;
    let terms = TermSet::embedded()?;
    let sentences = terms.expand(options.seed, options.sentences, Fractions::default())?;
    let texts = sentences.iter().filter(|s| s.split == Split::Train).map(|s| s.pair.source.as_str());
    let tokenizer = Tokenizer::train(texts, options.vocabulary, &["en"])?;
    let labels = tag_names(terms.categories());
    let longest = options.size.max_positions;
    let part = |split: Split| -> Result<Vec<TagExample>> {
        let all = examples(&tokenizer, sentences.iter().filter(|s| s.split == split))?;
        Ok(all.into_iter().filter(|e| e.tokens.len() <= longest).collect())
    };
    let (training, validation, test) = (part(Split::Train)?, part(Split::Validation)?, part(Split::Test)?);
    let config = Config::bert_tagger(options.size, tokenizer.vocabulary(), labels.clone());
    let mut model = Model::init(config, device, options.seed)?;
    let pad = tokenizer.special().pad;
    let batches = TagBatches::new(training, options.batch, pad, options.seed)?;
    let source = TagSource { batches: Mutex::new(batches), device: device.clone() };
    let schedule = Schedule { peak: options.learning_rate, warmup: options.steps / 10, shape: Shape::Linear };
    let validate = |model: &Model, _: &[Box<dyn Method>]| loss(model, &validation, pad);
    let job = Job {
        stage: "tagger",
        steps: options.steps,
        settings: Settings {
            schedule,
            rule: Rule::default(),
            weight_decay: 0.01,
            clip: 1.0,
            precision: Precision::F32,
        },
        dropout: 0.1,
        seed: options.seed,
        source: &source,
        validate: &validate,
        validate_every: (options.steps / 4).max(1),
        checkpoint_every: CHECKPOINT_EVERY,
        graphs: graphs::shapes(device.as_ref()),
        keep_checkpoints: 1,
        folder,
        progress: options.progress,
        stepper: None,
    };
    let summary = train(&mut model, &job, &mut [])?;
    let path = folder.join("tokenizer.json");
    tokenizer.save(&path)?;
    let mut files = store::model_files(&model)?;
    files.push(("tokenizer.json", read_capped(&path, 256 << 20)?));
    let path = folder.join(run_folder::MODEL);
    store::save_among(&path, &files, [("stage".to_string(), "tagger".to_string())].into())?;
    score(&model, &test, &labels, pad, &summary)
}

const EVALUATION_ROWS: usize = 32;

/// Batches over all examples once.
fn once(examples: &[TagExample], pad: u32) -> Result<Vec<TagBatch>> {
    let mut batches = TagBatches::new(examples.to_vec(), EVALUATION_ROWS, pad, 0)?;
    Ok((0..batches.steps_per_epoch()).map(|step| batches.batch(step)).collect())
}

fn loss(model: &Model, examples: &[TagExample], pad: u32) -> Result<f64> {
    let (mut sum, mut tokens) = (0.0, 0.0);
    for batch in once(examples, pad)? {
        let micro = micro(model.device(), &batch)?;
        let mut pass = Pass::inference(model);
        let hidden = pass.hidden(&micro.batch)?;
        sum += weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights)?.tensor.to_f64()?[0];
        tokens += micro.weight;
    }
    Ok(sum / tokens)
}

fn score(model: &Model, test: &[TagExample], labels: &[String], pad: u32, summary: &Summary) -> Result<TaggerResult> {
    let (mut actual, mut predicted) = (Vec::new(), Vec::new());
    for batch in once(test, pad)? {
        let mut pass = Pass::inference(model);
        let hidden = pass.hidden(&upload(model.device(), &batch)?)?;
        let logits = pass.logits(&hidden)?;
        let tags = dispatch::run_one(&ArgMax, &[&logits.tensor])?.to_vec::<u32>()?;
        let name = |&tag: &u32| labels.get(tag as usize).map_or("O", String::as_str);
        for (row, &length) in batch.lengths.iter().enumerate() {
            let place = row * batch.columns..row * batch.columns + length as usize;
            actual.push(batch.tags[place.clone()].iter().map(name).collect::<Vec<_>>());
            predicted.push(tags[place].iter().map(name).collect::<Vec<_>>());
        }
    }
    let counts = entity_f1(&actual, &predicted, EntityRule::Conlleval)?.micro();
    Ok(TaggerResult {
        precision: counts.precision(),
        recall: counts.recall(),
        f1: counts.f1(),
        sentences: test.len(),
        train_loss: summary.train_loss,
        validation_loss: summary.validation_loss,
        seconds: summary.seconds,
    })
}
