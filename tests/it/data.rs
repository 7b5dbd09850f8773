//! Text data end to end: catalogs built by code, a made-up locale and package tree, malformed tables, the embedded set.

mod batches;
mod catalogs;
mod collection;
mod embedded;
mod mo;
mod tables;
