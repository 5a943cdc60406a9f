// The review page: who decides, which photograph is open, what keys do.

import { askJson, badge, make } from "/page/api.js";
import { Decisions, standing } from "/page/decisions.js";
import { Viewer, middle, prefetch } from "/page/viewer.js";
import { Worklist, fixed, segments } from "/page/worklist.js";

const element = (id) => document.getElementById(id);
const REVIEWER = "ma_cluster.reviewer";
const POLL_MS = 5000;
const PRELOAD_MS = 300;
const VIEWS = [["colour", "Colour", undefined, "C"], ["red-free", "Red-free", undefined, "R"], ["enhanced", "Enhanced", undefined, "E"]];
const worklist = new Worklist();
const photographs = new Map(); // id -> promise of what is known
let run, decisions, viewer, earlier;
let reviewer = "";
let open = null; // the photograph that is shown
let chosen = null; // the lesion that is
let seen = 0;
let preloading;
let askedAt; // when a photograph was asked for, for whoever measures

const say = (text) => { element("said").textContent = text; };
const microns = (photograph, px) => {
  if (!photograph.scale) return "";
  return ` · ${photograph.scale.assumed ? "≈ " : ""}${Math.round(px * photograph.scale.um_per_px)} µm`;
};

function photographOf(id) {
  if (!photographs.has(id)) {
    const asked = askJson(`/v1/photographs/${id}`);
    asked.catch(() => photographs.delete(id));
    photographs.set(id, asked);
    if (photographs.size > 60) photographs.delete(photographs.keys().next().value);
  }
  return photographs.get(id);
}

// ---- a photograph

async function show(id) {
  worklist.table.blur();
  document.body.classList.add("looking");
  element("worklist").classList.add("hidden");
  for (const shown of ["viewer", "back", "steps"]) element(shown).classList.remove("hidden");
  viewer ??= newViewer();
  let photograph;
  try {
    photograph = await photographOf(id);
  } catch (error) {
    return trouble(error.message);
  }
  if (location.hash !== `#/${id}`) return;
  trouble("");
  open = photograph;
  chosen = null;
  element("title").textContent = photograph.key.slice(photograph.key.lastIndexOf("/") + 1);
  element("title").title = photograph.key;
  document.title = `${element("title").textContent} – Review`;
  element("place").textContent = `${(worklist.chosen + 1).toLocaleString("en")} of ${worklist.total.toLocaleString("en")}`;
  viewer.open(photograph, askedAt);
  if (photograph.width === null) trouble(`Not scored: ${photograph.detail ?? photograph.reason}`);
  drawFacts();
  drawDecisions();
  showBeside(false);
  element("beside").classList.toggle("hidden", !photograph.previous);
  clearTimeout(preloading);
  preloading = setTimeout(preload, PRELOAD_MS); // not beside the work for this one
}

/** The next photograph is decoded and its first tiles fetched while this one is looked at; the one before, too. */
async function preload() {
  for (const step of [1, -1]) {
    const row = await worklist.at(worklist.chosen + step);
    if (row) photographOf(row.id).then((photograph) => prefetch(photograph, viewer.view, viewer.box), () => {});
  }
}

function newViewer() {
  const created = new Viewer(element("photograph"));
  created.addEventListener("drawn", (event) => {
    const event_ = decide("draw", { polygon: event.detail });
    choose(event_.id, false);
    say("drawn");
  });
  created.addEventListener("measured", (event) => {
    element("measured").textContent = `${event.detail.toFixed(1)} px${microns(open, event.detail)}`;
    element("measured").classList.remove("hidden");
  });
  created.addEventListener("mode", () => {
    for (const mode of ["draw", "ruler"]) element(mode).setAttribute("aria-pressed", String(created.mode === mode));
    element("measured").classList.add("hidden");
  });
  created.addEventListener("trouble", () => {
    askJson(`/v1/photographs/${open.id}/tiles/colour/0/0_0.jpg`).catch((error) => {
      if (!(error instanceof SyntaxError)) trouble(decisions.offline ? "The service does not answer." : error.message);
    });
  });
  return created;
}

function trouble(text) {
  element("trouble").textContent = text;
  element("trouble").classList.toggle("hidden", !text);
}

const mine = () => standing(decisions.of(open.id, open.events), reviewer);

/** Lesions of the model, then what was drawn, with what this reviewer says of them. */
function lesions() {
  const own = mine();
  const states = { accept: "accepted", reject: "rejected" };
  const found = open.lesions.map((lesion) => ({
    id: lesion.id, points: lesion.outline, centre: [lesion.row, lesion.col], diameter: lesion.diameter_px, score: lesion.score,
    state: states[own.verdicts.get(lesion.id)] ?? (own.done ? "accepted" : "undecided"), judged: own.verdicts.get(lesion.id),
  }));
  for (const [id, points] of own.drawn) {
    const rows = points.map(([row]) => row);
    found.push({ id, points, centre: middle(points), diameter: Math.max(...rows) - Math.min(...rows), state: "drawn" });
  }
  return found;
}

function drawFacts() {
  const { status, triage, image_score, quality, flags, detail, height, width, fov_degrees } = open;
  const line = (...children) => make("div", { className: "line" }, ...children);
  const chips = (flags ?? []).map((flag) => make("span", { className: "chip" }, flag.replaceAll("_", " ")));
  const visit = [open.patient, open.eye, open.visit].filter(Boolean).join(" · ");
  element("facts").replaceChildren(...[
    line(badge(status === "scored" ? triage ?? "none" : "unscored"),
      status === "scored" ? `score ${fixed(image_score, 2)}, quality ${fixed(quality, 2)}` : open.reason),
    chips.length && !detail ? line(...chips) : null,
    detail ? make("div", { className: "muted" }, detail) : null,
    width === null ? null : make("div", { className: "muted" }, `${width} × ${height} px${fov_degrees ? `, field ${Math.round(fov_degrees)}°` : ""}${visit ? ` · ${visit}` : ""}`),
  ].filter(Boolean));
}

function drawDecisions() {
  const own = mine();
  const found = lesions();
  viewer.drawLesions(found, chosen);
  const judged = [...own.verdicts.keys()].length;
  element("lesion-count").textContent = found.length ? `${judged} of ${open.lesions.length} judged${own.drawn.size ? `, ${own.drawn.size} drawn` : ""}` : "none";
  element("lesions").replaceChildren(...found.map((lesion, place) => lesionRow(lesion, place)));
  element("grades").replaceChildren(...run.grades.map((grade, place) => make("button", {
    role: "radio", type: "button", "aria-checked": String(own.grade === grade), onclick: () => decide("grade", { grade }),
  }, grade[0].toUpperCase() + grade.slice(1), make("kbd", {}, place < 5 ? String(place) : "U"))));
  if (document.activeElement !== element("note")) element("note").value = own.note;
  element("done").replaceChildren(own.done ? "Done ✓, next" : "Done, next", make("kbd", {}, "Enter"));
  element("undo").disabled = !own.last;
  drawOthers();
}

function lesionRow(lesion, place) {
  const words = { undecided: "", accepted: "accepted", rejected: "rejected", drawn: "drawn" }[lesion.state];
  const size = `${lesion.diameter.toFixed(0)} px${microns(open, lesion.diameter)}`;
  const button = (label, name, pressed, onclick) => make("button", {
    type: "button", title: name, "aria-label": `${name} lesion ${place + 1}`, "aria-pressed": String(pressed),
    onclick: (event) => { event.stopPropagation(); onclick(); },
  }, label);
  const verdicts = lesion.state === "drawn"
    ? [button("Remove", "Remove", false, () => decide("undo", { undoes: lesion.id }))]
    : [button("✓", "Accept", lesion.judged === "accept", () => judge(lesion.id, "accept", false)),
       button("✕", "Reject", lesion.judged === "reject", () => judge(lesion.id, "reject", false))];
  const length = open.scale ? microns(open, lesion.diameter).slice(3) : `${lesion.diameter.toFixed(0)} px`;
  const facts = [lesion.score === undefined ? null : fixed(lesion.score, 2), length, words].filter(Boolean).join(" · ");
  const row = make("li", { className: lesion.id === chosen ? "chosen" : "", onclick: () => choose(lesion.id) },
    make("span", { className: "muted" }, lesion.state === "drawn" ? "+" : String(lesion.id)),
    make("span", { className: "facts", title: `score, diameter (${size})` }, facts), make("span", { className: "verdicts" }, ...verdicts));
  if (lesion.id === chosen) row.setAttribute("aria-current", "true");
  return row;
}

function drawOthers() {
  const events = decisions.of(open.id, open.events);
  const names = [...new Set(events.map((event) => event.reviewer))].filter((name) => name !== reviewer).sort();
  element("others").classList.toggle("hidden", !names.length);
  element("others").replaceChildren(make("h2", {}, "Other reviewers"), make("ul", {}, ...names.map((name) => {
    const said = standing(events, name);
    const rejected = [...said.verdicts.values()].filter((verdict) => verdict === "reject").length;
    const words = [said.done ? "done" : "begun", said.grade, rejected ? `${rejected} rejected` : "", said.drawn.size ? `${said.drawn.size} drawn` : "", said.note ? `“${said.note}”` : ""];
    return make("li", {}, make("b", {}, name), ` ${words.filter(Boolean).join(", ")}`);
  })));
}

// ---- decisions

function decide(kind, said) {
  const event = decisions.decide(reviewer, open.id, kind, said);
  drawDecisions();
  return event;
}

function choose(id, zoom = true) {
  const found = lesions();
  const lesion = found.find((each) => each.id === id);
  if (!lesion) return;
  chosen = id;
  if (zoom) viewer.show(lesion.centre, lesion.diameter);
  drawDecisions();
  element("lesions").querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
  say(`lesion ${found.indexOf(lesion) + 1} of ${found.length}, ${lesion.state}`);
}

function step(by) {
  const found = lesions();
  if (!found.length) return;
  const place = found.findIndex((lesion) => lesion.id === chosen);
  choose(found[(place < 0 ? (by > 0 ? 0 : found.length - 1) : place + by + found.length) % found.length].id);
}

function judge(id, kind, onward) {
  if (id === null) return step(1);
  const lesion = lesions().find((each) => each.id === id);
  if (lesion.state === "drawn") {
    if (kind === "reject") decide("undo", { undoes: id });
    return;
  }
  if (lesion.judged !== kind) decide(kind, { lesion: id });
  say(`${kind}ed`);
  if (!onward) return;
  const found = lesions();
  const from = found.findIndex((each) => each.id === id);
  const next = [...found.slice(from + 1), ...found.slice(0, from)].find((each) => each.state === "undecided");
  if (next) choose(next.id);
}

function undo() {
  const { last } = mine();
  if (!last) return;
  decide("undo", { undoes: last.id });
  say(`undone: ${last.kind}`);
}

async function go(by) {
  askedAt = performance.now();
  const row = await worklist.at(worklist.chosen + by);
  if (!row) return say(by > 0 ? "this is the last photograph" : "this is the first photograph");
  worklist.chosen += by;
  location.hash = `#/${row.id}`;
}

async function done() {
  if (!mine().done) decide("done");
  await go(1);
}

async function showBeside(yes) {
  element("earlier").classList.toggle("hidden", !yes);
  element("beside").setAttribute("aria-pressed", String(yes));
  if (!yes) return;
  const before = await photographOf(open.previous);
  earlier ??= new Viewer(element("earlier-photograph"));
  earlier.view = viewer.view;
  earlier.open(before);
  earlier.drawLesions(before.lesions.map((lesion) => ({ id: lesion.id, points: lesion.outline, centre: [lesion.row, lesion.col], state: "undecided" })), null);
  element("earlier-caption").textContent = `Visit before: ${before.visit}, ${before.lesions.length} lesions`;
}

// ---- the page

function backToList() {
  open = null;
  document.body.classList.remove("looking");
  document.title = "Review";
  viewer?.setMode("");
  for (const hidden of ["viewer", "back", "steps"]) element(hidden).classList.add("hidden");
  element("title").textContent = "";
  element("worklist").classList.remove("hidden");
  worklist.ask({}, true).then(() => worklist.choose(worklist.chosen));
  worklist.table.focus();
}

function route() {
  const id = /^#\/([0-9a-f]{16})$/.exec(location.hash)?.[1];
  if (id) show(id);
  else backToList();
}

function drawState() {
  const { unsaved, offline, trouble: why } = decisions;
  const state = element("state");
  state.classList.toggle("waiting", offline || unsaved > 0);
  state.textContent = unsaved ? `${unsaved} not yet saved` : offline ? "offline" : "all saved";
  element("offline").classList.toggle("hidden", !offline && !why);
  element("offline").textContent = offline
    ? `Offline: the service does not answer${why ? ` (${why})` : ""}. ${unsaved ? `${unsaved} ${unsaved === 1 ? "decision is" : "decisions are"} kept in this browser and saved once it is back.` : "What you decide is kept in this browser."}`
    : why;
}

async function poll() {
  try {
    const news = await askJson(`/v1/reviews?seen=${seen}`);
    decisions.online(true);
    seen = news.seen;
    for (const id of news.photographs) photographs.delete(id);
    if (open && news.photographs.includes(open.id)) {
      const fresh = await photographOf(open.id);
      if (open?.id === fresh.id) {
        open = fresh;
        drawDecisions();
      }
    }
    if (!open && worklist.counts && worklist.counts.photographs < worklist.counts.planned) await worklist.ask({}, true);
  } catch (error) {
    if (error instanceof TypeError) decisions.online(false);
  }
  setTimeout(poll, POLL_MS);
}

function askName() {
  const dialog = element("name");
  const input = dialog.querySelector("input");
  input.value = reviewer;
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.oncancel = (event) => { if (!reviewer) event.preventDefault(); else resolve(reviewer); };
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      resolve(input.value);
    };
  });
}

async function begin(name) {
  reviewer = name;
  localStorage.setItem(REVIEWER, name);
  worklist.reviewer = name;
  element("who").textContent = name;
  await worklist.ask({}, true);
  if (open) drawDecisions();
}

const toggle = (id, className) => {
  const on = element(id).getAttribute("aria-pressed") !== "true";
  element(id).setAttribute("aria-pressed", String(on));
  viewer.overlay.classList.toggle(className, !on);
  say(`${id} ${on ? "on" : "off"}`);
};
const setView = (view) => {
  viewer.setView(view);
  drawViews();
};
const drawViews = () => segments(element("views"), VIEWS, () => viewer?.view ?? "colour", setView);
const setLight = () => {
  const names = ["light", "contrast"];
  for (const name of names) element("lightbox").style.setProperty(`--${name}`, element(name).value / 100);
  // a filter is work for each picture that is drawn, also where it changes nothing
  element("lightbox").classList.toggle("lit", names.some((name) => element(name).value !== "100"));
};
const change = (name, by) => {
  element(name).value = Number(element(name).value) + by;
  setLight();
};
const setMode = (mode) => viewer.setMode(viewer.mode === mode ? "" : mode);

const LIST_KEYS = {
  ArrowDown: () => worklist.choose(worklist.chosen + 1),
  ArrowUp: () => worklist.choose(worklist.chosen - 1),
  PageDown: () => worklist.choose(worklist.chosen + 10),
  PageUp: () => worklist.choose(worklist.chosen - 10),
  Home: () => worklist.choose(0),
  End: () => worklist.choose(worklist.total - 1),
  Enter: () => go(0),
  "/": () => element("text").focus(),
};
const PHOTOGRAPH_KEYS = {
  Escape: () => (viewer.mode ? viewer.setMode("") : (location.hash = "#/")),
  ArrowRight: () => go(1),
  ArrowLeft: () => go(-1),
  ArrowDown: () => step(1),
  ArrowUp: () => step(-1),
  Enter: done,
  " ": () => toggle("outlines", "no-outlines"),
  m: () => toggle("marks", "no-marks"),
  a: () => judge(chosen, "accept", true),
  x: () => judge(chosen, "reject", true),
  z: undo,
  d: () => setMode("draw"),
  l: () => setMode("ruler"),
  f: () => viewer.fit(),
  c: () => setView("colour"),
  r: () => setView("red-free"),
  e: () => setView("enhanced"),
  "+": () => viewer.zoom(1.4),
  "=": () => viewer.zoom(1.4),
  "-": () => viewer.zoom(1 / 1.4),
  "[": () => change("light", -10),
  "]": () => change("light", 10),
  "{": () => change("contrast", -10),
  "}": () => change("contrast", 10),
  b: () => open.previous && showBeside(element("earlier").classList.contains("hidden")),
  n: () => element("note").focus(),
  u: () => decide("grade", { grade: "ungradable" }),
};
for (let grade = 0; grade < 5; grade++) PHOTOGRAPH_KEYS[grade] = () => decide("grade", { grade: run.grades[grade] });

function onKey(event) {
  const typing = event.target.matches("input:not([type=range]), textarea, select");
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (typing && event.key === "Escape") return event.target.blur();
  if (typing) return;
  if (event.key === "?") return element("keys").showModal();
  // a button that has the focus is pressed by Enter and Space, as anywhere
  if (event.target.matches("button, a") && [" ", "Enter"].includes(event.key)) return;
  if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  if (event.target.matches('[role="radio"]') && event.key.startsWith("Arrow")) return moveRadio(event);
  const action = (open ? PHOTOGRAPH_KEYS : LIST_KEYS)[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function moveRadio(event) {
  const group = [...event.target.parentNode.children];
  const by = ["ArrowRight", "ArrowDown"].includes(event.key) ? 1 : -1;
  event.preventDefault();
  group[(group.indexOf(event.target) + by + group.length) % group.length].focus();
}

function listen() {
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  const clicks = {
    back: () => { location.hash = "#/"; }, before: () => go(-1), after: () => go(1), help: () => element("keys").showModal(),
    who: async () => begin(await askName()), outlines: () => toggle("outlines", "no-outlines"), marks: () => toggle("marks", "no-marks"),
    draw: () => setMode("draw"), ruler: () => setMode("ruler"), fit: () => viewer.fit(), undo, done,
    beside: () => showBeside(element("earlier").classList.contains("hidden")),
  };
  for (const [id, action] of Object.entries(clicks)) element(id).addEventListener("click", action);
  for (const name of ["light", "contrast"]) element(name).addEventListener("input", setLight);
  element("note").addEventListener("change", (event) => decide("note", { note: event.target.value }));
  worklist.addEventListener("open", () => go(0));
  worklist.addEventListener("asked", () => { element("run").textContent = worklist.counts.id; });
}

async function start() {
  listen();
  drawViews();
  run = await askJson("/v1/run");
  decisions = new Decisions(run.id);
  decisions.addEventListener("change", drawState);
  drawState();
  await begin(run.reviewer || localStorage.getItem(REVIEWER) || await askName());
  route();
  poll();
}

start().catch((error) => {
  element("empty").textContent = `The service does not answer: ${error.message}. Reload the page once it is back.`;
  element("empty").classList.remove("hidden");
});
