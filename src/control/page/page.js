// The status page: asks the admin API every second and shows what it says. It only reads.
//
// One round of requests at a time: the next begins a second after the last one, later while the server does not answer, and
// not at all while nobody looks. The token, if the server wants one, is kept in this tab's session storage and sent in a header;
// it is never part of an address.

import { charts, others } from "./chart.js";
import { html, keyed, mark, say } from "./dom.js";
import { ago, clock, count, many, ms, percent, perSecond, rate, size } from "./format.js";
import { newPicture, updatePicture } from "./picture.js";
import { byMost, nothing, table } from "./tables.js";
import { condition, draw, kindOf } from "./tiers.js";

const ROUND = 1000;
const LONGEST_PAUSE = 15000;
const PATIENCE = 10000;
/** What is shown at most: the rest is a number. */
const MOST = { clients: 100, charts: 6, pictures: 16, orders: 50 };
/** Cells of a picture. */
const CELLS = 256;
const TOKEN = "headwater-token";

const at = (id) => document.getElementById(id);
let seen = null;
let failures = 0;
let latest = null;
let rounds = 0;

class Refused extends Error {}

/** One answer of the API. */
async function ask(path, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, signal, cache: "no-store", credentials: "omit", redirect: "error" });
  if (answer.status === 401) throw new Refused(token ? "The server refuses this token." : "");
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error ?? `the server answers with ${answer.status}`);
  return body;
}

/** Everything that is shown, in one round. */
async function round() {
  const control = new AbortController();
  const timer = setTimeout(() => control.abort(new Error("it takes too long")), PATIENCE);
  try {
    const of = (path) => ask(path, control.signal);
    // One question alone before the first round: it may be answered with a question for the token.
    if (!latest) await of("/v1/load?seconds=5");
    const [tree, load, history, status] = await Promise.all(["/v1/tree", "/v1/load?seconds=5", "/v1/history", "/v1/status"].map(of));
    const pictures = await residencies(status, of);
    return { tree, load, history, status, pictures };
  } finally {
    clearTimeout(timer);
  }
}

/** What is here of each image; every other round, because it takes the server a look at every chunk. */
async function residencies(status, of) {
  if (latest && rounds % 2 === 1) return latest.pictures;
  const images = status.images.slice(0, MOST.pictures);
  const asked = images.map(async (image) => {
    try {
      return [image.name, await of(`/v1/images/${encodeURIComponent(image.name)}/residency?cells=${CELLS}`)];
    } catch (error) {
      // An image may have been replaced meanwhile: the next round knows.
      if (error instanceof Refused || error.name === "AbortError") throw error;
      return null;
    }
  });
  return new Map((await Promise.all(asked)).filter(Boolean));
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Resolves when somebody looks at the page. */
function looked() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", () => resolve(looked()), { once: true }));
}

async function run() {
  for (;;) {
    await looked();
    const began = performance.now();
    try {
      latest = await round();
      rounds += 1;
      failures = 0;
      seen = Date.now() / 1000;
      show(latest);
      alive();
    } catch (error) {
      if (error instanceof Refused) {
        await askForToken(error.message);
        continue;
      }
      failures += 1;
      away(error);
    }
    const wanted = Math.min(LONGEST_PAUSE, ROUND * 2 ** Math.max(0, failures - 1));
    await pause(Math.max(wanted - (performance.now() - began), ROUND / 4));
  }
}

/** Asks for the token until one was given. */
function askForToken(why) {
  sessionStorage.removeItem(TOKEN);
  const [dialog, form, field] = [at("ask"), at("ask-form"), at("token")];
  say(at("ask-error"), why);
  state("waiting", "Waiting for the token");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      if (field.value.trim() === "") return;
      sessionStorage.setItem(TOKEN, field.value.trim());
      field.value = "";
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
}

/** Says how the page itself is: aloud only when that changes. */
function state(name, text) {
  const line = at("state");
  if (line.dataset.state !== name) say(at("news"), text);
  mark(line, "data-state", name);
  say(at("state-text"), text);
}

function alive() {
  document.body.classList.remove("old");
  state("live", `Live, as of ${clock(latest.load.at)}`);
}

function away(error) {
  document.body.classList.add("old");
  document.body.dataset.failures = failures;
  const since = seen ? `last seen ${clock(seen)}, ${ago(Date.now() / 1000 - seen)} ago` : "not seen yet";
  state("away", `The server does not answer: ${since}`);
  at("state").title = String(error.message ?? error);
}

function show({ tree, load, history, status, pictures }) {
  document.body.dataset.failures = 0;
  showWho(status);
  showNow(load, status);
  showAlarms(status);
  draw(at("tiers"), tree);
  charts(at("latency"), history, MOST.charts);
  at("latency").dataset.others = others(history, MOST.charts);
  showImages(status.images, pictures);
  showOrders(status);
  showServers(tree);
  showLinks(tree);
  showExports(load.exports);
  showClients(load.clients);
  // Last: whoever sees this number sees all that belongs to it.
  document.body.dataset.tree = tree.servers.map((server) => server.sample).join(" ");
  document.body.dataset.sample = load.sample;
}

function showWho(status) {
  const { role, host, version, pid, uptime_seconds: uptime } = status;
  say(at("who"), `${kindOf({ role })} on ${host || "this machine"} · process ${pid} · version ${version} · up ${ago(uptime)}`);
  document.title = `Headwater: ${role} on ${host || "this machine"}`;
}

/** The few numbers to look at first. */
function showNow(load, status) {
  const { total } = load;
  const hits = load.exports.reduce((sum, each) => sum + each.hit_bytes_per_second, 0);
  const misses = load.exports.reduce((sum, each) => sum + each.miss_bytes_per_second, 0);
  const facts = [
    ["clients", "Clients", load.clients.length, count(load.clients.length)],
    ["requests", "Requests", total.requests_per_second, perSecond(total.requests_per_second)],
    ["read", "Read", total.read_bytes_per_second, rate(total.read_bytes_per_second)],
    ["written", "Written", total.written_bytes_per_second, rate(total.written_bytes_per_second)],
    ["p50", "Latency p50", total.latency?.p50_ms, ms(total.latency?.p50_ms)],
    ["p99", "Latency p99", total.latency?.p99_ms, ms(total.latency?.p99_ms)],
    ["waiting", "Waiting", total.in_flight, count(total.in_flight)],
    ["errors", "Errors", total.errors_per_second, perSecond(total.errors_per_second)],
    status.role === "mirror" && ["hits", "From the cache", hits, percent(hits, hits + misses)],
  ].filter(Boolean);
  keyed(at("now"), facts, ([name]) => name, () => html("div", {}, html("dt"), html("dd")), (pair, [name, title, value, text]) => {
    mark(pair, "data-figure", name);
    mark(pair, "data-value", value ?? "");
    mark(pair, "data-bad", name === "errors" && value > 0);
    say(pair.firstElementChild, title);
    say(pair.lastElementChild, text);
  });
}

/** What an operator must not overlook. */
function showAlarms({ cache, draining, images }) {
  const alarms = [];
  if (cache?.failed) alarms.push("The disk of the cache failed too often and is not used any more: everything comes from the upstreams.");
  if (cache?.thrashing) alarms.push("The cache is too small for its load.");
  if (draining.all) alarms.push(`Out of service: newcomers are sent away; ${many(draining.clients.length, "connection")} left.`);
  else if (draining.exports.length > 0) alarms.push(`Out of service: ${draining.exports.join(", ")}; ${many(draining.clients.length, "connection")} left.`);
  for (const { name, mirror } of images) {
    for (const { uri, current, reachable, last_error: error } of mirror?.upstreams ?? []) {
      if (current && reachable === false) alarms.push(`${name}: its upstream ${uri} cannot be reached: ${error ?? "no reason is known"}.`);
    }
  }
  at("alarms").hidden = alarms.length === 0;
  keyed(at("alarms"), alarms, (text) => text, () => html("li"), (line, text) => say(line, text));
}

function showImages(images, pictures) {
  const place = at("images");
  if (images.length === 0) return nothing(place, "There is no image.");
  place.querySelector("p.empty")?.remove();
  const make = () => html("article", {}, html("h3"), html("p", { class: "about" }), newPicture());
  keyed(place, images, (image) => image.name, make, (article, image) => {
    const { name, kind, size: bytes, identity, clients, mirror } = image;
    article.dataset.image = name;
    for (const figure of ["resident_bytes", "zero_bytes", "pinned_bytes"]) mark(article, "data-" + figure.replace("_", "-"), mirror?.[figure]);
    say(article.firstElementChild, name === "" ? "(the default image)" : name);
    const checked = identity ? identity.slice(0, 15) : "no identity";
    const hits = mirror ? `hit rate ${percent(mirror.hits, mirror.hits + mirror.misses)}` : null;
    const evicted = mirror?.evicted_bytes > 0 ? `${size(mirror.evicted_bytes)} evicted` : null;
    const facts = [kind, size(bytes), checked, many(clients, "client"), hits, evicted];
    say(article.children[1], facts.filter(Boolean).join(" · "));
    const picture = pictures.get(name);
    if (picture) updatePicture(article.lastElementChild, picture);
  });
}

/** All orders at work, in one form: what, of which image, how far of how much. */
function runningOrders({ orders, redirects, casts, jobs, receptions }) {
  const left = (seconds) => (seconds === null || seconds === undefined ? null : `${ago(seconds)} left`);
  const late = (seconds) => (seconds > 0 ? `${ago(seconds)} late` : null);
  const prefetches = orders.map((one) => ({
    key: "prefetch " + one.order, kind: "prefetch", of: one.image, done: one.here_bytes, all: one.total_bytes, unit: size,
    more: [one.what, one.held ? "waits for a cast" : null, left(one.expected_end_seconds), late(one.late_by_seconds)],
  }));
  const moves = redirects.map((one) => ({
    key: "redirect " + one.order, kind: "redirect", of: one.export, done: one.counts.total - one.counts.waiting - one.counts.moving, all: one.counts.total, unit: count,
    more: ["to " + one.to.join(", "), one.counts.failed > 0 ? `${count(one.counts.failed)} failed` : null],
  }));
  const sendings = casts.map((one) => ({
    key: "cast " + one.cast, kind: "cast", of: one.image, done: one.passed_blocks, all: one.blocks, unit: count,
    more: ["to " + one.group, one.state, many(one.receivers.length, "receiver"), rate(one.rate)],
  }));
  const checks = jobs.map((one) => ({
    key: "job " + one.job, kind: "verify", of: one.image, done: one.done_bytes, all: one.total_bytes, unit: size,
    more: [one.damaged_chunks > 0 ? `${count(one.damaged_chunks)} damaged` : "nothing damaged so far"],
  }));
  const hearing = receptions.flatMap((group) => group.sessions.filter((one) => one.state === "receiving").map((one) => ({
    key: "reception " + one.session, kind: "reception", of: one.image, done: one.done_blocks, all: one.blocks, unit: count, more: ["from " + group.group],
  })));
  return [...prefetches, ...moves, ...sendings, ...checks, ...hearing];
}

function showOrders(status) {
  const [place, orders] = [at("orders"), runningOrders(status)];
  if (orders.length === 0) return nothing(place, "Nothing is ordered.");
  if (!place.querySelector("ul")) place.replaceChildren(html("ul", { class: "orders" }));
  const make = () => html("li", {}, html("span", { class: "strong" }), html("progress"), html("span", { class: "far" }), html("span", { class: "note" }));
  keyed(place.firstElementChild, orders.slice(0, MOST.orders), (order) => order.key, make, (line, { key, kind, of, done, all, unit, more }) => {
    const [title, bar, far, note] = line.children;
    Object.assign(line.dataset, { order: key, done, all });
    say(title, `${kind} ${of}`);
    mark(bar, "aria-label", `${key} of ${of}`);
    bar.max = Math.max(all, 1);
    bar.value = done;
    say(far, `${unit(done)} of ${unit(all)}, ${percent(done, all)}`);
    say(note, more.filter(Boolean).join(" · "));
  });
}

const latencyColumns = [
  { name: "p50", title: "p50", number: true, value: ({ rates }) => rates.latency?.p50_ms ?? "", text: ({ rates }) => ms(rates.latency?.p50_ms) },
  { name: "p99", title: "p99", number: true, value: ({ rates }) => rates.latency?.p99_ms ?? "", text: ({ rates }) => ms(rates.latency?.p99_ms) },
];
const rateColumns = [
  { name: "requests", title: "Requests", number: true, value: ({ rates }) => rates.requests_per_second, text: ({ rates }) => perSecond(rates.requests_per_second) },
  { name: "read", title: "Read", number: true, value: ({ rates }) => rates.read_bytes_per_second, text: ({ rates }) => rate(rates.read_bytes_per_second) },
  { name: "written", title: "Written", number: true, value: ({ rates }) => rates.written_bytes_per_second, text: ({ rates }) => rate(rates.written_bytes_per_second) },
  { name: "waiting", title: "Waiting", number: true, value: ({ rates }) => rates.in_flight, text: ({ rates }) => count(rates.in_flight) },
  { name: "errors", title: "Errors", number: true, value: ({ rates }) => rates.errors_per_second, text: ({ rates }) => perSecond(rates.errors_per_second), bad: ({ rates }) => rates.errors_per_second > 0 },
];

function showServers(tree) {
  const here = (server, figure) => server.images.reduce((sum, image) => sum + image[figure], 0);
  const columns = [
    { name: "server", title: "Server", text: ({ server }) => server.name, note: ({ server }) => [kindOf(server), server.this ? "this one" : null, server.host].filter(Boolean).join(" · ") },
    { name: "state", title: "State", text: ({ server }) => `${condition(server).sign} ${condition(server).word}`, bad: ({ server }) => server.reachable === false,
      note: ({ server }) => (server.reachable === false ? [server.error, server.seen_seconds_ago === null ? null : `seen ${ago(server.seen_seconds_ago)} ago`].filter(Boolean).join("; ") : null) },
    { name: "clients", title: "Connections", number: true, value: ({ server }) => server.connections, text: ({ server }) => count(server.connections) },
    ...rateColumns, ...latencyColumns,
    { name: "here", title: "Here", number: true, value: ({ server }) => here(server, "resident_bytes") + here(server, "zero_bytes"), text: ({ server }) => percent(here(server, "resident_bytes") + here(server, "zero_bytes"), here(server, "size")) },
  ];
  const rows = tree.servers.map((server) => ({ server, rates: server.total }));
  table(at("servers"), "Servers of the tree, this one first", columns, rows, ({ server }) => server.id, "Nothing is known of any server.",
    ({ server }) => ({ server: server.id, name: server.name, sample: server.sample, reachable: String(server.reachable) }));
}

function showLinks(tree) {
  const names = new Map(tree.servers.map((server) => [server.id, server.name]));
  const trouble = (edge) => edge.reachable === false;
  const word = (edge) => (trouble(edge) ? "✕ fails" : edge.current ? "in use" : "spare");
  const columns = [
    { name: "link", title: "From and to", text: (edge) => `${names.get(edge.from)} → ${names.get(edge.to)}`, note: (edge) => edge.image },
    { name: "state", title: "State", text: word, bad: trouble },
    { name: "bytes", title: "Bytes", number: true, value: (edge) => edge.bytes_per_second, text: (edge) => rate(edge.bytes_per_second) },
    { name: "requests", title: "Requests", number: true, value: (edge) => edge.requests_per_second, text: (edge) => perSecond(edge.requests_per_second) },
    { name: "p50", title: "p50", number: true, value: (edge) => edge.latency?.p50_ms ?? "", text: (edge) => ms(edge.latency?.p50_ms) },
    { name: "p99", title: "p99", number: true, value: (edge) => edge.latency?.p99_ms ?? "", text: (edge) => ms(edge.latency?.p99_ms) },
    { name: "connections", title: "Connections", number: true, value: (edge) => edge.connections, text: (edge) => count(edge.connections) },
  ];
  const hurts = byMost((edge) => (trouble(edge) ? 1 : 0), (edge) => edge.latency?.p99_ms ?? 0, (edge) => edge.bytes_per_second);
  const key = (edge) => [edge.from, edge.to, edge.node, edge.uri].join("\u0000");
  table(at("links"), "Links between the servers, what hurts first", columns, [...tree.edges].sort(hurts), key, "No server here reads from another.",
    (edge) => ({ from: names.get(edge.from), to: names.get(edge.to), image: edge.image, reachable: String(edge.reachable) }));
}

function showExports(exports) {
  const columns = [
    { name: "export", title: "Export", text: (row) => (row.export === "" ? "(the default export)" : row.export) },
    { name: "clients", title: "Clients", number: true, value: (row) => row.clients, text: (row) => count(row.clients) },
    ...rateColumns, ...latencyColumns,
    { name: "hits", title: "From the cache", number: true, value: (row) => row.hit_bytes_per_second, text: (row) => percent(row.hit_bytes_per_second, row.hit_bytes_per_second + row.miss_bytes_per_second) },
  ];
  const hurts = byMost((row) => row.rates.errors_per_second, (row) => row.rates.latency?.p99_ms ?? 0, (row) => row.clients);
  table(at("exports"), "Exports of this server, what hurts first", columns, [...exports].sort(hurts), (row) => row.export, "No export had a client so far.", (row) => ({ export: row.export }));
}

function showClients(clients) {
  const columns = [
    { name: "client", title: "Client", text: (row) => row.peer, note: (row) => (row.mirror ? `a mirror, ${row.mirror.slice(0, 8)}` : "") },
    { name: "export", title: "Export", text: (row) => row.export },
    ...rateColumns,
    { name: "mean", title: "Mean", number: true, value: (row) => row.mean_ms ?? "", text: (row) => ms(row.mean_ms) },
  ];
  const hurts = byMost((row) => row.rates.errors_per_second, (row) => row.mean_ms ?? 0, (row) => row.rates.in_flight, (row) => row.rates.requests_per_second);
  const sorted = [...clients].sort(hurts);
  table(at("clients"), "Clients of this server, what hurts first", columns, sorted.slice(0, MOST.clients), (row) => row.id, "No client is connected.", (row) => ({ client: row.id }));
  let more = at("clients").querySelector("p.more");
  if (sorted.length <= MOST.clients) return more?.remove();
  if (!more) at("clients").append((more = html("p", { class: "more" })));
  say(more, `and ${count(sorted.length - MOST.clients)} more`);
}

/** Draws again what depends on the width. */
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => latest && show(latest), 100);
});

run();
