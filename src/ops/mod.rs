//! The op table: one line per family.

use crate::op::Family;

pub mod norm;
pub mod unary;

/// Every op family; verification, gradient checks, benches, the support table and the docs are loops over it.
pub static FAMILIES: &[&Family] = &[&norm::FAMILY, &unary::FAMILY];
