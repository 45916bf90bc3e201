"use strict";
// Compares the original and any two codecs on one image: split, side by side, flicker, difference.

const FLICKER_MS = 700;

class Viewer {
  constructor() {
    this.pictures = data.pictures;
    this.loaded = new Map();
    this.mode = "split";
    this.held = false;
    this.shows = 0;
    const names = this.pictures[0].models;
    this.image = this.pictures[0].image;
    [this.left, this.right] = [names[0], names[1]];
    this.panes = new Panes(byId("stage"), () => this.zoomed());
    this.orders();
    this.readAddress();
    this.connect();
    this.look({});
  }

  entry() { return this.pictures.find(entry => entry.image === this.image); }
  models() { return this.entry().models; }

  // data URIs of an image by codec, read when they are first needed
  uris(image) {
    if (!this.loaded.has(image)) {
      const number = this.pictures.findIndex(entry => entry.image === image);
      const listed = JSON.parse(byId(`pictures-${number}`).textContent);
      this.loaded.set(image, new Map(this.pictures[number].models.map((model, n) => [model, listed[n]])));
    }
    return this.loaded.get(image);
  }

  orders() {
    const entries = [["name", "by name"]];
    for (const name of imageMetrics) {
      const label = nameOf(name);
      const ends = name === "bpp" ? ["most", "fewest"] : ["worst", "best"];
      entries.push([`${name} worst`, `${ends[0]} ${label} first`], [`${name} best`, `${ends[1]} ${label} first`]);
    }
    const preferred = data.realism.find(name => imageMetrics.includes(name)) ?? "bpp";
    this.order = `${preferred} worst`;
    this.judged = data.models[0].key;
    options(byId("order"), entries, this.order);
    this.sort();
    this.image = this.ordered[0].image;
  }

  // by values of the codec on the right when the order was chosen, of the first one if that is the original
  sort() {
    const [name, end] = this.order.split(" ");
    const sign = (data.metrics[name]?.higher ? 1 : -1) * (end === "best" ? -1 : 1);
    const value = entry => (end ? rowOf(entry.image, this.judged)?.[name] : null);
    const byName = (a, b) => a.image.localeCompare(b.image, "en", { numeric: true });
    this.ordered = [...this.pictures].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // what was not measured stays at the end
      if (!isValue(x) || !isValue(y)) return isValue(y) - isValue(x) || byName(a, b);
      return x === y ? byName(a, b) : sign * (x < y ? -1 : 1);
    });
    byId("judged").textContent = end ? `of ${this.judged}` : "";
    options(byId("image"), this.ordered.map(entry => [entry.image, entry.image]), this.image);
  }

  connect() {
    byId("order").addEventListener("change", event => this.reorder(event.target.value));
    byId("image").addEventListener("change", event => this.look({ image: event.target.value }));
    byId("left").addEventListener("change", event => this.look({ left: event.target.value }));
    byId("right").addEventListener("change", event => this.look({ right: event.target.value }));
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    byId("swap").addEventListener("click", () => this.swap());
    byId("zoom-in").addEventListener("click", () => this.panes.zoomBy(1.5));
    byId("zoom-out").addEventListener("click", () => this.panes.zoomBy(1 / 1.5));
    byId("zoom-fit").addEventListener("click", () => this.panes.fit());
    byId("zoom-one").addEventListener("click", () => this.panes.one());
    byId("gain").addEventListener("input", () => { byId("gain-value").textContent = byId("gain").value; this.draw(); });
    for (const button of document.querySelectorAll("[data-mode]")) button.addEventListener("click", () => this.look({ mode: button.dataset.mode }));
    byId("viewer").addEventListener("keydown", event => this.key(event));
    byId("stage").addEventListener("click", () => { if (this.shown === "flicker" && this.panes.moved < 6) this.hold(); });
    addEventListener("hashchange", () => { if (this.readAddress()) this.look({}); });
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    setInterval(() => { if (this.shown === "flicker" && !this.held && !still) this.flick(); }, FLICKER_MS);
    this.strip();
  }

  reorder(order) {
    this.order = order;
    this.judged = models.has(this.right) ? this.right : data.models[0].key;
    this.sort();
    this.strip();
    this.look({ image: this.ordered[0].image });
  }

  look(change) {
    Object.assign(this, change);
    const names = this.models();
    if (!names.includes(this.left)) this.left = names[0];
    if (!names.includes(this.right)) this.right = names[1] ?? names[0];
    this.draw();
  }

  step(by) {
    const number = this.ordered.findIndex(entry => entry.image === this.image);
    this.look({ image: this.ordered[(number + by + this.ordered.length) % this.ordered.length].image });
  }

  cycle(side, by) {
    const names = this.models();
    this.look({ [side]: names[(names.indexOf(this[side]) + by + names.length) % names.length] });
  }

  swap() { this.look({ left: this.right, right: this.left }); }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
    // a button's own key
    if (event.key === " " && event.target.matches("button, summary")) return;
    const side = event.shiftKey ? "left" : "right";
    const modes = { s: "split", b: "side", f: "flicker", d: "difference" };
    const acts = {
      ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      ArrowUp: () => this.cycle(side, -1), ArrowDown: () => this.cycle(side, 1),
      "+": () => this.panes.zoomBy(1.5), "=": () => this.panes.zoomBy(1.5), "-": () => this.panes.zoomBy(1 / 1.5),
      0: () => this.panes.fit(), 1: () => this.panes.one(), x: () => this.swap(), " ": () => this.hold(),
    };
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (modes[name]) this.look({ mode: modes[name] });
    else if (acts[name]) acts[name]();
    else return;
    event.preventDefault();
  }

  // in flicker: stop at the one shown, then change by hand; elsewhere the line jumps to the other side
  hold() {
    if (this.shown === "flicker") { this.held = true; this.flick(); }
    else if (this.shown === "split") this.panes.setSplit(this.panes.split > 0.5 ? 0 : 1);
  }

  flick() {
    this.shows = 1 - this.shows;
    const pane = this.panes.panes[0];
    pane.querySelectorAll(".layer").forEach((layer, n) => { layer.style.visibility = n === this.shows ? "visible" : "hidden"; });
    pane.querySelectorAll(".tag").forEach((tag, n) => { tag.style.visibility = n === this.shows ? "visible" : "hidden"; });
  }

  picture(model) { return make("img", { src: this.uris(this.image).get(model), alt: `${this.image}, ${model}` }); }

  async draw() {
    const [left, right] = [this.picture(this.left), this.picture(this.right)];
    const original = this.picture(data.original);
    const wanted = this.drawing = {};
    try {
      await Promise.all([left, right, original].map(image => image.decode()));
    } catch {
      if (this.drawing === wanted) byId("stage").replaceChildren(make("p", { class: "stopped" }, "This browser cannot show these pictures: it has to know AVIF and WebP."));
      return;
    }
    // the reader may have gone on
    if (this.drawing !== wanted) return;
    this.shown = this.mode;
    this.describe();
    const stage = byId("stage");
    stage.classList.toggle("side", this.mode === "side");
    stage.style.setProperty("--ratio", original.naturalWidth / original.naturalHeight);
    byId("gain-label").hidden = this.mode !== "difference";
    byId("stored").textContent = data.picture_psnr_db ? `(pictures are stored at ${data.picture_psnr_db.toFixed(1)} dB or better)` : "";
    const panes = {
      split: () => [{ layers: [[left, false], [right, true]], tags: [[this.left, "left"], [this.right, "right"]] }],
      side: () => [[original, data.original], [left, this.left], [right, this.right]].map(([image, name]) =>
        ({ layers: [[image, false]], tags: [[name, "left"]] })),
      flicker: () => [{ layers: [[left, false], [right, false]], tags: [[this.left, "left"], [this.right, "right"]] }],
      difference: () => [{ layers: [[difference(left, right, Number(byId("gain").value)), false]],
        tags: [[`${this.left} against ${this.right}, times ${byId("gain").value}`, "left"]] }],
    }[this.mode]();
    if (this.mode === "side" && (this.left === data.original || this.right === data.original)) panes.shift();
    this.panes.show(panes, original.naturalWidth, original.naturalHeight, this.mode === "split");
    if (this.mode === "flicker") { this.held = false; this.shows = 1; this.flick(); }
    stage.dataset.ready = `${this.image} ${this.left} ${this.right} ${this.mode}`;
    this.writeAddress();
  }

  describe() {
    byId("image").value = this.image;
    options(byId("left"), this.models().map(name => [name, name]), this.left);
    options(byId("right"), this.models().map(name => [name, name]), this.right);
    for (const button of document.querySelectorAll("[data-mode]")) button.setAttribute("aria-pressed", String(button.dataset.mode === this.mode));
    for (const button of byId("strip").children) button.setAttribute("aria-pressed", String(button.dataset.image === this.image));
    for (const line of document.querySelectorAll("#image-table .chosen")) line.classList.remove("chosen");
    for (const line of document.querySelectorAll(`#image-table tr[data-image="${CSS.escape(this.image)}"]`)) {
      line.classList.toggle("chosen", [this.left, this.right].includes(line.dataset.model));
    }
    this.caption();
  }

  // values of both: a row each, or on narrow screens a column each
  caption() {
    const sides = [this.left, this.right], rows = sides.map(name => rowOf(this.image, name)), names = ["bytes", ...imageMetrics];
    const wins = name => {
      const [a, b] = rows.map(row => row?.[name]);
      if (!isValue(a) || !isValue(b) || a === b || ["bpp", "bytes"].includes(name)) return null;
      return a > b === data.metrics[name].higher ? 0 : 1;
    };
    const head = name => make("th", { title: (data.metrics[name] && direction(name)) || null }, name === "bytes" ? name : nameOf(name));
    const side = n => make("th", { scope: "row" }, `${n ? "right" : "left"}: ${sides[n]}`);
    const cell = (name, n) => make("td", { class: wins(name) === n ? "wins" : null }, format(name, rows[n]?.[name]));
    byId("caption").replaceChildren(...(matchMedia("(max-width: 640px)").matches
      ? [make("thead", {}, make("tr", {}, make("th", {}, ""), side(0), side(1))),
        make("tbody", {}, ...names.map(name => make("tr", {}, head(name), cell(name, 0), cell(name, 1))))]
      : [make("thead", {}, make("tr", {}, make("th", {}, ""), ...names.map(head))),
        make("tbody", {}, ...[0, 1].map(n => make("tr", {}, side(n), ...names.map(name => cell(name, n)))))]));
  }

  zoomed() { byId("zoom-label").textContent = `${Math.round(this.panes.currentScale() * devicePixelRatio * 100)} %`; }

  strip() {
    const seen = new IntersectionObserver((entries, observer) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        target.append(make("img", { src: this.uris(target.dataset.image).get(data.original), alt: "", loading: "lazy", decoding: "async" }));
      }
    });
    byId("strip").replaceChildren(...this.ordered.map(({ image }) => {
      const button = make("button", { type: "button", title: image, "aria-label": image, "data-image": image });
      button.addEventListener("click", () => this.look({ image }));
      seen.observe(button);
      return button;
    }));
  }

  // whether the address names a picture
  readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const entry = this.pictures.find(each => each.image === asked.get("image"));
    if (!entry) return false;
    this.image = entry.image;
    for (const side of ["left", "right"]) if (entry.models.includes(asked.get(side))) this[side] = asked.get(side);
    if (["split", "side", "flicker", "difference"].includes(asked.get("mode"))) this.mode = asked.get("mode");
    return true;
  }

  writeAddress() {
    const { image, left, right, mode } = this;
    const address = `#${new URLSearchParams({ image, left, right, mode })}`;
    // links to sections keep theirs until a picture is chosen; inside some frames it is not allowed
    if (this.first === undefined) { this.first = address; return; }
    try { history.replaceState(null, "", address); } catch { return; }
  }
}

// |a - b| of every channel, times `gain`
function difference(a, b, gain) {
  const [width, height] = [a.naturalWidth, a.naturalHeight];
  const canvas = make("canvas", { width, height, role: "img", "aria-label": "difference" });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [first, second] = [a, b].map(image => { context.drawImage(image, 0, 0); return context.getImageData(0, 0, width, height); });
  for (let n = 0; n < first.data.length; n++) {
    if (n % 4 !== 3) first.data[n] = Math.min(255, gain * Math.abs(first.data[n] - second.data[n]));
  }
  context.putImageData(first, 0, 0);
  return canvas;
}
