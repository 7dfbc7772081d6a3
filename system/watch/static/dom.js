// Elements and numbers.  Text always becomes a text node, so what a model wrote can never be markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

export const el = (tag, attributes, ...children) =>
  filled(document.createElement(tag), attributes, children);

export const svg = (tag, attributes, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

export const known = (value) => typeof value === "number" && Number.isFinite(value);

export function num(value, digits = 2) {
  return known(value) ? value.toFixed(digits).replace("-", "−") : "–";
}

export function signed(value, digits = 2) {
  if (!known(value)) return "–";
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
}

export function compact(value) {
  if (!known(value)) return "–";
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit) return (value / limit).toFixed(1) + unit;
  }
  return Number.isInteger(value) ? String(value) : value.toPrecision(3);
}

export const percent = (value) => (known(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %` : "–");

export function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds > 0 && seconds < 0.001) return "< 1 ms";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const [h, m, s] = parts.map((part) => String(part).padStart(2, "0"));
  return parts[0] ? `${parts[0]}:${m}:${s}` : `${parts[1]}:${s}`;
}

// With its day: a run may take several.  In the browser's time zone.
export const moment = (unix) =>
  known(unix) ? new Date(unix * 1000).toLocaleString([], { month: "short", day: "numeric", hour: "numeric", minute: "2-digit", second: "2-digit" }) : "–";

// Fill a node anew.  What had the focus in it has it again, by its place.
export function refill(box, ...children) {
  const all = () => [...box.querySelectorAll("a, button, input, select, [tabindex]")];
  const at = all().indexOf(document.activeElement);
  box.replaceChildren(...children.flat(Infinity));
  if (at >= 0) all()[at]?.focus({ preventScroll: true });
}

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// Round numbers that divide [low, high] into about `wanted` parts.
export function ticks(low, high, wanted) {
  const span = Math.max(high - low, 1e-12);
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 5, 10].map((f) => f * power).find((one) => span / one <= wanted) ?? 10 * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

// Whether a key presses the button, or follows the link, that has the focus.
export const pressed = (event) => /^(BUTTON|A)$/i.test(event.target.tagName) && (event.key === "Enter" || event.key === " ");

const STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];

// Seconds from 0 to `span`, in steps that a clock has.
export function timeTicks(span, wanted) {
  const step = STEPS_S.find((one) => span / one <= wanted);
  if (!step || span < 2) return ticks(0, span, wanted);
  return Array.from({ length: Math.floor(span / step + 1e-9) + 1 }, (_, i) => i * step);
}
