// A tree as lanes of branches over tokens or time.  Also in the file that `espalier tree --html` writes.

import { count, duration, known, num, signed, svg, ticks, timeTicks } from "./dom.js";

export const COLOURS = { entropy: "entropy", advantage: "advantage", version: "version of the weights", latency: "time of tool calls", author: "author", waits: "cause of waiting" };
// Causes as system/watch/times.py has them: a class of colour, and words.
const WAITS = {
  engine: ["k0", "its tokens come"], waiting: ["k4", "its first token is awaited"], tool: ["k2", "its call is under way"],
  barrier: ["k1", "it waits for others"], away: ["away", "the run was not there"],
};
const STEPS = 8; // of a sequential scale; a diverging one has 7, the middle is 0
const LEFT = 88, RIGHT = 200, TOP = 40;

// How a quantity becomes a class of colour, and what the legend says of it.
export function scaleOf(tree, by) {
  if (by === "advantage") {
    const values = tree.nodes.advantage.filter(known).map(Math.abs);
    const most = Math.max(...values, 1e-9);
    const steps = [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1];
    return {
      of: (value) => (known(value) ? `d${Math.round((value / most) * 3) + 3}` : "none"),
      legend: values.length ? steps.map((share, i) => [`d${i}`, signed(share * most)]) : [["none", "unknown"]],
    };
  }
  if (by === "version") {
    const values = tree.bins.version.filter((one) => one >= 0);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -1);
    const span = Math.max(high - low, 1);
    const of = (value) => (value < 0 ? "none" : `s${Math.round(((value - low) / span) * (STEPS - 1))}`);
    const shown = values.length ? ticks(low, high, 6).filter(Number.isInteger) : [];
    return { of, legend: (shown.length ? shown : [low]).map((one) => [of(one), `v${one}`]) };
  }
  if (by === "latency") {
    const most = Math.max(1e-6, ...tree.calls.map((call) => call.latency_s).filter(known));
    return {
      of: (value) => (known(value) ? `s${Math.min(STEPS - 1, Math.floor((value / most) * STEPS))}` : "none"),
      legend: [...Array.from({ length: STEPS }, (_, i) => [`s${i}`, `≥ ${duration((most * i) / STEPS)}`]), ["none", "not a call"]],
    };
  }
  if (by === "waits") {
    const there = new Set(tree.times?.stretches.flat().map((one) => tree.times.causes[one[2]]));
    const legend = Object.entries(WAITS).filter(([cause]) => there.has(cause)).map(([, named]) => named);
    return { of: (cause) => WAITS[cause][0], legend: tree.leaves.some((leaf) => leaf.scored) ? [...legend, ["k3", "its answer is scored"]] : legend };
  }
  if (by === "author") {
    const names = ["model", "tool", "prompt", "expert"].filter((name) => tree.nodes.kind.includes(name));
    return { of: (value) => value, legend: names.map((name) => [name, name]) };
  }
  const most = Math.max(0.01, tree.bins.entropy.reduce((a, b) => (known(b) ? Math.max(a, b) : a), 0));
  return {
    of: (value) => (known(value) ? `s${Math.min(STEPS - 1, Math.floor((value / most) * STEPS))}` : "none"),
    legend: Array.from({ length: STEPS }, (_, i) => [`s${i}`, `${num((most * i) / STEPS)}–${num((most * (i + 1)) / STEPS)}`]),
    unit: "nats, mean of " + count(tree.bin_tokens, "token"),
  };
}

// The node's children, the forks and calls by node, the leaves by node.
export function indexed(tree) {
  const children = tree.nodes.parent.map(() => []);
  tree.nodes.parent.forEach((above, node) => above >= 0 && children[above].push(node));
  const by = (list) => {
    const found = new Map();
    list.forEach((one, i) => found.set(one.node, [...(found.get(one.node) ?? []), { ...one, index: i }]));
    return found;
  };
  return { children, forks: by(tree.forks), calls: by(tree.calls), leaves: by(tree.leaves) };
}

export function pathTo(tree, node) {
  const path = [];
  for (let at = node; at >= 0; at = tree.nodes.parent[at]) path.unshift(at);
  return path;
}

// Leaves at or below a node, in lane order.
export function leavesBelow(tree, node) {
  return tree.leaves.map((leaf, i) => i).filter((i) => pathTo(tree, tree.leaves[i].node).includes(node));
}

export function forkText(fork) {
  const draw = known(fork.draw) ? `, draw ${num(fork.draw, 3)}` : "";
  const what = fork.forks ? `→ ${count(fork.forks, "fork")}` : "→ no fork";
  const lent = fork.scheduled ? `, ${fork.scheduled} by the schedule` : "";
  return `ΔH ${signed(fork.delta_h, 3)}, P(fork) ${num(fork.probability, 3)}${draw} ${what}${lent}`;
}

export function leafText(leaf) {
  const mark = { 1: "✓", 0: "✗" }[leaf.correct] ?? "?";
  const reward = known(leaf.reward) ? num(leaf.reward) : "not scored";
  return `${mark} ${reward}  A ${signed(leaf.advantage)}`;
}

// Where nodes begin and end: in tokens of the branch, or in seconds since the tree's start.
function axisOf(tree, over) {
  const { nodes, times } = tree;
  if (over === "time") {
    const begin = times.stretches.map((parts, node) => parts[0]?.[0] ?? times.over[nodes.parent[node]] ?? 0);
    const scored = tree.leaves.map((leaf) => leaf.scored?.[1] ?? 0);
    const far = Math.max(1e-3, tree.seconds, ...times.over, ...scored);
    return { begin, end: times.over, far, name: "time since the tree's start", ticks: (wanted) => timeTicks(far, wanted), tick: (at) => (at ? duration(at) : "0") };
  }
  const end = nodes.begin.map((begin, node) => begin + nodes.length[node]);
  const far = Math.max(1, ...end);
  return { begin: nodes.begin, end, far, name: "tokens of the branch after the prompt", ticks: (wanted) => ticks(0, far, wanted), tick: (at) => at };
}

// The drawing.  `on.node(node)` and `on.leaf(leaf)` hear of clicks; `lit`: nodes to show, the others fade.
export function drawTree(tree, { by, over = "tokens", width, zoom = 1, selected = -1, lit = null, on = {} }) {
  const { nodes } = tree, index = indexed(tree), axis = axisOf(tree, over);
  const step = tree.lanes > 24 ? 17 : 24, bar = tree.lanes > 24 ? 9 : 13;
  const plot = Math.max(200, (width - LEFT - RIGHT) * zoom), perUnit = plot / axis.far;
  const x = (at) => LEFT + Math.max(0, at) * perUnit;
  const y = (node) => TOP + 14 + nodes.lane[node] * step;
  const height = TOP + 14 + tree.lanes * step, scale = scaleOf(tree, by);
  const faded = (node) => (lit && !lit.has(node) ? " faded" : "");
  const back = svg("g", { class: "grid" }), lines = svg("g", { class: "lines" });
  const bars = svg("g", {}), marks = svg("g", {});
  for (const tick of axis.ticks(Math.max(3, Math.round(plot / 110)))) {
    back.append(
      svg("line", { x1: x(tick), x2: x(tick), y1: TOP - 6, y2: height - 8 }),
      svg("text", { x: x(tick), y: TOP - 12, "text-anchor": "middle" }, axis.tick(tick)),
    );
  }
  back.append(svg("text", { x: LEFT, y: 12, class: "axis" }, axis.name));
  nodes.parent.forEach((above, node) => {
    if (above < 0) return;
    const from = x(axis.end[above]), to = x(axis.begin[node]);
    const wide = Math.min(5, 1 + Math.log2(nodes.leaves[node] || 1));
    if (nodes.lane[above] !== nodes.lane[node]) {
      const turn = `M${from} ${y(above)}V${y(node) - 5}q0 5 5 5`;
      lines.append(svg("path", { d: turn, class: "turn" + faded(node), "stroke-width": wide }));
    }
    // Until it began there was no such branch.
    if (to > from + 5) lines.append(svg("line", { x1: from + 5, x2: to, y1: y(node), y2: y(node), class: "ahead" + faded(node) }));
  });
  const groups = nodes.parent.map((above, node) => {
    const kind = nodes.kind[node], left = x(axis.begin[node]), right = x(axis.end[node]);
    const group = svg("g", { class: `node ${kind}${faded(node)}${node === selected ? " selected" : ""}`, "data-node": node });
    if (above < 0) {
      const label = `prompt, ${nodes.length[node]}`;
      group.append(
        svg("rect", { x: 4, y: y(node) - bar / 2, width: LEFT - 8, height: bar, rx: 2, class: "prompt" }),
        svg("text", { x: 8, y: y(node) + 3.5, class: "inside" }, label),
      );
    } else {
      const parts = over === "time" ? moments(tree, node, by, scale) : stretches(tree, node, by, scale).map(([from, to, name]) => [nodes.begin[node] + from, Math.min(nodes.begin[node] + to, axis.end[node]), name]);
      for (const [from, to, name] of parts) {
        const tall = name === "held" ? bar * 0.25 : kind === "tool" ? bar * 0.55 : bar;
        // A wait that is too short for the screen is left out; all else can be seen.
        const wide = over === "time" && (name === "held" || by === "waits") ? (to - from) * perUnit : Math.max(0.7, (to - from) * perUnit);
        if (wide >= 0.3) group.append(svg("rect", { x: x(from), y: y(node) - tall / 2, width: wide, height: tall, class: name }));
      }
      group.append(svg("rect", { x: left, y: y(node) - bar / 2, width: Math.max(2, right - left), height: bar, class: "hit" }));
    }
    group.append(svg("title", {}, nodeTitle(tree, node, index)));
    if (on.node) group.addEventListener("click", () => on.node(node));
    return group;
  });
  bars.append(...groups);
  for (const [node, decided] of index.forks) {
    const forked = decided.some((one) => one.forks > 0);
    const dot = svg(
      "circle",
      { cx: x(axis.end[node]), cy: y(node), r: forked ? 5 : 3, class: (forked ? "forked" : "decided") + faded(node), "data-fork": node },
      svg("title", {}, decided.map(forkText).join("\n")),
    );
    if (on.node) dot.addEventListener("click", () => on.node(node));
    marks.append(dot);
  }
  for (const [node, leaves] of index.leaves) {
    const more = leaves.length > 1 ? `  ×${leaves.length}` : "";
    const leaf = leaves[0], right = { 1: "right", 0: "wrong" }[leaf.correct] ?? "unscored";
    const alone = !index.children[node].length;
    let at = x(axis.end[node]);
    if (over === "time" && alone && leaf.scored && leaf.scored[1] > axis.end[node]) {
      const from = x(Math.max(leaf.scored[0], axis.end[node])), name = by === "waits" ? "k3" : "held";
      at = x(leaf.scored[1]);
      marks.append(svg("rect", { x: from, y: y(node) - bar / 8, width: at - from, height: bar / 4, class: name + faded(node) }, svg("title", {}, `scored in ${duration(leaf.scored[1] - leaf.scored[0])}`)));
    }
    // A branch that ended where a sibling went on has its label above the lane.
    const label = svg(
      "text",
      { x: at + 9, y: y(node) + 4 - (alone ? 0 : bar), class: `leaf ${right}${faded(node)}`, "data-leaf": leaf.index },
      leafText(leaf) + more,
      svg("title", {}, leaves.map((one) => `leaf ${one.index}: ${one.outcome}, ${one.origin}${one.told ? ` (${one.told})` : ""}`).join("\n")),
    );
    if (on.leaf) label.addEventListener("click", () => on.leaf(leaf.index));
    marks.append(label);
  }
  const whole = Math.round(LEFT + plot + RIGHT);
  return svg(
    "svg",
    { class: "tree", width: whole, height, viewBox: `0 0 ${whole} ${height}`, role: "img", tabindex: 0, "aria-label": `tree of ${tree.prompt}` },
    back, lines, bars, marks,
  );
}

// [from, to, class] of a node's tokens; neighbours of one class together.
function stretches(tree, node, by, scale) {
  const { nodes, bins } = tree, kind = nodes.kind[node], length = nodes.length[node];
  if (by === "latency") {
    const waited = tree.calls.filter((call) => call.node === node).reduce((a, call) => a + call.latency_s, 0);
    return [[0, length, scale.of(kind === "tool" && waited > 0 ? waited : null)]];
  }
  if (kind !== "model" || by === "author") return [[0, length, by === "author" ? kind : `${kind} plain`]];
  if (by === "advantage") return [[0, length, scale.of(nodes.advantage[node])]];
  const first = nodes.bin[node], last = nodes.bin[node + 1] ?? bins.entropy.length;
  const found = [];
  for (let bin = first; bin < last; bin++) {
    const name = scale.of(by === "version" ? bins.version[bin] : bins.entropy[bin]);
    const from = (bin - first) * tree.bin_tokens, to = from + tree.bin_tokens, before = found.at(-1);
    if (before && before[2] === name) before[1] = to;
    else found.push([from, to, name]);
  }
  return found;
}

// [from, to, class] of a node's time: causes, or what its tokens are coloured by, as if they had come evenly.
function moments(tree, node, by, scale) {
  const parts = tree.times.stretches[node].map(([from, to, cause]) => [from, to, tree.times.causes[cause]]);
  if (by === "waits") return parts.map(([from, to, cause]) => [from, to, scale.of(cause)]);
  const works = parts.filter(([, , cause]) => cause === "engine" || cause === "tool");
  const waits = parts.filter((part) => !works.includes(part)).map(([from, to, cause]) => [from, to, cause === "away" ? "away" : "held"]);
  if (!works.length) return waits;
  const begin = works[0][0], each = (works.at(-1)[1] - begin) / tree.nodes.length[node];
  const tokens = stretches(tree, node, by, scale);
  return [...tokens.map(([from, to, name]) => [begin + from * each, begin + Math.min(to, tree.nodes.length[node]) * each, name]), ...waits];
}

function nodeTitle(tree, node, index) {
  const { nodes } = tree;
  const said = [`${nodes.kind[node]}, ${count(nodes.length[node], "token")}`];
  if (known(nodes.entropy[node])) said.push(`mean entropy ${num(nodes.entropy[node], 3)} nats`);
  if (known(nodes.advantage[node]) && nodes.kind[node] === "model") said.push(`advantage ${signed(nodes.advantage[node])}`);
  for (const call of index.calls.get(node) ?? []) said.push(`${call.tool}: ${call.status}, ${duration(call.latency_s)}`);
  for (const [from, to, cause] of tree.times?.stretches[node] ?? []) said.push(`${duration(to - from)}: ${WAITS[tree.times.causes[cause]][1]}`);
  return said.join("\n");
}

// Where a key leads from a node: along its branch, or to the lanes beside it.
export function neighbour(tree, node, key) {
  const { nodes } = tree, index = indexed(tree);
  if (key === "ArrowLeft") return nodes.parent[node] >= 0 ? nodes.parent[node] : node;
  if (key === "ArrowRight") return index.children[node][0] ?? node;
  const lane = nodes.lane[node] + (key === "ArrowDown" ? 1 : -1);
  const there = nodes.lane.map((one, i) => i).filter((i) => nodes.lane[i] === lane && nodes.parent[i] >= 0);
  const far = (i) => Math.abs(nodes.begin[i] - nodes.begin[node]);
  return there.reduce((best, i) => (best < 0 || far(i) < far(best) ? i : best), -1) < 0
    ? node
    : there.reduce((best, i) => (far(i) < far(best) ? i : best));
}
