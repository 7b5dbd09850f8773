//! Permute, slice, pad, concat and fill.

use std::any::Any;

use super::{Block, WORDS, bindable, movable, wgsl, words};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem};
use crate::op::{Array, Cost, Gradient, Op};
use crate::shape::{self, MAX_RANK, Meta, Shape};
use crate::tensor::Tensor;

/// Axis i of the result is axis `order[i]` of the input.
#[derive(Clone, Debug)]
pub struct Permute {
    pub order: Vec<usize>,
}

/// Elements `start .. start + length` along `axis`.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    pub axis: usize,
    pub start: usize,
    pub length: usize,
}

/// Zeros before and after the input along `axis`: the gradient of [`Slice`].
#[derive(Clone, Copy, Debug)]
pub struct Pad {
    pub axis: usize,
    pub before: usize,
    pub after: usize,
}

/// 2 to 7 inputs end to end along `axis`; all other extents alike.
#[derive(Clone, Copy, Debug)]
pub struct Concat {
    pub axis: usize,
}

/// A tensor of one value, rounded to `dtype` (f32, f16, bf16 or u32). No inputs.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub value: f32,
    pub dims: Shape,
    pub dtype: DType,
}

fn moved(bytes: usize) -> Cost {
    Cost { flops: 0.0, bytes: 2.0 * bytes as f64 }
}

/// The single input of an op along `axis`.
fn along<'a>(op: &'static str, inputs: &'a [Meta], axis: usize) -> Result<&'a Meta> {
    match inputs {
        [x] if !movable(x.dtype) => Err(Error::Dtype { op, expected: "a float type or u32", got: x.to_string() }),
        [x] if axis < x.shape.rank() => Ok(x),
        _ => Err(Error::Shape {
            op,
            rule: "one input that has the axis",
            got: format!("{} for axis {axis}", shape::list(inputs)),
        }),
    }
}

fn with_extent(meta: &Meta, axis: usize, extent: usize) -> Result<Meta> {
    let mut dims = meta.dims().to_vec();
    dims[axis] = extent;
    Meta::new(&dims, meta.dtype)
}

/// Product of the extents behind `axis`.
fn inner(meta: &Meta, axis: usize) -> usize {
    meta.dims()[axis + 1..].iter().product()
}

impl Permute {
    /// Output extents and the input's strides for them, axes that stay neighbours merged, outermost first, padded in
    /// front to six.
    fn merged(&self, x: &Meta) -> ([usize; MAX_RANK], [usize; MAX_RANK]) {
        let mut strides = vec![1; x.shape.rank()];
        for axis in (1..x.shape.rank()).rev() {
            strides[axis - 1] = strides[axis] * x.dims()[axis];
        }
        let mut axes: Vec<(usize, usize)> = Vec::with_capacity(MAX_RANK);
        for (extent, stride) in self.order.iter().map(|&a| (x.dims()[a], strides[a])).filter(|(extent, _)| *extent != 1)
        {
            match axes.last_mut() {
                Some((outer, step)) if *step == extent * stride => (*outer, *step) = (*outer * extent, stride),
                _ => axes.push((extent, stride)),
            }
        }
        let (mut dims, mut steps) = ([1; MAX_RANK], [0; MAX_RANK]);
        steps[MAX_RANK - 1] = 1;
        for ((extent, stride), axis) in axes.iter().rev().zip((0..MAX_RANK).rev()) {
            (dims[axis], steps[axis]) = (*extent, *stride);
        }
        (dims, steps)
    }
}

impl Op for Permute {
    fn name(&self) -> &'static str {
        "permute"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = inputs else {
            return Err(Error::Shape { op: "permute", rule: "one input", got: shape::list(inputs) });
        };
        if !movable(x.dtype) {
            return Err(Error::Dtype { op: "permute", expected: "a float type or u32", got: x.to_string() });
        }
        let mut sorted = self.order.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..x.shape.rank()) {
            let got = format!("order {:?} for {x}", self.order);
            return Err(Error::Shape { op: "permute", rule: "each axis once", got });
        }
        let dims: Vec<usize> = self.order.iter().map(|&axis| x.dims()[axis]).collect();
        Ok(vec![Meta::new(&dims, x.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let dims = inputs[0].dims();
        let out: Vec<usize> = self.order.iter().map(|&axis| dims[axis]).collect();
        let element = |mut i: usize| {
            let mut index = [0; MAX_RANK];
            for (&axis, extent) in self.order.iter().zip(&out).rev() {
                index[axis] = i % extent;
                i /= extent;
            }
            inputs[0].data[dims.iter().zip(index).fold(0, |at, (extent, index)| at * extent + index)]
        };
        vec![(0..inputs[0].data.len()).map(element).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("permute_fwd", WORDS, cpu::permute), wgsl("permute_fwd", WORDS, bindable, plan_permute)];
        KERNELS
    }

    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        words(&inputs[0])
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let (dims, strides) = self.merged(&inputs[0]);
        dims.iter().chain(&strides).fold(Params::new(), |params, &value| params.u(value))
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let mut order = vec![0; self.order.len()];
        for (to, &from) in self.order.iter().enumerate() {
            order[from] = to;
        }
        Ok(vec![Some(g.one(&Permute { order }, &[g.grad(0)?])?)])
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        moved(inputs[0].bytes())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn plan_permute(p: &Problem) -> Plan {
    let Some(op) = p.op::<Permute>() else { return Plan::default() };
    let (dims, strides) = op.merged(&p.inputs[0]);
    let count = p.outputs[0].count();
    // Innermost first; the outermost extent is what is left of the index.
    let params = dims.iter().rev().take(5).fold(Params::new().u(count).u(0), |params, &d| params.u(d));
    let params = strides.iter().rev().fold(params, |params, &s| params.u(s));
    Plan::of(Launch::linear(count, super::BLOCK, params))
}

impl Op for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = along("slice", inputs, self.axis)?;
        if self.start.checked_add(self.length).is_none_or(|end| end > x.dims()[self.axis]) {
            let got = format!("{} + {} along axis {} of {x}", self.start, self.length, self.axis);
            return Err(Error::Shape { op: "slice", rule: "start + length within the axis", got });
        }
        Ok(vec![with_extent(x, self.axis, self.length)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let dims = inputs[0].dims();
        let inner: usize = dims[self.axis + 1..].iter().product();
        let kept = |i: &usize| (self.start..self.start + self.length).contains(&(i / inner % dims[self.axis]));
        vec![(0..inputs[0].data.len()).filter(kept).map(|i| inputs[0].data[i]).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("slice_fwd", WORDS, cpu::slice), wgsl("slice_fwd", WORDS, bindable, plan_strip)];
        KERNELS
    }

    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        words(&inputs[0])
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let inner = inner(&inputs[0], self.axis);
        Params::new().u(self.length * inner).u(inputs[0].dims()[self.axis] * inner).u(self.start * inner)
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let after = g.input_metas[0].dims()[self.axis] - self.start - self.length;
        Ok(vec![Some(g.one(&Pad { axis: self.axis, before: self.start, after }, &[g.grad(0)?])?)])
    }

    fn cost(&self, _: &[Meta], outputs: &[Meta]) -> Cost {
        moved(outputs[0].bytes())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "pad"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = along("pad", inputs, self.axis)?;
        let extent = x.dims()[self.axis].saturating_add(self.before).saturating_add(self.after);
        Ok(vec![with_extent(x, self.axis, extent)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let dims = inputs[0].dims();
        let inner: usize = dims[self.axis + 1..].iter().product();
        let mut y = Vec::new();
        for block in inputs[0].data.chunks((dims[self.axis] * inner).max(1)) {
            y.extend(std::iter::repeat_n(0.0, self.before * inner));
            y.extend(block);
            y.extend(std::iter::repeat_n(0.0, self.after * inner));
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("pad_fwd", WORDS, cpu::pad), wgsl("pad_fwd", WORDS, bindable, plan_strip)];
        KERNELS
    }

    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        words(&inputs[0])
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let inner = inner(&inputs[0], self.axis);
        let extent = |meta: &Meta| meta.dims()[self.axis] * inner;
        Params::new().u(extent(&inputs[0])).u(extent(&outputs[0])).u(self.before * inner)
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let length = g.input_metas[0].dims()[self.axis];
        Ok(vec![Some(g.one(&Slice { axis: self.axis, start: self.before, length }, &[g.grad(0)?])?)])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: (inputs[0].bytes() + outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Slice and pad share their parameters: width, stride and offset of a strip within longer rows.
fn plan_strip(p: &Problem) -> Plan {
    let params = p.params();
    let word = |i: usize| params.words().get(i).map_or(0, |&w| w as usize);
    let count = p.outputs[0].count();
    Plan::of(Block { count, width: word(0), stride: word(1), offset: word(2), ..Block::default() }.launch(count))
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        if !(2..=7).contains(&inputs.len()) {
            return Err(Error::Shape { op: "concat", rule: "2 to 7 inputs", got: shape::list(inputs) });
        }
        let first = along("concat", &inputs[..1], self.axis)?;
        let mut extent = 0usize;
        for x in inputs {
            let fits = x.shape.rank() == first.shape.rank()
                && with_extent(x, self.axis, 0)? == with_extent(first, self.axis, 0)?;
            if !fits {
                let rule = "one type, and one extent in every other axis";
                return Err(Error::Shape { op: "concat", rule, got: shape::list(inputs) });
            }
            extent += x.dims()[self.axis];
        }
        Ok(vec![with_extent(first, self.axis, extent)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let outer: usize = inputs[0].dims()[..self.axis].iter().product();
        let mut y = Vec::new();
        for o in 0..outer {
            for x in inputs {
                let width = x.data.len() / outer;
                y.extend(&x.data[o * width..(o + 1) * width]);
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("concat_fwd", WORDS, cpu::concat), wgsl("concat_fwd", WORDS, bindable, plan_concat)];
        KERNELS
    }

    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        words(&inputs[0])
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        inputs.iter().fold(Params::new(), |params, x| params.u(x.dims()[self.axis] * inner(x, self.axis)))
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let mut start = 0;
        let mut gradients = Vec::with_capacity(g.input_metas.len());
        for (input, meta) in g.input_metas.iter().enumerate() {
            let length = meta.dims()[self.axis];
            let slice = Slice { axis: self.axis, start, length };
            gradients.push(if g.needs(input) { Some(g.one(&slice, &[g.grad(0)?])?) } else { None });
            start += length;
        }
        Ok(gradients)
    }

    fn cost(&self, _: &[Meta], outputs: &[Meta]) -> Cost {
        moved(outputs[0].bytes())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One launch per input: it and the result fill the two slots.
fn plan_concat(p: &Problem) -> Plan {
    let params = p.params();
    let stride: u32 = params.words().iter().sum();
    let mut offset = 0;
    let mut launches = Vec::with_capacity(p.inputs.len());
    for (input, (meta, &width)) in p.inputs.iter().zip(params.words()).enumerate() {
        let block =
            Block { count: meta.count(), width: width as usize, stride: stride as usize, offset, ..Block::default() };
        if meta.count() > 0 {
            launches.push(block.launch(meta.count()).slots(&[input, p.inputs.len()]));
        }
        offset += width as usize;
    }
    Plan::sequence(launches)
}

impl Op for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        if !inputs.is_empty() {
            return Err(Error::Shape { op: "fill", rule: "no inputs", got: shape::list(inputs) });
        }
        if !movable(self.dtype) {
            return Err(Error::Dtype { op: "fill", expected: "a float type or u32", got: self.dtype.to_string() });
        }
        Ok(vec![Meta { shape: self.dims, dtype: self.dtype }])
    }

    fn reference(&self, _: &[Array]) -> Vec<Vec<f64>> {
        vec![vec![self.dtype.round(f64::from(self.value)); self.dims.count()]]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("fill_fwd", WORDS, cpu::fill), wgsl("fill_fwd", WORDS, bindable, plan_fill)];
        KERNELS
    }

    fn element(&self, _: &[Meta], outputs: &[Meta]) -> DType {
        words(&outputs[0])
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        let encoded = outputs[0].dtype.encode(&[f64::from(self.value)]);
        Params::new().word(encoded.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte)))
    }

    fn gradient(&self, _: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(Vec::new())
    }

    fn cost(&self, _: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: outputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The shader stores an f32 through the element type; words take its bits as they are.
fn plan_fill(p: &Problem) -> Plan {
    let Some(op) = p.op::<Fill>() else { return Plan::default() };
    let count = p.outputs[0].count();
    let bits = if op.dtype == DType::U32 { op.dtype.round(f64::from(op.value)) as u32 } else { op.value.to_bits() };
    Plan::of(Block { count, bits, ..Block::default() }.launch(count))
}
