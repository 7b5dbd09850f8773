//! Micro-batches of a stage: pure functions of the step.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

use super::corpus::{Corpus, upload};
use super::schema::Training;
use crate::compress::distillation::{Kept, TeacherCache};
use crate::compress::hybrid;
use crate::data::batch::{Batch, BatchOptions, Batches, Example, IGNORE, Stream};
use crate::device::Device;
use crate::error::Result;
use crate::nn::Model;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Micro, Teacher, Top};
use crate::train::trainer::Source;

/// Which examples a step takes.
pub enum Draw {
    /// Both streams, shuffled together.
    Mixed(Mutex<Batches>),
    /// Half a batch of each stream, the shorter one cycling; rows weigh as Eq 12 says.
    TwoStreams { source: Mutex<Batches>, target: Mutex<Batches>, alpha: f64 },
    /// The target-language stream alone (Eq 13).
    Target(Mutex<Batches>),
}

/// What gold labels and the teacher's labels count.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    pub gold: f32,
    /// The teacher's soft labels on target-language rows too, not only on source-language rows.
    pub soft_on_target: bool,
}

pub struct CorpusSource<'a> {
    pub corpus: &'a Corpus,
    pub device: Arc<dyn Device>,
    pub draw: Draw,
    pub accumulate: usize,
    /// Micro-batches that each draw is cut into by rows: known when it is known what takes the steps.
    pub parts: Cell<usize>,
    pub factors: Factors,
    pub teacher: Option<&'a TeacherCache<'a>>,
    /// The teacher's states are left out: it runs beside the student.
    pub teacher_waits: bool,
}

/// Batches over a list of streams, rows as a training says.
fn batches(
    corpus: &Corpus,
    streams: &[&Stream],
    training: &Training,
    rows: usize,
    seed: u64,
    max_length: usize,
) -> Result<Mutex<Batches>> {
    let mut all = Stream { name: "training".into(), ..Stream::default() };
    for stream in streams {
        all.examples.extend(stream.examples.iter().cloned());
    }
    let options = BatchOptions { rows: rows.min(training.batch).max(1), max_length, seed, ..BatchOptions::default() };
    Ok(Mutex::new(Batches::new(all, corpus.special(), options)?))
}

impl Draw {
    pub fn mixed(corpus: &Corpus, training: &Training, seed: u64, max_length: usize) -> Result<Self> {
        Ok(Draw::Mixed(batches(corpus, &[&corpus.source, &corpus.target], training, training.batch, seed, max_length)?))
    }

    pub fn two_streams(corpus: &Corpus, training: &Training, alpha: f64, seed: u64, max_length: usize) -> Result<Self> {
        let half = training.batch.div_ceil(2);
        let source = batches(corpus, &[&corpus.source], training, half, seed, max_length)?;
        let target = batches(corpus, &[&corpus.target], training, half, seed ^ 1, max_length)?;
        Ok(Draw::TwoStreams { source, target, alpha })
    }

    pub fn target(corpus: &Corpus, training: &Training, seed: u64, max_length: usize) -> Result<Self> {
        Ok(Draw::Target(batches(corpus, &[&corpus.target], training, training.batch, seed, max_length)?))
    }

    /// Indices over both streams of draw `index`, and Eq 12's alpha where it applies.
    fn indices(&self, corpus: &Corpus, index: u64) -> (Vec<usize>, Option<f64>) {
        let of = |batches: &Mutex<Batches>, offset: usize| -> Vec<usize> {
            let mut batches = batches.lock().unwrap_or_else(PoisonError::into_inner);
            batches.indices(index).iter().map(|&i| i as usize + offset).collect()
        };
        let boundary = corpus.source.examples.len();
        match self {
            Draw::Mixed(batches) => (of(batches, 0), None),
            Draw::Target(batches) => (of(batches, boundary), None),
            Draw::TwoStreams { source, target, alpha } => {
                let rows = of(source, 0).into_iter().chain(of(target, boundary)).collect();
                (rows, Some(*alpha))
            }
        }
    }
}

impl Source for CorpusSource<'_> {
    fn micro_batches(&self, step: u64) -> Result<Vec<Micro>> {
        let n = self.accumulate.max(1) as u64;
        let draws: Vec<Vec<Micro>> = (0..n).map(|j| self.micros(step * n + j)).collect::<Result<_>>()?;
        Ok(draws.into_iter().flatten().collect())
    }
}

impl CorpusSource<'_> {
    fn micros(&self, index: u64) -> Result<Vec<Micro>> {
        let (indices, alpha) = self.draw.indices(self.corpus, index);
        let examples: Vec<&Example> = indices.iter().filter_map(|&i| self.corpus.example(i)).collect();
        let whole = self.corpus.assemble(&examples);
        let from_source: Vec<bool> = indices.iter().map(|&i| self.corpus.is_source(i)).collect();
        // What rows weigh goes by the whole draw, so that its parts add up to it.
        let weights = row_weights(&whole, &from_source, alpha);
        let parts = self.parts.get().clamp(1, whole.rows.max(1));
        let part = |p: usize| {
            let rows = p * whole.rows / parts..(p + 1) * whole.rows / parts;
            let weights = &weights[rows.start * whole.columns..rows.end * whole.columns];
            self.micro(&whole.rows_of(rows.clone()), &indices[rows.clone()], &from_source[rows], weights)
        };
        (0..parts).map(part).collect()
    }

    fn micro(&self, batch: &Batch, indices: &[usize], from_source: &[bool], weights: &[f32]) -> Result<Micro> {
        let gold: Vec<f32> = weights.iter().map(|w| w * self.factors.gold).collect();
        let n = batch.targets.len();
        let teacher = self.teacher.map(|cache| self.teacher_rows(cache, indices, batch, from_source, weights));
        Ok(Micro {
            batch: upload(&self.device, batch)?,
            targets: Tensor::from_slice(&self.device, &[n], &batch.targets)?,
            weights: Tensor::from_slice(&self.device, &[n], &gold)?,
            weight: batch.token_count as f64,
            gold: self.factors.gold > 0.0,
            tokens: batch.token_count,
            teacher: teacher.transpose()?,
        })
    }

    fn teacher_rows(
        &self,
        cache: &TeacherCache,
        indices: &[usize],
        batch: &Batch,
        from_source: &[bool],
        weights: &[f32],
    ) -> Result<Teacher> {
        let n = batch.targets.len();
        let largest = matches!(cache.kept(), Kept::Largest { .. });
        let absent = self.teacher_waits || largest;
        let (hidden, predicted) = match absent {
            true => (vec![0.0], vec![IGNORE; n]),
            false => cache.batch(indices, batch.columns)?,
        };
        let top = match largest {
            true => {
                let (slots, values, k) = cache.largest(indices, batch.columns)?;
                let slots = Tensor::from_slice(&self.device, &[n, k], &slots)?;
                Some(Top { slots, values: Tensor::from_slice(&self.device, &[n, k], &values)? })
            }
            false => None,
        };
        let mut rows = (vec![0.0f32; n], vec![0.0f32; n], vec![IGNORE; n], vec![0.0f32; n]);
        for i in (0..n).filter(|&i| batch.targets[i] != IGNORE) {
            let source = from_source[i / batch.columns];
            rows.0[i] = 1.0;
            if source || self.factors.soft_on_target {
                rows.1[i] = weights[i];
            }
            if !source {
                rows.2[i] = predicted[i];
                rows.3[i] = weights[i];
            }
        }
        let floats = |values: &[f32]| Tensor::from_slice(&self.device, &[values.len()], values);
        Ok(Teacher {
            hidden: match absent {
                true => floats(&[0.0]),
                false => Tensor::from_slice(&self.device, &[n, cache.width()], &hidden),
            }?,
            hidden_weights: floats(&rows.0)?,
            soft_weights: floats(&rows.1)?,
            hard_targets: Tensor::from_slice(&self.device, &[n], &rows.2)?,
            hard_weights: floats(&rows.3)?,
            top,
        })
    }
}

/// What each position's loss counts: 1 per label, or Eq 12's stream shares (times the labels, so that micro-batches of one
/// step still add up by their token counts).
fn row_weights(batch: &Batch, from_source: &[bool], alpha: Option<f64>) -> Vec<f32> {
    let labelled = |i: &usize| batch.targets[*i] != IGNORE;
    let positions: Vec<usize> = (0..batch.targets.len()).filter(labelled).collect();
    let source_rows = positions.iter().filter(|&&i| from_source[i / batch.columns]).count();
    let (source, target) = match alpha {
        None => (1.0, 1.0),
        Some(alpha) => {
            let (s, d) = hybrid::stream_weights(alpha, (source_rows, positions.len() - source_rows));
            (s * positions.len() as f64, d * positions.len() as f64)
        }
    };
    let mut weights = vec![0.0f32; batch.targets.len()];
    for &i in &positions {
        weights[i] = if from_source[i / batch.columns] { source } else { target } as f32;
    }
    weights
}

/// Lays out training examples for the teacher cache.
pub fn teacher_cache<'a>(teacher: &'a Model, corpus: &'a Corpus) -> TeacherCache<'a> {
    let own = |example: &Example| corpus.layout.length(example);
    let lengths: Vec<usize> = (0..corpus.examples()).filter_map(|i| corpus.example(i)).map(own).collect();
    let layout = move |indices: &[usize]| {
        let examples: Vec<&Example> = indices.iter().filter_map(|&i| corpus.example(i)).collect();
        let batch = corpus.assemble(&examples);
        let lengths = examples.iter().map(|e| corpus.layout.length(e)).collect();
        Ok((upload(teacher.device(), &batch)?, lengths))
    };
    TeacherCache::new(teacher, &lengths, Box::new(layout))
}
