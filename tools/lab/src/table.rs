//! What was measured, as a table and as JSON.

use std::fmt;

use load::figures::Figure;
use serde::Serialize;
use serde_json::Value;

/// What a scenario came to.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Table {
    /// What was measured, and how.
    pub(crate) title: String,
    /// The heads of the columns behind the name.
    pub(crate) columns: Vec<&'static str>,
    /// A line for each variant.
    pub(crate) rows: Vec<Row>,
    /// What follows from it.
    pub(crate) remarks: Vec<String>,
    /// What servers said at the end of each run, for programs.
    pub(crate) details: Vec<Value>,
}

/// A variant and its figures.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// In the order of the columns.
    pub(crate) cells: Vec<Cell>,
}

/// A figure of several rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Cell {
    /// In the order of the rounds.
    pub(crate) samples: Vec<f64>,
    pub(crate) figure: Option<Figure>,
}

impl Cell {
    pub(crate) fn of(samples: Vec<f64>) -> Self {
        Self { figure: Figure::of(samples.iter().copied()), samples }
    }

    /// The quotients of two variants, round by round.
    pub(crate) fn ratio(ours: &[f64], theirs: &[f64]) -> Self {
        let samples = ours.iter().zip(theirs).filter(|(_, theirs)| **theirs > 0.0).map(|(ours, theirs)| ours / theirs);
        Self::of(samples.collect())
    }

    /// For a column that this variant does not have.
    pub(crate) const fn none() -> Self {
        Self { samples: Vec::new(), figure: None }
    }
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, cells: Vec<Cell>) -> Self {
        Self { name: name.into(), cells }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n\n| | {} |", self.title, self.columns.join(" | "))?;
        writeln!(f, "|---|{}", "---:|".repeat(self.columns.len()))?;
        for row in &self.rows {
            let cells: Vec<_> = row.cells.iter().map(Cell::to_string).collect();
            writeln!(f, "| {} | {} |", row.name, cells.join(" | "))?;
        }
        for remark in &self.remarks {
            write!(f, "\n{remark}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Cell {
    /// The median, with the range if there were several rounds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.figure {
            None => Ok(()),
            Some(figure) if self.samples.len() < 2 => write!(f, "{figure}"),
            Some(Figure { least, most, .. }) => {
                let figure = self.figure.map_or_else(String::new, |figure| figure.to_string());
                write!(f, "{figure} ({least:.3}–{most:.3})")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_variant() {
        let row = |name, samples: &[f64]| Row::new(name, vec![Cell::of(samples.to_vec()), Cell::none()]);
        let rows = vec![row("one", &[2.0]), row("two", &[1.0, 1.1, 1.2])];
        let table = Table { title: "T".into(), columns: vec!["s", "x"], rows, ..Table::default() };
        let expected = "T\n\n| | s | x |\n|---|---:|---:|\n| one | 2.00 |  |\n| two | 1.10 (1.000–1.200) |  |\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        assert_eq!(Cell::ratio(&[15.0, 30.0], &[10.0, 20.0]).samples, [1.5, 1.5]);
        assert!(Cell::ratio(&[1.0], &[0.0]).figure.is_none());
    }
}
