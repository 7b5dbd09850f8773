//! The flow: a recipe of stages from text to a compressed, measured model.

mod check;
pub mod contents;
pub mod corpus;
pub mod evaluate;
pub mod flow;
pub mod hooks;
mod identity;
pub mod import;
mod load;
mod lock;
pub mod order;
pub mod plan;
mod promises;
pub mod run_folder;
pub mod schema;
mod source;
mod spread;
pub mod staged;
mod stages;
pub mod tagger;

pub use flow::{Options, run};
pub use schema::Recipe;
