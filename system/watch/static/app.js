// The frame: the key, the pages and their addresses, keys of the keyboard, looking again.

import { el, pressed } from "./dom.js";
import { comparePage, evaluationPage, timelinePage } from "./more.js";
import { page as runPage } from "./run.js";
import { listPage, treePage } from "./trees.js";

const PAGES = { run: runPage, trees: listPage, tree: treePage, timeline: timelinePage, evaluation: evaluationPage, compare: comparePage };
const NAMES = [["run", "Run"], ["trees", "Trees"], ["timeline", "Timeline"], ["evaluation", "Evaluation"], ["compare", "Compare"]];
const LOOK_MS = 2000, HELD = "espalier-watch-key";
const head = document.getElementById("head"), main = document.getElementById("main");
const problem = el("p", { class: "problem", id: "problem", role: "alert" });
let runs = [], shown = null, turn = 0;

function key() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    localStorage.setItem(HELD, given); // of this address and port alone
    history.replaceState(null, "", "#/run/0");
  }
  return localStorage.getItem(HELD) ?? "";
}

async function api(path) {
  const answer = await fetch(`/api/${path}`, { headers: { Authorization: `Bearer ${key()}` } });
  if (answer.status === 401) throw new Error("Open the address that espalier watch printed: it carries the key of this server.");
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error ?? `${answer.status} ${answer.statusText}`);
  return value;
}

function place() {
  const [path, query = ""] = location.hash.slice(1).split("?");
  const [, name = "run", run = "0", tree = ""] = path.split("/");
  return { name: PAGES[name] ? name : "run", run: Number(run) || 0, tree, query };
}

function frame({ name, run }) {
  const here = name === "tree" ? "trees" : name;
  head.replaceChildren(
    el("b", { class: "brand" }, "Espalier"),
    el("nav", {}, NAMES.map(([to, label], i) => el("a", { href: `#/${to}/${run}`, class: to === here ? "here" : "", title: `key ${i + 1}` }, label))),
    runs.length > 1
      ? el("select", { id: "run", "aria-label": "run", onchange: (event) => { location.hash = `#/${here}/${event.target.value}`; } },
        runs.map((one, i) => el("option", { value: i, selected: i === run }, one.name)))
      : el("span", { class: "name" }, runs[0]?.name ?? ""),
    problem,
  );
}

async function show() {
  const at = place(), mine = ++turn;
  try {
    if (!runs.length) runs = await api("runs");
    frame(at);
    document.title = `${runs[at.run]?.name ?? "?"} · Espalier`;
    const made = await PAGES[at.name]({ ...at, api, runs });
    if (mine !== turn) return;
    shown = made;
    main.replaceChildren(shown.box);
    shown.focus?.();
    main.dataset.page = at.name;
    problem.textContent = "";
  } catch (error) {
    if (mine !== turn) return;
    shown = null;
    main.replaceChildren(el("p", { class: "problem" }, String(error.message ?? error)));
  }
}

async function look() {
  try {
    if (shown?.update && !document.hidden) await shown.update();
    problem.textContent = "";
  } catch (error) {
    problem.textContent = error instanceof TypeError ? "The server does not answer: is espalier watch still running?" : String(error.message ?? error);
  }
  setTimeout(look, LOOK_MS);
}

addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (/^[1-5]$/.test(event.key)) location.hash = `#/${NAMES[Number(event.key) - 1][0]}/${place().run}`;
  else if (event.key === "Escape" && place().name === "tree") location.hash = `#/trees/${place().run}`;
  else if (!pressed(event) && shown?.keys?.(event)) event.preventDefault();
});
key();
await show();
setTimeout(look, LOOK_MS);
