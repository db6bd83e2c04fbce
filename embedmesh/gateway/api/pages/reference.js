// The reference, drawn from the OpenAPI document.

const SAMPLE_ORIGIN = "http://127.0.0.1:8080"; // of the document's samples; the page replaces it by this gateway's

/** What a `$ref` stands for. */
function resolve(api, node) {
  if (!node.$ref) return node;
  return node.$ref
    .split("/")
    .slice(1)
    .reduce((at, name) => at[name], api);
}

/** A schema's type and bounds in words. */
function typeInWords(schema) {
  if (schema.enum)
    return schema.enum
      .filter((value) => value !== null)
      .map((value) => JSON.stringify(value))
      .join(" | ");
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const several = schema.oneOf ?? schema.anyOf;
  if (several)
    return [...new Set(several.map(typeInWords))].filter((words) => words).join(" | ");
  const types = [schema.type].flat().filter((type) => type !== "null");
  if (types[0] === "array")
    return `array of ${typeInWords(schema.items).replace(/^(array|object|string|integer|number)\b/, "$1s")}`;
  const bounds = [
    schema.minimum !== undefined && schema.minimum > 0 ? `≥ ${schema.minimum}` : null,
    schema.maxLength ? `at most ${schema.maxLength} characters` : null,
  ];
  return [types.join(" | "), ...bounds.filter(Boolean)].join(", ");
}

function drawSamples(api) {
  const paths = ["/v1/embeddings", "/v1/rerank", "/v1/chat/completions"];
  const sampled = paths.map((path) => api.paths[path].post["x-codeSamples"]);
  const entries = sampled.flat().map(({ label, source }) => [
    label,
    codeBlock(source.trimEnd().replaceAll(SAMPLE_ORIGIN, BASE), `the ${label} example`),
  ]);
  byId("samples").replaceChildren(tabs("sample", "Client", entries));
}

function drawRoutes(api) {
  const routes = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [path, method, operation]),
  );
  const groups = api.tags.map((tag) => {
    const members = routes.filter(([, , operation]) => operation.tags.includes(tag.name));
    const drawn = members.map((route) => drawRoute(api, ...route));
    const heading = el("h3", {}, tag.name, el("small", {}, prose(tag.description)));
    if (!tag["x-embedmesh-aside"]) return [heading, ...drawn];
    // Folded: applications do not need the routes of nodes and operators.
    return [el("details", { class: "aside" }, el("summary", {}, heading), drawn)];
  });
  byId("route-list").replaceChildren(...groups.flat());
}

function drawRoute(api, path, method, operation) {
  const summary = el(
    "summary",
    {},
    el("span", { class: `method ${method}` }, method.toUpperCase()),
    el("code", { class: "path" }, path),
    el("span", { class: "what" }, prose(operation.summary)),
    el("span", { class: "who" }, whoMay(api, operation)),
  );
  const parameters = (operation.parameters ?? []).map((parameter) => [
    el("code", {}, parameter.name),
    `in the ${parameter.in}`,
    prose(parameter.description),
  ]);
  const answers = Object.entries(operation.responses).map(([status, response]) => [
    statusPill(Number(status)),
    answerInWords(api, response),
    codeList(Object.keys(response.headers ?? {}).filter((name) => name !== "x-request-id")),
  ]);
  return el(
    "details",
    { class: "route" },
    summary,
    el("p", {}, prose(operation.description)),
    ...drawBody(api, path, operation),
    parameters.length
      ? table(`Parameters of ${path}`, ["Parameter", "Where", "Meaning"], parameters, { stacks: true })
      : null,
    table(`Answers of ${method} ${path}`, ["Status", "Meaning", "Headers"], answers, { stacks: true }),
  );
}

/** The body of a request. The one for embeddings has a section of its own on this page. */
function drawBody(api, path, operation) {
  if (!operation.requestBody) return [];
  const [{ schema }] = Object.values(operation.requestBody.content);
  if (schema.$ref?.endsWith("/EmbeddingRequest"))
    return [el("p", {}, "Body: see ", el("a", { href: "#members" }, "Request"), ".")];
  return (schema.anyOf ?? [schema]).flatMap((form) => drawForm(api, path, form));
}

function drawForm(api, path, form) {
  const { description, properties, required } = resolve(api, form);
  if (!properties) return [el("p", {}, "Body: an empty object.")];
  const rows = Object.entries(properties).map(([name, member]) => [
    el("code", {}, name),
    typeInWords(member),
    [required.includes(name) ? "Required. " : null, ...prose(member.description ?? "")],
  ]);
  return [
    el("p", {}, ...(description ? ["Body: ", ...prose(description)] : ["Body:"])),
    table(`Body of ${path}`, ["Field", "Type", "Meaning"], rows, { stacks: true }),
  ];
}

function whoMay(api, operation) {
  const needs = operation.security ?? api.security;
  if (!needs.length) return "open to all";
  if (needs.some((need) => need.nodeSignature)) return "signed by the node";
  const scopes = needs.flatMap((need) => need.bearerAuth);
  return scopes.length ? `key with scope ${scopes.join(" or ")}` : "any key";
}

/** A response's description, and the codes that its envelope may carry. */
function answerInWords(api, response) {
  const schema = Object.values(response.content ?? {})[0]?.schema;
  const narrowed = schema?.allOf?.[1].properties.error.properties.code.enum;
  return [prose(response.description), narrowed ? el("div", {}, codeList(narrowed)) : null];
}

function codeList(names) {
  return names.flatMap((name) => [el("code", {}, name), " "]);
}

function statusPill(status) {
  const mood = status < 300 ? "good" : status < 500 ? "warn" : "bad";
  return el("span", { class: `pill ${mood}` }, String(status));
}

function drawMembers(api) {
  const schema = api.components.schemas.EmbeddingRequest;
  const members = Object.entries(schema.properties).map(([name, member]) =>
    drawMember(name, member, schema.required.includes(name)),
  );
  byId("member-list").replaceChildren(...members);
}

/** A field in one line, which opens; required fields are open. */
function drawMember(name, member, required) {
  const summary = el(
    "summary",
    {},
    el("code", { class: "path" }, name),
    required ? el("span", { class: "pill warn" }, "required") : null,
    member.default !== undefined ? el("span", { class: "pill" }, `default ${JSON.stringify(member.default)}`) : null,
  );
  const attributes = { class: "route small-route", open: required ? "" : null };
  return el(
    "details",
    attributes,
    summary,
    el("p", {}, prose(member.description)),
    el("p", { class: "type" }, memberType(name, member)),
  );
}

/** A pattern says nothing to people: `truncate` takes its three words in any case. */
function memberType(name, member) {
  return member.pattern ? `"none" | "end" | "start", in any case` : typeInWords(member);
}

/** JSON over several lines, with arrays of numbers each on one. */
function readableJson(value) {
  return JSON.stringify(value, null, 2).replace(/\[[-\d.,\s]+\]/g, (numbers) =>
    numbers.replace(/\s+/g, " ").replace("[ ", "[").replace(" ]", "]"),
  );
}

function drawReply(api) {
  const created = api.paths["/v1/embeddings"].post.responses["200"];
  const examples = Object.entries(created.content["application/json"].examples).map(([encoding, { value }]) => [
    encoding,
    codeBlock(readableJson(value), `the example reply in ${encoding}`),
  ]);
  byId("reply-examples").replaceChildren(tabs("reply", "Encoding", examples));
  const rows = Object.entries(created.headers).map(([name, header]) => [
    el("code", {}, name),
    prose(resolve(api, header).description),
  ]);
  byId("header-list").replaceChildren(table("Headers of a reply", ["Header", "Meaning"], rows, { stacks: true }));
}

const RETRY_IN_WORDS = { useless: "Will not help", later: "May help after a pause" };

function drawErrors(api) {
  byId("error-list").replaceChildren(...api["x-embedmesh-errors"].map(drawError));
}

/** A failure in one line, which opens: a phone shows all failures on three screens. */
function drawError(failure) {
  const summary = el(
    "summary",
    {},
    statusPill(failure.status),
    el("code", { class: "path" }, failure.code),
    el("span", { class: "who" }, failure.type),
  );
  const headers = failure.headers.length ? el("p", {}, "Headers: ", codeList(failure.headers)) : null;
  const again = el("p", { class: "muted" }, `Trying again: ${RETRY_IN_WORDS[failure.retry].toLowerCase()}.`);
  return el("details", { class: "route small-route" }, summary, el("p", {}, prose(failure.meaning)), again, headers);
}
