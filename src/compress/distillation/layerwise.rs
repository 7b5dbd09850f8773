//! Distillation layer by layer: teachers run beside the student, in the same step, and whatever the matches name is
//! compared. Their states never leave the device.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::dynamic::{Dynamic, Matcher};
use super::logits::{LogitTerm, Logits, Taught};
use super::matches::{Direction, Feature, Match, MatchProjection, weighted};
use super::schedule::{Number, WeightSchedule};
use super::{add_projection, scaled, selection, total};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::tuning::DISTILLED;
use crate::nn::{Head, Heads, Model, Pass, Tap};
use crate::ops::binary::ADD;
use crate::ops::layout::Concat;
use crate::ops::matmul::Matmul;
use crate::ops::unary::{Function, Unary};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::Optimizer;

/// A teacher; logits of several are averaged by their weights (TextBrewer's MultiTeacher with equal ones).
#[derive(Clone)]
pub struct Tutor {
    pub model: Arc<Model>,
    pub weight: f32,
}

/// How the widths of one match meet.
#[derive(Clone)]
enum Meeting {
    Equal,
    /// 0/1 `[d_student, d_teacher]`.
    Kept(Tensor),
    /// By the parameter of this name.
    Learned(String, Option<Function>),
}

#[derive(Clone)]
struct Planned {
    settings: Match,
    teacher: Tap,
    student: Tap,
    meeting: Meeting,
    /// The schedule's, where there is one.
    factor: Option<Number>,
}

/// Matches of layers, and a loss on logits.
#[derive(Clone)]
pub struct LayerwiseDistillation {
    matches: Vec<Planned>,
    /// With the first teacher.
    dynamic: Option<Matcher>,
    logits: Option<LogitTerm>,
    tutors: Vec<Tutor>,
    /// Of all teachers side by side, `[V, sum of widths]`, and the average of their biases.
    head: Option<(Tensor, Option<Tensor>)>,
    /// Of the training.
    steps: u64,
}

/// What a layerwise distillation is made of.
pub struct Lessons<'a> {
    /// Without any, logits come from the cache of each micro-batch's largest.
    pub tutors: Vec<Tutor>,
    pub matches: &'a [Match],
    /// Layers of the first teacher that choose theirs anew in each step.
    pub dynamic: Option<&'a Dynamic>,
    pub logits: Option<Logits>,
    /// The first teacher's channels that the student kept, where they are known.
    pub kept: Option<&'a [usize]>,
    /// Steps of the training, which schedules go by.
    pub steps: u64,
    pub seed: u64,
}

fn refuse<T>(parameter: &'static str, value: String, allowed: &'static str) -> Result<T> {
    Err(Error::Parameter { op: "distillation", parameter, value, allowed })
}

impl LayerwiseDistillation {
    /// Learned projections become parameters of `student`, named `distil.INDEX.projection.weight`, until the training ends.
    ///
    /// # Errors
    /// `Parameter` for layers, losses, weights and temperatures that cannot be, widths that do not meet, teachers of
    /// another vocabulary.
    pub fn new(student: &mut Model, lessons: Lessons) -> Result<Self> {
        let Lessons { tutors, matches, dynamic, logits, kept, steps, seed } = lessons;
        if tutors.iter().any(|t| !(t.weight.is_finite() && t.weight > 0.0)) {
            return refuse("weight of a teacher", format!("{:?}", weights(&tutors)), "finite and above 0");
        }
        let mut planned = Vec::new();
        for (index, settings) in matches.iter().enumerate() {
            let Some(tutor) = tutors.get(settings.tutor) else {
                let value = format!("{} of {} teachers", settings.tutor, tutors.len());
                return refuse("tutor", value, "the number of a teacher, from 0");
            };
            let [teacher, own] = settings.taps(&tutor.model.config, &student.config)?;
            let kept = kept.filter(|_| settings.tutor == 0);
            let meeting = if settings.feature == Feature::Hidden {
                meeting(student, &tutor.model, (index, settings), kept, seed)?
            } else {
                Meeting::Equal
            };
            let factor = match settings.schedule {
                WeightSchedule::Constant => None,
                schedule => Some(Number::new(student.device(), schedule.factor(0, steps))?),
            };
            planned.push(Planned { settings: *settings, teacher, student: own, meeting, factor });
        }
        let dynamic = match (dynamic, tutors.first()) {
            (None, _) => None,
            (Some(dynamic), Some(tutor)) => Some(Matcher::new(student, &tutor.model, dynamic, seed)?),
            (Some(_), None) => return refuse("dynamic", "without a teacher".into(), "beside a teacher that runs"),
        };
        let like = student.tensors.values().next().cloned();
        let (logits, head) = match (logits, like) {
            (Some(logits), Some(like)) => {
                logits.check(tutors.is_empty())?;
                let head = if tutors.is_empty() { None } else { Some(heads(student, &tutors)?) };
                (Some(LogitTerm::new(logits, &like)?), head)
            }
            _ => (None, None),
        };
        let made = Self { matches: planned, dynamic, logits, tutors, head, steps };
        made.set(0)?;
        Ok(made)
    }

    /// Writes the numbers of the step after `done`.
    fn set(&self, done: u64) -> Result<()> {
        for planned in &self.matches {
            if let Some(factor) = &planned.factor {
                factor.set(planned.settings.schedule.factor(done, self.steps))?;
            }
        }
        self.logits.as_ref().map_or(Ok(()), |term| term.set(done, self.steps))
    }

    /// What the teachers compute of a micro-batch.
    fn taught(&self, pass: &Pass, micro: &Micro) -> Result<Vec<TutorStates>> {
        let mut all = Vec::with_capacity(self.tutors.len());
        for (index, tutor) in self.tutors.iter().enumerate() {
            let own = self.matches.iter().filter(|m| m.settings.tutor == index);
            let mut taps: Vec<Tap> = own.map(|m| m.teacher).collect();
            taps.extend(self.dynamic.iter().filter(|_| index == 0).flat_map(Matcher::teacher_taps));
            let mut states = TutorStates::default();
            if !taps.is_empty() || self.logits.is_some() {
                let mut other = Pass::inference(&tutor.model).computing(pass.computes()).tapping(taps.iter().copied());
                let last = other.hidden(&micro.batch)?;
                for tap in taps {
                    match tap {
                        Tap::Hidden(layer) => {
                            states.hidden.insert(layer, other.hidden_at(layer)?);
                        }
                        Tap::Attention(block) => {
                            states.heads.insert(block, other.heads_at(block)?);
                        }
                    }
                }
                states.last = Some(last);
            }
            all.push(states);
        }
        Ok(all)
    }

    fn match_loss(&self, pass: &mut Pass, planned: &Planned, taught: &TutorStates, micro: &Micro) -> Result<Var> {
        let settings = &planned.settings;
        let dims = micro.batch.tokens.dims();
        let weights = micro.teacher.as_ref().map_or(&micro.weights, |t| &t.hidden_weights);
        let weights = Var::constant(weights.reshape(dims)?);
        let missing =
            || Error::Shape { op: "distillation", rule: "what the teacher was asked for", got: "none".into() };
        let loss = match (planned.teacher, planned.student) {
            (Tap::Hidden(teacher), Tap::Hidden(student)) => {
                let student = pass.hidden_at(student)?;
                let teacher = taught.hidden.get(&teacher).ok_or_else(missing)?;
                let (student, teacher) = planned.meet(pass, student, teacher)?;
                settings.hidden_loss(pass, &student, &teacher, (&micro.batch, &weights))?
            }
            (Tap::Attention(teacher), Tap::Attention(student)) => {
                let student = pass.heads_at(student)?;
                let teacher = taught.heads.get(&teacher).ok_or_else(missing)?;
                settings.relation_loss(pass, &student, teacher, (&micro.batch, &weights))?
            }
            _ => return Err(missing()),
        };
        let factor = planned.factor.as_ref().map(|n| Var::constant(n.tensor().clone()));
        weighted(pass, &loss.reshape(&[1])?, settings.weight, factor.as_ref())
    }

    fn logit_loss(
        &self,
        pass: &mut Pass,
        term: &LogitTerm,
        (hidden, taught): (&Var, &[TutorStates]),
        micro: &Micro,
    ) -> Result<Var> {
        let shape = hidden.tensor.shape();
        let n = shape.rows();
        let rows = hidden.reshape(&[n, shape.last()])?;
        let missing = |rule| Error::Shape { op: "distillation", rule, got: "none".into() };
        let taught = match &self.head {
            Some((head, bias)) => {
                let total: f32 = self.tutors.iter().map(|t| t.weight).sum();
                let mut parts = Vec::new();
                for (tutor, states) in self.tutors.iter().zip(taught) {
                    let last = states.last.as_ref().ok_or_else(|| missing("a teacher's last hidden states"))?;
                    let last = last.reshape(&[n, last.tensor.shape().last()])?;
                    parts.push(scaled(pass, &last, tutor.weight / total)?);
                }
                Taught::Dense { hidden: side_by_side(pass, parts)?, head: head.clone(), bias: bias.clone() }
            }
            None => {
                let top = micro.teacher.as_ref().and_then(|t| t.top.clone());
                let top = top.ok_or_else(|| missing("the teacher's largest logits beside the micro-batch"))?;
                Taught::Top { slots: top.slots, values: top.values }
            }
        };
        let weights = micro.teacher.as_ref().map_or(&micro.weights, |t| &t.soft_weights);
        term.loss(pass, &rows, &taught, weights, &micro.targets)?.reshape(&[1])
    }
}

/// What a teacher computed.
#[derive(Default)]
struct TutorStates {
    hidden: BTreeMap<usize, Var>,
    heads: BTreeMap<usize, Heads>,
    last: Option<Var>,
}

fn weights(tutors: &[Tutor]) -> Vec<f32> {
    tutors.iter().map(|t| t.weight).collect()
}

/// Columns of all parts in a row.
fn side_by_side(pass: &mut Pass, parts: Vec<Var>) -> Result<Var> {
    let mut parts = parts.into_iter();
    let first = parts.next().ok_or(Error::Shape { op: "distillation", rule: "a teacher", got: "none".into() })?;
    parts.try_fold(first, |sum, part| pass.tape.first(Concat { axis: 1 }, &[&sum, &part]))
}

/// Heads of all teachers side by side: with their hidden states side by side, each times its share, the product is the
/// average of their logits.
fn heads(student: &Model, tutors: &[Tutor]) -> Result<(Tensor, Option<Tensor>)> {
    let rows = |model: &Model| -> Result<Tensor> {
        match model.config.head {
            Head::Language { tied: true } => model.get("embedding.tokens").cloned(),
            _ => model.get("head.weight").cloned(),
        }
    };
    let total: f32 = weights(tutors).iter().sum();
    let wanted = rows(student)?.dims()[0];
    let (mut all, mut bias): (Option<Tensor>, Option<Tensor>) = (None, None);
    for tutor in tutors {
        let head = rows(&tutor.model)?;
        if head.dims()[0] != wanted {
            let value = format!("{} where the student has {wanted}", head.dims()[0]);
            return refuse("vocabulary of a teacher", value, "the student's");
        }
        all = Some(match all {
            None => head,
            Some(left) => dispatch::run_one(&Concat { axis: 1 }, &[&left, &head])?,
        });
        if let Some(own) = tutor.model.tensors.get("head.bias") {
            let own = dispatch::run_one(&Unary(Function::Scale(tutor.weight / total)), &[own])?;
            bias = Some(match bias {
                None => own,
                Some(sum) => dispatch::run_one(&ADD, &[&sum, &own])?,
            });
        }
    }
    let head = all.ok_or(Error::Shape { op: "distillation", rule: "a teacher", got: "none".into() })?;
    Ok((head, bias))
}

fn meeting(
    student: &mut Model,
    teacher: &Model,
    (index, settings): (usize, &Match),
    kept: Option<&[usize]>,
    seed: u64,
) -> Result<Meeting> {
    let (own, other) = (student.config.width, teacher.config.width);
    // A pruned student's channels are those that it kept, also where nothing was pruned but their number says so.
    let known = kept.filter(|kept| kept.len() == own && kept.iter().all(|&c| c < other));
    let activation = match settings.projection {
        MatchProjection::Auto if own == other => return Ok(Meeting::Equal),
        MatchProjection::None if own == other => return Ok(Meeting::Equal),
        MatchProjection::None => {
            return refuse("projection", format!("none of {own} and {other} channels"), "none where widths are equal");
        }
        MatchProjection::Auto | MatchProjection::Kept if known.is_some() => {
            return selection(student, known.unwrap_or_default(), other).map(Meeting::Kept);
        }
        MatchProjection::Kept => {
            let allowed = "kept where the student's channels are known to be some of this teacher's";
            return refuse("projection", format!("kept of {own} and {other} channels"), allowed);
        }
        MatchProjection::Auto | MatchProjection::Linear => None,
        MatchProjection::Relu => Some(Function::Relu),
        MatchProjection::Tanh => Some(Function::Tanh),
    };
    let name = format!("{DISTILLED}{index}.projection.weight");
    let [to, from] = match settings.direction {
        Direction::StudentToTeacher => [other, own],
        Direction::TeacherToStudent => [own, other],
    };
    add_projection(student, &name, [to, from], (seed, 0xd157 + index as u32))?;
    Ok(Meeting::Learned(name, activation))
}

impl Planned {
    /// Student's and teacher's states in one width.
    fn meet(&self, pass: &mut Pass, student: Var, teacher: &Var) -> Result<(Var, Var)> {
        match &self.meeting {
            Meeting::Equal => Ok((student, teacher.clone())),
            Meeting::Kept(selection) => {
                let selection = pass.constant(selection)?;
                Ok((student, pass.tape.first(Matmul::linear(), &[teacher, &selection])?))
            }
            Meeting::Learned(name, activation) => {
                let weight = pass.parameter(name)?;
                let to_teacher = self.settings.direction == Direction::StudentToTeacher;
                let from = if to_teacher { &student } else { teacher };
                let mut projected = pass.tape.first(Matmul::linear(), &[from, &weight])?;
                if let Some(activation) = activation {
                    projected = pass.tape.first(Unary(*activation), &[&projected])?;
                }
                Ok(if to_teacher { (projected, teacher.clone()) } else { (student, projected) })
            }
        }
    }
}

impl Method for LayerwiseDistillation {
    fn name(&self) -> &'static str {
        "layerwise distillation"
    }

    fn taps(&self) -> Vec<Tap> {
        let dynamic = self.dynamic.iter().flat_map(Matcher::taps);
        self.matches.iter().map(|m| m.student).chain(dynamic).collect()
    }

    /// Terms in the unit of the rows' weights: dividing by the step's weight gives the mean however the step was split.
    fn on_loss(&self, pass: &mut Pass, hidden: &Var, micro: &Micro) -> Result<Option<Var>> {
        let taught = self.taught(pass, micro)?;
        let mut terms = Vec::new();
        for planned in self.matches.iter().filter(|m| m.settings.weight > 0.0) {
            terms.push(self.match_loss(pass, planned, &taught[planned.settings.tutor], micro)?);
        }
        if let (Some(matcher), Some(states)) = (&self.dynamic, taught.first()) {
            let missing =
                || Error::Shape { op: "distillation", rule: "what the teacher was asked for", got: "none".into() };
            let of = |layer: usize| states.hidden.get(&layer).cloned().ok_or_else(missing);
            let weights = micro.teacher.as_ref().map_or(&micro.weights, |t| &t.hidden_weights);
            terms.extend(matcher.loss(pass, of, weights)?);
        }
        if let Some(term) = &self.logits {
            terms.push(self.logit_loss(pass, term, (hidden, &taught), micro)?);
        }
        total(pass, terms)
    }

    fn on_update(&mut self, step: u64, _model: &Model, _optimizer: &mut Optimizer) -> Result<()> {
        self.set(step)
    }

    fn on_finish(&mut self, model: &mut Model) -> Result<()> {
        model.tensors.retain(|name, _| !name.starts_with(DISTILLED));
        Ok(())
    }
}
