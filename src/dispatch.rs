//! Dispatch: infer, choose the kernel, allocate, launch. The only caller of `Device::launch`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::device::{Binding, Device, Kind};
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Plan, Problem, check_launch};
use crate::op::{Array, Op};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;
use crate::tuned;

/// Runs `op` on the device of its first input.
pub fn run(op: &dyn Op, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let Some(first) = inputs.first() else {
        return Err(Error::Shape { op: op.name(), rule: "at least one input", got: "none".into() });
    };
    run_on(first.device(), op, inputs)
}

/// Runs an op that has one output.
pub fn run_one(op: &dyn Op, inputs: &[&Tensor]) -> Result<Tensor> {
    one(run(op, inputs)?, op.name())
}

/// The single output of an op.
pub fn one(mut outputs: Vec<Tensor>, op: &'static str) -> Result<Tensor> {
    match (outputs.pop(), outputs.is_empty()) {
        (Some(tensor), true) => Ok(tensor),
        _ => Err(Error::Shape { op, rule: "one output", got: format!("{} more", outputs.len()) }),
    }
}

/// Runs `op` on `device`; needed where an op has no inputs.
pub fn run_on(device: &Arc<dyn Device>, op: &dyn Op, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    check_device(device, op, inputs)?;
    let metas: Vec<Meta> = inputs.iter().map(|t| t.meta()).collect();
    let out_metas = op.infer(&metas)?;
    if device.info().kind == Kind::Reference {
        return run_reference(device, op, inputs, &out_metas);
    }
    let problem = Problem {
        op,
        inputs: &metas,
        outputs: &out_metas,
        element: op.element(&metas, &out_metas),
        info: device.info(),
    };
    let kernel = match choose(&problem) {
        Ok(kernel) => kernel,
        Err(_) if FALLBACK.load(Relaxed) => return fallback(device, op, inputs, &out_metas),
        Err(e) => return Err(e),
    };
    let outputs = outputs(device, op, inputs, &out_metas)?;
    launch(device, kernel, &problem, inputs, &outputs)?;
    Ok(outputs)
}

/// Runs a given kernel into given outputs: how rungs are verified against poisoned, guarded memory and timed.
pub fn run_with(kernel: &Kernel, op: &dyn Op, inputs: &[&Tensor], outputs: &[Tensor]) -> Result<()> {
    let Some(device) = inputs.iter().copied().chain(outputs).map(Tensor::device).next() else {
        return Ok(());
    };
    check_device(device, op, inputs)?;
    let metas: Vec<Meta> = inputs.iter().map(|t| t.meta()).collect();
    let out_metas: Vec<Meta> = outputs.iter().map(Tensor::meta).collect();
    let element = op.element(&metas, &out_metas);
    let problem = Problem { op, inputs: &metas, outputs: &out_metas, element, info: device.info() };
    launch(device, kernel, &problem, inputs, outputs)
}

/// Whether `run` would find a kernel for inputs like these: how a caller chooses between ops that mean the same.
pub fn supports(device: &Arc<dyn Device>, op: &dyn Op, inputs: &[Meta]) -> bool {
    let Ok(outputs) = op.infer(inputs) else { return false };
    let element = op.element(inputs, &outputs);
    let problem = Problem { op, inputs, outputs: &outputs, element, info: device.info() };
    device.info().kind == Kind::Reference || choose(&problem).is_ok()
}

/// The kernels that fit, the one that `run` takes first.
pub fn candidates(problem: &Problem) -> Vec<&'static Kernel> {
    let mut kernels: Vec<&'static Kernel> = problem.fitting().collect();
    if let Some(first) = tuned::choice(problem) {
        kernels.sort_by_key(|kernel| !std::ptr::eq(*kernel, first));
    }
    kernels
}

/// The kernel that `run` takes: the one that was measured as fastest where the device's table has been loaded, else the first
/// that fits.
pub fn choose(problem: &Problem) -> Result<&'static Kernel> {
    let first = tuned::choice(problem).or_else(|| problem.fitting().next());
    let unsupported = || Error::Unsupported {
        op: problem.op.name(),
        device: problem.info.id.clone(),
        dtype: problem.element.name(),
        shapes: shape::list(problem.inputs),
    };
    first.ok_or_else(unsupported)
}

/// Output tensors: new memory, or the input's own where the op works in place.
fn outputs(device: &Arc<dyn Device>, op: &dyn Op, inputs: &[&Tensor], metas: &[Meta]) -> Result<Vec<Tensor>> {
    let make = |(index, meta): (usize, &Meta)| match op.aliases().iter().find(|(output, _)| *output == index) {
        Some(&(_, input)) => Ok(inputs[input].clone()),
        None => Tensor::empty(device, *meta),
    };
    metas.iter().enumerate().map(make).collect()
}

fn check_device(device: &Arc<dyn Device>, op: &dyn Op, inputs: &[&Tensor]) -> Result<()> {
    for (index, tensor) in inputs.iter().enumerate() {
        if !Arc::ptr_eq(tensor.device(), device) {
            return Err(Error::WrongDevice {
                op: op.name(),
                input: index,
                expected: device.info().id.clone(),
                got: tensor.device().info().id.clone(),
            });
        }
    }
    Ok(())
}

fn launch(
    device: &Arc<dyn Device>,
    kernel: &Kernel,
    problem: &Problem,
    inputs: &[&Tensor],
    outputs: &[Tensor],
) -> Result<()> {
    let op = problem.op;
    // An op over no elements has nothing to compute; a launch of zero groups would be refused.
    if problem.outputs.iter().all(|m| m.count() == 0) {
        return Ok(());
    }
    let Plan { launches, scratch } = (kernel.plan)(problem);
    let scratch: Vec<_> =
        scratch.into_iter().map(|bytes| device.alloc(bytes).map(|b| (b, bytes))).collect::<Result<_>>()?;
    let mut bindings: Vec<Binding> = Vec::with_capacity(8);
    for (index, tensor) in inputs.iter().enumerate() {
        bindings.push(tensor.binding(op.aliases().iter().any(|(_, input)| *input == index)));
    }
    for (index, tensor) in outputs.iter().enumerate() {
        if !op.aliases().iter().any(|(output, _)| *output == index) {
            bindings.push(tensor.binding(true));
        }
    }
    bindings.extend(scratch.iter().map(|(buffer, bytes)| Binding { buffer, offset: 0, bytes: *bytes, write: true }));
    check_overlap(op, &bindings)?;
    let trace = TRACING.load(Relaxed);
    for launch in &launches {
        check_launch(kernel, launch, device.info())?;
        if trace {
            count(kernel.name);
        }
        if launch.windows.is_empty() && launch.slots.is_empty() {
            device.launch(kernel, problem.element, launch, &bindings)?;
        } else {
            device.launch(kernel, problem.element, launch, &select(&bindings, launch))?;
        }
    }
    Ok(())
}

/// The arguments as one launch binds them: windowed, then put into its slots.
fn select<'a>(arguments: &[Binding<'a>], launch: &Launch) -> Vec<Binding<'a>> {
    let mut windowed = arguments.to_vec();
    for w in &launch.windows {
        if let Some(b) = windowed.get_mut(w.argument) {
            b.offset += w.offset;
            b.bytes = w.bytes;
        }
    }
    if launch.slots.is_empty() {
        return windowed;
    }
    launch.slots.iter().filter_map(|&argument| windowed.get(argument).copied()).collect()
}

/// Memory that a kernel writes may not be seen by it under another argument.
fn check_overlap(op: &dyn Op, bindings: &[Binding]) -> Result<()> {
    for (i, a) in bindings.iter().enumerate().filter(|(_, b)| b.write) {
        if bindings.iter().enumerate().any(|(j, b)| i != j && a.buffer.same(b.buffer)) {
            return Err(Error::Shape {
                op: op.name(),
                rule: "a written argument shares its memory with no other",
                got: format!("argument {i}"),
            });
        }
    }
    Ok(())
}

fn arrays(inputs: &[&Tensor]) -> Result<Vec<Array>> {
    inputs.iter().map(|t| Ok(Array { shape: t.shape(), data: t.to_f64()? })).collect()
}

fn run_reference(device: &Arc<dyn Device>, op: &dyn Op, inputs: &[&Tensor], metas: &[Meta]) -> Result<Vec<Tensor>> {
    let values = op.reference(&arrays(inputs)?);
    let outputs = outputs(device, op, inputs, metas)?;
    for (tensor, data) in outputs.iter().zip(&values) {
        device.upload(tensor.buffer(), 0, bytemuck::cast_slice(data))?;
    }
    Ok(outputs)
}

static FALLBACK: AtomicBool = AtomicBool::new(false);
static FALLBACKS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

/// With fallback on, an op without a kernel runs its f64 reference on the host, counted and announced once per op.
/// Off by default: then it is a typed error.
pub fn set_fallback(on: bool) {
    FALLBACK.store(on, Relaxed);
}

/// How often each op fell back.
pub fn fallbacks() -> BTreeMap<&'static str, u64> {
    FALLBACKS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
}

fn fallback(device: &Arc<dyn Device>, op: &dyn Op, inputs: &[&Tensor], metas: &[Meta]) -> Result<Vec<Tensor>> {
    let mut counts = FALLBACKS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let n = counts.entry(op.name()).or_insert(0);
    *n += 1;
    if *n == 1 {
        let id = &device.info().id;
        crate::console::warn(format_args!("{} has no kernel on {id}: its f64 reference runs on the host", op.name()));
    }
    drop(counts);
    let values = op.reference(&arrays(inputs)?);
    let outputs = outputs(device, op, inputs, metas)?;
    for (tensor, data) in outputs.iter().zip(&values) {
        device.upload(tensor.buffer(), 0, &tensor.dtype().encode(data))?;
    }
    Ok(outputs)
}

static TRACING: AtomicBool = AtomicBool::new(false);
static TRACE: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

fn count(kernel: &'static str) {
    *TRACE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).entry(kernel).or_insert(0) += 1;
}

/// Counts launches per kernel while `work` runs: dispatches per step are exact and noise-free.
pub fn traced<R>(work: impl FnOnce() -> R) -> (R, BTreeMap<&'static str, u64>) {
    TRACE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    TRACING.store(true, Relaxed);
    let result = work();
    TRACING.store(false, Relaxed);
    (result, std::mem::take(&mut *TRACE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)))
}
