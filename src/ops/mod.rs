//! The op table: one line per family.

use crate::op::Family;

pub mod matmul;
pub mod norm;
pub mod unary;

/// Every op family; verification, gradient checks, benches, the support table and the docs are loops over it.
pub static FAMILIES: &[&Family] = &[&matmul::FAMILY, &norm::FAMILY, &unary::FAMILY];
