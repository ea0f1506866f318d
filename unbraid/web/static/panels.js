// Everything around the curves: the run in a sentence, its health, sound, incidents, recipe and environment.

import { audioSection } from "./audio.js";
import { element } from "./dom.js";
import {
  decibels,
  digits,
  duration,
  integer,
  outcomeText,
  runStatus,
  sentence,
  stateText,
  timeLeft,
} from "./labels.js";
import { runById, runName, source, state } from "./state.js";

function codeCell(text) {
  return element("td", {}, element("code", {}, text));
}

function codeLines(texts) {
  return texts.map((text) => element("div", {}, element("code", {}, text)));
}

function table(headings, rows) {
  const head =
    headings &&
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        headings.map((text) => element("th", {}, text)),
      ),
    );
  return element("div", { className: "scroll" }, element("table", {}, head, element("tbody", {}, rows)));
}

function stepCell(step) {
  return element("td", { className: "number" }, step === null || step === undefined ? "" : integer(step));
}

// ---- Summary

export function showSummary() {
  const box = document.getElementById("summary");
  if (!box) return;
  const run = runById(state.selected[0]);
  if (!run) {
    box.replaceChildren(
      element("h1", {}, "This run is no longer in its folder"),
      element("p", { className: "lead" }, "The page shows what was read before. Choose another run."),
    );
    return;
  }
  const improvement = `${decibels(run.si_sdri)} (best ${decibels(run.best_si_sdri)})`;
  const facts = [
    ["step", run.max_steps ? `${integer(run.step)} of ${integer(run.max_steps)}` : integer(run.step)],
    ["time", duration(run.elapsed_seconds)],
    ["SI-SDR improvement", typeof run.si_sdri === "number" ? improvement : "not validated yet"],
    ["learning rate", digits(run.lr)],
  ];
  const items = facts.map(([name, value]) =>
    element("li", {}, element("span", { className: "soft" }, `${name} `), element("b", {}, value)),
  );
  box.replaceChildren(
    element("h1", {}, run.name),
    element("p", { className: "lead" }, sentence(stateSentence(run))),
    element("ul", { className: "facts" }, items),
    ...notes(run).map((note) => element("p", { className: "lead" }, note)),
  );
  document.title = `${run.name}: ${runStatus(run)} \u00b7 unbraid`;
}

function stateSentence(run) {
  if (source.isReport) return `${stateText(run)}, as of ${source.date}`;
  return [stateText(run), timeLeft(run)].filter(Boolean).join("; ");
}

function notes(run) {
  const series = state.series[run.id];
  const errors = Object.entries(state.errors).filter(([key]) => key.endsWith(run.id));
  const found = [run.problem, state.notice, ...new Set(errors.map(([, text]) => text))];
  if (series?.n_torn) {
    found.push(`${integer(series.n_torn)} ${series.n_torn === 1 ? "line" : "lines"} of its records could not be read.`);
  }
  if (series?.unread_bytes > 2 ** 20) found.push(`Still reading: ${integer(series.unread_bytes / 2 ** 20)} MiB left.`);
  if (run.state === "empty") found.push("No step has been written yet. Curves appear with the first one.");
  return found.filter(Boolean);
}

// ---- Health

// The previous content is kept where nothing changed, so that a button does not vanish under the mouse.
let shownDiagnosis = "";

export function showDiagnosis(showSteps) {
  const box = document.getElementById("health");
  if (!box) return;
  const title = element("h2", {}, "Health");
  const diagnosis = state.diagnosis[state.selected[0]];
  if (!diagnosis || diagnosis.problem) {
    box.replaceChildren(
      title,
      element("p", { className: "soft" }, diagnosis ? diagnosis.problem : "Looking for problems ..."),
    );
    return;
  }
  const content = JSON.stringify([state.selected[0], diagnosis]);
  if (shownDiagnosis === content && box.childElementCount > 1) return;
  shownDiagnosis = content;

  const { findings, notes, verdict, n_last_steps: nLastSteps } = diagnosis;
  const extent = nLastSteps ? `, from its last ${integer(nLastSteps)} steps and a sample of the others` : "";
  const isHealthy = findings.every((finding) => finding.severity === "note");
  const cards = findings.map((finding) => findingCard(finding, showSteps));
  const isOpen = box.querySelector("details[open]") !== null;
  const more = element(
    "details",
    { open: isOpen },
    element("summary", {}, `${cards.length - 3} more`),
    element("ul", { className: "findings" }, cards.slice(3)),
  );
  box.replaceChildren(
    title,
    element("p", { className: isHealthy ? "lead healthy" : "lead" }, sentence(verdict + extent)),
    notes.length > 0 ? element("p", { className: "soft small" }, notes.join(" ")) : "",
    element("ul", { className: "findings" }, cards.slice(0, 3)),
    cards.length > 3 ? more : "",
  );
}

function findingCard(finding, showSteps) {
  const [first, last] = finding.steps;
  return element(
    "li",
    { className: `card finding ${finding.severity}` },
    element(
      "button",
      { type: "button", onclick: () => showSteps(first, last) },
      `Show steps ${integer(first)} to ${integer(last)}`,
    ),
    element("span", { className: "severity" }, finding.severity),
    element("b", {}, finding.problem),
    element("p", { className: "soft small" }, finding.evidence),
    element(
      "p",
      { className: "small" },
      finding.advice,
      finding.key && " ",
      finding.key && element("code", {}, finding.key),
    ),
  );
}

// ---- Details

export function showDetails() {
  const id = state.selected[0];
  const details = state.details[id];
  if (!details || !document.getElementById("sound")) return;
  const { blocks, incidents, events, validation_examples: validation, evaluation_examples: evaluation } = details;
  replaceIfChanged("sound", [validation, evaluation], () => audioSection(id, details));
  replaceIfChanged("blocks", blocks, () => (blocks.rows.length ? [blocksCard(blocks)] : []));
  replaceIfChanged("incidents", [incidents, events], () => incidentsSection(details));
  const compared = state.selected.map((other) => {
    const of = state.details[other];
    return of && [of.recipe, of.environment, of.checkpoints];
  });
  replaceIfChanged("recipe", compared, () => recipeSection(details));
}

// Replace an element's children if its content has changed; what was open or chosen in it stays so.
function replaceIfChanged(elementId, content, makeChildren) {
  const box = document.getElementById(elementId);
  const id = state.selected[0];
  const contentKey = JSON.stringify([id, content]);
  const isPlaying = [...box.querySelectorAll("audio")].some((audio) => !audio.paused);
  if (box.contentKey === contentKey || isPlaying) return;
  const isSameRun = box.runId === id;
  const wasOpen = [...box.querySelectorAll("details")].map((details) => details.open);
  // The last checkpoint is the default: unless another one was chosen, show the newest.
  const chosen = [...box.querySelectorAll("select")].map((select) =>
    select.value === select.lastElementChild.value ? null : select.value,
  );
  box.replaceChildren(...makeChildren());
  box.contentKey = contentKey;
  box.runId = id;
  if (!isSameRun) return;
  for (const [index, details] of box.querySelectorAll("details").entries()) {
    details.open = wasOpen[index] ?? details.open;
  }
  for (const [index, select] of box.querySelectorAll("select").entries()) {
    if (!chosen[index]) continue;
    select.value = chosen[index];
    select.dispatchEvent(new Event("change"));
  }
}

function incidentsSection({ incidents, events }) {
  const parts = [element("h2", {}, "Incidents and events")];
  if (incidents.length) {
    const rows = incidents.map((incident) =>
      element(
        "tr",
        {},
        stepCell(incident.step),
        element(
          "td",
          {},
          incident.outcome ? outcomeText(incident.outcome) : "",
          incident.verdict && element("div", { className: "soft" }, incident.verdict),
        ),
        element("td", {}, codeLines(incident.files)),
        codeCell(incident.command),
      ),
    );
    parts.push(element("div", { className: "card" }, table(["step", "outcome", "files", "replay"], rows)));
  }
  if (!events.n) {
    parts.push(element("p", { className: "soft" }, "Nothing unusual was recorded."));
    return parts;
  }
  const rows = events.newest.map((event) =>
    element(
      "tr",
      {},
      stepCell(event.step),
      codeCell(event.code),
      element("td", {}, event.message, codeLines(event.files)),
    ),
  );
  const caption = events.n === 1 ? "One event." : `${integer(events.n)} events, newest first.`;
  parts.push(element("p", { className: "lead" }, caption), table(null, rows.slice(0, 8)));
  if (rows.length > 8) {
    parts.push(element("details", {}, element("summary", {}, `${rows.length - 8} more`), table(null, rows.slice(8))));
  }
  return parts;
}

function recipeSection(details) {
  const others = state.selected.slice(1).filter((id) => state.details[id]);
  const compared = [details, ...others.map((id) => state.details[id])];
  const names = [state.selected[0], ...others].map(runName);
  const { best, last } = details.checkpoints;
  const checkpoints = [best && `best: ${best}`, last && `last: ${last}`].filter(Boolean).join("; ");
  const recipes = compared.map(({ recipe }) => recipe);
  const environments = compared.map(({ environment }) => environment);
  return [
    element("h2", {}, "Recipe and environment"),
    element(
      "p",
      { className: "lead" },
      checkpoints ? `Checkpoints: ${checkpoints}.` : "No checkpoint has been saved yet.",
    ),
    element(
      "div",
      { className: "two" },
      keysCard("Recipe", recipes, names),
      keysCard("Environment", environments, names),
    ),
  ];
}

// Keys and values of one run, or of several side by side with the differences first.
function keysCard(title, tables, names) {
  const keys = [...new Set(tables.flatMap(Object.keys))].sort();
  if (!keys.length) {
    const missing = element("p", { className: "soft" }, "Not recorded.");
    return element("div", { className: "card" }, element("h3", {}, title), missing);
  }
  const isDifferent = (key) => tables.some((values) => values[key] !== tables[0][key]);
  const row = (key) => {
    const cells = tables.map((values) => element("td", {}, values[key] ?? "not set"));
    return element("tr", { className: isDifferent(key) ? "differs" : "" }, codeCell(key), cells);
  };
  if (tables.length === 1) {
    return element("div", { className: "card" }, element("h3", {}, title), table(null, keys.map(row)));
  }
  const headings = ["", ...names];
  const different = keys.filter(isDifferent);
  const equal = keys.filter((key) => !isDifferent(key));
  return element(
    "div",
    { className: "card" },
    element("h3", {}, `${title}: ${different.length ? "differences" : "no differences"}`),
    different.length > 0 && table(headings, different.map(row)),
    element("details", {}, element("summary", {}, `${equal.length} equal keys`), table(headings, equal.map(row))),
  );
}

// The blocks of the model in the last sampled step, with bars on a log scale from the smallest to the largest value.
function blocksCard(blocks) {
  const columns = ["grad_norm", "update_ratio"];
  const ranges = {};
  for (const column of columns) {
    const logs = blocks.rows
      .map((row) => row[column])
      .filter((value) => value > 0)
      .map(Math.log10);
    ranges[column] = [Math.min(...logs), Math.max(...logs)];
  }
  const barCell = (row, column) => {
    const [low, high] = ranges[column];
    // The smallest value has a short bar too, to tell it from zero.
    const share = row[column] > 0 ? 0.06 + (0.94 * (Math.log10(row[column]) - low)) / (high - low || 1) : 0;
    const fill = element("span", { className: "fill" });
    fill.style.width = `${(100 * share).toFixed(1)}%`;
    const value = element("span", { className: "value" }, digits(row[column]));
    return element("td", {}, element("span", { className: "bars" }, fill), value);
  };
  const rows = blocks.rows.map((row) =>
    element(
      "tr",
      {},
      codeCell(row.name),
      columns.map((column) => barCell(row, column)),
    ),
  );
  const caption = "Bars are on a log scale. First blocks far below the last ones are a sign of vanishing gradients.";
  return element(
    "details",
    { className: "card blocks" },
    element("summary", {}, `The model's ${rows.length} blocks at step ${integer(blocks.step)}`),
    element("p", { className: "caption" }, caption),
    table(["", "gradient norm", "update-to-weight ratio"], rows),
  );
}
