// Chats and completions, which are streamed, and images. What is stopped is charged as far as it has come.

const CHARGE_TRIES = 10; // a charge is in the books some milliseconds after the last event
const CHARGE_WAIT_MS = 200;

let turns = []; // the chat until now, as messages
let underWay = null; // what stops the stream that is under way

/** Stream an answer into the page. */
async function talk(kind, model) {
  const field = kind === "chat" ? "message" : "beginning";
  const text = byId(field).value;
  if (!text.trim()) return showNotSent("Nothing to send", "Write something first.");
  const body = talkBody({ kind, model, turns, text, limit: byId(`${field}-limit`).value });
  const began = performance.now();
  underWay = new AbortController();
  try {
    const response = await fetch(`${BASE}/v1/${kind === "chat" ? "chat/completions" : "completions"}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization() },
      body: JSON.stringify(body),
      signal: underWay.signal,
    });
    if (!response.ok) return showAnswer(response, await response.text(), performance.now() - began, () => null);
    const answer = await showStream(response, kind, text, began);
    if (kind === "chat" && !answer.broken && answer.said) {
      turns.push({ role: "user", content: text }, { role: "assistant", content: answer.said });
      byId(field).value = "";
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    showNotSent("Stopped", "You stopped before the first word, so nothing is charged.");
  } finally {
    underWay = null;
  }
}

function stop() {
  underWay?.abort();
}

function startAnew() {
  turns = [];
  byId("result").replaceChildren();
  byId("message").focus();
  announce("The conversation starts anew");
}

/** Show the events of a stream as they come. What was said, and what broke it off, if anything did. */
async function showStream(response, kind, text, began) {
  const place = el("p", { class: "said" });
  const thoughts = el("p", { class: "said muted" });
  const state = el("strong", {}, "Answering…");
  const facts = el("div");
  const earlier = kind === "chat" ? turns.map(drawTurn) : [];
  const said = el("div", { class: "turn" }, el("h3", {}, "Answer"), thoughts, place);
  const asked = drawTurn({ role: "user", content: text });
  const status = el("p", { class: "status" }, statusPill(response.status), state);
  showResult(true, status, el("div", { class: "turns", "aria-busy": "true" }, ...earlier, asked, said), facts);
  const answer = { said: "", usage: null, broken: null, done: false, firstMs: null };
  try {
    await readStream(response.body, answer, (added) => {
      answer.firstMs ??= performance.now() - began;
      if (added.reasoning) thoughts.append(added.reasoning);
      place.append(added.answer);
      answer.said += added.answer;
    });
    if (!answer.done) answer.broken ??= { message: "The connection broke before the answer's end." };
  } catch (error) {
    if (error.name !== "AbortError") answer.broken ??= { message: whyNoAnswer(error) };
    else answer.stopped = true;
  }
  said.parentNode.setAttribute("aria-busy", "false");
  endOfStream(answer, state, facts, said, performance.now() - began);
  await showCharge(response.headers.get("x-embedmesh-request"), answer, facts);
  return answer;
}

/** Read events until the last; `add` gets what each adds. */
async function readStream(body, answer, add) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const [events, left] = takeEvents(rest + value);
    rest = left;
    for (const data of events) {
      if (data === "[DONE]") {
        answer.done = true;
        continue;
      }
      const event = JSON.parse(data);
      if (event.error) answer.broken = event.error;
      answer.usage = event.usage ?? answer.usage;
      const added = addedBy(event);
      if (added.answer || added.reasoning) add(added);
    }
  }
}

function endOfStream(answer, state, facts, said, tookMs) {
  const [words, why] = answer.broken
    ? ["Broken off", prose(answer.broken.message)]
    : answer.stopped
      ? ["Stopped", "You pay the input, and what you have received."]
      : ["Answered", null];
  state.textContent = words;
  if (answer.broken) state.closest(".card").classList.add("refusal");
  if (why) said.append(el("p", { class: "message" }, why));
  showFacts(facts, answer, tookMs);
  answer.tookMs = tookMs;
  announce(answer.broken ? `Broken off: ${answer.broken.message}` : `${words}. ${answer.said}`);
}

function showFacts(facts, answer, tookMs, cost = null, tokens = null, requestId = null) {
  const { usage } = answer;
  const counted = usage ? `${usage.prompt_tokens} in, ${usage.completion_tokens} out` : tokens;
  const rows = [
    ["Tokens", counted],
    ["Cost", cost],
    ["First word after", answer.firstMs === null ? null : `${answer.firstMs.toFixed(0)} ms`],
    ["All after", `${(tookMs / 1000).toFixed(2)} s`],
    ["Code", answer.broken?.code],
    ["Request id", requestId],
  ];
  facts.replaceChildren(factList(rows));
}

/** What the ledger says of it. An answer that broke off is not charged, unless the operator has said so. */
async function showCharge(requestId, answer, facts) {
  for (let tries = 0; tries < CHARGE_TRIES; tries++) {
    const charge = await chargeOf(requestId);
    if (charge) return showFacts(facts, answer, answer.tookMs, dollars(charge.cost), charge.tokens, requestId);
    if (answer.broken) break;
    await new Promise((resolve) => setTimeout(resolve, CHARGE_WAIT_MS));
  }
  showFacts(facts, answer, answer.tookMs, answer.broken ? "nothing" : null, null, requestId);
}

/** Tokens and nano-USD of a request, or null as long as its charge is not in the books. */
async function chargeOf(requestId) {
  const get = async (path) => {
    const response = await fetch(`${BASE}/v1/account/${path}`, { headers: authorization() });
    return response.ok ? (await response.json()).data : [];
  };
  try {
    const entry = (await get("entries?limit=20")).find((each) => each.request_id === requestId);
    return entry ? ((await get(`entries/${entry.entry_id}/requests`))[0] ?? null) : null;
  } catch {
    return null;
  }
}

function drawTurn({ role, content }) {
  const who = role === "user" ? "You" : "Answer";
  return el("div", { class: `turn ${role}` }, el("h3", {}, who), el("p", { class: "said" }, content));
}

/** Have images made, and show them. */
async function paint(model) {
  const text = byId("picture").value;
  if (!text.trim()) return showNotSent("Nothing to send", "Describe the image first.");
  const body = imageBody({ model, text, size: byId("size").value, number: byId("number").value });
  const began = performance.now();
  const response = await fetch(`${BASE}/v1/images/generations`, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization() },
    body: JSON.stringify(body),
  });
  showAnswer(response, await response.text(), performance.now() - began, (raw) => showImages(response, raw, text));
}

function showImages(response, raw, text) {
  const images = imagesOf(raw);
  if (!images) return null;
  const cost = response.headers.get("x-embedmesh-cost-nanousd");
  const facts = [
    ["Images", images.length],
    ["Cost", cost === null ? null : dollars(cost)],
    ["Node", response.headers.get("x-embedmesh-node")],
    ["Request id", response.headers.get("x-request-id")],
  ];
  const shown = images.map((src, index) => el("img", { src, alt: `Image ${index + 1} of: ${text}` }));
  return { parts: [factList(facts), el("div", { class: "pictures" }, shown)], words: `${images.length} images received` };
}
