"""Weights alone, out of any checkpoint: to evaluate, decode, or start another training."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from paxlike.checkpoint import arrays, changes, layout
from paxlike.checkpoint.reading import ModelMismatch, log, read_newest
from paxlike.cluster import processes

Rule = tuple[str, str | None]
Use = Literal["auto", "params", "ema"]
Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_KINDS = ("params", "ema")


def read_metadata(path: Path, *, step: int | None = None) -> dict[str, Any]:
    """Step, versions, mesh, number of processes, shapes and dtypes, without reading an array."""
    return arrays.read_item(layout.locate(path, step=step)[0], "metadata")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The Flax variables of a checkpoint, without optimizer state.

    Attributes:
      step: of the checkpoint.
      use: `params` or `ema`, what the parameters are.
      config_text: the resolved config of the run that trained them, empty where nobody knows.
      tokenizer: digest of the tokenizer that they were trained with, None where nobody knows.
    """

    variables: dict[str, Any]
    step: int
    use: str
    config_text: str = ""
    tokenizer: str | None = None

    def doubts(self, *, config_text: str, tokenizer: Any = None) -> list[str]:
        """A line for each reason why the numbers may not be those of the model that was trained.

        Compared with the resolved config and the tokenizer of this start.
        """
        lines = []
        if changed := changes.applied(self.config_text, config_text):
            lines.append(f"this is not the model that was trained to step {self.step:,}: {changed}")
        here = None if tokenizer is None or self.tokenizer is None else tokenizer.digest()
        if here != self.tokenizer and here is not None:
            lines.append(
                f"this tokenizer ({here}) is not the one of step {self.step:,} ({self.tokenizer}): the same ids mean "
                "other text; set VOCAB_PATH to the tokenizer of the training"
            )
        return lines


def restore_variables(
    path: Path,
    abstract: Mapping[str, Any],
    *,
    step: int | None = None,
    use: Use = "auto",
    checksums: bool = True,
    complete: Complete | None = None,
) -> Weights:
    """Everything a model needs to be applied: the weights and its other collections.

    `abstract` is the tree of variables, `{"params": ..., **collections}`; `path` and `step` are as in
    `restore_params`. `auto` takes averaged weights where there are any. Without `checksums` only sizes of files are
    compared, those of the optimizer state too. What was not trained has no average and is taken as it is. `complete`
    gives the weights that a checkpoint of the trained part alone does not hold: it is called with their
    `jax.ShapeDtypeStruct`s by name, and answers with the arrays.
    """
    params = arrays.named_leaves(abstract["params"])
    rest = arrays.named_leaves({k: v for k, v in abstract.items() if k != "params"})

    def read(folder: Path) -> Weights:
        metadata = arrays.read_item(folder, "metadata")
        averaged = any(name.startswith("ema/") for name in metadata["arrays"])
        kind = ("ema" if averaged else "params") if use == "auto" else use
        stored = metadata["arrays"]
        places = _places(stored, kind)
        held = {name: leaf for name, leaf in params.items() if complete is None or name in places}
        described = {f"{kind}/{name}": stored[place] for name, place in places.items()}
        _check(folder, described or stored, held, (), kind, held)
        wanted = {places[name]: leaf for name, leaf in held.items()}
        wanted |= {f"collections/{name}": leaf for name, leaf in rest.items()}
        if lacking := [name for name in wanted if name not in stored]:
            raise ModelMismatch(f"checkpoint {folder} has no array {arrays.some(lacking)}")
        found = arrays.read_arrays(folder, wanted)
        tree = {f"params/{name}": found[places[name]] for name in held}
        absent = {name: leaf for name, leaf in params.items() if name not in held}
        if complete is not None and absent:
            tree |= {f"params/{name}": leaf for name, leaf in complete(absent).items()}
        tree |= {name: found[f"collections/{name}"] for name in rest}
        return Weights(
            arrays.with_leaves(dict(abstract), tree),
            metadata["step"],
            kind,
            arrays.read_item(folder, "config")["text"],
            arrays.read_item(folder, "data").get("fingerprint", {}).get("tokenizer"),
        )

    return read_newest(_folders(path, step), read, checksums=checksums)


def restore_params(
    path: Path,
    abstract_params: Any,
    *,
    step: int | None = None,
    rules: Sequence[Rule] = (),
    use: str = "params",
    init_params: Any = None,
    checksums: bool = True,
) -> Any:
    r"""The weights of a checkpoint, in the tree, dtypes and shardings of `abstract_params`.

    `path` is a job_log_dir, its checkpoints/ folder or one checkpoint; the newest whole one unless
    `step` is given. `use="ema"` takes the averaged weights. `rules` are tried in order on each name
    `a/b/c` that is asked for: the first regular expression that matches all of it gives the name in
    the checkpoint (`\1` is a group), or with None leaves that array as it is in `init_params`. A
    None rule that matches a name in the checkpoint lets that array lie unused. Everything else must
    fit: `ValueError` names what is missing, left over or of another shape.
    """
    if use not in _KINDS:
        raise ValueError(f"use={use!r}: it must be one of {', '.join(map(repr, _KINDS))}")
    wanted = arrays.named_leaves(abstract_params)
    compiled = [(_compiled(pattern), replacement) for pattern, replacement in rules]
    sources = {name: _source(name, compiled) for name in wanted}
    kept = [name for name, source in sources.items() if source is None]
    initial = _initial(kept, init_params)
    taken = {name: source for name, source in sources.items() if source is not None}
    by_source = {source: wanted[name] for name, source in taken.items()}
    if len(by_source) < len(taken):
        twice = next(source for source in by_source if [*taken.values()].count(source) > 1)
        raise ValueError(f"the rules take {twice!r} of the checkpoint for more than one array")

    def read(folder: Path) -> dict[str, Any]:
        stored = arrays.read_item(folder, "metadata")["arrays"]
        _check(folder, stored, by_source, compiled, use, wanted)
        prefixed = {f"{use}/{source}": leaf for source, leaf in by_source.items()}
        found = arrays.read_arrays(folder, prefixed)
        return {name: found[f"{use}/{source}"] for name, source in taken.items()}

    restored = read_newest(_folders(path, step), read, checksums=checksums)
    return arrays.with_leaves(abstract_params, restored | initial)


def _places(stored: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Name of a weight -> where the checkpoint has it; the plain one where there is no average."""
    places = {name: f"{kind}/{name}" for name in _without_prefix(stored, kind)}
    if not places or kind == "params":
        return places
    return {name: f"params/{name}" for name in _without_prefix(stored, "params")} | places


def _initial(kept: Sequence[str], init_params: Any) -> dict[str, Any]:
    """The arrays that the rules leave as they are."""
    if kept and init_params is None:
        raise ValueError(
            f"the rules ignore {arrays.some(kept)}: give init_params, whose values they keep"
        )
    initial = arrays.named_leaves(init_params) if kept else {}
    absent = [name for name in kept if name not in initial]
    if absent:
        raise ValueError(f"the rules ignore {arrays.some(absent)}: init_params does not have it")
    return {name: initial[name] for name in kept}


def _folders(path: Path, step: int | None) -> list[Path]:
    """Checkpoints to try, newest first; the same on all processes."""
    # A running job may add and drop checkpoints meanwhile: process 0 says what there is.
    mine = [str(folder) for folder in layout.locate(path, step=step)]
    return [Path(folder) for folder in json.loads(processes.from_first("locate", json.dumps(mine)))]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is no regular expression: {error}") from error


def _source(name: str, rules: Sequence[tuple[re.Pattern[str], str | None]]) -> str | None:
    """The name in the checkpoint of the array `name`; None: not taken from it."""
    for pattern, replacement in rules:
        if match := pattern.fullmatch(name):
            if replacement is None:
                return None
            try:
                return match.expand(replacement)
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"rule ({pattern.pattern!r}, {replacement!r}) fails on {name}: {error}"
                ) from error
    return name


def _check(
    folder: Path,
    stored: Mapping[str, Mapping],
    wanted: Mapping[str, Any],
    rules: Sequence[tuple[re.Pattern[str], str | None]],
    use: str,
    asked: Iterable[str],
) -> None:
    """Raises `ModelMismatch` unless the weights `wanted`, by name in the checkpoint, are all of it.

    Those that a rule ignores by name need not be wanted.
    """
    weights = _without_prefix(stored, use)
    if not weights:
        have = ", ".join(sorted({name.split("/")[0] for name in stored}))
        raise ModelMismatch(f"checkpoint {folder} has no {use!r} weights; it has {have}")
    for pattern, _ in rules:
        if not any(pattern.fullmatch(name) for name in asked) and not any(
            pattern.fullmatch(name) for name in weights
        ):
            log.warning("rule %r matches no array, here or in %s", pattern.pattern, folder)
    ignored = [pattern for pattern, replacement in rules if replacement is None]
    needed = {
        name: entry
        for name, entry in weights.items()
        if name in wanted or not any(pattern.fullmatch(name) for pattern in ignored)
    }
    if problem := arrays.difference(needed, wanted):
        raise ModelMismatch(
            f"the weights in {folder} do not fit this model: {problem}; "
            "rename or ignore them by rules"
        )


def _without_prefix(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    start = f"{prefix}/"
    return {name[len(start) :]: leaf for name, leaf in named.items() if name.startswith(start)}
