//! Columns for people.

use std::fmt::{self, Write};

/// A heading and rows of cells, each column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Headings that begin with `>` are those of columns of numbers, which stand to the right.
    pub(super) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()] }
    }

    /// Adds a row, which has a cell for each heading.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }
}

/// `text` on one line and without orders to the terminal: a part of it may come from other machines.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(headings) = self.rows.first() else { return Ok(()) };
        let to_right: Vec<_> = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let bare = |index: usize, cell: &str| {
            if index == 0 { cell.trim_start_matches('>').to_owned() } else { cell.to_owned() }
        };
        let width = |column: usize| {
            let cells = self.rows.iter().enumerate().filter_map(|(index, row)| Some(bare(index, row.get(column)?)));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..headings.len()).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for ((cell, width), to_right) in row.iter().zip(&widths).zip(&to_right) {
                let cell = bare(index, cell);
                if *to_right {
                    write!(line, "  {cell:>width$}")?;
                } else {
                    write!(line, "  {cell:<width$}")?;
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", ">SIZE", "WHERE"]);
        table.row(vec!["debian".into(), "2G".into(), "here".into()]);
        table.row(vec!["é\u{1b}[2J".into(), "65536".into(), ">".into()]);
        let text = "  NAME     SIZE  WHERE\n  debian     2G  here\n  é\u{fffd}[2J   65536  >\n";
        assert_eq!(table.to_string(), text);
    }
}
