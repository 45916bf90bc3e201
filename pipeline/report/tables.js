"use strict";
// Tables that sort by a click on a heading. A column: {key, label, hint, value(row), cell(row), higher}.

// Rows that are drawn before the reader asks for all
const FIRST_ROWS = 300;

function sortableTable(table, columns, rows, { rowMade = () => {}, drawn = () => {} } = {}) {
  const head = make("thead"), body = make("tbody"), heading = make("tr");
  let key = null, descending = false, shown = rows, limit = FIRST_ROWS;
  for (const column of columns) {
    const button = make("button", { type: "button" }, column.label, " ", make("span", { class: "arrow", "aria-hidden": "true" }));
    const cell = make("th", { scope: "col" }, button, column.hint ? make("span", { class: "hint" }, column.hint) : null);
    cell.dataset.key = column.key;
    button.addEventListener("click", () => {
      // at first the best, or the first of the alphabet, on top
      descending = key === column.key ? !descending : column.higher === true;
      key = column.key;
      draw();
    });
    heading.append(cell);
  }
  head.append(heading);
  table.replaceChildren(head, body);

  function compare(a, b) {
    const { value } = columns.find(each => each.key === key);
    const [x, y] = [value(a), value(b)];
    const known = each => typeof each === "string" || isValue(each);
    // what was not measured stays at the end
    if (!known(x) || !known(y)) return known(y) - known(x);
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x === y ? 0 : x < y ? -1 : 1;
    return descending ? -order : order;
  }

  function draw() {
    const ordered = key === null ? shown : [...shown].sort(compare);
    for (const cell of heading.children) {
      const sorted = cell.dataset.key === key;
      cell.setAttribute("aria-sort", sorted ? (descending ? "descending" : "ascending") : "none");
      cell.querySelector(".arrow").textContent = sorted ? (descending ? "▼" : "▲") : "";
    }
    body.replaceChildren(...ordered.slice(0, limit).map(row => {
      const line = make("tr", {}, ...columns.map(column => column.cell(row)));
      rowMade(line, row);
      return line;
    }));
    drawn(Math.max(0, ordered.length - limit));
  }
  draw();
  return { draw, show(chosen) { shown = chosen; draw(); }, showAll() { limit = Infinity; draw(); } };
}

function direction(name) {
  return name === "bpp" ? "" : data.metrics[name].higher ? "higher is better" : "lower is better";
}

// The best value of each metric among models of the same images
function isBest(model, name) {
  if (name === "bpp") return false;
  const values = data.models.filter(each => each.set === model.set).map(each => each.totals[name]?.[0]).filter(isValue);
  return values.length > 1 && model.totals[name][0] === (data.metrics[name].higher ? Math.max(...values) : Math.min(...values));
}

function summaryTable() {
  const interval = (name, low, high) => make("span", { class: "interval" }, `${format(name, low)} to ${format(name, high)}`);
  function valueCell(model, name) {
    const found = model.totals[name];
    if (!found) return make("td", {}, "-");
    const [value, low, high] = found, worse = model.worse_by[name];
    let mark = null;
    if (name !== "bpp" && worse && (worse[1] > 0 || worse[2] < 0)) {
      const better = worse[2] < 0, label = `${better ? "better" : "worse"} than ${model.reference}`;
      mark = make("span", { class: better ? "better" : "worse", role: "img", title: label, "aria-label": label }, better ? " ●" : " ○");
    }
    return make("td", { class: isBest(model, name) ? "best" : null }, format(name, value), mark, low === high ? null : interval(name, low, high));
  }
  function differenceCell(model, name) {
    const worse = model.worse_by[name];
    if (!worse) return make("td", {}, model.key === model.reference ? "first" : "-");
    // as differences of the values themselves
    const sign = data.metrics[name].higher ? -1 : 1, [low, high] = [sign * worse[1], sign * worse[2]].sort((a, b) => a - b);
    const value = sign * worse[0];
    const kind = name === "bpp" || (worse[1] <= 0 && worse[2] >= 0) ? null : worse[1] > 0 ? "worse" : "better";
    const word = kind ? make("span", { class: kind }, ` ${kind}`) : null;
    return make("td", {}, (value > 0 ? "+" : "") + format(name, value), word, interval(name, low, high));
  }
  const cell = (model, name) => (byId("summary-mode").value === "values" ? valueCell : differenceCell)(model, name);
  const columns = [
    { key: "model", label: "codec", value: model => model.key, cell: model => make("td", { title: model.settings || null }, swatch(colorOf(model.family)), model.key) },
    ...metricNames.map(name => ({
      key: name, label: nameOf(name), hint: direction(name), higher: data.metrics[name].higher,
      value: model => model.totals[name]?.[0], cell: model => cell(model, name),
    })),
  ];
  const table = sortableTable(byId("summary-table"), columns, data.models);
  byId("summary-mode").addEventListener("change", () => table.draw());
  if (data.models.some(model => Object.keys(model.worse_by).length)) {
    const references = [...new Set(data.models.map(model => model.reference))];
    byId("against").append("Bold: the best on the same images. ", make("span", { class: "better" }, "●"), " better and ", make("span", { class: "worse" }, "○"),
      ` worse than the first codec${references.length > 1 ? " of its evaluation" : `, ${references[0]}`}, where the interval of the paired difference leaves no doubt.`);
  } else byId("summary-mode").parentElement.hidden = true;
}

function bdTable() {
  const { against, rows } = data.bd_rates, names = metricNames.filter(name => Object.values(rows).some(row => name in row));
  byId("bd").hidden = !names.length;
  if (!names.length) return;
  byId("bd-against").textContent = against;
  const percent = value => make("td", { class: isValue(value) ? (value < 0 ? "better" : "worse") : null }, isValue(value) ? `${value > 0 ? "+" : ""}${value.toFixed(1)} %` : "-");
  sortableTable(byId("bd-table"), [
    { key: "family", label: "codec", value: ([family]) => family, cell: ([family]) => make("td", {}, swatch(colorOf(family)), family) },
    ...names.map(name => ({ key: name, label: nameOf(name), value: ([, row]) => row[name], cell: ([, row]) => percent(row[name]) })),
  ], Object.entries(rows));
}

function imageTable(look) {
  const number = (key, label, higher) => ({ key, label, higher, value: row => row[key], cell: row => make("td", {}, format(key, row[key])) });
  const columns = [
    { key: "image", label: "image", value: row => row.image, cell: row => make("td", {}, make("button", { type: "button", class: "plain" }, row.image)) },
    { key: "model", label: "codec", value: row => row.model, cell: row => make("td", {}, row.model) },
    number("bytes", "bytes"),
    ...imageMetrics.map(name => number(name, nameOf(name), data.metrics[name].higher)),
    number("encode_seconds", "encoding, s"), number("decode_seconds", "decoding, s"),
  ];
  const table = sortableTable(byId("image-table"), columns, data.rows, {
    rowMade(line, row) {
      line.dataset.image = row.image;
      line.dataset.model = row.model;
      line.addEventListener("click", () => look(row.image, row.model));
    },
    drawn(left) { byId("more").hidden = !left; byId("more").textContent = `Show ${left} more rows`; },
  });
  byId("more").addEventListener("click", () => table.showAll());
  let off = new Set(), waiting = 0;
  function filter() {
    const wanted = byId("find").value.trim().toLowerCase();
    const rows = data.rows.filter(row => !off.has(row.model) && `${row.image} ${row.model}`.toLowerCase().includes(wanted));
    byId("row-count").textContent = `${rows.length} of ${data.rows.length} rows`;
    table.show(rows);
  }
  chips(byId("row-models"), data.models.map(model => [model.key, model.key, swatch(colorOf(model.family))]), found => { off = found; filter(); });
  byId("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  filter();
}
