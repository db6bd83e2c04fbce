// atoma-sdk for Node, unmodified, at its confidential chat and images: what it gets, as one line of JSON.
import { AtomaSDK } from "atoma-sdk";

const [serverURL, chat, painter, text] = process.argv.slice(2);
const sdk = new AtomaSDK({ serverURL }); // the key comes from ATOMASDK_BEARER_AUTH
const messages = [{ role: "user", content: text }];

const refusal = (promise) =>
  promise.then(
    () => "accepted",
    (error) => ({ kind: error.name, status: error.statusCode, code: JSON.parse(error.body).error.code }),
  );

const whole = await sdk.confidentialChat.create({ model: chat, messages, maxTokens: 50 });
const chunks = [];
for await (const event of await sdk.confidentialChat.createStream({ model: chat, messages, maxTokens: 50 })) {
  chunks.push(event.data);
}
const image = await sdk.confidentialImages.generate({ model: painter, prompt: "a blue house", n: 1, size: "512x512" });

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    usage: whole.usage,
    streamed: chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join(""),
    events: chunks.length,
    finish: chunks.map((chunk) => chunk.choices[0]?.finishReason).filter(Boolean),
    image: image.data[0].url.slice(0, 22),
    refused: await refusal(sdk.confidentialChat.create({ model: chat, messages: [] })),
  }),
);
