// atoma-sdk for Node, unmodified: what it gets from an endpoint, as one line of JSON.
import { AtomaSDK } from "atoma-sdk";

const [serverURL, model] = process.argv.slice(2);
const sdk = new AtomaSDK({ serverURL }); // the key comes from ATOMASDK_BEARER_AUTH
const input = ["hello world", "日本語の文"];

const refusal = (promise) =>
  promise.then(
    () => "accepted",
    (error) => ({ kind: error.name, status: error.statusCode, code: JSON.parse(error.body).error.code }),
  );
const vectors = (reply) => reply.data.map((item) => item.embedding);

const plain = await sdk.embeddings.create({ model, input });
const nulls = await sdk.embeddings.create({ model, input, dimensions: null, encodingFormat: null, user: null });
const one = await sdk.embeddings.create({ model, input: input[0], encodingFormat: "float", user: "someone" });
const sealed = await sdk.confidentialEmbeddings.create({ model, input });
const lock = await sdk.nodes.nodesCreateLock({ model });

console.log(
  JSON.stringify({
    plain: vectors(plain),
    nulls: vectors(nulls),
    one: vectors(one),
    sealed: vectors(sealed),
    sealedUsage: sealed.usage,
    lock: [lock.publicKey, lock.stackSmallId, lock.nodeSmallId],
    usage: plain.usage,
    models: (await sdk.models.modelsList()).data.map((found) => found.id),
    health: await sdk.health.health(),
    refusals: [
      await refusal(new AtomaSDK({ serverURL, bearerAuth: "em_wrong" }).embeddings.create({ model, input })),
      await refusal(sdk.embeddings.create({ model: "nobody/nothing", input })),
      await refusal(sdk.embeddings.create({ model, input: "" })),
    ],
  }),
);
