"""A first request in each client that must work unmodified. Each sample is a whole program.

The documentation page replaces `ORIGIN` by its own origin. Keys come from the environment, so that nobody pastes one
into a file.
"""

ORIGIN = "http://127.0.0.1:8080"  # where `embedmesh serve` listens unless told otherwise
EXAMPLE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
CHAT_MODEL = "llama"  # as in docs/how-to/chat.md

CURL = f"""\
curl {ORIGIN}/v1/embeddings \\
  -H "Authorization: Bearer $EMBEDMESH_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{EXAMPLE_MODEL}",
       "input": ["Good morning", "Guten Morgen"]}}'
"""

OPENAI_PYTHON = f"""\
# pip install openai
import os

from openai import OpenAI

client = OpenAI(
    base_url="{ORIGIN}/v1",
    api_key=os.environ["EMBEDMESH_API_KEY"],
)
reply = client.embeddings.create(
    model="{EXAMPLE_MODEL}",
    input=["Good morning", "Guten Morgen"],
)

for item in reply.data:
    print(item.index, len(item.embedding), item.embedding[:4])
"""

OPENAI_NODE = f"""\
// npm install openai
import OpenAI from "openai";

const client = new OpenAI({{
  baseURL: "{ORIGIN}/v1",
  apiKey: process.env.EMBEDMESH_API_KEY,
}});
const reply = await client.embeddings.create({{
  model: "{EXAMPLE_MODEL}",
  input: ["Good morning", "Guten Morgen"],
}});

for (const item of reply.data) {{
  console.log(item.index, item.embedding.length, item.embedding.slice(0, 4));
}}
"""

ATOMA_PYTHON = f"""\
# pip install atoma-sdk
import os

from atoma_sdk import AtomaSDK

with AtomaSDK(
    server_url="{ORIGIN}",
    bearer_auth=os.environ["EMBEDMESH_API_KEY"],
) as atoma:
    reply = atoma.embeddings.create(
        model="{EXAMPLE_MODEL}",
        input_=["Good morning", "Guten Morgen"],
    )

for item in reply.data:
    print(item.index, len(item.embedding), item.embedding[:4])
"""

ATOMA_NODE = f"""\
// npm install atoma-sdk
import {{ AtomaSDK }} from "atoma-sdk";

const atoma = new AtomaSDK({{
  serverURL: "{ORIGIN}",
  bearerAuth: process.env.EMBEDMESH_API_KEY,
}});
const reply = await atoma.embeddings.create({{
  model: "{EXAMPLE_MODEL}",
  input: ["Good morning", "Guten Morgen"],
}});

for (const item of reply.data) {{
  console.log(item.index, item.embedding.length, item.embedding.slice(0, 4));
}}
"""

CHAT_CURL = f"""\
curl --no-buffer {ORIGIN}/v1/chat/completions \\
  -H "Authorization: Bearer $EMBEDMESH_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{CHAT_MODEL}", "stream": true,
       "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
"""

CHAT_PYTHON = f"""\
# pip install openai
import os

from openai import OpenAI

client = OpenAI(
    base_url="{ORIGIN}/v1",
    api_key=os.environ["EMBEDMESH_API_KEY"],
)
stream = client.chat.completions.create(
    model="{CHAT_MODEL}",
    messages=[{{"role": "user", "content": "Why is the sky blue?"}}],
    stream=True,
)

for event in stream:
    print(event.choices[0].delta.content or "", end="")
"""

CHAT_SAMPLES = [
    {"lang": "shell", "label": "chat · curl", "source": CHAT_CURL},
    {"lang": "python", "label": "chat · Python", "source": CHAT_PYTHON},
]
SAMPLES = [
    {"lang": "shell", "label": "curl", "source": CURL},
    {"lang": "python", "label": "openai · Python", "source": OPENAI_PYTHON},
    {"lang": "javascript", "label": "openai · Node", "source": OPENAI_NODE},
    {"lang": "python", "label": "atoma-sdk · Python", "source": ATOMA_PYTHON},
    {"lang": "javascript", "label": "atoma-sdk · Node", "source": ATOMA_NODE},
]
"""In the form of the `x-codeSamples` extension, which other documentation tools read, too."""
