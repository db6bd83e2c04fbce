// atoma-sdk for Node, unmodified: what an endpoint generates for it, as one line of JSON.
import { AtomaSDK } from "atoma-sdk";

const [serverURL, model, painter, pace] = process.argv.slice(2);
const sdk = new AtomaSDK({ serverURL }); // the key comes from ATOMASDK_BEARER_AUTH
const messages = [{ role: "user", content: "Tell me something." }];
// It loses events that come close together, whatever the server does: those of this stream are PACE seconds apart.
const slowly = [{ role: "user", content: `Tell me something. <<honest pace=${pace}>>` }];

const refusal = (promise) =>
  promise.then(
    () => "accepted",
    (error) => ({ kind: error.name, status: error.statusCode, code: JSON.parse(error.body).error.code }),
  );

const whole = await sdk.chat.create({ model, messages, maxTokens: 20 });
const events = [];
for await (const event of await sdk.chat.createStream({ model, messages: slowly })) events.push(event.data);
const images = await sdk.images.generate({ model: painter, prompt: "A cat" });

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    usage: whole.usage,
    streamed: events.map((event) => event.choices[0]?.delta?.content ?? "").join(""),
    events: events.length,
    images: images.data.map((image) => image.url.slice(0, 22)),
    models: (await sdk.models.modelsList()).data.map((found) => found.id),
    health: await sdk.health.health(),
    refusals: [
      await refusal(sdk.chat.create({ model: painter, messages })),
      await refusal(sdk.chat.create({ model: "nobody/nothing", messages })),
    ],
  }),
);
