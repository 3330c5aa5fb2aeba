"""Generate text with a model of Transformers whose weights are stored in float16.

    python examples/inference.py --model path/to/model --prompt "What do llamas eat?"
    python examples/inference.py --model path/to/model --float32     # the same without upcast, to compare with

``--model`` is a folder, or a name that Transformers downloads. A float16 checkpoint is mapped and used in place.
Needs `pip install 'torch-upcast[transformers]'`.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name")
    parser.add_argument("--prompt", default="What do llamas eat?")
    parser.add_argument("--tokens", type=int, default=50, help="how many new tokens")
    parser.add_argument("--float32", action="store_true", help="without upcast")
    options = parser.parse_args()

    if options.float32:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    else:
        model = upcast.from_pretrained(AutoModelForCausalLM, options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    if tokenizer.chat_template:
        asked = [{"role": "user", "content": options.prompt}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    begin = time.perf_counter()
    with torch.inference_mode():
        tokens = model.eval().generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
    seconds = time.perf_counter() - begin

    new = tokens[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(new, skip_special_tokens=True))
    print(f"\n{len(new)} tokens in {seconds:.2f} s; weights {model.get_memory_footprint() / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
