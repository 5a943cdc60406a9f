// The service's own page: what it is, how it is, a photograph to try, and how its archives stand.

import { Refused, ask, askJson, badge, make } from "/page/api.js";

const element = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const POLL_MS = 5000;
let last = null;

async function health() {
  const shown = element("health");
  try {
    await ask("/healthz");
    shown.className = "up";
    shown.textContent = "Ready: photographs can be scored now.";
  } catch (error) {
    shown.className = "down";
    shown.textContent = error instanceof Refused ? `Not ready: ${error.message}.` : "The service does not answer.";
  }
}

async function segment(file) {
  element("result").classList.add("hidden");
  element("told").textContent = "Being looked at; this takes some seconds.";
  const began = performance.now();
  try {
    const answer = await askJson("/v1/segment", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    show(file, answer, (performance.now() - began) / 1000);
    element("told").textContent = "";
  } catch (error) {
    element("told").textContent = error instanceof Refused ? `No answer: ${error.message}` : "The service does not answer.";
  }
}

function show(file, answer, seconds) {
  last = answer;
  const image = make("img", { alt: `The photograph, ${answer.lesions.length} lesions outlined` });
  const overlay = document.createElementNS(SVG, "svg");
  overlay.setAttribute("viewBox", `0 0 ${answer.width} ${answer.height}`);
  overlay.setAttribute("aria-hidden", "true");
  for (const lesion of answer.lesions) {
    for (const kind of ["rim", "line"]) {
      const circle = document.createElementNS(SVG, "circle");
      const values = { class: kind, cx: lesion.col + 0.5, cy: lesion.row + 0.5, r: lesion.diameter_px / 2 + answer.width / 250 };
      for (const [name, value] of Object.entries(values)) circle.setAttribute(name, value);
      overlay.append(circle);
    }
  }
  const url = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(url);
  image.onerror = () => element("picture").replaceChildren(make("p", {}, "This browser cannot show the file."));
  image.src = url;
  element("picture").replaceChildren(image, overlay);
  const facts = [
    ["Triage", badge(answer.triage)],
    ["Image score", answer.image_score === null ? "–" : answer.image_score.toFixed(2)],
    ["Lesions", String(answer.lesions.length)],
    ["Quality", `${answer.quality.toFixed(2)}${answer.gradable ? "" : ", ungradable"}`],
    ["Remarks", answer.detail ?? "–"],
    ["Took", `${seconds.toFixed(1)} s`],
  ];
  element("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  element("result").classList.remove("hidden");
}

async function jobs() {
  const { archives } = await askJson("/v1/archives");
  const told = await Promise.all(archives.map((job) => (job.state === "running" ? askJson(`/v1/archives/${job.id}`).catch(() => job) : job)));
  element("no-jobs").classList.toggle("hidden", told.length > 0);
  element("jobs").classList.toggle("hidden", told.length === 0);
  element("jobs").tBodies[0].replaceChildren(...told.reverse().map(jobRow));
}

function jobRow(job) {
  const { status } = job;
  const progress = status
    ? [make("progress", { max: status.images, value: status.decided, "aria-label": "Photographs decided" }), ` ${status.decided.toLocaleString("en")} of ${status.images.toLocaleString("en")}`]
    : [job.finished ? "finished" : "–"];
  return make("tr", {}, make("td", {}, job.state),
    make("td", {}, make("div", {}, job.source ?? ""), make("div", { className: "muted" }, job.destination ?? ""),
      job.error ? make("div", { className: "error" }, job.error) : null),
    make("td", {}, ...progress), make("td", {}, (job.requested ?? "").replace("T", " ").slice(0, 16)));
}

function listen() {
  const drop = element("drop");
  element("file").addEventListener("change", (event) => event.target.files[0] && segment(event.target.files[0]));
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) segment(event.dataTransfer.files[0]);
  });
  element("outlines").addEventListener("click", (event) => {
    const on = event.target.getAttribute("aria-pressed") !== "true";
    event.target.setAttribute("aria-pressed", String(on));
    element("picture").querySelector("svg")?.classList.toggle("hidden", !on);
  });
  element("save").addEventListener("click", () => {
    const link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(last, null, 2)])), download: "lesions.json" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

async function poll() {
  await health();
  await jobs().catch(() => {});
  setTimeout(poll, POLL_MS);
}

listen();
askJson("/", { headers: { Accept: "application/json" } }).then((told) => {
  element("version").textContent = told.version;
  element("notice").textContent = told.notice;
}, () => {});
poll();
