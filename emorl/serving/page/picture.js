// Pictures as SVG: the front, with the chosen trade-off in it, and how scores spread.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A8A"]; // Okabe and Ito
const WIDTH = 360,
  HEIGHT = 270,
  LEFT = 54,
  RIGHT = 12,
  TOP = 12,
  BOTTOM = 42;

export const colour = (index) => COLOURS[index % COLOURS.length];
export const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
export const percents = (weights) =>
  Object.entries(weights)
    .filter(([, weight]) => weight > 0.004)
    .map(([name, weight]) => `${Math.round(100 * weight)} % ${name}`)
    .join(", ");
export const described = (scores) =>
  Object.entries(scores)
    .map(([name, score]) => `${name} ${number(score)}`)
    .join(" · ");

function shape(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const text = (x, y, content, anchor = "middle", more = {}) =>
  shape("text", { x, y, "text-anchor": anchor, "aria-hidden": true, ...more }, content);

/** Scores at any weights: of a point of the front there, else its neighbours' mean, the closer the heavier. */
export function estimated(front, weights) {
  const squared = (point) =>
    Object.keys(point.weights).reduce((sum, name) => sum + (point.weights[name] - (weights[name] ?? 0)) ** 2, 0);
  const shares = front.map((point) => 1 / (squared(point) + 1e-8) ** 2);
  const total = shares.reduce((sum, share) => sum + share, 0);
  const mean = (name) => front.reduce((sum, point, index) => sum + point.scores[name] * shares[index], 0) / total;
  return Object.fromEntries(Object.keys(front[0].scores).map((name) => [name, mean(name)]));
}

/** Score -> place between two ends, and the numbers at its axis. */
function axis(scores, from, to) {
  const low = Math.min(...scores),
    high = Math.max(...scores),
    room = (high - low || 0.1) * 0.06;
  const [first, last] = [low - room, high + room];
  const steps = [1, 2, 5]
    .flatMap((step) => [0.0001, 0.001, 0.01, 0.1, 1, 10, 100].map((power) => step * power))
    .sort((a, b) => a - b);
  const step = steps.find((one) => (last - first) / one <= 5) ?? (last - first) / 5;
  const ticks = [];
  for (let tick = Math.ceil(first / step); tick * step <= last; tick++) ticks.push(Number((tick * step).toPrecision(6)));
  return { at: (score) => from + ((score - first) / (last - first)) * (to - from), ticks };
}

/**
 * The front in an <svg>: two objectives as a scatter, `objectives` of four or more as parallel lines. A point is chosen by a
 * click, or by Enter where the arrow keys have led.
 */
export class Picture {
  constructor(svg, front, choose, show) {
    Object.assign(this, { svg, front, choose, show, points: [], allowed: () => true, focused: 0 });
    svg.addEventListener("keydown", (event) => this.key(event));
  }

  draw(objectives, shade) {
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.replaceChildren();
    const scores = (name) => this.front.map((point) => point.scores[name]);
    const [place, frame] = objectives.length === 2 ? this.scatter(objectives, scores) : this.parallel(objectives, scores);
    this.place = place;
    const shades = shade && axis(scores(shade), 0.15, 1);
    this.points = this.front.map((point, index) => this.point(point, index, shades ? shades.at(point.scores[shade]) : 0.75));
    this.here = shape(objectives.length === 2 ? "circle" : "polyline", { class: "here", r: 11, "aria-hidden": true });
    this.svg.append(
      ...frame.filter((part) => part.tagName === "path"),
      ...this.points,
      this.here,
      ...frame.filter((part) => part.tagName === "text"),
    );
    this.restrict(this.allowed);
  }

  scatter([across, up], scores) {
    const x = axis(scores(across), LEFT, WIDTH - RIGHT),
      y = axis(scores(up), HEIGHT - BOTTOM, TOP);
    const frame = [
      ...x.ticks.flatMap((tick) => [
        shape("path", { class: "axis", d: `M${x.at(tick)} ${TOP}V${HEIGHT - BOTTOM}` }),
        text(x.at(tick), HEIGHT - BOTTOM + 16, `${tick}`),
      ]),
      ...y.ticks.flatMap((tick) => [
        shape("path", { class: "axis", d: `M${LEFT} ${y.at(tick)}H${WIDTH - RIGHT}` }),
        text(LEFT - 6, y.at(tick) + 4, `${tick}`, "end"),
      ]),
      text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, `${across} →`),
      text(0, 0, `${up} →`, "middle", { transform: `translate(10 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)` }),
    ];
    return [(at) => ({ cx: x.at(at[across]), cy: y.at(at[up]) }), frame];
  }

  parallel(objectives, scores) {
    const x = (index) => 30 + (index * (WIDTH - 60)) / (objectives.length - 1);
    const axes = objectives.map((name) => axis(scores(name), HEIGHT - BOTTOM, TOP + 6));
    const frame = objectives.flatMap((name, index) => [
      shape("path", { class: "axis", d: `M${x(index)} ${TOP}V${HEIGHT - BOTTOM}` }),
      text(x(index), HEIGHT - BOTTOM + (index % 2 ? 32 : 16), name),
      ...[axes[index].ticks[0], axes[index].ticks.at(-1)].map((tick) =>
        text(x(index) - 4, axes[index].at(tick) + 4, `${tick}`, "end"),
      ),
    ]);
    return [(at) => ({ points: objectives.map((name, index) => `${x(index)},${axes[index].at(at[name])}`).join(" ") }), frame];
  }

  point(point, index, opacity) {
    const at = this.place(point.scores),
      tag = at.points ? "polyline" : "circle";
    const label = `mixture ${index + 1}: ${percents(point.weights)}; scores ${described(point.scores)}`;
    const made = shape(
      "g",
      { class: "point", role: "option", tabindex: -1, "aria-selected": false, "aria-label": label },
      shape(tag, { class: "reach", r: 9, ...at }),
      shape(tag, { class: "dot", r: 5, "fill-opacity": opacity, ...at }),
      shape("title", {}, label),
    );
    made.addEventListener("click", () => this.take(index));
    made.addEventListener("focus", () => this.show(index));
    made.addEventListener("pointerenter", () => this.show(index));
    made.addEventListener("pointerleave", () => this.show(null));
    made.addEventListener("blur", () => this.show(null));
    return made;
  }

  take(index) {
    if (!this.allowed(this.front[index])) return;
    this.tab(index);
    this.choose(index);
  }

  /** One point is in the order of the tab key; arrow keys lead to its neighbours. */
  tab(index) {
    this.points[this.focused]?.setAttribute("tabindex", -1);
    this.focused = index;
    this.points[index]?.setAttribute("tabindex", 0);
  }

  key(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key === "Enter" || event.key === " ") this.take(this.focused);
    else if (steps[event.key]) {
      const open = this.front.map((_, index) => index).filter((index) => this.allowed(this.front[index]));
      if (!open.length) return;
      const next = (open.indexOf(this.focused) + steps[event.key] + open.length) % open.length;
      this.tab(open[next]);
      this.points[open[next]].focus();
    } else return;
    event.preventDefault();
  }

  /** Only points that `allowed` takes may be chosen; the others fade. */
  restrict(allowed) {
    this.allowed = allowed;
    this.points.forEach((made, index) => made.setAttribute("aria-disabled", !allowed(this.front[index])));
    this.tab(Math.max(0, this.front.findIndex(allowed)));
  }

  /** The chosen trade-off: a ring at its scores, and the point of the front that it is, if it is one. */
  mark(scores, chosen) {
    for (const [name, value] of Object.entries(this.place(scores))) this.here.setAttribute(name, value);
    this.points.forEach((made, index) => made.setAttribute("aria-selected", index === chosen));
  }
}

/** How scores spread, with a mark at one of them; and the share of scores in lower bins. */
export function spread({ low, high, counts }, score, fill) {
  const most = Math.max(...counts),
    total = counts.reduce((sum, count) => sum + count, 0);
  const at = Math.min(1, Math.max(0, (score - low) / (high - low))) * counts.length;
  const bars = counts.map((count, index) => {
    const height = count && Math.max(1, (24 * count) / most);
    return shape("rect", { x: index + 0.05, y: 25 - height, width: 0.9, height, fill, "fill-opacity": 0.45 });
  });
  const line = shape("line", { x1: at, x2: at, y1: 0, y2: 26 });
  const lower = counts.slice(0, Math.min(Math.floor(at), counts.length - 1)).reduce((sum, count) => sum + count, 0);
  return [
    shape(
      "svg",
      { class: "spread", viewBox: `0 0 ${counts.length} 26`, preserveAspectRatio: "none", "aria-hidden": true },
      ...bars,
      line,
    ),
    lower / total,
  ];
}
