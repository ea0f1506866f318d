// The page: which runs are selected, which steps are in view, loading data, keys and printing.

import { CHARTS, Chart } from "./charts.js";
import { element, swatch } from "./dom.js";
import { integer, RUN_COLOURS, runStatus } from "./labels.js";
import { showDetails, showDiagnosis, showSummary } from "./panels.js";
import { allSteps, runById, runColour, runName, source, state } from "./state.js";
import { cssColour, currentTheme, darkScheme, restoreTheme, switchTheme } from "./theme.js";

const BUCKETS = 700; // about one per pixel of a chart
const MAX_STEP = 2 ** 52;
const DETAILS_MS = 10_000; // details and diagnosis of a growing run are loaded no more often than this

const main = document.getElementById("main");
let charts = [];

// What the charts need to know of the page.
const view = {
  window: () => state.window ?? allSteps(),
  zoom,
  highlight: () => state.highlight,
  theme: currentTheme,
  colour: cssColour,
};

// ---- The window of steps

function zoom(window) {
  state.window = window;
  if (!window) state.highlight = null;
  saveToAddress();
  loadSeries(state.selected);
}

// Widen the window by a factor and shift it by a share of its width, within the steps that exist.
function moveWindow(factor, shift) {
  const [firstStep, lastStep] = allSteps();
  const [first, last] = state.window ?? [firstStep, lastStep];
  const width = Math.min(lastStep - firstStep, Math.max(4, Math.round((last - first) * factor)));
  const centre = (first + last) / 2 + shift * (last - first);
  const begin = Math.round(Math.max(firstStep, Math.min(lastStep - width, centre - width / 2)));
  zoom(begin <= firstStep && begin + width >= lastStep ? null : [begin, begin + width]);
}

// Show the steps of a finding, with a margin; `zoomed` in report.py includes the same steps.
function showSteps(first, last) {
  const margin = Math.max(20, Math.round(0.25 * (last - first)));
  state.highlight = [first, last];
  zoom([Math.max(0, first - margin), last + margin]);
  document.getElementById("curves").scrollIntoView({ behavior: "smooth" });
}

// ---- Which runs

// The address holds the selection and the window, so that a reload or a bookmark shows the same.
function saveToAddress() {
  if (source.isReport) return;
  const query = new URLSearchParams({ runs: state.selected.join(",") });
  if (state.window) query.set("steps", state.window.join("-"));
  history.replaceState(null, "", `${location.pathname}?${query}`);
}

function restoreFromAddress() {
  const query = new URLSearchParams(location.search);
  state.selected = (query.get("runs") ?? "").split(",").filter(runById);
  const [first, last] = (query.get("steps") ?? "").split("-").map(Number);
  if (Number.isFinite(first) && last > first) state.window = [first, last];
  if (!state.selected.length && state.runs.length) {
    const running = state.runs.find((run) => run.state === "running");
    state.selected = [(running ?? state.runs.at(-1)).id];
  }
}

function showRun(id) {
  state.selected = [id];
  state.window = null;
  state.highlight = null;
  selectionChanged();
}

// Add a run to the charts or take it away.
function toggleRun(id) {
  state.notice = "";
  const index = state.selected.indexOf(id);
  if (index < 0 && state.selected.length >= RUN_COLOURS.length) {
    state.notice = `At most ${RUN_COLOURS.length} runs can be shown together. Remove one first.`;
  } else if (index < 0) {
    state.selected.push(id);
  } else if (state.selected.length > 1) {
    state.selected.splice(index, 1);
  }
  selectionChanged();
}

function selectionChanged() {
  saveToAddress();
  showRunList();
  buildMain();
  loadSeries(state.selected);
  for (const [index, id] of state.selected.entries()) {
    if (index === 0 || !state.details[id]) loadDetails(id);
  }
}

function showNextRun(offset) {
  const index = state.runs.findIndex((run) => run.id === state.selected[0]);
  const next = state.runs[index + offset];
  if (next) showRun(next.id);
}

let shownList = "";

function showRunList() {
  const content = JSON.stringify([state.runs, state.selected]);
  if (content === shownList) return;
  shownList = content;
  const list = document.getElementById("runs");

  // The list changes while a run grows: give the focus back to the same run's checkbox or button.
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const focusedTag = focused?.tagName.toLowerCase();
  const focusedId = focused?.closest(".run").dataset.id;
  const rows = state.runs.map(runRow);
  list.replaceChildren(...rows);
  const row = focused && rows.find((candidate) => candidate.dataset.id === focusedId);
  row?.querySelector(focusedTag).focus({ preventScroll: true });
}

function runRow(run, index) {
  const colour = runColour(run.id);
  const isShown = state.selected[0] === run.id;
  const checkbox = element("input", {
    type: "checkbox",
    checked: Boolean(colour),
    ariaLabel: `Show the curves of ${run.name}`,
    title: "Add to the charts",
    onclick(event) {
      event.stopPropagation(); // a click on the row shows this run alone
      toggleRun(run.id);
    },
  });
  const button = element("button", { type: "button", className: "name", ariaCurrent: isShown && "true" }, run.name);
  const key = index < 9 ? `${index + 1} \u00b7 ` : "";
  const row = element(
    "div",
    { className: isShown ? "run shown" : "run", title: `${run.folder}/${run.name}`, onclick: () => showRun(run.id) },
    checkbox,
    button,
    element("span", { className: "state" }, key + runStatus(run)),
  );
  if (colour) row.style.setProperty("--run-colour", colour);
  row.dataset.id = run.id;
  return row;
}

// ---- The page of the selected runs

function buildMain() {
  for (const chart of charts) chart.destroy();
  charts = [];
  if (!state.selected.length) {
    const text = "There is no run here yet. A run that starts in these folders will appear by itself.";
    main.replaceChildren(element("p", { className: "soft" }, text));
    return;
  }
  charts = CHARTS.map((spec) => new Chart(spec, view));
  const windowText = element("span", { className: "soft small", id: "window-text" });
  const bar = element("div", { className: "bar", id: "bar" }, windowButtons(), windowText);
  bar.append(element("span", { className: "legend", id: "run-names" }));
  const curves = element("div", { className: "curves" });
  curves.append(...charts.map((chart) => chart.box));
  main.replaceChildren(
    element("div", { id: "summary" }),
    element("section", { id: "health" }),
    element("section", { id: "curves" }, element("h2", {}, "Curves"), bar, curves, element("div", { id: "blocks" })),
    element("section", { id: "sound" }),
    element("section", { id: "incidents" }),
    element("section", { id: "recipe" }),
  );
  showSummary();
  showDiagnosis(showSteps);
  showDetails();
  drawCharts();
}

function windowButtons() {
  const buttons = [
    ["+", "Zoom in (+)", () => moveWindow(0.5, 0)],
    ["\u2212", "Zoom out (\u2212)", () => moveWindow(2, 0)],
    ["\u2190", "Earlier (left arrow)", () => moveWindow(1, -0.5)],
    ["\u2192", "Later (right arrow)", () => moveWindow(1, 0.5)],
    ["All steps (z)", undefined, () => zoom(null)],
  ];
  return buttons.map(([text, title, onclick]) =>
    element("button", { type: "button", title, ariaLabel: title, onclick }, text),
  );
}

function drawCharts() {
  if (!charts.length) return;
  const loaded = state.selected.filter((id) => state.series[id]);
  const runs = loaded.map((id) => ({ id, name: runName(id), colour: runColour(id), series: state.series[id] }));
  const [first, last] = state.window ?? [];
  document.getElementById("window-text").textContent = state.window
    ? `steps ${integer(first)} to ${integer(last)}`
    : "Drag across a chart, or press +, to zoom in.";
  const names = runs.map((run) => element("span", {}, swatch(run.colour), run.name));
  document.getElementById("run-names").replaceChildren(...(runs.length > 1 ? names : []));
  for (const chart of charts) chart.draw(runs);
}

// ---- Loading

const loading = new Set();
const outdated = new Set(); // requested again while loading

async function loadSeries(ids) {
  await Promise.all(ids.map(loadOneSeries));
  drawCharts();
  showSummary();
}

async function loadOneSeries(id) {
  if (loading.has(id)) {
    outdated.add(id);
    return;
  }
  loading.add(id);
  do {
    outdated.delete(id);
    const [first, last] = state.window ?? [0, MAX_STEP];
    await load("series", id, () => source.series(id, first, last, BUCKETS));
  } while (outdated.has(id));
  loading.delete(id);
}

let detailsLoadedAt = 0;

async function loadDetails(id) {
  detailsLoadedAt = Date.now();
  const details = load("details", id, () => source.details(id)).then(() => {
    if (state.selected.includes(id)) showDetails();
  });
  const diagnosis = load("diagnosis", id, () => source.diagnosis(id)).then((problem) => {
    if (problem) state.diagnosis[id] = { problem, findings: [] };
    if (state.selected.includes(id)) showDiagnosis(showSteps);
  });
  await Promise.all([details, diagnosis]);
  showSummary();
}

// Store what is requested in the state, or its error, which is returned too.
async function load(kind, id, request) {
  const key = `${kind} ${id}`;
  try {
    state[kind][id] = await request();
    delete state.errors[key];
    return null;
  } catch (error) {
    state.errors[key] = String(error.message || error);
    return state.errors[key];
  }
}

// ---- Events from the server

const due = { series: new Set(), details: new Set(), timer: null };

// Collect what has changed for a quarter of a second: a fast run would otherwise cause a request per step.
function scheduleLoading() {
  due.timer ??= setTimeout(() => {
    due.timer = null;
    const series = [...due.series];
    const details = [...due.details];
    due.series.clear();
    due.details.clear();
    if (series.length) loadSeries(series);
    for (const id of details) loadDetails(id);
  }, 250);
}

const CONNECTION_TEXTS = {
  open: "live",
  lost: "no answer; trying again",
  ended: "this dashboard has ended; open the link of a new one",
};

function onEvent(kind, data) {
  if (kind === "runs") onRuns(data);
  else if (kind === "grown") onGrown(data);
  else {
    const connection = document.getElementById("connection");
    connection.textContent = CONNECTION_TEXTS[kind];
    connection.className = kind === "open" ? "connection live" : "connection lost";
  }
}

function onRuns(runs) {
  state.runs = runs;
  if (state.selected.length) {
    showRunList();
    showSummary();
  } else {
    restoreFromAddress();
    selectionChanged();
  }
}

let quietTimer = null;

function onGrown(progress) {
  const { id } = progress;
  if (!state.selected.includes(id)) return;
  const run = runById(id);
  if (run && progress.last_step > run.step) run.step = progress.last_step;
  due.series.add(id);

  // Details: at once for a new validation or event, from time to time for steps, and once more when it gets quiet.
  const before = state.series[id];
  const isNew = progress.n_validations !== before?.n_validations || progress.n_events !== before?.n_events;
  const isOld = id === state.selected[0] && Date.now() - detailsLoadedAt > DETAILS_MS;
  if (isNew || isOld) due.details.add(id);
  clearTimeout(quietTimer);
  quietTimer = setTimeout(() => loadDetails(state.selected[0]), DETAILS_MS);
  scheduleLoading();
}

// ---- Keys, resizing, printing

function scrollToSection(sectionId) {
  document.getElementById(sectionId)?.scrollIntoView({ behavior: "smooth" });
}

function toggleTheme() {
  switchTheme();
  drawCharts();
}

const KEYS = {
  j: () => showNextRun(1),
  k: () => showNextRun(-1),
  "+": () => moveWindow(0.5, 0),
  "-": () => moveWindow(2, 0),
  ArrowLeft: () => moveWindow(1, -0.5),
  ArrowRight: () => moveWindow(1, 0.5),
  z: () => zoom(null),
  h: () => scrollToSection("health"),
  c: () => scrollToSection("curves"),
  s: () => scrollToSection("sound"),
  i: () => scrollToSection("incidents"),
  r: () => scrollToSection("recipe"),
  t: toggleTheme,
  "?": () => document.getElementById("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|SELECT|TEXTAREA|AUDIO)$/.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
  const run = /^[1-9]$/.test(event.key) && state.runs[Number(event.key) - 1];
  if (run) toggleRun(run.id);
  else KEYS[event.key]?.();
});
document.getElementById("theme").addEventListener("click", toggleTheme);
document.getElementById("help").addEventListener("click", KEYS["?"]);
darkScheme.addEventListener("change", drawCharts);

let resizeTimer = null;
addEventListener("resize", () => {
  clearTimeout(resizeTimer);
  resizeTimer = setTimeout(() => {
    for (const chart of charts) chart.resize();
  }, 120);
});

// Paper is light, has a fixed width, and cannot be clicked: open what is closed.
let beforePrint = { theme: undefined, closed: [] };

addEventListener("beforeprint", () => {
  beforePrint = {
    theme: document.documentElement.dataset.theme,
    closed: [...document.querySelectorAll("details:not([open])")],
  };
  document.documentElement.dataset.theme = "light";
  for (const details of beforePrint.closed) details.open = true;
  drawCharts();
  for (const chart of charts) chart.resize(chart.spec.strip ? 660 : 310); // pixels: A4 with two charts in a row
});

addEventListener("afterprint", () => {
  if (beforePrint.theme) document.documentElement.dataset.theme = beforePrint.theme;
  else delete document.documentElement.dataset.theme;
  for (const details of beforePrint.closed) details.open = false;
  drawCharts();
  for (const chart of charts) chart.resize();
});

// ---- Start

async function start() {
  restoreTheme();
  if (source.isReport) document.body.classList.add("report");
  try {
    state.runs = await source.runs();
  } catch (error) {
    main.replaceChildren(element("p", {}, String(error.message || error)));
    return;
  }
  restoreFromAddress();
  selectionChanged();
  source.listen(onEvent);
}

// For the browser's console and the tests: names of a module cannot be reached from outside.
globalThis.unbraid = { state, zoom, toggleRun };

start();
