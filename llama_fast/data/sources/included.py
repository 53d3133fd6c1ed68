"""Text that is on this machine already."""

from collections.abc import Iterator

from llama_fast.data.stories import WRITERS, write_documents

from .record import Record

STORIES = 2000  # of each form; an eighth as many held out


def stories() -> Iterator[Record]:
    """Documents of every form of `llama_fast.data.stories`, in files FORM and, of held-out worlds, FORM-held-out."""
    for form in WRITERS:
        for held_out, count in ((False, STORIES), (True, STORIES // 8)):
            file = f"{form}-held-out" if held_out else form
            for number, document in enumerate(write_documents(form, count, seed=0, held_out=held_out)):
                about = {"form": form, "prompt": document.prompt, "completion": document.completion}
                yield Record(file=file, number=number, text=document.text, held_out=held_out, about=about)


def pydoc() -> Iterator[Record]:
    """The topics of Python's reference manual that `help()` shows; which ones, and their words, depend on the version of Python."""
    from pydoc_data.topics import topics

    for number, (topic, text) in enumerate(sorted(topics.items())):
        yield Record(file="topics", number=number, text=text.strip(), about={"topic": topic})
