"use strict";
// What stands beside the curves: the run in a sentence, its health, incidents, recipe and environment.

function lead() {
  const run = known(state.chosen[0]);
  const place = document.getElementById("lead");
  if (!place) return;
  if (!run) {
    place.replaceChildren(make("h1", {}, "This run is no longer in its folder"), make("p", { className: "lead" }, "What is shown is what was read of it; choose another run."));
    return;
  }
  const details = state.details[run.id] || {};
  const series = state.series[run.id];
  const facts = [
    ["step", run.max_steps ? `${whole(run.step)} of ${whole(run.max_steps)}` : whole(run.step)],
    ["time", duration(run.elapsed_seconds)],
    ["SI-SDR improvement", typeof run.si_sdri === "number" ? `${decibels(run.si_sdri)} (best ${decibels(run.best_si_sdri)})` : "not validated yet"],
    ["learning rate", digits(run.lr)],
  ];
  const sentence = (source.isReport ? [`${run.state === "running" ? "was running" : STATES[run.state] || run.state} on ${source.made}`] : [STATES[run.state] || run.state, remaining(run)]).filter(Boolean).join("; ");
  const failures = Object.entries(state.failed).filter(([what]) => what.endsWith(run.id)).map(([, words]) => words);
  const notes = [run.problem, state.said, ...new Set(failures), series && series.n_torn ? `${series.n_torn} ${series.n_torn === 1 ? "line" : "lines"} of its records could not be read.` : "",
    series && series.unread_bytes > 2 ** 20 ? `Still reading: ${whole(series.unread_bytes / 2 ** 20)} MiB of its steps are left.` : "",
    run.state === "empty" ? "It has written no step yet; curves appear with the first." : ""].filter(Boolean);
  place.replaceChildren(make("h1", {}, run.name), make("p", { className: "lead" }, `${sentence.charAt(0).toUpperCase()}${sentence.slice(1)}.`),
    make("ul", { className: "facts" }, facts.map(([name, value]) => make("li", {}, make("span", { className: "soft" }, `${name} `), make("b", {}, value)))),
    ...notes.map((note) => make("p", { className: "lead" }, note)));
  document.title = `${run.name}: ${stateOf(run)} \u00b7 unbraid`;
}

function health() {
  const place = document.getElementById("health");
  const found = state.judged[state.chosen[0]];
  if (!place) return;
  const title = make("h2", {}, "Health");
  if (!found) {
    place.replaceChildren(title, make("p", { className: "soft" }, "The doctor is looking."));
    return;
  }
  if (found.problem) {
    place.replaceChildren(title, make("p", { className: "soft" }, found.problem));
    return;
  }
  const said = found.verdict.charAt(0).toUpperCase() + found.verdict.slice(1);
  const whole_ = found.looked_back ? `, by its last ${whole(found.looked_back)} steps and some of all` : "";
  const shown = found.findings.map((finding) => make("li", { className: `card finding ${finding.severity}` },
    make("button", { type: "button", onclick: () => jump(finding.steps) }, `Show steps ${whole(finding.steps[0])} to ${whole(finding.steps[1])}`),
    make("span", { className: "kind" }, finding.severity), make("b", {}, finding.what),
    make("p", { className: "soft small" }, finding.why),
    make("p", { className: "small" }, finding.advice, finding.key ? " " : "", finding.key ? make("code", {}, finding.key) : null)));
  const few = shown.slice(0, 3), rest = shown.slice(3);
  const open = place.querySelector("details[open]") !== null;
  if (health.shown === JSON.stringify([state.chosen[0], found]) && place.childElementCount > 1) return;
  health.shown = JSON.stringify([state.chosen[0], found]);
  place.replaceChildren(title, make("p", { className: `lead ${found.findings.some((f) => f.severity !== "note") ? "" : "healthy"}` }, `${said}${whole_}.`),
    make("ul", { className: "findings" }, few),
    rest.length ? make("details", { open }, make("summary", {}, `${rest.length} more`), make("ul", { className: "findings" }, rest)) : "");
}

function jump(steps) {
  const [first, last] = steps;
  const around = Math.max(20, Math.round(0.25 * (last - first)));
  state.marked = [first, last];
  room.zoom([Math.max(0, first - around), last + around]);
  document.getElementById("curves").scrollIntoView({ behavior: "smooth" });
}

function besides() {
  const details = state.details[state.chosen[0]];
  if (!details || !document.getElementById("sound")) return;
  const { examples, worst } = details;
  redrawn("sound", [source.isReport, examples, worst], () => [...soundSection(source, state.chosen[0], details).childNodes]);
  redrawn("blocks", details.blocks, () => (details.blocks.rows.length ? [blocksCard(details.blocks)] : []));
  redrawn("incidents", [details.incidents, details.events], () => incidentParts(details));
  const others = state.chosen.map((id) => state.details[id] && [state.details[id].recipe, state.details[id].environment, state.details[id].checkpoints]);
  redrawn("recipe", others, () => recipeParts(details));
}

// A part of the page made anew where its content has changed; what was open or chosen in it stays so.
function redrawn(name, content, parts) {
  const place = document.getElementById(name);
  const now = JSON.stringify([state.chosen[0], content]);
  if (place.drawn === now || [...place.querySelectorAll("audio")].some((sound) => !sound.paused)) return;
  const same = place.of === state.chosen[0];
  const open = [...place.querySelectorAll("details")].map((one) => one.open);
  const chosen = [...place.querySelectorAll("select")].map((one) => one.value !== one.lastElementChild.value && one.value);
  place.replaceChildren(...parts());
  place.drawn = now;
  place.of = state.chosen[0];
  if (!same) return;
  place.querySelectorAll("details").forEach((one, at) => { one.open = open[at] ?? one.open; });
  place.querySelectorAll("select").forEach((one, at) => {
    if (chosen[at]) { one.value = chosen[at]; one.dispatchEvent(new Event("change")); }
  });
}

function incidentParts(details) {
  const { incidents, events } = details;
  const parts = [make("h2", {}, "Incidents and events")];
  if (incidents.length) {
    parts.push(make("div", { className: "card scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ["step", "what", "files", "to run it again"].map((word) => make("th", {}, word)))),
      make("tbody", {}, incidents.map((one) => make("tr", {}, make("td", { className: "number" }, one.step === null ? "" : whole(one.step)),
        make("td", {}, REASONS[one.outcome] || one.outcome || "", one.verdict ? make("div", { className: "soft" }, one.verdict) : null),
        make("td", {}, one.files.map((file) => make("div", {}, make("code", {}, file)))), make("td", {}, make("code", {}, one.command))))))));
  }
  if (!events.n) {
    parts.push(make("p", { className: "soft" }, "Nothing out of the ordinary was recorded."));
    return parts;
  }
  const rows = events.newest.map((one) => make("tr", {}, make("td", { className: "number" }, one.step === null ? "" : whole(one.step)), make("td", {}, make("code", {}, one.code || "")),
    make("td", {}, one.message || "", (one.files || []).map((file) => make("div", {}, make("code", {}, file))))));
  const table = (some) => make("div", { className: "scroll" }, make("table", {}, make("tbody", {}, some)));
  parts.push(make("p", { className: "lead" }, events.n === 1 ? "One event." : `${whole(events.n)} events; the newest first.`), table(rows.slice(0, 8)));
  if (rows.length > 8) parts.push(make("details", {}, make("summary", {}, `${rows.length - 8} more`), table(rows.slice(8))));
  return parts;
}

function recipeParts(details) {
  const others = state.chosen.slice(1).filter((id) => state.details[id]);
  const all = [details, ...others.map((id) => state.details[id])];
  const names = [state.chosen[0], ...others].map((id) => (known(id) || {}).name || "");
  const { best, last } = details.checkpoints;
  const saved = [best && `best: ${best}`, last && `last: ${last}`].filter(Boolean).join("; ");
  return [make("h2", {}, "Recipe and environment"),
    make("p", { className: "lead" }, saved ? `Checkpoints: ${saved}.` : "No checkpoint was saved yet."),
    make("div", { className: "two" }, keysCard("Recipe", all.map((one) => one.recipe), names), keysCard("Environment", all.map((one) => one.environment), names))];
}

// Keys and their values, of one run or of several side by side: then what differs comes first.
function keysCard(title, tables, names) {
  const keys = [...new Set(tables.flatMap(Object.keys))].sort();
  const differs = (key) => tables.some((table) => table[key] !== tables[0][key]);
  const row = (key) => make("tr", { className: differs(key) ? "differs" : "" }, make("td", {}, make("code", {}, key)),
    tables.map((table) => make("td", {}, table[key] === undefined ? "not there" : table[key])));
  const head = () => make("thead", {}, make("tr", {}, ["", ...names].map((name) => make("th", {}, name))));
  const body = (some) => make("div", { className: "scroll" }, make("table", {}, tables.length > 1 && head(), make("tbody", {}, some.map(row))));
  if (!keys.length) return make("div", { className: "card" }, make("h3", {}, title), make("p", { className: "soft" }, "It is not there."));
  if (tables.length === 1) return make("div", { className: "card" }, make("h3", {}, title), body(keys));
  const differing = keys.filter(differs), alike = keys.filter((key) => !differs(key));
  return make("div", { className: "card" }, make("h3", {}, `${title}: ${differing.length ? "what differs" : "no difference"}`),
    differing.length > 0 && body(differing), make("details", {}, make("summary", {}, `${alike.length} keys alike`), body(alike)));
}

// The blocks of the model in the last step that was looked at closely, each with its gradient and its update as bars.
function blocksCard(blocks) {
  const known = (name) => blocks.rows.map((row) => row[name]).filter((value) => value > 0).map(Math.log10);
  const range = Object.fromEntries(["grad_norm", "update_ratio"].map((name) => [name, [Math.min(...known(name)), Math.max(...known(name))]]));
  const bar = (row, name) => {
    const [low, high] = range[name];
    const share = row[name] > 0 ? 0.06 + (0.94 * (Math.log10(row[name]) - low)) / (high - low || 1) : 0;
    const inner = make("span", { className: "fill" });
    inner.style.width = `${(100 * share).toFixed(1)}%`;
    return make("td", {}, make("span", { className: "bars" }, inner), make("span", { className: "value" }, digits(row[name])));
  };
  const head = make("thead", {}, make("tr", {}, ["", "gradient norm", "update over weight"].map((word) => make("th", {}, word))));
  const rows = blocks.rows.map((row) => make("tr", {}, make("td", {}, make("code", {}, row.name)), bar(row, "grad_norm"), bar(row, "update_ratio")));
  return make("details", { className: "card blocks" }, make("summary", {}, `The ${rows.length} blocks of the model at step ${whole(blocks.step)}`),
    make("p", { className: "say" }, "Bars are on a log scale from the smallest to the largest; first blocks far below the last are gradients that vanish."),
    make("div", { className: "scroll" }, make("table", {}, head, make("tbody", {}, rows))));
}
