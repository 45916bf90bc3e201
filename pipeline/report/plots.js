"use strict";
// Three plots of any two metrics each: our codecs with intervals, curves where a codec has several rates, published results.

function plots() {
  const realism = data.realism.find(name => metricNames.includes(name) && name !== "psnr_db") ?? "psnr_db";
  const presets = [
    ["Rate and distortion", "bpp", "psnr_db"],
    ["Rate and realism", "bpp", realism],
    ["Distortion and realism", "psnr_db", realism],
  ];
  const published = [...new Set(data.published.map(row => row.model))];
  const entries = [
    ...families.map(family => [family, family, swatch(colorOf(family))]),
    ...published.map(model => [`published ${model}`, `${model}, published`, swatch(GRAY, DASHES[model] ?? "solid")]),
  ];
  const drawn = [];
  let off = chips(byId("chips"), entries, found => { off = found; drawn.forEach(draw => draw()); });
  byId("plot-grid").replaceChildren(...presets.map(([title, x, y]) => {
    const chart = make("div", { class: "chart" });
    const plot = { x, y };
    const draw = () => Plotly.react(chart, traces(plot, off), screenLayout(plot, off), CONFIG);
    drawn.push(draw);
    const axis = (label, side) => {
      const select = make("select", { "aria-label": `${title}: ${label}` });
      options(select, metricNames.map(name => [name, nameOf(name)]), plot[side]);
      select.addEventListener("change", () => { plot[side] = select.value; draw(); });
      return make("label", {}, `${label} `, select);
    };
    const save = make("button", { type: "button", title: "For papers: dark on white, with a legend" }, "SVG");
    save.addEventListener("click", () => saveSvg(plot, off));
    return make("div", { class: "plot" }, make("h3", {}, title), make("div", { class: "axes" }, axis("Across", "x"), axis("Up", "y"), save), chart);
  }));
  drawn.forEach(draw => draw());
  themeChanged.push(() => drawn.forEach(draw => draw()));
}

const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]] };

const ownTraces = ({ x, y }, off) => families.filter(family => !off.has(family)).flatMap(family => familyTraces(family, x, y));
const theirTraces = ({ x, y }, off) => Object.keys(DASHES).filter(model => !off.has(`published ${model}`)).flatMap(model => publishedTraces(model, x, y));
const traces = (plot, off) => [...theirTraces(plot, off), ...ownTraces(plot, off)];

function layoutOf(plot, off, ink, line) {
  const axis = (name, range) => ({
    title: { text: data.metrics[name].label, font: { size: 12 } }, gridcolor: line, zeroline: false, linecolor: line, range, autorange: !range,
  });
  const [ours, theirs] = [ownTraces(plot, off), theirTraces(plot, off)];
  return {
    font: { color: ink, family: "system-ui, sans-serif" }, hovermode: "closest", showlegend: false,
    xaxis: axis(plot.x, rangeOf(ours, theirs, "x", plot.x)), yaxis: axis(plot.y, rangeOf(ours, theirs, "y", plot.x)),
  };
}

function screenLayout(plot, off) {
  const ink = themeColor("ink"), line = themeColor("line");
  return {
    ...layoutOf(plot, off, ink, line), margin: { l: 62, r: 12, t: 32, b: 46 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: themeColor("panel"), bordercolor: line, font: { color: ink }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: themeColor("soft"), activecolor: themeColor("accent") },
  };
}

function saveSvg(plot, off) {
  const layout = { ...layoutOf(plot, off, "#000000", "#dddddd"), showlegend: true, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", margin: { l: 62, r: 12, t: 12, b: 46 } };
  return Plotly.downloadImage({ data: traces(plot, off), layout }, { format: "svg", filename: `${plot.y}-over-${plot.x}`, width: 720, height: 420 });
}

// One curve for each set of images: means over different images do not belong together
function familyTraces(family, x, y) {
  const known = name => model => Number.isFinite(model.totals[name]?.[0]);
  const found = data.models.filter(model => model.family === family && known(x)(model) && known(y)(model));
  return [...new Set(found.map(model => model.set))].map(set => {
    const points = found.filter(model => model.set === set).sort((a, b) => (a.totals.bpp?.[0] ?? 0) - (b.totals.bpp?.[0] ?? 0));
    const values = name => points.map(model => model.totals[name][0]);
    const bars = name => ({
      type: "data", symmetric: false, thickness: 1, width: 3, color: colorOf(family),
      array: points.map(model => model.totals[name][2] - model.totals[name][0]),
      arrayminus: points.map(model => model.totals[name][0] - model.totals[name][1]),
    });
    return {
      name: set ? `${family}, images ${set + 1}` : family, x: values(x), y: values(y), mode: points.length > 1 ? "lines+markers" : "markers", type: "scatter",
      marker: { color: colorOf(family), size: 9, symbol: SYMBOLS[set % SYMBOLS.length] }, line: { color: colorOf(family), width: 2 },
      error_x: bars(x), error_y: bars(y), hovertemplate: "%{text}<extra></extra>",
      text: points.map(model => `<b>${escaped(model.key)}</b><br>` + metricNames.filter(name => model.totals[name]).map(name =>
        `${nameOf(name)} ${format(name, model.totals[name][0])}`).join("<br>")),
    };
  });
}

function publishedTraces(model, x, y) {
  const rows = data.published.filter(row => row.model === model && isValue(row[x]) && isValue(row[y])).sort((a, b) => a.bpp - b.bpp);
  return [...new Set(rows.map(row => row.dataset))].map(dataset => {
    const found = rows.filter(row => row.dataset === dataset);
    return {
      name: `${model}, ${dataset}`, x: found.map(row => row[x]), y: found.map(row => row[y]), mode: "lines+markers", type: "scatter",
      line: { color: GRAY, width: 1.3, dash: DASHES[model] }, marker: { color: GRAY, size: 5 }, hovertemplate: "%{text}<extra></extra>",
      text: found.map(row => `<b>${escaped(model)}</b>, published, ${escaped(dataset)}<br>bits per pixel ${format("bpp", row.bpp)}<br>` +
        `${nameOf(x)} ${format(x, row[x])}, ${nameOf(y)} ${format(y, row[y])}<br>${escaped(row.source).replace("; ", "<br>")}`),
    };
  });
}

// Our codecs fill the plot, with published points at rates like theirs
function rangeOf(ours, theirs, side, across) {
  const bar = side === "x" ? "error_x" : "error_y";
  const values = ours.flatMap(trace => trace[side].flatMap((value, n) => [value - trace[bar].arrayminus[n], value + trace[bar].array[n]]));
  if (!values.length) return undefined;
  if (across === "bpp" && side === "x") return [0, 1.4 * Math.max(...values)];
  const farthest = 1.4 * Math.max(...ours.flatMap(trace => trace.x));
  for (const trace of theirs) trace[side].forEach((value, n) => { if (across !== "bpp" || trace.x[n] <= farthest) values.push(value); });
  const finite = values.filter(Number.isFinite), low = Math.min(...finite), high = Math.max(...finite);
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - room, high + room];
}

const escaped = text => text.replace(/[&<>]/g, sign => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);
