// The page Trees: the list with its filters, and one tree.

import { compact, duration, el, known, num, refill, signed } from "./dom.js";
import { treeView } from "./treeview.js";

const COLUMNS = [
  ["number", "tree", (row) => row.number],
  [null, "prompt", (row) => row.prompt],
  [null, "task", (row) => row.task],
  ["reward", "reward", (row) => num(row.reward)],
  ["spread", "spread", (row) => num(row.spread)],
  [null, "right", (row) => `${row.correct}/${row.judged}`],
  ["delta_h", "largest ΔH", (row) => signed(row.delta_h, 3)],
  ["leaves", "leaves", (row) => row.leaves],
  ["forks", "forks", (row) => row.forks],
  ["depth", "depth", (row) => row.depth],
  ["calls", "calls", (row) => row.calls],
  [null, "tools", (row) => row.tools.join(", ")],
  ["tokens", "tokens", (row) => compact(row.tokens)],
  ["version", "version", (row) => (row.version_min === row.version_max ? row.version_max : `${row.version_min}–${row.version_max}`)],
  ["time", "closed", (row, began) => (known(began) ? `+${duration(row.closed_s - began)}` : "–")],
];
const BOUNDS = [
  ["spread_min", "reward spread ≥", "0.05"],
  ["delta_h_min", "ΔH ≥", "0.01"],
  ["depth_min", "depth ≥", "1"],
  ["forks_min", "forks ≥", "1"],
  ["version_min", "version ≥", "1"],
  ["version_max", "version ≤", "1"],
  ["time_min", "closed from +s", "1"], // seconds after the first kept tree began, as in the list
  ["time_max", "to +s", "1"],
];

export async function listPage(context) {
  const asked = new URLSearchParams(context.query);
  let chosen = 0, listed = null, seen = "", turn = 0;
  const body = el("tbody", {}), told = el("p", { class: "facts", id: "matched", "aria-live": "polite" });
  const heads = el("tr", {});
  const task = el("select", { id: "task", onchange: (event) => set("task", event.target.value) });
  const tool = el("select", { id: "tool", onchange: (event) => set("tool", event.target.value) });
  const field = (name, label, step) => el(
    "label", {}, `${label} `,
    el("input", { id: name, type: "number", step, value: name.startsWith("time") ? "" : asked.get(name) ?? "", oninput: (event) => bound(name, event.target.value) }),
  );
  const bar = el(
    "form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    BOUNDS.map((one) => field(...one)),
    el("label", {}, "task ", task), el("label", {}, "tool ", tool),
    el("label", {}, "prompt ", el("input", { id: "text", type: "search", value: asked.get("text") ?? "", oninput: (event) => set("text", event.target.value) })),
    el("button", { type: "button", onclick: clear }, "all"),
  );
  const pages = el("p", { class: "pages" });
  const box = el("div", { class: "trees" }, bar, told, el("div", { class: "wide" }, el("table", { class: "list" }, el("thead", {}, heads), body)), pages);

  function clear() {
    for (const name of [...asked.keys()]) asked.delete(name);
    for (const input of bar.querySelectorAll("input")) input.value = "";
    update();
  }

  function bound(name, value) {
    const since = name.startsWith("time") && value !== "" ? listed?.began_s ?? 0 : null;
    set(name, since === null ? value : String(since + Number(value)));
  }

  function set(name, value) {
    if (value === "") asked.delete(name);
    else asked.set(name, value);
    if (name !== "offset") asked.delete("offset");
    history.replaceState(null, "", `#/trees/${context.run}?${asked}`);
    return update();
  }

  async function update() {
    const mine = ++turn;
    const found = await context.api(`runs/${context.run}/trees?${asked}`);
    if (mine !== turn) return; // a later filter is under way
    const now = JSON.stringify([found, asked.get("sort")]);
    if (now === seen) return;
    [listed, seen] = [found, now];
    options(task, "any", found.tasks, asked.get("task"));
    options(tool, "any", found.tools, asked.get("tool"));
    for (const name of ["time_min", "time_max"]) { // of an address that was opened again
      const input = document.getElementById(name);
      if (input && input !== document.activeElement && asked.has(name)) input.value = Math.round(asked.get(name) - found.began_s);
    }
    told.textContent = `${found.matched} of ${found.known} trees` + (found.files_left ? `, ${found.files_left} files still to be read` : "");
    const sort = asked.get("sort") ?? "-number";
    refill(heads, COLUMNS.map(([name, label]) => {
      if (!name) return el("th", {}, label);
      const arrow = sort === name ? " ▲" : sort === `-${name}` ? " ▼" : "";
      return el("th", {}, el("button", { type: "button", onclick: () => set("sort", sort === `-${name}` ? name : `-${name}`) }, label + arrow));
    }));
    chosen = Math.min(chosen, Math.max(0, found.rows.length - 1));
    refill(body, found.rows.map((row, i) => el(
      "tr", { class: i === chosen ? "chosen" : "", "data-tree": row.number, onclick: () => open(i) },
      COLUMNS.map(([name, , cell]) => el("td", { class: name ? "number" : "", title: name ? null : cell(row) }, name === "number" ? el("a", { href: `#/tree/${context.run}/${row.number}` }, cell(row)) : cell(row, found.began_s))),
    )));
    const end = found.offset + found.rows.length;
    refill(
      pages,
      el("button", { type: "button", disabled: !found.offset, onclick: () => set("offset", Math.max(0, found.offset - 100)) }, "before"),
      ` ${found.rows.length ? found.offset + 1 : 0} to ${end} `,
      el("button", { type: "button", disabled: end >= found.matched, onclick: () => set("offset", end) }, "after"),
      el("span", { class: "hint" }, " j and k choose, Enter opens, / filters"),
    );
  }

  function options(select, any, names, value) {
    if (document.activeElement === select) return;
    select.replaceChildren(el("option", { value: "" }, any), ...names.map((name) => el("option", { value: name, selected: name === value }, name)));
  }

  function open(i) {
    if (listed?.rows[i]) location.hash = `#/tree/${context.run}/${listed.rows[i].number}`;
  }

  function keys(event) {
    if (event.key === "/") document.getElementById("spread_min").focus();
    else if (event.key === "j" || event.key === "k") {
      chosen = Math.min(Math.max(0, chosen + (event.key === "j" ? 1 : -1)), (listed?.rows.length ?? 1) - 1);
      [...body.children].forEach((row, i) => row.classList.toggle("chosen", i === chosen));
      body.children[chosen]?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter") open(chosen);
    else return false;
    return true;
  }
  await update();
  return { box, update, keys };
}

export async function treePage(context) {
  const at = `runs/${context.run}/trees/${context.tree}`;
  const tree = await context.api(at);
  const source = { text: (node, first) => context.api(`${at}/nodes/${node}?first=${first}`) };
  const width = Math.max(900, document.documentElement.clientWidth - 60);
  const near = el(
    "p", { class: "near" },
    el("a", { href: `#/trees/${context.run}` }, "all trees"), "  ·  tree ", context.tree,
    el("span", { class: "hint" }, `  as a file to mail: espalier tree RUN --number ${context.tree} --html tree.html`),
  );
  const view = treeView(tree, source, width);
  return { box: el("div", {}, near, view.box), keys: view.keys, focus: view.focus };
}
