"""The exported model at work, in transformers, with fused layers, and in `LLM`: the same words from all three. Writes use.json."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_fast
from llama_fast import LLM, SamplingParams
from llama_fast.data import stories
from llama_fast.evaluate.files import read_lines
from llama_fast.reports.jsonfile import write_whole

MODEL = "tuned"
MOST = 64
JUDGED, LINES, STORIES = 200, 12, 3
"""The lines that `before` and `after` are judged by, those after them that are asked here, and stories."""
TRANSLATE = "1623: {text}\nToday:"
ANSWER = "Story: {context}\nQuestion: {question}\nAnswer:"
SUMMARIZE = "Story: {text}\nSummary:"
OPENINGS = ("MACBETH.\nIf", "PROSPERO.\nMy")


def main() -> None:
    asked = questions()
    prompts = [prompt for _, prompt, _ in asked]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    llm = LLM(MODEL)
    plain, plain_seconds = timed(lambda: [by_transformers(model, tokenizer, each) for each in prompts])
    report = llama_fast.fuse(model)
    fused, fused_seconds = timed(lambda: [by_transformers(model, tokenizer, each) for each in prompts])
    ours, our_seconds = timed(lambda: by_llm(llm, asked))
    found = {
        "same": {"fused": same(plain, fused), "LLM": same(plain, ours), "of": len(prompts)},
        "seconds": {"transformers": plain_seconds, "fused": fused_seconds, "LLM": our_seconds},
        "fuse": str(report),
        "samples": [
            {"task": task, "prompt": prompt, "expected": expected, "output": output}
            for (task, prompt, expected), output in zip(asked, ours, strict=True)
        ],
        "plays": plays(LLM("base")),
    }
    write_whole(Path("use.json"), json.dumps(found, indent=1, ensure_ascii=False))
    print(report)
    print(f"the same words as transformers: fused {same(plain, fused)}, LLM {same(plain, ours)}, of {len(prompts)}")
    for task, prompt, output in [(each["task"], each["prompt"], each["output"]) for each in found["samples"][::5]]:
        print(f"[{task}] {prompt} {output}")


def questions() -> list[tuple[str, str, str]]:
    """Task, prompt and what would be right, from held-out plays and worlds."""
    lines = [line for _, line in read_lines(Path("translation.jsonl"), JUDGED + LINES)][JUDGED:]
    asked = [("translation", TRANSLATE.format(text=line["source"]), line["target"]) for line in lines]
    for form in ("question", "summary"):
        documents = stories.write_documents(form, STORIES, seed=1, held_out=True)
        asked += [(form, each.prompt, each.completion.strip()) for each in documents]
    return asked


def by_transformers(model: torch.nn.Module, tokenizer: AutoTokenizer, prompt: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def by_llm(llm: LLM, asked: list[tuple[str, str, str]]) -> list[str]:
    """By the functions that a user calls: they put texts into prompts, and these into the chat template."""
    prompts = {form: [prompt for task, prompt, _ in asked if task == form] for form in ("translation", "question", "summary")}
    lines = [parse(TRANSLATE, prompt)["text"] for prompt in prompts["translation"]]
    told = [parse(ANSWER, prompt) for prompt in prompts["question"]]
    texts = [parse(SUMMARIZE, prompt)["text"] for prompt in prompts["summary"]]
    return [
        *llama_fast.translate(llm, lines, target="today's spelling", prompt=TRANSLATE),
        *llama_fast.answer(llm, [each["question"] for each in told], [each["context"] for each in told], prompt=ANSWER),
        *llama_fast.summarize(llm, texts, prompt=SUMMARIZE),
    ]


def parse(form: str, prompt: str) -> dict[str, str]:
    """The fields of a prompt."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*)", re.escape(form))
    found = re.fullmatch(pattern, prompt)
    assert found is not None
    return found.groupdict()


def plays(llm: LLM) -> list[str]:
    """How the model that was only pre-trained goes on with the speeches of a play it has not seen."""
    done = llm.generate(list(OPENINGS), SamplingParams(temperature=0.8, top_p=0.95, max_tokens=120, seed=0))
    return [opening + each.text for opening, each in zip(OPENINGS, done, strict=True)]


def same(these: list[str], those: list[str]) -> int:
    return sum(this == that for this, that in zip(these, those, strict=True))


def timed(work: Callable[[], list[str]]) -> tuple[list[str], float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


if __name__ == "__main__":
    main()
