//! The text that Prometheus reads: exposition format 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>).
//!
//! Owns: how metrics are written. Does not own: which there are (`names`), and their values.
//!
//! The library of the Prometheus project writes OpenMetrics, in which a counter is announced by another name than that of
//! its samples; `promtool check metrics` takes that for two metrics and complains. This form is read by both.

use std::fmt::Write;
use std::time::Duration;

use crate::telemetry::latency::Spread;

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only grows, until the server ends.
    Counter,
    /// It is so now.
    Gauge,
    /// How many took at most so long, for some lengths of time.
    Histogram,
}

impl Kind {
    /// The word for it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric, whatever its labels are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// In one line, without a full stop.
    pub(super) help: &'static str,
}

/// A number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Number {
    Whole(u64),
    Real(f64),
}

impl From<u64> for Number {
    fn from(number: u64) -> Self {
        Self::Whole(number)
    }
}

impl From<f64> for Number {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl From<bool> for Number {
    fn from(is_so: bool) -> Self {
        Self::Whole(is_so.into())
    }
}

/// Names of labels and their values.
pub(super) type Labels<'a> = &'a [(&'static str, &'a str)];

/// Metrics as text.
#[derive(Debug, Default)]
pub(super) struct Text {
    text: String,
    /// The metric whose samples are being written.
    current: Option<&'static str>,
}

/// The `le` of histograms, in seconds: what it is, and how it is written. From what a hit in memory takes to what clients wait at
/// most.
const LIMITS: [(Duration, &str); 20] = [
    (Duration::from_micros(10), "1e-05"),
    (Duration::from_micros(25), "2.5e-05"),
    (Duration::from_micros(50), "5e-05"),
    (Duration::from_micros(100), "0.0001"),
    (Duration::from_micros(250), "0.00025"),
    (Duration::from_micros(500), "0.0005"),
    (Duration::from_millis(1), "0.001"),
    (Duration::from_micros(2500), "0.0025"),
    (Duration::from_millis(5), "0.005"),
    (Duration::from_millis(10), "0.01"),
    (Duration::from_millis(25), "0.025"),
    (Duration::from_millis(50), "0.05"),
    (Duration::from_millis(100), "0.1"),
    (Duration::from_millis(250), "0.25"),
    (Duration::from_millis(500), "0.5"),
    (Duration::from_secs(1), "1"),
    (Duration::from_millis(2500), "2.5"),
    (Duration::from_secs(5), "5"),
    (Duration::from_secs(10), "10"),
    (Duration::from_secs(25), "25"),
];

impl Text {
    /// Adds a value of `metric`. All values of one metric are to be added one after the other, each with other labels.
    pub(super) fn add(&mut self, metric: &Metric, labels: Labels<'_>, number: impl Into<Number>) {
        self.begin(metric);
        self.sample(metric.name, "", labels, None, number.into());
    }

    /// Adds a histogram.
    pub(super) fn add_histogram(&mut self, metric: &Metric, labels: Labels<'_>, spread: &Spread) {
        self.begin(metric);
        let count = spread.count();
        for (limit, le) in LIMITS {
            self.sample(metric.name, "_bucket", labels, Some(le), spread.within(limit).into());
        }
        self.sample(metric.name, "_bucket", labels, Some("+Inf"), count.into());
        self.sample(metric.name, "_sum", labels, None, spread.sum().as_secs_f64().into());
        self.sample(metric.name, "_count", labels, None, count.into());
    }

    /// What was written.
    pub(super) fn into_string(self) -> String {
        self.text
    }

    fn begin(&mut self, metric: &Metric) {
        if self.current == Some(metric.name) {
            return;
        }
        self.current = Some(metric.name);
        let Metric { name, kind, help } = metric;
        self.write(format_args!("# HELP {name} "));
        push_escaped(&mut self.text, help, false);
        self.write(format_args!(".\n# TYPE {name} {}\n", kind.name()));
    }

    fn sample(&mut self, name: &str, suffix: &str, labels: Labels<'_>, le: Option<&str>, number: Number) {
        self.text.push_str(name);
        self.text.push_str(suffix);
        let labels = labels.iter().copied().chain(le.map(|le| ("le", le)));
        let mut separator = '{';
        for (label, value) in labels {
            self.text.push(separator);
            separator = ',';
            self.write(format_args!("{label}=\""));
            push_escaped(&mut self.text, value, true);
            self.text.push('"');
        }
        if separator == ',' {
            self.text.push('}');
        }
        match number {
            Number::Whole(number) => self.write(format_args!(" {number}\n")),
            Number::Real(number) if number.is_nan() => self.text.push_str(" NaN\n"),
            Number::Real(number) if number.is_infinite() => {
                self.text.push_str(if number > 0.0 { " +Inf\n" } else { " -Inf\n" });
            }
            Number::Real(number) => self.write(format_args!(" {number}\n")),
        }
    }

    fn write(&mut self, arguments: std::fmt::Arguments<'_>) {
        self.text.write_fmt(arguments).expect("a string takes all that is written to it");
    }
}

/// Backslashes, ends of lines and, in values of labels, quotation marks are written with a backslash.
fn push_escaped(text: &mut String, value: &str, is_quoted: bool) {
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '"' if is_quoted => text.push_str("\\\""),
            character => text.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::latency::Latencies;
    use proptest::prelude::*;

    const GAUGE: Metric = Metric { name: "a_bytes", kind: Kind::Gauge, help: "A \\ thing" };
    const COUNTER: Metric = Metric { name: "b_total", kind: Kind::Counter, help: "Things" };
    const HISTOGRAM: Metric = Metric { name: "c_seconds", kind: Kind::Histogram, help: "Times" };

    #[test]
    fn a_metric_is_announced_once() {
        let mut text = Text::default();
        text.add(&GAUGE, &[], 7);
        text.add(&COUNTER, &[("x", "1")], 1.5);
        text.add(&COUNTER, &[("x", "a\"b\\c\nd"), ("y", "")], true);
        assert_eq!(
            text.into_string(),
            "# HELP a_bytes A \\\\ thing.\n# TYPE a_bytes gauge\na_bytes 7\n\
             # HELP b_total Things.\n# TYPE b_total counter\nb_total{x=\"1\"} 1.5\n\
             b_total{x=\"a\\\"b\\\\c\\nd\",y=\"\"} 1\n"
        );
    }

    #[test]
    fn what_is_no_number_has_its_name() {
        let mut text = Text::default();
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, 1e-9, 1e21] {
            text.add(&GAUGE, &[], number);
        }
        let text = text.into_string();
        let values: Vec<_> = text.lines().skip(2).map(|line| line.strip_prefix("a_bytes ").unwrap()).collect();
        assert_eq!(values[..4], ["NaN", "+Inf", "-Inf", "0"]);
        assert!(values[4..].iter().zip([1e-9, 1e21]).all(|(text, number)| text.parse() == Ok(number)));
    }

    #[test]
    fn limits_are_written_as_what_they_are_and_grow() {
        for (limit, le) in LIMITS {
            assert!((le.parse::<f64>().unwrap() - limit.as_secs_f64()).abs() < 1e-12, "{le}");
        }
        assert!(LIMITS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn a_histogram_counts_upwards() {
        let latencies = Latencies::default();
        latencies.record(Duration::from_micros(30), 5);
        latencies.record(Duration::from_millis(3), 2);
        latencies.record(Duration::from_secs(60), 1);
        let mut text = Text::default();
        text.add_histogram(&HISTOGRAM, &[("x", "y")], &latencies.spread());
        let text = text.into_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2 + LIMITS.len() + 3);
        assert!(lines.contains(&"c_seconds_bucket{x=\"y\",le=\"2.5e-05\"} 0"), "{text}");
        assert!(lines.contains(&"c_seconds_bucket{x=\"y\",le=\"5e-05\"} 5"));
        assert!(lines.contains(&"c_seconds_bucket{x=\"y\",le=\"0.005\"} 7"));
        assert!(lines.contains(&"c_seconds_bucket{x=\"y\",le=\"25\"} 7"));
        assert!(lines.contains(&"c_seconds_bucket{x=\"y\",le=\"+Inf\"} 8"));
        assert!(lines.contains(&"c_seconds_sum{x=\"y\"} 60.00615"));
        assert!(lines.contains(&"c_seconds_count{x=\"y\"} 8"));
    }

    /// The value of a label, as whoever reads the text finds it.
    fn unescaped(text: &str) -> String {
        let mut value = String::new();
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            value.push(match character {
                '\\' => match characters.next().unwrap() {
                    'n' => '\n',
                    other => other,
                },
                other => other,
            });
        }
        value
    }

    proptest! {
        #[test]
        fn every_value_of_a_label_is_one_line_and_is_read_as_it_was(value in "[a\\\\\n\"{}, =ä]{0,12}") {
            let mut text = Text::default();
            text.add(&GAUGE, &[("x", &value)], 1);
            let text = text.into_string();
            let lines: Vec<_> = text.split_terminator('\n').collect();
            prop_assert_eq!(lines.len(), 3);
            let inner = lines[2].strip_prefix("a_bytes{x=\"").and_then(|rest| rest.strip_suffix("\"} 1")).unwrap();
            prop_assert_eq!(unescaped(inner), value);
        }

        #[test]
        fn every_number_is_read_as_it_was(number in any::<f64>()) {
            let mut text = Text::default();
            text.add(&GAUGE, &[], number);
            let text = text.into_string();
            let read: f64 = text.lines().last().unwrap().strip_prefix("a_bytes ").unwrap().parse().unwrap();
            prop_assert!(read == number || (read.is_nan() && number.is_nan()));
        }
    }
}
