//! 2:4 masks on the weights as they are now, then recovery under them.

use super::{Student, linears, recover, text};
use crate::compress::sparsify::prunable;
use crate::compress::teacher::TeacherCache;
use crate::error::Result;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{Mask, Sparsify};

pub fn run(flow: &mut Flow, settings: &Sparsify, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "sparsify"];
    flow.stage("sparsify", &parts, false, |context| {
        let model = student.model.duplicate()?;
        let sparse = prunable(&model, &linears(&model.config, &settings.linears));
        let state = State { sparse, two_dimensional: settings.mask == Mask::TwoDimensional, ..student.state.clone() };
        recover(context, (model, state), &settings.training, &settings.distil, cache, 2)
    })
}
