// OpenAI's own Node client, unmodified: what an endpoint generates for it, as one line of JSON.
import OpenAI from "openai";

const [baseURL, model, painter] = process.argv.slice(2);
const client = new OpenAI({ baseURL, maxRetries: 0 }); // the key comes from OPENAI_API_KEY
const messages = [{ role: "user", content: "Tell me something." }];
const told = (order) => [{ role: "user", content: `Tell me something. <<${order}>>` }];

const refusal = (promise) =>
  promise.then(
    () => "accepted",
    (error) => ({ kind: error.constructor.name, status: error.status ?? null, code: error.code ?? null }),
  );
const streamed = async (request) => {
  const events = [];
  for await (const event of await client.chat.completions.create({ model, stream: true, ...request }))
    events.push(event);
  return events;
};
const words = (events) => events.map((event) => event.choices[0]?.delta?.content ?? event.choices[0]?.text ?? "").join("");

const whole = await client.chat.completions.create({ model, messages });
const { response } = await client.chat.completions.create({ model, messages }).withResponse();
const events = await streamed({ messages, stream_options: { include_usage: true } });
const tools = [{ type: "function", function: { name: "get_weather", parameters: { type: "object" } } }];
const calls = await client.chat.completions
  .stream({ model, messages: told("tools-interleaved"), tools })
  .finalChatCompletion();
const completion = await client.completions.create({ model, prompt: ["Once", "Twice"] });
const completed = [];
for await (const event of await client.completions.create({ model, prompt: "Once", stream: true })) completed.push(event);
const images = await client.images.generate({ model: painter, prompt: "A cat", n: 2, size: "32x16" });
const left = await client.chat.completions.create({ model, messages: told("stalls at=4"), stream: true });
for await (const event of left) if (words([event])) break; // it closes the stream

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    usage: whole.usage,
    cost: response.headers.get("x-embedmesh-cost-nanousd"),
    streamed: words(events),
    streamedUsage: events.at(-1).usage,
    comments: words(await streamed({ messages: told("comments") })),
    calls: calls.choices[0].message.tool_calls.map((call) => [call.id, call.function.name, call.function.arguments]),
    completion: completion.choices.map((choice) => choice.text),
    completed: words(completed),
    images: images.data.map((image) => image.b64_json.slice(0, 8)),
    models: (await client.models.list()).data.filter((found) => found.modalities.includes("chat")).map((found) => found.id),
    refusals: [
      await refusal(client.chat.completions.create({ model: painter, messages })),
      await refusal(client.chat.completions.create({ model, messages: [] })),
      await refusal(streamed({ messages: told("dies") })),
      await refusal(streamed({ messages: told("errs") })),
    ],
  }),
);
