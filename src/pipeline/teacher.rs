//! A teacher beside a student: forward alone, a step ahead, whenever the student's stage would wait.
//!
//! The teacher does not learn, so its states for the next step's micro-batches can be computed at any time of this step: each
//! worker takes up a piece of that work when the message that the student needs has not come yet. What reaches the student's
//! head are hidden states; logits, which are far larger, stay where they are made. It computes in f32 whatever the student does.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::part::Part;
use super::reads::Reads;
use crate::compress::distillation::predictions;
use crate::device::Device;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Model, Pass};
use crate::ops::unary::Cast;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Micro, Teacher};

/// What one micro-batch's head needs: hidden states `[N, d]` and, where hard labels count, the most probable token of each row.
pub struct Taught {
    hidden: Tensor,
    predicted: Option<Tensor>,
}

/// A worker's part of the teacher.
pub struct TeacherPart {
    model: Model,
    /// Where it lies among the teacher's chunks.
    pub chunk: u32,
    pub last: bool,
    pieces: Range<usize>,
    /// Whether arg-maxes are needed.
    hard: bool,
    /// Micro-batches of the next step that this worker has still to do, in order.
    pub pending: VecDeque<u32>,
    ahead: Vec<Micro>,
    taught: HashMap<u32, Taught>,
    now: HashMap<u32, Taught>,
}

impl TeacherPart {
    /// The part of `whole` that is its chunk `chunk` of `cuts`.
    pub fn new(
        whole: &Model,
        device: &Arc<dyn Device>,
        (chunk, cuts): (usize, &[Range<usize>]),
        hard: bool,
    ) -> Result<Self> {
        let pieces = cuts[chunk].clone();
        let last = chunk + 1 == cuts.len();
        // The last one also has the head, for arg-maxes.
        let held = if last && hard { pieces.start..pieces.end + 1 } else { pieces.clone() };
        let model = Part::model_of(whole, device, &[(0, held)].into())?;
        Ok(Self {
            model,
            chunk: chunk as u32,
            last,
            pieces,
            hard,
            pending: VecDeque::new(),
            ahead: Vec::new(),
            taught: HashMap::new(),
            now: HashMap::new(),
        })
    }

    /// Tensors of its input.
    pub fn inputs(&self) -> usize {
        super::part::crossing(&self.model, self.pieces.start)
    }

    /// What it reads of a micro-batch.
    pub fn reads(&self) -> Reads {
        Reads::of(&self.model.config, [&self.pieces])
    }

    /// Takes up the micro-batches of the step after this one.
    pub fn look_ahead(&mut self, micros: Vec<Micro>, own: impl Fn(u32) -> bool) {
        self.pending = (0..micros.len() as u32).filter(|&m| own(m)).collect();
        self.ahead = micros;
    }

    /// The step that was ahead begins: what was computed for it is at hand from now on.
    pub fn advance(&mut self) {
        self.now = std::mem::take(&mut self.taught);
    }

    /// Runs the next pending micro-batch; gives what the next chunk needs.
    pub fn run(&mut self, micro: u32, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let data = &self.ahead[micro as usize];
        let outputs = Part::infer(&self.model, self.pieces.clone(), data, inputs, None)?;
        if !self.last {
            return Ok(outputs);
        }
        if let Some(hidden) = outputs.first() {
            let shape = hidden.shape();
            let hidden = hidden.reshape(&[shape.rows(), shape.last()])?;
            let predicted = match self.hard {
                false => None,
                true => {
                    let found = predictions(&mut Pass::inference(&self.model), &Var::constant(hidden.clone()))?;
                    Some(Tensor::from_slice(hidden.device(), &[found.len()], &found)?)
                }
            };
            self.taught.insert(micro, Taught { hidden: rounded(&hidden)?, predicted });
        }
        Ok(Vec::new())
    }

    /// `micro` with what the teacher has to say of it.
    ///
    /// # Errors
    /// `Shape` where the teacher has not been asked for it.
    pub fn complete(&mut self, index: u32, micro: &Micro) -> Result<Micro> {
        let Some(teacher) = &micro.teacher else {
            return Ok(micro.clone());
        };
        let Some(taught) = self.now.remove(&index) else {
            let got = format!("none for micro-batch {index}");
            return Err(Error::Shape { op: "pipeline", rule: "a teacher's states come a step ahead", got });
        };
        let hard_targets = taught.predicted.unwrap_or_else(|| teacher.hard_targets.clone());
        Ok(Micro { teacher: Some(Teacher { hidden: taught.hidden, hard_targets, ..teacher.clone() }), ..micro.clone() })
    }
}

/// Through f16 and back, as the cache of a teacher's states keeps them: both ways of learning are the same then.
fn rounded(hidden: &Tensor) -> Result<Tensor> {
    let half = dispatch::run_one(&Cast { to: DType::F16 }, &[hidden])?;
    dispatch::run_one(&Cast { to: DType::F32 }, &[&half])
}
