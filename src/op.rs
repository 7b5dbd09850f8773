//! The op: what it means, how its shapes follow, its gradient, its kernels, its cases.

use std::any::Any;
use std::fmt::Debug;

use crate::device::Device;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params, Source};
use crate::shape::{Meta, Shape};
use crate::tensor::Tensor;
use std::sync::Arc;

/// A host array in f64: what references take and give.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: Shape,
    pub data: Vec<f64>,
}

impl Array {
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }
}

/// Counted work: what the roofline is computed from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub flops: f64,
    /// Bytes that must move at least once between memory and the processor.
    pub bytes: f64,
}

/// Which tensors backward needs, by position.
#[derive(Clone, Copy, Debug, Default)]
pub struct Saves {
    pub inputs: &'static [usize],
    pub outputs: &'static [usize],
}

/// An operation with its parameters as fields.
pub trait Op: Debug + Send + Sync + Any {
    fn name(&self) -> &'static str;

    /// Output shapes and types, or an error that names the numbers.
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>>;

    /// The definition of truth: f64 in, f64 out, one vector per output, sharing no code with any kernel.
    /// Called only with inputs that `infer` accepted.
    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>>;

    /// Kernel records, best first, the naive rung of each device last.
    fn kernels(&self) -> &'static [Kernel];

    /// The parameter block handed to every launch that does not make its own.
    fn params(&self, _inputs: &[Meta], _outputs: &[Meta]) -> Params {
        Params::new()
    }

    /// (output, input) pairs where an in-place op writes into its input.
    fn aliases(&self) -> &'static [(usize, usize)] {
        &[]
    }

    /// The type that picks the element prelude: that of the first float input, else of the first float output.
    fn element(&self, inputs: &[Meta], outputs: &[Meta]) -> DType {
        inputs.iter().chain(outputs).map(|m| m.dtype).find(|d| d.is_float()).unwrap_or(DType::F32)
    }

    /// How many leading outputs carry gradients; the rest are statistics or indices.
    fn differentiable(&self) -> usize {
        1
    }

    fn saves(&self) -> Saves {
        Saves::default()
    }

    /// One optional tensor per input, by dispatching ops. Inputs that are no function's argument (indices) get `None`.
    fn gradient(&self, _context: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Err(Error::NoGradient { op: self.name() })
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        let flops = outputs.iter().map(Meta::count).sum::<usize>() as f64;
        Cost { flops, bytes }
    }

    fn as_any(&self) -> &dyn Any;
}

/// What a gradient rule works from.
pub struct Gradient<'a> {
    pub op: &'static str,
    pub device: &'a Arc<dyn Device>,
    pub input_metas: &'a [Meta],
    pub inputs: &'a [Option<Tensor>],
    pub outputs: &'a [Option<Tensor>],
    /// Gradient of each output; `None` where nothing flowed back.
    pub grads: &'a [Option<Tensor>],
    /// Which inputs want a gradient.
    pub needs: &'a [bool],
}

impl Gradient<'_> {
    fn get<'t>(&self, list: &'t [Option<Tensor>], index: usize) -> Result<&'t Tensor> {
        // A tensor asked for but not in `saves` is a missing gradient rule, not the user's mistake.
        list.get(index).and_then(Option::as_ref).ok_or(Error::NoGradient { op: self.op })
    }

    /// A saved input.
    pub fn input(&self, index: usize) -> Result<&Tensor> {
        self.get(self.inputs, index)
    }

    /// A saved output.
    pub fn output(&self, index: usize) -> Result<&Tensor> {
        self.get(self.outputs, index)
    }

    /// The gradient that flowed into output `index`.
    pub fn grad(&self, index: usize) -> Result<&Tensor> {
        self.get(self.grads, index)
    }

    pub fn needs(&self, input: usize) -> bool {
        self.needs.get(input).copied().unwrap_or(false)
    }

    pub fn run(&self, op: &dyn Op, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        dispatch::run_on(self.device, op, inputs)
    }

    /// Runs an op that has one output.
    pub fn one(&self, op: &dyn Op, inputs: &[&Tensor]) -> Result<Tensor> {
        dispatch::one(self.run(op, inputs)?, self.op)
    }
}

/// How test values are drawn.
#[derive(Clone, Debug)]
pub enum Fill {
    Normal {
        mean: f64,
        deviation: f64,
    },
    Uniform {
        low: f64,
        high: f64,
    },
    /// Whole numbers in low..=high.
    Integers {
        low: i64,
        high: i64,
    },
    Values(Vec<f64>),
    /// Normal draws pushed at least `gap` away from every kink, so that differences see one branch.
    Away {
        kinks: &'static [f64],
        gap: f64,
    },
    /// Anything else: seed in, values out.
    Custom(fn(seed: u64, shape: &Shape) -> Vec<f64>),
}

impl Fill {
    pub const NORMAL: Fill = Fill::Normal { mean: 0.0, deviation: 1.0 };
}

/// One input of a case.
#[derive(Clone, Debug)]
pub struct Input {
    pub meta: Meta,
    pub fill: Fill,
}

/// Bounds by kind of computation; both the worst element and the aggregate must hold (see `verify::judge`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tolerance {
    /// Bit-equal after rounding the reference to the storage type.
    Exact,
    /// One or two roundings: add, mul, scale.
    Arithmetic,
    /// exp, tanh, rsqrt, division: 4e-6 relative or 1e-6 of the tensor's scale.
    Transcendental,
    /// Sums over `k` products accumulated in f32.
    Contraction { k: usize },
}

/// One row of the table: verified on every device, differenced where `grad`, timed where `bench`.
#[derive(Clone, Debug)]
pub struct Case {
    pub op: Arc<dyn Op>,
    pub inputs: Vec<Input>,
    pub tolerance: Tolerance,
    /// Why the bound is wider than its class would be; empty for none.
    pub loosened: Option<(f64, &'static str)>,
    /// Least size of the terms that an output is made of: where they cancel, its own size says nothing of their roundings.
    pub terms: f64,
    /// Outputs on whose way one intermediate may be rounded to the storage type, as the plain op-by-op chain rounds it.
    pub rounded: &'static [usize],
    /// Output 0, which is whole numbers, before it was rounded to them: kernels that round what is only nearly the same value may
    /// give either neighbour of one at a tie, and nothing else (see `verify::judge`).
    pub unrounded: Option<fn(&[Array]) -> Vec<f64>>,
    pub grad: bool,
    /// A real model's size: timed by `kernels bench`, too large for differences.
    pub bench: bool,
    /// What tells it from a case of the same op and shapes: other values, such as ties. Mostly empty.
    pub variant: &'static str,
}

impl Case {
    /// A case over inputs drawn as given; shapes are literals of the table, so a bad one is a bug there.
    pub fn new(op: impl Op, tolerance: Tolerance) -> Self {
        Self {
            op: Arc::new(op),
            inputs: Vec::new(),
            tolerance,
            loosened: None,
            terms: 0.0,
            rounded: &[],
            unrounded: None,
            grad: false,
            bench: false,
            variant: "",
        }
    }

    #[must_use]
    pub fn input(mut self, dims: &[usize], dtype: DType, fill: Fill) -> Self {
        match Meta::new(dims, dtype) {
            Ok(meta) => self.inputs.push(Input { meta, fill }),
            Err(e) => panic!("case of {}: {e}", self.op.name()),
        }
        self
    }

    /// A standard-normal input.
    #[must_use]
    pub fn normal(self, dims: &[usize], dtype: DType) -> Self {
        self.input(dims, dtype, Fill::NORMAL)
    }

    #[must_use]
    pub fn grad(mut self) -> Self {
        self.grad = true;
        self
    }

    #[must_use]
    pub fn bench(mut self) -> Self {
        self.bench = true;
        self
    }

    #[must_use]
    pub fn variant(mut self, variant: &'static str) -> Self {
        self.variant = variant;
        self
    }

    /// Widens the element bound by `factor`, with the reason on record.
    #[must_use]
    pub fn loosened(mut self, factor: f64, reason: &'static str) -> Self {
        self.loosened = Some((factor, reason));
        self
    }

    /// Says that outputs are differences of terms of this size, so that values near zero are judged by it.
    #[must_use]
    pub fn terms(mut self, size: f64) -> Self {
        self.terms = size;
        self
    }

    /// Says that kernels may round one intermediate of these outputs to the storage type (see `verify::ROUNDED`).
    #[must_use]
    pub fn rounded_between(mut self, outputs: &'static [usize]) -> Self {
        self.rounded = outputs;
        self
    }

    /// Gives output 0 before it was rounded to whole numbers.
    #[must_use]
    pub fn unrounded(mut self, values: fn(&[Array]) -> Vec<f64>) -> Self {
        self.unrounded = Some(values);
        self
    }

    pub fn metas(&self) -> Vec<Meta> {
        self.inputs.iter().map(|i| i.meta).collect()
    }

    /// "softmax{..} f32[4, 7]": unique within its op, stable between runs.
    pub fn label(&self) -> String {
        let op = format!("{:?}", self.op);
        let inputs: Vec<String> = self.inputs.iter().map(|i| i.meta.to_string().replace(' ', "")).collect();
        let variant = if self.variant.is_empty() { String::new() } else { format!(" {}", self.variant) };
        format!("{} {}{variant}", op.replace(' ', ""), inputs.join(" "))
    }
}

/// One op family: the unit of the tree.
pub struct Family {
    /// File stem of `ops/`, `shaders/`, `cpu/` and `cuda/`.
    pub name: &'static str,
    pub cases: fn() -> Vec<Case>,
    /// The GPU kernel files, for checks that need no device.
    pub source: Option<Source>,
}
