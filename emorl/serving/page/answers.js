// Two answers side by side: who writes each, its text as it comes, its scores, and how to get it again.

import { colour, number, percents, spread } from "./picture.js";
import { fetchJson, reproductions, stream } from "./requests.js";

const PATH = "v1/chat/completions";
const PARTS = ["who", "mixture", "text", "error", "state", "scores", "reproduce"]; // classes in the template

export const of = (id) => document.getElementById(id);

/** A new element; children that are texts stay texts. */
export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export class Side {
  constructor(letter, options, start, { facts, weights, ask }) {
    Object.assign(this, { facts, weights, controller: null, isWriting: false });
    this.root = of("answer").content.cloneNode(true).firstElementChild;
    this.parts = Object.fromEntries(PARTS.map((name) => [name, this.root.querySelector(`.${name}`)]));
    this.root.setAttribute("aria-label", `Answer ${letter}`);
    this.root.dataset.side = letter;
    this.parts.who.append(
      ...options.map(([group, entries]) =>
        element("optgroup", { label: group }, ...entries.map(([value, label]) => element("option", { value }, label))),
      ),
    );
    this.parts.who.value = start;
    this.parts.who.addEventListener("change", () => ask([this]));
    of("answers").append(this.root);
  }

  /** Model and weights that a request names. */
  get model() {
    const [, follows, model] = this.parts.who.value.match(/^(sliders:)?(.*)$/);
    return { model, ...(follows ? { weights: this.weights() } : {}) };
  }

  get followsSliders() {
    return this.parts.who.value.startsWith("sliders:");
  }

  forgetProblem() {
    if (!this.parts.error.hidden) [this.parts.error.hidden, this.parts.reproduce.hidden] = [true, true];
  }

  async answer(prompt) {
    this.controller?.abort();
    const controller = (this.controller = new AbortController());
    this.isWriting = true;
    const { text, error, state, scores, reproduce, mixture } = this.parts;
    const body = { ...this.model, ...question(prompt) };
    const started = performance.now();
    let [written, point] = ["", null];
    text.className = "text";
    for (const part of [text, mixture, error, scores.lastElementChild]) part.replaceChildren();
    [error, reproduce, scores].forEach((part) => (part.hidden = true));
    [state.textContent, text.ariaBusy] = ["Writing …", "true"];
    try {
      await stream(PATH, body, controller.signal, (piece, model) => {
        written += piece;
        text.textContent = written;
        point ??= model;
      });
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      state.textContent = `Done after ${seconds} s.${written ? "" : " The answer is empty."}`;
    } catch (problem) {
      if (this.controller !== controller) return; // another request has taken over
      state.textContent = problem.name === "AbortError" ? "Stopped." : "";
      if (problem.name !== "AbortError") Object.assign(error, { textContent: problem.message, hidden: false });
    }
    if (this.controller !== controller) return;
    [this.isWriting, text.ariaBusy] = [false, "false"];
    mixture.textContent = point?.weights && !["base", "policy"].includes(point.kind) ? percents(point.weights) : "";
    this.reproduce(body, point);
    if (written && this.facts.objectives.length) this.score(body, written, controller);
  }

  async score(body, written, controller) {
    const asked = { prompt: body.messages, completions: [written] };
    const failed = (problem) => ({ scores: [{}], problems: { "": problem.message } });
    const { scores, problems } = await fetchJson("v1/emorl/scores", asked).catch(failed);
    if (this.controller !== controller) return; // of an answer that is no longer there
    const rows = Object.entries(scores[0]).map(([name, score]) => {
      const known = this.facts.scores[name];
      const [drawn, lower] =
        known && score !== null ? spread(known, score, colour(this.facts.objectives.indexOf(name))) : ["", null];
      const place = lower === null ? "" : `, above ${Math.round(100 * lower)} % of them`;
      const value = element("span", {}, element("b", {}, number(score)), place);
      return element("div", { className: "score" }, element("span", {}, name), value, drawn);
    });
    const left = Object.entries(this.facts.not_scored).map(([name, reason]) => `${name} is not scored here: ${reason}.`);
    const sentences = [...left, ...Object.values(problems)].map((sentence) => element("p", { className: "soft" }, sentence));
    this.parts.scores.lastElementChild.replaceChildren(...rows, ...sentences);
    this.parts.scores.firstElementChild.hidden = !rows.length;
    this.parts.scores.hidden = false;
  }

  reproduce(body, point) {
    const ways = reproductions(this.facts, PATH, body, point).map(([title, code]) => {
      const copy = element("button", { type: "button", ariaLabel: `Copy ${title}` }, "Copy");
      const told = (message) => () => (copy.textContent = message);
      copy.addEventListener("click", () => navigator.clipboard.writeText(code).then(told("Copied"), told("Select it by hand")));
      return element("div", { className: "way" }, element("h3", {}, title), copy, element("pre", { tabIndex: 0 }, code));
    });
    this.parts.reproduce.lastElementChild.replaceChildren(...ways);
    this.parts.reproduce.hidden = false;
  }
}

/** What a request says beside who answers. */
function question(prompt) {
  const temperature = Number(of("temperature").value);
  const system = of("system").value.trim();
  const turns = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  const seed = temperature > 0 ? { seed: Math.floor(Math.random() * 2 ** 31) } : {};
  return { messages: turns, max_tokens: Number(of("tokens").value), temperature, ...seed };
}

/** Group -> [value, label] of everything that can answer; `sliders:` begins what is sent the sliders' weights. */
export function answerers(models) {
  const rest = (model) => model.id.split("/").slice(2).join("/");
  const listed = (kind, label) => models.filter((model) => model.emorl.kind === kind).map((model) => [model.id, label(model)]);
  const steered = (prefix, label) =>
    models.some((model) => model.id === `${prefix}/best`) ? [[`sliders:${prefix}`, label]] : [];
  const told = steered("emorl/distilled", "the distilled adapter, told what the sliders say");
  const groups = [
    ["Trade-offs", [...steered("emorl", "what the sliders say"), ...listed("best", () => "the best found")]],
    ["Alone", [...listed("base", () => "the untrained base"), ...listed("policy", (model) => `the policy ${rest(model)}`)]],
    [
      "As one model",
      [
        ...steered("emorl/soup", "a soup: parameters mixed as the sliders say"),
        ...(told.length ? told : listed("distilled", () => "the distilled adapter")),
        ...listed("fused", () => "the fused policy"),
        ...listed("dynamic", () => "the dynamic ensemble"),
      ],
    ],
    ["Mixtures of the picture", listed("front", (model) => `mixture ${rest(model)}: ${percents(model.emorl.weights)}`)],
  ];
  return groups.filter(([, entries]) => entries.length);
}
