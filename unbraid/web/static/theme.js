// Light and dark: the system's scheme, unless the user has chosen one.

import { element } from "./dom.js";

export const darkScheme = matchMedia("(prefers-color-scheme: dark)");

export function currentTheme() {
  return document.documentElement.dataset.theme ?? (darkScheme.matches ? "dark" : "light");
}

export function switchTheme() {
  const theme = currentTheme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("unbraid-theme", theme);
  } catch {
    // A report opened from a mail may have no storage.
  }
}

export function restoreTheme() {
  try {
    const theme = localStorage.getItem("unbraid-theme");
    if (theme) document.documentElement.dataset.theme = theme;
  } catch {
    // As above.
  }
}

// A canvas needs the value of a CSS variable, and only an element's computed style resolves light-dark().
const colourProbe = document.body.appendChild(element("span", { hidden: true }));

export function cssColour(variable) {
  colourProbe.style.color = `var(${variable})`;
  return getComputedStyle(colourProbe).color;
}
