// An OpenID provider (oidc-provider, certified by the OpenID Foundation) on a free port of this machine; prints its issuer.
// Its clients are machines: each gets a JWT for the audience and with the roles that stand here. Ends with its stdin.
import { createServer } from "node:http";
import { generateKeyPairSync } from "node:crypto";
import Provider from "oidc-provider";

const ROLES = { deployer: ["operators"], dashboard: ["viewers"], stranger: ["guests"], elsewhere: ["operators"] };
const AUDIENCE = { elsewhere: "another-service" };

const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
const server = createServer();
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const issuer = `http://127.0.0.1:${server.address().port}`;
const provider = new Provider(issuer, {
  jwks: { keys: [{ ...privateKey.export({ format: "jwk" }), kid: "first", use: "sig", alg: "RS256" }] },
  clients: Object.keys(ROLES).map((name) => ({
    client_id: name,
    client_secret: `secret of ${name}`,
    grant_types: ["client_credentials"],
    redirect_uris: [],
    response_types: [],
    token_endpoint_auth_method: "client_secret_post",
  })),
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => "urn:embedmesh",
      useGrantedResource: () => true,
      getResourceServerInfo: (_, resource, client) => ({
        scope: "",
        audience: AUDIENCE[client.clientId] ?? "embedmesh",
        accessTokenTTL: 300,
        accessTokenFormat: "jwt",
        jwt: { sign: { alg: "RS256" } },
      }),
    },
  },
  extraTokenClaims: (_, token) => ({ realm_access: { roles: ROLES[token.clientId] } }),
});
server.on("request", provider.callback());
console.log(JSON.stringify({ issuer }));
process.stdin.on("end", () => process.exit(0)).resume();
