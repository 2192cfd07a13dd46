// The JavaScript client of OpenAI, as python.py does it.
import OpenAI from "openai";

const { BASE, KEY, MODEL } = process.env;
const ai = new OpenAI({ baseURL: BASE, apiKey: KEY, maxRetries: 0 });
const asked = { model: MODEL, messages: [{ role: "user", content: "Repeat: plum" }] };
const answer = (await ai.chat.completions.create(asked)).choices[0].message.content;
const pieces = [];
for await (const chunk of await ai.chat.completions.create({ ...asked, stream: true }))
  pieces.push(chunk.choices[0]?.delta?.content ?? "");
let error = "";
try {
  await ai.chat.completions.create({ ...asked, model: "none" });
} catch (refused) {
  error = refused.constructor.name;
}
console.log(JSON.stringify({ answer, stream: pieces.join(""), pieces: pieces.length, error }));
