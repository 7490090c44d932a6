// What the page asks of the server, and how the same is asked by a shell and by Python. No text becomes markup here.

const KEY = "emorl-key";
let asked = null; // the promise of a key, while the user is asked for it

/** A server's answer; asks for the key where it wants one. Throws an Error with one sentence. */
export async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server cannot be reached; is it still running?");
    });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await sentenceOf(response));
    if (sessionStorage.getItem(KEY) === key) await askForKey();
  }
}

export const fetchJson = async (path, body) =>
  (await request(path, body && { method: "POST", body: JSON.stringify(body) })).json();

/** Calls `tell` with each piece of the streamed answer: (text, what is said of who answers). */
export async function stream(path, body, signal, tell) {
  const response = await request(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server broke off before the answer was whole.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      tell(chunk.choices[0]?.delta.content ?? "", chunk.emorl);
    }
  }
}

async function sentenceOf(response) {
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message;
  return typeof message === "string" ? message : `The server answered ${response.status} ${response.statusText}.`;
}

function askForKey() {
  asked ??= new Promise((resolve) => {
    const [dialog, form, field] = ["key-dialog", "key-form", "key"].map((id) => document.getElementById(id));
    document.getElementById("key-problem").hidden = !sessionStorage.getItem(KEY);
    dialog.oncancel = (event) => event.preventDefault();
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value);
      field.value = "";
      dialog.close();
      asked = null;
      resolve();
    };
    dialog.showModal();
  });
  return asked;
}

const shell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const environment = "EMORL_API_KEY";

/** Ways to get an answer again, as [title, code]; `point` is what the server said of who answered. */
export function reproductions(facts, path, body, point) {
  const command = commandLine(facts, body, point);
  const key = sessionStorage.getItem(KEY) ? ` -H "Authorization: Bearer $${environment}"` : "";
  const url = shell(new URL(path, location.href).href);
  const curl = `curl ${url} -H 'Content-Type: application/json'${key} -d ${shell(JSON.stringify(body))}`;
  return [...(command ? [["emorl, without the server", command]] : []), ["curl", curl], ["Python (openai)", python(body)]];
}

/** The command that writes the same text; null where none does: another system line, or words drawn at random. */
function commandLine(facts, body, point) {
  const known = facts.commands[point?.kind];
  if (!known || body.messages.length > 1 || body.temperature > 0) return null;
  const [beginning, end] = known;
  const weights = Object.entries(point.weights ?? {})
    .map(([name, weight]) => `${name}=${weight}`)
    .join(",");
  const greedy = facts.generation.do_sample ? " generation.do_sample=false" : "";
  const options = [end + (end.endsWith("--weights") ? ` ${weights}` : ""), `--prompt=${shell(body.messages[0].content)}`];
  return [`${beginning} generation.max_new_tokens=${body.max_tokens}${greedy}`, ...options.filter(Boolean)].join(" ");
}

function python(body) {
  const { weights, ...known } = body;
  const call = Object.entries(known).map(([name, value]) => `${name}=${literal(value)}`);
  if (weights) call.push(`extra_body=${literal({ weights })}`);
  const key = sessionStorage.getItem(KEY) ? `os.environ["${environment}"]` : '"none"';
  const url = literal(new URL("v1", location.href).href);
  return (
    `${key[0] === "o" ? "import os\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url=${url}, api_key=${key})\n` +
    `print(client.chat.completions.create(${call.join(", ")}).choices[0].message.content)`
  );
}

/** A JSON value as Python writes it: their texts and numbers are the same. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object")
    return `{${Object.entries(value)
      .map(([name, inner]) => `${literal(name)}: ${literal(inner)}`)
      .join(", ")}}`;
  return typeof value === "boolean" ? (value ? "True" : "False") : (JSON.stringify(value) ?? "None");
}
