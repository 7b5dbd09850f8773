//! The few SVG elements the charts need. Text is cleaned and escaped here and nowhere else.

use std::fmt::Write;

use crate::report::plain::plain_text;

/// Where a text's anchor point lies.
#[derive(Debug, Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A rectangle by its upper left corner.
#[derive(Debug, Clone, Copy)]
pub struct Rect {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

#[derive(Debug)]
pub struct Svg {
    width: f64,
    height: f64,
    label: String,
    body: String,
}

impl Svg {
    /// An empty drawing in CSS pixels; `label` is read out to those who do not see it.
    pub fn new(width: f64, height: f64, label: &str) -> Self {
        Self { width, height, label: escape(label), body: String::new() }
    }

    pub fn rect(&mut self, class: &str, rect: Rect, radius: f64) {
        self.shade(class, rect, radius, None, "");
    }

    /// A rectangle of given opacity (0 to 1) with a tooltip.
    pub fn shade(&mut self, class: &str, rect: Rect, radius: f64, opacity: Option<f64>, tooltip: &str) {
        let Rect { x, y, width, height } = rect;
        // A bar of no length is no bar; NaN fails the comparison and draws nothing.
        if !(width > 0.0 && height > 0.0) {
            return;
        }
        let (x, y, width, height) = (coordinate(x), coordinate(y), coordinate(width), coordinate(height));
        self.push(format_args!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\""));
        if radius > 0.0 {
            self.push(format_args!(" rx=\"{}\"", coordinate(radius)));
        }
        if let Some(opacity) = opacity {
            self.push(format_args!(" fill-opacity=\"{:.3}\"", opacity.clamp(0.0, 1.0)));
        }
        if tooltip.is_empty() {
            self.push(format_args!("/>"));
        } else {
            self.push(format_args!("><title>{}</title></rect>", escape(tooltip)));
        }
    }

    pub fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(coordinate);
        self.push(format_args!("<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"));
    }

    /// A line through points, or with `closed` the outline of an area.
    pub fn path(&mut self, class: &str, points: &[(f64, f64)], closed: bool) {
        if points.is_empty() {
            return;
        }
        self.push(format_args!("<path class=\"{class}\" d=\""));
        for (index, &(x, y)) in points.iter().enumerate() {
            let step = if index == 0 { 'M' } else { 'L' };
            self.push(format_args!("{step}{} {}", coordinate(x), coordinate(y)));
        }
        self.push(format_args!("{}\"/>", if closed { "Z" } else { "" }));
    }

    pub fn dot(&mut self, class: &str, (x, y): (f64, f64), radius: f64, tooltip: &str) {
        let [x, y, radius] = [x, y, radius].map(coordinate);
        let tooltip = escape(tooltip);
        self.push(format_args!(
            "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"{radius}\"><title>{tooltip}</title></circle>"
        ));
    }

    /// Text with its baseline at `at`.
    pub fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let [x, y] = [at.0, at.1].map(coordinate);
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        self.push(format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>"));
    }

    /// A name cut to `width` pixels, whole in its tooltip; starts at `at`.
    pub fn name(&mut self, class: &str, at: (f64, f64), width: f64, name: &str) {
        let [x, y] = [at.0, at.1].map(coordinate);
        let (shown, whole) = (escape(&fit(&plain_text(name), width)), escape(name));
        self.push(format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{shown}<title>{whole}</title></text>"));
    }

    pub fn finish(self) -> String {
        self.element("", "")
    }

    /// A document of its own, with the classes' rules in it; `style` is a constant of the program, not escaped.
    pub fn finish_file(self, style: &'static str) -> String {
        self.element(" xmlns=\"http://www.w3.org/2000/svg\"", &format!("<style>{style}</style>")) + "\n"
    }

    fn element(self, namespace: &str, style: &str) -> String {
        let Self { width, height, label, body } = self;
        format!(
            "<svg{namespace} role=\"img\" aria-label=\"{label}\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\">{style}{body}</svg>"
        )
    }

    fn push(&mut self, text: std::fmt::Arguments) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(text);
    }
}

/// One decimal is a tenth of a pixel. What is not finite becomes 0 rather than a broken document.
fn coordinate(value: f64) -> f64 {
    if value.is_finite() { (value * 10.0).round() / 10.0 } else { 0.0 }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in plain_text(text).chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

/// Without font metrics: at 13 px a Latin letter is about 6.7 pixels wide, a full-width character 13.
fn fit(text: &str, width: f64) -> String {
    let size = |c: char| if c < '\u{1100}' { 6.7 } else { 13.0 };
    if text.chars().map(size).sum::<f64>() <= width {
        return text.to_string();
    }
    let mut used = 6.7;
    let mut out: String = text
        .chars()
        .take_while(|&c| {
            used += size(c);
            used <= width
        })
        .collect();
    out.push('…');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_becomes_mark_up() {
        let mut svg = Svg::new(10.0, 10.0, "a\"><script>");
        svg.text("t", (1.0, 1.0), Anchor::Start, "</text><script>alert(1)</script>\u{202e}");
        svg.name("t", (1.0, 1.0), 50.0, "<img onerror='x'>");
        svg.dot("d", (1.0, 1.0), 2.0, "<b>");
        let text = svg.finish();
        assert!(!text.contains("<script") && !text.contains("<img") && !text.contains("<b>"), "{text}");
        assert!(!text.contains('\u{202e}') && text.contains("aria-label=\"a&quot;&gt;&lt;script&gt;\""));
    }

    #[test]
    fn numbers_that_are_not_finite_stay_out_of_the_document() {
        let mut svg = Svg::new(10.0, 10.0, "");
        svg.rect("r", Rect { x: 0.0, y: 0.0, width: f64::NAN, height: 1.0 }, 0.0);
        svg.path("p", &[(f64::NAN, f64::INFINITY)], false);
        let text = svg.finish();
        assert!(!text.contains("NaN") && !text.contains("inf") && !text.contains("<rect"), "{text}");
    }

    #[test]
    fn long_names_are_cut_to_their_column() {
        assert_eq!(fit("teacher", 178.0), "teacher");
        assert_eq!(fit("abcdefghij", 42.0), "abcde…");
        assert_eq!(fit("文文文文", 40.0), "文文…");
    }
}
