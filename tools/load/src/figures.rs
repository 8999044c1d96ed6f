//! Medians, ratios and their ranges.

use std::fmt;

use serde::Serialize;

/// The spread from which a figure is marked: repeat it, or believe its range only.
const NOISY: f64 = 0.25;

/// Several runs of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figure {
    /// The one in the middle, or between the two that are.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Figure {
    /// `None` without values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Self { median: f64::midpoint(low, high), least, most })
    }

    /// Of the quotients of two rows of values that were measured in the same rounds.
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        Self::of(ours.iter().zip(theirs).filter(|(_, theirs)| **theirs > 0.0).map(|(ours, theirs)| ours / theirs))
    }

    fn mark(&self) -> &'static str {
        if self.most - self.least > NOISY * self.median { " ~" } else { "" }
    }

    /// As in `1.42 (1.28–1.56) ~`.
    pub fn with_range(&self) -> String {
        format!("{:.2} ({:.2}–{:.2}){}", self.median, self.least, self.most, self.mark())
    }
}

impl fmt::Display for Figure {
    /// The median with three digits, and `~` if the values are far apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.median {
            large if large >= 100.0 => write!(f, "{large:.0}")?,
            middle if middle >= 10.0 => write!(f, "{middle:.1}")?,
            one if one >= 1.0 => write!(f, "{one:.2}")?,
            small => write!(f, "{small:.3}")?,
        }
        f.write_str(self.mark())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(values: &[f64]) -> Figure {
        Figure::of(values.iter().copied()).unwrap()
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(figure(&[3.0, 1.0, 2.0]), Figure { median: 2.0, least: 1.0, most: 3.0 });
        assert_eq!(figure(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(figure(&[7.0]).median, 7.0);
        assert_eq!(Figure::of([]), None);
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        // The machine was twice as fast in the second round, and the ratio the same.
        let ratio = Figure::of_ratios(&[15.0, 30.0], &[10.0, 20.0]).unwrap();
        assert_eq!(ratio, Figure { median: 1.5, least: 1.5, most: 1.5 });
        assert_eq!(Figure::of_ratios(&[1.0], &[0.0]), None);
    }

    #[test]
    fn what_is_far_apart_is_marked() {
        assert_eq!(figure(&[100.0, 110.0, 120.0]).to_string(), "110");
        assert_eq!(figure(&[100.0, 110.0, 130.0]).to_string(), "110 ~");
        assert_eq!(figure(&[1.0, 1.0, 1.5]).with_range(), "1.00 (1.00–1.50) ~");
        assert_eq!((figure(&[0.0421]).to_string(), figure(&[12.34]).to_string()), ("0.042".into(), "12.3".into()));
    }
}
