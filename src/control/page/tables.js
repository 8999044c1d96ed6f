// Tables: rows that keep their place in the document while their numbers change. On a narrow screen each row becomes a
// block with a label for each number (page.css), so the roles of a table are said in so many words.

import { html, keyed, mark, say } from "./dom.js";

/** Shows `rows` as a table in `place`. A column: `name` (for hooks), `title`, `text(row)`, and if it has them `value(row)`
 *  (the plain number), `note(row)` (of more), `bad(row)`, `number`. The first column names the row. */
export function table(place, caption, columns, rows, key, empty, hooks = () => ({})) {
  let frame = place.querySelector("table");
  if (rows.length === 0) return nothing(place, empty);
  if (!frame) {
    frame = newTable(caption, columns);
    place.replaceChildren(frame);
  }
  const make = () => newRow(columns);
  keyed(frame.tBodies[0], rows, key, make, (line, row) => {
    for (const [name, value] of Object.entries(hooks(row))) mark(line, "data-" + name, value);
    columns.forEach((column, index) => updateCell(line.children[index], column, row));
  });
}

/** Says that there is nothing to be shown. */
export function nothing(place, text) {
  let line = place.querySelector("p.empty");
  if (!line || place.childElementCount > 1) {
    line = html("p", { class: "empty" });
    place.replaceChildren(line);
  }
  say(line, text);
}

function newTable(caption, columns) {
  const heading = (column) => html("th", { scope: "col", role: "columnheader", class: column.number && "number" }, column.title);
  return html("table", { role: "table" },
    html("caption", { class: "unseen" }, caption),
    html("thead", { role: "rowgroup" }, html("tr", { role: "row" }, ...columns.map(heading))),
    html("tbody", { role: "rowgroup" }));
}

function newRow(columns) {
  const cell = (column, index) => {
    const kind = index === 0 ? "th" : "td";
    const attributes = { role: index === 0 ? "rowheader" : "cell", scope: index === 0 && "row", class: column.number && "number" };
    return html(kind, { ...attributes, "data-figure": column.name, "data-label": column.title },
      html("span", { class: "value" }), column.note && html("span", { class: "note" }));
  };
  return html("tr", { role: "row" }, ...columns.map(cell));
}

function updateCell(cell, column, row) {
  say(cell.firstElementChild, column.text(row));
  if (column.value) mark(cell, "data-value", column.value(row));
  mark(cell, "data-idle", column.number && /^(0|0\/s|–)$/.test(cell.firstElementChild.textContent));
  if (column.note) say(cell.children[1], column.note(row) ?? "");
  mark(cell, "data-bad", column.bad?.(row));
}

/** Orders rows by several figures, the largest first. */
export function byMost(...figures) {
  return (one, other) => {
    for (const figure of figures) {
      const difference = figure(other) - figure(one);
      if (difference !== 0) return difference;
    }
    return 0;
  };
}
