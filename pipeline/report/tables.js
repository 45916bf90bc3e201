"use strict";
// Tables that sort by a click on a heading. A column: {key, label, hint, value(row), cell(row), higher}.

function sortableTable(table, columns, rows, { sortKey = null, rowMade = () => {} } = {}) {
  const head = make("thead"), body = make("tbody");
  let key = sortKey, descending = false, shown = rows;
  const heading = make("tr");
  for (const column of columns) {
    const arrow = make("span", { class: "arrow", "aria-hidden": "true" });
    const button = make("button", { type: "button", title: column.title }, column.label, " ", arrow);
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
    const column = columns.find(each => each.key === key);
    const [x, y] = [column.value(a), column.value(b)];
    // what was not measured stays at the end
    if (!isNumber(x) && typeof x !== "string") return isNumber(y) || typeof y === "string" ? 1 : 0;
    if (!isNumber(y) && typeof y !== "string") return -1;
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return descending ? -order : order;
  }

  function draw() {
    const ordered = key === null ? [...shown] : [...shown].sort(compare);
    for (const cell of heading.children) {
      const sorted = cell.dataset.key === key;
      cell.setAttribute("aria-sort", sorted ? (descending ? "descending" : "ascending") : "none");
      cell.querySelector(".arrow").textContent = sorted ? (descending ? "▼" : "▲") : "";
    }
    body.replaceChildren(...ordered.map(row => {
      const line = make("tr", {}, ...columns.map(column => column.cell(row)));
      rowMade(line, row);
      return line;
    }));
  }
  draw();
  return { show(chosen) { shown = chosen; draw(); } };
}

function direction(name) {
  return name === "bpp" ? "" : data.metrics[name].higher ? "higher is better" : "lower is better";
}

function summaryTable() {
  const first = data.models[0];
  const best = {};
  for (const name of metricNames.filter(name => name !== "bpp")) {
    const values = data.models.map(model => model.totals[name]?.[0]).filter(isNumber);
    best[name] = data.metrics[name].higher ? Math.max(...values) : Math.min(...values);
  }
  function cell(model, name) {
    const found = model.totals[name];
    if (!found) return make("td", {}, "-");
    const [value, low, high] = found, worse = model.worse_by[name];
    let mark = null;
    if (name !== "bpp" && worse && (worse[1] > 0 || worse[2] < 0)) {
      const better = worse[2] < 0;
      const title = `${better ? "better" : "worse"} than ${first.key} by ${format(name, Math.abs(worse[0]))}, 95 % interval ` +
        `${format(name, Math.min(Math.abs(worse[1]), Math.abs(worse[2])))} to ${format(name, Math.max(Math.abs(worse[1]), Math.abs(worse[2])))}`;
      mark = make("span", { class: better ? "better" : "worse", title, "aria-label": title }, better ? " ●" : " ○");
    }
    const interval = low === high ? null : make("span", { class: "interval" }, `${format(name, low)} to ${format(name, high)}`);
    return make("td", { class: value === best[name] ? "best" : null }, format(name, value), mark, interval);
  }
  const columns = [
    { key: "model", label: "codec", value: model => model.key, cell: model => make("td", { title: model.settings || null },
      make("span", { class: "swatch", style: `background:${colorOf(model.family)};display:inline-block;margin-right:.45rem` }), model.key) },
    ...metricNames.map(name => ({
      key: name, label: name === "bpp" ? "bits per pixel" : data.metrics[name].name, hint: direction(name), higher: data.metrics[name].higher,
      value: model => model.totals[name]?.[0], cell: model => cell(model, name),
    })),
  ];
  sortableTable(byId("summary-table"), columns, data.models);
  if (data.models.some(model => Object.keys(model.worse_by).length)) {
    byId("against").append("Bold: the best. ", make("span", { class: "better" }, "●"), " better and ", make("span", { class: "worse" }, "○"),
      " worse than the first codec", data.models.some(model => model.evaluation !== first.evaluation) ? " of its evaluation" : `, ${first.key}`,
      ", where the interval of the paired difference leaves no doubt; point at a mark for how much.");
  }
}

function imageTable(look) {
  const text = (key, label) => ({ key, label, value: row => row[key], cell: row => make("td", {}, row[key]) });
  const number = (key, label, higher) => ({ key, label, higher, value: row => row[key], cell: row => make("td", {}, format(key, row[key])) });
  const columns = [
    text("image", "image"), text("model", "codec"), number("bytes", "bytes"),
    ...imageMetrics.map(name => number(name, name === "bpp" ? "bits per pixel" : data.metrics[name].name, data.metrics[name].higher)),
    number("encode_seconds", "encoding, s"), number("decode_seconds", "decoding, s"),
  ];
  const table = sortableTable(byId("image-table"), columns, data.rows, {
    rowMade(line, row) {
      line.dataset.image = row.image;
      line.dataset.model = row.model;
      line.tabIndex = 0;
      const open = () => look(row.image, row.model);
      line.addEventListener("click", open);
      line.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
    },
  });
  let off = new Set();
  function filter() {
    const wanted = byId("find").value.trim().toLowerCase();
    const rows = data.rows.filter(row => !off.has(row.model) && `${row.image} ${row.model}`.toLowerCase().includes(wanted));
    byId("row-count").textContent = `${rows.length} of ${data.rows.length} rows`;
    table.show(rows);
  }
  chips(byId("row-models"), data.models.map(model => [model.key, model.key, colorOf(model.family)]), found => { off = found; filter(); });
  byId("find").addEventListener("input", filter);
  filter();
}
