//! The teacher's last hidden states, computed once per training example and kept in 16 bits: the large model runs once
//! however many steps and stages the student trains.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use half::f16;

use crate::dispatch;
use crate::error::Result;
use crate::nn::{Batch, Model, Pass};
use crate::ops::reduce::ArgMax;
use crate::tape::Var;
use crate::tensor::Tensor;

/// Examples of one forward pass. Groups are fixed, so that an example's states are the same bits whichever step asks
/// for them first.
pub const GROUP: usize = 64;

/// Hidden states `[length, d]` and predicted token per position of one example.
#[derive(Clone)]
struct States {
    hidden: Vec<f16>,
    predicted: Vec<u32>,
}

/// Lays a group of examples out for the teacher: batch, and each row's length.
pub type Layout<'a> = dyn Fn(&[usize]) -> Result<(Batch, Vec<usize>)> + 'a;

pub struct TeacherCache<'a> {
    teacher: &'a Model,
    /// Examples sorted by length, cut into groups.
    groups: Vec<Vec<usize>>,
    group_of: Vec<usize>,
    layout: Box<Layout<'a>>,
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
        Self { teacher, groups, group_of, layout, states: Mutex::new(BTreeMap::new()) }
    }

    pub fn width(&self) -> usize {
        self.teacher.config.width
    }

    pub fn teacher(&self) -> &Model {
        self.teacher
    }

    /// Hidden states `[B * columns * d]` (zero rows as padding) and predicted tokens `[B * columns]` of a batch.
    pub fn batch(&self, examples: &[usize], columns: usize) -> Result<(Vec<f32>, Vec<u32>)> {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        for &example in examples {
            if !states.contains_key(&example) {
                self.fill(self.group_of[example], &mut states)?;
            }
        }
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

    fn fill(&self, group: usize, states: &mut BTreeMap<usize, States>) -> Result<()> {
        let examples = &self.groups[group];
        let (batch, lengths) = (self.layout)(examples)?;
        let columns = batch.tokens.shape().last();
        let mut pass = Pass::inference(self.teacher);
        let hidden = pass.hidden(&batch)?;
        let predicted = predictions(&mut pass, &hidden)?;
        let d = self.width();
        let hidden = hidden.tensor.to_vec::<f32>()?;
        for (row, (&example, &length)) in examples.iter().zip(&lengths).enumerate() {
            let start = row * columns;
            let kept = &hidden[start * d..(start + length) * d];
            states.insert(
                example,
                States {
                    hidden: kept.iter().map(|&x| f16::from_f32(x)).collect(),
                    predicted: predicted[start..start + length].to_vec(),
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
    let shape = hidden.tensor.shape();
    let values = hidden.tensor.to_vec::<f32>()?;
    let mut predicted = Vec::with_capacity(shape.rows());
    for rows in values.chunks(ROWS * shape.last()) {
        let dims = [rows.len() / shape.last(), shape.last()];
        let rows = Var::constant(Tensor::from_slice(hidden.tensor.device(), &dims, rows)?);
        let logits = pass.logits(&rows)?;
        predicted.extend(dispatch::run_one(&ArgMax, &[&logits.tensor])?.to_vec::<u32>()?);
    }
    Ok(predicted)
}
