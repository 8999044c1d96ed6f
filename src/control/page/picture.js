// What is here of an image, as a picture: a cell for each range, filled from its bottom with what is resident and read,
// resident and unread, and zero; what is left empty is absent, and a bar under it is pinned. With the pointer or the arrow keys
// one cell after the other says its numbers.

import { html, mark, say, svg } from "./dom.js";
import { percent, size } from "./format.js";

const GAP = 1.5;

function sum(list) {
  return list.reduce((one, other) => one + other, 0);
}

/** Makes the frame of a picture. */
export function newPicture() {
  const cells = html("div", { class: "cells", tabindex: "0", role: "slider", "aria-valuemin": "0" });
  const figure = html("figure", {}, cells, html("p", { class: "readout" }), html("p", { class: "sums" }));
  figure.chosen = null;
  cells.addEventListener("keydown", (event) => choose(figure, moved(figure, event)));
  cells.addEventListener("pointermove", (event) => {
    const cell = event.target.closest("[data-cell]");
    if (cell) choose(figure, Number(cell.dataset.cell));
  });
  cells.addEventListener("pointerleave", () => choose(figure, null));
  cells.addEventListener("blur", () => choose(figure, null));
  cells.addEventListener("focus", () => choose(figure, figure.chosen ?? 0));
  return figure;
}

/** The cell that a key leads to. */
function moved(figure, event) {
  const { residency, columns } = figure;
  if (!residency) return null;
  const last = residency.resident_bytes.length - 1;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -last, End: last };
  if (!(event.key in steps)) return figure.chosen;
  event.preventDefault();
  return Math.max(0, Math.min(last, (figure.chosen ?? 0) + steps[event.key]));
}

/** Puts what is known now into the picture. */
export function updatePicture(figure, residency) {
  const cells = figure.firstElementChild;
  figure.residency = residency;
  const number = residency.resident_bytes.length;
  const width = Math.max(240, cells.clientWidth);
  figure.columns = columnsOf(number, width);
  const drawn = draw(residency, figure.columns, width);
  cells.replaceChildren(drawn);
  mark(cells, "aria-label", `What is here of ${residency.image}, range by range`);
  mark(cells, "aria-valuemax", Math.max(0, number - 1));
  choose(figure, figure.chosen);
  const sums = summary(residency);
  say(figure.lastElementChild, sums);
}

/** So many cells in a row that they are not too narrow, and that the last row is full if that can be. */
function columnsOf(number, width) {
  const most = Math.max(1, Math.floor(width / 10.5));
  if (number <= most) return Math.max(number, 1);
  const rows = Math.ceil(number / most);
  for (let columns = Math.ceil(number / rows); columns >= most * 0.5; columns--) if (number % columns === 0) return columns;
  return Math.ceil(number / rows);
}

function lengthOf(residency, index) {
  return Math.min(residency.cell_bytes, residency.size - index * residency.cell_bytes);
}

function draw(residency, columns, width) {
  const number = residency.resident_bytes.length;
  const step = Math.min(width / columns, 28);
  const height = 20;
  const rows = Math.ceil(number / columns);
  const cells = Array.from({ length: number }, (_, index) =>
    drawCell(residency, index, (index % columns) * step, Math.floor(index / columns) * (height + 4), step - GAP, height));
  return svg("svg", { viewBox: `0 0 ${width} ${rows * (height + 4)}`, width, height: rows * (height + 4), "aria-hidden": "true" }, patterns(), ...cells);
}

function patterns() {
  return svg("defs", {},
    svg("pattern", { id: "hatch", width: 4, height: 4, patternUnits: "userSpaceOnUse" }, svg("rect", { class: "unread", width: 4, height: 4 }), svg("path", { class: "hatch", d: "M-1 1L1 -1M0 4L4 0M3 5L5 3" })),
    svg("pattern", { id: "grain", width: 4, height: 4, patternUnits: "userSpaceOnUse" }, svg("rect", { class: "zero", width: 4, height: 4 }), svg("circle", { class: "grain", cx: 2, cy: 2, r: 0.7 })));
}

function drawCell(residency, index, x, y, width, height) {
  const length = lengthOf(residency, index);
  const unread = Math.min(residency.unread_bytes[index], residency.resident_bytes[index]);
  const parts = [["resident", residency.resident_bytes[index] - unread], ["unread", unread], ["zero", residency.zero_bytes[index]]];
  const fill = { unread: "url(#hatch)", zero: "url(#grain)" };
  const box = height - 4;
  let top = box;
  const bars = parts.filter(([, bytes]) => bytes > 0).map(([name, bytes]) => {
    const part = Math.max(1, (box * bytes) / length);
    top = Math.max(0, top - part);
    return svg("rect", { class: name, y: top, width, height: part, fill: fill[name] });
  });
  const pinned = (width * residency.pinned_bytes[index]) / length;
  return svg("g", { transform: `translate(${x.toFixed(2)} ${y})`, "data-cell": index },
    svg("rect", { class: "cell", width, height: box }), ...bars,
    residency.fetching_bytes[index] > 0 && svg("rect", { class: "fetching", x: 0.5, y: 0.5, width: width - 1, height: box - 1 }),
    pinned > 0 && svg("rect", { class: "pinned", y: height - 3, width: Math.max(1, pinned), height: 3 }));
}

/** Says what is in a cell, and shows which it is. */
function choose(figure, index) {
  const { residency } = figure;
  const number = residency ? residency.resident_bytes.length : 0;
  figure.chosen = index === null || number === 0 ? null : Math.min(index, number - 1);
  const cells = figure.firstElementChild;
  cells.querySelector(".chosen")?.classList.remove("chosen");
  const text = figure.chosen === null ? "" : numbers(residency, figure.chosen);
  if (figure.chosen !== null) cells.querySelector(`[data-cell="${figure.chosen}"]`)?.classList.add("chosen");
  mark(cells, "aria-valuenow", figure.chosen ?? 0);
  mark(cells, "aria-valuetext", text || summary(residency ?? {}));
  say(figure.children[1], text);
}

function numbers(residency, index) {
  const start = index * residency.cell_bytes;
  const length = lengthOf(residency, index);
  const parts = facts((name) => residency[name][index], length);
  return `${size(start)} to ${size(start + length)}: ${parts.join(", ")}`;
}

function summary(residency) {
  if (!residency.size) return "nothing is known";
  return facts((name) => sum(residency[name]), residency.size).join(", ");
}

/** The figures of a length of the image, in words. */
function facts(of, length) {
  const [resident, zero] = [of("resident_bytes"), of("zero_bytes")];
  const more = [["zero_bytes", "zero"], ["unread_bytes", "unread"], ["pinned_bytes", "pinned"], ["fetching_bytes", "under way"]];
  const parts = more.filter(([name]) => of(name) > 0).map(([name, word]) => `${size(of(name))} ${word}`);
  const absent = length - resident - zero;
  return [`${size(resident)} resident (${percent(resident, length)})`, ...parts, `${size(Math.max(0, absent))} absent`];
}
