//! The op table: one line per family.

use crate::op::Family;

pub mod attention;
pub mod binary;
pub mod cache;
pub mod ceiling;
pub mod distill;
pub mod embed;
pub mod ffn;
pub mod fisher;
pub mod gates;
mod groups;
pub mod hard_concrete;
pub mod large;
pub mod layout;
pub mod linear_loss;
pub mod matmul;
pub mod moe;
pub mod moe_gather;
mod moe_matmul;
pub mod norm;
pub mod optim;
pub mod quant;
pub mod quant_int4;
pub mod quant_int8;
pub mod quant_matmul;
mod quantize;
pub mod random;
pub mod reduce;
pub mod relation;
pub mod relative;
pub mod requantize;
pub mod rope;
mod rows;
pub mod select;
pub mod softmax;
pub mod sparse24;
mod sparse24_matmul;
mod sparse24_pack;
pub mod sparse_bitmap;
pub mod unary;
mod vector;

/// Every op family; verification, gradient checks, benches, the support table and the docs are loops over it.
#[rustfmt::skip] // one line each
pub static FAMILIES: &[&Family] = &[
    &attention::FAMILY,
    &binary::FAMILY,
    &cache::FAMILY,
    &ceiling::FAMILY,
    &embed::FAMILY,
    &layout::FAMILY,
    &distill::FAMILY,
    &linear_loss::FAMILY,
    &ffn::FAMILY,
    &fisher::FAMILY,
    &gates::FAMILY,
    &hard_concrete::FAMILY,
    &matmul::FAMILY,
    &moe::FAMILY,
    &moe_gather::FAMILY,
    &moe_matmul::FAMILY,
    &norm::FAMILY,
    &optim::FAMILY,
    &quant::FAMILY,
    &random::FAMILY,
    &reduce::FAMILY,
    &relative::FAMILY,
    &relation::FAMILY,
    &rope::FAMILY,
    &select::FAMILY,
    &softmax::FAMILY,
    &quant_int4::FAMILY,
    &quant_int8::FAMILY,
    &quant_matmul::FAMILY,
    &sparse24::FAMILY,
    &sparse24_matmul::FAMILY,
    &sparse_bitmap::FAMILY,
    &unary::FAMILY,
];
