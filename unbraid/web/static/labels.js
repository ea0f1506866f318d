"use strict";
// Elements and words: everything from a run comes in as text and never as HTML.

function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

function whole(number) {
  return Number(number).toLocaleString("en-US", { maximumFractionDigits: 0 });
}

function digits(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "none";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return number.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(number.toPrecision(size < 1 ? 3 : 4)));
}

function decibels(number) {
  if (typeof number !== "number") return "none";
  return `${number >= 0 ? "+" : "\u2212"}${Math.abs(number).toFixed(2)} dB`;
}

function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "unknown";
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 48 * 3600) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

const STATES = {
  empty: "no step yet",
  running: "running",
  finished: "finished",
  still: "stands still",
  broken: "cannot be read",
};

function stateOf(run) {
  const parts = [STATES[run.state] || run.state];
  if (run.step) parts.push(`step ${whole(run.step)}`);
  if (typeof run.si_sdri === "number") parts.push(decibels(run.si_sdri));
  return parts.join(" \u00b7 ");
}

function remaining(run) {
  if (run.state !== "running" || !run.step || !run.elapsed_seconds) return "";
  const left = [];
  if (run.max_steps) left.push((run.elapsed_seconds / run.step) * (run.max_steps - run.step));
  if (run.max_minutes) left.push(60 * run.max_minutes - run.elapsed_seconds);
  return left.length ? `about ${duration(Math.max(0, Math.min(...left)))} to go` : "";
}

const REASONS = {
  rescued: "done without bad examples",
  all_filtered: "all examples easy",
  fp16_overflow: "fp16 overflow",
  out_of_memory: "out of memory",
  over_limit: "loss over its limit",
  nonfinite_loss: "loss not finite",
  nonfinite_gradient: "gradient not finite",
};
const REASON_COLOURS = {
  rescued: "#3f9d8f",
  all_filtered: "#8f9aa3",
  fp16_overflow: "#b07cc6",
  out_of_memory: "#7a6a55",
  over_limit: "#e08a2e",
  nonfinite_loss: "#d6453d",
  nonfinite_gradient: "#a3195b",
};
// Okabe and Ito's colours, told apart by most eyes.
const RUN_COLOURS = ["#0b84c6", "#e2711d", "#1f9e77", "#c45a9a", "#b08900", "#5d6bc9", "#6f6f6f", "#8c5a2b"];
