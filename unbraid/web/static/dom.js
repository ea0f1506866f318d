// Creating elements. Everything from a run is inserted as text, never as HTML.

// Return an element. Keys that begin with "on" are event listeners, known properties are set, others are attributes.
export function element(tag, properties = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) created.addEventListener(name.slice(2), value);
    else if (name in created) created[name] = value;
    else created.setAttribute(name, value === true ? "" : value);
  }
  created.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return created;
}

// Return a short line of colour; styles are set as properties because the security policy forbids style attributes.
export function swatch(colour) {
  const line = element("span", { className: "swatch" });
  line.style.setProperty("--run-colour", colour);
  return line;
}
