// What is sent and what is made of the answer. Plain values in and out; nothing here touches the page.

/** The texts of a text area, one a line; empty lines are left out. */
function textsOf(lines) {
  return lines.split(/\r?\n/).filter((line) => line.trim() !== "");
}

/** The body of a request. `dimensions` is what was typed; an empty field is not sent, anything else as it is. */
function requestBody({ model, texts, encoding, dimensions }) {
  const body = { model, input: texts.length === 1 ? texts[0] : texts, encoding_format: encoding };
  if (dimensions !== "") body.dimensions = Number(dimensions);
  return body;
}

/** The components of one `embedding`, whichever way it was encoded. */
function components(embedding) {
  if (typeof embedding !== "string") return embedding;
  const bytes = Uint8Array.from(atob(embedding), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
}

/** Cosine similarity, -1 to 1. */
function cosine(a, b) {
  let dot = 0;
  let squareA = 0;
  let squareB = 0;
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    squareA += a[i] * a[i];
    squareB += b[i] * b[i];
  }
  return dot / Math.sqrt(squareA * squareB);
}

/** Every vector with every other. */
function similarities(vectors) {
  return vectors.map((row) => vectors.map((column) => cosine(row, column)));
}

/** Nano-USD as dollars, with as many decimals as there is money: 110 -> "$0.00000011". */
function dollars(nanousd) {
  const digits = String(nanousd).padStart(10, "0");
  const decimals = digits.slice(-9).replace(/0+$/, "").padEnd(2, "0");
  return `$${digits.slice(0, -9)}.${decimals}`;
}

/** Whether a header can carry it; browsers throw on anything else before they send a byte. */
function isSendable(key) {
  return /^[\x20-\x7e]*$/.test(key);
}

/** A reply with vectors, or null if the text is something else (a proxy's own page, say). */
function replyOf(text) {
  try {
    const reply = JSON.parse(text);
    return Array.isArray(reply.data) && reply.data.length > 0 && reply.usage ? reply : null;
  } catch {
    return null;
  }
}

/** The envelope of a refusal, or null as above. */
function envelopeOf(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error.message === "string" ? error : null;
  } catch {
    return null;
  }
}
