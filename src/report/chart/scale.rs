//! From values to pixels, with ticks at round numbers.

/// A linear axis between two values and two pixel positions.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// An axis that starts at zero, for bars: their lengths are compared.
    pub fn from_zero(highest: f64, from: f64, to: f64) -> Self {
        Self { low: 0.0, high: if highest > 0.0 { highest } else { 1.0 }, from, to }
    }

    /// An axis around the values, widened to round numbers, for lines. Values that are not finite do not count.
    pub fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            return Self { low: 0.0, high: 1.0, from, to };
        }
        if low == high {
            let margin = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            return Self { low: low - margin, high: high + margin, from, to };
        }
        let step = round_step((high - low) / 4.0);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, from, to }
    }

    /// The axis as it is, without widening: for steps, which start and end where they do.
    pub fn exact(low: f64, high: f64, from: f64, to: f64) -> Self {
        Self { low, high: if high > low { high } else { low + 1.0 }, from, to }
    }

    pub fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// About `count` round values inside the axis.
    pub fn ticks(&self, count: usize) -> Vec<f64> {
        let step = round_step((self.high - self.low) / count.max(1) as f64);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last.min(first.saturating_add(100))).map(|index| index as f64 * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten, at least `rough`.
fn round_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough * 0.999).unwrap_or(10.0 * power)
}

/// A tick's value in as few digits as its step allows.
pub fn tick_text(value: f64) -> String {
    if value.abs() >= 10_000.0 {
        let text = format!("{:.1}", value / 1000.0);
        return format!("{}k", text.trim_end_matches(".0"));
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let scale = Scale::around([0.13, 2.71, f64::NAN].into_iter(), 100.0, 0.0);
        assert_eq!(scale.ticks(4), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!((scale.at(0.0), scale.at(3.0)), (100.0, 0.0));
        assert_eq!(Scale::exact(0.0, 730.0, 0.0, 1.0).ticks(5), [0.0, 200.0, 400.0, 600.0]);
    }

    #[test]
    fn degenerate_ranges_still_give_an_axis() {
        for scale in [
            Scale::around([].into_iter(), 0.0, 10.0),
            Scale::around([2.0, 2.0].into_iter(), 0.0, 10.0),
            Scale::exact(5.0, 5.0, 0.0, 10.0),
            Scale::from_zero(0.0, 0.0, 10.0),
        ] {
            assert!(scale.at(1.0).is_finite() && !scale.ticks(4).is_empty(), "{scale:?}");
        }
    }

    #[test]
    fn tick_texts_are_short() {
        assert_eq!(
            [0.0, 0.25, -3.0, 1500.0, 12_500.0, 20_000.0].map(tick_text),
            ["0", "0.25", "-3", "1500", "12.5k", "20k"]
        );
    }
}
