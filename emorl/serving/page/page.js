// The page: sliders, the front, two answers. A client of /v1/*, as any other is. All text goes in as text, never as markup.

import { Side, answerers, element, of } from "./answers.js";
import { Picture, colour, described, estimated, number } from "./picture.js";
import { fetchJson } from "./requests.js";

const say = (id, message) => Object.assign(of(id), { textContent: message, hidden: !message });
const WAIT = 200; // milliseconds without another move before a moved slider asks

let facts, picture, sides;
let shares = []; // of the policies, in their order, summing to 1
let chosen = null; // the front's point at which the sliders stand, as an index
let waiting = 0;

const weights = () =>
  chosen === null
    ? Object.fromEntries(facts.policies.map((name, index) => [name, Number(shares[index].toFixed(4))]))
    : facts.front[chosen].weights;

/** Of a point of the front; without one, about those where the sliders stand. */
const scoresAt = (index) => (index === null ? estimated(facts.front, weights()) : facts.front[index].scores);

// ---- The sliders

function makeSliders() {
  facts.policies.forEach((name, index) => {
    const slider = element("input", { type: "range", id: `share-${index}`, min: 0, max: 100, step: 1 });
    slider.style.setProperty("--colour", colour(index));
    slider.addEventListener("input", () => move(index, slider.value / 100));
    slider.addEventListener("change", askSoon);
    of("sliders").append(sliderRow(name, element("output", { id: `percent-${index}` }), slider));
  });
  of("best").hidden = !facts.front.length;
  of("best").addEventListener("click", () => choose(facts.front.findIndex(withinLimits)));
  of("equal").addEventListener("click", () =>
    set(
      shares.map(() => 1 / shares.length),
      null,
      true,
    ),
  );
}

const sliderRow = (label, shown, slider) =>
  element("div", { className: "slider" }, element("label", { htmlFor: slider.id }, label), shown, slider);

/** One slider moves; the others share what is left as they did before. */
function move(index, share) {
  const others = shares.reduce((sum, other, place) => sum + (place === index ? 0 : other), 0);
  const rest = (other) => (others > 0 ? (other / others) * (1 - share) : (1 - share) / (shares.length - 1));
  const moved = shares.map((other, place) => (place === index ? share : rest(other)));
  set(moved, null, false);
}

function choose(index, asks = true) {
  if (index < 0) return;
  const moved = facts.policies.map((name) => facts.front[index].weights[name]);
  set(moved, index, asks);
}

function set(moved, index, asks) {
  const total = moved.reduce((sum, share) => sum + share, 0);
  [shares, chosen] = [moved.map((share) => share / total), index];
  shares.forEach((share, place) => {
    const percent = Math.round(100 * share);
    of(`share-${place}`).value = percent;
    of(`share-${place}`).style.setProperty("--share", `${percent}%`);
    of(`share-${place}`).setAttribute("aria-valuetext", `${percent} percent`);
    of(`percent-${place}`).textContent = `${percent} %`;
  });
  if (picture) picture.mark(scoresAt(chosen), chosen);
  describe(chosen);
  if (asks) askSoon();
}

// ---- The front

function makeFront() {
  const { objectives, front } = facts;
  if (front.length < 2 || objectives.length < 2) return;
  of("front").hidden = false;
  picture = new Picture(
    of("picture"),
    front,
    (index) => choose(index),
    (index) => describe(index ?? chosen),
  );
  const axes = objectives.length === 3 ? [0, 1].map((start) => axisChoice(start)) : [];
  const draw = () => {
    const drawn = axes.length ? axes.map((axis) => axis.value) : objectives;
    const shade = axes.length ? objectives.find((name) => !drawn.includes(name)) : null;
    picture.draw(drawn, shade);
    picture.mark(scoresAt(chosen), chosen);
    const dots = objectives.length > 3 ? "Each line" : "Each dot";
    const here = objectives.length > 3 ? "The thick line" : "The ring";
    of("front-note").textContent = [
      `${dots} is a mixture that no other one beats in everything; higher is better.`,
      ...(shade ? [`The fuller a dot, the better it is in ${shade}.`] : []),
      `Click one to try it. ${here} is where the sliders stand; away from measured mixtures it is estimated.`,
    ].join(" ");
  };
  axes.forEach((axis, place) =>
    axis.addEventListener("change", () => {
      const other = axes[1 - place];
      if (other.value === axis.value) other.value = objectives.find((name) => name !== axis.value);
      draw();
    }),
  );
  if (objectives.length > 3) makeLimits();
  draw();
  describe(chosen);
}

function axisChoice(start) {
  const select = element("select", {}, ...facts.objectives.map((name) => element("option", { value: name }, name)));
  select.value = facts.objectives[start];
  of("axes").append(element("label", {}, start ? "up " : "across ", select));
  return select;
}

const limits = {};
const withinLimits = (point) => Object.entries(limits).every(([name, limit]) => point.scores[name] >= limit);

function makeLimits() {
  for (const name of facts.objectives) {
    const scores = facts.front.map((point) => point.scores[name]);
    const [low, high] = [Math.min(...scores), Math.max(...scores)];
    const shown = element("output", {}, "any");
    const slider = element("input", { type: "range", id: `limit-${name}`, min: 0, max: 100, step: 1, value: 0 });
    slider.addEventListener("input", () => {
      limits[name] = slider.value > 0 ? low + (slider.value / 100) * (high - low) - 1e-9 : -Infinity;
      slider.style.setProperty("--share", `${slider.value}%`);
      shown.textContent = slider.value > 0 ? number(limits[name]) : "any";
      picture.restrict(withinLimits);
      say("point", `${facts.front.filter(withinLimits).length} of ${facts.front.length} mixtures are left.`);
    });
    of("limits").append(sliderRow(`${name} not worse than`, shown, slider));
  }
}

function describe(index) {
  if (!picture) return;
  const place = index === null ? "Here, about" : `Mixture ${index + 1}${index === facts.best ? ", the best found" : ""}`;
  say("point", `${place}: ${described(scoresAt(index))}`);
}

// ---- The two answers

function askSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(() => of("prompt").value.trim() && ask(sides.filter((side) => side.followsSliders)), WAIT);
}

async function ask(asked) {
  const prompt = of("prompt").value;
  asked.forEach((side) => side.forgetProblem());
  say("wrong", prompt.trim() ? "" : "Write a message first, or take a test prompt.");
  if (!prompt.trim()) return of("prompt").focus();
  const advice = "Settings: the longest answer is a whole number from 1, the temperature a number from 0 to 2.";
  if (!of("question").checkValidity()) return say("wrong", advice);
  of("stop").disabled = false;
  await Promise.all(asked.map((side) => side.answer(prompt)));
  of("stop").disabled = !sides.some((side) => side.isWriting);
}

async function start() {
  const models = (await fetchJson("v1/models")).data;
  facts = await fetchJson("v1/emorl/run");
  const groups = answerers(models);
  const values = groups.flatMap(([, entries]) => entries.map(([value]) => value));
  const [first, second] = values;
  const aims = new Intl.ListFormat("en-GB").format(facts.policies);
  const steers = first?.startsWith("sliders:") && facts.policies.length > 1;
  const invitation = "Move a slider to say how much each counts, and read how the answer changes.";
  of("explanation").textContent = steers
    ? `Models tuned for ${aims} write each answer here together. ${invitation}`
    : "Write a message and read the answer.";
  of("run").textContent = facts.output;
  document.title = `emorl: ${facts.output}`;
  of("system").placeholder = facts.system_prompt ?? "none";
  of("system-label").hidden = !facts.chat;
  of("tokens").value = facts.generation.max_new_tokens ?? 64;
  of("temperature").value = facts.generation.do_sample ? (facts.generation.temperature ?? 1) : 0;
  of("examples").append(...facts.prompts.map((prompt) => element("option", { value: prompt }, prompt)));
  of("prompt").value = facts.prompts[0] ?? "";
  const beside = values.includes("emorl/base") ? "emorl/base" : second;
  const shown = values.length > 1 ? { A: first, B: beside } : { A: first };
  sides = Object.entries(shown).map(([letter, value]) => new Side(letter, groups, value, { facts, weights, ask }));
  of("steer").hidden = !steers;
  if (steers) {
    makeSliders();
    choose(facts.best, false);
    makeFront();
  }
  of("send").disabled = false;
  of("question").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(sides);
  });
  of("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(sides);
  });
  of("examples").addEventListener("change", () => {
    of("prompt").value = of("examples").value || of("prompt").value;
    if (of("examples").value) ask(sides);
  });
  of("stop").addEventListener("click", () => sides.forEach((side) => side.controller?.abort()));
}

start().catch((problem) => say("notice", problem.message));
