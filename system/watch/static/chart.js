// Curves over training steps, with axes that say where they begin.

import { compact, el, known, svg, ticks } from "./dom.js";

const HEIGHT = 170, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 30;

// `series`: [{name, colour, points: [[x, mean, low, high], …], dots}]; `range`: bounds of y that hold in any case.
export function chart(title, series, { range = null, width = 390, unit = "", xName = "step" } = {}) {
  const drawn = series.filter((one) => one.points?.length);
  const box = el("figure", { class: "chart" }, el("figcaption", {}, title, unit ? el("small", {}, ` ${unit}`) : ""));
  box.style.maxWidth = `${width}px`; // a long name below it does not make it wider
  if (!drawn.length) return filled(box, el("p", { class: "hint" }, "nothing recorded yet"));
  const points = drawn.flatMap((one) => one.points);
  const xs = points.map((p) => p[0]), lows = points.map((p) => p[2] ?? p[1]), highs = points.map((p) => p[3] ?? p[1]);
  const least = (list) => list.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (list) => list.reduce((a, b) => Math.max(a, b), -Infinity);
  const x0 = least(xs), x1 = Math.max(most(xs), x0 + 1);
  let [y0, y1] = [least(lows), most(highs)];
  if (range) [y0, y1] = [Math.min(y0, range[0]), Math.max(y1, range[1])];
  else if (y0 > 0) y0 = 0; // a curve of a quantity that has a zero shows it
  if (y1 - y0 < 1e-9) y1 = y0 + 1;
  // Single measurements stand beside each other, each with its interval: between them nothing was measured.
  const dotted = drawn.filter((one) => one.dots), pad = Math.max(0, dotted.length - 1) * 2.5;
  const left = LEFT + pad, across = width - LEFT - RIGHT - 2 * pad;
  const x = (v) => left + ((v - x0) / (x1 - x0)) * across;
  const y = (v) => TOP + (1 - (v - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const image = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": title });
  for (const tick of ticks(y0, y1, 4)) {
    image.append(
      svg("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(tick) + 3.5, "text-anchor": "end" }, Math.abs(tick) < 1000 ? String(tick).replace("-", "−") : compact(tick)),
    );
  }
  const steps = ticks(x0, x1, 5).filter((one) => xName !== "step" || Number.isInteger(one));
  for (const tick of steps) {
    image.append(svg("text", { class: "tick", x: x(tick), y: HEIGHT - 14, "text-anchor": "middle" }, compact(tick)));
  }
  image.append(svg("text", { class: "tick", x: width - RIGHT, y: HEIGHT - 2, "text-anchor": "end" }, xName));
  for (const one of drawn) {
    const aside = one.dots ? (dotted.indexOf(one) - (dotted.length - 1) / 2) * 5 : 0;
    const band = one.points.filter((p) => known(p[2]) && known(p[3]));
    if (one.dots) {
      for (const p of band) image.append(svg("line", { class: `line ${one.colour}`, x1: x(p[0]) + aside, x2: x(p[0]) + aside, y1: y(p[3]), y2: y(p[2]) }));
    } else if (band.some((p) => p[3] > p[2])) {
      const there = band.map((p) => `${x(p[0])},${y(p[3])}`), back = band.toReversed().map((p) => `${x(p[0])},${y(p[2])}`);
      image.append(svg("polygon", { class: `band ${one.colour}`, points: [...there, ...back].join(" ") }));
    }
    const line = one.points.map((p, i) => `${i ? "L" : "M"}${(x(p[0]) + aside).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
    image.append(svg("path", { class: `line ${one.colour}${one.dots ? " dotted" : ""}`, d: line }));
    if (one.dots || one.points.length < 3) {
      for (const p of one.points) image.append(svg("circle", { class: `point ${one.colour}`, cx: x(p[0]) + aside, cy: y(p[1]), r: 3.5 }));
    }
  }
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  image.append(cursor);
  const names = drawn.map((one) => el("span", {}, el("i", { class: `swatch ${one.colour}` }), one.name, " ", el("b", {})));
  const key = el("p", { class: "key" }, names);
  const tell = (at) => drawn.forEach((one, i) => {
    const near = one.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    names[i].lastChild.textContent = compact(near[1]);
  });
  tell(x1);
  image.addEventListener("mousemove", (event) => {
    const frame = image.getBoundingClientRect();
    const at = x0 + (((event.clientX - frame.left) * (width / frame.width) - left) / across) * (x1 - x0);
    const held = Math.min(x1, Math.max(x0, at));
    cursor.setAttribute("x1", x(held));
    cursor.setAttribute("x2", x(held));
    tell(held);
  });
  image.addEventListener("mouseleave", () => { cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); tell(x1); });
  box.append(image, key);
  return box;
}

function filled(box, child) {
  box.append(child);
  return box;
}
