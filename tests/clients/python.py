"""Programs of others ask the gateway: `python python.py CLIENT`.

BASE (its address with /v1), KEY and MODEL are in the environment. Each prints what it got, as JSON: `answer`
to "Repeat: plum", the same as a `stream`, in how many `pieces`, the `result` of a tool that the model calls,
and the class of the `error` for a model that does not exist. What a client does not have is missing. Runs in
.venv/clients and imports nothing of aiosd.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

BASE, KEY, MODEL = os.environ["BASE"], os.environ["KEY"], os.environ["MODEL"]
PLUM, SUM = "Repeat: plum", "What is 37 * 12?"
CALC: dict[str, Any] = {
    "type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]
}  # fmt: skip
Found = dict[str, Any]


def product(expression: str) -> str:
    """Calculate an expression."""
    left, right = expression.split("*")
    return str(int(left) * int(right))


def kind_of_error(run: Any) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - the class is what the test asks for
        return type(error).__name__
    return ""


def openai_() -> Found:
    from openai import OpenAI

    ai = OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
    messages: list[Any] = [{"role": "user", "content": PLUM}]
    answer = ai.chat.completions.create(model=MODEL, messages=messages)
    options = {"include_usage": True}
    chunks = list(
        ai.chat.completions.create(model=MODEL, messages=messages, stream=True, stream_options=options)
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    tool: Any = {
        "type": "function",
        "function": {"name": "calc", "description": "calculates", "parameters": CALC},
    }
    asked: list[Any] = [{"role": "user", "content": SUM}]
    said = ai.chat.completions.create(model=MODEL, messages=asked, tools=[tool]).choices[0].message
    call = said.tool_calls[0]
    result = product(json.loads(call.function.arguments)["expression"])
    asked += [said, {"role": "tool", "tool_call_id": call.id, "content": result}]
    after = ai.chat.completions.create(model=MODEL, messages=asked, tools=[tool]).choices[0].message
    assert ai.embeddings.create(model=MODEL, input="plum").data[0].embedding
    assert MODEL in [model.id for model in ai.models.list()]
    error = kind_of_error(lambda: ai.chat.completions.create(model="none", messages=messages))
    with ai.chat.completions.create(model=MODEL, messages=messages, stream=True) as left:
        next(iter(left))  # and go away
    return {
        "answer": answer.choices[0].message.content, "stream": "".join(pieces), "pieces": len(pieces),
        "result": after.content, "error": error,
    }  # fmt: skip


def ollama_() -> Found:
    from ollama import Client

    client = Client(host=BASE.removesuffix("/v1"), headers={"Authorization": f"Bearer {KEY}"})
    messages: list[Any] = [{"role": "user", "content": PLUM}]
    pieces = [part.message.content or "" for part in client.chat(MODEL, messages, stream=True)]
    asked: list[Any] = [{"role": "user", "content": SUM}]
    tool = {"type": "function", "function": {"name": "calc", "description": "calculates", "parameters": CALC}}
    said = client.chat(MODEL, asked, tools=[tool], options={"temperature": 0}).message
    [call] = said.tool_calls
    result = product(call.function.arguments["expression"])
    asked += [said, {"role": "tool", "tool_name": "calc", "content": result}]
    fruit = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}},
        "required": ["name"],
    }
    assert "name" in json.loads(client.generate(MODEL, PLUM, format=fruit).response)
    assert client.embed(MODEL, "plum").embeddings
    assert MODEL + ":latest" in [one.model for one in client.list().models]
    assert kind_of_error(lambda: client.chat("none", messages)) == "ResponseError"
    return {
        "answer": client.generate(MODEL, PLUM, options={"temperature": 0}).response,
        "stream": "".join(pieces), "pieces": len(pieces),
        "result": client.chat(MODEL, asked, tools=[tool]).message.content,
    }  # fmt: skip


def anthropic_() -> Found:
    from anthropic import Anthropic

    client = Anthropic(base_url=BASE.removesuffix("/v1"), api_key=KEY, max_retries=0)
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 60}
    messages: list[Any] = [{"role": "user", "content": PLUM}]
    with client.messages.stream(messages=messages, **given) as stream:
        pieces = list(stream.text_stream)
    asked: list[Any] = [{"role": "user", "content": SUM}]
    tools: list[Any] = [{"name": "calc", "description": "calculates", "input_schema": CALC}]
    said = client.messages.create(messages=asked, tools=tools, **given)
    [call] = [block for block in said.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": product(call.input["expression"])}
    asked += [{"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=messages, **given)
    count = client.messages.count_tokens(model=MODEL, messages=messages)
    assert count.input_tokens == answer.usage.input_tokens
    wrong = given | {"model": "none"}
    return {
        "answer": answer.content[0].text, "stream": "".join(pieces), "pieces": len(pieces),
        "result": client.messages.create(messages=asked, tools=tools, **given).content[0].text,
        "error": kind_of_error(lambda: client.messages.create(messages=messages, **wrong)),
    }  # fmt: skip


def litellm_() -> Found:
    import litellm

    def ask(model: str, **more: Any) -> Any:
        return litellm.completion(
            model="openai/" + model, api_base=BASE, api_key=KEY, num_retries=0,
            messages=[{"role": "user", "content": PLUM}], **more,
        )  # fmt: skip

    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(MODEL, stream=True)]
    answer = ask(MODEL, temperature=0.0, metadata={"a": "b"}).choices[0].message.content
    return {
        "answer": answer, "stream": "".join(pieces), "pieces": len(pieces),
        "error": kind_of_error(lambda: ask("none")),
    }  # fmt: skip


def langchain() -> Found:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def calc(expression: str) -> str:
        """calculates"""
        return product(expression)

    chat = ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_retries=0)
    pieces = [str(chunk.content) for chunk in chat.stream(PLUM)]
    [call] = chat.bind_tools([calc]).invoke(SUM).tool_calls
    wrong = ChatOpenAI(model="none", base_url=BASE, api_key=KEY, max_retries=0)
    return {
        "answer": chat.invoke(PLUM).content, "stream": "".join(pieces), "pieces": len(pieces),
        "result": calc.invoke(call["args"]), "error": kind_of_error(lambda: wrong.invoke(PLUM)),
    }  # fmt: skip


def llama_index() -> Found:
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=MODEL, api_base=BASE, api_key=KEY, is_chat_model=True, max_retries=0)
    pieces = [chunk.delta or "" for chunk in llm.stream_complete(PLUM)]
    return {"answer": str(llm.complete(PLUM)), "stream": "".join(pieces), "pieces": len(pieces)}


def instructor_() -> Found:
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Fruit(BaseModel):
        name: str

    client = instructor.from_openai(OpenAI(base_url=BASE, api_key=KEY), mode=instructor.Mode.JSON_SCHEMA)
    asked: Any = [{"role": "user", "content": PLUM}]
    made = client.chat.completions.create(
        model=MODEL, messages=asked, response_model=Fruit, max_retries=0, max_tokens=60
    )
    return {
        "answer": "plum" if isinstance(made.name, str) else "no fruit"
    }  # the schema holds; the name is the model's


def pydantic_ai() -> Found:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY)))
    used: list[str] = []

    @agent.tool_plain
    def calc(expression: str) -> str:
        """calculates"""
        used.append(product(expression))
        return used[-1]

    result = agent.run_sync(SUM).output
    assert used == ["444"]
    return {"result": result, "answer": agent.run_sync(PLUM).output}


def autogen() -> Found:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    facts: Any = {
        "vision": False, "function_calling": True, "json_output": True, "structured_output": True,
        "family": "unknown",
    }  # fmt: skip
    client = OpenAIChatCompletionClient(model=MODEL, base_url=BASE, api_key=KEY, model_info=facts)
    calc = product
    calc.__name__ = "calc"

    async def run() -> Found:
        sums = AssistantAgent("sums", client, tools=[calc], system_message=None, reflect_on_tool_use=False)
        words = AssistantAgent("words", client, system_message=None)
        result, answer = await sums.run(task=SUM), await words.run(task=PLUM)
        return {"result": result.messages[-1].to_text(), "answer": answer.messages[-1].to_text()}

    return asyncio.run(run())


def openai_agents() -> Found:
    from agents import (
        Agent,
        AsyncOpenAI,
        OpenAIChatCompletionsModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=BASE, api_key=KEY))

    def calc(expression: str) -> str:
        """calculates"""
        return product(expression)

    sums, words = Agent("sums", model=model, tools=[function_tool(calc)]), Agent("words", model=model)
    return {
        "result": Runner.run_sync(sums, SUM).final_output,
        "answer": Runner.run_sync(words, PLUM).final_output,
    }


def llm() -> Found:
    """The command: a model of a file of its own."""
    home = os.environ["LLM_USER_PATH"]
    with open(f"{home}/extra-openai-models.yaml", "w") as file:
        file.write(f"- model_id: mine\n  model_name: {MODEL}\n  api_base: {BASE}\n  api_key_name: mine\n")
    with open(f"{home}/keys.json", "w") as file:
        json.dump({"mine": KEY}, file)
    command = [os.path.join(os.path.dirname(sys.executable), "llm"), "-m", "mine", PLUM]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    whole = subprocess.run([*command, "--no-stream"], stdout=subprocess.PIPE, text=True, check=True)
    return {"stream": done.stdout.strip(), "answer": whole.stdout.strip()}


CLIENTS = {
    "openai": openai_, "ollama": ollama_, "anthropic": anthropic_,
    "litellm": litellm_, "langchain": langchain, "llama-index": llama_index,
    "instructor": instructor_, "pydantic-ai": pydantic_ai, "autogen": autogen, "openai-agents": openai_agents,
    "llm": llm,
}  # fmt: skip
if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]]()))
