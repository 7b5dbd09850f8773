//! Quantization-aware training of every linear.

use super::{Student, linears, recover, text};
use crate::compress::teacher::TeacherCache;
use crate::error::Result;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::Quantize;

pub fn run(flow: &mut Flow, settings: &Quantize, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "quantize"];
    flow.stage("quantize", &parts, false, |context| {
        let model = student.model.duplicate()?;
        let state = State { int8: linears(&model.config, &[]), ..student.state.clone() };
        recover(context, (model, state), &settings.training, &settings.distil, cache, 3)
    })
}
