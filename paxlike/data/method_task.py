"""A question on real text whose answer is certain: is this Python function a method of a class?

    python -m paxlike.data.method_task --output DIR

writes DIR/methods_train.jsonl and DIR/methods_validation.jsonl in BoolQ's form (`passage`, `question`, `answer`): the
first lines of functions of the library of the running Python, dedented, with the answer that the syntax tree gives. As
many methods as functions, so that guessing is right half of the time; files that are kept apart are not trained on.
"""

import ast
import json
import os
import random
import textwrap
from collections.abc import Iterator

from paxlike.arguments import ArgumentParser
from paxlike.data.stdlib_text import documents, is_held_out

QUESTION = "is this a method of a class"


def examples(text: str, *, max_characters: int = 300) -> Iterator[tuple[str, bool]]:
    """(source of a function, whether it is a method), of the functions of a module and of its classes."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for scope, is_method in _scopes(tree):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                source = "".join(lines[node.lineno - 1 : node.end_lineno])
                yield textwrap.dedent(source)[:max_characters].rstrip(), is_method


def write(output: str, *, max_megabytes: float = 16.0, max_characters: int = 300) -> dict[str, int]:
    """Writes both files; the number of examples of each."""
    found: dict[str, dict[bool, list[str]]] = {
        split: {True: [], False: []} for split in ("train", "validation")
    }
    for document in documents(max_megabytes=max_megabytes):
        if document.path.endswith(".py"):
            split = "validation" if is_held_out(document.path, percent=10.0) else "train"
            for source, is_method in examples(document.text, max_characters=max_characters):
                found[split][is_method].append(source)
    os.makedirs(output, exist_ok=True)
    counts = {}
    for split, by_answer in found.items():
        number = min(map(len, by_answer.values()))
        draw = random.Random(0)
        records = [
            {"passage": source, "question": QUESTION, "answer": answer}
            for answer, sources in by_answer.items()
            for source in draw.sample(sources, number)
        ]
        draw.shuffle(records)
        path = os.path.join(output, f"methods_{split}.jsonl")
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(f"{path}.tmp", path)
        counts[split] = len(records)
    return counts


def _scopes(tree: ast.Module) -> Iterator[tuple[ast.Module | ast.ClassDef, bool]]:
    yield tree, False
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node, True


def main() -> None:
    """The command line."""
    parser = ArgumentParser(description="Questions whose answers are certain.")
    parser.add_argument("--output", required=True, help="folder of the two files")
    parser.add_argument("--max_characters", type=int, default=300, help="of each function")
    options = parser.parse_args()
    counts = write(options.output, max_characters=options.max_characters)
    print(", ".join(f"{count:,} {split} questions" for split, count in counts.items()))


if __name__ == "__main__":
    main()
