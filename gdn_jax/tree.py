"""A training state as a flat dict of named arrays, the form that checkpoints, sharding rules and masks use."""

from typing import Any

import jax


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"groups/blocks/0/mixer/q_proj/kernel": leaf, ...} in tree order."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_leaves(tree: Any, leaves: dict[str, Any]) -> Any:
    """The structure of `tree` with its leaves replaced by name; `leaves` must name exactly the leaves of `tree`."""
    names = list(named_leaves(tree))
    if set(names) != set(leaves):
        raise KeyError(f"leaves differ in {sorted(set(names) ^ set(leaves))[:3]}")
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in names])
