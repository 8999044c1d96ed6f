// The tree of tiers as a picture: servers from left to right as bytes flow, or on a narrow screen one below the other and
// indented. Where things go is computed from the API's answer alone; drawing comes after it.

import { html, svg } from "./dom.js";
import { many, ms, percent, perSecond, rate, shorten } from "./format.js";

/** An edge is slow when one request of a hundred takes so many milliseconds. */
const SLOW_MS = 100;
const MARGIN = 2;

/** The answer of `/v1/tree` as nodes and edges: edges of several images between two servers are one, the clients of a server
 *  are one node. */
export function model(tree) {
  const nodes = tree.servers.map((server) => ({ id: server.id, server }));
  const edges = new Map();
  for (const edge of tree.edges) {
    const id = edge.from + "\u0000" + edge.to;
    if (!edges.has(id)) edges.set(id, { id, from: edge.from, to: edge.to, parts: [] });
    edges.get(id).parts.push(edge);
  }
  const links = [...edges.values()].map(sumOfEdge);
  for (const server of tree.servers) {
    const groups = tree.clients.filter((clients) => clients.server === server.id);
    if (groups.length === 0) continue;
    const id = "clients\u0000" + server.id;
    nodes.push({ id, clients: sumOfClients(groups) });
    links.push(edgeOfClients(server.id, id, groups));
  }
  return { nodes, edges: links };
}

function total(list, figure) {
  return list.reduce((sum, each) => sum + each[figure], 0);
}

function sumOfEdge(edge) {
  const used = edge.parts.filter((part) => part.current);
  const slowest = edge.parts.map((part) => part.latency).filter(Boolean).sort((one, other) => other.p99_ms - one.p99_ms)[0];
  let state = used.length === 0 ? "spare" : "flows";
  if (slowest && slowest.p99_ms >= SLOW_MS) state = "slow";
  if ((used.length ? used : edge.parts).some((part) => part.reachable === false)) state = "lost";
  return { ...edge, state, bytes: total(edge.parts, "bytes_per_second"), requests: total(edge.parts, "requests_per_second"), latency: slowest };
}

function sumOfClients(groups) {
  return {
    count: total(groups, "count"),
    exports: groups.map((group) => group.export),
  };
}

function edgeOfClients(from, to, groups) {
  const requests = total(groups, "requests_per_second");
  const waited = groups.reduce((sum, group) => sum + (group.mean_ms ?? 0) * group.requests_per_second, 0);
  const bytes = total(groups, "read_bytes_per_second") + total(groups, "written_bytes_per_second");
  const mean = requests > 0 ? waited / requests : null;
  return { id: from + "\u0000" + to, from, to, parts: [], state: mean >= SLOW_MS ? "slow" : "flows", bytes, requests, mean };
}

/** Gives each node a depth, and a parent if it has one: the one that is read from most. Circles end where they began. */
export function arrange({ nodes, edges }) {
  const known = new Map(nodes.map((node) => [node.id, { ...node, children: [], parent: null }]));
  const importance = (edge) => (edge.state === "spare" ? 0 : 1) + (edge.bytes > 0 ? 1 + edge.bytes : 0);
  for (const edge of [...edges].sort((one, other) => importance(other) - importance(one))) {
    const [from, to] = [known.get(edge.from), known.get(edge.to)];
    if (!from || !to || to.parent || isAbove(to, from)) continue;
    to.parent = from;
    from.children.push(to);
  }
  const all = [...known.values()];
  const order = (node) => nodes.findIndex(({ id }) => id === node.id);
  for (const node of all) node.children.sort((one, other) => order(one) - order(other));
  const roots = all.filter((node) => !node.parent).sort((one, other) => order(one) - order(other));
  const sorted = [];
  const visit = (node, depth) => {
    node.depth = depth;
    sorted.push(node);
    node.children.forEach((child) => visit(child, depth + 1));
  };
  roots.forEach((root) => visit(root, 0));
  return sorted;
}

function isAbove(node, other) {
  for (let at = other; at; at = at.parent) if (at === node) return true;
  return false;
}

/** Whether nothing is known of a server but its name. */
function isBare({ server }) {
  return server.reachable === null || (server.images.length === 0 && !server.error);
}

/** Places from left to right: leaves have a row each, everybody else stands in the middle of what is read from it. */
function placeWide(nodes, width) {
  const depth = Math.max(...nodes.map((node) => node.depth));
  let rows = 0;
  const row = (node) => {
    const below = node.children.map(row);
    node.row = below.length ? (below[0] + below[below.length - 1]) / 2 : rows++;
    return node.row;
  };
  nodes.filter((node) => !node.parent).forEach(row);
  const dense = rows > 8;
  const [box, step] = dense ? [44, 52] : [80, 98];
  const across = Math.min(214, (width - depth * 96) / (depth + 1));
  for (const node of nodes) node.width = node.server ? across : Math.min(across, 148);
  const last = Math.max(...nodes.filter((node) => node.depth === depth).map((node) => node.width));
  const pitch = depth ? (width - 2 * MARGIN - last) / depth : 0;
  for (const node of nodes) {
    node.height = !node.server ? 40 : isBare(node) ? 44 : box;
    node.x = MARGIN + node.depth * pitch;
    node.y = MARGIN + node.row * step + (box - node.height) / 2;
  }
  return { height: rows * step - (step - box) + 2 * MARGIN, dense, narrow: false };
}

/** Places one below the other. */
function placeNarrow(nodes, width) {
  let y = MARGIN;
  for (const node of nodes) {
    const indent = Math.min(node.depth, 5) * 20;
    node.x = MARGIN + indent;
    node.width = width - 2 * MARGIN - indent;
    if (node.parent) y += 18;
    node.height = !node.server ? 36 : isBare(node) ? 44 : 80;
    node.y = y;
    y += node.height + 8;
  }
  return { height: y, dense: false, narrow: true };
}

/** Draws the tree into `place`. */
export function draw(place, tree) {
  const width = Math.max(280, place.clientWidth);
  const { nodes, edges } = model(tree);
  const sorted = arrange({ nodes, edges });
  const layout = width < 720 ? placeNarrow(sorted, width) : placeWide(sorted, width);
  const places = new Map(sorted.map((node) => [node.id, node]));
  const most = Math.max(1, ...edges.map((edge) => edge.bytes));
  const drawn = edges.filter((edge) => places.has(edge.from) && places.has(edge.to))
    .map((edge) => drawEdge(edge, places, layout, most)).filter(Boolean);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${layout.height}`, width, height: layout.height, role: "img", "aria-label": describe(tree) },
    ...drawn.map(({ line }) => line), ...sorted.map((node) => drawNode(node, layout)), ...drawn.map(({ label }) => label));
  place.replaceChildren(picture, ...leftOut(tree));
}

function leftOut(tree) {
  return tree.left_out > 0 ? [html("p", { class: "empty" }, `and ${many(tree.left_out, "more mirror")} that no neighbour knows`)] : [];
}

/** What the picture says to those who do not see it; the tables have the rest. */
function describe(tree) {
  const away = tree.servers.filter((server) => server.reachable === false).length;
  const clients = total(tree.clients, "count");
  return `${many(tree.servers.length, "server")}, ${away} of them away, ${many(clients, "client")}; the tables of servers and links have the same figures`;
}

function drawEdge(edge, places, layout, most) {
  const [from, to] = [places.get(edge.from), places.get(edge.to)];
  // On a narrow screen there is room for one edge to each server; the table of links has the others.
  if (layout.narrow && to.parent !== from) return null;
  const { path, spine, x, y, anchor } = layout.narrow ? elbow(from, to) : curve(from, to, layout.dense);
  const width = edge.state === "spare" || edge.state === "lost" ? 1.5 : 1.25 + 6 * Math.sqrt(edge.bytes / most);
  const line = svg("path", { class: `edge ${edge.state}`, d: path, "stroke-width": width.toFixed(2), "data-edge": edge.id, "data-state": edge.state, "data-bytes": edge.bytes });
  const label = svg("text", { class: `flow ${edge.state}`, x, y, "text-anchor": anchor, "data-edge": edge.id }, ...words(edge, layout, x, width));
  return { line: spine ? svg("g", {}, svg("path", { class: "spine", d: spine }), line) : line, label };
}

/** What is written on an edge: its rate, and under it how long requests take, or what is wrong. */
function words(edge, layout, x, width) {
  const waited = edge.latency ? `p99 ${ms(edge.latency.p99_ms)}` : edge.mean ? `mean ${ms(edge.mean)}` : "";
  const more = { lost: "✕ fails", spare: "spare", slow: "⚠ " + waited }[edge.state] ?? waited;
  const flows = edge.state === "flows" || edge.state === "slow";
  if (layout.narrow) return [flows ? [rate(edge.bytes), more].filter(Boolean).join(" · ") : more];
  if (!flows) return [svg("tspan", { x, dy: "0.35em" }, more)];
  const above = -(width / 2 + 4);
  if (!more || layout.dense) return [svg("tspan", { x, dy: above, class: "strong" }, rate(edge.bytes))];
  return [svg("tspan", { x, dy: above, class: "strong" }, rate(edge.bytes)), svg("tspan", { x, dy: width + 18 }, more)];
}

function curve(from, to, dense) {
  const [x1, y1, x2, y2] = [from.x + from.width, from.y + from.height / 2, to.x, to.y + to.height / 2];
  if (x2 <= x1) return backwards(from, to);
  const bend = (x2 - x1) * 0.45;
  // The point of the curve where its label stands: nearer to its end where many begin together.
  const [along, across] = dense ? [0.67, 0.784] : [0.57, 0.66];
  return { path: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`, x: x1 + (x2 - x1) * along, y: y1 + (y2 - y1) * across, anchor: "middle" };
}

/** An edge to a server that stands at the same depth or further left. */
function backwards(from, to) {
  const [x1, y1, x2, y2] = [from.x + from.width, from.y + from.height / 2, to.x, to.y + to.height / 2];
  const down = Math.max(y1, y2) + to.height * 0.65;
  return { path: `M${x1} ${y1}C${x1 + 60} ${down} ${x2 - 60} ${down} ${x2} ${y2}`, x: (x1 + x2) / 2, y: down - 10, anchor: "middle" };
}

function elbow(from, to) {
  const x = Math.min(from.x, to.x - 10) + 9;
  const y = to.y + to.height / 2;
  return { path: `M${x} ${y}H${to.x}`, spine: `M${x} ${from.y + from.height}V${y}`, x: to.x + 2, y: to.y - 6, anchor: "start" };
}

function drawNode(node, layout) {
  return node.server ? drawServer(node, layout) : drawClients(node);
}

function drawClients({ x, y, width, height, clients }) {
  const where = clients.exports.length === 1 ? clients.exports[0] : many(clients.exports.length, "export");
  const letters = Math.floor((width - 28) / 6.6);
  return svg("g", { class: "clients", transform: `translate(${x} ${y})`, "data-clients": clients.count },
    svg("rect", { class: "box", width, height, rx: height / 2 }),
    svg("text", { x: 16, y: height / 2 - 3, class: "strong" }, many(clients.count, "client")),
    svg("text", { x: 16, y: height / 2 + 11, class: "dim" }, shorten(where, letters)));
}

/** How a server is, by a sign and a word. */
export function condition(server) {
  if (server.reachable === false) return { state: "lost", sign: "✕", word: "away" };
  if (server.cache_failed) return { state: "bad", sign: "✕", word: "disk failed" };
  if (server.draining) return { state: "warn", sign: "⚠", word: "out of service" };
  if (server.thrashing) return { state: "warn", sign: "⚠", word: "cache too small" };
  if (server.total.errors_per_second > 0) return { state: "warn", sign: "⚠", word: "errors" };
  if (server.reachable === null) return { state: "unknown", sign: "?", word: "not asked" };
  return { state: "fine", sign: "●", word: "answers" };
}

/** What it is, in a word. */
export function kindOf(server) {
  return { serve: "real images", mirror: "mirror" }[server.role] ?? "server";
}

function drawServer({ x, y, width, height, server }, { dense }) {
  const { state, sign, word } = condition(server);
  const letters = Math.floor((width - 38) / 8);
  const kind = [kindOf(server), state === "fine" ? null : word, server.this ? "this server" : null].filter(Boolean).join(" · ");
  const p99 = server.total.latency ? ` · p99 ${ms(server.total.latency.p99_ms)}` : "";
  const out = rate(server.total.read_bytes_per_second + server.total.written_bytes_per_second);
  const flow = server.reachable ? `${out} · ${perSecond(server.total.requests_per_second)}${p99}` : server.reachable === null ? "" : server.error ?? "";
  return svg("g", {
    class: `server ${state}`, transform: `translate(${x} ${y})`, "data-server": server.id, "data-sample": server.sample, "data-state": state,
    "data-reachable": String(server.reachable), "data-read": server.total.read_bytes_per_second, "data-requests": server.total.requests_per_second,
  },
  svg("rect", { class: server.this ? "box this" : "box", width, height, rx: 8 }),
  svg("text", { x: 12, y: 19, class: `sign ${state}` }, sign),
  svg("text", { x: 28, y: 19, class: "strong" }, shorten(server.name, letters)),
  svg("text", { x: 12, y: 36, class: "dim" }, shorten(kind, Math.floor((width - 20) / 6.4))),
  ...(dense || isBare({ server }) ? [] : [svg("text", { x: 12, y: 52 }, shorten(flow, Math.floor((width - 20) / 6.8))), ...bar(server, width, height)]));
}

/** How much of its images a server has. */
function bar(server, width, height) {
  const size = total(server.images, "size");
  if (size === 0) return [];
  const here = total(server.images, "resident_bytes");
  const zero = total(server.images, "zero_bytes");
  const length = width - 24 - 54;
  return [
    svg("rect", { class: "cell", x: 12, y: height - 17, width: length, height: 6, rx: 3 }),
    svg("rect", { class: "resident", x: 12, y: height - 17, width: (length * here) / size, height: 6, rx: 3 }),
    svg("rect", { class: "zero", x: 12 + (length * here) / size, y: height - 17, width: (length * zero) / size, height: 6 }),
    svg("text", { x: width - 12, y: height - 10, "text-anchor": "end", class: "dim" }, percent(here + zero, size)),
  ];
}
