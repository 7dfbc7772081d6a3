// The pages Compare, Timeline and Evaluation.

import { chart } from "./chart.js";
import { compact, count, duration, el, known, moment, num, percent, refill, svg, timeTicks } from "./dom.js";

const COMPARED = [
  ["rollout/reward", "Reward", {}],
  ["rollout/accuracy", "Accuracy", { range: [0, 1] }],
  ["eval/accuracy", "Held-out accuracy", { range: [0, 1], dots: true }],
  ["time/generated_per_s", "Generated tokens per second", {}],
  ["flow/staleness", "Staleness", { unit: "versions" }],
  ["rollout/entropy", "Entropy", { unit: "nats" }],
  ["tree/forks", "Forks per tree", {}],
  ["rollout/response_tokens", "Response tokens", {}],
];

// Fill `box` with what `ask` finds, whenever that is new.
function following(box, ask, fill) {
  let seen = "";
  return async () => {
    const found = await ask(), now = JSON.stringify(found);
    if (now === seen) return;
    seen = now;
    refill(box, fill(found));
  };
}

export async function comparePage(context) {
  const box = el("div", {});
  const known = await Promise.all(context.runs.map((_, i) => context.api(`runs/${i}/settings`)));
  const different = [...new Set(known.flatMap((one) => Object.keys(one)))].filter((name) => new Set(known.map((one) => one[name])).size > 1);
  const keys = encodeURIComponent(COMPARED.map(([key]) => key).join(","));
  const ask = () => Promise.all(context.runs.map(async ({ name }, i) => {
    const [about, { curves }] = await Promise.all([context.api(`runs/${i}/overview`), context.api(`runs/${i}/curves?keys=${keys}`)]);
    const { state: { state }, step, steps, figures, evals, wall_s } = about;
    return { name, settings: known[i], state, step, steps, figures, evals, wall_s, curves };
  }));
  function fill(runs) {
    const row = (label, cell) => el("tr", {}, el("th", {}, label), runs.map((run) => el("td", { class: "number" }, cell(run))));
    return [
      el("section", { class: "charts" }, COMPARED.map(([key, title, options]) => chart(
        title, runs.map((run, i) => ({ name: run.name, colour: `k${i % 10}`, points: run.curves[key], dots: options.dots })), options,
      ))),
      el("div", { class: "wide" }, el(
        "table", { class: "list compared" },
        el("tr", {}, el("th", {}), runs.map((run, i) => el("th", { title: run.name }, el("i", { class: `swatch k${i % 10}` }), run.name))),
        row("state", (run) => run.state),
        row("step", (run) => `${run.step} of ${run.steps ?? "?"}`),
        row("reward", (run) => num(run.figures.reward)),
        row("held-out accuracy", (run) => num(run.evals.at(-1)?.accuracy, 3)),
        row("generated tokens/s", (run) => compact(run.figures.generated_per_s)),
        row("time", (run) => duration(run.wall_s)),
        different.map((name) => row(name, (run) => run.settings[name] ?? "–")),
      )),
      context.runs.length < 2 ? el("p", { class: "hint" }, "Name several runs to compare them: espalier watch RUN RUN2") : "",
    ];
  }
  const update = following(box, ask, fill);
  await update();
  return { box, update };
}

const LEFT = 110, ROW = 44;

export async function timelinePage(context) {
  const box = el("div", {});
  const ask = async () => [await context.api(`runs/${context.run}/timeline`), Math.max(900, document.documentElement.clientWidth - 60)];
  const update = following(box, ask, ([found, width]) => (found.span ? drawTimeline(found, width, context) : el("p", { class: "hint" }, "nothing recorded yet")));
  await update();
  return { box, update };
}

function drawTimeline({ span: [began, ended], actors, phases, trees, outside }, width, context) {
  const inner = width - LEFT - 16;
  const x = (time) => LEFT + ((time - began) / (ended - began)) * inner;
  const causes = [...new Set(actors.flatMap((actor) => Object.keys(actor.causes)))].toSorted();
  const strip = 18 * Math.min(8, trees.length || 0), height = 46 + actors.length * ROW + strip + 40;
  const image = svg("svg", { class: "timeline", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "who waited for what" });
  const told = el("p", { class: "key", id: "told" }, "\u00a0");
  for (const tick of timeTicks(ended - began, 9)) {
    image.append(
      svg("line", { class: "rule", x1: x(began + tick), x2: x(began + tick), y1: 30, y2: height - 20 }),
      svg("text", { class: "tick", x: tick ? x(began + tick) : 4, y: height - 6, "text-anchor": tick ? "middle" : "start" }, tick ? `+${duration(tick)}` : moment(began)),
    );
  }
  phases.forEach((one, i) => {
    const from = x(one.time), until = phases[i + 1]?.time ?? ended, to = x(until);
    image.append(svg("g", { class: `phase p${i % 2}` },
      svg("rect", { x: from, y: 6, width: Math.max(1, to - from), height: 18 }),
      to - from > 7 * one.phase.length ? svg("text", { x: from + 4, y: 19 }, one.phase) : "",
      svg("title", {}, `${one.phase}, from ${moment(one.time)}, ${duration(Math.max(0, until - one.time))}`)));
  });
  if (phases.length) image.append(svg("text", { x: 4, y: 19, class: "name" }, "phase"));
  actors.forEach((actor, row) => {
    const base = 46 + row * ROW + ROW - 10, tall = ROW - 14;
    const names = Object.keys(actor.causes), bars = actor.causes[names[0]]?.length ?? 0, step = inner / Math.max(1, bars);
    const share = (name, i) => (known(actor.causes[name][i]) ? Math.max(0, actor.causes[name][i]) : 0);
    image.append(
      svg("text", { x: 4, y: base - tall / 2 + 4, class: "name" }, actor.name),
      svg("line", { class: "rule", x1: LEFT, x2: LEFT + inner, y1: base, y2: base }),
      svg("line", { class: "rule", x1: LEFT, x2: LEFT + inner, y1: base - tall, y2: base - tall }),
      svg("text", { x: LEFT - 4, y: base - tall + 4, class: "tick", "text-anchor": "end" }, "100 %"),
    );
    const at = Array(bars).fill(base); // one path for a cause: with many actors single bars are too many
    for (const name of names) {
      let path = "";
      for (let i = 0; i < bars; i++) {
        const high = share(name, i) * tall;
        if (!high) continue;
        at[i] -= high;
        path += `M${(LEFT + i * step).toFixed(1)} ${at[i].toFixed(2)}h${(step + 0.3).toFixed(2)}v${high.toFixed(2)}h${(-step - 0.3).toFixed(2)}z`;
      }
      if (path) image.append(svg("path", { class: `bar k${causes.indexOf(name) % 10}`, d: path }));
    }
    const over = svg("rect", { class: "over", x: LEFT, y: base - tall, width: inner, height: tall });
    over.addEventListener("mousemove", (event) => {
      const i = Math.min(bars - 1, Math.floor((event.clientX - over.getBoundingClientRect().left) / step));
      const shares = names.filter((name) => share(name, i)).map((name) => `${name} ${percent(share(name, i))}`);
      const what = names.some((name) => known(actor.causes[name][i])) ? shares.join(", ") || "nothing" : "not known";
      told.textContent = `${actor.name} at +${duration(((i + 0.5) / bars) * (ended - began))} waits for: ${what}`;
    });
    image.append(over);
  });
  const ends = Array(8).fill(-Infinity), top = 46 + actors.length * ROW + 6;
  for (const [number, from, to] of trees) {
    const lane = ends.findIndex((end) => end <= from), at = lane < 0 ? ends.indexOf(Math.min(...ends)) : lane;
    ends[at] = Math.max(ends[at], to);
    const bar = svg("rect", { class: "kept", x: x(Math.max(from, began)), y: top + at * 18, width: Math.max(1.5, x(Math.min(to, ended)) - x(Math.max(from, began))), height: 12 },
      svg("title", {}, `tree ${number}, ${duration(to - from)}`));
    bar.addEventListener("click", () => { location.hash = `#/tree/${context.run}/${number}`; });
    image.append(bar);
  }
  if (trees.length) image.append(svg("text", { x: 4, y: top + 10, class: "name" }, "kept trees"));
  const away = outside ? ` ${count(outside, "kept tree")} not drawn: from before or after these records, by the clock of the machine where it grew.` : "";
  return el(
    "section", {},
    el("h2", {}, "Who waits for what", el("small", {}, " height: share of the actor's time, from the records of training steps")),
    el("p", { class: "key" }, causes.map((cause, i) => el("span", {}, el("i", { class: `swatch k${i % 10}` }), cause))),
    told,
    el("div", { class: "drawing" }, image),
    el("p", { class: "hint" }, "A gap: no record tells (an evaluation, say). What is not waiting is work. Trees: a part of those that are kept, from first root to close; a click opens one.", away),
  );
}

// A share with its 95 % interval, where one is known.
function surely({ accuracy, low, high }) {
  return low == null ? num(accuracy, 3) : `${num(accuracy, 3)} (${num(low, 3)} to ${num(high, 3)})`;
}

export async function evaluationPage(context) {
  const box = el("div", {});
  const update = following(box, () => context.api(`runs/${context.run}/evaluation`), ({ sets }) => {
    if (!sets.length) return el("p", { class: "hint" }, "No evaluation has ended yet.");
    return sets.map(({ name, curves }) => {
      const kinds = Object.keys(curves).toSorted((a, b) => (a === "all" ? -1 : b === "all" ? 1 : a.localeCompare(b)));
      const series = kinds.map((kind, i) => ({
        name: kind, colour: `k${i % 10}`, dots: true, points: curves[kind].map((one) => [one.step, one.accuracy, one.low, one.high]),
      }));
      return el(
        "section", {}, el("h2", {}, name),
        chart("Accuracy", series, { range: [0, 1], width: 900 }),
        el(
          "table", { class: "list" },
          el("tr", {}, ["step", "when", "kind", "questions", "accuracy", "reward", "calls per answer"].map((one, i) => el("th", { class: i === 1 || i === 2 ? "" : "number" }, one))),
          kinds.flatMap((kind) => curves[kind].map((one) => el("tr", {},
            [one.step, one.which, kind, compact(one.questions), surely(one), num(one.reward, 3), num(one.tool_calls)].map((cell, i) => el("td", { class: i === 1 || i === 2 ? "" : "number" }, cell))))),
        ),
      );
    });
  });
  await update();
  return { box, update };
}
