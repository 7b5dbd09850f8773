//! Embedding lookup and its gradient. Tables larger than one storage binding are split into windows of rows by the plan.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "embed", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("embed");
const BLOCK: u32 = 64;
/// Elements of a row that one invocation handles.
const CHUNK: usize = 4;
/// Alignment of a window's start that every adapter takes.
const ALIGNMENT: usize = 256;

/// y[i] = table[ids[i]]: table `[V, D]`, ids u32 `[..]` to `[.., D]`. An id of V or more gives a row of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embed;

/// dtable[r] = sum of dy[i] over the i with ids[i] = r, in the order of i, accumulated in f32: dy `[.., D]`, ids u32
/// `[..]` to `[rows, D]`. Ids of `rows` or more count nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbedBackward {
    pub rows: usize,
}

impl Op for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let broken = |rule| Error::Shape { op: "embed", rule, got: shape::list(inputs) };
        let [table, ids] = inputs else { return Err(broken("inputs table and ids")) };
        if !table.dtype.is_float() || ids.dtype != DType::U32 {
            return Err(Error::Dtype { op: "embed", expected: "a float table and u32 ids", got: shape::list(inputs) });
        }
        let &[rows, dim] = table.dims() else { return Err(broken("table [V, D]")) };
        if rows == 0 || dim == 0 {
            return Err(broken("V and D at least 1"));
        }
        Ok(vec![Meta::new(&[ids.dims(), &[dim]].concat(), table.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (rows, dim) = (inputs[0].dims()[0], inputs[0].dims()[1]);
        let row = |id: f64| {
            let id = id as usize;
            if id < rows { inputs[0].data[id * dim..(id + 1) * dim].to_vec() } else { vec![0.0; dim] }
        };
        vec![inputs[1].data.iter().flat_map(|&id| row(id)).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("embed_fwd", DType::FLOATS, cpu::embed), wgsl("embed_fwd", fits_forward, forward)];
        KERNELS
    }

    /// Tokens, D, V.
    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let dims = inputs[0].dims();
        Params::new().u(inputs[1].count()).u(dims[1]).u(dims[0])
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let rows = g.input_metas[0].dims()[0];
        Ok(vec![Some(g.one(&EmbedBackward { rows }, &[g.grad(0)?, g.input(1)?])?), None])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: (inputs[1].bytes() + 2 * outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for EmbedBackward {
    fn name(&self) -> &'static str {
        "embed_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let broken = |rule| Error::Shape { op: "embed_bwd", rule, got: shape::list(inputs) };
        let [dy, ids] = inputs else { return Err(broken("inputs dy and ids")) };
        if !dy.dtype.is_float() || ids.dtype != DType::U32 {
            return Err(Error::Dtype { op: "embed_bwd", expected: "a float dy and u32 ids", got: shape::list(inputs) });
        }
        match dy.dims().split_last() {
            Some((&dim, leading)) if leading == ids.dims() && dim > 0 && self.rows > 0 => {
                Ok(vec![Meta::new(&[self.rows, dim], dy.dtype)?])
            }
            _ => Err(broken("dy [.., D] with ids [..], D and rows at least 1")),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let dim = inputs[0].shape.last();
        let mut table = vec![0.0; self.rows * dim];
        for (dy, &id) in inputs[0].data.chunks(dim).zip(&inputs[1].data) {
            if (id as usize) < self.rows {
                for (sum, dy) in table[id as usize * dim..][..dim].iter_mut().zip(dy) {
                    *sum += dy;
                }
            }
        }
        vec![table]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("embed_bwd", DType::FLOATS, cpu::embed_backward),
            wgsl("embed_bwd_zero", fits_backward, backward),
        ];
        KERNELS
    }

    /// Tokens, D, rows.
    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let dims = outputs[0].dims();
        Params::new().u(inputs[1].count()).u(dims[1]).u(dims[0])
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = (inputs[0].bytes() + inputs[1].bytes() + outputs[0].bytes()) as f64;
        Cost { flops: inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(entry: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: DType::FLOATS, fits, plan }
}

/// Ranges of the table's rows that each fit one binding and start aligned; empty where a single step does not fit.
fn windows(table: &Meta, limit: u64) -> Vec<(usize, usize)> {
    let rows = table.dims()[0];
    let row_bytes = table.shape.last() * table.dtype.size();
    if table.bytes() as u64 <= limit {
        return vec![(0, rows)];
    }
    // The fewest rows whose bytes are a multiple of the alignment.
    let step = ALIGNMENT >> row_bytes.trailing_zeros().min(ALIGNMENT.trailing_zeros());
    let most = (limit / row_bytes as u64) as usize / step * step;
    if most == 0 {
        return Vec::new();
    }
    (0..rows).step_by(most).map(|first| (first, rows.min(first + most))).collect()
}

/// The window of argument `argument` for rows `first..last`.
fn window(launch: Launch, argument: usize, table: &Meta, (first, last): (usize, usize)) -> Launch {
    let row_bytes = table.shape.last() * table.dtype.size();
    if first == 0 && last == table.dims()[0] {
        return launch;
    }
    launch.window(argument, first * row_bytes, (last - first) * row_bytes)
}

/// The op's parameter block, the bound rows and the tokens of one launch.
fn params(p: &Problem, (first, last): (usize, usize), (begin, end): (usize, usize)) -> Params {
    p.params().u(first).u(last).u(begin).u(end)
}

fn fits_forward(p: &Problem) -> bool {
    let limit = p.info.limits.binding_bytes;
    p.outputs[0].bytes() as u64 <= limit && !windows(&p.inputs[0], limit).is_empty()
}

fn forward(p: &Problem) -> Plan {
    let table = &p.inputs[0];
    let tokens = p.inputs[1].count();
    let items = tokens * table.shape.last().div_ceil(CHUNK);
    let launch = |&(first, last): &(usize, usize)| {
        let launch = Launch::linear(items, BLOCK, params(p, (first, last), (0, tokens))).trips(CHUNK + 1);
        window(launch, 0, table, (first, last))
    };
    Plan::sequence(windows(table, p.info.limits.binding_bytes).iter().map(launch).collect())
}

/// Ranges of tokens whose chains of equal ids stay within the loop budget.
fn token_ranges(p: &Problem) -> Vec<(usize, usize)> {
    let tokens = p.inputs[1].count();
    let most = p.info.limits.loop_budget.map_or(tokens, |budget| budget.saturating_sub(16) as usize).max(1);
    (0..tokens).step_by(most).map(|first| (first, tokens.min(first + most))).collect()
}

fn fits_backward(p: &Problem) -> bool {
    let limit = p.info.limits.binding_bytes;
    // Sums over several ranges of tokens meet in the table itself, which must then hold f32.
    let exact = p.element == DType::F32 || token_ranges(p).len() <= 1;
    exact && p.inputs.iter().all(|m| m.bytes() as u64 <= limit) && !windows(&p.outputs[0], limit).is_empty()
}

fn backward(p: &Problem) -> Plan {
    const DY: usize = 0;
    const IDS: usize = 1;
    const TABLE: usize = 2;
    const LINKS: usize = 3;
    let table = &p.outputs[0];
    let (tokens, dim) = (p.inputs[1].count(), table.shape.last());
    let windows = windows(table, p.info.limits.binding_bytes);
    let mut launches: Vec<Launch> = Vec::new();
    for &(first, last) in &windows {
        let items = ((last - first) * dim).div_ceil(CHUNK);
        let launch =
            Launch::linear(items, BLOCK, params(p, (first, last), (0, tokens))).trips(CHUNK + 1).slots(&[TABLE]);
        launches.push(window(launch, TABLE, table, (first, last)));
    }
    for (begin, end) in token_ranges(p) {
        let links = Launch::linear(end - begin, BLOCK, params(p, (0, 0), (begin, end))).entry("embed_bwd_links");
        launches.push(links.trips(end - begin + 4).slots(&[IDS, LINKS]));
        for &rows in &windows {
            let items = (end - begin) * dim.div_ceil(CHUNK);
            let sum = Launch::linear(items, BLOCK, params(p, rows, (begin, end)))
                .entry("embed_bwd_sum")
                .trips(end - begin + 8);
            launches.push(window(sum.slots(&[DY, IDS, LINKS, TABLE]), TABLE, table, rows));
        }
    }
    Plan::sequence(launches).scratch(tokens.max(1) * 4)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Ids reach one beyond the table.
    let ids = |rows: usize| Fill::Integers { low: 0, high: rows as i64 };
    let mut both = |rows: usize, dim: usize, tokens: &[usize], dtype: DType| {
        let n = tokens.iter().product();
        let case = Case::new(Embed, Tolerance::Exact).normal(&[rows, dim], dtype).input(tokens, DType::U32, ids(rows));
        cases.push(if rows * dim < 300 && dtype == DType::F32 { case.grad() } else { case });
        let case = Case::new(EmbedBackward { rows }, Tolerance::Contraction { k: n });
        cases.push(case.normal(&[tokens, &[dim]].concat(), dtype).input(tokens, DType::U32, ids(rows)));
    };
    for &dtype in DType::FLOATS {
        both(1, 1, &[1], dtype);
        both(5, 3, &[7], dtype);
        both(11, 13, &[3, 5], dtype);
        both(64, 64, &[2, 33], dtype);
        both(7, 5, &[2, 3, 5, 7], dtype);
        // Few ids over many tokens: long chains. Many ids over few: mostly zeros.
        both(2, 9, &[257], dtype);
        both(1009, 17, &[6], dtype);
    }
    // A small bilingual vocabulary over a batch of 8 x 128 tokens.
    for &dtype in DType::FLOATS {
        let ids = Fill::Integers { low: 0, high: 4095 };
        let case = Case::new(Embed, Tolerance::Exact).normal(&[4096, 256], dtype);
        cases.push(case.input(&[8, 128], DType::U32, ids.clone()).bench());
        let case = Case::new(EmbedBackward { rows: 4096 }, Tolerance::Contraction { k: 16 });
        cases.push(case.normal(&[8, 128, 256], dtype).input(&[8, 128], DType::U32, ids).bench());
    }
    cases
}

#[cfg(test)]
mod tests;
