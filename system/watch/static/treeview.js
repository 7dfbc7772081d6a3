// One tree: drawing, legend, what a node says, and two branches side by side from their fork on.
// `source.text(node, first)` gives the texts; the server does, or the file that holds them all.
// Returns its `box`, what hears the `keys` pressed elsewhere on the page, and what gives the drawing the `focus`.

import { count, duration, el, known, moment, num, percent, signed } from "./dom.js";
import { COLOURS, drawTree, forkText, indexed, leafText, leavesBelow, neighbour, pathTo, scaleOf } from "./draw.js";

export function treeView(tree, source, width = 1200) {
  const index = indexed(tree);
  const state = { by: "entropy", over: "tokens", zoom: 1, node: -1, pair: null };
  const drawing = el("div", { class: "drawing" }), legend = el("div", { class: "legend" });
  const detail = el("section", { class: "detail", id: "detail" });
  const colour = el(
    "select",
    { id: "colour", onchange: (event) => coloured(event.target.value) },
    Object.entries(COLOURS).map(([value, name]) => el("option", { value, disabled: value === "waits" && !tree.times }, name)),
  );
  const untold = "this tree does not say when its nodes grew: an older version's, or of agents that others wrote";
  const axis = el("button", { type: "button", id: "over", disabled: !tree.times, title: tree.times ? "key t" : untold, onclick: () => turned() });
  const larger = (factor) => show({ zoom: Math.min(64, Math.max(1, state.zoom * factor)) });
  const controls = el(
    "div", { class: "controls" },
    el("label", {}, "colour ", colour),
    axis,
    el("button", { type: "button", onclick: () => larger(0.5), title: "key −" }, "narrower"),
    el("button", { type: "button", onclick: () => larger(2), title: "key +" }, "wider"),
    el("span", { class: "hint" }, "arrows move, Enter opens, c compares, t: tokens or time, + and − stretch"),
  );

  // What was waited for is seen over time alone.
  function coloured(by) {
    show({ by, over: by === "waits" ? "time" : state.over });
  }

  function turned() {
    if (!tree.times) return;
    const over = state.over === "time" ? "tokens" : "time";
    show({ over, by: over === "tokens" && state.by === "waits" ? "entropy" : state.by });
  }

  function show(change = {}) {
    Object.assign(state, change);
    colour.value = state.by;
    axis.textContent = state.over === "time" ? "over tokens" : "over time";
    const lit = state.pair && new Set(state.pair.flatMap((leaf) => pathTo(tree, tree.leaves[leaf].node)));
    const drawn = drawTree(tree, {
      by: state.by, over: state.over, width, zoom: state.zoom, selected: state.node, lit,
      on: { node: open, leaf: (leaf) => compareWith(leaf) },
    });
    const held = drawing.contains(document.activeElement);
    drawn.addEventListener("keydown", keys);
    drawing.replaceChildren(drawn);
    if (held) drawn.focus({ preventScroll: true });
    const scale = scaleOf(tree, state.by);
    legend.replaceChildren(
      ...scale.legend.map(([name, text]) => el("span", {}, el("i", { class: `swatch ${name}` }), text)),
      el("span", { class: "hint" }, scale.unit ?? ""),
      el("span", {}, el("i", { class: "dot forked" }), "forked here"),
      el("span", {}, el("i", { class: "dot decided" }), "could have forked"),
      state.over === "time" && state.by !== "waits" ? el("span", {}, el("i", { class: "swatch thin held" }), "a wait") : "",
      state.over === "time" ? el("span", {}, el("i", { class: "swatch thin ahead" }), "not begun yet") : "",
      ["latency", "author", "waits"].includes(state.by) ? "" : el("span", {}, el("i", { class: "swatch thin tool plain" }), "a tool's result"),
    );
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    if (event.key.startsWith("Arrow")) {
      show({ node: neighbour(tree, Math.max(0, state.node), event.key) });
      drawing.querySelector(".selected .hit")?.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    else if (event.key === "Enter" && state.node >= 0) open(state.node);
    else if (event.key === "c" && state.node >= 0) compareAt(forkAbove(state.node));
    else if (event.key === "t") turned();
    else if (event.key === "+" || event.key === "=") larger(2);
    else if (event.key === "-") larger(0.5);
    else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }

  function forkAbove(node) {
    let at = node;
    while (at > 0 && index.children[at].length < 2) at = tree.nodes.parent[at];
    return at;
  }

  function open(node) {
    show({ node, pair: null });
    detail.replaceChildren(nodePanel(node));
  }

  function nodePanel(node) {
    const { nodes } = tree, kind = nodes.kind[node], children = index.children[node];
    const facts = [`${kind}`, count(nodes.length[node], "token")];
    if (known(nodes.entropy[node])) facts.push(`mean entropy ${num(nodes.entropy[node], 3)} nats`);
    if (known(nodes.advantage[node])) facts.push(`advantage ${signed(nodes.advantage[node])}`);
    const grew = tree.times?.stretches[node] ?? [];
    if (grew.length) facts.push(`from +${duration(grew[0][0])} to +${duration(tree.times.over[node])}`);
    facts.push(`${count(nodes.leaves[node], "leaf").replace("leafs", "leaves")} below`);
    const panel = el("div", { class: "panel" }, el("h3", {}, `Node ${node}`), el("p", { class: "facts" }, facts.join("  ·  ")));
    for (const fork of index.forks.get(node) ?? []) panel.append(el("p", { class: "fork" }, forkText(fork)));
    if (children.length > 1) {
      const where = node === 0 ? "The roots begin here." : `${children.length} branches go on from here.`;
      panel.append(
        el("p", {}, where, " ", el("button", { type: "button", id: "compare", onclick: () => compareAt(node) }, "compare two of them")),
      );
    }
    for (const leaf of index.leaves.get(node) ?? []) {
      panel.append(el("p", {}, `leaf ${leaf.index}: ${leafText(leaf)}, ${leaf.outcome}, ${leaf.origin}`, leaf.told ? ` (${leaf.told})` : ""));
    }
    panel.append(text(node));
    return panel;
  }

  // The text of a node, in parts that are fetched when they are wanted.
  function text(node) {
    const box = el("div", { class: `text ${tree.nodes.kind[node]}` });
    for (const call of index.calls.get(node) ?? []) {
      const how = [call.tool, call.status, duration(call.latency_s)];
      if (call.cached) how.push("cached");
      if (call.attempts > 1) how.push(count(call.attempts, "attempt"));
      box.append(el("p", { class: call.status === "ok" ? "call" : "call bad" }, how.join("  ·  ")));
    }
    const body = el("pre", {});
    box.append(body);
    const more = async (first) => {
      let part;
      try {
        part = await source.text(node, first);
      } catch (error) {
        body.append(el("span", { class: "problem" }, String(error.message ?? error)));
        return;
      }
      if (first === 0) for (const one of part.arguments) box.insertBefore(el("pre", { class: "arguments" }, one), body);
      body.append(...tokens(part));
      const end = first + part.pieces.length;
      if (end < part.total && part.pieces.length) {
        const rest = el("button", { type: "button", onclick: () => { rest.remove(); more(end); } }, `${part.total - end} more tokens`);
        body.after(rest);
      } else if (end < part.total) box.append(el("p", { class: "hint" }, `${part.total - end} more tokens are not in this file`));
    };
    more(0);
    return box;
  }

  function tokens(part) {
    const most = Math.max(0.01, ...tree.bins.entropy.filter(known));
    return part.pieces.map((piece, i) => {
      const entropy = part.entropy[i];
      if (!known(entropy)) return el("span", {}, piece);
      const heat = Math.min(3, Math.floor((entropy / most) * 4));
      const title = `entropy ${num(entropy, 3)} nats, log-probability ${num(part.logprob[i], 3)}, v${part.version[i]}`;
      return el("span", { class: `heat${heat}`, title }, piece);
    });
  }

  // The two branches of a fork whose rewards differ most.
  function compareAt(node) {
    const sides = index.children[node].map((child) => leavesBelow(tree, child));
    let best = null;
    sides.forEach((left, i) => sides.slice(i + 1).forEach((right) => {
      for (const a of left) for (const b of right) {
        const apart = Math.abs((tree.leaves[a].reward ?? 0) - (tree.leaves[b].reward ?? 0));
        if (!best || apart > best.apart) best = { apart, pair: [a, b] };
      }
    }));
    if (best) showPair(best.pair);
  }

  function compareWith(leaf) {
    if (state.pair && state.pair[0] !== leaf) showPair([state.pair[0], leaf]);
    else {
      const node = tree.leaves[leaf].node, at = forkAbove(node);
      const others = tree.leaves.map((_, i) => i).filter((i) => i !== leaf && pathTo(tree, tree.leaves[i].node).includes(at));
      if (others.length) showPair([leaf, others[0]]);
      else open(node);
    }
  }

  function showPair(pair) {
    const paths = pair.map((leaf) => pathTo(tree, tree.leaves[leaf].node));
    let shared = 0;
    while (shared < Math.min(...paths.map((path) => path.length)) && paths[0][shared] === paths[1][shared]) shared++;
    const at = paths[0][shared - 1];
    show({ pair, node: at });
    const choose = (side) => el(
      "select",
      { "aria-label": side ? "right branch" : "left branch", onchange: (event) => showPair(pair.map((leaf, i) => (i === side ? Number(event.target.value) : leaf))) },
      tree.leaves.map((leaf, i) => el("option", { value: i, selected: i === pair[side] }, `leaf ${i}: ${leafText(leaf)}`)),
    );
    const column = (side) => el(
      "div", { class: "column" },
      choose(side),
      el("p", { class: "facts" }, tree.leaves[pair[side]].outcome, tree.leaves[pair[side]].told ? ` · ${tree.leaves[pair[side]].told}` : ""),
      paths[side].slice(shared).map(text),
      shared === paths[side].length ? el("p", { class: "hint" }, "ended at the fork") : null,
    );
    const told = (index.forks.get(at) ?? []).map(forkText).join("; ");
    detail.replaceChildren(
      el(
        "div", { class: "panel" },
        el("h3", {}, at === 0 ? "From the prompt on" : `From the fork at node ${at} on`),
        el("p", { class: "facts" }, told),
        el("div", { class: "pair" }, column(0), column(1)),
      ),
    );
  }

  show();
  return {
    box: el("div", { class: "treeview" }, facts(tree), controls, drawing, legend, detail),
    keys: (event) => !event.key.startsWith("Arrow") && keys(event), // arrows scroll the page, outside of the drawing
    focus: () => drawing.firstChild.focus({ preventScroll: true }),
  };
}

function facts(tree) {
  const ends = tree.leaves.filter((leaf) => leaf.correct === 1).length;
  const rows = [
    [`reward ${num(tree.reward)} ± ${num(tree.spread)}`, `${ends} of ${count(tree.leaves.length, "leaf").replace("leafs", "leaves")} right`],
    [count(tree.tokens, "token"), tree.flat ? `${percent(tree.unique / tree.flat)} of the flattened paths'` : ""],
    [`${duration(tree.seconds)} from ${moment(tree.started_s)}`],
    [tree.credit ? `advantages: ${tree.credit}, within this tree` : ""],
    [tree.guide ? `guided by ${count(tree.guide, "action")}` : ""],
  ];
  const waited = Object.entries(tree.waited).filter(([, seconds]) => seconds >= 0.001);
  if (waited.length) rows.push([`branches' time: ${waited.map(([cause, s]) => `${cause} ${duration(s)}`).join(", ")}`]);
  return el(
    "div", { class: "about" },
    el("h2", {}, tree.prompt, el("small", {}, "  ", tree.task)),
    el("p", { class: "facts" }, rows.flat().filter(Boolean).join("  ·  ")),
    tree.problem ? el("p", { class: "problem" }, tree.problem) : null,
    Object.entries(tree.meta).map(([name, value]) => el("p", { class: "meta" }, el("b", {}, `${name} `), value)),
  );
}
