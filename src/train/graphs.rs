//! Steps captured once per shape of their micro-batches and replayed: the host queues one graph, not hundreds of launches.

use crate::device::{Device, Graph, Kind};
use crate::error::{Error, Result, Uncapturable};

use super::lifecycle::{Micro, MicroShape};
use super::optimizer::Optimizer;

/// Queues a step on micro-batches.
pub type Queue<'q> = dyn FnMut(&mut Optimizer, &[Micro]) -> Result<()> + 'q;

/// Shapes that are captured at most. Graphs share the memory between their inputs and their results, so one more costs its
/// inputs and the driver's list of launches.
const SHAPES: usize = 16;

/// Captures of one shape that may fail for memory: a step leaves behind in the pool what the next capture takes.
const TRIES: usize = 3;

/// How many shapes are worth capturing on a device: `ESPALIER_GRAPHS` where it is set, to compare. A CPU's kernels take far
/// longer than queueing them.
pub fn shapes(device: &dyn Device) -> usize {
    let asked = std::env::var("ESPALIER_GRAPHS").ok().and_then(|count| count.parse().ok());
    asked.unwrap_or(if device.info().kind == Kind::Cuda { SHAPES } else { 0 })
}

/// The captured steps of a training.
pub struct Graphs {
    limit: usize,
    steps: Vec<Step>,
    /// Steps replayed so far.
    pub replayed: u64,
}

/// Steps of one shape.
struct Step {
    shape: Vec<MicroShape>,
    /// What every step of this shape reads: micro-batches are copied here.
    inputs: Vec<Micro>,
    /// The optimizer's when it was captured.
    generation: u64,
    graph: Option<Graph>,
    tries: usize,
}

impl Graphs {
    /// Captures steps of the first `limit` shapes; others, and all with a limit of 0, are queued launch by launch.
    pub fn new(limit: usize) -> Self {
        Self { limit, steps: Vec::new(), replayed: 0 }
    }

    /// Runs a step that has begun ([`Optimizer::begin`]). The first step of a shape runs as it is: it compiles kernels and
    /// fills the pool with the memory that the capture at the second one takes.
    pub fn step(
        &mut self,
        device: &dyn Device,
        optimizer: &mut Optimizer,
        micros: Vec<Micro>,
        queue: &mut Queue,
    ) -> Result<()> {
        let shape: Vec<MicroShape> = micros.iter().map(Micro::shape).collect();
        let Some(index) = self.steps.iter().position(|step| step.shape == shape) else {
            if self.steps.len() >= self.limit {
                return queue(optimizer, &micros);
            }
            let inputs: Vec<Micro> = micros.iter().map(Micro::duplicate).collect::<Result<_>>()?;
            // Its memory must be as free now as when the step is captured.
            drop(micros);
            let done = queue(optimizer, &inputs);
            let generation = optimizer.generation();
            self.steps.push(Step { shape, inputs, generation, graph: None, tries: 0 });
            return done;
        };
        let step = &mut self.steps[index];
        for (input, micro) in step.inputs.iter_mut().zip(&micros) {
            input.assign(micro)?;
        }
        drop(micros);
        if step.generation != optimizer.generation() {
            (step.graph, step.generation) = (None, optimizer.generation());
        }
        if step.graph.is_none() && step.tries < TRIES {
            match device.capture(&mut || queue(optimizer, &step.inputs)) {
                Ok(graph) => step.graph = Some(graph),
                Err(e @ (Error::Capture { reason: Uncapturable::Memory(_), .. } | Error::OutOfMemory { .. })) => {
                    step.tries += 1;
                    if step.tries == TRIES {
                        crate::console::warn(format_args!("steps of one shape are queued launch by launch: {e}"));
                    }
                }
                Err(Error::Capture { device, reason }) => {
                    crate::console::warn(format_args!("{device}: steps are not captured: {reason}"));
                    let step = self.steps.swap_remove(index);
                    *self = Self { replayed: self.replayed, ..Self::new(0) };
                    optimizer.forget_gradients();
                    return queue(optimizer, &step.inputs);
                }
                Err(e) => return Err(e),
            }
        }
        match &step.graph {
            Some(graph) => {
                self.replayed += 1;
                device.replay(graph)
            }
            None => {
                optimizer.forget_gradients();
                queue(optimizer, &step.inputs)
            }
        }
    }
}
