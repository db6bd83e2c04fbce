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
  const shown = showWaiting(kind === "chat" ? turns : [], text);
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
    const answer = await showStream(response, shown, began);
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

function startAnew() {
  underWay?.abort();
  turns = [];
  byId("result").replaceChildren();
  byId("message").focus();
  announce("The conversation starts anew");
}

/** Show what is asked, room for the answer, and what stops it. The parts that change. */
function showWaiting(earlier, text) {
  const stop = el("button", { type: "button", class: "quiet stop" }, "Stop");
  stop.addEventListener("click", () => underWay?.abort());
  const shown = {
    state: el("strong", {}, "Waiting for the first word…"),
    stop,
    thoughts: el("p", { class: "said muted" }),
    place: el("p", { class: "said" }),
    facts: el("div"),
  };
  shown.status = el("p", { class: "status" }, shown.state, stop);
  shown.turn = el("div", { class: "turn" }, el("h3", {}, "Answer"), shown.thoughts, shown.place);
  const asked = [...earlier, { role: "user", content: text }].map(drawTurn);
  shown.turns = el("div", { class: "turns", "aria-busy": "true" }, asked, shown.turn);
  showResult(true, shown.status, shown.turns, shown.facts);
  return shown;
}

/** Show the events of a stream as they come. What was said, and what broke it off, if anything did. */
async function showStream(response, shown, began) {
  shown.status.prepend(statusPill(response.status));
  const answer = { said: "", usage: null, broken: null, stopped: false, done: false, firstMs: null, tookMs: 0 };
  try {
    await readStream(response.body, answer, (added) => {
      if (answer.firstMs === null) {
        answer.firstMs = performance.now() - began;
        shown.state.textContent = "Answering…";
      }
      shown.thoughts.append(added.reasoning);
      shown.place.append(added.answer);
      answer.said += added.answer;
    });
    if (!answer.done) answer.broken ??= { message: "The connection broke before the answer's end." };
  } catch (error) {
    if (error.name === "AbortError") answer.stopped = true;
    else answer.broken ??= { message: whyNoAnswer(error) };
  }
  answer.tookMs = performance.now() - began;
  showEnd(answer, shown);
  await showCharge(response.headers.get("x-embedmesh-request"), answer, shown.facts);
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

function showEnd(answer, shown) {
  const words = answer.broken ? "Broken off" : answer.stopped ? "Stopped" : "Answered";
  const why = answer.broken?.message ?? (answer.stopped ? "You pay the input, and what you have received." : null);
  shown.state.textContent = words;
  shown.turns.setAttribute("aria-busy", "false");
  shown.stop.remove();
  if (answer.broken) shown.status.parentNode.classList.add("refusal");
  if (why) shown.turn.append(el("p", { class: "message" }, prose(why)));
  showFacts(shown.facts, answer);
  announce(answer.broken ? `Broken off: ${why}` : `${words}. ${answer.said}`);
}

function showFacts(facts, answer, { tokens = null, cost = null, requestId = null } = {}) {
  const { usage } = answer;
  const rows = [
    ["Tokens", usage ? `${usage.prompt_tokens} in, ${usage.completion_tokens} out` : tokens],
    ["Cost", cost],
    ["First word after", answer.firstMs === null ? null : `${answer.firstMs.toFixed(0)} ms`],
    ["All after", `${(answer.tookMs / 1000).toFixed(2)} s`],
    ["Code", answer.broken?.code],
    ["Request id", requestId],
  ];
  facts.replaceChildren(factList(rows));
}

/** What the ledger says of it. An answer that broke off is not charged, unless the operator has said so. */
async function showCharge(requestId, answer, facts) {
  for (let tries = 0; tries < CHARGE_TRIES; tries++) {
    const charge = await chargeOf(requestId);
    if (charge) {
      const { tokens, cost_nanousd: cost } = charge;
      return showFacts(facts, answer, { tokens, cost: dollars(cost), requestId });
    }
    await new Promise((resolve) => setTimeout(resolve, answer.broken ? CHARGE_WAIT_MS / 2 : CHARGE_WAIT_MS));
    if (answer.broken && tries) break;
  }
  showFacts(facts, answer, { cost: answer.broken ? "nothing" : null, requestId });
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
  await ask("/v1/images/generations", body, (response, raw) => showImages(response, raw, text));
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
