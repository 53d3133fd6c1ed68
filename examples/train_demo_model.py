"""Train the LLaMA that ships inside llama-fast, from nothing, on two CPU cores in about ten minutes.

    python examples/train_demo_model.py                      # fused layers, into llama_fast/demo_model
    python examples/train_demo_model.py --no-fuse --out DIR  # plain transformers, elsewhere

The text comes from `llama_fast.data.stories`; no download is needed. The same seed writes the same text, trains the same tokenizer
and, on the same machine with the same number of threads, the same model. The output folder is replaced in one move at the end.
"""

import argparse
import math
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_fast.data import stories

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "llama_fast" / "demo_model"
VOCAB_SIZE = 1280  # at most: every word of the grammar becomes one token before that
TURNS = 6  # questions about each story in the training text: finding a fact again is the hard part, so it is asked for often
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
Example = tuple[list[int], list[int]]  # token ids and labels
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}User: {{ message['content'] }}
{% elif message['role'] == 'assistant' %}Assistant:{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}{% else %}{{ raise_exception('the demo model knows only the roles user and assistant') }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}Assistant:{% endif %}"""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(f"writing {args.documents:,} documents", flush=True)
    tokenizer = train_tokenizer(args.seed)
    documents = [encode(tokenizer, text) for text in training_texts(args.documents, args.seed, tokenizer)]
    model = new_model(tokenizer)
    tokens = sum(len(ids) for ids, _ in documents)
    print(
        f"{tokens:,} tokens of text, {len(tokenizer):,} in the vocabulary, {model.num_parameters():,} parameters",
        flush=True,
    )
    if args.fuse:
        import llama_fast

        print(llama_fast.fuse(model, mode="training"))
    loss, minutes = train(model, documents, args)
    if args.fuse:
        llama_fast.unfuse(model)
    rates = measure(model.eval(), tokenizer, args.prompts, args.seed)
    save(model, tokenizer, model_card(model, args, loss, minutes, rates), args.out)
    print(f"saved in {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model of llama-fast.")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the one inside the package)"
    )
    parser.add_argument("--documents", type=int, default=42_000, help="documents to train on, each seen once")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts of each form to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-fuse", dest="fuse", action="store_false", help="train with plain transformers layers")
    return parser.parse_args()


# --- text and tokenizer ----------------------------------------------------------------------------------------------


def training_texts(count: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Stories, readings of stories and of short passages, and chats, none from a held-out world, with their special tokens."""
    rng = random.Random(seed)
    for form in rng.choices(("story", "reading", "passage", "chat"), (0.15, 0.3, 0.3, 0.25), k=count):
        if form == "story":
            yield f"{BOS}{stories.write_story(rng).text}{EOS}"
        elif form == "reading":
            text = stories.write_story(rng).text
            story = stories.parse_story(text)
            yield reading(rng, text, stories.questions(story), [rng.choice(stories.summaries(story))])
        elif form == "passage":
            yield reading(rng, *stories.write_excerpt(rng, slots=rng.randint(2, 5)), [])
        else:
            messages = stories.write_conversation(rng, turns=TURNS)
            yield str(tokenizer.apply_chat_template(messages, tokenize=False)).rstrip()


def reading(rng: random.Random, text: str, questions: list[tuple[str, str]], summaries: list[str]) -> str:
    """A text, then questions about it and its summary in any order; each answer ends with EOS, as it will when it is used."""
    tasks = [f"Question: {question}\nAnswer: {answer}" for question, answer in questions]
    tasks += [f"Summary: {summary}" for summary in summaries]
    asked = rng.sample(tasks, min(TURNS, len(tasks)))
    return f"{BOS}Story: {text}\n" + "\n".join(f"{task}{EOS}" for task in asked)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts one BOS in front of every text."""
    texts = [document.text for form in stories.WRITERS for document in stories.write_documents(form, 2000, seed=seed)]
    for messages in (stories.write_conversation(random.Random(seed + i)) for i in range(500)):
        texts += [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Example:
    """`(ids, labels)` of a text. What somebody will ask cannot be foreseen, so questions carry no loss: their labels are -100."""
    pieces = re.split(r"((?:Question|User): .*\n)", text)
    ids, labels = [], []
    for i, piece in enumerate(tokenizer(pieces, add_special_tokens=False)["input_ids"]):
        ids += piece
        labels += [-100] * len(piece) if i % 2 else piece
    return ids, labels


# --- model and training ----------------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Under a million parameters, so that float32 weights and tokenizer stay under 4 MB.

    Words of a kind ("morning", "evening") stand in the same places, so training pulls their embeddings together, and a model that
    can no longer tell them apart never learns to look one up. Embeddings that start long (std 1, not 0.05) stay apart: after 0.8
    million tokens 72 % of answers were right, not 30 %. The small final norm keeps the first logits of the tied head small.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # wide heads: finding a fact is attention's work, and 64 learned it faster than 32 or 16
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 200_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    torch.nn.init.constant_(model.model.norm.weight, 0.05)
    return model


def batches(
    documents: list[Example], batch_tokens: int, pad: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`(input_ids, labels)` of about `batch_tokens` each, every document in a row of its own: none sees another.

    Rows of a batch have nearly the same length, so padding costs little. It stands on the right, where causal attention
    needs no mask for it, and its labels are -100.
    """
    made = []
    for start in range(0, len(documents), 1000):
        chunk = sorted(documents[start : start + 1000], key=lambda example: len(example[0]))
        while chunk:
            width = len(chunk[-1][0])
            rows = [chunk.pop() for _ in range(min(len(chunk), batch_tokens // width))]
            ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
            made.append((ids, labels))
    random.Random(seed).shuffle(made)
    return made


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms.

    After 0.8 million tokens of the same text, 72 % of answers were right with Muon and 30 % with AdamW alone.
    """
    inside = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in inside)]
    return [
        torch.optim.Muon(inside, lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]


def train(model: LlamaForCausalLM, documents: list[Example], args: argparse.Namespace) -> tuple[float, float]:
    """One pass over the documents. Returns the mean loss of the last 50 steps and the minutes it took."""
    steps = batches(documents, args.batch_tokens, model.config.pad_token_id, args.seed)
    optimizers = make_optimizers(model)
    share = [LambdaLR(optimizer, lambda step: schedule(step / len(steps))) for optimizer in optimizers]
    model.train()
    start, tokens, losses = time.perf_counter(), 0, []
    for i, (ids, labels) in enumerate(steps, start=1):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *share):
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
        tokens += ids.numel()
        if i % 20 == 0 or i == len(steps):
            seconds = time.perf_counter() - start
            left = seconds / i * (len(steps) - i) / 60
            recent = sum(losses[-20:]) / len(losses[-20:])
            progress = f"step {i}/{len(steps)}  loss {recent:.4f}  {tokens / seconds:,.0f} tok/s  {left:.1f} min left"
            print(f"\r{progress}   ", end="" if i < len(steps) else "\n", flush=True)
    return sum(losses[-50:]) / len(losses[-50:]), (time.perf_counter() - start) / 60


def schedule(done: float) -> float:
    """Share of the peak learning rate: warm up over 2 % of the run, stay, fall as a cosine over the last 60 %."""
    warm_up, fall = 0.02, 0.6
    if done < warm_up:
        return (done + 1e-3) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * max(0.0, (done - (1 - fall)) / fall))


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int, batch: int = 25
) -> dict[str, float]:
    """Share of greedy completions of held-out prompts that the checker accepts, by form; prints a sample of each."""
    rates = {}
    for form in stories.WRITERS:
        documents = list(stories.write_documents(form, count, seed=seed, held_out=True))
        good = 0
        for start in range(0, count, batch):
            group = documents[start : start + batch]
            for document, written in zip(group, complete(model, tokenizer, [d.prompt for d in group]), strict=True):
                try:
                    stories.check(document.prompt + written)
                    good += 1
                except stories.GrammarError as error:
                    print(f"  not of the grammar: {error}")
        rates[form] = good / count
        print(
            f"{form}: {good}/{count} follow the grammar, for example:\n  {documents[-1].prompt} |{written}", flush=True
        )
    return rates


def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=160
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- saving ----------------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write everything beside `out` first, then put it in place: an interrupted run leaves `out` as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card)
        if out.exists():
            out.rename(old)
        shutil.move(new, out)


def model_card(
    model: LlamaForCausalLM, args: argparse.Namespace, loss: float, minutes: float, rates: dict[str, float]
) -> str:
    layers = "the fused layers of llama-fast" if args.fuse else "plain transformers layers"
    measured = "\n".join(f"| {form} | {rate:.0%} |" for form, rate in rates.items())
    return f"""\
# The demo model of llama-fast

A LLaMA of {model.num_parameters():,} parameters ({model.config.num_hidden_layers} layers, grouped-query attention, tied embeddings,
float32) with a byte-level BPE tokenizer of {model.config.vocab_size:,} tokens. It knows one small world: stories of animals in the simple
English of `llama_fast/data/story_grammar.py`, questions about them, and their summaries. It knows nothing else, and outside
that world it writes nonsense.

Made by `python examples/train_demo_model.py`: {args.documents:,} generated documents (seed {args.seed}), each seen once, with {layers},
torch {torch.__version__}, {args.threads} CPU threads, {minutes:.0f} minutes; loss at the end {loss:.3f}.

Share of greedy completions that `llama_fast.data.stories.check` accepts (every sentence of the grammar, the facts consistent, the answer
the right one), for {args.prompts} prompts each from worlds that were held out of training:

| form | accepted |
| --- | --- |
{measured}

Prompts it understands:

    Once upon a time, there was a brave owl named Mia.
    Story: <a story>
    Question: Where did Mia go?
    Answer:
    Story: <a story>
    Summary:

and, by its chat template, "Tell me a story about Mia." with questions to follow.
"""


if __name__ == "__main__":
    main()
