// The class for Azure of npm's `openai`, before a gateway: `node azure.mjs JOB`. It prints the vectors.
import { readFileSync } from "node:fs";
import { AzureOpenAI } from "openai";

const { base, key, model, texts } = JSON.parse(readFileSync(process.argv[2]));
const client = new AzureOpenAI({ endpoint: base, apiKey: key, apiVersion: "2024-10-21" });
const reply = await client.embeddings.create({ model, input: texts });
console.log(JSON.stringify(reply.data.map((each) => each.embedding)));
