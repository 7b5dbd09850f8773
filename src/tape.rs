//! Autograd: a list of recorded ops and one reverse loop that asks each op for its gradient rule.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

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
    /// Variables that activations begin with: what [`Tape::backward_input`] goes by.
    activations: HashSet<Id>,
    next: Id,
    recording: bool,
}

/// Weight gradients that [`Tape::backward_input`] put off, with what they need.
pub struct Deferred {
    /// In backward order.
    nodes: Vec<Late>,
    grads: HashMap<Id, Tensor>,
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

struct Late {
    node: Node,
    /// What reached its outputs; `None`: only weights go through it, and it comes with the weights' gradients.
    flowed: Option<Vec<Option<Tensor>>>,
    needs: Vec<bool>,
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

impl Tape {
    /// A tape that records.
    pub fn new() -> Self {
        Self { nodes: Vec::new(), activations: HashSet::new(), next: 0, recording: true }
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

    /// Declares that from here on `var` is an activation, also where it was computed from weights alone (an embedding).
    pub fn mark_activation(&mut self, var: &Var) {
        self.activations.extend(var.id);
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
            if let Some(flowed) = take_flowed(&mut grads, &node)? {
                let needs: Vec<bool> = node.inputs.iter().map(Option::is_some).collect();
                let backward = node_backward(&node, &flowed, &needs)?;
                accumulate_inputs(&mut grads, &node, backward)?;
            }
        }
        Ok(Grads(grads))
    }

    /// The first half of backward: gradients of activations alone, so that the stage before can go on. What is left to do
    /// for the weights waits in `Deferred`. An op that computes both at once has both done here.
    pub fn backward_input(mut self, seeds: &[(&Var, &Tensor)], inputs: &[&Var]) -> Result<(Grads, Deferred)> {
        let mut activations = std::mem::take(&mut self.activations);
        activations.extend(inputs.iter().filter_map(|v| v.id));
        for node in &self.nodes {
            if node.inputs.iter().flatten().any(|id| activations.contains(id)) {
                activations.extend(&node.outputs);
            }
        }
        let mut grads: HashMap<Id, Tensor> = HashMap::new();
        for (var, seed) in seeds {
            if let Some(id) = var.id {
                accumulate(&mut grads, id, (*seed).clone())?;
            }
        }
        let mut deferred = Vec::new();
        while let Some(node) = self.nodes.pop() {
            if !node.outputs.iter().any(|id| activations.contains(id)) {
                let needs = node.inputs.iter().map(Option::is_some).collect();
                deferred.push(Late { node, flowed: None, needs });
                continue;
            }
            let Some(flowed) = take_flowed(&mut grads, &node)? else {
                continue;
            };
            let activation = |id: &Option<Id>| id.is_some_and(|id| activations.contains(&id));
            let now: Vec<bool> = node.inputs.iter().map(activation).collect();
            let mut needs: Vec<bool> = node.inputs.iter().zip(&now).map(|(id, now)| id.is_some() && !now).collect();
            if now.contains(&true) {
                let backward = node_backward(&node, &flowed, &now)?;
                needs.iter_mut().zip(&backward).for_each(|(need, given)| *need &= given.is_none());
                accumulate_inputs(&mut grads, &node, backward)?;
            }
            if needs.contains(&true) {
                deferred.push(Late { node, flowed: Some(flowed), needs });
            }
        }
        let inputs: HashSet<Id> = inputs.iter().filter_map(|v| v.id).collect();
        let (ready, rest) = grads.into_iter().partition(|(id, _)| inputs.contains(id));
        Ok((Grads(ready), Deferred { nodes: deferred, grads: rest }))
    }
}

impl Deferred {
    /// The second half of backward: gradients of the weights.
    pub fn backward_weight(self) -> Result<Grads> {
        let mut grads = self.grads;
        for Late { node, flowed, needs } in self.nodes {
            let flowed = match flowed {
                None => take_flowed(&mut grads, &node)?,
                flowed => flowed,
            };
            let Some(flowed) = flowed else {
                continue;
            };
            let backward = node_backward(&node, &flowed, &needs)?;
            accumulate_inputs(&mut grads, &node, backward)?;
        }
        Ok(Grads(grads))
    }
}

/// The gradients that reached a node's outputs, in their shapes; `None` where none did.
fn take_flowed(grads: &mut HashMap<Id, Tensor>, node: &Node) -> Result<Option<Vec<Option<Tensor>>>> {
    let of = |(id, meta): (&Id, &Meta)| grads.remove(id).map(|g| g.reshape(meta.dims())).transpose();
    let flowed: Vec<Option<Tensor>> = node.outputs.iter().zip(&node.output_metas).map(of).collect::<Result<_>>()?;
    Ok(flowed.iter().any(Option::is_some).then_some(flowed))
}

fn node_backward(node: &Node, flowed: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
    match &node.step {
        Step::Op(op) => op_backward(op.as_ref(), node, flowed, needs),
        Step::Segment(segment) => segment_backward(segment, node, flowed),
    }
}

fn accumulate_inputs(grads: &mut HashMap<Id, Tensor>, node: &Node, backward: Vec<Option<Tensor>>) -> Result<()> {
    for ((id, grad), meta) in node.inputs.iter().zip(backward).zip(&node.input_metas) {
        if let (Some(id), Some(grad)) = (id, grad) {
            accumulate(grads, *id, grad.reshape(meta.dims())?)?;
        }
    }
    Ok(())
}

fn op_backward(op: &dyn Op, node: &Node, flowed: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
    let Some(device) = flowed.iter().flatten().map(Tensor::device).next() else {
        return Ok(Vec::new());
    };
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
