//! Mixture of experts, products: every sorted row times the weight of its expert.

mod groups;
mod plan;

use std::any::Any;

use super::moe::{MoeCombine, is_order, routing};
use super::quant_matmul::MAX_K;
use super::unary::{Function, UnaryBackward};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "moe_matmul", cases, source: Some(plan::SOURCE) };

/// Sorted row r times the weight of its expert: y[r, j] = f(sum_c x[row(r), c] W[e(r), j, c] (+ b[e(r), j])), f ReLU or
/// nothing. Inputs x, weight `[E, n, d]` (, bias `[E, n]`), `order u32 [m k]`, `offsets u32 [E + 1]` of
/// [`super::moe::MoeDispatch`]; output `[m k, n]` in sorted order. With `gather`, x is `[m, d]` and row(r) is the token of slot
/// order[r]; without, x is `[m k, d]`, sorted already. Experts without rows cost nothing.
#[derive(Clone, Copy, Debug)]
pub struct GroupedMatmul {
    pub k: usize,
    pub relu: bool,
    pub bias: bool,
    pub gather: bool,
    pub experts: usize,
}

/// The int8 form: `xq i8 [rows, d]`, `xs f32 [rows]`, `wq i8 [E, n, d]`, `ws f32 [E, n]` (, bias `f32 [E, n]`), order, offsets to
/// `f32 [m k, n]`, with exact int32 sums. Inference only.
#[derive(Clone, Copy, Debug)]
pub struct GroupedMatmulInt8 {
    pub k: usize,
    pub relu: bool,
    pub bias: bool,
    pub gather: bool,
    pub experts: usize,
}

/// dx of sorted rows: dz `[m k, n]`, weight `[E, n, d]`, offsets to `[m k, d]`.
#[derive(Clone, Copy, Debug)]
pub struct GroupedBackwardInput {
    pub experts: usize,
}

/// dz `[m k, n]`, x, order, offsets to dweight `[E, n, d]` and dbias `[E, n]`; zeros for experts without rows.
#[derive(Clone, Copy, Debug)]
pub struct GroupedBackwardWeight {
    pub k: usize,
    pub gather: bool,
    pub experts: usize,
}

/// The expert of sorted row r: the last whose rows start at or before it.
fn expert_of(offsets: &[f64], r: usize) -> usize {
    offsets[1..offsets.len() - 1].iter().filter(|&&start| start <= r as f64).count()
}

fn is_offsets(meta: &Meta, experts: usize) -> bool {
    experts >= 1 && is_order(meta, experts + 1)
}

/// Sorted rows that `order` names, where x of `rows` rows can serve them.
fn sorted_rows(order: &Meta, rows: usize, k: usize, gather: bool) -> Option<usize> {
    let sorted = order.count();
    let serves = k >= 1 && if gather { sorted == rows * k } else { sorted == rows };
    (serves && is_order(order, sorted)).then_some(sorted)
}

impl Op for GroupedMatmul {
    fn name(&self) -> &'static str {
        "grouped_matmul"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule =
            "x [m or m k, d], weight [E, n, d] (, bias [E, n]) of one float type, order u32 [m k], offsets u32 [E + 1]";
        let refuse = || Error::Shape { op: self.name(), rule, got: format!("{} for {self:?}", shape::list(inputs)) };
        if inputs.len() != 4 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (x, weight, order, offsets) =
            (&inputs[0], &inputs[1], &inputs[inputs.len() - 2], &inputs[inputs.len() - 1]);
        let (&[rows, d], &[experts, n, wd]) = (x.dims(), weight.dims()) else { return Err(refuse()) };
        let types = x.dtype.is_float() && weight.dtype == x.dtype;
        let bias = !self.bias || (inputs[2].dims() == [experts, n] && inputs[2].dtype == x.dtype);
        let sorted = sorted_rows(order, rows, self.k, self.gather).ok_or_else(refuse)?;
        if !types || !bias || d != wd || experts != self.experts || !is_offsets(offsets, experts) {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[sorted, n], x.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (order, offsets) = (&inputs[inputs.len() - 2].data, &inputs[inputs.len() - 1].data);
        let (n, d) = (inputs[1].dims()[1], inputs[1].dims()[2]);
        let mut y = Vec::with_capacity(order.len() * n);
        for (r, &slot) in order.iter().enumerate() {
            let e = expert_of(offsets, r);
            let row = if self.gather { slot as usize / self.k } else { r };
            for j in 0..n {
                let (x, w) = (&inputs[0].data[row * d..][..d], &inputs[1].data[(e * n + j) * d..][..d]);
                let sum: f64 = x.iter().zip(w).map(|(a, b)| a * b).sum();
                let z = sum + if self.bias { inputs[2].data[e * n + j] } else { 0.0 };
                y.push(if self.relu { z.max(0.0) } else { z });
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("grouped_matmul_fwd", DType::FLOATS, cpu::grouped_matmul),
            groups::FORWARD_WIDE,
            groups::FORWARD_NARROW,
            plan::FORWARD_TENSOR,
            plan::FORWARD_TENSOR_SMALL,
            plan::FORWARD,
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [rows, n] = [0, 1].map(|axis| outputs[0].dims()[axis]);
        params(rows, n, inputs[0].dims()[1], self.k, self.gather, self.experts).flag(self.relu).flag(self.bias)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2, 3, 4], outputs: &[0] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let first = 2 + usize::from(self.bias);
        let (x, weight, order, offsets) = (g.input(0)?, g.input(1)?, g.input(first)?, g.input(first + 1)?);
        let masked;
        let dz = if self.relu {
            masked = g.one(&UnaryBackward(Function::Relu), &[g.output(0)?, g.grad(0)?])?;
            &masked
        } else {
            g.grad(0)?
        };
        let mut grads = vec![None; g.input_metas.len()];
        if g.needs(0) {
            let sorted = g.one(&GroupedBackwardInput { experts: self.experts }, &[dz, weight, offsets])?;
            let sum = MoeCombine { k: self.k, weighted: false };
            grads[0] = Some(if self.gather { g.one(&sum, &[&sorted, order])? } else { sorted });
        }
        if g.needs(1) || (self.bias && g.needs(2)) {
            let backward = GroupedBackwardWeight { k: self.k, gather: self.gather, experts: self.experts };
            let mut both = g.run(&backward, &[dz, x, order, offsets])?;
            let dbias = both.pop();
            grads[1] = both.pop();
            if self.bias {
                grads[2] = dbias;
            }
        }
        Ok(grads)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        // How many experts have rows is not known from shapes: at most one per row.
        let used = self.experts.min(outputs[0].dims()[0]) as f64 / self.experts.max(1) as f64;
        let moved = (inputs[0].bytes() + outputs[0].bytes()) as f64 + used * inputs[1].bytes() as f64;
        Cost { flops: 2.0 * outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes: moved }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for GroupedMatmulInt8 {
    fn name(&self) -> &'static str {
        "grouped_matmul_int8"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "xq i8 [rows, d], xs f32 [rows], wq i8 [E, n, d], ws f32 [E, n] (, bias f32 [E, n]), order, offsets";
        let refuse = || Error::Shape { op: self.name(), rule, got: format!("{} for {self:?}", shape::list(inputs)) };
        if inputs.len() != 6 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (order, offsets) = (&inputs[inputs.len() - 2], &inputs[inputs.len() - 1]);
        let (&[rows, d], &[experts, n, wd]) = (inputs[0].dims(), inputs[2].dims()) else { return Err(refuse()) };
        let bytes = inputs[0].dtype == DType::I8 && inputs[2].dtype == DType::I8;
        let matrix = |m: &Meta| m.dims() == [experts, n] && m.dtype == DType::F32;
        let scales = inputs[1].dims() == [rows] && inputs[1].dtype == DType::F32 && matrix(&inputs[3]);
        let bias = !self.bias || matrix(&inputs[4]);
        let sorted = sorted_rows(order, rows, self.k, self.gather).ok_or_else(refuse)?;
        if !bytes
            || !scales
            || !bias
            || d != wd
            || d > MAX_K
            || experts != self.experts
            || !is_offsets(offsets, experts)
        {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[sorted, n], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (order, offsets) = (&inputs[inputs.len() - 2].data, &inputs[inputs.len() - 1].data);
        let (n, d) = (inputs[2].dims()[1], inputs[2].dims()[2]);
        let mut y = Vec::with_capacity(order.len() * n);
        for (r, &slot) in order.iter().enumerate() {
            let e = expert_of(offsets, r);
            let row = if self.gather { slot as usize / self.k } else { r };
            for j in 0..n {
                let (x, w) = (&inputs[0].data[row * d..][..d], &inputs[2].data[(e * n + j) * d..][..d]);
                let sum: f64 = x.iter().zip(w).map(|(a, b)| a * b).sum();
                let bias = if self.bias { inputs[4].data[e * n + j] } else { 0.0 };
                let z = sum * inputs[1].data[row] * inputs[3].data[e * n + j] + bias;
                y.push(if self.relu { z.max(0.0) } else { z });
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const F32: &[DType] = &[DType::F32];
        const KERNELS: &[Kernel] = &[Kernel::cpu("grouped_matmul_int8_fwd", F32, cpu::grouped_matmul_int8), plan::INT8];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [rows, n] = [0, 1].map(|axis| outputs[0].dims()[axis]);
        params(rows, n, inputs[0].dims()[1], self.k, self.gather, self.experts).flag(self.relu).flag(self.bias)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let used = self.experts.min(outputs[0].dims()[0]) as f64 / self.experts.max(1) as f64;
        let moved = (inputs[0].bytes() + outputs[0].bytes()) as f64 + used * inputs[2].bytes() as f64;
        Cost { flops: 2.0 * outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes: moved }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for GroupedBackwardInput {
    fn name(&self) -> &'static str {
        "grouped_matmul_bwd_input"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "dz [rows, n], weight [E, n, d] of one float type, offsets u32 [E + 1]";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        let [dz, weight, offsets] = inputs else { return Err(refuse()) };
        match (dz.dims(), weight.dims()) {
            (&[rows, n], &[experts, wn, d])
                if n == wn
                    && experts == self.experts
                    && dz.dtype.is_float()
                    && weight.dtype == dz.dtype
                    && is_offsets(offsets, experts) =>
            {
                Ok(vec![Meta::new(&[rows, d], dz.dtype)?])
            }
            _ => Err(refuse()),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (rows, n, d) = (inputs[0].dims()[0], inputs[0].dims()[1], inputs[1].dims()[2]);
        let mut dx = vec![0.0; rows * d];
        for r in 0..rows {
            let e = expert_of(&inputs[2].data, r);
            for j in 0..n {
                for c in 0..d {
                    dx[r * d + c] += inputs[0].data[r * n + j] * inputs[1].data[(e * n + j) * d + c];
                }
            }
        }
        vec![dx]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("grouped_matmul_bwd_input", DType::FLOATS, cpu::grouped_backward_input),
            groups::INPUT_WIDE,
            groups::INPUT_NARROW,
            plan::BACKWARD_INPUT_TENSOR,
            plan::BACKWARD_INPUT_TENSOR_SMALL,
            plan::BACKWARD_INPUT,
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        params(outputs[0].dims()[0], inputs[0].dims()[1], outputs[0].dims()[1], 1, false, self.experts)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 2.0 * outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for GroupedBackwardWeight {
    fn name(&self) -> &'static str {
        "grouped_matmul_bwd_weight"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "dz [m k, n], x [m or m k, d] of one float type, order u32 [m k], offsets u32 [E + 1]";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        let [dz, x, order, offsets] = inputs else { return Err(refuse()) };
        let (&[sorted, n], &[rows, d]) = (dz.dims(), x.dims()) else { return Err(refuse()) };
        let types = dz.dtype.is_float() && x.dtype == dz.dtype;
        if !types || sorted_rows(order, rows, self.k, self.gather) != Some(sorted) || !is_offsets(offsets, self.experts)
        {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[self.experts, n, d], x.dtype)?, Meta::new(&[self.experts, n], x.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (n, d) = (inputs[0].dims()[1], inputs[1].dims()[1]);
        let (mut dw, mut db) = (vec![0.0; self.experts * n * d], vec![0.0; self.experts * n]);
        for (r, &slot) in inputs[2].data.iter().enumerate() {
            let e = expert_of(&inputs[3].data, r);
            let row = if self.gather { slot as usize / self.k } else { r };
            for j in 0..n {
                let dz = inputs[0].data[r * n + j];
                db[e * n + j] += dz;
                for c in 0..d {
                    dw[(e * n + j) * d + c] += dz * inputs[1].data[row * d + c];
                }
            }
        }
        vec![dw, db]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("grouped_matmul_bwd_weight", DType::FLOATS, cpu::grouped_backward_weight),
            groups::WEIGHT_WIDE,
            groups::WEIGHT_NARROW,
            plan::BACKWARD_WEIGHT_TENSOR,
            plan::BACKWARD_WEIGHT_TENSOR_SMALL,
            plan::BACKWARD_WEIGHT,
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [_, n, d] = [0, 1, 2].map(|axis| outputs[0].dims()[axis]);
        params(inputs[0].dims()[0], n, d, self.k, self.gather, self.experts)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 2.0 * inputs[0].count() as f64 * inputs[1].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// rows, n, d, k, gather, experts; then relu and bias where an op has them.
fn params(rows: usize, n: usize, d: usize, k: usize, gather: bool, experts: usize) -> Params {
    Params::new().u(rows).u(n).u(d).u(k).flag(gather).u(experts)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Widths that are multiples of eight take tensor tiles: one with few rows, two with several tiles each way.
    for (m, experts, k, n, d) in [
        (1, 1, 1, 1_usize, 1),
        (1, 8, 2, 5, 7),
        (3, 4, 4, 6, 5),
        (7, 5, 2, 16, 33),
        (9, 40, 2, 16, 24),
        (40, 6, 3, 17, 64),
        (130, 3, 1, 32, 31),
        (140, 2, 2, 136, 168),
        (150, 3, 2, 264, 392),
    ] {
        let (rows, route) = (m * k, routing(m, k, experts));
        let sorted = |case: Case| {
            case.input(&[rows], DType::U32, Fill::Values(route.order.clone())).input(
                &[experts + 1],
                DType::U32,
                Fill::Values(route.offsets.clone()),
            )
        };
        let all: &[DType] = if n.is_multiple_of(8) && n != 32 { DType::FLOATS } else { &[DType::F32] };
        for &dtype in all {
            for (gather, bias, relu) in
                [(true, true, true), (false, false, false), (false, true, false), (true, false, true)]
            {
                let op = GroupedMatmul { k, relu, bias, gather, experts };
                let case = Case::new(op, Tolerance::Contraction { k: d });
                let case = case.normal(&[if gather { m } else { rows }, d], dtype).normal(&[experts, n, d], dtype);
                let case = sorted(if bias { case.normal(&[experts, n], dtype) } else { case });
                // Differences must not cross ReLU's kink: only the smooth forms are differenced.
                cases.push(if dtype == DType::F32 && !relu && rows * n < 300 { case.grad() } else { case });
                if dtype != DType::F32 {
                    continue;
                }
                let op = GroupedMatmulInt8 { k, relu, bias, gather, experts };
                let narrow = || Fill::Integers { low: -127, high: 127 };
                let scales = || Fill::Uniform { low: 1e-3, high: 2e-2 };
                let x_rows = if gather { m } else { rows };
                let case = Case::new(op, Tolerance::Contraction { k: 4 })
                    .input(&[x_rows, d], DType::I8, narrow())
                    .input(&[x_rows], DType::F32, scales())
                    .input(&[experts, n, d], DType::I8, narrow())
                    .input(&[experts, n], DType::F32, scales());
                cases.push(sorted(if bias { case.normal(&[experts, n], DType::F32) } else { case }));
            }
            let op = GroupedBackwardInput { experts };
            let case = Case::new(op, Tolerance::Contraction { k: n }).normal(&[rows, n], dtype);
            let offsets = Fill::Values(route.offsets.clone());
            cases.push(case.normal(&[experts, n, d], dtype).input(&[experts + 1], DType::U32, offsets));
            for gather in [false, true] {
                let op = GroupedBackwardWeight { k, gather, experts };
                let case = Case::new(op, Tolerance::Contraction { k: rows }).normal(&[rows, n], dtype);
                cases.push(sorted(case.normal(&[if gather { m } else { rows }, d], dtype)));
            }
        }
    }
    // The first matrix of GPT-2 small's FFN as 96 experts of 32, a quarter of them chosen, over one token and over 64.
    for m in [1, 64] {
        let (k, experts) = (24, 96);
        let route = routing(m, k, experts);
        let op = GroupedMatmul { k, relu: true, bias: true, gather: true, experts };
        let case = Case::new(op, Tolerance::Contraction { k: 768 }).normal(&[m, 768], DType::F32);
        let case = case.normal(&[experts, 32, 768], DType::F32).normal(&[experts, 32], DType::F32);
        let case = case.input(&[m * k], DType::U32, Fill::Values(route.order));
        cases.push(case.input(&[experts + 1], DType::U32, Fill::Values(route.offsets)).bench());
    }
    cases
}
