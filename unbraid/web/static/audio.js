// Mixtures, references and estimates to listen to, with their spectrograms.

import { element } from "./dom.js";
import { decibels, integer } from "./labels.js";
import { source } from "./state.js";

// One recording. A reference sets the scale of the spectrogram's colours, so that the two can be compared.
function recording(id, name, caption, reference) {
  const image = source.spectrogram(id, name, reference);
  const audio = source.audio(id, name);
  return element(
    "figure",
    { className: "recording" },
    // A lazy image would be missing when a report is printed.
    image &&
      element("img", { src: image, alt: `Spectrogram: ${caption}`, loading: source.isReport ? "eager" : "lazy" }),
    audio
      ? element("audio", { src: audio, controls: true, preload: "none", ariaLabel: caption })
      : element("p", { className: "caption" }, "Not included, to keep the report small."),
    element("figcaption", {}, caption),
  );
}

function exampleCard(id, example, title) {
  const { mixture, references, estimates, files } = example;
  const grid = element("div", { className: "recordings" });
  const score = element("span", { className: "soft small" });

  function showEstimate({ si_sdri: improvement, audio }) {
    score.textContent = typeof improvement === "number" ? `SI-SDR improvement ${decibels(improvement)}` : "";
    const cells = mixture.map((name) => element("div", {}, recording(id, name, "Mixture")));
    audio.forEach((name, index) => {
      const reference = references[index];
      const cell = element("div", { className: "pair" }, recording(id, name, `Estimate ${index + 1}`, reference));
      if (reference) cell.append(recording(id, reference, `Reference ${index + 1}`));
      cells.push(cell);
    });
    grid.replaceChildren(...cells);
    if (!cells.length) grid.append(element("p", { className: "soft" }, "Its audio was not saved."));
  }

  const options = estimates.map(({ step }, index) =>
    element("option", { value: String(index) }, `step ${integer(step)}`),
  );
  const select = element(
    "select",
    { ariaLabel: "Checkpoint", onchange: () => showEstimate(estimates[select.value]) },
    options,
  );
  if (estimates.length) {
    select.value = String(estimates.length - 1);
    showEstimate(estimates.at(-1));
  }
  const shortNames = files.map((file) => file.split("/").slice(-2).join("/"));
  return element(
    "article",
    { className: "card" },
    element("div", { className: "bar" }, element("h3", {}, title), estimates.length > 1 && select, score),
    files.length > 0 && element("p", { className: "caption" }, shortNames.join(" + ")),
    grid,
  );
}

// Return the elements of the section "Sound".
export function audioSection(id, details) {
  const { validation_examples: validation, evaluation_examples: evaluation } = details;
  const parts = [element("h2", {}, "Sound")];
  if (!validation.length && !evaluation.length) {
    const advice = "No audio was saved. Set validate.save_audio = 2, or run unbraid evaluate RUN --save-worst 10.";
    parts.push(element("p", { className: "soft" }, advice));
  }
  if (validation.length) {
    const cards = validation.map((example) => exampleCard(id, example, `Validation example ${example.index + 1}`));
    parts.push(element("div", { className: "examples" }, cards));
  }
  if (evaluation.length) {
    const cards = evaluation.map((example) =>
      exampleCard(id, example, `Mixture ${example.index}: ${decibels(example.estimates[0].si_sdri)}`),
    );
    const summary = element("summary", {}, `Worst mixtures of the last evaluation (${evaluation.length})`);
    const examples = element("div", { className: "examples" }, cards);
    parts.push(element("details", { open: !validation.length }, summary, examples));
  }
  return parts;
}
