// The worklist: rows that are there only while they are seen, fetched by pages, however many there are.

import { askJson, badge, make, showPicture } from "/page/api.js";

const ROW_PX = 60;
const HEAD_PX = 32;
const PAGE = 100;
const element = (id) => document.getElementById(id);
const TRIAGE = [["", "All"], ["refer", "Refer"], ["ungradable", "Ungradable"], ["none", "No signs"], ["unscored", "Not scored"]];
const TODO = [["", "All"], ["todo", "To do"], ["done", "Done"]];
const SORTS = {
  worst: "Worst first", score: "Image score", lesions: "Lesions", quality: "Quality", key: "Name", visit: "Patient, visit",
};
export const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** A group of buttons of which one is chosen. */
export function segments(box, choices, chosen, choose) {
  box.replaceChildren(
    ...choices.map(([value, label, count, key]) =>
      make("button", {
        role: "radio", "aria-checked": String(value === chosen()), onclick: () => choose(value), type: "button",
      }, label, count === undefined ? null : make("small", {}, count.toLocaleString("en")), key ? make("kbd", {}, key) : null)),
  );
}

export class Worklist extends EventTarget {
  #pages = new Map();
  #asked = new Set();
  #asOf = "";
  #generation = 0;
  query = { sort: "worst", descending: true, triage: "", flag: "", state: "", text: "" };
  total = 0;
  chosen = 0;
  reviewer = "";
  counts = null;

  constructor() {
    super();
    this.table = element("table");
    this.rows = element("rows");
    this.table.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.table);
    let typing;
    element("text").addEventListener("input", (event) => {
      clearTimeout(typing);
      typing = setTimeout(() => this.ask({ text: event.target.value }), 150);
    });
    element("flag").addEventListener("change", (event) => this.ask({ flag: event.target.value }));
    element("sort").addEventListener("change", (event) => {
      this.ask({ sort: event.target.value, descending: !["key", "visit", "quality"].includes(event.target.value) });
    });
  }

  /** Begin a new walk with other wishes, or the same once more. */
  async ask(wishes = {}, keep = false) {
    Object.assign(this.query, wishes);
    const generation = ++this.#generation;
    const [first, counts] = await Promise.all([this.#fetch(0, ""), askJson(`/v1/run?reviewer=${this.reviewer}`)]);
    if (generation !== this.#generation) return;
    this.#pages = new Map([[0, first.rows]]);
    this.#asked = new Set([0]);
    this.#asOf = first.as_of;
    this.total = first.total;
    this.counts = counts;
    if (!keep) {
      this.chosen = 0;
      this.table.scrollTop = 0;
    }
    this.chosen = Math.max(0, Math.min(this.chosen, this.total - 1));
    this.#drawFilters();
    this.rows.style.height = `${this.total * ROW_PX}px`;
    this.table.setAttribute("aria-rowcount", this.total + 1);
    element("empty").classList.toggle("hidden", this.total > 0);
    element("empty").textContent = counts.photographs ? "No photograph is of this kind." : "Nothing is scored yet.";
    this.draw(true);
    this.dispatchEvent(new Event("asked"));
  }

  #fetch(page, asOf) {
    const wishes = { ...this.query, reviewer: this.reviewer, as_of: asOf, start: page * PAGE, count: PAGE };
    return askJson(`/v1/photographs?${new URLSearchParams(wishes)}`);
  }

  /** The row at a place of the walk; undefined beyond its ends. */
  async at(place) {
    if (place < 0 || place >= this.total) return undefined;
    const page = Math.floor(place / PAGE);
    if (!this.#pages.has(page)) this.#pages.set(page, (await this.#fetch(page, this.#asOf)).rows);
    return this.#pages.get(page)[place % PAGE];
  }

  choose(place) {
    if (!this.total) return;
    this.chosen = Math.max(0, Math.min(place, this.total - 1));
    const top = this.chosen * ROW_PX;
    const room = this.table.clientHeight - HEAD_PX;
    if (top < this.table.scrollTop) this.table.scrollTop = top;
    else if (top + ROW_PX > this.table.scrollTop + room) this.table.scrollTop = top + ROW_PX - room;
    this.draw();
  }

  /** Put the rows that are seen into the page. */
  draw(anew = false) {
    if (!this.table.clientHeight) return;
    const first = Math.max(0, Math.floor(this.table.scrollTop / ROW_PX) - 4);
    const last = Math.min(this.total, Math.ceil((this.table.scrollTop + this.table.clientHeight) / ROW_PX) + 4);
    const present = new Map(anew ? [] : [...this.rows.children].map((row) => [Number(row.dataset.place), row]));
    const shown = [];
    for (let place = first; place < last; place++) {
      const page = Math.floor(place / PAGE);
      const known = this.#pages.get(page)?.[place % PAGE];
      let row = present.get(place);
      if (!known) this.#load(page);
      if (!row || (known && row.dataset.id !== known.id)) row = known ? this.#row(known, place) : this.#blank(place);
      row.setAttribute("aria-selected", String(place === this.chosen));
      shown.push(row);
    }
    const stay = new Set(shown);
    for (const row of [...this.rows.children]) if (!stay.has(row)) row.remove();
    for (const row of shown) if (row.parentNode !== this.rows) this.rows.append(row);
    if (this.total) this.table.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    else this.table.removeAttribute("aria-activedescendant");
  }

  #load(page) {
    if (this.#asked.has(page)) return;
    this.#asked.add(page);
    const generation = this.#generation;
    this.#fetch(page, this.#asOf).then((answer) => {
      if (generation !== this.#generation) return;
      this.#pages.set(page, answer.rows);
      this.draw();
    }, () => this.#asked.delete(page));
  }

  #place(row, place) {
    row.style.top = `${place * ROW_PX}px`;
    row.dataset.place = place;
    row.id = `row-${place}`;
    row.setAttribute("aria-rowindex", place + 2);
    row.addEventListener("click", () => {
      this.choose(place);
      this.dispatchEvent(new Event("open"));
    });
    return row;
  }

  #blank(place) {
    return this.#place(make("div", { className: "row", role: "row" }, make("span", { role: "gridcell" })), place);
  }

  #row(known, place) {
    const cell = (...children) => make("span", { role: "gridcell" }, ...children);
    const slash = known.key.lastIndexOf("/");
    const picture = known.overlay_key ? make("img", { alt: "", loading: "lazy", decoding: "async" }) : make("span", { className: "noimage" });
    if (known.overlay_key) showPicture(picture, `/v1/photographs/${known.id}/thumbnail.jpg`);
    const visit = [known.patient, known.eye, known.visit].filter(Boolean).join(" · ");
    const number = cell(known.lesion_count === null ? "–" : String(known.lesion_count));
    number.className = "number";
    const reviewers = cell(known.reviewers ? String(known.reviewers) : "–");
    reviewers.className = "number";
    const row = make("div", { className: "row", role: "row", title: known.key },
      cell(picture),
      cell(make("span", { className: "name" }, known.key.slice(slash + 1)),
        make("span", { className: "under" }, visit || known.key.slice(0, Math.max(0, slash)))),
      cell(badge(known.status === "scored" ? known.triage ?? "none" : "unscored")),
      cell(score(known.image_score)),
      number,
      cell(...quality(known)),
      cell(...yours(known)),
      reviewers);
    row.dataset.id = known.id;
    return this.#place(row, place);
  }

  #drawFilters() {
    const { triage, flags, done, photographs, planned } = this.counts;
    const numbered = TRIAGE.map(([value, label]) => [value, label, value ? triage[value] ?? 0 : photographs]);
    segments(element("triage"), numbered, () => this.query.triage, (value) => this.ask({ triage: value }));
    segments(element("todo"), TODO, () => this.query.state, (value) => this.ask({ state: value }));
    const flag = element("flag");
    flag.replaceChildren(new Option("any", ""), ...Object.entries(flags).map(([name, count]) => new Option(`${name.replaceAll("_", " ")} (${count})`, name)));
    flag.value = this.query.flag;
    const sort = element("sort");
    sort.replaceChildren(...this.counts.sorts.map((name) => new Option(SORTS[name], name)));
    sort.value = this.query.sort;
    const bar = make("b");
    bar.style.width = `${photographs ? (100 * done) / photographs : 0}%`;
    const more = photographs < planned ? `, ${(planned - photographs).toLocaleString("en")} not yet scored` : "";
    element("progress").replaceChildren(
      `${done.toLocaleString("en")} of ${photographs.toLocaleString("en")} done${more}`,
      make("i", { "aria-hidden": "true" }, bar));
  }
}

function score(value) {
  if (value === null) return "–";
  const bar = make("i");
  bar.style.width = `${100 * value}%`;
  return make("span", { className: "score" }, fixed(value, 2), make("span", { className: "meter", "aria-hidden": "true" }, bar));
}

function quality(known) {
  if (known.status !== "scored") return [make("span", { className: "under", title: known.detail ?? "" }, known.reason ?? "")];
  const flags = known.flags.filter((flag) => flag !== "field_assumed").map((flag) => flag.replaceAll("_", " "));
  const line = `${known.gradable === false ? "ungradable " : ""}${fixed(known.quality, 2)}`;
  return [make("span", {}, line), make("span", { className: "under" }, flags.join(", "))];
}

function yours(known) {
  const said = [];
  if (known.done) said.push("✓ done");
  else if (known.judged || known.grade) said.push("begun");
  const parts = [];
  if (known.judged) parts.push(`${known.judged} judged`);
  if (known.grade) parts.push(known.grade);
  if (!said.length) return ["–"];
  return [make("span", { className: "yours" }, said.join("")), make("span", { className: "under" }, parts.join(", "))];
}
