//! Autograd: a list of recorded ops and one reverse loop that asks each op for its gradient rule.

use std::collections::HashMap;
use std::sync::Arc;

use crate::device::Device;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::op::{Gradient, Op};
use crate::ops::binary;
use crate::shape::Meta;
use crate::tensor::Tensor;

type Id = usize;

/// A tensor that may be on the tape.
#[derive(Clone, Debug)]
pub struct Var {
    pub tensor: Tensor,
    id: Option<Id>,
}

impl Var {
    /// A value that no gradient flows to.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, id: None }
    }

    /// The same value, cut off from what computed it.
    pub fn detach(&self) -> Self {
        Self::constant(self.tensor.clone())
    }

    /// The same elements under another shape. A reshape moves no data, so it needs no node: gradients are reshaped to
    /// the shape of the op input or output they belong to.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        Ok(Self { tensor: self.tensor.reshape(dims)?, id: self.id })
    }

    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    pub fn meta(&self) -> Meta {
        self.tensor.meta()
    }

    /// Whether gradients can reach it.
    pub fn tracked(&self) -> bool {
        self.id.is_some()
    }
}

/// A part of a model as a function of its inputs, run again in backward instead of keeping its activations.
pub type SegmentFn = Arc<dyn Fn(&mut Tape, &[Var]) -> Result<Vec<Var>> + Send + Sync>;

enum Step {
    Op(Arc<dyn Op>),
    Segment(SegmentFn),
}

struct Node {
    step: Step,
    inputs: Vec<Option<Id>>,
    input_metas: Vec<Meta>,
    outputs: Vec<Id>,
    output_metas: Vec<Meta>,
    saved_inputs: Vec<Option<Tensor>>,
    saved_outputs: Vec<Option<Tensor>>,
}

/// Records ops while it runs them. Without recording it costs nothing but the dispatch.
pub struct Tape {
    nodes: Vec<Node>,
    next: Id,
    recording: bool,
}

/// Gradients of the leaves, by variable.
#[derive(Default)]
pub struct Grads(HashMap<Id, Tensor>);

impl Grads {
    /// The gradient that reached `var`, in its shape.
    pub fn of(&self, var: &Var) -> Option<Result<Tensor>> {
        var.id.and_then(|id| self.0.get(&id)).map(|t| t.reshape(var.dims()))
    }
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

impl Tape {
    /// A tape that records.
    pub fn new() -> Self {
        Self { nodes: Vec::new(), next: 0, recording: true }
    }

    /// A tape that only runs: inference.
    pub fn inference() -> Self {
        Self { recording: false, ..Self::new() }
    }

    pub fn recording(&self) -> bool {
        self.recording
    }

    /// Recorded nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn fresh(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    /// A variable that wants a gradient.
    pub fn leaf(&mut self, tensor: &Tensor) -> Var {
        let id = self.recording.then(|| self.fresh());
        Var { tensor: tensor.clone(), id }
    }

    /// Runs `op` and records it when a gradient can flow through it.
    pub fn run(&mut self, op: impl Op, inputs: &[&Var]) -> Result<Vec<Var>> {
        let tensors: Vec<&Tensor> = inputs.iter().map(|v| &v.tensor).collect();
        let outputs = dispatch::run(&op, &tensors)?;
        if !self.recording || inputs.iter().all(|v| v.id.is_none()) {
            return Ok(outputs.into_iter().map(Var::constant).collect());
        }
        let saves = op.saves();
        let keep = |list: &mut dyn Iterator<Item = &Tensor>, which: &[usize]| -> Vec<Option<Tensor>> {
            list.enumerate().map(|(i, t)| which.contains(&i).then(|| t.clone())).collect()
        };
        let saved_inputs = keep(&mut tensors.iter().copied(), saves.inputs);
        let saved_outputs = keep(&mut outputs.iter(), saves.outputs);
        Ok(self.push(Step::Op(Arc::new(op)), inputs, outputs, saved_inputs, saved_outputs))
    }

    /// Runs an op that has one output of interest: the first.
    pub fn first(&mut self, op: impl Op, inputs: &[&Var]) -> Result<Var> {
        let name = op.name();
        let outputs = self.run(op, inputs)?;
        outputs.into_iter().next().ok_or(Error::Shape { op: name, rule: "at least one output", got: "none".into() })
    }

    /// Runs `segment` keeping only its inputs; backward runs it again. Everything it differentiates with respect to
    /// must be among `inputs`.
    pub fn segment(&mut self, segment: SegmentFn, inputs: &[&Var]) -> Result<Vec<Var>> {
        let constants: Vec<Var> = inputs.iter().map(|v| v.detach()).collect();
        let outputs = segment(&mut Tape::inference(), &constants)?;
        let outputs: Vec<Tensor> = outputs.into_iter().map(|v| v.tensor).collect();
        if !self.recording || inputs.iter().all(|v| v.id.is_none()) {
            return Ok(outputs.into_iter().map(Var::constant).collect());
        }
        let saved_inputs = inputs.iter().map(|v| Some(v.tensor.clone())).collect();
        let saved_outputs = vec![None; outputs.len()];
        Ok(self.push(Step::Segment(segment), inputs, outputs, saved_inputs, saved_outputs))
    }

    fn push(
        &mut self,
        step: Step,
        inputs: &[&Var],
        outputs: Vec<Tensor>,
        saved_inputs: Vec<Option<Tensor>>,
        saved_outputs: Vec<Option<Tensor>>,
    ) -> Vec<Var> {
        let vars: Vec<Var> = outputs.into_iter().map(|tensor| Var { tensor, id: Some(self.fresh()) }).collect();
        self.nodes.push(Node {
            step,
            inputs: inputs.iter().map(|v| v.id).collect(),
            input_metas: inputs.iter().map(|v| v.meta()).collect(),
            outputs: vars.iter().filter_map(|v| v.id).collect(),
            output_metas: vars.iter().map(Var::meta).collect(),
            saved_inputs,
            saved_outputs,
        });
        vars
    }

    /// Walks back from `seeds` (variables and their gradients), consuming the tape: saved tensors are freed as soon as
    /// their node has been passed. Returns the gradients of the leaves.
    pub fn backward(mut self, seeds: &[(&Var, &Tensor)]) -> Result<Grads> {
        let mut grads: HashMap<Id, Tensor> = HashMap::new();
        for (var, seed) in seeds {
            if let Some(id) = var.id {
                accumulate(&mut grads, id, (*seed).clone())?;
            }
        }
        while let Some(node) = self.nodes.pop() {
            let flowed: Vec<Option<Tensor>> = node
                .outputs
                .iter()
                .zip(&node.output_metas)
                .map(|(id, meta)| grads.remove(id).map(|g| g.reshape(meta.dims())).transpose())
                .collect::<Result<_>>()?;
            let Some(device) = flowed.iter().flatten().map(|t| t.device().clone()).next() else {
                continue;
            };
            let needs: Vec<bool> = node.inputs.iter().map(Option::is_some).collect();
            let backward = match &node.step {
                Step::Op(op) => op_backward(op.as_ref(), &node, &device, &flowed, &needs)?,
                Step::Segment(segment) => segment_backward(segment, &node, &flowed)?,
            };
            for ((id, grad), meta) in node.inputs.iter().zip(backward).zip(&node.input_metas) {
                if let (Some(id), Some(grad)) = (id, grad) {
                    accumulate(&mut grads, *id, grad.reshape(meta.dims())?)?;
                }
            }
        }
        Ok(Grads(grads))
    }
}

fn op_backward(
    op: &dyn Op,
    node: &Node,
    device: &Arc<dyn Device>,
    flowed: &[Option<Tensor>],
    needs: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    op.gradient(&Gradient {
        op: op.name(),
        device,
        input_metas: &node.input_metas,
        inputs: &node.saved_inputs,
        outputs: &node.saved_outputs,
        grads: flowed,
        needs,
    })
}

fn segment_backward(segment: &SegmentFn, node: &Node, flowed: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
    let mut tape = Tape::new();
    let leaf = |tape: &mut Tape, (tensor, id): (&Option<Tensor>, &Option<Id>)| {
        tensor.as_ref().map(|t| if id.is_some() { tape.leaf(t) } else { Var::constant(t.clone()) })
    };
    let inputs: Vec<Var> =
        node.saved_inputs.iter().zip(&node.inputs).filter_map(|pair| leaf(&mut tape, pair)).collect();
    let outputs = segment(&mut tape, &inputs)?;
    let seeds: Vec<(&Var, &Tensor)> =
        outputs.iter().zip(flowed).filter_map(|(v, g)| g.as_ref().map(|g| (v, g))).collect();
    let grads = tape.backward(&seeds)?;
    inputs.iter().map(|v| grads.of(v).transpose()).collect()
}

/// Adds into the gradient of `id`; the first one is kept as it is. A reshaped variable has one gradient in one shape.
fn accumulate(grads: &mut HashMap<Id, Tensor>, id: Id, grad: Tensor) -> Result<()> {
    let sum = match grads.remove(&id) {
        None => grad,
        Some(first) => {
            let grad = grad.reshape(first.dims())?;
            dispatch::run_one(&binary::ADD, &[&first, &grad])?
        }
    };
    grads.insert(id, sum);
    Ok(())
}
