// Real requests: the key, the models, embeddings, and what every reply shows. The key lives in its input field only.

const TEXTS_SHOWN_MAX = 50; // rows of the table of vectors; more would only be scrolled past
const COMPONENTS_SHOWN = 6; // enough to see that it is a vector
const SIMILARITIES_MIN = 2; // texts, below which there is nothing to compare
const SIMILARITIES_MAX = 6; // texts, above which the matrix is wider than a phone
const RAW_CHARS_SHOWN_MAX = 4000; // of a raw reply

class UnsendableKey extends Error {}

let served = []; // the models that are served, once a key was given
let apiErrors = []; // the document's error table, to say whether trying again helps

/** Headers that name the caller. Throws what a person can act on where the key cannot even be sent. */
function authorization() {
  const key = byId("key").value.trim();
  if (!isSendable(key)) throw new UnsendableKey();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** List the models that are served now; nothing without a key. */
async function offerModels() {
  const key = byId("key").value.trim();
  if (!key) return;
  const hint = byId("model-hint");
  try {
    const response = await fetch(`${BASE}/v1/models`, { headers: authorization() });
    const text = await response.text();
    if (byId("key").value.trim() !== key) return; // another key was typed meanwhile
    if (!response.ok) {
      const message = envelopeOf(text)?.message ?? `The list of models could not be loaded (${response.status}).`;
      hint.replaceChildren(...prose(message));
      return;
    }
    showModels(JSON.parse(text).data);
  } catch (error) {
    hint.textContent = whyNoAnswer(error);
  }
}

function showModels(models) {
  served = models;
  const names = models.flatMap((model) => [model.id, ...model.aliases]);
  byId("models").replaceChildren(...names.map((name) => el("option", { value: name })));
  if (!models.length) {
    byId("model-hint").textContent = "No node serves a model right now.";
    return;
  }
  if (!byId("model").value) byId("model").value = models[0].id;
  byId("model-hint").textContent = hintOf(chosenModel() ?? models[0]);
}

/** The model whose name or alias stands in the form, as far as it is known. */
function chosenModel() {
  const name = byId("model").value.trim();
  return served.find((model) => model.id === name || model.aliases.includes(name));
}

function hintOf(model) {
  return served.length === 1 ? `${factsOf(model)}.` : `${served.length} models; ${model.id}: ${factsOf(model)}.`;
}

function whyNoAnswer(error) {
  return error instanceof UnsendableKey
    ? "The key has characters that keys never have. Copy it again."
    : "The gateway could not be reached, or the connection broke. Is it running?";
}

/** Ask for the vectors of the texts, and show them. */
async function embed(model) {
  const values = { model, ...formValues() };
  await ask("/v1/embeddings", requestBody(values), (response, raw) => showVectors(response, raw, values.texts));
}

/** Send a request that is answered whole, and show the reply; `draw` is that of `showAnswer`. */
async function ask(path, body, draw) {
  const began = performance.now();
  const response = await fetch(`${BASE}${path}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization() },
    body: JSON.stringify(body),
  });
  const text = await response.text();
  const curl = curlOf(`${BASE}${path}`, body);
  showAnswer(response, text, performance.now() - began, (raw) => draw(response, raw), curl);
}

function formValues() {
  return {
    texts: textsOf(byId("texts").value),
    encoding: byId("encoding").value,
    dimensions: byId("dimensions").value,
  };
}

/** Nothing was sent: the line under the field says why no model is known. */
function showNoModel() {
  const why = byId("key").value.trim() ? byId("model-hint").textContent : "Enter an API key, or the name of a model.";
  showNotSent("No model", why);
  byId(byId("key").value.trim() ? "model" : "key").focus();
}

function showNotSent(title, why) {
  showResult(false, el("p", { class: "status" }, el("strong", {}, title)), el("p", {}, why));
  announce(why);
}

/** Show a reply that is no stream. `draw` makes its parts and words of the body, or null of one that is something else. */
function showAnswer(response, text, tookMs, draw, curl = null) {
  const words = response.statusText || (response.ok ? "OK" : "Refused");
  const status = el(
    "p",
    { class: "status" },
    statusPill(response.status),
    el("strong", {}, words),
    el("span", { class: "muted" }, `after ${tookMs.toFixed(1)} ms`),
  );
  const drawn = response.ok ? draw(text) : null;
  const parts = drawn ? drawn.parts : showRefusal(response, text);
  const raw = text.length > RAW_CHARS_SHOWN_MAX ? `${text.slice(0, RAW_CHARS_SHOWN_MAX)}…` : text;
  const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  const whole = codeBlock(`${headers}\n\n${raw}`, "the raw reply");
  showResult(
    drawn !== null,
    status,
    ...parts,
    curl && el("details", { class: "raw" }, el("summary", {}, "This request with curl"), codeBlock(curl, "the command")),
    el("details", { class: "raw" }, el("summary", {}, "Raw reply"), whole),
  );
  announce(drawn ? drawn.words : `Refused with status ${response.status}`);
}

function showResult(good, heading, ...parts) {
  byId("result").replaceChildren(el("div", { class: good ? "card" : "card refusal" }, heading, ...parts));
  heading.scrollIntoView({ block: "nearest" });
}

function showVectors(response, raw, texts) {
  const reply = replyOf(raw);
  if (!reply) return null;
  const header = (name) => response.headers.get(name);
  const vectors = reply.data.map((item) => components(item.embedding));
  const cost = header("x-embedmesh-cost-nanousd");
  const facts = [
    ["Tokens", reply.usage.total_tokens],
    ["Cost", cost === null ? null : dollars(cost)],
    ["In the gateway", header("openai-processing-ms") && `${header("openai-processing-ms")} ms`],
    ["Width", vectors[0].length],
    ["Texts cut", header("x-embedmesh-truncated")],
    ["Node", header("x-embedmesh-node")],
    ["Request id", header("x-request-id")],
  ];
  const shown = vectors
    .slice(0, TEXTS_SHOWN_MAX)
    .map((vector, index) => [
      String(index + 1),
      el("span", { class: "text" }, texts[index] ?? ""),
      el("code", { class: "numbers" }, firstNumbers(vector)),
    ]);
  const left = vectors.length - shown.length;
  const parts = [
    factList(facts),
    table("Vectors", ["#", "Text", "Vector"], shown),
    left > 0 ? el("p", { class: "muted" }, `and ${left} more`) : null,
    ...showSimilarities(vectors, texts),
  ];
  return { parts, words: `${vectors.length} vectors received` };
}

function firstNumbers(vector) {
  const numbers = vector.slice(0, COMPONENTS_SHOWN).map((value) => value.toFixed(4).replace("-", "−").padStart(7));
  return vector.length > COMPONENTS_SHOWN ? `${numbers.join("  ")}  …` : numbers.join("  ");
}

/** The similarities of all pairs of texts; nothing if the table would be unreadable. */
function showSimilarities(vectors, texts) {
  if (vectors.length < SIMILARITIES_MIN || vectors.length > SIMILARITIES_MAX) return [];
  const rows = similarities(vectors).map((row, index) =>
    el("tr", {}, el("th", { scope: "row", title: texts[index] }, String(index + 1)), row.map(heatCell)),
  );
  const numbers = texts.map((text, index) => el("th", { scope: "col", title: text }, String(index + 1)));
  const head = el("thead", {}, el("tr", {}, el("td"), numbers));
  return [
    el("h3", {}, "Cosine similarity"),
    el(
      "table",
      { class: "heat", "aria-label": "Cosine similarity of each text with each" },
      head,
      el("tbody", {}, rows),
    ),
  ];
}

function heatCell(value) {
  const cell = el("td", {}, value.toFixed(2).replace("-", "−"));
  cell.style.setProperty("--heat", `${Math.round(60 * Math.max(0, value))}%`);
  return cell;
}

function showRefusal(response, text) {
  const error = envelopeOf(text);
  if (!error) return [el("p", {}, "The reply is not from this gateway. Is there a proxy in between?")];
  const known = apiErrors.find((row) => row.status === response.status && row.code === error.code);
  const wait = response.headers.get("Retry-After");
  const facts = [
    ["Code", error.code],
    ["Type", error.type],
    ["Field", error.param],
    ["Trying again", known && RETRY_IN_WORDS[known.retry] + (wait ? `, ${wait} s` : "")],
    ["Request id", response.headers.get("x-request-id")],
  ];
  return [el("p", { class: "message" }, prose(error.message)), factList(facts)];
}

function factList(facts) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined);
  const entries = known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))));
  return el("dl", { class: "facts" }, entries);
}
