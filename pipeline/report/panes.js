"use strict";
// The stage: one pane or several, which show the same part of an image at the same scale, and how pointers move them.

class Panes {
  // changed: called when scale or split changed
  constructor(stage, changed) {
    this.stage = stage;
    this.changed = changed;
    this.panes = [];
    this.width = this.height = 1;
    this.scale = null;  // screen pixels per image pixel; null: whole image
    this.center = [0.5, 0.5];
    this.split = 0.5;
    // pixels since the pointer came down: a tap moves few
    this.moved = 0;
    this.handle = this.makeHandle();
    this.splits = false;
    this.pointers = new Map();
    stage.addEventListener("wheel", event => this.wheel(event), { passive: false });
    stage.addEventListener("pointerdown", event => this.down(event));
    stage.addEventListener("pointermove", event => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, event => this.up(event));
    stage.addEventListener("dblclick", event => this.toggle(event));
    new ResizeObserver(() => this.place()).observe(stage);
  }

  // panes: each with layers [element, whether it is seen right of the line only] and tags [text, side]
  show(panes, width, height, split) {
    if (width !== this.width || height !== this.height) { this.scale = null; this.center = [0.5, 0.5]; }
    [this.width, this.height] = [width, height];
    this.panes = panes.map(({ layers, tags }) => {
      const pane = make("div", { class: "pane" });
      for (const [layer, clipped] of layers) {
        layer.classList.add("layer");
        layer.draggable = false;
        pane.append(clipped ? make("div", { class: "half" }, layer) : layer);
      }
      for (const [text, side] of tags) pane.append(make("span", { class: `tag at-${side}` }, text));
      return pane;
    });
    this.splits = split;
    const focused = this.stage.contains(document.activeElement);
    // the line stays the same element, which keeps the keyboard's focus
    for (const child of [...this.stage.children]) if (child !== this.handle) child.remove();
    this.stage.prepend(...this.panes);
    if (split) { if (!this.handle.isConnected) this.stage.append(this.handle); }
    else this.handle.remove();
    if (focused && !this.stage.contains(document.activeElement)) this.stage.focus({ preventScroll: true });
    this.place();
  }

  makeHandle() {
    const handle = make("div", { id: "split", role: "slider", tabindex: "0", "aria-label": "Line between left and right", "aria-valuemin": "0", "aria-valuemax": "100" });
    handle.addEventListener("keydown", event => {
      const place = { ArrowLeft: this.split - 0.02, ArrowRight: this.split + 0.02, Home: 0, End: 1 }[event.key];
      if (place !== undefined) { this.setSplit(place); event.preventDefault(); event.stopPropagation(); }
    });
    return handle;
  }

  size() {
    const box = (this.panes[0] ?? this.stage).getBoundingClientRect();
    return [box.width, box.height];
  }

  fitScale() { const [w, h] = this.size(); return Math.min(w / this.width, h / this.height); }
  currentScale() { return this.scale ?? this.fitScale(); }
  isFit() { return this.scale === null || this.scale <= this.fitScale() * 1.0001; }

  place() {
    if (!this.panes.length) return;
    const [w, h] = this.size(), scale = this.currentScale();
    // no more of the surroundings than has to be
    this.center = this.center.map((value, axis) => {
      const half = [w, h][axis] / 2 / scale / [this.width, this.height][axis];
      return half >= 0.5 ? 0.5 : Math.min(Math.max(value, half), 1 - half);
    });
    const sharp = scale * devicePixelRatio >= 1.99;
    for (const layer of this.stage.querySelectorAll(".layer")) {
      layer.style.width = `${this.width}px`;
      layer.style.height = `${this.height}px`;
      // on whole pixels of the screen, so that 1:1 is that
      const corner = layer.closest(".pane").getBoundingClientRect();
      const [left, top] = [[w, corner.left], [h, corner.top]].map(([side, start], axis) =>
        snapped(start + side / 2 - this.center[axis] * [this.width, this.height][axis] * scale) - start);
      layer.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
      layer.style.imageRendering = sharp ? "pixelated" : "auto";
    }
    this.stage.style.touchAction = this.isFit() ? "pan-y" : "none";
    this.placeSplit();
    this.changed();
  }

  placeSplit() {
    const percent = this.split * 100;
    for (const half of this.stage.querySelectorAll(".half")) half.style.clipPath = `inset(0 0 0 ${percent}%)`;
    this.handle.style.left = `${percent}%`;
    this.handle.setAttribute("aria-valuenow", Math.round(percent));
  }

  setSplit(value) { this.split = Math.min(Math.max(value, 0), 1); this.placeSplit(); }

  // zooms so that what is under a point of the stage stays there
  zoomTo(scale, point = null) {
    const [w, h] = this.size(), old = this.currentScale(), least = this.fitScale();
    const offset = point ? [point[0] - w / 2, point[1] - h / 2] : [0, 0];
    const next = Math.min(Math.max(scale, Math.min(least, 1 / devicePixelRatio)), 32);
    this.center = this.center.map((value, axis) => value + offset[axis] * (1 / old - 1 / next) / [this.width, this.height][axis]);
    this.scale = next <= least * 1.0001 && next >= least * 0.9999 ? null : next;
    this.place();
  }

  zoomBy(factor, point = null) { this.zoomTo(this.currentScale() * factor, point); }
  fit() { this.scale = null; this.place(); }
  one() { this.zoomTo(1 / devicePixelRatio); }

  // where a point of the window lies in the pane below it
  pointIn(x, y) {
    const boxes = this.panes.map(pane => pane.getBoundingClientRect());
    const box = boxes.find(each => x >= each.left && x <= each.right && y >= each.top && y <= each.bottom) ?? boxes[0];
    return [x - box.left, y - box.top];
  }

  // the page scrolls unless the reader has turned to the pictures
  wheel(event) {
    if (!event.ctrlKey && !this.stage.matches(":focus-within")) return;
    event.preventDefault();
    this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), this.pointIn(event.clientX, event.clientY));
  }

  down(event) {
    if (event.button) return;
    const splits = this.splits && (event.target === this.handle || this.isFit());
    this.moved = 0;
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, splits });
    this.stage.setPointerCapture(event.pointerId);
    if (event.target !== this.handle) this.stage.focus({ preventScroll: true });
    if (splits && event.target !== this.handle && event.pointerType === "mouse") this.dragSplit(event);
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = { x: event.clientX, y: event.clientY, splits: before.splits };
    this.moved += Math.abs(now.x - before.x) + Math.abs(now.y - before.y);
    const others = [...this.pointers.entries()].filter(([id]) => id !== event.pointerId).map(([, pointer]) => pointer);
    if (others.length) {
      const distance = pointer => Math.hypot(pointer.x - others[0].x, pointer.y - others[0].y) || 1;
      this.zoomBy(distance(now) / distance(before), this.pointIn((now.x + others[0].x) / 2, (now.y + others[0].y) / 2));
    } else if (before.splits) this.dragSplit(event);
    else {
      const scale = this.currentScale();
      this.center = [this.center[0] - (now.x - before.x) / scale / this.width, this.center[1] - (now.y - before.y) / scale / this.height];
      this.place();
    }
    this.pointers.set(event.pointerId, now);
  }

  up(event) { this.pointers.delete(event.pointerId); }

  dragSplit(event) {
    const box = this.stage.getBoundingClientRect();
    this.setSplit((event.clientX - box.left) / box.width);
  }

  toggle(event) {
    if (event.target === this.handle) return;
    if (this.isFit()) this.zoomTo(Math.max(1 / devicePixelRatio, this.fitScale() * 2), this.pointIn(event.clientX, event.clientY));
    else this.fit();
  }
}

const snapped = value => Math.round(value * devicePixelRatio) / devicePixelRatio;
