// Requests to the service this page comes from, with its token where it asks for one.

const TOKEN = "ma_cluster.token";
let asking = null;

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

function headers(more) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...more, Authorization: `Bearer ${token}` } : { ...more };
}

/** Headers that a request of somebody else, such as the viewer's for tiles, must carry. */
export const authorization = () => headers({});

/** A request that is repeated once the token is known. Throws Refused, or TypeError where nobody answers. */
export async function ask(path, options = {}) {
  for (;;) {
    const answer = await fetch(path, { ...options, headers: headers(options.headers) });
    if (answer.status === 401) {
      asking ??= askToken().finally(() => { asking = null; });
      await asking;
      continue;
    }
    if (!answer.ok) {
      const problem = await answer.json().catch(() => ({}));
      throw new Refused(answer.status, problem.detail ?? `the service answered ${answer.status}`);
    }
    return answer;
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** Show a picture of the service in an <img>: a token cannot go with its address, so it is fetched. */
export async function showPicture(image, path) {
  image.dataset.path = path;
  if (!sessionStorage.getItem(TOKEN)) {
    image.src = path;
    return;
  }
  const url = URL.createObjectURL(await (await ask(path)).blob());
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  if (image.dataset.path === path) image.src = url;
}

function askToken() {
  const dialog = document.getElementById("token");
  const form = dialog.querySelector("form");
  const input = form.querySelector("input");
  sessionStorage.removeItem(TOKEN);
  dialog.showModal();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN, input.value.trim());
      input.value = "";
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
}

/** An element with properties and children; text is set as text, whatever it holds. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in element && !name.startsWith("aria-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SHAPES = {
  refer: "M5 0 10 10H0Z",
  none: "M5 0a5 5 0 1 1 0 10A5 5 0 0 1 5 0",
  ungradable: "M0 0h10v10H0Z",
  unscored: "M0 4h10v2H0Z",
};
const WORDS = { refer: "Refer", none: "No signs", ungradable: "Ungradable", unscored: "Not scored" };

/** A triage as word, shape and colour: none of them alone has to tell it. */
export function badge(triage) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 10 10");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[triage]);
  svg.append(path);
  return make("span", { className: `badge ${triage}` }, svg, WORDS[triage]);
}
