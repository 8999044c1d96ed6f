//! The plot: for each choice of images, times above and hit ratios below, over the sizes of the cache.

use std::fmt::Write as _;

use headwater::mirror::policy::Kind;

use super::{LONGEST, Row};
use crate::workload::Choice;

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 200.0;
/// Around each panel.
const MARGIN: f64 = 55.0;
/// The largest value of either scale.
const MOST: f64 = 1.2;

/// A panel, by its upper left corner.
#[derive(Clone, Copy)]
struct Panel {
    left: f64,
    top: f64,
}

impl Panel {
    /// Where a cache of so many percent is.
    fn x(self, percent: f64) -> f64 {
        self.left + WIDTH * percent / 110.0
    }

    fn y(self, value: f64) -> f64 {
        self.top + HEIGHT * (1.0 - value / MOST)
    }
}

const fn colour(policy: Kind) -> &'static str {
    match policy {
        Kind::Lru => "#c0392b",
        Kind::Lfu => "#2471a3",
        Kind::S3Fifo => "#1e8449",
    }
}

/// As an SVG file.
pub(super) fn draw(rows: &[Row]) -> String {
    let mut choices: Vec<Choice> = rows.iter().map(|row| row.choice).collect();
    choices.dedup();
    let mut policies: Vec<Kind> = rows.iter().map(|row| row.policy).collect();
    policies.truncate(policies.iter().skip(1).position(|policy| *policy == policies[0]).map_or(3, |other| other + 1));
    let mut body = String::new();
    let mut left = MARGIN;
    for choice in &choices {
        let of_choice: Vec<_> = rows.iter().filter(|row| row.choice == *choice).collect();
        let (above, below) = (Panel { left, top: MARGIN }, Panel { left, top: 2.0 * MARGIN + HEIGHT });
        frame(&mut body, above, &format!("{choice}: time, of that without a cache"));
        frame(&mut body, below, &format!("{choice}: hit ratio; rings: simulated"));
        rule(&mut body, above, LONGEST, "#888");
        for policy in &policies {
            let of_policy: Vec<_> = of_choice.iter().filter(|row| row.policy == *policy).collect();
            let series =
                |value: fn(&Row) -> f64| of_policy.iter().map(|row| (row.percent, value(row))).collect::<Vec<_>>();
            curve(&mut body, above, *policy, &series(|row| row.time));
            curve(&mut body, below, *policy, &series(|row| row.hit));
            rings(&mut body, below, *policy, &series(|row| row.simulated));
        }
        left += WIDTH + MARGIN;
    }
    let bottom = 2.0 * (MARGIN + HEIGHT) + MARGIN * 0.8;
    for (policy, x) in policies.iter().zip([MARGIN, MARGIN + 80.0, MARGIN + 160.0]) {
        text(&mut body, x, bottom, colour(*policy), &policy.to_string());
    }
    text(&mut body, MARGIN + 240.0, bottom, "#000", "cache, in percent of the images");
    let height = bottom + 20.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {left:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn frame(body: &mut String, panel: Panel, title: &str) {
    for value in [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] {
        rule(body, panel, value, "#ddd");
        text(body, panel.left - 25.0, panel.y(value) + 4.0, "#000", &format!("{value:.1}"));
    }
    for percent in [0.0, 25.0, 50.0, 75.0, 100.0] {
        text(body, panel.x(percent) - 8.0, panel.top + HEIGHT + 15.0, "#000", &format!("{percent:.0}"));
    }
    text(body, panel.left, panel.top - 6.0, "#000", title);
}

fn rule(body: &mut String, panel: Panel, value: f64, colour: &str) {
    let (from, to, y) = (panel.left, panel.left + WIDTH, panel.y(value));
    put(body, &format!("<path d=\"M{from:.1} {y:.1}H{to:.1}\" stroke=\"{colour}\"/>"));
}

fn text(body: &mut String, x: f64, y: f64, colour: &str, text: &str) {
    put(body, &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\">{text}</text>"));
}

fn curve(body: &mut String, panel: Panel, policy: Kind, points: &[(u64, f64)]) {
    let places: Vec<_> = points.iter().map(|point| place(panel, *point)).collect();
    let path: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let colour = colour(policy);
    put(body, &format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", path.join(" ")));
    for (x, y) in places {
        put(body, &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>"));
    }
}

fn rings(body: &mut String, panel: Panel, policy: Kind, points: &[(u64, f64)]) {
    for (x, y) in points.iter().map(|point| place(panel, *point)) {
        let colour = colour(policy);
        put(body, &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"6\" fill=\"none\" stroke=\"{colour}\"/>"));
    }
}

fn place(panel: Panel, (percent, value): (u64, f64)) -> (f64, f64) {
    (panel.x(percent as f64), panel.y(value.min(MOST)))
}

fn put(body: &mut String, element: &str) {
    // A string takes whatever is written to it.
    let _ = writeln!(body, "{element}");
}
