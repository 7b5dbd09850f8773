//! The order of the stages: the one that compression systems agree on, or the recipe's, where it can hold.

use serde::{Deserialize, Serialize};

use super::schema::Recipe;
use crate::compress::pruning::Pattern;
use crate::error::{Error, Result};

/// A stage after the teacher's training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Structure,
    Sparsify,
    Quantize,
    Experts,
    Hybrid,
    Tune,
}

/// Shapes first, then masks on the new shapes, the grid on the masked weights, experts of the final weights, and tuning
/// under all of these promises.
const USUAL: [Step; 6] = [Step::Structure, Step::Sparsify, Step::Quantize, Step::Experts, Step::Hybrid, Step::Tune];

/// Pairs whose first may not run before its second. All other orders hold: masks and int8 grids are kept by hooks in
/// whatever comes later, structured pruning carries a grid's promise over to the smaller tensors, and the stages after
/// hybrid tuning listen to the tuned teacher.
const IMPOSSIBLE: [(Step, Step, &str); 4] = [
    (
        Step::Sparsify,
        Step::Structure,
        "removing channels and neurons breaks up the masks' groups, so they would be lost (layers and heads may go)",
    ),
    (Step::Experts, Step::Structure, "structured pruning needs dense FFNs"),
    (Step::Experts, Step::Sparsify, "routers are trained for the final weights, which a mask changes"),
    (Step::Experts, Step::Quantize, "routers are trained for the final weights, which a grid changes"),
];

impl Step {
    pub fn name(self) -> &'static str {
        match self {
            Step::Structure => "structure",
            Step::Sparsify => "sparsify",
            Step::Quantize => "quantize",
            Step::Experts => "experts",
            Step::Hybrid => "hybrid",
            Step::Tune => "tune",
        }
    }

    /// Whether the recipe has a section for it.
    fn asked_for(self, recipe: &Recipe) -> bool {
        match self {
            Step::Structure => recipe.structure.is_some(),
            Step::Sparsify => recipe.sparsify.is_some(),
            Step::Quantize => recipe.quantize.is_some(),
            Step::Experts => recipe.experts.is_some(),
            Step::Hybrid => recipe.hybrid.is_some(),
            Step::Tune => recipe.tune.is_some(),
        }
    }
}

impl Recipe {
    /// The stages after the teacher, in their order.
    pub fn steps(&self) -> Vec<Step> {
        match &self.order {
            Some(order) => order.clone(),
            None => USUAL.into_iter().filter(|step| step.asked_for(self)).collect(),
        }
    }

    /// Whether structured pruning leaves the groups of masks whole: blocks and heads go, and each head has whole groups of four.
    fn moves_masks(&self) -> bool {
        let size = self.model.size();
        let whole = self.structure.as_ref().is_some_and(|s| {
            let width = size.heads * size.head_size;
            s.ffn.is_none() && s.head_size(size) == size.head_size && s.width(size) == width
        });
        whole && self.sparsify.as_ref().is_some_and(|s| !matches!(s.pattern, Pattern::Block { .. }))
    }

    pub(super) fn check_order(&self) -> Result<()> {
        let Some(order) = &self.order else {
            return Ok(());
        };
        let names: Vec<&str> = order.iter().map(|step| step.name()).collect();
        let refuse = |allowed: String| Err(Error::Recipe { key: "order".into(), value: format!("{names:?}"), allowed });
        for step in USUAL {
            let times = order.iter().filter(|s| **s == step).count();
            if times != usize::from(step.asked_for(self)) {
                let name = step.name();
                return refuse(format!("each stage that has a section once: {name} stands there {times} times"));
            }
        }
        let stays = self.tune.as_ref().is_some_and(|tune| !tune.merges());
        if stays && order.last() != Some(&Step::Tune) {
            return refuse("tune last: what it adds stays beside the weights, and only it would go on learning".into());
        }
        let place = |step: Step| order.iter().position(|s| *s == step);
        for (first, second, reason) in IMPOSSIBLE {
            if let (Some(a), Some(b)) = (place(first), place(second))
                && a < b
                && !(first == Step::Sparsify && second == Step::Structure && self.moves_masks())
            {
                return refuse(format!("{} before {}: {reason}", second.name(), first.name()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(order: &[&str], sets: &[&str]) -> Result<Recipe> {
        let sets = sets.iter().map(|s| s.to_string()).chain([format!("order={order:?}")]);
        Recipe::load(None, &sets.collect::<Vec<_>>())
    }

    #[test]
    fn without_an_order_the_sections_run_in_the_usual_one() {
        let recipe = Recipe::load(None, &["quantize=false".into()]).unwrap();
        assert_eq!(recipe.steps(), [Step::Structure, Step::Sparsify, Step::Experts, Step::Hybrid]);
        assert!(!recipe.to_toml().unwrap().lines().any(|line| line.starts_with("order")));
    }

    #[test]
    fn an_order_is_kept_and_survives_the_resolved_recipe() {
        let order = ["hybrid", "quantize", "structure", "sparsify", "experts"];
        let recipe = ordered(&order, &[]).unwrap();
        assert_eq!(recipe.steps().iter().map(|s| s.name()).collect::<Vec<_>>(), order);
        let text = recipe.to_toml().unwrap();
        assert_eq!(Recipe::parse(std::path::Path::new("again"), &text, &[]).unwrap(), recipe);
    }

    #[test]
    fn what_cannot_hold_is_refused_with_its_reason() {
        for (order, reason) in [
            (&["sparsify", "structure", "quantize", "experts", "hybrid"][..], "groups"),
            (&["experts", "structure", "sparsify", "quantize", "hybrid"], "dense FFNs"),
            (&["structure", "experts", "sparsify", "quantize", "hybrid"], "a mask changes"),
            (&["structure", "sparsify", "experts", "quantize", "hybrid"], "a grid changes"),
            (&["structure", "sparsify", "quantize", "experts"], "hybrid stands there 0 times"),
            (&["structure", "sparsify", "quantize", "quantize", "experts", "hybrid"], "quantize stands there 2 times"),
        ] {
            let message = ordered(order, &[]).unwrap_err().to_string();
            assert!(message.contains("order") && message.contains(reason), "{message}");
        }
        assert!(ordered(&["sparsify", "quantize"], &["structure=false", "experts=false", "hybrid=false"]).is_ok());
        assert!(ordered(&["sparsify", "quantize"], &["experts=false", "hybrid=false"]).is_err());
    }
}
