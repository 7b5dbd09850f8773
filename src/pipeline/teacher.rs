//! A teacher beside a student: forward alone, a step ahead, whenever the student's stage would wait.
//!
//! The teacher does not learn, so its states for the next step's micro-batches can be computed at any time of this step: each
//! worker takes up a piece of that work when the message that the student needs has not come yet. What reaches the student's
//! head are hidden states; logits, which are far larger, stay where they are made.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use super::part::Part;
use crate::device::Device;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::nn::{Model, Pass};
use crate::ops::reduce::ArgMax;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Micro, Teacher};

use std::sync::Arc;

/// Rows whose logits are held at once where arg-maxes are asked for.
const ROWS: usize = 512;

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
    compute: Option<DType>,
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
        (compute, hard): (Option<DType>, bool),
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
            compute,
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

    /// Takes up the micro-batches of the step after this one; what was computed for this one is at hand from now on.
    pub fn look_ahead(&mut self, micros: Vec<Micro>, own: impl Fn(u32) -> bool) {
        self.pending = (0..micros.len() as u32).filter(|&m| own(m)).collect();
        self.ahead = micros;
    }

    /// The step that was ahead begins.
    pub fn advance(&mut self) {
        self.now = std::mem::take(&mut self.taught);
    }

    /// Runs the next pending micro-batch; gives what the next chunk needs.
    pub fn run(&mut self, micro: u32, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let data = &self.ahead[micro as usize];
        let outputs = Part::infer(&self.model, self.pieces.clone(), data, inputs, self.compute)?;
        if !self.last {
            return Ok(outputs);
        }
        if let Some(hidden) = outputs.first() {
            let shape = hidden.shape();
            let hidden = hidden.reshape(&[shape.rows(), shape.last()])?;
            let predicted = self.hard.then(|| self.predictions(&hidden)).transpose()?;
            self.taught.insert(micro, Taught { hidden, predicted });
        }
        Ok(Vec::new())
    }

    fn predictions(&self, hidden: &Tensor) -> Result<Tensor> {
        let mut pass = Pass::inference(&self.model).computing(self.compute);
        let width = hidden.shape().last();
        let bytes = width * hidden.dtype().size();
        let mut all = Vec::with_capacity(hidden.shape().rows());
        for start in (0..hidden.shape().rows()).step_by(ROWS) {
            let rows = ROWS.min(hidden.shape().rows() - start);
            let block = hidden.to_bytes()?[start * bytes..(start + rows) * bytes].to_vec();
            let meta = crate::shape::Meta::new(&[rows, width], hidden.dtype())?;
            let rows = Var::constant(Tensor::from_bytes(hidden.device(), meta, &block)?);
            let logits = pass.logits(&rows)?;
            all.extend(dispatch::run_one(&ArgMax, &[&logits.tensor])?.to_vec::<u32>()?);
        }
        Tensor::from_slice(hidden.device(), &[all.len()], &all)
    }

    /// `micro` with what the teacher has to say of it.
    pub fn complete(&mut self, index: u32, micro: &Micro) -> Micro {
        let (Some(teacher), Some(taught)) = (&micro.teacher, self.now.remove(&index)) else {
            return micro.clone();
        };
        let hard_targets = taught.predicted.unwrap_or_else(|| teacher.hard_targets.clone());
        Micro { teacher: Some(Teacher { hidden: taught.hidden, hard_targets, ..teacher.clone() }), ..micro.clone() }
    }
}
