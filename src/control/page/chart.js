// Latency over time: one picture for each export, p50 and p99 on a logarithmic scale, requests per second under it.

import { html, keyed, say, svg } from "./dom.js";
import { count, ms, perSecond } from "./format.js";

const HEIGHT = 168;
const LEFT = 60;
const RIGHT = 100;
const TOP = 8;
/** Where the scale of latency ends, and the one of requests. */
const BOTTOM = 118;
const FLOOR = 146;

/** The least and the greatest power of ten around all values. */
function decades(values) {
  const logs = values.map((value) => Math.log10(Math.max(value, 0.001)));
  const low = Math.floor(Math.min(...logs));
  return [low, Math.max(low + 1, Math.ceil(Math.max(...logs)))];
}

/** A line through the values that there are. */
function line(values, x, y) {
  let path = "";
  let isOpen = false;
  values.forEach((value, index) => {
    if (value !== null) path += `${isOpen ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    isOpen = value !== null;
  });
  return path;
}

function lastOf(values) {
  for (let index = values.length - 1; index >= 0; index--) if (values[index] !== null) return values[index];
  return null;
}

/** Draws the history of an export, `seconds` long. */
function picture(history, seconds, width) {
  const values = [...history.p50_ms, ...history.p99_ms].filter((value) => value !== null);
  const [low, high] = values.length ? decades(values) : [-1, 1];
  const right = width - RIGHT;
  const span = Math.max(seconds, 60);
  const x = (index) => right - ((history.p50_ms.length - 1 - index) * (right - LEFT)) / span;
  const y = (value) => BOTTOM - ((Math.log10(Math.max(value, 0.001)) - low) * (BOTTOM - TOP)) / (high - low);
  return svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": describe(history) },
    ...scale(low, high, y, right), ...times(span, right, width), ...bars(history.requests, x, right),
    svg("path", { class: "p99", d: line(history.p99_ms, x, y) }), svg("path", { class: "p50", d: line(history.p50_ms, x, y) }),
    ...ends(history, y, right));
}

function scale(low, high, y, right) {
  const marks = [];
  for (let power = low; power <= high; power++) {
    const at = y(10 ** power);
    marks.push(svg("path", { class: "grid", d: `M${LEFT} ${at}H${right}` }),
      svg("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end", class: "dim" }, power >= 3 ? 10 ** (power - 3) + " s" : Number((10 ** power).toFixed(3)) + " ms"));
  }
  return marks;
}

function times(span, right, width) {
  const step = span <= 120 ? 30 : width < 420 && span > 150 ? 120 : 60;
  const marks = [];
  for (let ago = 0; ago <= span; ago += step) {
    const at = right - (ago * (right - LEFT)) / span;
    const text = ago === 0 ? "now" : ago % 60 === 0 ? `−${ago / 60} min` : `−${ago} s`;
    marks.push(svg("text", { x: at, y: HEIGHT - 6, "text-anchor": "middle", class: "dim" }, text));
  }
  return marks;
}

function bars(requests, x, right) {
  const most = Math.max(1, ...requests);
  const path = requests.map((number, index) => (number > 0 ? `M${x(index).toFixed(1)} ${FLOOR}v${(-20 * number / most).toFixed(1)}` : "")).join("");
  const step = requests.length > 1 ? x(1) - x(0) : 2;
  return [
    svg("path", { class: "bars", d: path, "stroke-width": Math.max(0.75, Math.min(step - 0.5, 8)).toFixed(2) }),
    svg("path", { class: "grid", d: `M${LEFT} ${FLOOR}H${right}` }),
    svg("text", { x: LEFT - 8, y: FLOOR - 6, "text-anchor": "end", class: "dim" }, "reqs"),
    svg("text", { x: right + 8, y: FLOOR - 6 }, perSecond(requests[requests.length - 1] ?? 0)),
  ];
}

/** The last value of each line, beside it, and not on top of the other. */
function ends(history, y, right) {
  const [p50, p99] = [lastOf(history.p50_ms), lastOf(history.p99_ms)];
  if (p50 === null || p99 === null) return [];
  const upper = Math.min(Math.max(y(p99), TOP + 6), BOTTOM - 13);
  const lower = Math.min(Math.max(y(p50), upper + 13), BOTTOM);
  return [
    svg("text", { class: "p99", x: right + 8, y: upper + 4, "data-figure": "p99", "data-value": p99 }, `p99 ${ms(p99)}`),
    svg("text", { class: "p50", x: right + 8, y: lower + 4, "data-figure": "p50", "data-value": p50 }, `p50 ${ms(p50)}`),
  ];
}

function describe(history) {
  return `Latency of ${history.export}: p50 ${ms(lastOf(history.p50_ms))}, p99 ${ms(lastOf(history.p99_ms))} in the last second with requests`;
}

/** The exports that had requests; not what servers read beside an image. */
function busy(history) {
  const isBeside = (one) => /@(manifest|profile|profile-inbox)$/.test(one.export);
  return history.exports.filter((one) => !isBeside(one) && one.requests.some((number) => number > 0));
}

/** Draws the exports that had requests, the slowest first. */
export function charts(place, history, most) {
  const seen = busy(history);
  const recent = (one) => Math.max(0, ...one.p99_ms.slice(-30).filter((value) => value !== null));
  const slowest = [...seen].sort((one, other) => recent(other) - recent(one)).slice(0, most);
  const names = slowest.map((one) => one.export).sort();
  const shown = names.map((name) => slowest.find((one) => one.export === name));
  if (shown.length === 0) return place.replaceChildren(html("p", { class: "empty" }, "No requests in the last minutes."));
  place.querySelector("p.empty")?.remove();
  const seconds = history.at.length > 1 ? history.at[history.at.length - 1] - history.at[0] : 0;
  const make = () => html("figure", {}, html("figcaption"), html("div"));
  keyed(place, shown, (one) => one.export, make, (figure, one) => {
    say(figure.firstElementChild, one.export === "" ? "(the default export)" : one.export);
    figure.dataset.export = one.export;
    figure.lastElementChild.replaceChildren(picture(one, seconds, Math.max(260, figure.lastElementChild.clientWidth)));
  });
}

/** So many exports, in words. */
export function others(history, most) {
  const seen = busy(history).length;
  return seen > most ? `and ${count(seen - most)} faster ones` : "";
}
