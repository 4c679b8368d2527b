"""A tree of arrays by name, and reading named arrays back into any sharding.

On disk a state is a tree of dictionaries named by field, key or index (`params/decoder/...`,
`opt_state/0/mu/...`). Branches without arrays (None, {}, empty tuples) are not stored: the tree
that is asked for has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_SHOWN = 3


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of `tree` by their path, `a/b/c`, in the order of flattening."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError(
            f"{len(leaves)} arrays have only {len(named)} different names: a key contains '/'"
        )
    return named


def with_leaves(tree: Any, named: Mapping[str, Any]) -> Any:
    """`tree` with each leaf replaced by the one of its name."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [named[name] for name in named_leaves(tree)]
    )


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dictionaries in which `a/b/c` is `tree["a"]["b"]["c"]`."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *branches, last = name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree


def description(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each array, as kept in the metadata."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in named.items()
    }


def read_item(folder: Path, item: str) -> dict[str, Any]:
    """One JSON item of a checkpoint: data, config or metadata."""
    return json.loads((folder / item / "metadata").read_text())


def difference(stored: Mapping[str, Mapping], wanted: Mapping[str, Any]) -> str | None:
    """How the arrays `wanted` differ from the descriptions `stored`, in one clause; or None."""
    found = [
        f"{name} has shape {list(leaf.shape)} here and {stored[name]['shape']} in the checkpoint"
        for name, leaf in wanted.items()
        if name in stored and stored[name]["shape"] != list(leaf.shape)
    ]
    found += [
        f"{name} has shape {list(leaf.shape)} here and is not in the checkpoint"
        for name, leaf in wanted.items()
        if name not in stored
    ]
    found += [
        f"{name} is not here and has shape {entry['shape']} in the checkpoint"
        for name, entry in stored.items()
        if name not in wanted
    ]
    if not found:
        return None
    return f"{found[0]}; {len(found)} of {len(stored.keys() | wanted.keys())} arrays differ"


def read_arrays(folder: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays `wanted`, name -> `jax.ShapeDtypeStruct`, each born in that sharding and dtype.

    Only their bytes are read, by each process those of its devices. Names and shapes must fit.
    """
    bare = [name for name, leaf in wanted.items() if getattr(leaf, "sharding", None) is None]
    if bare:
        raise ValueError(
            f"no sharding is given for {some(bare)}: each ShapeDtypeStruct must carry one"
        )
    target = nested(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
        }
    )
    if not target:
        return {}
    how = ocp.checkpoint_utils.construct_restore_args(target)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        # The handler alone: a checkpointer would wait for the other processes even after errors.
        return named_leaves(
            handler.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True),
            )
        )
    finally:
        handler.close()


def some(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
