//! The model that everything else is compressed from.

use super::{Objective, Student, fit, text, trained};
use crate::error::Result;
use crate::nn::Model;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::source::Draw;

pub fn run(flow: &mut Flow) -> Result<Student> {
    let (recipe, corpus, device) = (flow.recipe, flow.corpus, flow.device.clone());
    let parts = [text(&recipe.data)?, text(&recipe.model)?, text(&recipe.teacher)?, recipe.seed.to_string()];
    let parts: Vec<&str> = parts.iter().map(String::as_str).chain([corpus.tokenizer.hash(), &corpus.hash]).collect();
    flow.stage("teacher", &parts, false, |context| {
        let config = recipe.model.config(recipe.model.size(), corpus.tokenizer.vocabulary(), &corpus.labels);
        let mut model = Model::init(config, &device, recipe.seed)?;
        let draw = Draw::mixed(corpus, &recipe.teacher, recipe.seed, recipe.data.max_length)?;
        let objective = Objective { draw, gold: 1.0, soft_on_target: false, teacher: None };
        let summary = fit(context, &mut model, &State::default(), &recipe.teacher, objective)?;
        Ok(trained(context.name, model, State::default(), summary))
    })
}
