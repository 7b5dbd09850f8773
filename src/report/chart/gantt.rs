//! Who did what when in a step of a pipeline: one row per worker. A file of its own, not a part of the report's page.

use super::scale::{Scale, tick_text};
use super::svg::{Anchor, Rect, Svg};
use super::{FULL, NAMES};
use crate::pipeline::simulate::{Activity, Span};
use crate::pipeline::{Timeline, Work};
use crate::report::quantity::{milliseconds, percent};

const LEFT: f64 = NAMES / 2.0;
const HEAD: f64 = 66.0;
const FOOT: f64 = 40.0;
const ROW: f64 = 28.0;
const BAR: f64 = 22.0;
/// More rows than this are thinned out, more bars drawn as time slots: a picture has to open.
const ROWS: usize = 64;
const BARS: usize = 3000;
/// Narrower bars carry no text.
const TEXT: f64 = 26.0;

/// Kinds of work that have a colour: class, name, and whether it is theirs.
const KINDS: [(&str, &str); 7] = [
    ("forward", "forward"),
    ("backward", "backward"),
    ("input", "backward, inputs"),
    ("weight", "backward, weights"),
    ("message", "messages"),
    ("update", "reduction and update"),
    ("teacher", "the teacher's forward"),
];

/// The colours of the report's page, as far as this chart needs them, and those of the kinds of work.
const STYLE: &str = "\
:root{--paper:#fff;--ink:#1d221e;--muted:#667067;--line:#e4e4dd;--track:#f1f1eb;--forward:#2c7a51;--backward:#b9532f;\
--input:#c98a2b;--weight:#7a6bb0;--message:#8c958e;--update:#2f6f9f;--teacher:#2b8a94;--on-bar:#fff}\
@media (prefers-color-scheme:dark){:root{--paper:#191d1a;--ink:#e8ebe6;--muted:#9aa59c;--line:#2b312c;--track:#222723;\
--forward:#5cb584;--backward:#e0855f;--input:#e0b25f;--weight:#a99be0;--message:#717c74;--update:#6fb0e0;\
--teacher:#62c2cb;--on-bar:#121512}}\
text{font:13px ui-sans-serif,system-ui,sans-serif;fill:var(--ink)}.name,.panel{font-weight:550}\
.muted,.tick{fill:var(--muted);font-size:11.5px}.paper{fill:var(--paper)}.track{fill:var(--track)}\
.grid{stroke:var(--line)}.in-bar{font-size:10.5px;fill:var(--on-bar)}.forward{fill:var(--forward)}\
.backward{fill:var(--backward)}.input{fill:var(--input)}.weight{fill:var(--weight)}.message{fill:var(--message)}\
.update{fill:var(--update)}.teacher{fill:var(--teacher)}";

/// What is drawn: an event, or a slot of time named after the work that fills most of it.
struct Bar {
    kind: usize,
    start: f64,
    end: f64,
    /// The event's name; empty for a slot.
    name: String,
}

fn kind(activity: Activity) -> usize {
    match activity {
        Activity::Event(event) => match event.work {
            Work::Forward => 0,
            Work::Backward => 1,
            Work::BackwardInput => 2,
            Work::BackwardWeight => 3,
            _ => 4,
        },
        Activity::Update => 5,
        Activity::Teacher { .. } => 6,
    }
}

/// A simulated or measured step as an SVG file that follows the reader's light or dark theme. At most 64 rows and about
/// 3000 bars are drawn; the picture says what it left out.
pub fn gantt(timeline: &Timeline) -> String {
    let stages = timeline.spans.len();
    let every = stages.div_ceil(ROWS).max(1);
    let shown: Vec<usize> = (0..stages).step_by(every).collect();
    let events: usize = shown.iter().map(|&s| timeline.spans[s].len()).sum();
    let slots = (events > BARS).then(|| (BARS / shown.len().max(1)).max(16));
    let height = HEAD + shown.len() as f64 * ROW + FOOT;
    let title = format!(
        "{}: {} for a step, {} idle",
        timeline.name,
        milliseconds(timeline.seconds * 1e3),
        percent(timeline.idle_share())
    );
    let mut svg = Svg::new(FULL, height, &title);
    svg.rect("paper", Rect { x: 0.0, y: 0.0, width: FULL, height }, 0.0);
    svg.name("panel", (16.0, 24.0), FULL - 32.0, &title);
    key(&mut svg, timeline);

    let (unit, factor) = if timeline.seconds < 1.0 { ("ms", 1e3) } else { ("s", 1.0) };
    let x = Scale::exact(0.0, if timeline.seconds > 0.0 { timeline.seconds * factor } else { 1.0 }, LEFT, FULL - 16.0);
    let bottom = HEAD + shown.len() as f64 * ROW;
    for tick in x.ticks(10) {
        svg.line("grid", (x.at(tick), HEAD - 4.0), (x.at(tick), bottom));
        svg.text("tick", (x.at(tick), bottom + 14.0), Anchor::Middle, &tick_text(tick));
    }
    svg.text("tick", (LEFT - 8.0, bottom + 14.0), Anchor::End, unit);
    for (row, &stage) in shown.iter().enumerate() {
        let top = HEAD + row as f64 * ROW;
        let worker = timeline.workers.get(stage).map_or_else(String::new, ToString::to_string);
        svg.name("name", (16.0, top + 16.0), LEFT - 20.0, &worker);
        svg.rect("track", Rect { x: LEFT, y: top, width: FULL - 16.0 - LEFT, height: BAR }, 0.0);
        for bar in bars(timeline, stage, slots) {
            let (from, to) = (x.at(bar.start * factor), x.at(bar.end * factor));
            let (class, named) = KINDS[bar.kind];
            let what = if bar.name.is_empty() { format!("mostly {named}") } else { format!("{} {named}", bar.name) };
            let (start, length) = (milliseconds(bar.start * 1e3), milliseconds((bar.end - bar.start) * 1e3));
            let tooltip = format!("{worker}: {what}, from {start} for {length}");
            // A hair of ground between neighbours, where there is room for one.
            let gap = if to - from > 3.0 { 0.6 } else { 0.0 };
            svg.shade(class, Rect { x: from, y: top, width: to - from - gap, height: BAR }, 0.0, None, &tooltip);
            if to - from >= TEXT && !bar.name.is_empty() {
                svg.text("in-bar", ((from + to) / 2.0, top + 15.0), Anchor::Middle, &bar.name);
            }
        }
    }
    let mut notes = Vec::new();
    if every > 1 {
        notes.push(format!("every {every}th of {stages} rows is shown"));
    }
    if let Some(slots) = slots {
        let slot = milliseconds(timeline.seconds * 1e3 / slots as f64);
        notes.push(format!("{events} events drawn in slots of {slot}, coloured by the work that fills most of each"));
    }
    svg.text("muted", (16.0, height - 8.0), Anchor::Start, &notes.join("; "));
    svg.finish_file(STYLE)
}

/// Colours and names of the kinds that occur.
fn key(svg: &mut Svg, timeline: &Timeline) {
    let mut occurs = [false; KINDS.len()];
    timeline.spans.iter().flatten().for_each(|s| occurs[kind(s.activity)] = true);
    let mut left = 16.0;
    for ((class, name), _) in KINDS.iter().zip(occurs).filter(|(_, occurs)| *occurs) {
        svg.rect(class, Rect { x: left, y: 37.0, width: 11.0, height: 11.0 }, 2.0);
        svg.text("muted", (left + 16.0, 47.0), Anchor::Start, name);
        left += 40.0 + name.len() as f64 * 6.0;
    }
}

fn bars(timeline: &Timeline, stage: usize, slots: Option<usize>) -> Vec<Bar> {
    let spans = &timeline.spans[stage];
    let Some(slots) = slots else {
        let bar = |s: &Span| Bar { kind: kind(s.activity), start: s.start, end: s.end, name: s.activity.to_string() };
        return spans.iter().map(bar).collect();
    };
    let width = timeline.seconds / slots as f64;
    let mut filled = vec![[0.0; KINDS.len()]; slots];
    for span in spans {
        let slot = |time: f64| ((time / width) as usize).min(slots - 1);
        for at in slot(span.start)..=slot(span.end) {
            let inside = span.end.min((at + 1) as f64 * width) - span.start.max(at as f64 * width);
            filled[at][kind(span.activity)] += inside.max(0.0);
        }
    }
    let mut bars: Vec<Bar> = Vec::new();
    for (at, times) in filled.iter().enumerate() {
        let (kind, most) =
            times.iter().enumerate().fold((0, 0.0), |best, (k, t)| if *t > best.1 { (k, *t) } else { best });
        let busy: f64 = times.iter().sum();
        if most <= 0.0 || busy < width / 2.0 {
            continue;
        }
        let (start, end) = (at as f64 * width, (at + 1) as f64 * width);
        match bars.last_mut() {
            Some(last) if last.kind == kind && last.end >= start => last.end = end,
            _ => bars.push(Bar { kind, start, end, name: String::new() }),
        }
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{Costs, Kind, Schedule, simulate};

    fn timeline(kind: Kind, stages: usize, micros: usize) -> Timeline {
        let schedule = Schedule::new(kind, stages, micros).unwrap();
        simulate(&schedule, &Costs::uniform(schedule.chunks(), 0.01, 0.01, 0.01)).unwrap()
    }

    #[test]
    fn events_have_colour_name_and_time() {
        let text = gantt(&timeline(Kind::ZeroBubbleH1, 4, 8));
        for part in [
            "xmlns=\"http://www.w3.org/2000/svg\"",
            "prefers-color-scheme:dark",
            "stage 3: 3F0 forward, from 30.0 ms for 10.0 ms",
            "class=\"input\"",
            "class=\"weight\"",
            "zb-h1: ",
        ] {
            assert!(text.contains(part), "{part}");
        }
        assert_eq!(text.matches("<title>stage").count(), 4 * 8 * 3 + 4);
        assert!(!text.contains("class=\"update\"") && !text.contains("slots of"));
    }

    #[test]
    fn a_large_step_is_a_small_file_that_says_so() {
        let text = gantt(&timeline(Kind::OneForwardOneBackward, 200, 100));
        assert!(text.len() < 600_000, "{}", text.len());
        assert!(text.contains("every 4th of 200 rows") && text.contains("10000 events drawn in slots of"));
    }

    #[test]
    fn nothing_is_still_a_picture() {
        let nothing = Timeline {
            name: "<b>".into(),
            workers: Vec::new(),
            spans: vec![Vec::new()],
            stages: Vec::new(),
            seconds: 0.0,
        };
        let text = gantt(&nothing);
        assert!(text.starts_with("<svg") && !text.contains("<b>") && !text.contains("NaN"));
    }
}
