//! What the teacher says of each training example, computed once: its last hidden states in 16 bits, or its k largest
//! logits of every token with their log-sum-exp. The large model runs once however many steps and stages the student trains.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::f16;

use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Model, Pass};
use crate::ops::reduce::ArgMax;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::trainer::LOSS_CHUNK;

/// Examples of one forward pass. Groups are fixed, so that an example's states are the same bits whichever step asks
/// for them first.
pub const GROUP: usize = 64;

/// What is kept of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kept {
    /// The last hidden states: the head makes all logits of them.
    Hidden,
    /// The `k` largest logits divided by the temperature, and the log-sum-exp of all: for a teacher whose head is too large
    /// to run in every step, or that is gone by then.
    Largest { k: usize, temperature: f32 },
}

/// One example: its predicted token per position, and what else is kept.
#[derive(Clone)]
struct States {
    /// `[length, d]`
    hidden: Vec<f16>,
    predicted: Vec<u32>,
    largest: Vec<Largest>,
}

/// Of one token, the largest first, the lowest token among equals.
#[derive(Clone, Debug, PartialEq)]
struct Largest {
    tokens: Vec<u32>,
    logits: Vec<f32>,
    log_sum_exp: f32,
}

impl Largest {
    fn of(logits: &[f32], k: usize, temperature: f32) -> Self {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let soft = |i: u32| f64::from(logits[i as usize]) / f64::from(temperature);
        let by_size = |a: &u32, b: &u32| soft(*b).total_cmp(&soft(*a)).then(a.cmp(b));
        let k = k.min(order.len());
        if k < order.len() && k > 0 {
            order.select_nth_unstable_by(k - 1, by_size);
        }
        order.truncate(k);
        order.sort_by(by_size);
        let most = order.first().map_or(0.0, |&i| soft(i));
        let sum: f64 = (0..logits.len() as u32).map(|i| (soft(i) - most).exp()).sum();
        let kept = order.iter().map(|&i| soft(i) as f32).collect();
        Self { tokens: order, logits: kept, log_sum_exp: (most + sum.ln()) as f32 }
    }

    /// The logit that every token outside would have if they shared the rest of the probability evenly.
    fn rest(&self, vocabulary: usize) -> f32 {
        let lse = f64::from(self.log_sum_exp);
        let known: f64 = self.logits.iter().map(|&z| (f64::from(z) - lse).exp()).sum();
        let others = vocabulary.saturating_sub(self.logits.len()).max(1);
        // Roundings of f32 may leave nothing or less than nothing of a small rest.
        (lse + ((1.0 - known).max(1e-9) / others as f64).ln()) as f32
    }
}

/// Lays a group of examples out for the teacher: batch, and each row's length.
pub type Layout<'a> = dyn Fn(&[usize]) -> Result<(Batch, Vec<usize>)> + 'a;

pub struct TeacherCache<'a> {
    teacher: &'a Model,
    /// Examples sorted by length, cut into groups.
    groups: Vec<Vec<usize>>,
    group_of: Vec<usize>,
    layout: Box<Layout<'a>>,
    kept: Kept,
    states: Mutex<BTreeMap<usize, States>>,
}

impl<'a> TeacherCache<'a> {
    /// `lengths[i]`: tokens of training example i.
    pub fn new(teacher: &'a Model, lengths: &[usize], layout: Box<Layout<'a>>) -> Self {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&i| (lengths[i], i));
        let groups: Vec<Vec<usize>> = order.chunks(GROUP).map(<[usize]>::to_vec).collect();
        let mut group_of = vec![0; lengths.len()];
        for (g, group) in groups.iter().enumerate() {
            group.iter().for_each(|&i| group_of[i] = g);
        }
        let kept = Kept::Hidden;
        Self { teacher, groups, group_of, layout, kept, states: Mutex::new(BTreeMap::new()) }
    }

    /// Keeps something else than the hidden states.
    #[must_use]
    pub fn keeping(mut self, kept: Kept) -> Self {
        self.kept = kept;
        self
    }

    pub fn kept(&self) -> Kept {
        self.kept
    }

    pub fn width(&self) -> usize {
        self.teacher.config.width
    }

    pub fn teacher(&self) -> &Model {
        self.teacher
    }

    /// Hidden states `[B * columns * d]` (zero rows as padding) and predicted tokens `[B * columns]` of a batch.
    pub fn batch(&self, examples: &[usize], columns: usize) -> Result<(Vec<f32>, Vec<u32>)> {
        let states = self.filled(examples)?;
        let d = self.width();
        let mut hidden = vec![0.0f32; examples.len() * columns * d];
        let mut predicted = vec![0u32; examples.len() * columns];
        for (row, example) in examples.iter().enumerate() {
            if let Some(s) = states.get(example) {
                let rows = s.predicted.len().min(columns);
                let target = &mut hidden[row * columns * d..(row * columns + rows) * d];
                target.iter_mut().zip(&s.hidden).for_each(|(h, x)| *h = x.to_f32());
                predicted[row * columns..row * columns + rows].copy_from_slice(&s.predicted[..rows]);
            }
        }
        Ok((hidden, predicted))
    }

    /// Places and values of the largest logits of a batch, as [`crate::train::lifecycle::Top`] has them, and their number.
    ///
    /// # Errors
    /// `Shape` where the cache keeps hidden states.
    pub fn largest(&self, examples: &[usize], columns: usize) -> Result<(Vec<u32>, Vec<f32>, usize)> {
        let Kept::Largest { k, .. } = self.kept else {
            return Err(Error::Shape { op: "teacher cache", rule: "the largest logits", got: "hidden states".into() });
        };
        let vocabulary = self.teacher.config.vocabulary;
        let k = k.min(vocabulary);
        let states = self.filled(examples)?;
        let mut slots = vec![0u32; examples.len() * columns * k];
        let mut values = vec![0.0f32; slots.len()];
        for (row, example) in examples.iter().enumerate() {
            let tokens = states.get(example).map_or(&[][..], |s| &s.largest);
            for (column, largest) in tokens.iter().take(columns).enumerate() {
                let place = row * columns + column;
                let rest = largest.rest(vocabulary);
                for (i, (token, logit)) in largest.tokens.iter().zip(&largest.logits).enumerate() {
                    slots[place * k + i] = (place % LOSS_CHUNK * vocabulary) as u32 + token;
                    values[place * k + i] = logit - rest;
                }
            }
        }
        Ok((slots, values, k))
    }

    /// All states, those of `examples` among them.
    fn filled(&self, examples: &[usize]) -> Result<MutexGuard<'_, BTreeMap<usize, States>>> {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        for &example in examples {
            if !states.contains_key(&example) {
                self.fill(self.group_of[example], &mut states)?;
            }
        }
        Ok(states)
    }

    fn fill(&self, group: usize, states: &mut BTreeMap<usize, States>) -> Result<()> {
        let examples = &self.groups[group];
        let (batch, lengths) = (self.layout)(examples)?;
        let columns = batch.tokens.shape().last();
        let mut pass = Pass::inference(self.teacher);
        let hidden = pass.hidden(&batch)?;
        let mut largest = Vec::new();
        let predicted = match self.kept {
            Kept::Hidden => predictions(&mut pass, &hidden)?,
            Kept::Largest { k, temperature } => {
                each_logits(&mut pass, &hidden, |logits| {
                    let rows = logits.to_vec::<f32>()?;
                    let width = logits.shape().last();
                    largest.extend(rows.chunks(width).map(|row| Largest::of(row, k.max(1), temperature)));
                    Ok(())
                })?;
                largest.iter().map(|l: &Largest| l.tokens.first().copied().unwrap_or(0)).collect()
            }
        };
        let d = if self.kept == Kept::Hidden { self.width() } else { 0 };
        let hidden = if d > 0 { hidden.tensor.to_vec::<f32>()? } else { Vec::new() };
        for (row, (&example, &length)) in examples.iter().zip(&lengths).enumerate() {
            let start = row * columns;
            let kept = &hidden[start * d..(start + length) * d];
            states.insert(
                example,
                States {
                    hidden: kept.iter().map(|&x| f16::from_f32(x)).collect(),
                    predicted: predicted[start..start + length].to_vec(),
                    largest: largest.get(start..start + length).unwrap_or_default().to_vec(),
                },
            );
        }
        Ok(())
    }
}

/// Rows of logits that are held at once.
const ROWS: usize = 512;

/// Most probable token of every row of hidden states `[.., d]`, a block of rows at a time.
pub fn predictions(pass: &mut Pass, hidden: &Var) -> Result<Vec<u32>> {
    let mut predicted = Vec::with_capacity(hidden.tensor.shape().rows());
    each_logits(pass, hidden, |logits| {
        predicted.extend(dispatch::run_one(&ArgMax, &[logits])?.to_vec::<u32>()?);
        Ok(())
    })?;
    Ok(predicted)
}

/// Hands out the logits of hidden states `[.., d]`, a block of rows at a time.
fn each_logits(pass: &mut Pass, hidden: &Var, mut take: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
    let shape = hidden.tensor.shape();
    let values = hidden.tensor.to_vec::<f32>()?;
    for rows in values.chunks(ROWS * shape.last()) {
        let dims = [rows.len() / shape.last(), shape.last()];
        let rows = Var::constant(Tensor::from_slice(hidden.tensor.device(), &dims, rows)?);
        take(&pass.logits(&rows)?.tensor)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn the_largest_keep_their_probabilities_and_the_rest_shares_what_is_left() {
        let logits = [2.0f32, -1.0, 3.0, 0.5, 3.0, -2.0];
        for temperature in [1.0f32, 2.0] {
            let soft: Vec<f64> = logits.iter().map(|z| (f64::from(*z) / f64::from(temperature)).exp()).collect();
            let all: f64 = soft.iter().sum();
            let largest = Largest::of(&logits, 3, temperature);
            // Ties go to the lowest token.
            assert_eq!(largest.tokens, [2, 4, 0]);
            assert_relative_eq!(f64::from(largest.log_sum_exp), all.ln(), max_relative = 1e-6);
            // Softmax over the filled row.
            let rest = f64::from(largest.rest(logits.len()));
            let mut filled = vec![rest; logits.len()];
            largest.tokens.iter().zip(&largest.logits).for_each(|(&i, z)| filled[i as usize] = f64::from(*z));
            let sum: f64 = filled.iter().map(|z| z.exp()).sum();
            for &i in &largest.tokens {
                assert_relative_eq!(filled[i as usize].exp() / sum, soft[i as usize] / all, max_relative = 1e-5);
            }
            let left: f64 = [1, 3, 5].iter().map(|&i: &usize| soft[i] / all).sum();
            assert_relative_eq!(rest.exp() / sum, left / 3.0, max_relative = 1e-4);
        }
    }

    #[test]
    fn all_or_one_or_equal_logits_are_no_exception() {
        let whole = Largest::of(&[1.0, 1.0, 1.0], 9, 1.0);
        assert_eq!((whole.tokens.as_slice(), whole.rest(3).is_finite()), (&[0, 1, 2][..], true));
        let sure = Largest::of(&[900.0, 0.0, 0.0], 1, 1.0);
        assert!(sure.log_sum_exp.is_finite() && sure.rest(3) < 900.0 - 15.0);
    }
}
