"use strict";
// What can be heard of a run: mixture, references and estimates with their spectrograms.

function heard(source, id, file, words, like) {
  const picture = source.picture(id, file, like);
  const sound = source.sound(id, file);
  return make("figure", { className: "heard" },
    picture && make("img", { src: picture, alt: `Spectrogram: ${words}`, loading: source.isReport ? "eager" : "lazy" }),
    sound ? make("audio", { src: sound, controls: true, preload: "none", ariaLabel: words }) : make("p", { className: "say" }, "The sound is left out for size."),
    make("figcaption", {}, words));
}

function exampleCard(source, id, item, title) {
  const grid = make("div", { className: "sound-grid" });
  const score = make("span", { className: "soft small" });
  const at = item.at;
  const choose = at.length > 1 && make("select", { ariaLabel: "Checkpoint", onchange: () => show(at[Number(choose.value)]) },
    at.map((one, place) => make("option", { value: String(place) }, `step ${whole(one.step)}`)));
  function show(one) {
    score.textContent = typeof one.si_sdri === "number" ? `SI-SDR improvement ${decibels(one.si_sdri)}` : "";
    grid.replaceChildren(
      ...item.mixture.map((file) => make("div", {}, heard(source, id, file, "Mixture"))),
      ...one.estimate.map((file, number) => {
        const reference = item.reference[number];
        return make("div", { className: "pair" }, heard(source, id, file, `Estimate ${number + 1}`, reference),
          reference && heard(source, id, reference, `Reference ${number + 1}`));
      }));
    if (!grid.childElementCount) grid.append(make("p", { className: "soft" }, "Its sound was not saved."));
  }
  if (choose) choose.value = String(at.length - 1);
  if (at.length) show(at[at.length - 1]);
  return make("article", { className: "card" },
    make("div", { className: "bar" }, make("h3", {}, title), choose, score),
    item.files.length ? make("p", { className: "say" }, item.files.map((file) => file.split("/").slice(-2).join("/")).join(" + ")) : null,
    grid);
}

function soundSection(source, id, details) {
  const { examples, worst } = details;
  const parts = [make("h2", {}, "Sound")];
  if (!examples.items.length && !worst.length) {
    parts.push(make("p", { className: "soft" }, "Nothing was saved to hear: set validate.save_audio = 2, or unbraid evaluate RUN --save-worst 10."));
  }
  if (examples.items.length) {
    parts.push(make("div", { className: "sounds" }, examples.items.map((item) => exampleCard(source, id, item, `Validation example ${item.index + 1}`))));
  }
  if (worst.length) {
    parts.push(make("details", { open: !examples.items.length },
      make("summary", {}, `The ${worst.length} worst of the last evaluation`),
      make("div", { className: "sounds" }, worst.map((item) => exampleCard(source, id, item, `Mixture ${item.index}: ${decibels(item.at[0].si_sdri)}`)))));
  }
  return make("section", { id: "sound" }, parts);
}
