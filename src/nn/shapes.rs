//! Whether a set of named tensors is the model that a config describes, in any representation: what a loaded file must
//! satisfy before a forward pass may trust it.

use std::collections::BTreeMap;
use std::path::Path;

use super::config::{Block, Config};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::sparse_bitmap;
use crate::tensor::Tensor;

struct Checker<'a> {
    path: &'a Path,
    tensors: &'a BTreeMap<String, Tensor>,
}

impl Checker<'_> {
    fn refuse<T>(&self, name: &str, rule: String) -> Result<T> {
        Err(Error::file(self.path, name, rule))
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor of this name, type and shape.
    fn need(&self, name: &str, types: &[DType], dims: &[usize]) -> Result<()> {
        let Some(tensor) = self.tensors.get(name) else {
            return self.refuse(name, "is missing".into());
        };
        if tensor.dims() != dims || !types.contains(&tensor.dtype()) {
            let types: Vec<&str> = types.iter().map(|t| t.name()).collect();
            return self.refuse(name, format!("{} where {}{dims:?} is needed", tensor.meta(), types.join(" or ")));
        }
        Ok(())
    }

    /// Scales of output channels, or of groups of each channel's `k` weights.
    fn scales(&self, name: &str, channels: &[usize], k: usize) -> Result<()> {
        match self.tensors.get(name).map(Tensor::dims) {
            Some(dims) if dims.len() > channels.len() => {
                let groups = dims[dims.len() - 1];
                if groups == 0 || !k.is_multiple_of(groups) || !(k / groups).is_multiple_of(4) {
                    let rule = format!("needs a number of groups that divides {k} into multiples of 4");
                    return self.refuse(name, rule);
                }
                self.need(name, &[DType::F32], &[channels, &[groups]].concat())
            }
            _ => self.need(name, &[DType::F32], channels),
        }
    }

    /// What may stand beside a linear of `k` inputs in any representation.
    fn beside(&self, name: &str, k: usize) -> Result<()> {
        for (part, types, dims) in [("smooth", DType::FLOATS, [k]), ("input_step", &[DType::F32], [1])] {
            let name = format!("{name}.{part}");
            if self.has(&name) {
                self.need(&name, types, &dims)?;
            }
        }
        Ok(())
    }

    /// A linear `[n, k]` in one of its representations.
    fn linear(&self, name: &str, n: usize, k: usize) -> Result<()> {
        let part = |suffix: &str| format!("{name}.{suffix}");
        self.beside(name, k)?;
        self.need(&part("bias"), DType::FLOATS, &[n])?;
        if self.has(&part("weight")) {
            self.need(&part("weight"), DType::FLOATS, &[n, k])
        } else if self.has(&part("int8")) {
            self.need(&part("int8"), &[DType::I8], &[n, k])?;
            self.scales(&part("scale"), &[n], k)
        } else if self.has(&part("values")) {
            self.need(&part("metadata"), &[DType::U32], &[n, (k / 2).div_ceil(16)])?;
            if self.has(&part("scale")) {
                self.need(&part("scale"), &[DType::F32], &[n])?;
                self.need(&part("values"), &[DType::I8], &[n, k / 2])
            } else {
                self.need(&part("values"), DType::FLOATS, &[n, k / 2])
            }
        } else if let Some(kept) = self.tensors.get(&part("kept")) {
            let integers = self.has(&part("scale"));
            let (dtype, words) = if integers { (DType::I8, k / 4) } else { (DType::F32, k) };
            if kept.dtype() != dtype || kept.dims().len() != 1 || (integers && !k.is_multiple_of(4)) {
                return self.refuse(&part("kept"), format!("needs to be {} [words]", dtype.name()));
            }
            if integers {
                self.need(&part("scale"), &[DType::F32], &[n])?;
            }
            let lists = part("lists");
            self.need(&lists, &[DType::U32], &[words.div_ceil(sparse_bitmap::BLOCK), n, 3])?;
            let values = self.tensors.get(&lists).map(Tensor::to_vec::<u32>).transpose()?.unwrap_or_default();
            let count = kept.count() * dtype.size() / 4;
            sparse_bitmap::check_lists(&values, words, count).or_else(|rule| self.refuse(&lists, rule))
        } else if self.has(&part("int4")) {
            self.need(&part("int4"), &[DType::U32], &[n, k / 8])?;
            if self.tensors.get(&part("scale")).is_none_or(|t| t.dims().len() != 2) {
                return self.refuse(&part("scale"), format!("needs the extents [{n}, groups]"));
            }
            self.scales(&part("scale"), &[n], k)
        } else {
            self.refuse(&part("weight"), "is missing in every representation".into())
        }
    }

    fn experts(&self, prefix: &str, block: &Block, width: usize) -> Result<()> {
        let Some(experts) = block.experts else {
            return Ok(());
        };
        let (e, n) = (experts.count, block.ffn_width / experts.count.max(1));
        let name = |part: &str| format!("{prefix}.{part}");
        self.need(&name("experts.in.bias"), DType::FLOATS, &[e, n])?;
        self.need(&name("out.bias"), DType::FLOATS, &[width])?;
        for (part, rows, columns) in [("experts.in", n, width), ("experts.out", width, n)] {
            self.beside(&name(part), columns)?;
            let scale = name(&format!("{part}.scale"));
            if self.has(&name(&format!("{part}.weight"))) {
                self.need(&name(&format!("{part}.weight")), DType::FLOATS, &[e, rows, columns])?;
            } else if self.has(&name(&format!("{part}.int4"))) {
                self.need(&name(&format!("{part}.int4")), &[DType::U32], &[e, rows, columns / 8])?;
                self.scales(&scale, &[e, rows], columns)?;
            } else {
                self.need(&name(&format!("{part}.int8")), &[DType::I8], &[e, rows, columns])?;
                self.scales(&scale, &[e, rows], columns)?;
            }
        }
        self.router(prefix, e, width)
    }

    /// Of two layers (MLP), of one (similarity), or none (oracle).
    fn router(&self, prefix: &str, experts: usize, width: usize) -> Result<()> {
        let name = |part: &str| format!("{prefix}.router.{part}");
        let has = |part: &str| self.tensors.contains_key(&name(part));
        let parts = if has("centre.weight") {
            vec![("unit.weight", vec![width]), ("centre.weight", vec![experts, width]), ("centre.bias", vec![experts])]
        } else if has("in.weight") || has("out.weight") {
            // Its hidden layer may be wider than what is left of the experts.
            let hidden =
                self.tensors.get(&name("in.weight")).and_then(|t| t.dims().first().copied()).unwrap_or(experts);
            vec![
                ("in.weight", vec![hidden, width]),
                ("in.bias", vec![hidden]),
                ("out.weight", vec![experts, hidden]),
                ("out.bias", vec![experts]),
            ]
        } else {
            Vec::new()
        };
        for (part, dims) in parts {
            self.need(&name(part), DType::FLOATS, &dims)?;
        }
        Ok(())
    }
}

impl Config {
    /// Holds tensors against this config.
    ///
    /// # Errors
    /// `Error::File` naming `path`, the tensor and the shape it should have.
    pub fn check_tensors(&self, path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let checker = Checker { path, tensors };
        let linears = self.all_linears();
        let of_linear =
            |name: &str| linears.iter().any(|l| name.strip_prefix(l.as_str()).is_some_and(|r| r.starts_with('.')));
        for (name, dims) in self.parameters().into_iter().filter(|(name, _)| !of_linear(name)) {
            checker.need(&name, DType::FLOATS, &dims)?;
        }
        let d = self.width;
        for (i, block) in self.blocks.iter().enumerate() {
            let (inner, across) = (block.heads * block.head_size, block.heads_across() * block.head_size);
            let [query, key, value, output, ffn_in, ffn_out] = Self::linears(i);
            if block.attends() {
                for (name, n, k) in [(&query, inner, d), (&key, inner, d), (&value, inner, d), (&output, d, inner)] {
                    checker.linear(name, n, k)?;
                }
            }
            if let Some([query, key, value, output]) = &self.cross(i) {
                for (name, n, k) in [(query, across, d), (key, across, d), (value, across, d), (output, d, across)] {
                    checker.linear(name, n, k)?;
                }
            }
            if block.experts.is_some() {
                checker.experts(&format!("blocks.{i}.ffn"), block, d)?;
            } else if block.feeds() {
                checker.linear(&ffn_in, Self::ffn_rows(block), d)?;
                checker.linear(&ffn_out, d, block.ffn_width)?;
            }
        }
        Ok(())
    }
}
