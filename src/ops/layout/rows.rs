//! Rows by index: gather and scatter-add.

use std::any::Any;

use super::{Block, WORDS, movable, wgsl, words};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params, Plan, Problem, spans};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

/// y[.., :] = table[ids[..], :]: table `[N, D]`, ids u32 `[..]` to `[.., D]`. An id of N or more gives a row of zeros.
#[derive(Clone, Copy, Debug)]
pub struct GatherRows;

/// y[r, :] = sum of the source rows i with ids[i] = r, added in the order of i: source `[.., D]` and one u32 id per
/// row of it to `[rows, D]`. An id of `rows` or more adds to nothing.
#[derive(Clone, Copy, Debug)]
pub struct ScatterAddRows {
    pub rows: usize,
}

/// Sources that are linked and summed in one go: their lists stay below the loop iterations that drivers cut.
const SOURCES: usize = 32_768;

fn row_of(ids: &Array, i: usize, rows: usize) -> Option<usize> {
    Some(ids.data[i] as usize).filter(|&row| row < rows)
}

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [table, ids] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "a table and ids", got: shape::list(inputs) });
        };
        if !movable(table.dtype) || ids.dtype != DType::U32 {
            let expected = "a table of floats or u32, and u32 ids";
            return Err(Error::Dtype { op: self.name(), expected, got: shape::list(inputs) });
        }
        let &[_, width] = table.dims() else {
            return Err(Error::Shape { op: self.name(), rule: "a table [N, D]", got: shape::list(inputs) });
        };
        let dims: Vec<usize> = ids.dims().iter().copied().chain([width]).collect();
        Ok(vec![Meta::new(&dims, table.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (table, ids) = (&inputs[0], &inputs[1]);
        let (rows, width) = (table.dims()[0], table.dims()[1]);
        let mut y = Vec::with_capacity(ids.data.len() * width);
        for i in 0..ids.data.len() {
            match row_of(ids, i, rows) {
                Some(row) => y.extend(&table.data[row * width..(row + 1) * width]),
                None => y.extend(std::iter::repeat_n(0.0, width)),
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("gather_rows", WORDS, cpu::gather_rows),
            wgsl("gather_rows", WORDS, rows_bindable, plan_gather),
        ];
        KERNELS
    }

    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        words(&inputs[0])
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].shape.last()).u(inputs[0].shape.rows())
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let rows = g.input_metas[0].shape.rows();
        Ok(vec![Some(g.one(&ScatterAddRows { rows }, &[g.grad(0)?, g.input(1)?])?), None])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: (inputs[1].bytes() + 2 * outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A table may be larger than a binding, all else not.
fn rows_bindable(p: &Problem) -> bool {
    p.inputs[1..].iter().chain(p.outputs).all(|m| m.bytes() as u64 <= p.info.limits.binding_bytes)
}

/// One launch per binding-sized part of the table; each writes the rows whose ids lie in its part.
fn plan_gather(p: &Problem) -> Plan {
    let (width, rows) = (p.inputs[0].shape.last(), p.inputs[0].shape.rows());
    let (count, row_bytes) = (p.outputs[0].count(), width * p.element.size());
    if rows == 0 {
        // Every id is outside the table: the one launch writes zeros and reads no row.
        return Plan::of(Block { count, width, flag: true, ..Block::default() }.launch(count));
    }
    let launches = spans(rows, row_bytes, p.info.limits.binding_bytes).map(|span| {
        let (base, stride, flag) = (span.start, span.len(), span.start == 0);
        let launch = Block { count, base, width, stride, rows, flag, ..Block::default() }.launch(count);
        match span.len() == rows {
            true => launch,
            false => launch.window(0, span.start * row_bytes, span.len() * row_bytes),
        }
    });
    Plan::sequence(launches.collect())
}

/// Source `[.., D]` and one u32 id per row.
fn source_width(op: &'static str, source: &Meta, ids: &Meta) -> Result<usize> {
    let got = || format!("{source} {ids}");
    if ids.dtype != DType::U32 {
        return Err(Error::Dtype { op, expected: "u32 ids", got: got() });
    }
    if source.shape.rank() == 0 || source.shape.rows() != ids.count() {
        return Err(Error::Shape { op, rule: "one id per row of the source", got: got() });
    }
    Ok(source.shape.last())
}

impl Op for ScatterAddRows {
    fn name(&self) -> &'static str {
        "scatter_add_rows"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [source, ids] if source.dtype.is_float() => {
                Ok(vec![Meta::new(&[self.rows, source_width(self.name(), source, ids)?], source.dtype)?])
            }
            _ => Err(Error::Shape { op: self.name(), rule: "a float source and ids", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (source, ids) = (&inputs[0], &inputs[1]);
        let width = source.shape.last();
        let mut y = vec![0.0; self.rows * width];
        for i in 0..ids.data.len() {
            if let Some(row) = row_of(ids, i, self.rows) {
                for column in 0..width {
                    y[row * width + column] += source.data[i * width + column];
                }
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("scatter_add_rows", DType::FLOATS, cpu::scatter_add_rows),
            wgsl("scatter_sum", DType::FLOATS, scatter_fits, plan_scatter),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].shape.last()).u(self.rows)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let rows = g.one(&GatherRows, &[g.grad(0)?, g.input(1)?])?;
        Ok(vec![Some(rows.reshape(g.input_metas[0].dims())?), None])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>();
        Cost { flops: inputs[0].count() as f64, bytes: bytes as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Between blocks of sources the sums wait in y, which only f32 storage leaves unrounded.
fn scatter_fits(p: &Problem) -> bool {
    let bound = p.inputs.iter().all(|m| m.bytes() as u64 <= p.info.limits.binding_bytes);
    bound && (p.element == DType::F32 || p.inputs[1].count() <= SOURCES)
}

/// Per block of sources: clear the lists, link them in index order, sum along each list.
fn plan_scatter(p: &Problem) -> Plan {
    let (width, rows) = (p.inputs[0].shape.last(), p.outputs[0].shape.rows());
    let (sources, row_bytes) = (p.inputs[1].count(), width * p.element.size());
    let block = Block { width, rows, ..Block::default() };
    let mut launches = Vec::new();
    // No source at all still writes the zeros.
    for base in (0..sources.max(1)).step_by(SOURCES) {
        let count = SOURCES.min(sources - base);
        launches.push(Block { count: rows, ..block }.launch(rows).entry("scatter_clear"));
        launches.push(Block { count, base, ..block }.launch(count.max(1)).entry("scatter_link").trips(count));
        for span in spans(rows, row_bytes, p.info.limits.binding_bytes) {
            let part = Block { count: span.len(), base, stride: count, offset: span.start, flag: base == 0, ..block };
            let launch = part.launch(span.len() * width.div_ceil(4)).entry("scatter_sum").trips(count);
            launches.push(match span.len() == rows {
                true => launch,
                false => launch.window(2, span.start * row_bytes, span.len() * row_bytes),
            });
        }
    }
    Plan::sequence(launches).scratch((rows + sources.min(SOURCES)) * 4)
}
