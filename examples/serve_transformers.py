"""Serve a model of Transformers behind an OpenAI-style endpoint, with its weights stored in float16.

    python examples/serve_transformers.py --model path/to/model          # then POST to /v1/chat/completions
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "What do llamas eat?", "max_tokens": 16}'

Requests run in FastAPI's threads and share one model: a patched model does not change in a forward. The part that is
upcast's is one line in `Model`. Needs `pip install 'torch-upcast[transformers]' fastapi uvicorn`.
"""

import argparse
import threading
import time
import uuid
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcast


class Completion(BaseModel):
    """What both requests may say about the answer."""

    model: str = ""
    max_tokens: int = Field(64, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    seed: int | None = None


class PromptRequest(Completion):
    """A request to /v1/completions."""

    prompt: str


class ChatRequest(Completion):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, str]]


class Model:
    """The patched model and its tokenizer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = upcast.from_pretrained(AutoModelForCausalLM, name).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.drawing = threading.Lock()  # torch draws for all threads out of one stream of random numbers

    def text_of(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the model was taught to read it, or plainly where it was not."""
        if self.tokenizer.chat_template:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "

    @torch.inference_mode()
    def complete(self, text: str, asked: Completion) -> tuple[str, dict[str, int], str]:
        """Return the answer, the numbers of tokens, and why it ended."""
        inputs = self.tokenizer(text, return_tensors="pt")
        if asked.temperature > 0:
            with self.drawing:
                torch.manual_seed(asked.seed if asked.seed is not None else time.time_ns() % 2**31)
                tokens = self._generate(inputs, asked, do_sample=True, temperature=asked.temperature)
        else:
            tokens = self._generate(inputs, asked, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        new = tokens[0, prompt:]
        usage = {"prompt_tokens": prompt, "completion_tokens": len(new), "total_tokens": prompt + len(new)}
        ended = "length" if len(new) == asked.max_tokens else "stop"
        return self.tokenizer.decode(new, skip_special_tokens=True), usage, ended

    def _generate(self, inputs: Any, asked: Completion, **sampling: Any) -> torch.Tensor:
        return self.model.generate(**inputs, max_new_tokens=asked.max_tokens, **sampling)


def application(model: Model) -> FastAPI:
    """Return the application: health, models, completions, chat."""
    app = FastAPI(title="upcast")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model.name, "object": "model"}]}

    @app.post("/v1/completions")
    def completions(request: PromptRequest) -> dict[str, Any]:
        text, usage, ended = model.complete(request.prompt, request)
        return _answer(model, "text_completion", {"text": text, "finish_reason": ended}, usage)

    @app.post("/v1/chat/completions")
    def chat(request: ChatRequest) -> dict[str, Any]:
        text, usage, ended = model.complete(model.text_of(request.messages), request)
        message = {"role": "assistant", "content": text}
        return _answer(model, "chat.completion", {"message": message, "finish_reason": ended}, usage)

    return app


def _answer(model: Model, kind: str, choice: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "choices": [{"index": 0, **choice}],
        "usage": usage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name that Transformers downloads")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(application(Model(options.model)), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
