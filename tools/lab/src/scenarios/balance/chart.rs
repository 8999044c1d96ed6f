//! The plot: how long a read takes, by the number of images, as a part of what it takes with one.

use std::fmt::Write as _;

use crate::table::Row;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const MARGIN: f64 = 60.0;
const COLOURS: [&str; 4] = ["#2471a3", "#1e8449", "#c0392b", "#d68910"];

/// As an SVG file.
pub(super) fn draw(rows: &[Row]) -> String {
    let most = rows.iter().map(|row| row.cells.len()).max().unwrap_or(1).max(2);
    let number = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    let x = |images: usize| MARGIN + WIDTH * number(images) / number(most - 1);
    let y = |part: f64| MARGIN + HEIGHT * (1.0 - part.min(1.1) / 1.1);
    let mut body = String::new();
    for tenths in [0_u8, 2, 4, 6, 8, 10] {
        let part = f64::from(tenths) / 10.0;
        line(&mut body, &format!("<path d=\"M{MARGIN:.1} {:.1}H{:.1}\" stroke=\"#ddd\"/>", y(part), MARGIN + WIDTH));
        text(&mut body, MARGIN - 30.0, y(part) + 4.0, "#000", &format!("{part:.1}"));
    }
    for images in 0..most {
        text(&mut body, x(images) - 4.0, MARGIN + HEIGHT + 18.0, "#000", &(images + 1).to_string());
    }
    text(&mut body, MARGIN, MARGIN - 20.0, "#000", "mean delay of a read, as a part of that with one image");
    text(&mut body, MARGIN + WIDTH - 50.0, MARGIN + HEIGHT + 36.0, "#000", "images");
    for (at, row) in rows.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let medians: Vec<f64> =
            row.cells.iter().map(|cell| cell.figure.as_ref().map_or(0.0, |figure| figure.median)).collect();
        let first = medians.first().copied().filter(|first| *first > 0.0).unwrap_or(1.0);
        let points: Vec<(f64, f64)> =
            medians.iter().enumerate().map(|(index, median)| (x(index), y(median / first))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        line(&mut body, &format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", path.join(" ")));
        for (x, y) in points {
            line(&mut body, &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
        }
        let left = MARGIN + WIDTH - 190.0;
        text(
            &mut body,
            left,
            MARGIN + 20.0 + 16.0 * number(at),
            colour,
            &format!("{} ({first:.0} ms with one)", row.name),
        );
    }
    let (width, height) = (WIDTH + 2.0 * MARGIN, HEIGHT + 2.0 * MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn text(body: &mut String, x: f64, y: f64, colour: &str, text: &str) {
    line(body, &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\">{text}</text>"));
}

fn line(body: &mut String, element: &str) {
    // A string takes whatever is written to it.
    let _ = writeln!(body, "{element}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Cell;

    #[test]
    fn a_curve_begins_at_one() {
        let row = Row::new("random", [8.0, 4.0, 3.0].into_iter().map(|delay| Cell::of(vec![delay])).collect());
        let svg = draw(&[row]);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("random (8 ms with one)"), "{svg}");
    }
}
