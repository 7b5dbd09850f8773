//! Gates in the forward pass.

use std::collections::BTreeMap;

use super::layout::{Layout, Level};
use crate::dispatch;
use crate::error::Result;
use crate::nn::{OutputHook, Pass, Place};
use crate::ops::gates::ScaleGroups;
use crate::ops::hard_concrete::{GateValue, HardConcrete};
use crate::ops::layout::Slice;
use crate::ops::select::Above;
use crate::tape::Var;
use crate::tensor::Tensor;

/// Where the values of gates come from.
#[derive(Clone)]
pub enum Phase {
    /// log alphas in the model: samples of this seed and the step u32 `[1]` where a pass records, the test-time value else.
    Learning { seed: u64, step: Tensor },
    /// Decided: values f32 of each gated level.
    Decided(BTreeMap<Level, Tensor>),
}

/// Multiplies what structures give by their gates.
pub struct Gates {
    pub layout: Layout,
    pub levels: Vec<Level>,
    pub phase: Phase,
}

/// Names of the values in a pass.
fn shared(level: Level) -> &'static str {
    match level {
        Level::Attention => "gates of attentions",
        Level::Ffn => Gates::FFNS,
        Level::Heads => "gates of heads",
        Level::Neurons => "gates of neurons",
        Level::Hidden => "gates of channels",
    }
}

impl Gates {
    /// What a pass calls the values of FFN gates, in the order of the blocks that have an FFN: other methods ask by it.
    pub const FFNS: &'static str = "gates of FFNs";

    /// Values of a level's gates f32 `[n]`, the same wherever the pass asks; `None` where the level has none.
    pub fn values(&self, pass: &mut Pass, level: Level) -> Result<Option<Var>> {
        if !self.levels.contains(&level) {
            return Ok(None);
        }
        let values = pass.shared(shared(level), |pass| match &self.phase {
            Phase::Decided(values) => {
                let missing = || crate::error::Error::file("gates", level.tensor(), "no decision for this level");
                Ok(Var::constant(values.get(&level).ok_or_else(missing)?.clone()))
            }
            Phase::Learning { seed, step } => {
                let log_alpha = pass.parameter(level.tensor())?;
                if !pass.tape.recording() {
                    return pass.tape.first(HardConcrete(GateValue::Test), &[&log_alpha]);
                }
                let sample = GateValue::Sample { seed: *seed, site: level.site() };
                pass.tape.first(HardConcrete(sample), &[&log_alpha, &Var::constant(step.clone())])
            }
        })?;
        Ok(Some(values))
    }

    /// The gates of a place: a level and which of its gates.
    fn of(&self, place: Place) -> Option<(Level, usize, usize)> {
        let attention = |block: usize, cross: bool| {
            self.layout.attentions.iter().position(|a| (a.block, a.cross) == (block, cross))
        };
        let ffn = |block: usize| self.layout.ffns.iter().position(|f| f.block == block);
        let heads = |block, cross| {
            let attention = &self.layout.attentions[attention(block, cross)?];
            Some((Level::Heads, attention.first, attention.heads))
        };
        match place {
            Place::Hidden => Some((Level::Hidden, 0, self.layout.width)),
            Place::Heads(block) => heads(block, false),
            Place::CrossHeads(block) => heads(block, true),
            Place::Attention(block) => Some((Level::Attention, attention(block, false)?, 1)),
            Place::Cross(block) => Some((Level::Attention, attention(block, true)?, 1)),
            Place::Ffn(block) => Some((Level::Ffn, ffn(block)?, 1)),
            Place::Neurons(block) => {
                let ffn = &self.layout.ffns[ffn(block)?];
                Some((Level::Neurons, ffn.first, ffn.neurons))
            }
        }
    }
}

impl OutputHook for Gates {
    fn on_structure(&self, pass: &mut Pass, place: Place, x: Var) -> Result<Var> {
        let Some((level, start, length)) = self.of(place) else {
            return Ok(x);
        };
        let Some(mut values) = self.values(pass, level)? else {
            return Ok(x);
        };
        if length < values.tensor.count() {
            values = pass.tape.first(Slice { axis: 0, start, length }, &[&values])?;
        }
        pass.tape.first(ScaleGroups, &[&x, &values])
    }

    fn channels(&self, pass: &mut Pass) -> Result<Option<Var>> {
        let Some(values) = self.values(pass, Level::Hidden)? else {
            return Ok(None);
        };
        let open = pass.shared("open channels", |_| {
            Ok(Var::constant(dispatch::run_one(&Above { threshold: 0.0 }, &[&values.tensor])?))
        })?;
        Ok(Some(open))
    }
}
