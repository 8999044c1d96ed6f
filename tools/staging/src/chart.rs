//! The plot: for each trace, who got all above and what they got on average below, over the load.

use std::fmt::Write as _;

use crate::schedule::Staging;
use crate::simulate::{Row, Sum};
use crate::trace::Shape;

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 200.0;
/// Around each panel.
const MARGIN: f64 = 55.0;
/// The largest load.
const MOST: f64 = 1.6;

/// A panel, by its upper left corner.
#[derive(Clone, Copy)]
struct Panel {
    left: f64,
    top: f64,
}

impl Panel {
    fn x(self, load: f64) -> f64 {
        self.left + WIDTH * load.min(MOST) / MOST
    }

    fn y(self, share: f64) -> f64 {
        self.top + HEIGHT * (1.0 - share / 1.05)
    }
}

const fn colour(staging: Staging) -> &'static str {
    match staging {
        Staging::Job => "#7f8c8d",
        Staging::JitAlone => "#d68910",
        Staging::Jit => "#c0392b",
        Staging::Aggressive => "#2471a3",
        Staging::Hybrid => "#1e8449",
    }
}

/// As an SVG file. Of nodes that keep nothing.
pub(crate) fn draw(rows: &[Row]) -> String {
    let mut body = String::new();
    let mut left = MARGIN;
    for shape in Shape::ALL {
        let of_shape: Vec<_> = rows.iter().filter(|row| row.shape == shape && !row.keeps_images).collect();
        if of_shape.is_empty() {
            continue;
        }
        let (above, below) = (Panel { left, top: MARGIN }, Panel { left, top: 2.0 * MARGIN + HEIGHT });
        panel(&mut body, above, &of_shape, &format!("{shape}: deployments that got all of their time"), Sum::satisfied);
        panel(&mut body, below, &of_shape, &format!("{shape}: mean share of the promised time"), Sum::mean);
        left += WIDTH + MARGIN;
    }
    let bottom = 2.0 * (MARGIN + HEIGHT) + MARGIN * 0.8;
    for (staging, number) in Staging::ALL.into_iter().zip(0_u8..) {
        text(&mut body, MARGIN + f64::from(number) * 80.0, bottom, colour(staging), &staging.to_string());
    }
    text(&mut body, MARGIN + 420.0, bottom, "#000", "load: work, as a part of what the link can do");
    let height = bottom + 20.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {left:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn panel(body: &mut String, panel: Panel, rows: &[&Row], title: &str, value: fn(Sum) -> f64) {
    for share in [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] {
        let (from, to, y) = (panel.left, panel.left + WIDTH, panel.y(share));
        put(body, &format!("<path d=\"M{from:.1} {y:.1}H{to:.1}\" stroke=\"#ddd\"/>"));
        text(body, panel.left - 25.0, y + 4.0, "#000", &format!("{share:.1}"));
    }
    for load in [0.0, 0.3, 0.6, 0.9, 1.2, 1.5] {
        text(body, panel.x(load) - 8.0, panel.top + HEIGHT + 15.0, "#000", &format!("{load:.1}"));
    }
    text(body, panel.left, panel.top - 6.0, "#000", title);
    for (number, staging) in Staging::ALL.into_iter().enumerate() {
        let points: Vec<_> = rows.iter().map(|row| (panel.x(row.load), panel.y(value(row.results[number])))).collect();
        curve(body, &points, colour(staging));
    }
}

fn curve(body: &mut String, points: &[(f64, f64)], colour: &str) {
    let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    put(body, &format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", path.join(" ")));
    for (x, y) in points {
        put(body, &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>"));
    }
}

fn text(body: &mut String, x: f64, y: f64, colour: &str, text: &str) {
    put(body, &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\">{text}</text>"));
}

fn put(body: &mut String, element: &str) {
    // A string takes whatever is written to it.
    let _ = writeln!(body, "{element}");
}
