"use strict";
// The page: which runs are shown, in which window of steps, and what stands beside their curves.

const embedded = document.getElementById("report-data");
const source = embedded ? fromReport(JSON.parse(embedded.textContent)) : fromServer();
const BUCKETS = 700;
const state = { runs: [], chosen: [], series: {}, details: {}, judged: {}, window: null, marked: null, failed: {}, said: "" };
const main = document.getElementById("main");
let charts = [];

const room = {
  window: () => state.window || extent(),
  zoom(window) {
    state.window = window;
    if (!window) state.marked = null;
    remember();
    refresh(state.chosen);
  },
  marked: () => state.marked,
  theme: () => shownTheme(),
  colour: (name) => resolved(name),
};

function resolved(name) {
  const probe = resolved.probe || (resolved.probe = document.body.appendChild(make("span", { hidden: true })));
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

function extent() {
  let first = Infinity, last = -Infinity;
  for (const id of state.chosen) {
    const series = state.series[id];
    if (!series || !series.last_step) continue;
    first = Math.min(first, series.first_step);
    last = Math.max(last, series.last_step);
  }
  return last >= first ? [Math.min(first, last - 1), last] : [0, 1];
}

function colourOf(id) {
  const place = state.chosen.indexOf(id);
  return place < 0 ? null : RUN_COLOURS[place % RUN_COLOURS.length];
}

function known(id) {
  return state.runs.find((run) => run.id === id);
}

// ---- which runs

function remember() {
  if (source.isReport) return;
  const said = new URLSearchParams({ runs: state.chosen.join(",") });
  if (state.window) said.set("steps", state.window.join("-"));
  history.replaceState(null, "", `${location.pathname}?${said}`);
}

function recall() {
  const said = new URLSearchParams(location.search);
  state.chosen = (said.get("runs") || "").split(",").filter((id) => known(id));
  const window = (said.get("steps") || "").split("-").map(Number);
  if (window.length === 2 && window.every(Number.isFinite) && window[1] > window[0]) state.window = window;
  if (!state.chosen.length && state.runs.length) {
    const running = state.runs.find((run) => run.state === "running");
    state.chosen = [(running || state.runs[state.runs.length - 1]).id];
  }
}

function focus(id) {
  state.chosen = [id];
  state.window = state.marked = null;
  changed();
}

function lay(id) {
  const place = state.chosen.indexOf(id);
  state.said = "";
  if (place < 0 && state.chosen.length >= RUN_COLOURS.length) state.said = `No more than ${RUN_COLOURS.length} runs can lie over each other; take one away first.`;
  else if (place < 0) state.chosen.push(id);
  else if (state.chosen.length > 1) state.chosen.splice(place, 1);
  changed();
}

function changed() {
  remember();
  listRuns();
  build();
  refresh(state.chosen);
  if (state.chosen.length) attend(state.chosen[0]);
  for (const id of state.chosen.slice(1)) if (!state.details[id]) attend(id);
}

function listRuns() {
  const list = document.getElementById("runs");
  const now = JSON.stringify([state.runs, state.chosen]);
  if (listRuns.drawn === now) return;
  listRuns.drawn = now;
  const held = list.contains(document.activeElement) && [document.activeElement.closest(".run").dataset.id, document.activeElement.tagName];
  const rows = state.runs.map((run, number) => {
    const colour = colourOf(run.id);
    const box = make("input", { type: "checkbox", checked: Boolean(colour), ariaLabel: `Show the curves of ${run.name}`, title: "Lay over the others",
      onclick: (event) => { event.stopPropagation(); lay(run.id); } });
    const row = make("div", { className: `run${state.chosen[0] === run.id ? " focus" : ""}`, title: `${run.folder}/${run.name}`, onclick: () => focus(run.id) },
      box, make("button", { type: "button", className: "name", ariaCurrent: state.chosen[0] === run.id ? "true" : undefined }, run.name),
      make("span", { className: "state" }, `${number < 9 ? `${number + 1} \u00b7 ` : ""}${stateOf(run)}`));
    if (colour) row.style.setProperty("--of-run", colour);
    row.dataset.id = run.id;
    return row;
  });
  list.replaceChildren(...rows);
  const again = held && rows.find((row) => row.dataset.id === held[0]);
  if (again) again.querySelector(held[1].toLowerCase()).focus({ preventScroll: true });
}

// ---- what is shown of them

function build() {
  for (const chart of charts) chart.forget();
  charts = [];
  const id = state.chosen[0];
  if (!id) {
    main.replaceChildren(make("p", { className: "soft" }, "There is no run here yet. One that begins in these folders appears by itself."));
    return;
  }
  charts = CHARTS.map((chart) => new Chart(chart, room));
  main.replaceChildren(
    make("div", { id: "lead" }),
    make("section", { id: "health" }),
    make("section", { id: "curves" }, make("h2", {}, "Curves"), make("div", { className: "bar", id: "bar" }), make("div", { className: "curves" }, charts.map((chart) => chart.box)), make("div", { id: "blocks" })),
    make("section", { id: "sound" }), make("section", { id: "incidents" }), make("section", { id: "recipe" }));
  lead();
  health();
  besides();
  draw();
}

function draw() {
  const runs = state.chosen.filter((id) => state.series[id]).map((id) => ({ id, name: (known(id) || {}).name || "", colour: colourOf(id), series: state.series[id] }));
  const bar = document.getElementById("bar");
  if (bar) {
    const said = state.window ? `steps ${whole(state.window[0])} to ${whole(state.window[1])}` : "Drag across a curve to look closer, or press +.";
    if (!bar.childElementCount) bar.append(...windowButtons(), make("span", { className: "soft small", id: "said" }), make("span", { className: "key", id: "who" }));
    document.getElementById("said").textContent = said;
    document.getElementById("who").replaceChildren(...(runs.length > 1 ? runs.map((run) => { const swatch = make("span", { className: "swatch" }); swatch.style.setProperty("--of-run", run.colour); return make("span", {}, swatch, run.name); }) : []));
  }
  for (const chart of charts) chart.draw(runs);
}

function windowButtons() {
  const ways = [["+", "Closer (+)", () => move(0.5, 0)], ["\u2212", "Wider (\u2212)", () => move(2, 0)], ["\u2190", "Earlier (left arrow)", () => move(1, -0.5)],
    ["\u2192", "Later (right arrow)", () => move(1, 0.5)], ["All steps (z)", "", () => room.zoom(null)]];
  return ways.map(([text, title, onclick]) => make("button", { type: "button", title, ariaLabel: title || undefined, onclick }, text));
}

// A window so many times as wide, moved by such a share of its width, and never beyond the steps there are.
function move(wider, by) {
  const [first, last] = extent();
  const [from, to] = state.window || [first, last];
  const width = Math.min(last - first, Math.max(4, Math.round((to - from) * wider)));
  const middle = (from + to) / 2 + by * (to - from);
  const begin = Math.round(Math.max(first, Math.min(last - width, middle - width / 2)));
  room.zoom(begin <= first && begin + width >= last ? null : [begin, begin + width]);
}

// ---- asking

const asking = { under_way: {}, again: {} };

async function refresh(ids) {
  await Promise.all(ids.map(async (id) => {
    if (asking.under_way[id]) { asking.again[id] = true; return; }
    asking.under_way[id] = true;
    const [first, last] = state.window || [0, 2 ** 52];
    try {
      state.series[id] = await source.series(id, first, last, BUCKETS);
      delete state.failed[`series ${id}`];
    } catch (error) {
      state.failed[`series ${id}`] = String(error.message || error);
    }
    asking.under_way[id] = false;
    if (asking.again[id]) { asking.again[id] = false; await refresh([id]); }
  }));
  draw();
  lead();
}

async function attend(id) {
  attend.last = Date.now();
  await Promise.all([["details", besides], ["judged", health]].map(async ([what, show]) => {
    try {
      state[what][id] = await source[what](id);
      delete state.failed[`${what} ${id}`];
    } catch (error) {
      state.failed[`${what} ${id}`] = String(error.message || error);
      if (what === "judged") state.judged[id] = { problem: String(error.message || error), findings: [] };
    }
    if (state.chosen.includes(id)) show();
  }));
  lead();
}

const ATTEND_MS = 10_000; // health and the like are asked for no more often while a run grows
const due = { series: new Set(), details: new Set(), timer: null };

function soon() {
  if (due.timer) return;
  due.timer = setTimeout(() => {
    due.timer = null;
    const series = [...due.series], details = [...due.details];
    due.series.clear();
    due.details.clear();
    if (series.length) refresh(series);
    for (const id of details) attend(id);
  }, 250);
}

function hear(kind, found) {
  const link = document.getElementById("link");
  if (kind === "open") { link.textContent = "live"; link.className = "link live"; }
  if (kind === "ended") { link.textContent = "this dashboard has ended; open the link of a new one"; link.className = "link lost"; }
  if (kind === "lost") { link.textContent = "no answer; trying again"; link.className = "link lost"; }
  if (kind === "runs") {
    state.runs = found;
    if (!state.chosen.length) { recall(); changed(); } else { listRuns(); lead(); }
  }
  if (kind === "grown" && state.chosen.includes(found.id)) {
    const before = state.series[found.id];
    if (Date.now() - (attend.last || 0) > ATTEND_MS && found.id === state.chosen[0]) due.details.add(found.id);
    clearTimeout(hear.after);
    hear.after = setTimeout(() => attend(state.chosen[0]), ATTEND_MS); // and once more when it has become quiet
    const run = known(found.id);
    if (run && found.last_step > run.step) run.step = found.last_step;
    due.series.add(found.id);
    if (!before || found.n_validations !== before.n_validations || found.n_events !== before.n_events) due.details.add(found.id);
    soon();
  }
}

// ---- light, keys

function shownTheme() {
  return document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("unbraid-theme", theme); } catch { /* a file opened from a letter may have no storage */ }
  draw();
}

function go(section) {
  const place = document.getElementById(section);
  if (place) place.scrollIntoView({ behavior: "smooth" });
}

const KEYS = {
  j: () => step(1), k: () => step(-1), z: () => room.zoom(null), t: () => setTheme(shownTheme() === "dark" ? "light" : "dark"),
  "+": () => move(0.5, 0), "-": () => move(2, 0), ArrowLeft: () => move(1, -0.5), ArrowRight: () => move(1, 0.5),
  h: () => go("health"), c: () => go("curves"), s: () => go("sound"), i: () => go("incidents"), r: () => go("recipe"),
  "?": () => document.getElementById("keys").showModal(),
};

function step(by) {
  const place = state.runs.findIndex((run) => run.id === state.chosen[0]);
  const next = state.runs[place + by];
  if (next) focus(next.id);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA|AUDIO)$/.test(event.target.tagName)) return;
  const run = /^[1-9]$/.test(event.key) && state.runs[Number(event.key) - 1];
  if (run) lay(run.id);
  else if (KEYS[event.key]) KEYS[event.key]();
});
document.getElementById("theme").addEventListener("click", KEYS.t);
document.getElementById("help").addEventListener("click", KEYS["?"]);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
addEventListener("resize", () => {
  clearTimeout(room.resizing);
  room.resizing = setTimeout(() => charts.forEach((chart) => chart.plot && chart.plot.setSize(chart.size())), 120);
});

// Paper is light, has a width of its own, and cannot open what is closed.
addEventListener("beforeprint", () => {
  start.before = [document.documentElement.dataset.theme, [...document.querySelectorAll("details:not([open])")]];
  document.documentElement.dataset.theme = "light";
  for (const closed of start.before[1]) closed.open = true;
  draw();
  for (const chart of charts) if (chart.plot) chart.plot.setSize({ ...chart.size(), width: chart.chart.strip ? 660 : 310 });
});
addEventListener("afterprint", () => {
  const [theme, closed] = start.before;
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  for (const one of closed) one.open = false;
  draw();
  for (const chart of charts) if (chart.plot) chart.plot.setSize(chart.size());
});

async function start() {
  try { const theme = localStorage.getItem("unbraid-theme"); if (theme) document.documentElement.dataset.theme = theme; } catch { /* as above */ }
  if (source.isReport) document.body.classList.add("report");
  try {
    state.runs = await source.runs();
  } catch (error) {
    main.replaceChildren(make("p", {}, String(error.message || error)));
    return;
  }
  recall();
  changed();
  source.listen(hear);
}

start();
