// The npm package's files and batches: prints what came back as JSON.
import OpenAI, { toFile } from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, maxRetries: 0 });
const line = (custom_id, input) =>
  JSON.stringify({ custom_id, method: "POST", url: "/v1/embeddings", body: { model, input } });
const data = [line("a", "hello world"), line("b", "zwei")].join("\n");

const upload = async () =>
  client.files.create({ file: await toFile(Buffer.from(data), "requests.jsonl"), purpose: "batch" });
const start = (file) =>
  client.batches.create({ input_file_id: file.id, endpoint: "/v1/embeddings", completion_window: "24h" });

const file = await upload();
const processed = (await client.files.waitForProcessing(file.id)).status;
let batch = await start(file);
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  batch = await client.batches.retrieve(batch.id);
}
const text = await (await client.files.content(batch.output_file_id)).text();
const rows = text.trim().split("\n").map((row) => JSON.parse(row));
let listed = false;
for await (const each of client.batches.list({ limit: 1 })) listed ||= each.id === batch.id;

let cancelled = (await start(file)).id;
try {
  cancelled = (await client.batches.cancel(cancelled)).status;
} catch (error) {
  if (error.status !== 400) throw error; // it was done before
  cancelled = "completed";
}
console.log(
  JSON.stringify({
    processed,
    status: batch.status,
    counts: batch.request_counts,
    ids: rows.map((row) => row.custom_id).sort(),
    vector: rows.find((row) => row.custom_id === "a").response.body.data[0].embedding,
    listed,
    deleted: (await client.files.delete(file.id)).deleted,
    cancelled,
  }),
);
