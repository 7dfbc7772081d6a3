// The pages Compare, Timeline and Evaluation.

import { chart } from "./chart.js";
import { clock, compact, duration, el, known, num, percent, svg, ticks } from "./dom.js";

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

export async function comparePage(context) {
  const box = el("div", {});
  const keys = encodeURIComponent(COMPARED.map(([key]) => key).join(","));
  async function update() {
    const runs = await Promise.all(context.runs.map(async ({ name }, i) => {
      const [about, { curves }] = await Promise.all([context.api(`runs/${i}/overview`), context.api(`runs/${i}/curves?keys=${keys}`)]);
      return { name, about, curves };
    }));
    const row = (label, cell) => el("tr", {}, el("th", {}, label), runs.map((run) => el("td", { class: "number" }, cell(run))));
    const settings = [...new Set(runs.flatMap((run) => Object.keys(run.about.settings)))];
    const different = settings.filter((name) => new Set(runs.map((run) => run.about.settings[name])).size > 1);
    box.replaceChildren(
      el("section", { class: "charts" }, COMPARED.map(([key, title, options]) => chart(
        title, runs.map((run, i) => ({ name: run.name, colour: `k${i % 10}`, points: run.curves[key], dots: options.dots })), options,
      ))),
      el(
        "table", { class: "list compared" },
        el("tr", {}, el("th", {}), runs.map((run, i) => el("th", {}, el("i", { class: `swatch k${i % 10}` }), run.name))),
        row("state", (run) => run.about.state.state),
        row("step", (run) => `${run.about.step} of ${run.about.steps ?? "?"}`),
        row("reward", (run) => num(run.about.figures.reward)),
        row("held-out accuracy", (run) => num(run.about.evals.at(-1)?.accuracy, 3)),
        row("generated tokens/s", (run) => compact(run.about.figures.generated_per_s)),
        row("time", (run) => duration(run.about.wall_s)),
        different.map((name) => row(name, (run) => run.about.settings[name] ?? "–")),
      ),
      context.runs.length < 2 ? el("p", { class: "hint" }, "Name several runs to compare them: espalier watch RUN RUN2") : "",
    );
  }
  await update();
  return { box, update };
}

const LEFT = 110, ROW = 44;

export async function timelinePage(context) {
  const box = el("div", {});
  async function update() {
    const found = await context.api(`runs/${context.run}/timeline`);
    box.replaceChildren(found.span ? drawTimeline(found, context) : el("p", { class: "hint" }, "nothing recorded yet"));
  }
  await update();
  return { box, update };
}

function drawTimeline({ span: [began, ended], actors, phases, trees }, context) {
  const width = Math.max(900, document.documentElement.clientWidth - 60), inner = width - LEFT - 16;
  const x = (time) => LEFT + ((time - began) / (ended - began)) * inner;
  const causes = [...new Set(actors.flatMap((actor) => Object.keys(actor.causes)))].toSorted();
  const strip = 18 * Math.min(8, trees.length || 0), height = 46 + actors.length * ROW + strip + 40;
  const image = svg("svg", { class: "timeline", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "who waited for what" });
  for (const tick of ticks(0, ended - began, 9)) {
    image.append(
      svg("line", { class: "rule", x1: x(began + tick), x2: x(began + tick), y1: 30, y2: height - 20 }),
      svg("text", { class: "tick", x: x(began + tick), y: height - 6, "text-anchor": "middle" }, tick ? `+${duration(tick)}` : clock(began)),
    );
  }
  phases.forEach((one, i) => {
    const from = x(one.time), to = x(phases[i + 1]?.time ?? ended);
    image.append(svg("g", { class: `phase p${i % 2}` },
      svg("rect", { x: from, y: 6, width: Math.max(1, to - from), height: 18 }),
      to - from > 7 * one.phase.length ? svg("text", { x: from + 4, y: 19 }, one.phase) : "",
      svg("title", {}, `${one.phase}, from ${clock(one.time)}, ${duration(Math.max(0, (phases[i + 1]?.time ?? ended) - one.time))}`)));
  });
  if (phases.length) image.append(svg("text", { x: 4, y: 19, class: "name" }, "phase"));
  actors.forEach((actor, row) => {
    const base = 46 + row * ROW + ROW - 10, tall = ROW - 14;
    const names = Object.keys(actor.causes), bars = actor.causes[names[0]]?.length ?? 0, step = inner / Math.max(1, bars);
    image.append(
      svg("text", { x: 4, y: base - tall / 2 + 4, class: "name" }, actor.name),
      svg("line", { class: "rule", x1: LEFT, x2: LEFT + inner, y1: base, y2: base }),
      svg("line", { class: "rule", x1: LEFT, x2: LEFT + inner, y1: base - tall, y2: base - tall }),
      svg("text", { x: LEFT - 4, y: base - tall + 4, class: "tick", "text-anchor": "end" }, "100 %"),
    );
    for (let i = 0; i < bars; i++) {
      let at = base;
      for (const name of names) {
        const share = actor.causes[name][i];
        if (!known(share) || share <= 0) continue;
        at -= share * tall;
        image.append(svg("rect", { class: `k${causes.indexOf(name) % 10}`, x: LEFT + i * step, y: at, width: step + 0.3, height: share * tall },
          svg("title", {}, `${actor.name} waits for: ${name}, ${percent(share)}`)));
      }
    }
  });
  const ends = Array(8).fill(-Infinity), top = 46 + actors.length * ROW + 6;
  for (const [number, from, to] of trees) {
    if (to < began || from > ended) continue;
    const lane = ends.findIndex((end) => end <= from), at = lane < 0 ? ends.indexOf(Math.min(...ends)) : lane;
    ends[at] = Math.max(ends[at], to);
    const bar = svg("rect", { class: "kept", x: x(Math.max(from, began)), y: top + at * 18, width: Math.max(1.5, x(Math.min(to, ended)) - x(Math.max(from, began))), height: 12 },
      svg("title", {}, `tree ${number}, ${duration(to - from)}`));
    bar.addEventListener("click", () => { location.hash = `#/tree/${context.run}/${number}`; });
    image.append(bar);
  }
  if (trees.length) image.append(svg("text", { x: 4, y: top + 10, class: "name" }, "kept trees"));
  return el(
    "section", {},
    el("h2", {}, "Who waits for what", el("small", {}, " height: share of the actor's time, from the records of training steps")),
    el("p", { class: "key" }, causes.map((cause, i) => el("span", {}, el("i", { class: `swatch k${i % 10}` }), cause))),
    el("div", { class: "drawing" }, image),
    el("p", { class: "hint" }, "A gap: no record tells (an evaluation, say). What is not waiting is work. Trees: a part of those that are kept, from first root to close; a click opens one."),
  );
}

// A share with its 95 % interval, where one is known.
function surely({ accuracy, low, high }) {
  return low == null ? num(accuracy, 3) : `${num(accuracy, 3)} (${num(low, 3)} to ${num(high, 3)})`;
}

export async function evaluationPage(context) {
  const box = el("div", {});
  async function update() {
    const { sets } = await context.api(`runs/${context.run}/evaluation`);
    if (!sets.length) return box.replaceChildren(el("p", { class: "hint" }, "No evaluation has ended yet."));
    box.replaceChildren(...sets.map(({ name, curves }) => {
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
    }));
  }
  await update();
  return { box, update };
}
