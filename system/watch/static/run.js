// The page Run: how it goes, what it is doing now, what went wrong.

import { chart } from "./chart.js";
import { compact, count, duration, el, known, moment, num, percent, refill } from "./dom.js";

const CHARTS = [
  ["Reward", [["rollout/reward", "sampled"], ["train/reward", "trained on"]], {}],
  ["Accuracy", [["rollout/accuracy", "sampled"]], { range: [0, 1], evals: true }],
  ["Tokens per second", [["time/generated_per_s", "generated"], ["time/trained_per_s", "trained on"]], {}],
  ["Staleness", [["flow/staleness", "mean"], ["flow/staleness_max", "largest"]], { unit: "versions" }],
  ["Trees", [["flow/queue_depth", "in the queue"], ["rollout/growing", "growing"]], {}],
  ["Entropy", [["rollout/entropy", "of sampled tokens"]], { unit: "nats" }],
];
const SUPERVISED = [
  ["Loss", [["sft/loss", "trained on"], ["sft/held_out_loss", "held out"]], { unit: "nats per token" }],
  ["Learning rate", [["sft/lr", "of the step"]], {}],
];
const KEYS = [...CHARTS, ...SUPERVISED].flatMap(([, keys]) => keys.map(([key]) => key));

export async function page(context) {
  const box = el("div", { class: "run" });
  let seen = "";
  async function update() {
    const [about, { curves }] = await Promise.all([
      context.api(`runs/${context.run}/overview`),
      context.api(`runs/${context.run}/curves?keys=${encodeURIComponent(KEYS.join(","))}`),
    ]);
    const now = JSON.stringify([{ ...about, state: { ...about.state, quiet_s: Math.round(about.state.quiet_s ?? -1) } }, curves]);
    if (now === seen) return;
    seen = now;
    refill(box, head(about), tiles(about), problems(about), charts(about, curves), idle(about), settings(about));
  }
  await update();
  return { box, update };
}

function head({ state, resume, phase, step, steps, eta_s, trees, span }) {
  const doing = {
    running: phase ? `It is running: ${phase}.` : "It is running.",
    finished: "It has finished.",
    stopped: step ? `It has stopped; ${resume} goes on with it.` : "Nobody is writing here.",
    lost: `It ended without a word: its process is gone, or its machine silent. ${resume} goes on with it.`,
  }[state.state];
  const ended = span ? `last record of ${new Date(span[1] * 1000).toLocaleString()}` : "";
  const quiet = state.state === "finished" ? ended : known(state.quiet_s) ? `last written ${duration(Math.round(state.quiet_s))} ago` : "nothing written yet";
  const eta = known(eta_s) && step < steps ? `about ${duration(eta_s)} to go` : "";
  const kept = trees.known ? `${count(trees.known, "tree")} kept` : "no trees kept yet";
  return el(
    "section", { class: `state ${state.state}` },
    el("p", {}, el("b", {}, doing), " ", el("span", { class: "facts" }, [state.holder, quiet, eta, kept].filter(Boolean).join("  ·  "))),
    el("p", {}, steps ? el("progress", { max: steps, value: step, "aria-label": "training steps" }) : "", ` step ${step}${steps ? ` of ${steps}` : ""}`),
  );
}

function tiles({ figures, evals, wall_s }) {
  const last = evals.at(-1), first = evals[0];
  if (!Object.values(figures).some(known)) return el("section", {}); // no step yet, or a supervised run
  const shown = [
    ["reward", num(figures.reward), "last 10 steps"],
    ["accuracy", num(figures.accuracy), "last 10 steps"],
    ["held-out accuracy", last ? num(last.accuracy, 3) : "–", first && first !== last ? `${num(first.accuracy, 3)} at step ${first.step}` : ""],
    ["generated", compact(figures.generated_per_s), "tokens/s"],
    ["trained on", compact(figures.trained_per_s), "tokens/s"],
    ["staleness", num(figures.staleness, 1), "versions"],
    ["queue", compact(figures.queue), "trees"],
    ["prefix cache", percent(figures.cache_hit_share), "of prompt tokens"],
    ["a tree takes", duration(figures.tree_s)],
    ["time", duration(wall_s)],
  ];
  return el("section", { class: "tiles", title: "means over the last 10 records" }, shown.map(([name, value, unit]) => el("div", {}, el("span", {}, name), el("b", {}, value), el("small", {}, unit ?? ""))));
}

function problems({ problems: found, causes, notes }) {
  const lines = [
    ...found.map((text) => el("li", { class: "problem" }, text)),
    ...causes.map((one) => el("li", { class: "problem" }, el("b", {}, one.kind), ` (${count(one.count, "time")}), first: ${one.first}`)),
    ...notes.toReversed().slice(0, 12).map((one) => el("li", {}, el("time", {}, moment(one.time)), " ", one.text)),
  ];
  if (!lines.length) return el("section", {}, el("h2", {}, "Warnings and notes"), el("p", { class: "hint" }, "none"));
  return el("section", {}, el("h2", {}, "Warnings and notes"), el("ul", { class: "notes" }, lines));
}

function charts({ evals }, curves) {
  const supervised = curves["sft/loss"].length > 0;
  const drawn = (supervised ? SUPERVISED : CHARTS).map(([title, keys, options]) => {
    const series = keys.map(([key, name], i) => ({ name, colour: `k${i}`, points: curves[key] }));
    if (options.evals) {
      series.push({ name: "held out", colour: "k2", dots: true, points: evals.filter((one) => known(one.accuracy)).map((one) => [one.step, one.accuracy]) });
    }
    return chart(title, series, options);
  });
  return el("section", { class: "charts" }, drawn);
}

function idle({ idle: actors }) {
  const names = Object.keys(actors);
  if (!names.length) return el("section", {});
  const causes = [...new Set(names.flatMap((name) => Object.keys(actors[name])))].toSorted();
  const rows = names.map((name) => {
    const bars = Object.entries(actors[name]).map(([cause, share]) => {
      const bar = el("i", { class: `k${causes.indexOf(cause) % 10}`, title: `${cause}: ${percent(share)}` });
      bar.style.width = `${100 * share}%`;
      return bar;
    });
    const total = Object.values(actors[name]).reduce((a, b) => a + b, 0);
    return el("tr", {}, el("th", {}, name), el("td", {}, el("div", { class: "share" }, bars)), el("td", { class: "number" }, percent(total)));
  });
  return el(
    "section", {},
    el("h2", {}, "Waiting, by cause", el("small", {}, " share of each actor's time in its last record")),
    el("table", { class: "idle" }, rows),
    el("p", { class: "key" }, causes.map((cause, i) => el("span", {}, el("i", { class: `swatch k${i % 10}` }), cause))),
  );
}

function settings({ settings: found }) {
  return el("section", {}, el("h2", {}, "Settings"), el("dl", {}, Object.entries(found).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}
