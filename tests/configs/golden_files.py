"""Golden files: resolved configs and parameter trees, to see in a diff what a change does."""

import fiddle as fdl
import jax

from paxlike import parallel
from paxlike.train.state import abstract_variables


def variables(config):
    """Abstract variables of a config's model on one device."""
    model = fdl.build(config.experiment()).model
    mesh = parallel.Mesh(ici=(1, 1, 1)).build(jax.devices()[:1])
    with parallel.activate(mesh):
        return abstract_variables(model, mesh)


def tree_of_parameters(config) -> str:
    """One line a parameter: name, shape."""
    leaves = jax.tree_util.tree_leaves_with_path(variables(config))
    lines = [
        f"{jax.tree_util.keystr(p, simple=True, separator='/')} {leaf.shape} {leaf.dtype}"
        for p, leaf in leaves
    ]
    return "\n".join(lines) + "\n"


def compare(path, text, request):
    if request.config.getoption("--renew-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; look at the change, then --renew-golden"
