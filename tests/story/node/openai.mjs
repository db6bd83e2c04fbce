// OpenAI's own Node client, unmodified: what it gets from an endpoint, as one line of JSON.
import OpenAI, { AzureOpenAI } from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, maxRetries: 0 }); // the key comes from OPENAI_API_KEY
const input = ["hello world", "日本語の文"];

const refusal = (promise) =>
  promise.then(
    () => "accepted",
    (error) => ({ kind: error.constructor.name, status: error.status, code: error.code, param: error.param }),
  );
const vectors = (reply) => reply.data.map((item) => Array.from(item.embedding));

const byDefault = await client.embeddings.create({ model, input });
const floats = await client.embeddings.create({ model, input, encoding_format: "float" });
const ids = await client.embeddings.create({ model, input: [15339, 1917] }); // "hello world" in cl100k
const short = await client.embeddings.create({ model, input, dimensions: 8, user: "someone" });
const many = await client.embeddings.create({ model, input: Array.from({ length: 300 }, (_, i) => `text ${i}`) });
const { response } = await client.embeddings.create({ model, input }).withResponse();
const endpoint = baseURL.replace(/\/v1$/, "");
const azure = new AzureOpenAI({ endpoint, apiKey: process.env.OPENAI_API_KEY, apiVersion: "2024-10-21", maxRetries: 0 });
const byAzure = await azure.embeddings.create({ model, input });
const models = [];
for await (const found of client.models.list()) models.push(found.id);

console.log(
  JSON.stringify({
    default: vectors(byDefault),
    float: vectors(floats),
    azure: vectors(byAzure),
    ids: vectors(ids),
    short: vectors(short),
    many: many.data.map((item) => item.index),
    usage: byDefault.usage,
    cost: response.headers.get("x-embedmesh-cost-nanousd"),
    models,
    retrieved: (await client.models.retrieve(model)).id,
    refusals: [
      await refusal(client.withOptions({ apiKey: "em_wrong" }).embeddings.create({ model, input })),
      await refusal(client.embeddings.create({ model: "nobody/nothing", input })),
      await refusal(client.embeddings.create({ model, input: "" })),
      await refusal(azure.embeddings.create({ model: "nobody/nothing", input })),
    ],
  }),
);
