// Decisions of this browser: kept here until the service has them, and what follows from them for a photograph.

import { askJson, Refused } from "/page/api.js";

const PREFIX = "ma_cluster.event.";
const AGAIN_MS = [500, 1000, 2000, 5000];

const random = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const stamp = (ms) => new Date(ms).toISOString().replace(/[-:]/g, "");

/** Sends events one after the other; each lies in localStorage, under its own name, until it is kept. */
export class Decisions extends EventTarget {
  #last = 0;
  #sending = false;
  #failures = 0;
  #own = new Map(); // photograph -> events that were decided or sent since the page was opened
  offline = false;
  trouble = "";

  constructor(run) {
    super();
    this.run = run;
    for (const { event } of this.#waiting()) this.#remember(event);
    addEventListener("online", () => this.send());
    addEventListener("storage", () => this.#changed());
    this.send();
  }

  #waiting() {
    const found = [];
    for (let place = 0; place < localStorage.length; place++) {
      const name = localStorage.key(place);
      if (!name.startsWith(PREFIX)) continue;
      const kept = JSON.parse(localStorage.getItem(name));
      if (kept.run === this.run) found.push({ name, event: kept.event });
    }
    return found.sort((one, other) => (one.event.at < other.event.at ? -1 : 1));
  }

  get unsaved() {
    return this.#waiting().length;
  }

  #remember(event) {
    this.#own.set(event.photograph, [...(this.#own.get(event.photograph) ?? []), event]);
  }

  /** Events of a photograph: those the service told of, and those of this browser that it may not know yet. */
  of(photograph, told) {
    const known = new Set(told.map((event) => event.id));
    return [...told, ...(this.#own.get(photograph) ?? []).filter((event) => !known.has(event.id))];
  }

  decide(reviewer, photograph, kind, said = {}) {
    this.#last = Math.max(Date.now(), this.#last + 1); // their order is that of their times
    const event = { id: random(), at: stamp(this.#last), reviewer, photograph, kind, ...said };
    localStorage.setItem(PREFIX + event.id, JSON.stringify({ run: this.run, event }));
    this.#remember(event);
    this.#changed();
    this.send();
    return event;
  }

  async send() {
    if (this.#sending) return;
    this.#sending = true;
    try {
      for (let next = this.#waiting()[0]; next; next = this.#waiting()[0]) {
        await this.#sendOne(next);
      }
    } finally {
      this.#sending = false;
      this.#changed();
    }
  }

  async #sendOne({ name, event }) {
    try {
      const body = JSON.stringify(event);
      await askJson("/v1/reviews", { method: "POST", body, headers: { "Content-Type": "application/json" } });
      localStorage.removeItem(name);
      this.#failures = 0;
      this.trouble = "";
      this.online(true);
    } catch (error) {
      if (error instanceof Refused && error.status === 422) {
        localStorage.removeItem(name); // it will never be taken
        this.trouble = `a decision was refused: ${error.message}`;
        return;
      }
      this.trouble = error instanceof Refused ? error.message : "";
      this.online(false);
      const pause = AGAIN_MS[Math.min(this.#failures++, AGAIN_MS.length - 1)];
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  /** What somebody who asked the service has learnt of it. */
  online(yes) {
    if (this.offline === !yes) return this.#changed();
    this.offline = !yes;
    this.#changed();
    if (yes) this.send();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** What a reviewer thinks of a photograph: the same rules as `standing` in review/events.py. */
export function standing(events, reviewer) {
  const own = events
    .filter((event) => event.reviewer === reviewer)
    .sort((one, other) => (one.at + one.id < other.at + other.id ? -1 : 1));
  const undone = new Set(own.filter((event) => event.kind === "undo").map((event) => event.undoes));
  const left = own.filter((event) => event.kind !== "undo" && !undone.has(event.id));
  const found = { verdicts: new Map(), drawn: new Map(), grade: null, note: "", done: false, last: left.at(-1) ?? null };
  for (const event of left) {
    if (event.kind === "accept" || event.kind === "reject") found.verdicts.set(event.lesion, event.kind);
    else if (event.kind === "draw") found.drawn.set(event.id, event.polygon);
    else if (event.kind === "grade") found.grade = event.grade;
    else if (event.kind === "note") found.note = event.note;
    else if (event.kind === "done") found.done = true;
  }
  return found;
}
