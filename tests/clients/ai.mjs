// Vercel's AI SDK, with its tool loop.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const { BASE, KEY, MODEL } = process.env;
const model = createOpenAICompatible({ name: "aiosd", baseURL: BASE, apiKey: KEY })(MODEL);
const schema = { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] };
const calc = tool({
  description: "calculates",
  inputSchema: jsonSchema(schema),
  execute: async ({ expression }) => String(expression.split("*").reduce((a, b) => a * b)),
});
const { text: answer } = await generateText({ model, prompt: "Repeat: plum", maxRetries: 0 });
const { text: result } = await generateText({
  model, prompt: "What is 37 * 12?", tools: { calc }, stopWhen: stepCountIs(3), maxRetries: 0,
});
const pieces = [];
for await (const piece of streamText({ model, prompt: "Repeat: plum", maxRetries: 0 }).textStream) pieces.push(piece);
console.log(JSON.stringify({ answer, result, stream: pieces.join(""), pieces: pieces.length }));
