"""Tasks for the embedded model: stories of worlds that were held out of its training."""

from ..data import stories
from .perplexity import DEFAULT_WINDOWS, Windows
from .tasks import PromptTask, TextTask

LIMIT = 100


def story_texts(*, limit: int = LIMIT, seed: int = 0, windows: Windows = DEFAULT_WINDOWS) -> TextTask:
    """Whole stories, to be predicted. xz knows as many others."""
    held_out = [document.text for document in stories.write_documents("story", limit, seed=seed, held_out=True)]
    known = "\n".join(document.text for document in stories.write_documents("story", 10 * limit, seed=seed))
    return TextTask(name="stories", documents=held_out, windows=windows, training=known + "\n")


def story_questions(*, limit: int = LIMIT, seed: int = 0) -> PromptTask:
    """A story and a question about it."""
    documents = list(stories.write_documents("question", limit, seed=seed, held_out=True))
    return PromptTask(
        name="questions", prompts=[each.prompt for each in documents],
        references=[[each.completion.strip()] for each in documents],
        scores=("accuracy", "exact_match", "f1"), stop=("\n",), max_tokens=48, checker=is_right,
    )  # fmt: skip


def story_summaries(*, limit: int = LIMIT, seed: int = 0) -> PromptTask:
    """A story to be summed up. The references are all the summaries that the grammar knows."""
    prompts = [each.prompt for each in stories.write_documents("summary", limit, seed=seed, held_out=True)]
    told = [prompt.removeprefix("Story: ").removesuffix("\nSummary:") for prompt in prompts]
    return PromptTask(
        name="summaries", prompts=prompts, references=[stories.summaries(stories.parse_story(text)) for text in told],
        scores=("accuracy", "rouge", "chrf", "bleu"), stop=("\n",), max_tokens=96, checker=is_right,
    )  # fmt: skip


def is_right(prompt: str, output: str) -> bool:
    """Whether the grammar could have written it."""
    try:
        stories.check(f"{prompt} {output}")
    except stories.GrammarError:
        return False
    return True
