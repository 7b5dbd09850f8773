//! Measured times of sublayers by their sizes: what gates may be held to instead of parameters.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use crate::compress::structure::{Keep, KeepHeads, prune};
use crate::error::{Error, Result};
use crate::json;
use crate::nn::Model;

/// Milliseconds of one attention by its heads and of one FFN by its neurons, rising sizes, all blocks alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatencyTable {
    /// Where and of what it was measured.
    #[serde(default)]
    pub note: String,
    pub attention: Vec<(usize, f64)>,
    pub ffn: Vec<(usize, f64)>,
}

/// Sizes at which an FFN is measured.
const FFN_POINTS: usize = 8;

impl LatencyTable {
    /// A table from a file.
    ///
    /// # Errors
    /// `Io`, and `File` with the place of what is no table.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        json::read(path, &bytes)
    }

    /// Measures the first block's sublayers at rising sizes: the time of a model of that sublayer alone less that of one
    /// without any. `time` gives milliseconds of a model's forward pass.
    ///
    /// # Errors
    /// Those of [`prune`] and of `time`.
    pub fn measure(model: &Model, note: &str, time: impl Fn(&Model) -> Result<f64>) -> Result<Self> {
        let layout = Layout::of(&model.config)?;
        let empty = {
            let mut keep = Keep::all(&model.config);
            for block in &mut keep.blocks {
                (block.attention, block.cross, block.neurons) = (None, None, None);
            }
            keep
        };
        let nothing = time(&prune(model, &empty)?)?;
        let beyond = |keep: &Keep| -> Result<f64> { Ok((time(&prune(model, keep)?)? - nothing).max(0.0)) };
        let mut table = Self { note: note.into(), ..Self::default() };
        if let Some(a) = layout.attentions.iter().find(|a| !a.cross) {
            for heads in 1..=a.heads {
                let mut keep = empty.clone();
                let kept = KeepHeads::whole(&(0..heads).collect::<Vec<_>>(), a.head_size);
                keep.blocks[a.block].attention = Some(kept);
                table.attention.push((heads, beyond(&keep)?));
            }
        }
        if let Some(f) = layout.ffns.first() {
            let mut sizes: Vec<usize> = (1..=FFN_POINTS).map(|i| (i * f.neurons / FFN_POINTS).max(1)).collect();
            sizes.dedup();
            for neurons in sizes {
                let mut keep = empty.clone();
                keep.blocks[f.block].neurons = Some((0..neurons).collect());
                table.ffn.push((neurons, beyond(&keep)?));
            }
        }
        table.rising();
        Ok(table)
    }

    /// Noise does not make a larger sublayer the faster one: each time is at least that of the smaller size, and above 0.
    fn rising(&mut self) {
        for points in [&mut self.attention, &mut self.ffn] {
            let mut least = 1e-6;
            for (_, ms) in points {
                least = ms.max(least);
                *ms = least;
            }
        }
    }

    /// # Errors
    /// `Error::Parameter` for a table that does not reach a sublayer's size, is not in order, or is of blocks that differ.
    pub fn check(&self, layout: &Layout) -> Result<()> {
        let refuse = |parameter, value: String, allowed| {
            Err(Error::Parameter { op: "latency table", parameter, value, allowed })
        };
        let heads = layout.attentions.iter().map(|a| a.heads).max();
        let neurons = layout.ffns.iter().map(|f| f.neurons).max();
        for (name, points, most) in [("attention", &self.attention, heads), ("ffn", &self.ffn, neurons)] {
            let Some(most) = most else { continue };
            let times = points.iter().all(|(_, ms)| ms.is_finite() && *ms > 0.0);
            let order = points.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
            if points.is_empty() || !times || !order || points[0].0 == 0 {
                let allowed = "sizes from 1 on that rise, with finite times above 0 that do not fall";
                return refuse(name, format!("{points:?}"), allowed);
            }
            let last = points[points.len() - 1].0;
            if last != most {
                let value = format!("sizes up to {last} where a sublayer has {most}");
                return refuse(name, value, "times up to the size of the largest sublayer");
            }
        }
        Ok(())
    }
}
