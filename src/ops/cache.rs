//! Key-value cache: new rows written in place into a larger table.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::shape::{self, Meta, Shape};

pub static FAMILY: Family = Family { name: "cache", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("cache");
const BLOCK: u32 = 64;

/// table[ids[i], :] = rows[i, :] in place; inputs table `[N, D]`, rows `[M, D]`, ids u32 `[M]`. Ids are distinct (the
/// caller's duty: two rows with one id would race on a GPU); ids outside the table write nothing.
#[derive(Clone, Copy, Debug)]
pub struct WriteRows;

impl Op for WriteRows {
    fn name(&self) -> &'static str {
        "write_rows"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "table [N, D], rows [M, D] of its float type, ids u32 [M]";
        match inputs {
            [table, rows, ids]
                if table.shape.rank() == 2
                    && rows.shape.rank() == 2
                    && table.shape.last() == rows.shape.last()
                    && table.dtype == rows.dtype
                    && table.dtype.is_float()
                    && ids.dtype == DType::U32
                    && ids.dims() == [rows.dims()[0]] =>
            {
                Ok(vec![*table])
            }
            _ => Err(Error::Shape { op: "write_rows", rule, got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (mut table, d) = (inputs[0].data.clone(), inputs[0].dims()[1]);
        for (row, id) in inputs[2].data.iter().enumerate() {
            let start = *id as usize * d;
            if start + d <= table.len() {
                table[start..start + d].copy_from_slice(&inputs[1].data[row * d..(row + 1) * d]);
            }
        }
        vec![table]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const CODE: Code = Code::Gpu { source: SOURCE, entry: "write_rows", constants: &[] };
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("write_rows", DType::FLOATS, cpu::write_rows),
            Kernel { name: "write_rows", code: CODE, dtypes: DType::FLOATS, fits: always, plan },
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[1].count()).u(inputs[0].dims()[1]).u(inputs[0].dims()[0])
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: (2 * inputs[1].bytes() + inputs[2].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn plan(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.inputs[1].count(), BLOCK, p.params()))
}

/// Distinct ids below 40 in a scattered order, every fifth of them outside the table.
fn distinct(seed: u64, shape: &Shape) -> Vec<f64> {
    let id = |i: u64| if i % 5 == 4 { 1e6 + i as f64 } else { ((i * 7 + seed) % 40) as f64 };
    (0..shape.count() as u64).map(id).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::FLOATS {
        for (m, d) in [(1, 1), (3, 7), (16, 64), (39, 33)] {
            let case = Case::new(WriteRows, Tolerance::Exact).normal(&[40, d], dtype).normal(&[m, d], dtype);
            cases.push(case.input(&[m], DType::U32, Fill::Custom(distinct)));
        }
    }
    // One token of 32 sequences into caches of 512, 12 heads of 64.
    let ids: Vec<f64> = (0..32).map(|b| f64::from(b * 512 + 17 * b)).collect();
    let case = Case::new(WriteRows, Tolerance::Exact).normal(&[32 * 512 + 528, 768], DType::F32);
    cases.push(case.normal(&[32, 768], DType::F32).input(&[32], DType::U32, Fill::Values(ids)).bench());
    cases
}
