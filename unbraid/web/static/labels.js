// How numbers, states and outcomes are written and coloured.

export function integer(number) {
  return Number(number).toLocaleString("en-US", { maximumFractionDigits: 0 });
}

// Three or four significant digits, with an exponent for very small and very large numbers.
export function digits(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "none";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return number.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(number.toPrecision(size < 1 ? 3 : 4)));
}

export function decibels(number) {
  if (typeof number !== "number") return "none";
  return `${number >= 0 ? "+" : "\u2212"}${Math.abs(number).toFixed(2)} dB`;
}

export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "unknown";
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 48 * 3600) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

export function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
}

const STATES = {
  empty: "no step yet",
  running: "running",
  finished: "finished",
  idle: "idle",
  broken: "cannot be read",
};

export function stateText(run) {
  return STATES[run.state] ?? run.state;
}

export function runStatus(run) {
  const parts = [stateText(run)];
  if (run.step) parts.push(`step ${integer(run.step)}`);
  if (typeof run.si_sdri === "number") parts.push(decibels(run.si_sdri));
  return parts.join(" \u00b7 ");
}

// Estimate the time left from the mean pace so far; whichever of the two budgets ends first counts.
export function timeLeft(run) {
  if (run.state !== "running" || !run.step || !run.elapsed_seconds) return "";
  const seconds = [];
  if (run.max_steps) seconds.push((run.elapsed_seconds / run.step) * (run.max_steps - run.step));
  if (run.max_minutes) seconds.push(60 * run.max_minutes - run.elapsed_seconds);
  return seconds.length ? `about ${duration(Math.max(0, Math.min(...seconds)))} left` : "";
}

// The names come with the data; this says only how the known ones look.
const OUTCOMES = {
  rescued: { text: "trained without its bad examples", colour: "#3f9d8f" },
  all_filtered: { text: "all examples filtered", colour: "#8f9aa3" },
  fp16_overflow: { text: "fp16 overflow", colour: "#b07cc6" },
  out_of_memory: { text: "out of memory", colour: "#7a6a55" },
  over_limit: { text: "loss over its limit", colour: "#e08a2e" },
  nonfinite_loss: { text: "loss not finite", colour: "#d6453d" },
  nonfinite_gradient: { text: "gradient not finite", colour: "#a3195b" },
};

export function outcomeText(name) {
  return OUTCOMES[name]?.text ?? String(name).replaceAll("_", " ");
}

export function outcomeColour(name, isFault) {
  return OUTCOMES[name]?.colour ?? (isFault ? "#d6453d" : "#8f9aa3");
}

// After Okabe and Ito: most people with a colour vision deficiency can tell these apart.
export const RUN_COLOURS = ["#0b84c6", "#e2711d", "#1f9e77", "#c45a9a", "#b08900", "#5d6bc9", "#6f6f6f", "#8c5a2b"];

// Add an alpha from 0 to 1 to a colour such as "#0b84c6".
export function transparent(colour, alpha) {
  const hex = Math.round(255 * alpha).toString(16);
  return colour + hex.padStart(2, "0");
}
