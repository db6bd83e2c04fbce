// Chat, completions and images: what is asked and what comes back. Plain values in and out; nothing here touches the page.

/** What the form does with a model: the first of these that the model can do. A model that is not known embeds. */
const KINDS = ["chat", "images", "completions", "rerank", "embeddings"];

function kindOf(model) {
  return KINDS.find((kind) => model?.modalities.includes(kind)) ?? "embeddings";
}

const grouped = (number) => number.toLocaleString("en-US");

/** A model in a line: what it does, how long, at what price. */
function factsOf(model) {
  const input = dollars(model.price_nanousd_per_million_tokens);
  if (model.modalities.includes("embeddings"))
    return `${model.width} components, up to ${grouped(model.max_tokens)} tokens a text, ${input} a million tokens`;
  if (model.modalities.includes("rerank")) {
    const search = model.search_price_nanousd;
    const price = typeof search === "number" ? `${dollars(search)} a search` : `${input} a million tokens`;
    return `ranks documents, up to ${grouped(model.max_tokens)} tokens with the query, ${price}`;
  }
  const prices = Object.entries(model.image_prices_nanousd).map(([size, price]) => `${size} at ${dollars(price)}`);
  if (prices.length) return `images of ${prices.join(", ")}`;
  const output = dollars(model.output_price_nanousd_per_million_tokens);
  const what = model.modalities.join(" and ");
  return `${what}, up to ${grouped(model.max_tokens)} tokens with the answer, ${input} a million tokens in, ${output} out`;
}

/** The body of a stream: of a chat, whose last message is `text`, or of how `text` goes on. */
function talkBody({ kind, model, turns, text, limit }) {
  const asked = kind === "chat" ? { messages: [...turns, { role: "user", content: text }] } : { prompt: text };
  const body = { model, ...asked, stream: true, stream_options: { include_usage: true } };
  if (limit !== "") body.max_tokens = Number(limit);
  return body;
}

function imageBody({ model, text, size, number }) {
  const body = { model, prompt: text, response_format: "b64_json" };
  if (size) body.size = size;
  if (number !== "") body.n = Number(number);
  return body;
}

/** The same request by curl, for a shell. The key comes from the environment. */
function curlOf(url, body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const headers = ['"Authorization: Bearer $EMBEDMESH_API_KEY"', '"Content-Type: application/json"'];
  return [`curl ${url}`, ...headers.map((header) => `  -H ${header}`), `  -d '${json}'`].join(" \\\n");
}

/** The data of the whole events in a text, and what is left of it: the beginning of the next. */
function takeEvents(text) {
  const frames = text.split("\n\n");
  const rest = frames.pop();
  const data = frames.filter((frame) => frame.startsWith("data: ")).map((frame) => frame.slice("data: ".length));
  return [data, rest];
}

/** What an event adds to the answer, or to the reasoning before it. */
function addedBy(event) {
  const { delta, text } = event.choices?.[0] ?? {};
  return { answer: delta?.content ?? text ?? "", reasoning: delta?.reasoning_content ?? "" };
}

/** The address of an image in base64, which says by its first bytes what it is. */
function imageAddress(encoded) {
  const kinds = { iVBOR: "png", "/9j/": "jpeg", UklGR: "webp" };
  const begins = Object.keys(kinds).find((first) => encoded.startsWith(first));
  return begins ? `data:image/${kinds[begins]};base64,${encoded}` : null;
}

/** Images of a reply, or null if it is something else. */
function imagesOf(text) {
  try {
    const images = JSON.parse(text).data.map((image) => imageAddress(image.b64_json));
    return images.length && images.every(Boolean) ? images : null;
  } catch {
    return null;
  }
}
