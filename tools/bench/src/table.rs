//! What was measured, as a table and as JSON.

use load::figures::Figure;
use serde::Serialize;

use crate::cases::Role;
use crate::clients::Unit;

/// What one run of one server came to. More is better in `rate`, less in `cpu`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Sample {
    /// Requests or megabytes per second.
    pub(crate) rate: f64,
    /// CPU time of the server for each request or gigabyte.
    pub(crate) cpu: Option<f64>,
    /// Microseconds.
    pub(crate) p99: Option<f64>,
    /// The least of all connections' shares, 1 if all had the same.
    pub(crate) share: Option<f64>,
}

/// A case and its samples.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) group: u8,
    pub(crate) name: String,
    #[serde(skip)]
    pub(crate) unit: Unit,
    pub(crate) rows: Vec<Row>,
}

/// What one subject came to, a sample for each round.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) subject: &'static str,
    #[serde(skip)]
    pub(crate) role: Role,
    pub(crate) samples: Vec<Sample>,
}

impl Row {
    fn rates(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.rate).collect()
    }

    /// Empty unless each round has it.
    fn cpus(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.cpu).collect::<Option<_>>().unwrap_or_default()
    }

    fn rate(&self) -> f64 {
        Figure::of(self.rates()).map_or(0.0, |figure| figure.median)
    }

    fn cpu(&self) -> f64 {
        Figure::of(self.cpus()).map_or(f64::INFINITY, |figure| figure.median)
    }
}

/// The heads of the columns.
const HEAD: &str = "\
| case | fastest | Headwater | ÷ fastest | thriftiest | Headwater's CPU | ÷ thriftiest | others ÷ fastest, CPU ÷ thriftiest | besides |
|---|---:|---:|---:|---:|---:|---:|---|---|";

/// A table of the cases of one number.
pub(crate) fn markdown(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for (index, outcome) in outcomes.iter().enumerate() {
        if index == 0 || outcomes[index - 1].group != outcome.group {
            let space = if index == 0 { "" } else { "\n" };
            text.push_str(&format!("{space}{HEAD}\n"));
        }
        text.push_str(&outcome.line());
        text.push('\n');
    }
    text
}

impl Outcome {
    fn of(&self, role: Role) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| row.role == role && !row.samples.is_empty())
    }

    fn line(&self) -> String {
        let name = format!("{} {}", self.group, self.name);
        let fastest = self.of(Role::Peer).max_by(|a, b| a.rate().total_cmp(&b.rate()));
        let thriftiest = self.of(Role::Peer).min_by(|a, b| a.cpu().total_cmp(&b.cpu()));
        let (Some(ours), Some(fastest), Some(thriftiest)) = (self.of(Role::Ours).next(), fastest, thriftiest) else {
            return format!("| {name} | not measured | | | | | | | |");
        };
        let (rate_unit, cpu_unit) = match self.unit {
            Unit::Requests => ("/s", "µs"),
            Unit::Megabytes => ("MB/s", "s/GB"),
        };
        let figure = |values: Vec<f64>| Figure::of(values).map_or_else(|| "–".to_owned(), |figure| figure.to_string());
        let ratio = |ours: &[f64], theirs: &[f64]| {
            Figure::of_ratios(ours, theirs).map_or_else(|| "–".to_owned(), |ratio| ratio.with_range())
        };
        let marks = self.of(Role::Mark).map(|mark| {
            let rate = ratio(&mark.rates(), &fastest.rates());
            format!("{} {rate}, {}", mark.subject, ratio(&mark.cpus(), &thriftiest.cpus()))
        });
        let cells = [
            name,
            format!("{} {} {rate_unit}", fastest.subject, figure(fastest.rates())),
            format!("{} {rate_unit}", figure(ours.rates())),
            ratio(&ours.rates(), &fastest.rates()),
            format!("{} {} {cpu_unit}", thriftiest.subject, figure(thriftiest.cpus())),
            format!("{} {cpu_unit}", figure(ours.cpus())),
            ratio(&ours.cpus(), &thriftiest.cpus()),
            marks.collect::<Vec<_>>().join("; "),
            besides(ours, fastest),
        ];
        format!("| {} |", cells.join(" | "))
    }
}

/// Percentiles and fairness, ours and the fastest peer's.
fn besides(ours: &Row, fastest: &Row) -> String {
    let both = |value: fn(&Sample) -> Option<f64>| {
        let of = |row: &Row| Figure::of(row.samples.iter().filter_map(value));
        of(ours).map(|figure| (figure, of(fastest)))
    };
    let against = |(ours, theirs): (Figure, Option<Figure>), unit: &str| match theirs {
        Some(theirs) => format!("{ours}{unit}, {} {theirs}{unit}", fastest.subject),
        None => format!("{ours}{unit}"),
    };
    let p99 = both(|sample| sample.p99).map(|figures| format!("p99 {}", against(figures, " µs")));
    let share = both(|sample| sample.share).map(|figures| format!("least share {}", against(figures, "")));
    [p99, share].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(subject: &'static str, role: Role, values: &[(f64, f64)]) -> Row {
        let sample = |(rate, cpu): &(f64, f64)| Sample { rate: *rate, cpu: Some(*cpu), p99: Some(80.0), share: None };
        Row { subject, role, samples: values.iter().map(sample).collect() }
    }

    fn outcome(rows: Vec<Row>) -> Outcome {
        Outcome { group: 1, name: "reads".into(), unit: Unit::Requests, rows }
    }

    #[test]
    fn the_fastest_and_the_thriftiest_peer_may_be_two() {
        let line = outcome(vec![
            row("headwater", Role::Ours, &[(300.0, 1.0), (300.0, 1.0)]),
            row("quick", Role::Peer, &[(150.0, 8.0), (150.0, 8.0)]),
            row("thrifty", Role::Peer, &[(100.0, 2.0), (100.0, 2.0)]),
            row("limit", Role::Mark, &[(600.0, 0.5), (600.0, 0.5)]),
        ])
        .line();
        assert_eq!(
            line,
            "| 1 reads | quick 150 /s | 300 /s | 2.00 (2.00–2.00) | thrifty 2.00 µs | 1.00 µs | 0.50 (0.50–0.50) \
             | limit 4.00 (4.00–4.00), 0.25 (0.25–0.25) | p99 80.0 µs, quick 80.0 µs |"
        );
    }

    #[test]
    fn a_case_without_ours_or_without_peers_says_so() {
        let text = markdown(&[outcome(vec![row("headwater", Role::Ours, &[(1.0, 1.0)])])]);
        assert!(text.ends_with("| 1 reads | not measured | | | | | | | |\n"), "{text}");
    }

    #[test]
    fn each_number_has_a_table() {
        let two = |group| Outcome { group, ..outcome(Vec::new()) };
        let text = markdown(&[two(1), two(1), two(2)]);
        assert_eq!(text.matches("| case |").count(), 2);
    }
}
