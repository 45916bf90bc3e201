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
    ...families.map(family => [family, family, colorOf(family), true]),
    ...published.map(model => [`published ${model}`, `${model}, published`, "#888888", true]),
  ];
  const drawn = [];
  let off = chips(byId("chips"), entries, found => { off = found; drawn.forEach(draw => draw()); });
  byId("plot-grid").replaceChildren(...presets.map(([title, x, y]) => {
    const chart = make("div", { class: "chart" });
    const axis = (label, chosen, changed) => {
      const select = make("select", { "aria-label": `${title}: ${label}` });
      options(select, metricNames.map(name => [name, name === "bpp" ? "bits per pixel" : data.metrics[name].name]), chosen);
      select.addEventListener("change", () => changed(select.value));
      return make("label", {}, `${label} `, select);
    };
    const plot = { x, y };
    const draw = () => drawPlot(chart, plot.x, plot.y, off);
    drawn.push(draw);
    return make("div", { class: "plot" }, make("h3", {}, title), make("div", { class: "axes" },
      axis("Across", x, value => { plot.x = value; draw(); }), axis("Up", y, value => { plot.y = value; draw(); })), chart);
  }));
  drawn.forEach(draw => draw());
  themeChanged.push(() => drawn.forEach(draw => draw()));
}

function drawPlot(chart, x, y, off) {
  const ours = families.filter(family => !off.has(family)).map(family => ownTrace(family, x, y));
  const theirs = Object.keys(PUBLISHED).filter(model => !off.has(`published ${model}`)).flatMap(model => publishedTraces(model, x, y));
  const ink = themeColor("ink"), line = themeColor("line");
  const axis = (name, range) => ({
    title: { text: data.metrics[name].label, font: { size: 12 } }, gridcolor: line, zeroline: false, linecolor: line,
    range, autorange: range ? false : true,
  });
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif" },
    margin: { l: 62, r: 12, t: 32, b: 46 }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: themeColor("panel"), bordercolor: line, font: { color: ink }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: themeColor("soft"), activecolor: themeColor("accent") },
    xaxis: axis(x, rangeOf(ours, theirs, "x", x)), yaxis: axis(y, rangeOf(ours, theirs, "y", x)),
  };
  const config = {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { format: "svg", filename: `${y}-over-${x}`, width: 640, height: 420 },
  };
  Plotly.react(chart, [...theirs, ...ours], layout, config);
}

function ownTrace(family, x, y) {
  const points = data.models.filter(model => model.family === family && model.totals[x] && model.totals[y]);
  points.sort((a, b) => (a.totals.bpp?.[0] ?? 0) - (b.totals.bpp?.[0] ?? 0));
  const values = name => points.map(model => model.totals[name][0]);
  const bars = name => ({
    type: "data", symmetric: false, thickness: 1, width: 3, color: colorOf(family),
    array: points.map(model => model.totals[name][2] - model.totals[name][0]),
    arrayminus: points.map(model => model.totals[name][0] - model.totals[name][1]),
  });
  return {
    name: family, x: values(x), y: values(y), mode: points.length > 1 ? "lines+markers" : "markers", type: "scatter",
    marker: { color: colorOf(family), size: 9 }, line: { color: colorOf(family), width: 2 }, error_x: bars(x), error_y: bars(y),
    text: points.map(model => `<b>${escaped(model.key)}</b><br>` + metricNames.filter(name => model.totals[name]).map(name =>
      `${name === "bpp" ? "bits per pixel" : data.metrics[name].name} ${format(name, model.totals[name][0])}`).join("<br>")),
    hovertemplate: "%{text}<extra></extra>",
  };
}

function publishedTraces(model, x, y) {
  const rows = data.published.filter(row => row.model === model && isNumber(row[x]) && isNumber(row[y])).sort((a, b) => a.bpp - b.bpp);
  return [...new Set(rows.map(row => row.dataset))].map(dataset => {
    const found = rows.filter(row => row.dataset === dataset);
    return {
      name: `${model}, ${dataset}`, x: found.map(row => row[x]), y: found.map(row => row[y]), mode: "lines+markers", type: "scatter",
      line: { color: "#888888", width: 1.3, dash: PUBLISHED[model] }, marker: { color: "#888888", size: 5 },
      text: found.map(row => `<b>${escaped(model)}</b>, published, ${escaped(dataset)}<br>bits per pixel ${format("bpp", row.bpp)}<br>` +
        `${data.metrics[x].name} ${format(x, row[x])}, ${data.metrics[y].name} ${format(y, row[y])}<br>${escaped(row.source).replace("; ", "<br>")}`),
      hovertemplate: "%{text}<extra></extra>",
    };
  });
}

// Our codecs fill the plot, with published points at rates like theirs
function rangeOf(ours, theirs, side, across) {
  const values = ours.flatMap(trace => trace[side].flatMap((value, n) => {
    const bar = side === "x" ? trace.error_x : trace.error_y;
    return [value - bar.arrayminus[n], value + bar.array[n]];
  }));
  if (!values.length) return undefined;
  if (across === "bpp" && side === "x") return [0, 1.4 * Math.max(...values)];
  const farthest = 1.4 * Math.max(...ours.flatMap(trace => trace.x));
  for (const trace of theirs) trace[side].forEach((value, n) => { if (across !== "bpp" || trace.x[n] <= farthest) values.push(value); });
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - room, high + room];
}

const escaped = text => text.replace(/[&<>]/g, sign => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);
