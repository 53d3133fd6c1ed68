"""The exported models at work. Writes use.json.

The tuned one in transformers, with fused layers, and in `LLM`: the same words from all three. What the adapter has learnt, beside that model in
PEFT, and merged into it in `LLM`: the same words from both.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_fast
from llama_fast import LLM, SamplingParams
from llama_fast.data import stories
from llama_fast.evaluate.files import read_lines
from llama_fast.reports.jsonfile import write_whole

MODEL, ADAPTER, MERGED = "tuned", "peft", "merged"
MOST = 64
JUDGED, LINES, STORIES = 300, 12, 3
"""The lines that `before` and `after` are judged by, those after them that are asked here, and stories."""
FORMS = {
    "translate": "1623: {text}\nToday:",
    "answer": "Story: {context}\nQuestion: {question}\nAnswer:",
    "summarize": "Story: {text}\nSummary:",
}
"""How the model was asked while it learnt (conversations.py)."""
REVERSED = "Today: {text}\n1623:"
"""How it was while the adapter learnt (reversed.py)."""
OPENINGS = ("MACBETH.\nIf", "PROSPERO.\nMy")


@dataclass(frozen=True)
class Asked:
    """What a user would ask for, and what would be right."""

    task: str
    fields: dict[str, str]
    right: str

    @property
    def prompt(self) -> str:
        return FORMS[self.task].format_map(self.fields)


def main() -> None:
    asked = questions()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    llm = LLM(MODEL)
    plain, plain_seconds = timed(lambda: [by_transformers(model, tokenizer, each.prompt) for each in asked])
    report = llama_fast.fuse(model)
    fused, fused_seconds = timed(lambda: [by_transformers(model, tokenizer, each.prompt) for each in asked])
    ours, our_seconds = timed(lambda: by_llm(llm, [each.prompt for each in asked]))
    outputs = by_tasks(llm, asked)
    found = {
        "same": {"fused": same(plain, fused), "LLM": same(plain, ours), "of": len(asked)},
        "seconds": {"transformers": plain_seconds, "fused": fused_seconds, "LLM": our_seconds},
        "fuse": str(report),
        "samples": [
            {"task": each.task, "prompt": each.prompt, "right": each.right, "output": output}
            for each, output in zip(asked, outputs, strict=True)
        ],
        "plays": plays(LLM("base")),
        "adapter": adapter(tokenizer),
    }
    write_whole(Path("use.json"), json.dumps(found, indent=1, ensure_ascii=False))
    print(report)
    print(f"the same words as transformers: fused {same(plain, fused)}, LLM {same(plain, ours)}, of {len(asked)}")
    beside = found["adapter"]
    print(f"the same words of the adapter, merged, as beside the model: {beside['same']} of {beside['of']}")
    for each, output in list(zip(asked, outputs, strict=True))[::5]:
        print(f"[{each.task}] {each.prompt} {output}")


def questions() -> list[Asked]:
    """Of held-out plays and worlds."""
    lines = [line for _, line in read_lines(Path("translation.jsonl"), JUDGED + LINES)][JUDGED:]
    asked = [Asked("translate", {"text": line["source"]}, line["target"]) for line in lines]
    rng = random.Random(1)
    for _ in range(STORIES):
        text = stories.write_story(rng, held_out=True).text
        story = stories.parse_story(text)
        question, answer = rng.choice(stories.questions(story))
        asked.append(Asked("answer", {"context": text, "question": question}, answer))
        asked.append(Asked("summarize", {"text": text}, stories.summaries(story)[0]))
    return sorted(asked, key=lambda each: list(FORMS).index(each.task))


def by_transformers(model: torch.nn.Module, tokenizer: AutoTokenizer, prompt: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def by_llm(llm: LLM, prompts: list[str]) -> list[str]:
    chats = [llm.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    return [done.text for done in llm.generate(chats, SamplingParams(temperature=0, max_tokens=MOST))]


def by_tasks(llm: LLM, asked: list[Asked]) -> list[str]:
    """By the functions that a user calls: they put texts into prompts, and these into the chat template."""

    def fields(task: str, name: str) -> list[str]:
        return [each.fields[name] for each in asked if each.task == task]

    return [
        *llama_fast.translate(llm, fields("translate", "text"), target="today", prompt=FORMS["translate"]),
        *llama_fast.answer(llm, fields("answer", "question"), fields("answer", "context"), prompt=FORMS["answer"]),
        *llama_fast.summarize(llm, fields("summarize", "text"), prompt=FORMS["summarize"]),
    ]


def adapter(tokenizer: AutoTokenizer) -> dict[str, object]:
    """Lines of held-out plays spelt as in 1623, by the adapter beside the model, and merged into it."""
    lines = [line for _, line in read_lines(Path("reversed.jsonl"), JUDGED + LINES)][JUDGED:]
    prompts = [REVERSED.format(text=line["target"]) for line in lines]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), ADAPTER).eval()
    beside = [by_transformers(model, tokenizer, prompt) for prompt in prompts]
    merged = by_llm(LLM(MERGED), prompts)
    return {
        "same": same(beside, merged),
        "of": len(lines),
        "bytes": {
            name: Path(name, file).stat().st_size
            for name, file in ((ADAPTER, "adapter_model.safetensors"), (MERGED, "model.safetensors"))
        },
        "samples": [
            {"prompt": prompt, "right": line["source"], "output": output}
            for prompt, line, output in zip(prompts, lines, merged, strict=True)
        ],
    }


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
