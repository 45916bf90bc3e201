"use strict";
// What all parts of the page share: the data, names, colors, and small helpers.

// JSON has no infinity
const data = JSON.parse(document.getElementById("data").textContent, (_, value) => (value === "∞" ? Infinity : value === "-∞" ? -Infinity : value));
const metricNames = Object.keys(data.metrics).filter(name => data.models.some(model => name in model.totals));
const imageMetrics = metricNames.filter(name => data.metrics[name].per_image);
const models = new Map(data.models.map(model => [model.key, model]));
const families = [...new Set(data.models.map(model => model.family))];
const rowsByImage = new Map();
for (const row of data.rows) {
  if (!rowsByImage.has(row.image)) rowsByImage.set(row.image, new Map());
  rowsByImage.get(row.image).set(row.model, row);
}

// Okabe and Ito's colors, which most people can tell apart; the fifth is darker than theirs on paper, and two are ours
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a6d3b", "#7f5fc4"];
// Shapes of points, by the images they were measured on
const SYMBOLS = ["circle", "square", "diamond", "cross", "triangle-up", "x"];
const DASHES = { "MS-ILLM": "solid", "No-GAN": "dash", "HiFiC": "dot" };
const GRAY = "#888888";

const byId = id => document.getElementById(id);
const colorOf = family => PALETTE[families.indexOf(family) % PALETTE.length];
const rowOf = (image, model) => rowsByImage.get(image)?.get(model);
const nameOf = metric => (metric === "bpp" ? "bits per pixel" : data.metrics[metric].name);
const isValue = value => typeof value === "number" && !Number.isNaN(value);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

function format(name, value) {
  if (!isValue(value)) return "-";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  if (name in data.metrics) return value.toFixed(data.metrics[name].digits);
  return name === "bytes" ? value.toLocaleString("en") : value.toFixed(3);
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, label]) => make("option", { value, selected: value === chosen }, label)));
}

// A colored dot, or for published results a line in their pattern
function swatch(color, dash = null) {
  if (!dash) return make("span", { class: "swatch", style: `background:${color}` });
  return make("span", { class: "line", style: `border-top:2px ${{ solid: "solid", dash: "dashed", dot: "dotted" }[dash]} ${color}` });
}

// Buttons that switch codecs on and off: [name, label, swatch]; `changed` gets the set of those that are off
function chips(holder, entries, changed) {
  const off = new Set();
  holder.replaceChildren(...entries.map(([name, label, sign]) => {
    const button = make("button", { type: "button", "aria-pressed": "true" }, sign, label);
    button.addEventListener("click", () => {
      off.has(name) ? off.delete(name) : off.add(name);
      button.setAttribute("aria-pressed", String(!off.has(name)));
      changed(off);
    });
    return button;
  }));
  return off;
}

// A theme of the reader's choice, else the system's
const themeChanged = [];
function setUpTheme() {
  const choices = ["system", "light", "dark"];
  let chosen = 0;
  byId("theme").addEventListener("click", () => {
    chosen = (chosen + 1) % choices.length;
    byId("theme").textContent = `Theme: ${choices[chosen]}`;
    if (chosen) document.documentElement.dataset.theme = choices[chosen];
    else delete document.documentElement.dataset.theme;
    themeChanged.forEach(changed => changed());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => themeChanged.forEach(changed => changed()));
}
const themeColor = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
