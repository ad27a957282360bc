"""The products of a bf16 training step have bf16 operands: read in the jaxpr of every model at its table's size."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from experiments import get
from experiments.models import PAPER_MODELS
from gdn_jax.layers import Compute
from gdn_jax.loss import next_token_loss
from gdn_jax.model import abstract_model
from gdn_jax.tree import named_leaves

B, T = 1, 256
# a checkout, with its environment, may lie in a folder that is called like a package
ROOT = f"{Path(gdn_jax.__file__).parents[1]}/"
OURS = f"{ROOT}gdn_jax/", f"{ROOT}pallas_kernels/"
# Files whose products stand in for kernels: XLA's attention for cuDNN's, a chunked recurrence for ours. Their fp32
# products (softmax weights; states, solves and gates) are not run where the kernels are.
STAND_INS = ("pallas_kernels/", "attention.py")


def products(closed, times=1):
    """{(widest operand's dtype, file that asked): FLOPs} of every dot_general, scans multiplied out."""
    found = Counter()
    for equation in closed.jaxpr.eqns if hasattr(closed, "jaxpr") else closed.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            a, b = (x.aval for x in equation.invars)
            kept = np.prod([a.shape[i] for i in contracted]) * np.prod([a.shape[i] for i in batched])
            flops = 2 * times * a.size * b.size / kept
            widest = max((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
            frames = [frame.file_name for frame in equation.source_info.traceback.frames]
            asked = next(name for name in frames if name.startswith(OURS))
            found[str(widest), asked.removeprefix(ROOT)] += float(flops)
            continue
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for sub in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns"):
                    found += products(sub, inner)
    return found


def step(name, scale, **options):
    model = abstract_model(get(f"table3/{name}/{scale}").model)
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32)}
    compute = Compute(dtype=jnp.bfloat16, impl="chunked", **options)
    return model, jax.make_jaxpr(jax.value_and_grad(lambda m, b: next_token_loss(m, b, compute)))(model, batch)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_products_have_bf16_operands(name):
    model, jaxpr = step(name, "1.3b")
    found = products(jaxpr)
    ours = {key: flops for key, flops in found.items() if not any(part in key[1] for part in STAND_INS)}
    loss = {key: flops for key, flops in found.items() if "linear_cross_entropy" in key[1]}
    wide = sum(flops for (dtype, _), flops in (ours | loss).items() if dtype != "bfloat16")
    total = sum((ours | loss).values())
    # the count sees forward and backward: three times the forward's products, embedding and head included
    matmul = 3 * 2 * (sum(x.size for x in jax.tree.leaves(model) if x.ndim >= 2)) * B * T
    assert 0.9 < total / matmul < 1.1, (total, matmul)
    assert wide < 1e-2 * total, {key: flops / total for key, flops in ours.items() if key[0] != "bfloat16"}


def test_recomputed_products_are_counted_and_kept_ones_are_not():
    """What a policy keeps is not made again: the products of the step by policy."""
    totals = {}
    for remat in ("none", "products", "full"):
        _, jaxpr = step("transformer", "400m", remat=remat)
        linear = {key: flops for key, flops in products(jaxpr).items() if "layers.py" in key[1]}
        totals[remat] = sum(linear.values())
    assert totals["products"] == totals["none"]
    model = get("table3/transformer/400m").model
    D, F = model.d_model, model.d_ff
    again = (
        2 * B * T * model.layers * (4 * D * D + 2 * D * F)
    )  # all but the down projection, whose result no rule needs
    assert totals["full"] == totals["none"] + again


def casts(closed):
    """Counter of (shape, to which dtype) of every cast."""
    found = Counter()
    for equation in closed.jaxpr.eqns if hasattr(closed, "jaxpr") else closed.eqns:
        if equation.primitive.name == "convert_element_type":
            found[equation.outvars[0].aval.shape, str(equation.params["new_dtype"])] += 1
        for value in equation.params.values():
            for sub in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns"):
                    found += casts(sub)
    return found


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["gated-deltanet", "mamba2", "hgrn2"])
def test_a_weight_is_cast_once_before_the_layers_and_its_gradient_once_after(name, scan):
    """Not in each layer, again where a layer is recomputed, and at once in what a layer gives back."""
    model, jaxpr = step(name, "tiny", remat="products+kernels", scan_layers=scan)
    found = casts(jaxpr)
    kernels = Counter(leaf.shape for name, leaf in named_leaves(model.groups).items() if name.endswith("/kernel"))
    for shape, count in kernels.items():
        assert found[shape, "bfloat16"] == found[shape, "float32"] == count
        assert found[shape[1:], "bfloat16"] == found[shape[1:], "float32"] == 0
