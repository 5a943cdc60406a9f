// The light box: a photograph by tiles, outlines and marks over it as vectors, pen and ruler.

import { authorization } from "/page/api.js";

const SVG = "http://www.w3.org/2000/svg";
const DRAG_PX = 4; // on the screen; less is a click
const MOST_POINTS = 400;
const MOST_READY = 4; // photographs
const still = matchMedia("(prefers-reduced-motion: reduce)");

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** How often a photograph is halved until it fits a tile, as `build_pyramid` does. */
function levels(photograph) {
  let side = Math.max(photograph.width, photograph.height);
  let count = 1;
  for (; side > photograph.tile_px; count++) side = Math.ceil(side / 2);
  return count;
}

const tileUrl = (photograph, view, level, col, row) =>
  `/v1/photographs/${photograph.id}/tiles/${view}/${level}/${col}_${row}.jpg`;

function tileSource(photograph, view) {
  return {
    width: photograph.width, height: photograph.height, tileSize: photograph.tile_px, tileOverlap: 0,
    minLevel: 0, maxLevel: levels(photograph) - 1,
    getTileUrl: (level, col, row) => tileUrl(photograph, view, level, col, row),
  };
}

/** Have a photograph decoded, and the tiles of its first sight in the browser, before it is asked for. */
export function prefetch(photograph, view, box) {
  if (photograph.width === null) return;
  const last = levels(photograph) - 1;
  const shown = Math.min(box.clientWidth / photograph.width, box.clientHeight / photograph.height) * devicePixelRatio;
  const level = Math.max(0, Math.min(last, last + Math.ceil(Math.log2(shown * 1.05))));
  const scale = 0.5 ** (last - level);
  const cols = Math.ceil((photograph.width * scale) / photograph.tile_px);
  const rows = Math.ceil((photograph.height * scale) / photograph.tile_px);
  const urls = [tileUrl(photograph, view, 0, 0, 0)];
  for (let row = 0; row < rows; row++) for (let col = 0; col < cols; col++) urls.push(tileUrl(photograph, view, level, col, row));
  ready.set(photograph.id, urls.map(authorization().Authorization ? fetched : loading));
  if (ready.size > MOST_READY) ready.delete(ready.keys().next().value);
}

const ready = new Map(); // photograph -> its tiles: a picture that is held is not loaded or decoded again
const fetched = (url) => fetch(url, { headers: authorization(), priority: "low" }).then((answer) => answer.blob(), () => {});

function loading(url) {
  const image = new Image();
  image.fetchPriority = "low";
  image.src = url;
  return image;
}

/** A closed line through the middles of a polygon's sides, round at its corners. */
function path(points) {
  const at = ([row, col]) => `${col + 0.5} ${row + 0.5}`;
  const half = ([row, col], [nextRow, nextCol]) => [(row + nextRow) / 2, (col + nextCol) / 2];
  const next = (place) => points[(place + 1) % points.length];
  const first = half(points.at(-1), points[0]);
  return `M${at(first)}${points.map((point, place) => `Q${at(point)} ${at(half(point, next(place)))}`).join("")}Z`;
}

/** Half the larger side of a polygon, pixels. */
const reach = (points) => Math.max(...[0, 1].map((axis) => {
  const values = points.map((point) => point[axis]);
  return (Math.max(...values) - Math.min(...values)) / 2;
}));
const middle = (points) => points.reduce(([r, c], [row, col]) => [r + row / points.length, c + col / points.length], [0, 0]);

/** OpenSeadragon puts a style element into the page, which its policy forbids, unless one of this name is there. */
function keepStylesOut() {
  const none = document.createElementNS("", "style"); // of no language: it styles nothing
  none.setAttribute("data-openseadragon-mobile-css", "");
  document.head.append(none);
}

export class Viewer extends EventTarget {
  mode = ""; // "draw", "ruler", or neither
  view = "colour";
  photograph = null;
  #stroke = null;

  constructor(box) {
    super();
    this.box = box;
    const token = Boolean(authorization().Authorization);
    keepStylesOut();
    this.seadragon = OpenSeadragon({
      element: box, drawer: "canvas", showNavigationControl: false, showNavigator: false, blendTime: 0, alwaysBlend: false,
      immediateRender: true, animationTime: still.matches ? 0 : 0.25, springStiffness: 9, visibilityRatio: 0.6,
      minZoomImageRatio: 0.8, maxZoomPixelRatio: 10, imageLoaderLimit: 8, loadTilesWithAjax: token,
      ajaxHeaders: authorization(), gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    });
    this.seadragon.innerTracker.keyDownHandler = null; // keys are the page's
    this.seadragon.innerTracker.keyHandler = null;
    this.seadragon.canvas.setAttribute("aria-label", "Photograph");
    this.seadragon.canvas.setAttribute("role", "img");
    this.seadragon.canvas.tabIndex = -1;
    this.group = svg("g");
    this.pen = svg("g");
    this.overlay = svg("svg", { class: "overlay", "aria-hidden": "true" }, this.group, this.pen);
    this.seadragon.canvas.append(this.overlay);
    for (const name of ["update-viewport", "open", "resize"]) this.seadragon.addHandler(name, () => this.#place());
    this.seadragon.addHandler("tile-load-failed", () => this.dispatchEvent(new Event("trouble")));
    this.#listen();
  }

  /** Show a photograph that was asked for at a time; how long that took until it was seen is told to tests. */
  open(photograph, asked = performance.now()) {
    this.photograph = photograph;
    this.pen.replaceChildren();
    this.group.replaceChildren();
    this.seadragon.close();
    if (photograph.width === null) return;
    this.seadragon.addOnceHandler("tile-drawn", () => { this.box.dataset.shownMs = String(Math.round(performance.now() - asked)); });
    this.seadragon.open(tileSource(photograph, this.view));
  }

  /** Another view of the same photograph: it is laid over the one that is there, which goes when it is whole. */
  setView(view) {
    this.view = view;
    if (!this.photograph || this.photograph.width === null) return;
    const world = this.seadragon.world;
    const before = Array.from({ length: world.getItemCount() }, (_, place) => world.getItemAt(place));
    this.seadragon.addTiledImage({
      tileSource: tileSource(this.photograph, view),
      success: ({ item }) => {
        const drop = () => before.forEach((old) => world.getIndexOfItem(old) >= 0 && world.removeItem(old));
        if (item.getFullyLoaded()) drop();
        else item.addOnceHandler("fully-loaded-change", drop);
      },
    });
  }

  fit() {
    this.seadragon.viewport.goHome(still.matches);
  }

  zoom(factor) {
    this.seadragon.viewport.zoomBy(factor);
    this.seadragon.viewport.applyConstraints();
  }

  /** Bring a place into the middle, at a size at which a lesion can be judged. */
  show([row, col], diameter) {
    const side = Math.max(240, 26 * diameter);
    const rect = new OpenSeadragon.Rect(col - side / 2, row - side / 2, side, side);
    this.seadragon.viewport.fitBounds(this.seadragon.viewport.imageToViewportRectangle(rect), still.matches);
  }

  /** Draw lesions: {id, points, centre, state} with state undecided, accepted, rejected or drawn. */
  drawLesions(lesions, chosen) {
    this.group.replaceChildren(...lesions.map((lesion) => this.#lesion(lesion, lesion.id === chosen)));
    this.#place();
  }

  #lesion({ points, centre: [row, col], state }, chosen) {
    const rimmed = (d) => [svg("path", { class: "rim", d }), svg("path", { class: "line", d })];
    // Signs of constant size tell the states apart without colour, and show from afar where to look.
    const sign = { undecided: "", accepted: "M-4 13l3 3 6-7", rejected: "M-3 10l6 6m0-6l-6 6", drawn: "M0 9v8m-4-4h8" }[state];
    const afar = svg("g", { class: "afar" }, ...rimmed("M-12 0h5m14 0h5M0-12v5m0 14v4"));
    const mark = svg("g", { class: "mark" });
    if (state !== "rejected") mark.append(afar);
    if (sign) mark.append(svg("g", { class: "sign" }, ...rimmed(sign)));
    if (chosen) mark.append(svg("circle", { class: "ring" }));
    const group = svg("g", { class: `${state}${chosen ? " chosen" : ""}` },
      svg("g", { class: "outline" }, ...rimmed(path(points))), svg("g", { transform: `translate(${col + 0.5} ${row + 0.5})` }, mark));
    group.reach = reach(points);
    return group;
  }

  #place() {
    const { viewport, world } = this.seadragon;
    const item = world.getItemAt(0);
    if (!item) return;
    const origin = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const scale = (item.imageToViewerElementCoordinates(new OpenSeadragon.Point(1000, 0)).x - origin.x) / 1000;
    for (const group of [this.group, this.pen]) group.setAttribute("transform", `matrix(${scale} 0 0 ${scale} ${origin.x} ${origin.y})`);
    this.overlay.style.setProperty("--inverse", 1 / scale);
    if (scale !== this.scale || [...this.group.children].some((lesion) => !lesion.placed)) this.#size(scale);
    this.scale = scale;
    this.box.dataset.zoom = viewport.getZoom(true).toFixed(3);
  }

  /** Where a lesion is small on the screen its mark stands for it, where it is large its outline does. */
  #size(scale) {
    for (const lesion of this.group.children) {
      const radius = lesion.reach * scale;
      lesion.placed = true;
      lesion.classList.toggle("small", radius < 6);
      const sign = lesion.querySelector(".sign");
      if (sign) sign.setAttribute("transform", `translate(0 ${Math.max(2, radius - 5)})`);
      lesion.querySelector(".ring")?.setAttribute("r", Math.max(17, radius + 9));
    }
  }

  setMode(mode) {
    this.mode = mode;
    this.box.classList.toggle("drawing", Boolean(mode));
    this.#stroke = null;
    this.pen.replaceChildren();
    this.dispatchEvent(new Event("mode"));
  }

  #listen() {
    const at = (event) => {
      const point = this.seadragon.world.getItemAt(0).viewerElementToImageCoordinates(event.position);
      return [point.y - 0.5, point.x - 0.5];
    };
    const own = (handle) => (event) => {
      if (!this.mode || !this.seadragon.world.getItemCount()) return;
      event.preventDefaultAction = true;
      handle(event);
    };
    this.seadragon.addHandler("canvas-press", own((event) => { this.#stroke = [at(event)]; }));
    this.seadragon.addHandler("canvas-drag", own((event) => {
      if (!this.#stroke) return;
      if (this.mode === "ruler") this.#stroke = [this.#stroke[0], at(event)];
      else this.#stroke.push(at(event));
      this.#drawStroke();
    }));
    this.seadragon.addHandler("canvas-drag-end", own(() => {}));
    this.seadragon.addHandler("canvas-release", own((event) => {
      if (!this.#stroke) return;
      const stroke = [...this.#stroke, at(event)];
      this.#stroke = null;
      if (this.mode === "draw") this.#finish(stroke);
    }));
  }

  #drawStroke() {
    const points = this.#stroke;
    const line = `M${points.map(([row, col]) => `${col + 0.5} ${row + 0.5}`).join("L")}`;
    this.pen.replaceChildren(svg("path", { class: "rim", d: line }), svg("path", { class: "pen", d: line }));
    if (this.mode === "ruler") this.dispatchEvent(new CustomEvent("measured", { detail: Math.hypot(points[1][0] - points[0][0], points[1][1] - points[0][1]) }));
  }

  #finish(stroke) {
    this.pen.replaceChildren();
    const reach = Math.max(...stroke.map(([row, col]) => Math.hypot(row - stroke[0][0], col - stroke[0][1])));
    let points = stroke;
    if (reach * this.scale < DRAG_PX) {
      // a click: a disc as large as a microaneurysm usually is, 1/340 of the field of view
      const radius = Math.max(3, (this.photograph.fov_diameter_px ?? this.photograph.width) / 680);
      points = Array.from({ length: 16 }, (_, place) => {
        const turn = (place / 8) * Math.PI;
        return [stroke[0][0] + radius * Math.sin(turn), stroke[0][1] + radius * Math.cos(turn)];
      });
    }
    const { width, height } = this.photograph;
    const step = Math.ceil(points.length / MOST_POINTS);
    const inside = (value, most) => Math.round(10 * Math.min(Math.max(value, 0), most - 1)) / 10;
    const polygon = points.filter((_, place) => place % step === 0).map(([row, col]) => [inside(row, height), inside(col, width)]);
    if (polygon.length >= 3) this.dispatchEvent(new CustomEvent("drawn", { detail: polygon }));
  }
}

export { middle };
