// Rerank: documents in the order in which they answer a query, with a bar for each score.

/** The body of a request. What was left empty is not sent; `scores` is "raw" or "sigmoid". */
function rerankBody({ model, query, documents, topN, scores }) {
  const body = { model, query, documents };
  if (topN !== "") body.top_n = Number(topN);
  if (scores !== "") body.raw_scores = scores === "raw";
  return body;
}

/** What a reply says, best first, or null if it is something else. */
function ranksOf(text) {
  try {
    const { results, usage, meta } = JSON.parse(text);
    const good = results.every((each) => Number.isInteger(each.index) && Number.isFinite(each.relevance_score));
    return good && results.length ? { results, tokens: usage.total_tokens, billed: meta?.billed_units } : null;
  } catch {
    return null;
  }
}

/** How long the bars are, 0 to 1: as the scores or, where they are logits, as the logistic function of them. */
function barLengths(scores) {
  const areLogits = scores.some((score) => score < 0 || score > 1);
  return scores.map((score) => (areLogits ? 1 / (1 + Math.exp(-score)) : score));
}

/** Have the documents ranked, and show them in their order. */
async function rank(model) {
  const values = {
    model,
    query: byId("query").value,
    documents: textsOf(byId("documents").value),
    topN: byId("top-n").value,
    scores: byId("scores").value,
  };
  if (!values.query.trim() || !values.documents.length)
    return showNotSent("Nothing to send", "Write a query, and at least one document.");
  await ask("/v1/rerank", rerankBody(values), (response, raw) => showRanks(response, raw, values.documents));
}

function showRanks(response, raw, documents) {
  const reply = ranksOf(raw);
  if (!reply) return null;
  const header = (name) => response.headers.get(name);
  const [cost, cut] = [header("x-embedmesh-cost-nanousd"), header("x-embedmesh-truncated")];
  const facts = [
    ["Tokens", reply.tokens],
    ["Searches", reply.billed?.search_units],
    ["Cost", cost === null ? null : dollars(cost)],
    ["In the gateway", header("openai-processing-ms") && `${header("openai-processing-ms")} ms`],
    ["Documents cut", cut === "0" ? null : cut],
    ["Node", header("x-embedmesh-node")],
    ["Request id", header("x-request-id")],
  ];
  const lengths = barLengths(reply.results.map((each) => each.relevance_score));
  const ranked = reply.results.map((each, at) => drawRank(each, lengths[at], documents[each.index] ?? ""));
  const best = documents[reply.results[0].index] ?? "";
  return {
    parts: [factList(facts), el("ol", { class: "ranks", "aria-label": "Documents, best first" }, ranked)],
    words: `${ranked.length} documents ranked. The best: ${best}`,
  };
}

function drawRank({ index, relevance_score: score }, length, text) {
  const bar = el("span", { class: "rank-bar", "aria-hidden": "true" });
  bar.style.setProperty("--part", `${(100 * length).toFixed(2)}%`);
  return el(
    "li",
    {},
    el("span", { class: "rank-score" }, score.toFixed(4).replace("-", "−")),
    bar,
    el("span", { class: "rank-text" }, text),
    el("small", { class: "rank-place" }, `document ${index + 1}`),
  );
}
